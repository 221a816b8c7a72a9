"""Networks that others wrote, pruned: done right, channel by channel, or refused in a sentence."""

import warnings
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dinv import pruning
from dinv.models import Classifier
from dinv.pruning import PruningSettings, Unreachable, load_pruned, prune
from dinv.pruning_graph import dependencies, filter_groups


def classifier(*layers, width, name="theirs"):
    """These layers, pooling and a head of three classes; BatchNorm and its kin as if they were trained."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    with torch.no_grad():
        for layer in net.modules():
            for part in ("weight", "running_var"):
                if hasattr(layer, "running_var"):
                    getattr(layer, part).uniform_(0.5, 2)
                    layer.bias.normal_()
    return Classifier(net, (0.5,) * 3, (0.25,) * 3, 8, "abc", name).freeze()


def images(count=6):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def check(network, filters, step=0.1, **settings):
    """Prune; the smaller network answers as the whole one does with the same channels at zero."""
    chosen = PruningSettings(step=step, **settings)
    pruned = prune(network, images(), filters=filters, settings=chosen)
    left = {group.makers[0]: list(range(group.width)) for group in filter_groups(dependencies(network))}
    gone = {name: [] for name in left}
    for name, channels in pruned.removed:
        gone[name] += [left[name][channel] for channel in channels]
        left[name] = [channel for channel in left[name] if channel not in gone[name]]
    with ExitStack() as hooks:
        for group in filter_groups(graph := dependencies(network)):
            shut = torch.tensor(gone[group.makers[0]], dtype=torch.int64)
            for layer, own, channels in group.gates:
                lost = own[torch.isin(channels, shut)]
                hook = lambda _, __, x, lost=lost: x.index_fill(1, lost, 0.0)  # noqa: E731
                hooks.enter_context(layer.register_forward_hook(hook))
        expected = graph.model(images())
    torch.testing.assert_close(pruned.network(images()), expected, atol=1e-5, rtol=1e-4)
    return pruned


def resnext(groups=4, norm=nn.BatchNorm2d):
    grouped = nn.Conv2d(8, 16, 3, padding=1, groups=groups)
    return classifier(
        nn.Conv2d(3, 8, 1), norm(8), nn.ReLU(), grouped, norm(16), nn.ReLU(),
        nn.Conv2d(16, 8, 1), norm(8), nn.ReLU(), width=8,
    )  # fmt: skip


@pytest.mark.parametrize("importance", pruning.IMPORTANCES[0::2])
@pytest.mark.parametrize("groups, left", [(2, 22), (4, 22), (8, 24), (1, 23)])
def test_a_grouped_convolution_loses_as_many_channels_from_each_group(groups, left, importance, tmp_path):
    network = resnext(groups)
    pruned = check(network, 0.3, step=0.3, importance=importance)
    layer = pruned.network.net[3]
    assert layer.groups == groups
    assert layer.in_channels % layer.groups == layer.out_channels % layer.groups == 0
    assert pruning.filter_count(pruned.network) <= left
    again = load_pruned(pruned.save(tmp_path / "x.safetensors"), network)
    assert torch.equal(again.network(images()), pruned.network(images()))


def with_a_norm_after_pooling(rows):
    """BatchNorm1d over pooled features: one row an image, or one for every pixel that is left."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(rows))
            self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.features(x).flatten(2).transpose(1, 2)
            return self.head(self.norm(x.flatten(0, 1)).reshape(x.shape).mean(1))

    torch.manual_seed(0)
    return Classifier(Net(), (0.5,) * 3, (0.25,) * 3, 8, "abc", "theirs").freeze()


def test_a_norm_of_rows_is_pruned_where_a_row_is_an_image():
    check(with_a_norm_after_pooling(1), 0.25, step=0.25)
    tokens = with_a_norm_after_pooling(2)
    with pytest.raises(
        ValueError, match=r"theirs cannot be pruned: its layer net\.norm sees 24 rows of 6 im"
    ):
        prune(tokens, images(), filters=0.25)
    check(tokens, 0.25, step=0.25, importance="magnitude")


def test_units_are_as_the_layers_divide_their_channels():
    first, grouped, _ = filter_groups(dependencies(resnext(4)))
    assert first.units == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert grouped.units == [[k, k + 4, k + 8, k + 12] for k in range(4)]
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    network = classifier(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), depthwise, nn.ReLU(), width=8)
    assert filter_groups(dependencies(network))[0].units == [[k] for k in range(8)]
    network = classifier(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1, groups=2), width=8)
    (first, last) = filter_groups(dependencies(network))
    assert first.units == [[0, 2, 4, 6], [1, 3, 5, 7]] and last.units == [[k, k + 4] for k in range(4)]


def test_groups_widths_and_blocks_agree():
    settings = PruningSettings(step=0.5, multiple=4, importance="magnitude")
    pruned = prune(resnext(2), images(), filters=0.3, settings=settings)
    assert all(layer.out_channels % 4 == 0 for layer in pruned.network.net if isinstance(layer, nn.Conv2d))


def test_group_norm_is_pruned_group_by_group():
    network = classifier(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), width=6
    )
    pruned = prune(network, images(), filters=0.4, settings=PruningSettings(step=0.4))
    norm = pruned.network.net[1]
    assert norm.num_channels == pruned.network.net[0].out_channels and norm.num_channels % 4 == 0
    single = classifier(nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.ReLU(), width=8)
    with pytest.raises(Unreachable, match="at 0.00 every layer is down to"):
        prune(single, images(), filters=0.1)


def test_frozen_batchnorm_is_pruned_with_its_filters():
    timm = pytest.importorskip("timm.layers")
    for norm in (FrozenBatchNorm2d, timm.BatchNormAct2d, timm.FrozenBatchNormAct2d):
        pruned = check(resnext(1, norm), 0.3)
        assert len(pruned.network.net[4].running_mean) == pruned.network.net[3].out_channels < 16
    half = resnext(1)
    half.net[1] = FrozenBatchNorm2d(8)
    check(half, 0.3)


class Written(nn.Module):
    """Its convolution's channels are written out where it reshapes."""

    def __init__(self, shape, width):
        super().__init__()
        self.c, self.f, self.shape = nn.Conv2d(3, 8, 3), nn.Linear(width, 3), shape

    def forward(self, x):
        return self.f(F.adaptive_avg_pool2d(F.relu(self.c(x)), 2).reshape(self.shape).flatten(1))


class Halves(nn.Module):
    """Channels are split at a number that is written out, and come together again in another order."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        one, two = self.a(x).split(4, 1)
        return self.f(self.b(torch.cat([two.relu(), one.tanh()], 1)).mean((2, 3)))


class Shuffled(Halves):
    def forward(self, x):
        return self.f(self.b(self.a(x).flip(1)).mean((2, 3)))  # as many channels, but others


class Ghost(Halves):
    """A channel shuffle, which every even number of channels survives."""

    def forward(self, x):
        x = self.a(x)
        x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.f(self.b(x).mean((2, 3)))


class Late(Halves):
    """Says nothing while one filter is gone: fails when fewer than six are left."""

    def forward(self, x):
        x = self.a(x).relu()
        if x.shape[1] < 6:
            raise KeyError("six at least")
        return self.f(self.b(x).mean((2, 3)))


@pytest.mark.parametrize(
    "net, reason",
    [
        (Written((-1, 8, 4), 32), "its channels are split, reshaped or shuffled before net.f$"),
        (Written((-1, 32), 32), r"do not fit \(net reshapes to -1, 32, written out\)$"),
        (Halves(), "its graph cannot be followed: "),
        (Shuffled(), "its channels are split, reshaped or shuffled before net.b$"),
        (Ghost(), r"do not fit \(net reshapes to 1, 2, -1, 8, 8, written out\)$"),
        (Late(), r"do not fit \(in net: 'six at least'\)$"),
        (nn.Sequential(nn.Conv2d(3, 8, 9), nn.Flatten(), nn.Linear(8, 3)), "Kernel size can't be greater"),
    ],
    ids=["map", "row", "halves", "flipped", "shuffled", "late", "never ran"],
)
def test_what_cannot_be_pruned_is_named(net, reason):
    network = Classifier(net, (0.5,) * 3, (0.25,) * 3, 8, "abc", "theirs").freeze()
    said = f"^theirs (cannot be pruned:|fails on) .*{reason}"
    with warnings.catch_warnings(), pytest.raises(ValueError, match=said):
        warnings.simplefilter("error")
        prune(network, images(), filters=0.8, settings=PruningSettings(importance="random", step=0.2))


def test_a_network_that_does_not_fit_is_refused_before_an_image_is_read():
    network = Classifier(Written((-1, 32), 32), (0.5,) * 3, (0.25,) * 3, 8, "abc", "theirs").freeze()
    with pytest.raises(ValueError, match="written out"):
        prune(network, None, filters=0.1)
