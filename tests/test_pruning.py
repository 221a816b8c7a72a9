"""Pruning: which filter counts, what goes with it, what is left, and what is refused."""

import json
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dinv import files, pruning
from dinv.compiling import forward_flops
from dinv.data import load_dataset
from dinv.latency import WIDTHS, LatencyTable, Layer, above, batch_of, interleaved, latencies
from dinv.models import Classifier, create_model, load_model, parameter_count
from dinv.models.cifar import ConvUnit
from dinv.pruning import IMPORTANCES, PruningSettings, Unreachable, filter_groups, load_pruned, prune
from dinv.training import accuracy

NAMES = [f"class{i}" for i in range(5)]


def some_images(count=12):
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def residual(seed=0):
    """A unit, one that adds to it, one that does not, and a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        units = [ConvUnit(3, 6), ConvUnit(6, 6), ConvUnit(6, 8, 2)]
        net = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 2)
                nn.init.normal_(layer.bias)
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2)
    return Classifier(net, (0.3, 0.45, 0.6), (0.2, 0.25, 0.3), 8, NAMES, "residual").freeze()


def groups(network):
    return filter_groups(pruning.dependencies(network))


@pytest.fixture(scope="module")
def teacher():
    return load_model("resnet_digits")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "train").take(slice(0, 256)), load_dataset("digits", "test")


def test_channels_on_both_sides_of_an_addition_are_one_group():
    addition, last = groups(residual())
    assert (addition.width, last.width) == (6, 8)
    assert addition.makers == ["net.0.conv", "net.1.conv"] and last.makers == ["net.2.conv"]
    norms = [[layer.num_features for layer, _, _ in group.gates] for group in (addition, last)]
    assert norms == [[6, 6], [8]]
    assert addition.consumers == {"net.1.conv", "net.2.conv"} and last.consumers == {"net.5"}


def shut(network, gates, images, labels):
    """Loss of every image with each gate's output times a factor of its own."""
    with ExitStack() as stack:
        for layer, factor in gates:
            hook = lambda _, __, out, factor=factor: out * factor.view(1, -1, 1, 1)  # noqa: E731
            stack.enter_context(layer.register_forward_hook(hook))
        return nn.functional.cross_entropy(network(images), labels, reduction="none")


def test_taylor_against_central_differences_in_float64():
    images, labels = some_images(5).double() / 255, torch.arange(5)
    every_group = groups(residual().double())
    scores = pruning.taylor(every_group, images, labels, batch_size=2)
    for one, other in zip(scores, pruning.taylor(every_group, images, labels, batch_size=5), strict=True):
        torch.testing.assert_close(one, other)  # in any batches
    for group, score in zip(every_group, scores, strict=True):
        for channel in range(group.width):
            losses = []
            for change in (1e-5, -1e-5):
                factor = torch.ones(group.width, dtype=torch.float64)
                factor[channel] += change
                gates = [(layer, factor) for layer, _, _ in group.gates]
                with torch.no_grad():
                    losses.append(shut(group.network, gates, images, labels))
            slope = (losses[0] - losses[1]) / 2e-5
            assert score[channel] == pytest.approx(slope.square().mean().item(), rel=1e-4)


def test_labels_are_sampled_from_the_networks_own_probabilities(tiny):
    network, image = tiny().freeze(), some_images(1)
    labels = pruning.sampled_labels(network, image.expand(20000, -1, -1, -1), torch.Generator())
    shares = torch.bincount(labels, minlength=5) / 20000
    torch.testing.assert_close(shares, network(image / 255)[0].softmax(0), atol=0.015, rtol=0)


def test_the_plain_gradient_of_the_divergence_is_zero_while_both_networks_are_equal(tiny):
    network, images = tiny().freeze(), some_images(4) / 255
    teacher, student = network(images).softmax(1), network(images).requires_grad_()
    divergence = (teacher * (teacher.log() - student.log_softmax(1))).sum()
    assert torch.autograd.grad(divergence, student)[0].abs().max() < 1e-6


def test_magnitude_against_numpy():
    network = residual()
    for group in groups(network):
        total = np.zeros(group.width)
        weights = [network.get_submodule(name).weight for name in group.makers]
        for weight in weights + [layer.weight for layer, _, _ in group.gates]:
            total += (weight.detach().numpy().reshape(group.width, -1) ** 2).sum(1)
        for name in group.consumers:
            weight = network.get_submodule(name).weight.detach().numpy()
            total += (weight.swapaxes(0, 1).reshape(group.width, -1) ** 2).sum(1)
        np.testing.assert_allclose(group.magnitude(), total / total.mean(), rtol=1e-5)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_removing_a_channel_is_shutting_it(importance):
    """The smaller network answers as the whole one does with the same channels at zero."""
    network, images = residual(), some_images()
    settings = PruningSettings(importance=importance, step=0.1)
    pruned = prune(network, images, filters=0.5, settings=settings, labels=torch.arange(12) % 5)
    gone, left = {}, {group.makers[0]: list(range(group.width)) for group in groups(residual())}
    for name, channels in pruned.removed:
        gone.setdefault(name, []).extend(left[name][channel] for channel in channels)
        left[name] = [channel for channel in left[name] if channel not in gone[name]]
    closed = groups(network)
    with torch.no_grad():
        for group in closed:
            for layer, _, _ in group.gates:
                layer.weight[gone.get(group.makers[0], [])] = 0
                layer.bias[gone.get(group.makers[0], [])] = 0
    shut_down = closed[0].network(images / 255)
    torch.testing.assert_close(pruned.network(images / 255), shut_down, atol=1e-5, rtol=1e-4)


def test_the_original_stays_as_it_was_and_nothing_removed_leaves_equal_outputs(portrait):
    network, images = residual(), some_images()
    before = portrait(network)
    assert prune(network, images, filters=0.3).network is not network
    none = prune(network, images, filters=0.0)
    assert none.removed == [] and none.history == [] and portrait(network) == before
    assert torch.equal(none.network(images / 255), network(images / 255))


def test_shapes_operations_parameters_and_file_agree_with_the_arithmetic(tmp_path):
    network = residual()
    pruned = prune(network, some_images(), filters=0.5, settings=PruningSettings(step=0.05))
    small = pruned.network
    a, b, c = (small.net[i].conv.out_channels for i in range(3))
    assert a == b and 2 * a + c == pruning.filter_count(small) <= 10 < 2 * a + c + 2
    for unit, inputs, outputs in ((small.net[0], 3, a), (small.net[1], a, a), (small.net[2], a, c)):
        assert unit.conv.weight.shape == (outputs, inputs, 3, 3)
        assert unit.bn.running_mean.shape == unit.bn.running_var.shape == unit.bn.bias.shape == (outputs,)
    assert small.net[5].weight.shape == (5, c)
    weights = 9 * (3 * a + a * a + a * c) + 2 * (a + a + c) + 5 * c + 5
    assert parameter_count(small) == weights
    assert forward_flops(small) == 2 * (9 * 64 * (3 * a + a * a) + 9 * 16 * a * c + 5 * c)
    assert pruned.history[-1]["filters"] == pruning.filter_count(small) / 20
    assert pruned.history[-1]["flops"] == pytest.approx(forward_flops(small) / forward_flops(network))
    numbers = weights + 2 * (a + a + c) + 6  # running statistics, normalisation
    path = pruned.save(tmp_path / "small.safetensors")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + 4 * numbers + 3 * 8  # and each BatchNorm's count of batches


@pytest.mark.parametrize("target", ["filters", "flops", "latency"])
def test_a_target_is_reached_and_hardly_passed(teacher, digits, target):
    table = table_of(teacher)
    pruned = prune(teacher, digits[0].images[:32], **{target: 0.3}, table=table)
    assert 0.62 < pruned.history[-1][target] <= 0.7
    assert all(a[target] >= b[target] for a, b in zip(pruned.history, pruned.history[1:], strict=False))


def test_widths_are_multiples_where_that_is_asked():
    network = create_model("resnet_small")
    settings = PruningSettings(importance="magnitude", multiple=8, step=0.1)
    pruned = prune(network, torch.rand(2, 3, 32, 32), filters=0.4, settings=settings)
    widths = [group.width for group in groups(pruned.network)]
    assert not any(width % 8 for width in widths) and sum(widths) < sum(g.width for g in groups(network))
    first, count = pruned.removed[0], 0.1 * pruning.filter_count(network)
    group = next(group for group in groups(network) if first[0] in group.makers)
    assert (
        set(first[1]) <= set(group.magnitude().argsort()[: len(first[1])].tolist())
        and len(first[1]) <= count + 8
    )


def test_equal_seeds_equal_networks_of_bytes_or_floats(teacher, digits):
    images = digits[0].images[:64]
    pairs = [(images, 3), (images / 255, 3), (images, 4)]
    removed = [prune(teacher, data, filters=0.2, seed=seed).removed for data, seed in pairs]
    assert removed[0] == removed[1] != removed[2]


def test_the_divergence_finds_filters_that_matter_without_a_label(teacher, digits):
    train, test = digits
    left = {}
    for importance in ("kl", "random"):
        settings = PruningSettings(importance=importance)
        pruned = prune(teacher, train.images, filters=0.2, settings=settings)
        left[importance] = accuracy(pruned.network, test.images, test.labels)
    assert left["kl"] > 90 and left["kl"] > left["random"] + 20


KNOWN = "cifar_resnet18 cifar_resnet34 cifar_vgg11 vgg_digits mobilenet_v2 resnet50"


@pytest.mark.parametrize("name", KNOWN.split())
def test_known_networks(name):
    network = create_model(name, "digits").freeze()
    images = torch.randint(256, (2, network.channels, network.size, network.size), dtype=torch.uint8)
    pruned = prune(network, images, filters=0.2, settings=PruningSettings(step=0.2))
    assert 0.78 < pruned.history[-1]["filters"] <= 0.8
    assert pruned.network(images / 255).shape == (2, len(network.classes))


def test_a_pruned_network_comes_back_from_its_file(teacher, digits, tmp_path):
    pruned = prune(teacher, digits[0].images[:64], filters=0.3)
    path = pruned.save(tmp_path / "small.safetensors")
    again = load_pruned(path, create_model("resnet_digits", "digits", seed=9))
    images = digits[1].images[:20] / 255
    assert torch.equal(again.network(images), pruned.network(images)) and not again.network.training
    assert json.dumps(again.removed) == json.dumps(pruned.removed)
    with pytest.raises(ValueError, match="was resnet_digits before it was pruned, not vgg_digits"):
        load_pruned(path, create_model("vgg_digits", "digits"))
    with pytest.raises(ValueError, match="look at its layer net.0.conv"):
        pruning.restructured(residual(), [("net.0.conv", [6])])
    files.write_tensors(tmp_path / "other.safetensors", {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="holds no pruned network"):
        load_pruned(tmp_path / "other.safetensors", teacher)


def table_of(network, cost=lambda inputs, outputs: inputs * outputs / 1000):
    """Every convolution takes a millisecond for a product of 1,000 channels, or what `cost` says."""
    layers = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            inputs, outputs = layer.in_channels, layer.out_channels
            cells = tuple(tuple(cost(inputs * a, outputs * b) for b in WIDTHS) for a in WIDTHS)
            layers[name] = Layer(inputs, outputs, cells)
    return LatencyTable(layers)


def test_a_layers_latency_is_interpolated():
    layer = Layer(16, 32, tuple(tuple(10 * a + b for b in WIDTHS) for a in WIDTHS))
    assert layer.at(16, 32) == pytest.approx(11)
    assert layer.at(6, 20) == pytest.approx(10 * 6 / 16 + 20 / 32)
    assert layer.at(1, 1) == pytest.approx(10 * 0.25 + 0.25)  # below the smallest that was measured
    assert Layer(16, 16, (tuple(WIDTHS),) * len(WIDTHS)).at(6, 6) == pytest.approx(6 / 16)  # depthwise


def test_what_a_channel_saves_is_what_the_table_says_afterwards():
    graph = pruning.dependencies(residual())
    network = graph.model
    table = table_of(network)
    for group in filter_groups(graph):
        before, promised = table.of(network), table.saving(network, group.makers, group.consumers)
        assert promised > 0
        group.remove([1])
        assert before - table.of(network) == pytest.approx(promised, rel=0.1)


def test_a_share_that_the_table_does_not_reach_is_told_as_such():
    network, coarse = residual(), PruningSettings(step=0.5)
    flat = table_of(network, cost=lambda inputs, outputs: 0.03)  # a GPU done with every layer at once
    with pytest.raises(Unreachable, match="latency=0.1 cannot be removed from residual: at 0.00") as error:
        prune(network, some_images(), latency=0.1, table=flat, settings=coarse)
    assert error.value.most == 0 and isinstance(error.value, ValueError)
    with pytest.raises(Unreachable, match="filters=0.95 .* at 0.85 every layer is down to") as error:
        prune(network, some_images(), filters=0.95, settings=coarse)
    assert error.value.most == pytest.approx(0.85)  # three of twenty filters have to stay


def test_points_above_a_line_are_compared_at_their_own_time():
    line = [(100.0, 90.0), (50.0, 70.0), (60.0, 80.0)]  # in any order
    assert above(line, [(80.0, 90.0), (55.0, 70.0), (100.0, 90.0)]) == pytest.approx([5.0, -5.0, 0.0])
    assert above(line, [(49.9, 70.0), (101.0, 99.0)]) == []  # nothing to compare with


def test_latency_makes_the_cheap_layers_stay(teacher, digits):
    options = {"filters": 0.2, "table": table_of(teacher)}
    left = []
    for eta in (0.0, 100.0):
        pruned = prune(teacher, digits[0].images[:32], settings=PruningSettings(eta=eta), **options)
        left.append(pruned.history[-1]["latency"])
    assert left[1] < left[0]


def test_a_measured_table_knows_every_convolution(teacher, tiny):
    table = LatencyTable.measure(teacher, batch_size=4, repeats=2)
    assert table.batch_size == 4
    assert list(table.layers) == [n for n, m in teacher.named_modules() if isinstance(m, nn.Conv2d)]
    assert all(ms > 0 for layer in table.layers.values() for row in layer.milliseconds for ms in row)
    total = sum(layer.milliseconds[-1][-1] for layer in table.layers.values())
    assert table.of(teacher) == pytest.approx(total)
    assert [batch_of(torch.device(kind)) for kind in ("cpu", "cuda")] == [64, 1024]
    assert LatencyTable.measure(tiny().freeze(), repeats=1).batch_size == 64


def test_calls_are_timed_in_turn(teacher):
    order = []
    seconds = interleaved([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert "".join(order) == "ab" * 4 and seconds.shape == (3, 2) and (seconds >= 0).all()
    assert latencies([teacher, residual()], batch_size=2, repeats=3).shape == (3, 2)


class Gpu:
    """A pretended CUDA: its clock, in milliseconds, and what is launched or captured on it."""

    def __init__(self, monkeypatch):
        self.now, self.log, self.captured = 0.0, [], None
        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Stream": lambda: stream, "CUDAGraph": lambda: SimpleNamespace(), "Event": self.event}
        fakes |= {"current_stream": lambda: stream, "stream": nullcontext, "device": nullcontext}
        for name, fake in (fakes | {"graph_pool_handle": lambda: "pool", "graph": self.graph}).items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def launch(self, name, milliseconds):
        if self.captured is None:
            self.now += milliseconds
            self.log.append(name)
        else:
            self.captured.append(milliseconds)

    @contextmanager
    def graph(self, graph, pool, stream):
        assert pool == "pool"
        self.captured = calls = []
        yield
        self.captured = None
        graph.replay = lambda: self.launch(len(calls), sum(calls))

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda later: later.at - event.at
        return event


def test_on_a_gpu_calls_are_captured_and_timed_by_its_own_clock(monkeypatch):
    gpu = Gpu(monkeypatch)
    calls = [lambda: gpu.launch("a", 2.0), lambda: gpu.launch("b", 5.0)]
    seconds = interleaved(calls, 3, torch.device("cuda"))
    torch.testing.assert_close(seconds, torch.tensor([[0.002, 0.005]] * 3, dtype=torch.float64))
    assert "a" in gpu.log and "b" in gpu.log  # first one by one: kernels are chosen
    replays = [entry for entry in gpu.log if not isinstance(entry, str)]
    assert replays == [20] * 2 * 4 and gpu.log[-len(replays) :] == replays


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "name one target of filters, flops, latency, got none"),
        ({"filters": 0.1, "flops": 0.1}, "got filters, flops"),
        ({"filters": 1.0}, "filters=1.0 must be a share from 0 to below 1: something has to be left"),
        ({"filters": 0.1, "settings": PruningSettings("cross-entropy")}, "needs labels"),
        ({"latency": 0.1}, "latency is measured first"),
        ({"filters": 0.1, "settings": PruningSettings(eta=1.0)}, "latency is measured first"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        prune(residual(), some_images(), **options)


def test_bad_settings():
    for bad, message in (
        ({"step": 0.0}, "step=0.0 must be positive"), ({"keep": 1.5}, "keep=1.5 are shares, at most 1"),
        ({"eta": float("nan")}, "eta=nan"), ({"importance": "taste"}, "'taste': choose kl, cross-entropy"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PruningSettings(**bad)


class Constant(nn.Module):
    """No layer at all that a gradient would lead back to."""

    def forward(self, x):
        return torch.zeros(len(x), 5)


def test_a_network_that_cannot_be_pruned():
    for net in (Constant(), nn.Sequential(nn.Flatten(), nn.Linear(192, 5))):
        network = Classifier(net, (0.5,) * 3, (0.5,) * 3, 8, NAMES)
        with pytest.raises(ValueError, match=f"{network.name} cannot be pruned: it"):
            prune(network, some_images(), filters=0.1)
