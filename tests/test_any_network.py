"""Networks as researchers bring them: each works, or is refused in a sentence before anything is spent."""

import copy
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dinv import (
    Classifier,
    Competition,
    ContinualSettings,
    CrossEntropy,
    Dataset,
    DistillationSettings,
    DistillStep,
    FeatureStatistics,
    FixedImages,
    GeneratorSettings,
    GeneratorSource,
    InversionSettings,
    Inverter,
    TotalVariation,
    TrainingSettings,
    balanced_labels,
    batchnorm_statistics,
    create_model,
    distill,
    extend,
    generate,
    invert,
    learn,
    measure_statistics,
    synthesize,
    train,
)
from dinv.compiling import forward_flops
from dinv.continual import classifier_head, joint_accuracy, old_part
from dinv.feature_statistics import recorded
from dinv.files import NO_CHECKPOINT, digest
from dinv.generator import synthesize_from
from dinv.latency import LatencyTable, latencies
from dinv.metrics import agreement, diversity, embed
from dinv.models import places
from dinv.preflight import preflight, private
from dinv.step import Step
from dinv.training import accuracy, predict

STEPS = InversionSettings(steps=2, compile="never")
LABELS = torch.tensor([0, 1, 2, 0])
PRIOR = CrossEntropy() + 1e-3 * TotalVariation()
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
UPDATES = DistillationSettings(rounds=1, updates=2, batch_size=4, compile="never")


def net(k=3, c=3, norm=nn.BatchNorm2d, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = [
            nn.Conv2d(c, 8, 3, padding=1),
            norm(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, 1),
            norm(8),
            nn.ReLU(),
        ]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, k))


def wrapped(module, classes="abc", size=8, c=3):
    return Classifier(module, (0.5,) * c, (0.25,) * c, size, classes, "mine")


def dreams(teacher, objective=None, settings=STEPS, labels=LABELS, **options):
    return invert(teacher, labels, objective or PRIOR + FeatureStatistics(), settings, **options)


def some_data(classes="abc", first=0):
    labels = torch.arange(8) % (len(classes) - first) + first
    return Dataset(
        "mine", "train", torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8), labels, tuple(classes)
    )


class Body(nn.Module):
    """Wraps the plain network; subclasses do something odd with it."""

    def __init__(self):
        super().__init__()
        self.n = net()

    def forward(self, x):
        return self.n(x)


# 1: flattened with view


class LeNet(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.f = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6 * 16, 3)
        self.flatten = flatten

    def forward(self, x):
        return self.f(self.flatten(F.max_pool2d(F.relu(self.b(self.a(x))), 2)))


def by_view(x):
    return x.view(x.size(0), -1)


def in_two_halves(x):  # of the channels
    return x.view(x.size(0), 2, -1).flatten(1)


@pytest.mark.parametrize("flatten", [by_view, in_two_halves])
def test_a_network_that_flattens_with_view(flatten):
    odd, plain = wrapped(LeNet(flatten)), wrapped(LeNet(lambda x: torch.flatten(x, 1)))
    torch.testing.assert_close(dreams(odd).images, dreams(plain).images)
    torch.testing.assert_close(predict(odd, IMAGES), predict(plain, IMAGES))
    assert odd.layout == torch.contiguous_format != plain.layout
    distill(plain, odd, IMAGES, UPDATES)
    distill(odd, wrapped(net()), IMAGES, UPDATES)
    dreams(plain, PRIOR + Competition(odd))
    train(odd, some_data(), TrainingSettings(epochs=1, batch_size=4))
    latencies([odd], batch_size=2, repeats=1)
    assert forward_flops(odd) == forward_flops(plain)
    extended = extend(odd.freeze(), "d")
    learn(
        odd, extended, some_data("abcd", first=3), ContinualSettings(updates=1, batch_size=4), images=IMAGES
    )
    assert extended(IMAGES).shape == (4, 4)


# 3: layers that only training calls; 10: statistics under another class


class WithAuxiliaryHead(Body):
    def __init__(self):
        super().__init__()
        self.aux = nn.Sequential(nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x):
        middle = self.n[:3](x)
        logits = self.n[3:](middle)
        return (logits, self.aux(middle)) if self.training else logits


def test_layers_that_only_training_calls_are_left_out():
    teacher = wrapped(WithAuxiliaryHead())
    assert batchnorm_statistics(teacher).layers == ("net.n.1", "net.n.4")
    assert measure_statistics(teacher, IMAGES).layers == ("net.n.1", "net.n.4")
    assert dreams(teacher).losses["feature statistics"][0] > 0
    LatencyTable.measure(teacher, batch_size=2, repeats=1)
    named = measure_statistics(teacher.train(), IMAGES)
    named = type(named)(
        (*named.layers, "net.aux.0"), (*named.means, torch.zeros(8)), (*named.variances, torch.ones(8)), ""
    )
    with pytest.raises(ValueError, match="layer net.aux.0 of mine is never called"):
        dreams(teacher, PRIOR + FeatureStatistics(statistics=named))
    with pytest.raises(ValueError, match="layer net.aux.0 is never called"):
        measure_statistics(teacher, IMAGES, layers=("net.aux.0",))


def test_googlenet_with_its_auxiliary_heads():
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        googlenet = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=3)
    teacher = wrapped(googlenet, size=64)
    layers = batchnorm_statistics(teacher).layers
    assert len(layers) == 57 and not [name for name in layers if "aux" in name]


class Remembers(nn.Module):
    """A frozen BatchNorm of somebody's own."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("running_mean", torch.full((width,), 0.25))
        self.register_buffer("running_var", torch.full((width,), 2.0))

    def forward(self, x):
        return (x - self.running_mean[:, None, None]) / self.running_var[:, None, None].sqrt()


@pytest.mark.parametrize(
    "kind",
    [
        FrozenBatchNorm2d,
        Remembers,
        nn.SyncBatchNorm,
        lambda n: nn.InstanceNorm2d(n, track_running_stats=True),
    ],
)
def test_statistics_of_whatever_keeps_them(kind):
    module = net()
    module[1] = kind(8)
    teacher = wrapped(module).freeze()
    statistics = batchnorm_statistics(teacher)
    assert statistics.layers == ("net.1", "net.4")
    assert torch.equal(statistics.variances[0], module[1].running_var)
    with recorded(teacher, statistics.layers) as features:
        teacher(IMAGES)
    given = module[:1]((IMAGES - 0.5) / 0.25)
    torch.testing.assert_close(features["net.1"].mean((0, 2, 3)), given.mean((0, 2, 3)))
    assert dreams(teacher).losses["feature statistics"][0] > 0


def test_timms_batchnorm_with_an_activation():
    timm = pytest.importorskip("timm")
    module = net()
    module[1], module[4] = timm.layers.BatchNormAct2d(8), timm.layers.FrozenBatchNormAct2d(8)
    assert batchnorm_statistics(wrapped(module)).layers == ("net.1", "net.4")


def test_an_instance_norm_remembers_the_spread_within_images():
    module = net(norm=lambda n: nn.InstanceNorm2d(n, track_running_stats=True, momentum=1.0)).train()
    teacher, images = wrapped(module), torch.rand(64, 3, 8, 8)
    teacher(images)  # momentum 1: it remembers this very batch
    with recorded(teacher, ("net.1",)) as features:
        teacher(images)
    x = features["net.1"].detach()
    torch.testing.assert_close(x.mean((0, 2, 3)), module[1].running_mean)
    torch.testing.assert_close(
        x.var((0, 2, 3), unbiased=False) * 64 / 63, module[1].running_var, rtol=1e-3, atol=1e-5
    )


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.n = nn.Conv2d(3, 8, 3, padding=1), net(c=8)

    def forward(self, x):
        return self.n[3:](self.n[1](self.n[0](self.n[1](self.first(x)))))


def test_a_layer_that_is_used_twice_counts_both_calls():
    teacher = wrapped(Shares()).freeze()
    assert preflight(teacher).calls["net.n.1"] == 2
    x = teacher.net.first((IMAGES - 0.5) / 0.25)
    both = torch.cat([x, teacher.net.n[0](teacher.net.n[1](x))])
    measured = measure_statistics(teacher, IMAGES, batch_size=2)
    place = measured.layers.index("net.n.1")
    torch.testing.assert_close(measured.means[place], both.mean((0, 2, 3)))
    torch.testing.assert_close(measured.variances[place], both.var((0, 2, 3), unbiased=False))
    step = Step(teacher, PRIOR + FeatureStatistics(), compiled=False)
    inputs = (2 * IMAGES, LABELS, torch.tensor(step.weights))
    traced = torch.compile(step._forward, backend="eager", fullgraph=True)
    for _ in range(2):  # the second pass must not find what the first left
        assert torch.equal(traced(*inputs)[1], step._forward(*inputs)[1])


def test_layers_without_running_statistics_are_said():
    module = net()
    module[4] = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.warns(UserWarning, match="mine keeps no statistics in net.4, which are left out"):
        assert batchnorm_statistics(wrapped(module)).layers == ("net.1",)


def test_torchscript_is_told_what_it_lacks():
    scripted = wrapped(torch.jit.trace(net().eval(), torch.zeros(2, 3, 8, 8)))
    with pytest.raises(ValueError, match="mine is TorchScript, whose layers cannot be watched"):
        dreams(scripted)
    assert dreams(scripted, PRIOR).images.shape == (4, 3, 8, 8)


# 6: units of mean and std


@pytest.mark.parametrize(
    "mean, std", [((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), ((0.0,) * 3, (255.0,) * 3)]
)
def test_normalisation_in_0_to_255_is_refused(mean, std):
    with pytest.raises(ValueError, match=r"are of images in \[0, 1\]: divide them by 255"):
        Classifier(net(), mean, std, 8, "abc")


# 7, 8, 11: what a network gives


@pytest.mark.parametrize("outputs, classes", [(4, "abc"), (3, "abcde"), (1001, 1000)])
def test_as_many_outputs_as_names(outputs, classes):
    teacher, count = wrapped(net(outputs), classes), classes if isinstance(classes, int) else len(classes)
    message = f"mine has {outputs} outputs and {count} class names"
    calls = [dreams, lambda t: predict(t, IMAGES), lambda t: distill(t, t, IMAGES), lambda t: extend(t, "z"),
             lambda t: measure_statistics(t, IMAGES), lambda t: train(t, some_data())]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(teacher)


class Squeezed(Body):
    def __init__(self):
        super().__init__()
        self.n = net(1)

    def forward(self, x):
        return self.n(x)[:, 0]


def test_a_single_logit_is_of_two_classes():
    for module in (net(1), Squeezed()):
        teacher = wrapped(module, ["healthy", "tumour"]).freeze()
        z = module((IMAGES - 0.5) / 0.25).view(-1)
        torch.testing.assert_close(predict(teacher, IMAGES).softmax(1)[:, 1], z.sigmoid())
        losses = dreams(
            teacher,
            labels=["tumour", "healthy"],
            settings=InversionSettings(steps=30, lr=0.1, compile="never"),
        ).losses
        assert losses["cross-entropy"][-1] < losses["cross-entropy"][0]
    with pytest.raises(
        ValueError, match="mine has 1 output, a single logit, and 1 class names: it is of two"
    ):
        dreams(wrapped(net(1), ["tumour"]), labels=[0])
    with pytest.raises(ValueError, match="mine cannot be extended: no linear layer"):
        extend(teacher, "stroke")


class Named(dict):
    logits = property(lambda self: self["logits"])


@pytest.mark.parametrize(
    "form",
    [
        lambda y: (y, 0),
        lambda y: [y],
        lambda y: {"logits": y},
        lambda y: Named(logits=y),
        lambda y: y[..., None, None],
    ],
)
def test_logits_in_other_forms(form):
    class Odd(Body):
        def forward(self, x):
            return form(self.n(x))

    odd, plain = wrapped(Odd()), wrapped(Body())
    assert torch.equal(dreams(odd).images, dreams(plain).images)
    assert torch.equal(predict(odd, IMAGES), predict(plain, IMAGES))
    assert embed(odd, IMAGES).shape == (4, 8)


@pytest.mark.parametrize("form, found", [
    (lambda y: {"prediction": y}, "a dict of prediction, no logits"),
    (lambda y: None, "a NoneType, no logits"),
    (lambda y: y.argmax(1), "a Tensor, no logits"),
    (lambda y: y[..., None, None].expand(-1, -1, 4, 4), r"shape \(2, 3, 4, 4\)"),
])  # fmt: skip
def test_what_is_not_logits_is_named(form, found):
    class Odd(Body):
        def forward(self, x):
            return form(self.n(x))

    for call in (dreams, lambda t: predict(t, IMAGES)):
        with pytest.raises(ValueError, match=found):
            call(wrapped(Odd()))


# 12, 21: what the caller has set


class _Default:
    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around", [torch.no_grad(), torch.inference_mode(), torch.device("meta"), _Default()], ids=str
)
def test_what_the_caller_has_set_changes_nothing(around):
    teacher, settings = wrapped(net()), GeneratorSettings(steps=2, latent_dim=4, width=4, compile="never")
    students = [wrapped(net(seed=1)) for _ in range(2)]

    def everything(student, labels):
        distill(teacher, student, IMAGES.clone(), UPDATES)
        extended = extend(teacher, "d")
        learn(teacher, extended, data, ContinualSettings(updates=1, batch_size=4), images=IMAGES.clone())
        made = [dreams(teacher, labels=labels).images, generate(teacher, labels, PRIOR, settings).images]
        made.append(synthesize(Inverter(teacher, PRIOR, STEPS), labels).images)
        made.append(synthesize_from(GeneratorSource(teacher, PRIOR, settings, batch_size=4), 1).images)
        return [*made, *student.state_dict().values(), *extended.state_dict().values()]

    data = some_data("abcd", first=3)
    expected = everything(students[0], LABELS)
    with around:
        found = everything(students[1], LABELS.clone())
    assert all(map(torch.equal, expected, found))


def test_double_works_in_double():
    single, double = wrapped(net()), wrapped(net()).double()
    for teacher in (double, wrapped(net().double())):
        result = dreams(teacher, PRIOR + FeatureStatistics() + Competition(single))
        assert result.images.dtype == torch.float64
        torch.testing.assert_close(
            result.images.float(), dreams(single, PRIOR + FeatureStatistics() + Competition(single)).images
        )
        assert predict(teacher, IMAGES).shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_copied_to_float32(dtype):
    for teacher in (wrapped(net()).to(dtype), wrapped(net().to(dtype))):
        result = dreams(teacher)
        assert result.images.dtype == torch.float32 and private(teacher).dtype == torch.float32
        assert predict(teacher, IMAGES).dtype == torch.float32 and teacher.dtype == dtype
        distill(teacher, teacher, IMAGES, UPDATES)
        with pytest.raises(ValueError, match=r"which loses updates: call .float\(\) first"):
            train(teacher, some_data())


# 13: devices


def test_the_normalisation_lies_where_the_network_is():
    teacher = wrapped(net().to("meta"))
    assert teacher.mean.device.type == teacher.std.device.type == "meta"
    with pytest.raises(ValueError, match="mine has no weights yet, they are on the meta device: load them"):
        dreams(teacher)
    module = net()
    module[8].to("meta")
    with pytest.raises(ValueError, match="mine lies on cpu, meta: move it to one device"):
        predict(wrapped(module), IMAGES)


# 17, 18: networks that cannot be copied, or whose copy is another


class Keeps(Body):
    def forward(self, x):
        self.feat = self.n[:6](x)
        self.all = {"feat": self.feat}
        return self.n[6:](self.feat)


@pytest.mark.parametrize("kept", ["feat", "old weight norm"])
def test_tensors_left_behind_do_not_hinder_a_copy(kept):
    module = Keeps().eval()
    plain = dreams(wrapped(module)).images
    if kept != "feat":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(module.n[8])
    module(IMAGES)
    teacher = wrapped(module)
    torch.testing.assert_close(dreams(teacher).images, plain)
    distill(teacher, wrapped(net()), IMAGES, UPDATES)
    if kept == "feat":
        assert extend(teacher, "d")(IMAGES).shape == (4, 4)
    else:
        with pytest.raises(ValueError, match="mine cannot be extended by its layer net.n.8"):
            extend(teacher, "d")


class Hooked(Body):
    """Its hook fills the original's dictionary, which a copy does not read."""

    def __init__(self):
        super().__init__()
        kept = {}
        self.n[5].register_forward_hook(lambda m, i, o: kept.__setitem__("1", o))
        self.kept = kept

    def forward(self, x):
        self.n[:6](x)
        return self.n[6:](self.kept["1"])


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_copy_that_answers_otherwise_is_refused(count):
    module = Hooked().eval()
    if count:
        with torch.no_grad():
            module(IMAGES[:count])
    with pytest.raises(ValueError, match="a private copy of mine .*hooks or tensors outside its layers"):
        dreams(wrapped(module))


class Detached(Body):
    def forward(self, x):
        with torch.no_grad():
            x = self.n[:3](x)
        return self.n[3:](x)


class Rounds(Body):
    def forward(self, x):
        return self.n((4 * x).round())


@pytest.mark.parametrize("kind", [Detached, Rounds])
def test_pixels_without_a_gradient_are_refused(kind):
    teacher = wrapped(kind())
    with pytest.raises(ValueError, match="no gradient of mine reaches its pixels"):
        dreams(teacher, PRIOR)
    assert predict(teacher, IMAGES).shape == (4, 3)  # which needs none


def test_a_users_logging_hook_sees_the_network_and_not_its_copies():
    teacher, seen = wrapped(net()), []
    handle = teacher.net[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    dreams(teacher, settings=InversionSettings(steps=20, compile="never"))
    assert len(seen) <= 2 and not any(output.requires_grad for output in seen)  # the trial's
    assert len(teacher.net[2]._forward_hooks) == 1
    handle.remove()


def test_a_network_that_needs_its_hook_keeps_it():
    module = net()
    module[8].register_forward_hook(lambda module, inputs, output: 3 * output)
    torch.testing.assert_close(private(wrapped(module))(IMAGES), wrapped(module)(IMAGES))
    assert dreams(wrapped(module)).images.shape == (4, 3, 8, 8)


class Noisy(Body):
    def forward(self, x):
        return self.n(x + 0.1 * torch.randn_like(x))


def test_a_network_that_draws_numbers_is_not_taken_for_another():
    assert dreams(wrapped(Noisy())).images.shape == (4, 3, 8, 8)


# 19, 28: where the logits come from


class WithProjection(Body):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(8, 3)


class ProjectsAsWell(WithProjection):
    def forward(self, x):
        features = self.n[:8](x)
        logits = self.n[8](features)
        return logits, self.projection(features)


@pytest.mark.parametrize("kind", [WithProjection, ProjectsAsWell])
def test_the_head_is_where_the_logits_come_from(kind):
    teacher = wrapped(kind()).freeze()
    extended = extend(teacher, ["d"])
    assert classifier_head(extended)[0] == "net.n.8" and extended.classes == tuple("abcd")
    torch.testing.assert_close(extended(IMAGES)[:, :3], teacher(IMAGES))
    torch.testing.assert_close(old_part(extended, 3)(IMAGES), teacher(IMAGES))
    torch.testing.assert_close(embed(teacher, IMAGES), teacher.net.n[:8]((IMAGES - 0.5) / 0.25))


class TwoHeads(WithProjection):
    def forward(self, x):
        features = self.n[:8](x)
        return (self.n[8](features) + self.projection(features)) / 2


class Scaled(Body):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.n(x))


@pytest.mark.parametrize("kind", [TwoHeads, Scaled])
def test_logits_of_more_than_one_layer_cannot_be_extended(kind):
    with pytest.raises(ValueError, match="mine cannot be extended by its layer net"):
        extend(wrapped(kind()), ["d"])


def squeezed(k=3, relu=True):
    last = [nn.ReLU()] if relu else []
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, k, 1), *last]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("relu", [False, True])
def test_a_convolution_that_classifies_is_extended_by_filters(relu):
    teacher = wrapped(squeezed(relu=relu)).freeze()
    extended = extend(teacher, ["d", "e"])
    torch.testing.assert_close(extended(IMAGES)[:, :3], teacher(IMAGES))
    assert classifier_head(extended)[1].weight.shape == (5, 8, 1, 1)
    expected = teacher.net[:3]((IMAGES - 0.5) / 0.25).mean((2, 3))
    torch.testing.assert_close(embed(teacher, IMAGES), expected)
    data = some_data("abcde", first=3)
    learn(teacher, extended, data, ContinualSettings(updates=2, batch_size=4), images=IMAGES)
    assert joint_accuracy(extended, some_data("abcde"), data, 3).mean >= 0
    assert diversity(teacher, IMAGES, torch.tensor([0, 0, 1, 1])) >= 0
    with pytest.raises(ValueError, match="local=True needs logits of a linear layer"):
        learn(teacher, extended, data, ContinualSettings(updates=1, local=True), images=IMAGES)


# 20: channels on the last axis


class Rows(nn.Module):
    """Attention-like: (N, H, W, C) inside."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.mix(self.norm(self.first(x).permute(0, 2, 3, 1)))
        return self.head(x.mean((1, 2)))


def test_statistics_are_per_channel_wherever_the_channels_are():
    teacher = wrapped(Rows())
    statistics = measure_statistics(teacher, IMAGES)
    assert statistics.layers == ("net.norm",) and statistics.means[0].shape == (8,)
    linear = measure_statistics(teacher, IMAGES, layers=("net.mix",))
    x = teacher.net.mix(teacher.net.norm(teacher.net.first((IMAGES - 0.5) / 0.25).permute(0, 2, 3, 1)))
    torch.testing.assert_close(linear.means[0], x.mean((0, 1, 2)).detach())
    stages = InversionSettings(stages=((1, 4), (1, 8)), compile="never")
    assert dreams(teacher, PRIOR + FeatureStatistics("kl", statistics=statistics), stages).images.shape == (
        4,
        3,
        8,
        8,
    )


def test_swin_keeps_its_channels_last():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.swin_transformer import SwinTransformer

    swin = SwinTransformer([4, 4], 24, [1, 1], [1, 1], [2, 2], num_classes=3)
    statistics = measure_statistics(wrapped(swin, size=16), torch.rand(2, 3, 16, 16))
    assert statistics.layers[0] == "net.features.0.2" and statistics.means[0].shape == (24,)
    convnext = ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=3)
    measured = measure_statistics(wrapped(convnext, size=64), torch.rand(2, 3, 64, 64))
    assert measured.means[0].shape == (16,)  # its LayerNorm2d sees (N, C, H, W), here of 16 x 16


# 24: the same classes in another order


class Flipped(Body):
    def forward(self, x):
        return self.n(x).flip(1)


def test_networks_side_by_side_are_matched_by_class_names():
    one, other = wrapped(net(), "abc").freeze(), wrapped(Flipped(), "cba").freeze()
    assert agreement(one, other, torch.rand(64, 3, 8, 8)) == 100
    alone = dreams(one, PRIOR + Competition(one)).images
    torch.testing.assert_close(dreams(one, PRIOR + Competition(other)).images, alone)
    history = distill(
        one, other, IMAGES, DistillationSettings(rounds=1, updates=1, batch_size=4, lr=1e-9, compile="never")
    ).history
    assert history[0]["loss"] < 0.1  # training's BatchNorm alone
    assert places(one, wrapped(net(), 3)) is None  # it only numbers its classes: the order must be the same
    for call in (
        lambda t: agreement(one, t, IMAGES),
        lambda t: dreams(one, PRIOR + Competition(t)),
        lambda t: distill(one, t, IMAGES),
    ):
        with pytest.raises(ValueError, match="mine knows no class '[ax]', which mine has: if only the"):
            call(wrapped(net(), "xyz"))


# 25: images that are none


@pytest.mark.parametrize("images, hint", [
    (torch.randn(4, 3, 8, 8), "before Normalize"),
    (255 * IMAGES, "divide by 255"),
    (IMAGES * float("nan"), "before"),
])  # fmt: skip
def test_images_outside_their_range_are_refused(images, hint):
    teacher = wrapped(net())
    for call in (predict, measure_statistics, embed, lambda t, x: accuracy(t, x, LABELS)):
        with pytest.raises(ValueError, match=f"images must lie in .0, 1., found .*{hint}"):
            call(teacher, images)
    assert predict(teacher, IMAGES.clamp(0, 1) + 1e-3).shape == (4, 3)  # rounding


# 27: names


def test_classes_by_name():
    teacher = wrapped(net(), ["cat", "dog", "red fox"])
    named, numbered = (dreams(teacher, labels=labels) for labels in (["dog", "cat"], torch.tensor([1, 0])))
    assert torch.equal(named.images, numbered.images) and named.labels.tolist() == [1, 0]
    assert balanced_labels(5, ["dog", "red fox"]) == ["dog", "red fox", "dog", "red fox", "dog"]
    assert dreams(teacher, labels=balanced_labels(3, ["dog", "red fox"])).labels.tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match="the teacher knows no class 'red foks': did you mean red fox?"):
        dreams(teacher, labels=["cat", "red foks"])


def test_wrap_reads_what_a_network_says_of_itself():
    import torchvision

    weights = torchvision.models.ResNet18_Weights.DEFAULT
    teacher = Classifier.wrap(torchvision.models.resnet18(), weights=weights)
    assert teacher.size == 224 and teacher.classes[1] == "goldfish"
    torch.testing.assert_close(teacher.mean.view(-1), torch.tensor((0.485, 0.456, 0.406)))
    mine = Classifier.wrap(net(10), mean=(0.5,) * 3, std=(0.2,) * 3, size=8, classes=10, name="x")
    assert mine.classes == tuple("0123456789") and mine.name == "x"
    with pytest.raises(ValueError, match=r"Sequential does not say its size, classes: name them, as in wrap"):
        Classifier.wrap(net(), mean=(0.5,) * 3, std=(0.2,) * 3)


def test_wrap_reads_timms_configuration():
    timm = pytest.importorskip("timm")
    for teacher in (Classifier.wrap(timm.create_model("regnetx_002")), create_model("timm:regnetx_002")):
        assert teacher.size == 224 and teacher.classes[1] == "goldfish"
    fewer = Classifier.wrap(timm.create_model("regnetx_002", num_classes=7), size=64)
    assert fewer.size == 64 and fewer.classes == tuple("0123456")


@pytest.mark.parametrize("call", [
    lambda n: dreams(n), lambda n: predict(n, IMAGES), lambda n: distill(n, n, IMAGES),
    lambda n: extend(n, "z"), lambda n: train(n, some_data()),
])  # fmt: skip
def test_a_bare_module_is_told_how_to_be_wrapped(call):
    with pytest.raises(
        TypeError, match=r"expected a Classifier, got a Sequential: Classifier.wrap\(net, mean="
    ):
        call(net())


# 29: images that are not square, or of other channels


def test_images_that_are_not_square():
    teacher = wrapped(net(), size=(8, 12)).freeze()
    assert dreams(teacher).images.shape == (4, 3, 8, 12)
    stages = InversionSettings(stages=((1, (4, 6)), (1, (8, 12))), compile="never")
    assert dreams(teacher, settings=stages).images.shape == (4, 3, 8, 12)
    with pytest.raises(ValueError, match=r"stages of images of 8 x 12 need \(steps, \(height, width\)\)"):
        dreams(teacher, settings=InversionSettings(stages=((1, 4),), compile="never"))
    with pytest.raises(ValueError, match=r"takes images of shape \(N, 3, 8, 12\), got \(4, 3, 12, 8\)"):
        predict(teacher, torch.rand(4, 3, 12, 8))
    made = generate(
        teacher, LABELS, PRIOR, GeneratorSettings(steps=1, latent_dim=4, width=4, compile="never")
    )
    assert made.images.shape == (4, 3, 8, 12)
    distill(teacher, wrapped(net(), size=(8, 12)), made.images, UPDATES)
    with pytest.raises(
        ValueError, match="takes its teacher's images, not mine with .3, 8, 12. and mine with .3, 8, 8."
    ):
        distill(teacher, wrapped(net()), made.images, UPDATES)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_images_of_other_channels(channels):
    assert dreams(wrapped(net(c=channels), c=channels)).images.shape == (4, channels, 8, 8)


# the trial itself


def test_the_trial_is_made_once_and_again_when_the_network_changes(monkeypatch):
    from dinv import preflight as room

    teacher, trials = wrapped(net()), []
    inner = room._try
    monkeypatch.setattr(room, "_try", lambda network: trials.append(network) or inner(network))
    dreams(teacher), predict(teacher, IMAGES), distill(teacher, teacher, IMAGES, UPDATES)
    assert trials == [teacher]
    teacher.net[8] = nn.Linear(8, 3, bias=False)
    predict(teacher, IMAGES)
    assert trials == [teacher, teacher]


def test_a_network_can_be_saved_whole_after_the_trial(tmp_path):
    teacher = wrapped(LeNet(by_view))
    expected = predict(teacher, IMAGES)
    torch.save(copy.deepcopy(teacher), tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(predict(again, IMAGES), expected)


def test_the_trial_leaves_the_network_as_it_was(portrait):
    teacher = wrapped(net()).train()
    teacher.net[1].eval()
    before = portrait(teacher)
    preflight(teacher)
    assert portrait(teacher) == before


def test_a_network_of_another_size_or_of_other_channels_is_told_so():
    with pytest.raises(
        ValueError, match=r"mine fails on images \(2, 3, 12, 12\), as size=12 and 3 channels ask for"
    ):
        dreams(wrapped(LeNet(by_view), size=12))
    with pytest.raises(
        ValueError, match="mine fails on images .* 1 channels ask for: RuntimeError: .*channels"
    ):
        predict(wrapped(net(), c=1), torch.rand(2, 1, 8, 8))


def test_the_trial_is_quick():
    teacher = create_model("resnet_small")
    began = time.perf_counter()
    preflight(teacher)
    assert time.perf_counter() - began < 3  # alone it takes a tenth of a second


def test_global_random_numbers_are_left_alone():
    teacher = wrapped(Noisy())
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    preflight(teacher)
    after = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(expected[0], after[0]) and (expected[1] == after[1]).all() and expected[2] == after[2]


class Dropping(Body):
    def forward(self, x):
        return F.dropout(self.n(x), 0.5, self.training)


def test_a_network_that_drops_out_learns_by_the_seed_and_goes_on_to_the_same_bytes(memory):
    settings = TrainingSettings(epochs=3, batch_size=4, pad=0)
    rounds = DistillationSettings(rounds=3, updates=2, batch_size=4, compile="never")
    data, teacher = some_data(), wrapped(net())

    def weights(method, stopped=None):
        student = wrapped(Dropping())
        for _ in range(1 if stopped is None else 2):
            torch.rand(1)  # the caller's own draws change nothing
            try:
                method(student, *(() if stopped is None else (stopped,)))
            except KeyboardInterrupt:
                student = wrapped(Dropping())
        return torch.cat([value.flatten().float() for value in student.state_dict().values()])

    def training(student, checkpoint=NO_CHECKPOINT):
        train(student, data, settings, checkpoint=checkpoint)

    def distilling(student, checkpoint=NO_CHECKPOINT):
        distill(teacher, student, IMAGES.clone(), rounds, checkpoint=checkpoint)

    for method in (training, distilling):
        torch.manual_seed(7)
        whole, state = weights(method), torch.get_rng_state()
        torch.manual_seed(7), torch.rand(1)
        assert torch.equal(state, torch.get_rng_state())  # the caller's numbers are left alone
        assert torch.equal(weights(method), whole) and torch.equal(weights(method, memory(1)), whole)


def test_an_interrupted_step_leaves_nothing_to_the_next():
    class Interrupting(FeatureStatistics):
        calls = 0

        def __call__(self, view):
            Interrupting.calls += 1
            if Interrupting.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(view)

    inverter = Inverter(wrapped(net()), PRIOR + Interrupting(), STEPS)
    with pytest.raises(KeyboardInterrupt):
        inverter(LABELS)
    expected = dreams(wrapped(net())).images
    assert torch.equal(inverter(LABELS).images, expected)


def test_new_images_and_old_have_a_place_in_every_batch():
    for few, many in (("abcdefghij", "k"), ("ab", "cdefghijklmnopqrstuvwxyz")):
        old, settings = wrapped(net(len(few)), few), ContinualSettings(updates=1, batch_size=4)
        new = some_data(few + many, first=len(few))
        (record,) = learn(old, extend(old, list(many)), new, settings, images=IMAGES.clone())
        assert {"old", "new"} <= set(record)


def test_a_step_of_another_precision_is_refused():
    teacher = wrapped(net())
    step = DistillStep(teacher, teacher, UPDATES.temperature, "never", "bfloat16")
    with pytest.raises(ValueError, match=r"precision \(3.0, 'bfloat16'\) for \(3.0, 'float32'\)"):
        distill(teacher, teacher, IMAGES, replace(UPDATES, precision="float32"), step=step)


def test_new_images_are_compared_by_the_names_of_the_classes():
    teacher, turned = wrapped(net()), wrapped(net(), "cba")
    for key in ("net.8.weight", "net.8.bias"):
        turned.state_dict()[key].copy_(teacher.state_dict()[key].flip(0))
    source, settings = FixedImages(IMAGES, start=2, batch_size=2), replace(UPDATES, rounds=2, lr=1e-9)

    def watch(number, student):
        return {"next": agreement(teacher, student, IMAGES[2:])}

    before, after = distill(teacher, turned, source, settings, watch=watch).history
    assert after["fresh"] == before["next"] == 100


def test_what_only_training_calls_has_no_latency_and_no_place_in_the_order():
    class Odd(Body):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.aside = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.aside(x) if self.training else x
            return self.n(self.last(self.first(x)))

    network = wrapped(Odd())
    assert LatencyTable.measure(network, 2, 1).of(network) > 0
    assert batchnorm_statistics(network).layers == ("net.first", "net.last", "net.n.1", "net.n.4")


def test_a_frozen_network_cannot_be_trained():
    with pytest.raises(ValueError, match=r"mine is frozen: call .requires_grad_\(True\) first"):
        train(wrapped(net()).freeze(), some_data())


def test_size_and_classes_are_part_of_a_digest():
    networks = [wrapped(net()), wrapped(net(), "cba"), wrapped(net(), size=16)]
    assert len({digest(network) for network in networks}) == 3
    assert digest(networks[0]) == digest(wrapped(net()))
