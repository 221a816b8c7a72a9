"""Every equation against NumPy in float64 and against finite differences; the algebra of objectives."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from dinv.feature_statistics import NoBatchNorm, Statistics, measure_statistics, recorded
from dinv.files import digest
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, Term, TotalVariation, View

LAYERS, CHANNELS = ("one", "two"), (3, 5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def a_view(seed=0, n=4, classes=6) -> View:
    """Random pixels, logits and features, in float64."""
    draw = generator(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return View(
        pixels=normal(n, 3, 5, 6),
        labels=torch.randint(classes, (n,), generator=draw),
        logits=3 * normal(n, classes),
        features={"one": 2 * normal(n, 3, 4, 4) + 1, "two": normal(n, 5, 2, 3) - 2},
    )


def some_statistics(seed=1) -> Statistics:
    draw = generator(seed)
    means = tuple(torch.randn(c, generator=draw, dtype=torch.float64) for c in CHANNELS)
    variances = tuple(torch.rand(c, generator=draw, dtype=torch.float64) + 0.2 for c in CHANNELS)
    return Statistics(LAYERS, means, variances, "random")


def look(teacher, objective, pixels, labels) -> View:
    with recorded(teacher, objective.layers()) as features:
        logits = teacher.net(pixels)
    return View(pixels, labels, logits, features, pixels * teacher.std + teacher.mean)


def numpy_cross_entropy(view):
    logits, losses = view.logits.numpy(), []
    for row, label in zip(logits, view.labels.tolist(), strict=True):
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])
    return np.mean(losses)


def numpy_total_variation(view):
    x = view.pixels.numpy()
    n, channels, height, width = x.shape
    total = 0.0
    for image in range(n):
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
            square = 0.0
            for row in range(height):
                for column in range(width):
                    if row + dy < height and 0 <= column + dx < width:
                        difference = x[image, :, row + dy, column + dx] - x[image, :, row, column]
                        square += float((difference**2).sum())
            total += math.sqrt(square)
    return total / n


def numpy_l2_norm(view):
    return np.mean([np.linalg.norm(image.ravel()) for image in view.pixels.numpy()])


def numpy_layer(view, name, statistics):
    """Mean and biased variance by the textbook, and the reference's."""
    x = np.moveaxis(view.features[name].numpy(), 1, 0).reshape(view.features[name].shape[1], -1)
    mean = x.sum(1) / x.shape[1]
    variance = ((x - mean[:, None]) ** 2).sum(1) / x.shape[1]
    index = LAYERS.index(name)
    return mean, variance, statistics.means[index].numpy(), statistics.variances[index].numpy()


def numpy_l2(mean, variance, mean0, variance0):
    return np.sqrt(((mean - mean0) ** 2).sum()) + np.sqrt(((variance - variance0) ** 2).sum())


def numpy_kl(mean, variance, mean0, variance0):
    """The integral of p log(p / p0), as a Riemann sum over 12 deviations either way, mean over channels."""
    parts = []
    for m, v, m0, v0 in zip(mean, variance, mean0, variance0, strict=True):
        x = np.linspace(m - 12 * np.sqrt(v), m + 12 * np.sqrt(v), 20001)
        log_p = -0.5 * ((x - m) ** 2 / v + np.log(2 * np.pi * v))
        log_p0 = -0.5 * ((x - m0) ** 2 / v0 + np.log(2 * np.pi * v0))
        parts.append(np.sum(np.exp(log_p) * (log_p - log_p0)) * (x[1] - x[0]))
    return np.mean(parts)


SINGLE = {CrossEntropy: numpy_cross_entropy, TotalVariation: numpy_total_variation, L2Norm: numpy_l2_norm}


@pytest.mark.parametrize("term, reference", SINGLE.items(), ids=lambda x: x.__name__)
def test_priors_and_cross_entropy_against_numpy(term, reference):
    for seed in range(3):
        value = term()(a_view(seed))
        assert value.dtype == torch.float64 and value.shape == ()
        assert value.item() == pytest.approx(reference(a_view(seed)), rel=1e-10)


@pytest.mark.parametrize("first", [1.0, 10.0, 0.0])
@pytest.mark.parametrize("distance, reference", [("l2", numpy_l2), ("kl", numpy_kl)])
def test_feature_statistics_against_numpy(distance, reference, first):
    view, statistics = a_view(), some_statistics()
    one, two = (reference(*numpy_layer(view, name, statistics)) for name in LAYERS)
    value = FeatureStatistics(distance, first, statistics)(view)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(first * one + two, rel=1e-8)


def test_terms_in_float32_and_bfloat16_are_computed_in_float32():
    exact, statistics = a_view(), some_statistics()
    single = Statistics(
        LAYERS, *(tuple(t.float() for t in ts) for ts in (statistics.means, statistics.variances)), ""
    )

    def cast(dtype):
        features = {name: feature.to(dtype) for name, feature in exact.features.items()}
        return View(exact.pixels.to(dtype), exact.labels, exact.logits.to(dtype), features)

    for term in (CrossEntropy(), TotalVariation(), L2Norm(), FeatureStatistics(statistics=single)):
        good = FeatureStatistics(statistics=statistics) if isinstance(term, FeatureStatistics) else term
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            value = (1.0 * term).terms(cast(dtype))
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(good(exact).item(), rel=tolerance)


# ---- gradients -----------------------------------------------------------------------------------

TERMS = {
    "cross-entropy": CrossEntropy,
    "total variation": TotalVariation,
    "l2 norm": L2Norm,
    "feature statistics, l2": FeatureStatistics,
    "feature statistics, kl, first layer x 10": lambda: FeatureStatistics("kl", first=10),
    "a sum": lambda: CrossEntropy() + 0.3 * TotalVariation() + 2 * (L2Norm() + FeatureStatistics()),
}


@pytest.mark.parametrize("make", TERMS.values(), ids=TERMS.keys())
def test_gradients_against_finite_differences(tiny, make):
    teacher = tiny(size=4, activation=nn.SiLU).double().freeze()
    objective = (1.0 * make()).bind(teacher)
    labels = torch.tensor([0, 3])
    pixels = torch.randn(2, 3, 4, 4, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: objective(look(teacher, objective, x, labels)), pixels)


@pytest.mark.parametrize("term", [TotalVariation(), L2Norm()], ids=lambda term: term.name)
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_priors_have_a_finite_gradient_at_a_constant_image(term, value):
    pixels = torch.full((2, 3, 4, 4), value, requires_grad=True)
    result = term(View(pixels, None, None))
    result.backward()
    assert pixels.grad.isfinite().all()
    if isinstance(term, TotalVariation) or value == 0:
        assert result.item() < 1e-5 and pixels.grad.abs().max() == 0


@pytest.mark.parametrize("names", [c for k in (1, 2, 5) for c in combinations(list(TERMS)[:5], k)], ids=str)
def test_five_steps_of_adam_lower_every_term_and_sum(tiny, names):
    teacher = tiny().freeze()
    objective = sum((1.0 * TERMS[name]() for name in names[1:]), 1.0 * TERMS[names[0]]()).bind(teacher)
    labels = torch.arange(6) % 5
    pixels = torch.randn(6, 3, 8, 8, generator=generator(137)).requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=0.05)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        value = objective(look(teacher, objective, pixels, labels))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[5] < values[0]


def test_feature_statistics_are_the_batchnorm_buffers_and_follow_them(tiny):
    teacher = tiny().freeze()
    term = FeatureStatistics().bind(teacher)
    assert term.layers() == ("net.1", "net.4")
    teacher.net[1].running_mean += 1
    for layer, mean, variance in zip(
        (teacher.net[1], teacher.net[4]), term.statistics.means, term.statistics.variances, strict=True
    ):
        assert torch.equal(mean, layer.running_mean) and torch.equal(variance, layer.running_var)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("distance", ["l2", "kl"])
def test_images_are_at_no_distance_from_their_own_statistics(tiny, norm, distance):
    teacher = tiny(norm=norm).freeze()
    images, labels = torch.rand(20, 3, 8, 8, generator=generator()), torch.zeros(20, dtype=torch.long)
    statistics = measure_statistics(teacher, images)
    objective = (1.0 * FeatureStatistics(distance, statistics=statistics)).bind(teacher)

    def value(images):
        return objective(look(teacher, objective, (images - teacher.mean) / teacher.std, labels)).item()

    assert value(images) == pytest.approx(0, abs=1e-5)
    assert value(images.flip(0)) == pytest.approx(0, abs=1e-5)
    assert value(0.5 * images) > 0.01


def test_a_network_without_batchnorm_is_refused_with_the_way_round(tiny):
    untracked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    for teacher, name in ((tiny(norm=False), "tiny"), (untracked, "Sequential")):
        with pytest.raises(NoBatchNorm, match=f"^{name} has no BatchNorm.*measure_statistics.*statistics="):
            (CrossEntropy() + FeatureStatistics()).bind(teacher)


def test_an_unknown_distance_and_an_unbound_term():
    with pytest.raises(ValueError, match="unknown distance 'l1': choose l2 or kl"):
        FeatureStatistics("l1")
    with pytest.raises(ValueError, match="bound to a teacher first"):
        FeatureStatistics()(a_view())


def test_sums_and_multiples_are_those_of_the_values():
    view, statistics = a_view(), some_statistics()
    a, b, c = TotalVariation(), L2Norm(), FeatureStatistics(statistics=statistics)
    va, vb, vc = (term(view).item() for term in (a, b, c))

    def value(objective):
        return pytest.approx(objective(view).item(), rel=1e-12)

    assert value((a + b) + c) == value(a + (b + c)) == va + vb + vc
    assert value(3 * a) == value(a * 3) == 3 * va
    assert value(2 * (3 * a + b) + 0.5 * c) == 6 * va + 2 * vb + 0.5 * vc
    assert value(2.0 * (a + b)) == value(2 * a + 2 * b)
    assert value(a + a) == value(2 * a)
    assert value(2 * a + 0 * b) == 2 * va
    assert (a + 7 * b).terms(view).tolist() == [va, vb]


def test_names_and_weights_of_a_sum():
    objective = CrossEntropy() + 2.5e-5 * TotalVariation() + 2 * (5 * FeatureStatistics())
    assert objective.names == ("cross-entropy", "total variation", "feature statistics")
    assert objective.weights == (1.0, 2.5e-5, 10.0)
    assert str(objective) == "cross-entropy + 2.5e-05 * total variation + 10 * feature statistics"
    twice = FeatureStatistics() + 2 * FeatureStatistics("kl") + CrossEntropy()
    assert twice.names == ("feature statistics", "feature statistics #2", "cross-entropy")


def test_terms_of_weight_zero_are_dropped_before_they_can_refuse(tiny):
    bound = (CrossEntropy() + 0 * FeatureStatistics() + 0.0 * L2Norm()).bind(tiny(norm=False))
    assert bound.names == ("cross-entropy",) and bound.layers() == ()
    with pytest.raises(ValueError, match="every weight of the objective is zero"):
        (0 * CrossEntropy() + 0 * TotalVariation()).bind(tiny())


@pytest.mark.parametrize("weight", [-1, -1e-9, math.nan, math.inf, -math.inf])
def test_weights_that_are_no_weights(weight):
    for term in (CrossEntropy(), CrossEntropy() + L2Norm()):
        with pytest.raises(ValueError, match=f"weight {weight}.* must be finite and not negative"):
            weight * term
    with pytest.raises(ValueError, match="must be finite and not negative"):
        FeatureStatistics(first=weight)
    with pytest.raises(ValueError, match="weight inf"):
        1e200 * (1e200 * CrossEntropy())


@pytest.mark.parametrize("weight", [True, "2", None, [1.0], torch.tensor(2.0)], ids=repr)
def test_weights_that_are_no_numbers(weight):
    with pytest.raises(TypeError, match=f"scaled by a number, got {type(weight).__name__}"):
        CrossEntropy() * weight
    with pytest.raises(TypeError, match="unsupported operand"):
        CrossEntropy() + weight


class Target(Term):
    """A term as somebody writes one, with an option and nothing else said."""

    name = "target"

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, view):
        return (view.pixels.mean() - self.value) ** 2


class Other(Target):
    pass


def test_the_digest_tells_different_objectives_apart():
    different = [
        1.0 * CrossEntropy(),
        2 * CrossEntropy(),
        CrossEntropy() + L2Norm(),
        CrossEntropy() + TotalVariation(),
        *(1.0 * FeatureStatistics(*options) for options in ((), ("kl",), ("l2", 10))),
        *(1.0 * FeatureStatistics(statistics=some_statistics(seed)) for seed in (1, 2)),
        *(1.0 * term for term in (Target(1.0), Target(2.0), Other(1.0))),
    ]
    assert len({digest(objective) for objective in different}) == len(different)
    assert len({digest(FeatureStatistics(statistics=some_statistics(1))) for _ in range(2)}) == 1


def test_a_term_from_elsewhere_is_known_by_its_source(monkeypatch):
    before = digest(Target(1.0))
    assert digest(Target(1.0)) == before
    monkeypatch.setattr("inspect.getsource", lambda kind: "class Target(Term): another equation")
    assert digest(Target(1.0)) != before
    monkeypatch.setattr("inspect.getsource", None)  # as at a prompt: TypeError
    assert digest(Target(1.0)) != digest(Target(2.0))
