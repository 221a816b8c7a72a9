"""Inversion: the teacher stays as it is, seeds decide everything, each setting does what it says."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dinv.feature_statistics import recorded
from dinv.files import digest
from dinv.inversion import InversionSettings, Inverter, balanced_labels, invert
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, Term, TotalVariation, View
from dinv.step import NotFinite, jittered

LABELS = torch.arange(6) % 5
PLAIN = InversionSettings(steps=12, lr=0.1, compile="never")
STILL = replace(PLAIN, jitter=0, flip=False)


def deep_inversion():
    return CrossEntropy() + 2.5e-5 * TotalVariation() + 3e-8 * L2Norm() + 10.0 * FeatureStatistics()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels_of(teacher, images):
    return (images - teacher.mean) / teacher.std


def terms_of(teacher, objective, images, labels=LABELS):
    """The unweighted terms of `images`, without any of the machinery of an inversion."""
    objective = (1.0 * objective).bind(teacher)
    with recorded(teacher, objective.layers()) as features:
        logits = teacher(images)
    return objective.terms(View(pixels_of(teacher, images), labels, logits, features)).tolist()


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


def test_images_are_float32_nchw_in_0_to_1_and_the_teacher_takes_them_for_their_labels(tiny):
    teacher = tiny()
    result = invert(teacher, LABELS, CrossEntropy(), replace(STILL, steps=150))
    images = result.images
    assert images.shape == (6, 3, 8, 8) and images.dtype == torch.float32 and images.is_contiguous()
    assert images.min() >= 0 and images.max() <= 1 and not images.requires_grad
    assert torch.equal(result.labels, LABELS) and result.labels.dtype == torch.int64
    assert torch.equal(teacher(images).argmax(1), LABELS)
    assert result.seconds > 0 and result.compile_seconds == 0 and not result.compiled
    one, other = (invert(teacher, LABELS, o, PLAIN).images for o in (CrossEntropy(), 1.0 * CrossEntropy()))
    assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_never_leave_the_range_of_images(tiny, channels):
    ranges = []
    spy = Spy(lambda view: ranges.append((view.images.min().item(), view.images.max().item())))
    invert(tiny(channels=channels), LABELS, CrossEntropy() + spy, replace(PLAIN, lr=1.0))
    assert len(ranges) == 12
    assert min(low for low, _ in ranges) == pytest.approx(0, abs=1e-6)  # noise alone reaches the ends
    assert max(high for _, high in ranges) == pytest.approx(1, abs=1e-6)


def test_losses_are_the_unweighted_terms_before_each_step(tiny):
    teacher = tiny()
    objective = CrossEntropy() + 0.5 * FeatureStatistics() + 10 * FeatureStatistics("kl")
    result = invert(teacher, LABELS, objective, STILL, snapshots=range(12))
    assert list(result.losses) == [
        "cross-entropy", "feature statistics", "feature statistics #2", "objective",
    ]  # fmt: skip
    assert all(len(values) == 12 for values in result.losses.values())
    for number, images in result.snapshots.items():
        values = [result.losses[name][number] for name in objective.names]
        assert values == pytest.approx(terms_of(teacher, objective, images), rel=1e-3)
        whole = values[0] + 0.5 * values[1] + 10 * values[2]
        assert result.losses["objective"][number] == pytest.approx(whole, rel=1e-5)


def test_an_inverter_gives_what_invert_gives_and_follows_its_teacher(tiny):
    teacher = tiny()
    inverter = Inverter(teacher, deep_inversion(), PLAIN)
    first, again = (inverter(LABELS, seed=3).images for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, invert(teacher, LABELS, deep_inversion(), PLAIN, seed=3).images)
    with torch.no_grad():  # more training
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator())
        teacher.net[1].running_mean += 1
    trained = inverter(LABELS, seed=3).images
    assert not torch.equal(first, trained)
    assert torch.equal(trained, invert(teacher, LABELS, deep_inversion(), PLAIN, seed=3).images)
    teacher.net[3] = nn.Conv2d(4, 6, 1, bias=False)
    with pytest.raises(ValueError, match="tiny does not fit this step, make a new one: .*size mismatch"):
        inverter(LABELS)


def test_the_digest_of_an_inverter_is_of_teacher_objective_and_settings(tiny):
    def key(seed=0, objective=None, settings=PLAIN):
        return digest(Inverter(tiny(seed), objective or CrossEntropy(), settings))

    one = Inverter(tiny(), CrossEntropy(), PLAIN)
    one(LABELS)
    assert digest(one) == key() == key(objective=1.0 * CrossEntropy())
    others = (key(1), key(objective=deep_inversion()), key(settings=STILL), key(settings=None))
    assert len({key(), *others}) == 5


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("state", ["training", "frozen", "mixed"])
def test_the_teacher_stays_as_it_is(tiny, portrait, state, interrupted):
    teacher = tiny().train(state != "frozen").requires_grad_(state != "frozen")
    if state == "mixed":
        teacher.net[1].eval()
        teacher.net[0].weight.requires_grad_(False)
    before, told = portrait(teacher), []

    def interrupt(progress):
        told.append(progress)
        if interrupted:
            raise KeyboardInterrupt

    try:
        invert(teacher, LABELS, deep_inversion(), replace(PLAIN, compile="auto"), callback=interrupt, every=5)
    except KeyboardInterrupt:
        assert len(told) == 1
    assert told and portrait(teacher) == before


def test_the_images_of_a_teacher_in_training_mode_are_those_of_it_in_eval_mode(tiny):
    one, other = (invert(tiny().train(mode), LABELS, deep_inversion(), PLAIN) for mode in (True, False))
    assert torch.equal(one.images, other.images)


def test_no_gradient_is_computed_for_a_weight(tiny):
    leaves = []

    def look(view):
        nodes, variables = [view.logits.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if hasattr(node, "variable"):
                variables.add(node.variable)
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        leaves.append(variables == {view.pixels})

    invert(tiny().requires_grad_(True), LABELS, CrossEntropy() + Spy(look), PLAIN)
    assert leaves == [True] * 12


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_images(tiny):
    def result(seed, objective):
        return invert(tiny(), LABELS, objective, PLAIN, seed=seed, snapshots=(0,))

    one = result(3, deep_inversion())
    torch.manual_seed(99)  # of no account
    state = torch.get_rng_state()
    assert torch.equal(one.images, result(3, deep_inversion()).images)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one.images, result(4, deep_inversion()).images)
    assert torch.equal(one.snapshots[0], result(3, L2Norm()).snapshots[0])  # noise is the objective's not


def test_augmentation_rolls_the_batch_and_mirrors_single_images():
    image = torch.arange(8 * 8.0).view(1, 8, 8)
    known = {}
    for dy, dx in itertools.product(range(-4, 4), repeat=2):
        rolled = image.roll((dy, dx), (1, 2))
        known[tuple(rolled.flatten().tolist())] = (dy, dx, False)
        known[tuple(rolled.flip(2).flatten().tolist())] = (dy, dx, True)
    settings, draw, offsets, mirrored = InversionSettings(jitter=2), generator(), set(), 0
    for _ in range(200):
        moved, _ = jittered(image.expand(10, 1, 8, 8), settings, draw)
        moves = [known[tuple(x.flatten().tolist())] for x in moved]
        assert len({(dy, dx) for dy, dx, _ in moves}) == 1
        offsets.add(moves[0][:2])
        mirrored += sum(flip for *_, flip in moves)
    assert offsets == set(itertools.product(range(-2, 3), repeat=2))
    assert 900 < mirrored < 1100


@pytest.mark.parametrize("jitter, flip", [(0, False), (3, False), (0, True), (2, True), (30, True)])
def test_the_gradient_comes_back_by_the_inverse_permutation(jitter, flip):
    settings, draw = InversionSettings(jitter=jitter, flip=flip), generator(1)
    index = torch.arange(5 * 3 * 6 * 7, dtype=torch.float64).view(5, 3, 6, 7)
    for _ in range(20):
        moved, restore = jittered(index, settings, draw)
        assert torch.equal(restore(moved), index)
        # the same by autograd: `moved` is `index`, gathered
        pixels = torch.randn(5, 3, 6, 7, generator=draw, dtype=torch.float64, requires_grad=True)
        gathered = pixels.flatten()[moved.flatten().long()].view(5, 3, 6, 7)
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
        rolled = x.roll((dy, dx), (2, 3))
        return torch.where(torch.tensor(flips).view(-1, 1, 1, 1), rolled.flip(3), rolled)

    # Which offsets were drawn shows in the value of the term; that they came back shows in the update.
    draws = itertools.product((-1, 0, 1), (-1, 0, 1), itertools.product((False, True), repeat=2))
    values = {draw: (mask * augmented(noise, *draw)).sum().item() for draw in draws}
    used = min(values, key=lambda draw: abs(values[draw] - result.losses["mask"][0]))
    assert values[used] == pytest.approx(result.losses["mask"][0], rel=1e-4)
    point = noise.clone().requires_grad_()
    (slope,) = torch.autograd.grad((mask * augmented(point, *used)).sum(), point)
    inside = (result.images > 0) & (result.images < 1)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close((after - noise)[inside], -0.1 * slope.sign()[inside], atol=1e-5, rtol=0)


def test_constant_and_cosine_learning_rate(tiny):
    """How far Adam moves a pixel in each step where the gradient is constant: the learning rate."""

    def moves(settings):
        result = invert(teacher, LABELS[:2], Mask(torch.ones(2, 3, 8, 8)), settings, snapshots=range(11))
        images = torch.stack([pixels_of(teacher, result.snapshots[i]) for i in range(11)])
        inside = (images[-1] > pixels_of(teacher, torch.full((1, 3, 1, 1), 0.01))) & (images[0] < 0.9)
        return [-(b - a)[inside].mean().item() for a, b in itertools.pairwise(images)]

    teacher, settings = tiny(), replace(STILL, steps=10, lr=0.02, keep="last")
    assert moves(settings) == pytest.approx([0.02] * 10, rel=1e-3)
    cosine = [0.02 * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    settings = replace(settings, schedule="cosine")
    assert moves(settings) == pytest.approx(cosine, rel=1e-2)
    assert moves(replace(settings, stages=((5, 8), (5, 8)))) == pytest.approx(2 * cosine[::2], rel=1e-2)


def test_stages_go_from_coarse_to_fine_each_from_the_images_of_the_one_before(tiny):
    sizes, teacher = [], tiny()
    settings = replace(STILL, stages=((3, 4), (1, 6), (2, 8)), keep="last")
    objective = CrossEntropy() + Spy(lambda view: sizes.append(view.pixels.shape))
    result = invert(teacher, LABELS, objective, settings, snapshots=(0, 3, 4, 6))
    assert sizes == [(6, 3, size, size) for size in (4, 4, 4, 6, 8, 8)]
    assert result.images.shape == (6, 3, 8, 8) and len(result.losses["spy"]) == 6
    assert [result.snapshots[i].shape[-1] for i in (0, 3, 4, 6)] == [4, 6, 8, 8]
    coarse = invert(teacher, LABELS, CrossEntropy(), replace(settings, stages=((3, 4),))).images
    enlarged = nn.functional.interpolate(coarse, size=(6, 6), mode="bilinear")
    torch.testing.assert_close(result.snapshots[3], enlarged, atol=1e-6, rtol=0)


class Late(Term):
    """Adds 100 to the objective from call 10 on: the smallest value comes before."""

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
    terms = terms_of(teacher, deep_inversion(), best.images)
    value = sum(w * term for w, term in zip(deep_inversion().weights, terms, strict=True))
    assert value == pytest.approx(min(losses), rel=1e-4)
    last = invert(teacher, LABELS, deep_inversion() + Late(), replace(STILL, keep="last"))
    assert last.losses == best.losses and not torch.equal(last.images, best.images)


def test_last_images_are_those_after_the_last_step(tiny):
    teacher, settings = tiny(), replace(PLAIN, keep="last")
    longer = invert(teacher, LABELS, deep_inversion(), replace(settings, steps=15), snapshots=(12,))
    assert torch.equal(invert(teacher, LABELS, deep_inversion(), settings).images, longer.snapshots[12])


@pytest.mark.parametrize(
    "stages, every, steps",
    [((), 5, [5, 10, 12]), ((), 4, [4, 8, 12]), ((), 50, [12]), (((3, 4), (9, 8)), 4, [4, 8, 12])],
)
def test_the_callback_comes_every_so_many_steps_and_at_the_end(tiny, stages, every, steps):
    told, objective = [], CrossEntropy() + 0.1 * TotalVariation()

    def callback(progress):
        told.append((progress.step, progress.steps, progress.terms, progress.images()))

    options = {"callback": callback, "every": every, "snapshots": range(13)}
    result = invert(tiny(), LABELS, objective, replace(PLAIN, stages=stages), **options)
    assert [step for step, *_ in told] == steps
    for step, total, terms, images in told:
        assert total == 12 and terms == {name: result.losses[name][step - 1] for name in objective.names}
        assert images.min() >= 0 and images.max() <= 1
        if step < 12:
            assert torch.equal(images, result.snapshots[step])
    assert torch.equal(result.snapshots[12], result.images)
    assert len({tuple(result.snapshots[step].flatten().tolist()) for step in range(12)}) == 12


class Breaks(Term):
    """Zero, until at call `at` it, or with `gradient` only its derivative, is not finite any more."""

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
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_gradient_that_is_not_finite_is_traced_to_its_term(tiny, stages, at):
    objective = CrossEntropy() + TotalVariation() + Breaks(at, gradient=True)
    with pytest.raises(NotFinite, match=f"^the gradient of breaks became nan at step {at}: "):
        invert(tiny(), LABELS, objective, replace(PLAIN, stages=stages))


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 5]), "label 5 is out of range: the teacher knows 5 classes, 0 to 4"),
        (torch.tensor([3, -1]), "label -1 is out of range"),
        (torch.tensor([], dtype=torch.long), "labels are empty: at least one image"),
        (torch.tensor([0.0, 1.0]), r"one integer per image, got shape \(2,\), torch.float32"),
        (torch.tensor([True]), "one integer per image, got .*bool"),
        (torch.zeros(2, 2, dtype=torch.long), r"one integer per image, got shape \(2, 2\)"),
        (torch.tensor(3), r"one integer per image, got shape \(\)"),
    ],
)
def test_labels_that_are_refused(tiny, labels, message):
    with pytest.raises(ValueError, match=message):
        invert(tiny(), labels, CrossEntropy(), PLAIN)


def test_labels_of_other_integer_kinds_and_balanced_ones(tiny):
    for labels in ([0, 4], torch.tensor([0, 4], dtype=torch.uint8)):
        result = invert(tiny(), labels, CrossEntropy(), replace(PLAIN, steps=1))
        assert result.labels.dtype == torch.int64 and result.labels.tolist() == [0, 4]
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"schedule": "linear"}, "unknown schedule 'linear': choose constant, cosine"),
        ({"keep": "first"}, "unknown keep 'first': choose best, last"),
        ({"compile": True}, "unknown compile True: choose auto, always, never"),
        *(({"lr": lr}, f"lr={lr} must be positive and finite") for lr in (0.0, -0.1, math.nan, math.inf)),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"octaves": 0}, "octaves=0 must be positive"),
        ({"jitter": -1}, "jitter=-1 must be at least 0"),
        ({"chroma_lr": -1.0}, "chroma_lr=-1.0 must be at least 0"),
        ({"stages": ((0, 8),)}, "must be pairs of positive steps and size"),
        ({"stages": ((5, 0),)}, "must be pairs of positive steps and size"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InversionSettings(**settings)


@pytest.mark.parametrize("call", [{"snapshots": (13,)}, {"snapshots": (-1, 3)}, {"every": 0}])
def test_snapshots_and_rhythms_that_no_step_has(tiny, call):
    with pytest.raises(ValueError, match="snapshots .* must lie in 0 to 12.*every=.* at least 1"):
        invert(tiny(), LABELS, CrossEntropy(), PLAIN, **call)
