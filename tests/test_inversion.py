"""Inversion: the teacher stays as it is, seeds decide everything, each setting does what it says."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from dinv import inversion, step
from dinv.features import NoBatchNorm, measure_statistics, recorded
from dinv.inversion import InversionSettings, NotFinite, balanced_labels, invert
from dinv.models import Classifier
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, Term, TotalVariation, View
from dinv.step import inversion_flops

LABELS = torch.arange(6) % 5
PLAIN = InversionSettings(steps=12, rate=0.1, compile="never")
STILL = replace(PLAIN, jitter=0, flip=False)


def deep_inversion():
    return CrossEntropy() + 2.5e-5 * TotalVariation() + 3e-8 * L2Norm() + 10.0 * FeatureStatistics()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels_of(teacher, images):
    return (images - teacher.mean) / teacher.std


class Spy(Term):
    """Looks at every view, costs next to nothing."""

    name = "spy"

    def __init__(self, look):
        self.look = look

    def __call__(self, view):
        self.look(view)
        return 1e-9 * view.pixels.sum()


class Mask(Term):
    """<mask, pixels>: its gradient is the mask, whatever the pixels."""

    name = "mask"

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, view):
        return (self.mask * view.pixels).sum()


# ---- what comes out ------------------------------------------------------------------------------


def test_images_are_float32_nchw_in_0_to_1_and_the_teacher_takes_them_for_their_labels(tiny):
    teacher = tiny()
    result = invert(teacher, LABELS, CrossEntropy(), replace(STILL, steps=150))
    images = result.images
    assert images.shape == (6, 3, 8, 8) and images.dtype == torch.float32 and images.is_contiguous()
    assert images.min() >= 0 and images.max() <= 1 and not images.requires_grad
    assert torch.equal(result.labels, LABELS) and result.labels.dtype == torch.int64
    assert torch.equal(teacher(images).argmax(1), LABELS)
    assert result.seconds > 0 and not result.compiled


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_never_leave_the_range_of_images(tiny, channels):
    seen = []

    def look(view):
        seen.append((view.images.min().item(), view.images.max().item()))

    teacher = tiny(channels=channels)
    invert(teacher, LABELS, CrossEntropy() + Spy(look), replace(PLAIN, rate=1.0))
    assert len(seen) == 12
    assert min(low for low, _ in seen) == pytest.approx(0, abs=1e-6)  # noise alone reaches the ends
    assert max(high for _, high in seen) == pytest.approx(1, abs=1e-6)


def test_losses_are_the_unweighted_terms_before_each_step(tiny):
    teacher = tiny()
    objective = (CrossEntropy() + 0.5 * TotalVariation() + 10 * FeatureStatistics()).bind(teacher)
    result = invert(teacher, LABELS, objective, STILL, snapshots=range(12))
    assert list(result.losses) == ["cross-entropy", "total variation", "feature statistics", "objective"]
    assert all(len(values) == 12 for values in result.losses.values())
    for number, images in result.snapshots.items():
        pixels = pixels_of(teacher, images)
        with recorded(teacher, objective.layers()) as features:
            terms = objective.terms(View(pixels, LABELS, teacher(images), features)).tolist()
        found = [result.losses[name][number] for name in objective.names]
        assert found == pytest.approx(terms, rel=1e-3)
        whole = found[0] + 0.5 * found[1] + 10 * found[2]
        assert result.losses["objective"][number] == pytest.approx(whole, rel=1e-5)


def test_two_terms_of_one_name_have_a_curve_each(tiny):
    both = FeatureStatistics() + FeatureStatistics("kl")
    losses = invert(tiny(), LABELS, both, STILL).losses
    assert list(losses) == ["feature statistics", "feature statistics #2", "objective"]
    assert losses["feature statistics"] != losses["feature statistics #2"]


def test_feature_statistics_come_nearer(tiny):
    teacher, settings = tiny(), replace(PLAIN, steps=60, rate=0.05)
    without = invert(teacher, LABELS, CrossEntropy(), settings).images
    with_ = invert(teacher, LABELS, CrossEntropy() + 10 * FeatureStatistics(), settings).images

    def distance(images):
        term = FeatureStatistics().bind(teacher)
        with recorded(teacher, term.layers()) as features:
            logits = teacher(images)
        return term(View(images, LABELS, logits, features)).item()

    assert distance(with_) < 0.7 * distance(without)


def test_a_single_term_is_an_objective(tiny):
    one, other = (invert(tiny(), LABELS, o, PLAIN).images for o in (CrossEntropy(), 1.0 * CrossEntropy()))
    assert torch.equal(one, other)


def test_a_network_without_batchnorm_needs_measured_statistics(tiny):
    teacher, images = tiny(norm=False), torch.rand(50, 3, 8, 8, generator=generator())
    with pytest.raises(NoBatchNorm, match="measure_statistics"):
        invert(teacher, LABELS, CrossEntropy() + FeatureStatistics(), PLAIN)
    term = FeatureStatistics(statistics=measure_statistics(teacher, images))
    losses = invert(teacher, LABELS, CrossEntropy() + term, replace(PLAIN, steps=40)).losses
    assert losses["feature statistics"][-1] < losses["feature statistics"][0]


# ---- frozen means frozen -------------------------------------------------------------------------


@pytest.mark.parametrize("compile", ["auto", "never"])
@pytest.mark.parametrize("state", ["training", "frozen", "mixed"])
def test_the_teacher_stays_as_it_is(tiny, portrait, state, compile):
    teacher = tiny().train(state != "frozen").requires_grad_(state != "frozen")
    if state == "mixed":
        teacher.net[1].eval()
        teacher.net[0].weight.requires_grad_(False)
    before = portrait(teacher)
    invert(teacher, LABELS, deep_inversion(), replace(PLAIN, compile=compile))
    assert portrait(teacher) == before


def test_the_teacher_stays_as_it_is_after_an_exception(tiny, portrait):
    teacher = tiny().train()
    before = portrait(teacher)

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(teacher, LABELS, deep_inversion(), PLAIN, callback=interrupt, every=5)
    assert portrait(teacher) == before


def test_the_images_of_a_teacher_in_training_mode_are_those_of_it_in_eval_mode(tiny):
    one, other = (invert(tiny().train(mode), LABELS, deep_inversion(), PLAIN) for mode in (True, False))
    assert torch.equal(one.images, other.images)


def test_no_gradient_is_computed_for_a_weight(tiny):
    leaves = []

    def look(view):
        nodes, found = [view.logits.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if hasattr(node, "variable"):
                found.add(node.variable)
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        leaves.append(found == {view.pixels})

    teacher = tiny().requires_grad_(True)
    invert(teacher, LABELS, CrossEntropy() + Spy(look), PLAIN)
    assert leaves == [True] * 12


# ---- randomness ----------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_images(tiny):
    teacher = tiny()

    def images(seed):
        return invert(teacher, LABELS, deep_inversion(), PLAIN, seed=seed).images

    one = images(3)
    torch.manual_seed(99)  # of no account
    state = torch.get_rng_state()
    assert torch.equal(one, images(3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, images(4))


def test_noise_does_not_depend_on_the_objective(tiny):
    one, other = (
        invert(tiny(), LABELS, o, PLAIN, snapshots=(0,)).snapshots[0] for o in (CrossEntropy(), L2Norm())
    )
    assert torch.equal(one, other)


# ---- jitter and flips ----------------------------------------------------------------------------


def test_augmentation_rolls_the_batch_and_mirrors_single_images():
    image = torch.arange(8 * 8.0).view(1, 8, 8)
    known = {}
    for dy, dx in itertools.product(range(-4, 4), repeat=2):
        rolled = image.roll((dy, dx), (1, 2))
        known[tuple(rolled.flatten().tolist())] = (dy, dx, False)
        known[tuple(rolled.flip(2).flatten().tolist())] = (dy, dx, True)
    settings, draw, offsets, mirrored = InversionSettings(jitter=2), generator(), set(), 0
    for _ in range(200):
        seen, _ = inversion.jittered(image.expand(10, 1, 8, 8), settings, draw)
        found = [known[tuple(x.flatten().tolist())] for x in seen]
        assert len({(dy, dx) for dy, dx, _ in found}) == 1
        offsets.add(found[0][:2])
        mirrored += sum(flip for *_, flip in found)
    assert offsets == set(itertools.product(range(-2, 3), repeat=2))
    assert 900 < mirrored < 1100


@pytest.mark.parametrize("jitter, flip", [(0, False), (3, False), (0, True), (2, True), (30, True)])
def test_the_gradient_comes_back_by_the_inverse_permutation(jitter, flip):
    settings, draw = InversionSettings(jitter=jitter, flip=flip), generator(1)
    index = torch.arange(5 * 3 * 6 * 7, dtype=torch.float64).view(5, 3, 6, 7)
    for _ in range(20):
        seen, restore = inversion.jittered(index, settings, draw)
        assert torch.equal(restore(seen), index)
        # the same by autograd: seen is index, gathered
        pixels = torch.randn(5, 3, 6, 7, generator=draw, dtype=torch.float64, requires_grad=True)
        gathered = pixels.flatten()[seen.flatten().long()].view(5, 3, 6, 7)
        slope = torch.randn(5, 3, 6, 7, generator=draw, dtype=torch.float64)
        (expected,) = torch.autograd.grad((slope * gathered).sum(), pixels)
        assert torch.equal(restore(slope), expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_step_goes_against_the_gradient_through_jitter_and_flip(tiny, seed):
    teacher, mask = tiny(), torch.randn(2, 3, 8, 8, generator=generator(5))
    settings = replace(PLAIN, steps=1, jitter=1, flip=True, keep="last")
    result = invert(teacher, LABELS[:2], Mask(mask), settings, seed=seed, snapshots=(0,))
    noise, after = (pixels_of(teacher, images) for images in (result.snapshots[0], result.images))

    def augmented(x, dy, dx, flips):
        return torch.stack([
            image.roll((dy, dx), (1, 2)).flip(2) if flip else image.roll((dy, dx), (1, 2))
            for image, flip in zip(x, flips, strict=True)
        ])  # fmt: skip

    # What was drawn shows in the value of the term; so does, in the update, what came back.
    drawn = itertools.product((-1, 0, 1), (-1, 0, 1), itertools.product((False, True), repeat=2))
    values = {d: (mask * augmented(noise, *d)).sum().item() for d in drawn}
    used = min(values, key=lambda d: abs(values[d] - result.losses["mask"][0]))
    assert values[used] == pytest.approx(result.losses["mask"][0], rel=1e-4)
    point = noise.clone().requires_grad_()
    (slope,) = torch.autograd.grad((mask * augmented(point, *used)).sum(), point)
    inside = (result.images > 0) & (result.images < 1)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close((after - noise)[inside], -0.1 * slope.sign()[inside], atol=1e-5, rtol=0)


# ---- schedule, stages, best images ---------------------------------------------------------------


def moved(teacher, settings, count):
    """How far Adam moves a pixel in each step where the gradient is constant: the learning rate."""
    mask = torch.ones(2, 3, 8, 8)
    settings = replace(settings, jitter=0, flip=False, keep="last")
    result = invert(teacher, LABELS[:2], Mask(mask), settings, snapshots=range(count + 1))
    images = torch.stack([pixels_of(teacher, result.snapshots[i]) for i in range(count + 1)])
    inside = (images[-1] > pixels_of(teacher, torch.full((1, 3, 1, 1), 0.01))) & (images[0] < 0.9)
    return [-(b - a)[inside].mean().item() for a, b in itertools.pairwise(images)]


def test_constant_and_cosine_rate(tiny):
    teacher, settings = tiny(), replace(PLAIN, steps=10, rate=0.02)
    assert moved(teacher, settings, 10) == pytest.approx([0.02] * 10, rel=1e-3)
    cosine = [0.02 * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert moved(teacher, replace(settings, schedule="cosine"), 10) == pytest.approx(cosine, rel=1e-2)
    two = replace(settings, schedule="cosine", stages=((5, 8), (5, 8)))
    assert moved(teacher, two, 10) == pytest.approx(2 * cosine[::2], rel=1e-2)


def test_stages_go_from_coarse_to_fine(tiny):
    sizes, teacher = [], tiny()
    settings = replace(PLAIN, stages=((3, 4), (1, 6), (2, 8)))
    objective = deep_inversion() + Spy(lambda view: sizes.append(view.pixels.shape))
    result = invert(teacher, LABELS, objective, settings, snapshots=(0, 3, 4, 6))
    assert [size[-1] for size in sizes] == [4, 4, 4, 6, 8, 8]
    assert all(size == (6, 3, size[-1], size[-1]) for size in sizes)
    assert result.images.shape == (6, 3, 8, 8) and len(result.losses["spy"]) == 6
    assert [result.snapshots[i].shape[-1] for i in (0, 3, 4, 6)] == [4, 6, 8, 8]


def test_a_stage_starts_from_the_images_of_the_one_before(tiny):
    teacher = tiny()
    settings = replace(STILL, keep="last", stages=((4, 4), (1, 8)))
    coarse = invert(teacher, LABELS, CrossEntropy(), replace(settings, stages=((4, 4),))).images
    fine = invert(teacher, LABELS, CrossEntropy(), settings, snapshots=(4,)).snapshots[4]
    enlarged = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(fine, enlarged, atol=1e-6, rtol=0)


class Late(Term):
    """Adds 100 to the objective from call 10 on: the smallest value is seen before."""

    name = "late"

    def __init__(self):
        self.calls = 0

    def __call__(self, view):
        self.calls += 1
        return 0 * view.pixels.sum() + (100 if self.calls >= 10 else 0)


def test_best_images_are_those_of_the_smallest_objective(tiny):
    teacher = tiny()
    best = invert(teacher, LABELS, deep_inversion() + Late(), STILL, snapshots=range(12))
    losses = best.losses["objective"]
    lowest = losses.index(min(losses))
    assert 0 < lowest < 9  # neither the noise nor the end
    assert torch.equal(best.images, best.snapshots[lowest])
    objective = deep_inversion().bind(teacher)
    with recorded(teacher, objective.layers()) as features:
        logits = teacher(best.images)
    value = objective(View(pixels_of(teacher, best.images), LABELS, logits, features)).item()
    assert value == pytest.approx(min(losses), rel=1e-4)
    last = invert(teacher, LABELS, deep_inversion() + Late(), replace(STILL, keep="last"))
    assert last.losses == best.losses and not torch.equal(last.images, best.images)


def test_last_images_are_those_after_the_last_step(tiny):
    teacher, settings = tiny(), replace(PLAIN, keep="last")
    longer = invert(teacher, LABELS, deep_inversion(), replace(settings, steps=15), snapshots=(12,))
    assert torch.equal(invert(teacher, LABELS, deep_inversion(), settings).images, longer.snapshots[12])


# ---- progress and snapshots ----------------------------------------------------------------------


def test_snapshots_are_copies_from_before_the_step(tiny):
    result = invert(tiny(), LABELS, CrossEntropy(), PLAIN, snapshots=(0, 4, 12))
    assert list(result.snapshots) == [0, 4, 12]
    assert torch.equal(result.snapshots[12], result.images)
    assert len({tuple(s.flatten().tolist()) for s in result.snapshots.values()}) == 3
    for images in result.snapshots.values():
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize(
    "every, steps", [(5, [5, 10, 12]), (4, [4, 8, 12]), (50, [12]), (1, list(range(1, 13)))]
)
def test_the_callback_comes_every_so_many_steps_and_at_the_end(tiny, every, steps):
    told = []

    def callback(progress):
        told.append((progress.step, progress.steps, progress.terms, progress.images()))

    objective = CrossEntropy() + 0.1 * TotalVariation()
    result = invert(
        tiny(), LABELS, objective, PLAIN, callback=callback, every=every, snapshots=range(12)
    )
    assert [step for step, *_ in told] == steps
    for step_, total, terms, images in told:
        assert total == 12 and list(terms) == ["cross-entropy", "total variation"]
        assert terms == {name: result.losses[name][step_ - 1] for name in terms}
        if step_ < 12:
            assert torch.equal(images, result.snapshots[step_])


def test_stages_do_not_disturb_the_callbacks_rhythm(tiny):
    told = []
    settings = replace(PLAIN, stages=((3, 4), (5, 8)))
    invert(tiny(), LABELS, CrossEntropy(), settings, callback=lambda p: told.append(p.step), every=4)
    assert told == [4, 8]


# ---- numbers that are none -----------------------------------------------------------------------


class Breaks(Term):
    """Zero, until at call `at` it, or with `gradient` only its derivative, is no number any more."""

    name = "breaks"

    def __init__(self, at, value=math.nan, gradient=False):
        self.at, self.value, self.gradient, self.calls = at, value, gradient, 0

    def __call__(self, view):
        self.calls += 1
        zero = 0 * view.pixels.sum()
        if self.calls < self.at:
            return zero
        return zero.abs().sqrt() if self.gradient else zero + self.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every, at", [(50, 7), (1, 1), (5, 5), (5, 11)])
def test_a_term_that_is_not_finite_is_named_with_its_step(tiny, value, every, at):
    objective, told = CrossEntropy() + 2 * Breaks(at, value) + TotalVariation(), []
    with pytest.raises(NotFinite, match=f"^breaks became {value} at step {at}: lower the learning rate"):
        invert(tiny(), LABELS, objective, PLAIN, every=every, callback=lambda p: told.append(p.step))
    assert all(step < at for step in told)


@pytest.mark.parametrize("stages", [(), ((4, 4), (8, 8))])
def test_a_gradient_that_is_not_finite_is_traced_to_its_term(tiny, stages):
    for at in (1, 4, 5):
        objective = CrossEntropy() + TotalVariation() + Breaks(at, gradient=True)
        with pytest.raises(NotFinite, match=f"^the gradient of breaks became nan at step {at}: "):
            invert(tiny(), LABELS, objective, replace(PLAIN, stages=stages))


def test_a_teacher_that_is_not_finite(tiny):
    teacher = tiny()
    teacher.net[3].weight.data[0] = math.nan
    with pytest.raises(NotFinite, match="cross-entropy became nan at step 1"):
        invert(teacher, LABELS, CrossEntropy() + TotalVariation(), PLAIN)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 5]), "label 5 is out of range: the teacher knows 5 classes, 0 to 4"),
        (torch.tensor([3, -1]), "label -1 is out of range"),
        (torch.tensor([], dtype=torch.long), "labels are empty: at least one image"),
        (torch.tensor([0.0, 1.0]), r"one integer an image, got shape \(2,\), torch.float32"),
        (torch.tensor([True]), "one integer an image, got .*bool"),
        (torch.zeros(2, 2, dtype=torch.long), r"one integer an image, got shape \(2, 2\)"),
        (torch.tensor(3), r"one integer an image, got shape \(\)"),
    ],
)
def test_labels_that_are_none(tiny, labels, message):
    with pytest.raises(ValueError, match=message):
        invert(tiny(), labels, CrossEntropy(), PLAIN)


@pytest.mark.parametrize("labels", [[0, 4], torch.tensor([0, 4], dtype=torch.uint8)])
def test_labels_of_other_integer_kinds(tiny, labels):
    result = invert(tiny(), labels, CrossEntropy(), PLAIN)
    assert result.labels.dtype == torch.int64 and result.labels.tolist() == [0, 4]


def test_balanced_labels():
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels(100, 10).bincount().tolist() == [10] * 10


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"schedule": "linear"}, "unknown schedule 'linear': choose constant, cosine"),
        ({"keep": "first"}, "unknown keep 'first': choose best, last"),
        ({"compile": True}, "unknown compile True: choose auto, always, never"),
        ({"steps": 0}, "steps=0 .*must be positive"),
        ({"rate": 0.0}, "rate=0.0 must be positive"),
        ({"rate": -0.1}, "rate=-0.1 must be positive"),
        ({"rate": math.nan}, "rate=nan must be positive"),
        ({"rate": math.inf}, "rate=inf must be positive"),
        ({"jitter": -1}, "jitter=-1 not negative"),
        ({"stages": ((0, 8),)}, "must be pairs of positive steps and size"),
        ({"stages": ((5, 0),)}, "must be pairs of positive steps and size"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        InversionSettings(**settings)


@pytest.mark.parametrize("call", [{"snapshots": (13,)}, {"snapshots": (-1, 3)}, {"every": 0}])
def test_snapshots_and_rhythms_that_no_step_has(tiny, call):
    with pytest.raises(ValueError, match="snapshots .* must lie in 0 to 12.*every=.* at least 1"):
        invert(tiny(), LABELS, CrossEntropy(), PLAIN, **call)


def test_an_objective_of_zeros(tiny):
    with pytest.raises(ValueError, match="nothing to minimise"):
        invert(tiny(), LABELS, 0 * CrossEntropy(), PLAIN)


# ---- the compiled step ---------------------------------------------------------------------------
# Most of it with a backend that compiles nothing: what is tested is the step's book-keeping.

ALWAYS = replace(PLAIN, compile="always")


@pytest.fixture
def graphs(monkeypatch):
    """Replace the compiler by one that only counts; the list grows by one graph a compilation."""
    graphs, original = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=backend, **options))
    monkeypatch.setattr(step, "compiler_available", lambda device: True)
    return graphs


def images_of(teacher, objective, settings=ALWAYS, labels=LABELS):
    result = invert(teacher, labels, objective, settings)
    assert result.compiled == (settings is not PLAIN)
    return result.images


def test_a_compiled_step_is_used_again_with_fresh_weights(tiny, graphs):
    teacher = tiny()
    first = images_of(teacher, deep_inversion())
    assert len(graphs) == 1
    assert torch.equal(first, images_of(teacher, deep_inversion()))
    with torch.no_grad():  # more training
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator())
        teacher.net[1].running_mean += 1
    again = images_of(teacher, deep_inversion())
    other = images_of(teacher, CrossEntropy() + TotalVariation() + L2Norm() + FeatureStatistics())
    assert len(graphs) == 1
    assert not torch.equal(first, again)
    torch.testing.assert_close(again, images_of(teacher, deep_inversion(), PLAIN), atol=1e-5, rtol=0)
    expected = CrossEntropy() + TotalVariation() + L2Norm() + FeatureStatistics()
    torch.testing.assert_close(other, images_of(teacher, expected, PLAIN), atol=1e-5, rtol=0)


def test_a_compiled_step_used_again_leaves_given_statistics_alone(tiny, graphs):
    teacher = tiny()
    few, many = (
        measure_statistics(teacher, torch.rand(n, 3, 8, 8, generator=generator(n))) for n in (4, 40)
    )
    digests = few.digest(), many.digest()
    first = images_of(teacher, FeatureStatistics(statistics=few))
    second = images_of(teacher, FeatureStatistics(statistics=many))
    third = images_of(teacher, FeatureStatistics(statistics=few))
    assert len(graphs) == 1
    assert (few.digest(), many.digest()) == digests
    assert torch.equal(first, third) and not torch.equal(first, second)


class Grey(Term):
    """A term as somebody writes one, with an option and nothing else said."""

    name = "grey"

    def __init__(self, level):
        self.level = level

    def __call__(self, view):
        return ((view.images - self.level) ** 2).sum()


def test_a_compiled_step_is_not_used_for_a_term_with_other_options(tiny, graphs):
    teacher, settings = tiny(), replace(ALWAYS, steps=40)
    for level in (0.2, 0.8):
        images = images_of(teacher, Grey(level), settings)
        assert (images.mean() - level).abs() < 0.1


def test_many_steps_are_all_compiled(graphs):
    """Dynamo gives up after eight graphs of one code object, and says so only in its log."""
    net, settings = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), replace(ALWAYS, steps=2)
    teacher = Classifier(net, [0.5], [0.5], 4, "ab")
    for batch in range(1, 10):
        images_of(teacher, CrossEntropy(), settings, torch.zeros(batch, dtype=torch.long))
    assert len(graphs) == 9
    for steps in (3, 4):  # another number of steps is no reason to compile anew
        images_of(teacher, CrossEntropy(), replace(ALWAYS, steps=steps), torch.zeros(5, dtype=torch.long))
    assert len(graphs) == 9


def test_a_network_that_has_grown_is_compiled_anew(tiny, graphs):
    teacher = tiny()
    for classes in (5, 7):
        teacher.net[8] = nn.Linear(6, classes)
        images_of(teacher, CrossEntropy(), replace(ALWAYS, steps=1))
    assert len(graphs) == 2


def test_networks_that_differ_by_their_weights_are_compiled_once(tiny, graphs):
    teachers = [tiny(0), tiny(1), tiny(0, classes=7)]
    eager = [images_of(teacher, deep_inversion(), PLAIN) for teacher in teachers]
    found = [images_of(teacher, deep_inversion()) for teacher in teachers]
    assert len(graphs) == 2  # seven classes are another structure
    for one, other in zip(eager, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_the_teacher_stays_as_it_is_when_compiled(tiny, graphs, portrait):
    teacher = tiny().train()
    before = portrait(teacher)
    images_of(teacher, deep_inversion())
    assert portrait(teacher) == before and len(graphs) == 1


def test_a_compiler_that_fails_is_told_of_and_gone_without(tiny, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("g++: internal compiler error")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=backend, **options))
    monkeypatch.setattr(step, "compiler_available", lambda device: True)
    teacher = tiny()
    with pytest.warns(RuntimeWarning, match="going on without compilation: .*internal compiler error"):
        result = invert(teacher, LABELS, deep_inversion(), ALWAYS)
    assert not result.compiled
    plain = invert(teacher, LABELS, deep_inversion(), PLAIN)
    assert torch.equal(result.images, plain.images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        again = invert(teacher, LABELS, deep_inversion(), ALWAYS)
    assert torch.equal(again.images, plain.images) and not again.compiled


def test_without_a_compiler_the_plain_path_runs(tiny, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(torch, "compile", None)
    teacher = tiny()
    result = invert(teacher, LABELS, deep_inversion(), ALWAYS)
    assert not result.compiled
    assert torch.equal(result.images, invert(teacher, LABELS, deep_inversion(), PLAIN).images)


def test_auto_compiles_for_much_work_with_statistics_only(tiny, graphs, monkeypatch):
    auto, teacher = replace(PLAIN, compile="auto"), tiny()
    assert not invert(teacher, LABELS, deep_inversion(), auto).compiled and not graphs
    monkeypatch.setattr(step, "WORTH_COMPILING", 1.0)
    assert not invert(teacher, LABELS, CrossEntropy(), auto).compiled and not graphs  # reads no statistics
    assert invert(teacher, LABELS, deep_inversion(), auto).compiled and len(graphs) == 1


def test_operations_of_an_inversion(tiny):
    # multiply-adds of the tiny network: 8x8x4x27, 4x4x6x36, 6x5; two operations each; and back
    once = 4 * (8 * 8 * 4 * 27 + 4 * 4 * 6 * 36 + 6 * 5)
    assert inversion_flops(tiny(), ((1, 8),)) == once
    assert inversion_flops(tiny(), ((10, 4), (3, 8))) == pytest.approx(once * (10 / 4 + 3))


def test_the_compiled_step_agrees_with_the_plain_one(tiny):
    """With the real compiler. Adam magnifies rounding, so the losses are compared, not the pixels."""
    if not step.compiler_available(torch.device("cpu")):
        pytest.skip("no C++ compiler here")
    teacher = tiny()
    compiled = invert(teacher, LABELS, deep_inversion(), ALWAYS)
    plain = invert(teacher, LABELS, deep_inversion(), PLAIN)
    assert compiled.compiled and not plain.compiled
    for name, values in plain.losses.items():
        assert compiled.losses[name] == pytest.approx(values, rel=2e-2)
        assert compiled.losses[name][0] == pytest.approx(values[0], rel=1e-4)
    torch.testing.assert_close(compiled.images.mean(), plain.images.mean(), rtol=1e-2, atol=0)
