"""Pruning: which filter counts, what goes with it, what is left, and what is refused."""

import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinv.datasets import load_dataset
from dinv.latency import WIDTHS, LatencyTable, Layer, above, batch_of, interleaved, latencies
from dinv.metrics import accuracy
from dinv.models import Classifier, create_model, load_model, parameter_count
from dinv.models.export import export_onnx
from dinv.models.small import ConvUnit
from dinv.pruning import (
    IMPORTANCES,
    Unreachable,
    dependencies,
    drawn_answers,
    filter_count,
    groups_of,
    load_pruned,
    prune,
    restructured,
    taylor,
)
from dinv.step import forward_flops


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=12, seed=0):
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator(seed))


def residual(seed=0):
    """A unit, one that adds to it, one that does not, and a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            ConvUnit(3, 6),
            ConvUnit(6, 6),
            ConvUnit(6, 8, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 2)
                nn.init.normal_(layer.bias)
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2)
    names = [f"class{i}" for i in range(5)]
    return Classifier(net, (0.3, 0.45, 0.6), (0.2, 0.25, 0.3), 8, names, "residual").freeze()


def groups(network):
    return groups_of(dependencies(network))


@pytest.fixture(scope="module")
def teacher():
    return load_model("resnet_digits")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "train").take(slice(0, 256)), load_dataset("digits", "test")


# ---- groups and their importance -----------------------------------------------------------------


def test_channels_on_both_sides_of_an_addition_are_one_group():
    found = groups(residual())
    assert [group.width for group in found] == [6, 8]
    assert [[member.name for member in group.convolutions] for group in found] == [
        ["net.0.conv", "net.1.conv"], ["net.2.conv"],
    ]  # fmt: skip
    assert [[gate.name for gate in group.gates] for group in found] == [
        ["net.0.bn", "net.1.bn"], ["net.2.bn"],
    ]  # fmt: skip
    assert [group.consumers for group in found] == [{"net.1.conv", "net.2.conv"}, {"net.5"}]


def shut(network, gates, images, labels):
    """Loss of every image with each gate's output times a factor of its own."""
    handles = [
        layer.register_forward_hook(lambda _, __, out, factor=factor: out * factor.view(1, -1, 1, 1))
        for layer, factor in gates
    ]
    try:
        return nn.functional.cross_entropy(network(images), labels, reduction="none")
    finally:
        for handle in handles:
            handle.remove()


def test_taylor_against_central_differences_in_float64():
    images = some_images(5).double() / 255
    labels = torch.arange(5)
    found = groups(residual().double())
    scores = taylor(found, images, labels, batch=2)
    for group, score in zip(found, scores, strict=True):
        for channel in range(group.width):
            losses = []
            for change in (1e-5, -1e-5):
                factors = [torch.ones(group.width, dtype=torch.float64) for _ in group.gates]
                for factor in factors:
                    factor[channel] += change
                layers = [gate.layer for gate in group.gates]
                with torch.no_grad():
                    losses.append(shut(found[0].network, zip(layers, factors, strict=True), images, labels))
            slope = (losses[0] - losses[1]) / 2e-5
            assert score[channel] == pytest.approx(slope.square().mean().item(), rel=1e-4)


def test_taylor_is_the_same_in_any_batches():
    network, images, labels = residual(), some_images(7), torch.arange(7) % 5
    for one, other in zip(*(taylor(groups(network), images, labels, n) for n in (2, 7)), strict=True):
        torch.testing.assert_close(one, other)


def test_answers_are_drawn_from_the_networks_own_probabilities(tiny):
    network, image = tiny().freeze(), some_images(1)
    drawn = drawn_answers(network, image.expand(20000, -1, -1, -1), generator())
    found = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(found, network(image / 255)[0].softmax(0), atol=0.015, rtol=0)


def test_the_divergence_needs_no_labels_and_its_plain_gradient_would_be_zero(tiny):
    network = tiny().freeze()
    images = some_images(4) / 255
    wanted = network(images).softmax(1)
    given = network(images).log_softmax(1).requires_grad_()
    (slope,) = torch.autograd.grad((wanted * (wanted.log() - given.log_softmax(1))).sum(), given)
    assert slope.abs().max() < 1e-6
    assert prune(network, some_images(), filters=0.3).network is not network


def test_magnitude_against_numpy():
    network = residual()
    for group in groups(network):
        total = np.zeros(group.width)
        for member in (*group.convolutions, *group.gates):
            total += (member.layer.weight.detach().numpy().reshape(group.width, -1) ** 2).sum(1)
        for name in group.consumers:
            weight = network.get_submodule(name).weight.detach().numpy()
            total += (weight.swapaxes(0, 1).reshape(group.width, -1) ** 2).sum(1)
        np.testing.assert_allclose(group.magnitude(), total / total.mean(), rtol=1e-5)


# ---- what is left --------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_removing_a_channel_is_shutting_it(importance):
    """The smaller network answers as the whole one does with the same channels at zero."""
    network, images = residual(), some_images()
    pruned = prune(network, images, filters=0.5, importance=importance, labels=torch.arange(12) % 5, step=0.1)
    gone, left = {}, {group.name: list(range(group.width)) for group in groups(residual())}
    for name, channels in pruned.removed:
        gone.setdefault(name, []).extend(left[name][channel] for channel in channels)
        left[name] = [channel for channel in left[name] if channel not in gone[name]]
    closed = groups(network)
    with torch.no_grad():
        for group in closed:
            for gate in group.gates:
                gate.layer.weight[gone.get(group.name, [])] = 0
                gate.layer.bias[gone.get(group.name, [])] = 0
    torch.testing.assert_close(
        pruned.network(images / 255), closed[0].network(images / 255), atol=1e-5, rtol=1e-4
    )


def test_the_original_stays_as_it_was(portrait):
    network = residual()
    before = portrait(network)
    prune(network, some_images(), filters=0.3)
    assert portrait(network) == before


def test_nothing_removed_leaves_equal_outputs(teacher, digits):
    pruned = prune(teacher, digits[0].images, filters=0.0)
    assert pruned.removed == [] and pruned.history == []
    images = digits[1].images[:50] / 255
    assert torch.equal(pruned.network(images), teacher(images))


def test_shapes_operations_parameters_and_file_agree_with_the_arithmetic(tmp_path):
    network = residual()
    pruned = prune(network, some_images(), filters=0.5, step=0.05)
    small = pruned.network
    a, b, c = (small.net[i].conv.out_channels for i in range(3))
    assert a == b and 2 * a + c == filter_count(small) <= 10 < 2 * a + c + 2
    for unit, inputs, outputs in ((small.net[0], 3, a), (small.net[1], a, a), (small.net[2], a, c)):
        assert unit.conv.weight.shape == (outputs, inputs, 3, 3)
        assert unit.bn.running_mean.shape == unit.bn.running_var.shape == unit.bn.bias.shape == (outputs,)
    assert small.net[5].weight.shape == (5, c)
    weights = 9 * (3 * a + a * a + a * c) + 2 * (a + a + c) + 5 * c + 5
    assert parameter_count(small) == weights
    assert forward_flops(small) == 2 * (9 * 64 * (3 * a + a * a) + 9 * 16 * a * c + 5 * c)
    assert pruned.history[-1]["filters"] == filter_count(small) / 20
    assert pruned.history[-1]["flops"] == pytest.approx(forward_flops(small) / forward_flops(network))
    numbers = weights + 2 * (a + a + c) + 6  # running statistics, normalisation
    size, header = pruned.save(tmp_path / "small.safetensors").stat().st_size, 8
    with open(tmp_path / "small.safetensors", "rb") as file:
        header += int.from_bytes(file.read(8), "little")
    assert size == header + 4 * numbers + 3 * 8  # and each BatchNorm's count of batches


@pytest.mark.parametrize("target", ["filters", "flops", "latency"])
def test_a_target_is_reached_and_hardly_passed(teacher, digits, target):
    table = made_up_table(teacher)
    pruned = prune(teacher, digits[0].images[:32], **{target: 0.3}, table=table)
    assert 0.62 < pruned.history[-1][target] <= 0.7
    assert all(a[target] >= b[target] for a, b in zip(pruned.history, pruned.history[1:], strict=False))


def test_equal_seeds_equal_networks(teacher, digits):
    removed = [prune(teacher, digits[0].images[:64], filters=0.2, seed=s).removed for s in (3, 3, 4)]
    assert removed[0] == removed[1] != removed[2]


def test_the_divergence_finds_filters_that_matter_without_a_label(teacher, digits):
    train, test = digits
    left = {}
    for importance in ("kl", "random"):
        pruned = prune(teacher, train.images, filters=0.2, importance=importance)
        left[importance] = accuracy(pruned.network, test.images, test.labels)
    assert left["kl"] > 90 and left["kl"] > left["random"] + 20


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_resnet34", "cifar_vgg11", "wrn16_1", "vgg_digits"])
def test_the_projects_networks(name):
    network = create_model(name, "digits").freeze()
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    pruned = prune(network, images, filters=0.25, step=0.25)
    assert 0.73 < pruned.history[-1]["filters"] <= 0.75
    assert pruned.network(images / 255).shape == (4, 10)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_torchvisions_networks(name):
    network = create_model(name).freeze()
    images = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    pruned = prune(network, images, filters=0.1, step=0.1)
    assert 0.88 < pruned.history[-1]["filters"] <= 0.9
    assert pruned.network(images / 255).shape == (2, 1000)


# ---- files ---------------------------------------------------------------------------------------


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
        restructured(residual(), [("net.0.conv", [6])])
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no pruned network"):
        load_pruned(tmp_path / "other.safetensors", teacher)


def test_onnx_gives_equal_outputs_for_any_number_of_images(teacher, digits, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pruned = prune(teacher, digits[0].images[:64], filters=0.3).network
    session = runtime.InferenceSession(str(export_onnx(pruned, tmp_path / "small.onnx")))
    for count in (1, 7):
        images = digits[1].images[:count] / 255
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, pruned(images).numpy(), atol=1e-4)


# ---- latency -------------------------------------------------------------------------------------


def made_up_table(network):
    """Every convolution takes a millisecond for a product of 1,000 channels."""
    layers = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            whole = layer.in_channels * layer.out_channels / 1000
            cells = tuple(tuple(whole * a * b for b in WIDTHS) for a in WIDTHS)
            layers[name] = Layer(layer.in_channels, layer.out_channels, cells)
    return LatencyTable(layers)


def test_a_layers_latency_is_interpolated():
    layer = Layer(16, 32, tuple(tuple(10 * a + b for b in WIDTHS) for a in WIDTHS))
    assert layer.at(16, 32) == pytest.approx(11)
    assert layer.at(6, 20) == pytest.approx(10 * 6 / 16 + 20 / 32)
    assert layer.at(1, 1) == pytest.approx(10 * 0.25 + 0.25)  # below the smallest that was measured
    depthwise = Layer(16, 16, (tuple(WIDTHS),) * len(WIDTHS))
    assert depthwise.at(6, 6) == pytest.approx(6 / 16)


def test_what_a_channel_saves_is_what_the_table_says_afterwards():
    graph = dependencies(residual())
    network = graph.model
    table = made_up_table(network)
    for group in groups_of(graph):
        before, promised = table.of(network), table.saving(network, group)
        assert promised > 0
        group.remove([1])
        assert before - table.of(network) == pytest.approx(promised, rel=0.1)


def flat_table(network):
    """As of a card that is done with every layer before the next one is launched."""
    layers = {
        name: Layer(layer.in_channels, layer.out_channels, ((0.03,) * len(WIDTHS),) * len(WIDTHS))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    return LatencyTable(layers)


def test_a_share_that_the_table_does_not_reach_is_told_as_such():
    network = residual()
    with pytest.raises(Unreachable, match="latency=0.1 cannot be removed from residual: at 0.00") as told:
        prune(network, some_images(), latency=0.1, table=flat_table(network), step=0.5)
    assert told.value.most == 0 and isinstance(told.value, ValueError)
    with pytest.raises(Unreachable) as told:
        prune(network, some_images(), filters=0.95, step=0.5)
    assert told.value.most == pytest.approx(0.85)  # three of twenty filters have to stay


def test_points_above_a_line_are_compared_at_their_own_time():
    line = [(100.0, 90.0), (50.0, 70.0), (60.0, 80.0)]  # in any order
    assert above(line, [(80.0, 90.0), (55.0, 70.0), (100.0, 90.0)]) == pytest.approx([5.0, -5.0, 0.0])
    assert above(line, [(49.9, 70.0), (101.0, 99.0)]) == []  # nothing to compare with


def test_latency_makes_the_cheap_layers_stay(teacher, digits):
    table, images = made_up_table(teacher), digits[0].images[:32]
    left = [
        prune(teacher, images, filters=0.2, table=table, eta=eta).history[-1]["latency"]
        for eta in (0.0, 100.0)
    ]
    assert left[1] < left[0]


def test_a_measured_table_knows_every_convolution(teacher):
    table = LatencyTable.measure(teacher, batch=4, repeats=2)
    assert list(table.layers) == [n for n, m in teacher.named_modules() if isinstance(m, nn.Conv2d)]
    assert all(ms > 0 for layer in table.layers.values() for row in layer.milliseconds for ms in row)
    assert table.of(teacher) == pytest.approx(
        sum(layer.milliseconds[-1][-1] for layer in table.layers.values())
    )
    assert json.loads(json.dumps(table.config())) is not None


def test_calls_are_timed_in_turn(teacher):
    order = []
    seconds = interleaved([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert "".join(order) == "ab" * 4 and seconds.shape == (3, 2) and (seconds >= 0).all()
    assert latencies([teacher, residual()], batch=2, repeats=3).shape == (3, 2)


class Card:
    """A pretended CUDA: its clock, in milliseconds, and what is launched or captured on it."""

    def __init__(self, monkeypatch):
        self.now, self.log, self.graph = 0.0, [], None
        for name in ("Stream", "CUDAGraph", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name.lower()))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    def launch(self, name, milliseconds):
        if self.graph is None:
            self.now += milliseconds
            self.log.append(name)
        else:
            self.graph.append(milliseconds)

    @contextmanager
    def capture(self, graph, pool, stream):
        assert pool == "pool"
        self.graph = graph.calls
        yield
        self.graph = None

    def stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def cudagraph(self):
        graph = SimpleNamespace(calls=[])

        def replay():
            self.now += sum(graph.calls)
            self.log.append(len(graph.calls))

        graph.replay = replay
        return graph

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda later: later.at - event.at
        return event


def test_on_a_card_calls_are_captured_and_timed_by_its_own_clock(monkeypatch):
    card = Card(monkeypatch)
    calls = [lambda: card.launch("a", 2.0), lambda: card.launch("b", 5.0)]
    seconds = interleaved(calls, 3, torch.device("cuda"))
    torch.testing.assert_close(seconds, torch.tensor([[0.002, 0.005]] * 3, dtype=torch.float64))
    assert "a" in card.log and "b" in card.log  # first as they are: kernels are chosen
    replays = [entry for entry in card.log if not isinstance(entry, str)]
    assert replays == [20] * 2 * 4 and card.log[-len(replays) :] == replays


def test_a_table_is_of_as_many_images_as_keep_the_device_busy(tiny):
    assert [batch_of(torch.device(kind)) for kind in ("cpu", "cuda")] == [64, 1024]
    assert LatencyTable.measure(tiny().freeze(), repeats=1).batch == 64
    assert LatencyTable.measure(tiny().freeze(), batch=3, repeats=1).batch == 3
    assert latencies([tiny().freeze()], repeats=1)[:, 1:].median(0).values.tolist() == []


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "name one target of filters, flops, latency, got none"),
        ({"filters": 0.1, "flops": 0.1}, "got filters, flops"),
        ({"filters": 1.0}, "filters=1.0 must be a share from 0 to below 1: something has to be left"),
        ({"filters": 0.95}, "filters=0.95 cannot be removed from residual: at 0.85 every layer is down to"),
        ({"filters": 0.1, "importance": "taste"}, "unknown importance 'taste': choose kl, cross-entropy"),
        ({"filters": 0.1, "importance": "cross-entropy"}, "wants labels"),
        ({"latency": 0.1}, "latency is measured first"),
        ({"filters": 0.1, "eta": 1.0}, "latency is measured first"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        prune(residual(), some_images(), **options)


class Spectral(nn.Module):
    """No layer at all that a gradient would lead back to."""

    def forward(self, x):
        return torch.zeros(len(x), 5)


def test_a_network_that_cannot_be_pruned():
    names = [f"class{i}" for i in range(5)]
    unmoved = Classifier(Spectral(), (0.5,) * 3, (0.5,) * 3, 8, names, "unmoved")
    linear = Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), (0.5,) * 3, (0.5,) * 3, 8, names, "linear"
    )
    for network in (unmoved, linear):
        with pytest.raises(ValueError, match=f"{network.name} cannot be pruned: it"):
            prune(network, some_images(), filters=0.1)
