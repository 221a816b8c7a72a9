"""Distillation: its loss, its loop, resumption to the same bytes, and what it refuses."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinv import distillation, files
from dinv.data import dataset, strong
from dinv.data.dataset import cutmix, recolour
from dinv.distillation import DistillationSettings, DistillStep, FixedImages, InversionSource, distill
from dinv.experiments import stages
from dinv.generator import GeneratorSettings, GeneratorSource
from dinv.inversion import InversionSettings, Inverter
from dinv.metrics import agreement
from dinv.models import create_model
from dinv.objectives import CrossEntropy, FeatureStatistics
from dinv.pool import synthesize

SETTINGS = DistillationSettings(rounds=4, updates=5, batch_size=8, lr=0.05, pad=1, compile="never")
INVERSION = InversionSettings(steps=4, lr=0.1, flip=False, compile="never")
GENERATOR = GeneratorSettings(steps=2, latent_dim=6, width=4, jitter=1, compile="never")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=16, seed=0):
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator(seed))


def objective():
    return CrossEntropy() + 1.0 * FeatureStatistics()


def inversion_source(teacher, **options):
    return InversionSource(teacher, objective(), INVERSION, batch_size=10, seed=3, **options)


SOURCES = {
    "all at the start": lambda teacher: some_images(),
    "fixed": lambda teacher: FixedImages(some_images(40, 5), 10, 10),
    "inversion": inversion_source,
    "inversion in competition": lambda teacher: inversion_source(teacher, competition=5.0),
    "inversion in competition, later": lambda teacher: inversion_source(
        teacher, start=some_images(), competition=5.0
    ),
    "generator in competition": lambda teacher: GeneratorSource(
        teacher, objective(), GENERATOR, batch_size=10, seed=3, competition=5.0, warmup=2
    ),
}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
def test_loss_against_numpy(temperature):
    student, teacher = (4 * torch.randn(5, 7, generator=generator(s)) for s in (1, 2))

    def softened(z):
        e = np.exp(z.double().numpy() / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = softened(teacher), softened(student)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    loss = distillation.distillation_loss
    assert loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert loss(teacher + 3, teacher, temperature).item() == pytest.approx(0, abs=1e-4)


def test_a_student_comes_to_agree_with_its_teacher(tiny, portrait):
    teacher, student = tiny(0).freeze(), tiny(1)
    images = some_images(64)[..., :2, :2].repeat_interleave(4, 2).repeat_interleave(4, 3)  # of plain squares
    before, untouched = agreement(teacher, student, images), portrait(teacher)
    settings = DistillationSettings(rounds=10, updates=40, batch_size=32, pad=0, flip=False, compile="never")
    history = distill(teacher, student, images, settings).history
    assert agreement(teacher, student, images) > max(80, before + 20)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert history[-1]["agreement"] > history[0]["agreement"]
    assert not student.training and [record["round"] for record in history] == list(range(1, 11))
    assert portrait(teacher) == untouched


def test_blends_of_two_images():
    images, mixup = torch.rand(64, 3, 4, 4, generator=generator()), distillation.mixup
    blends = mixup(images, generator(1))
    again, other = mixup(images, generator(1)), mixup(images, generator(2))
    assert torch.equal(blends, again) and not torch.equal(blends, other)
    before = images.roll(1, 0)
    shares = (blends - images).flatten(1).norm(dim=1) / (before - images).flatten(1).norm(dim=1)
    assert 0 <= shares.min() < 0.1 and 0.9 < shares.max() <= 1
    assert len(shares.unique()) == len(images)  # one for every image, and for all its pixels:
    one = shares.view(-1, 1, 1, 1)
    torch.testing.assert_close(blends, images * (1 - one) + before * one)


@pytest.mark.parametrize("name", ["mixup", "strong"])
def test_batches_are_changed_that_are_used_as_they_are_without(tiny, monkeypatch, name):
    teacher, settings, batches = tiny(0).freeze(), replace(SETTINGS, augmentation=name), []
    monkeypatch.setattr(distillation, name, lambda images, _: batches.append(images.clone()) or images)
    plain, blended = tiny(1), tiny(1)
    distill(teacher, plain, some_images(), SETTINGS)
    assert not batches
    distill(teacher, blended, some_images(), settings)
    assert len(batches) == settings.rounds * settings.updates and equal(state(plain), state(blended))
    assert batches[0].dtype == torch.float32 and batches[0].min() >= 0 and batches[0].max() <= 1


def test_recoloured_images():
    images = torch.rand(256, 3, 6, 5, generator=generator())
    changed = recolour(images, generator(1))
    assert torch.equal(changed, recolour(images, generator(1)))
    assert changed.min() >= 0 and changed.max() <= 1
    dim, grey = 0.3 + 0.1 * images, 0.3 + 0.1 * images[:, :1].expand_as(images)  # so that nothing is clamped
    brightness, contrast, saturation = 0.6 + 0.8 * torch.rand(3, 256, generator=generator(1))

    def spread(pixels):
        return (pixels - pixels.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1)

    def colour(pixels):
        return (pixels - pixels.mean(1, keepdim=True)).flatten(1).norm(dim=1)

    changed = recolour(dim, generator(1))
    torch.testing.assert_close(changed.mean((1, 2, 3)), dim.mean((1, 2, 3)) * brightness)
    torch.testing.assert_close(colour(changed), colour(dim) * brightness * contrast * saturation)
    changed = recolour(grey, generator(1))
    torch.testing.assert_close(spread(changed), spread(grey) * brightness * contrast)
    assert colour(changed).max() < 1e-5


def test_pasted_images():
    images = torch.rand(512, 2, 12, 8, generator=generator())
    pasted, before = cutmix(images, generator(1)), images.roll(1, 0)
    assert torch.equal(pasted, cutmix(images, generator(1)))
    theirs = pasted == before
    assert torch.equal(theirs[:, 0], theirs[:, 1]) and torch.equal(pasted[~theirs], images[~theirs])
    rows, columns = theirs[:, 0].any(2), theirs[:, 0].any(1)
    assert torch.equal(theirs[:, 0], rows[:, :, None] & columns[:, None])  # a rectangle, without gaps:
    assert all((line.int().diff().abs().sum(1) <= 2).all() for line in (rows, columns))
    shares, (area, y, x) = theirs[:, 0].float().mean((1, 2)), torch.rand(3, 512, generator=generator(1))
    side = area.sqrt()
    assert (shares <= (side + 1 / 12) * (side + 1 / 8)).all()
    whole = (torch.stack([y, x, 1 - y, 1 - x]) > side / 2).all(0)  # no part is outside
    assert whole.sum() > 50 and (shares >= (side - 1 / 12) * (side - 1 / 8))[whole].all()


def test_half_of_strong_images_are_blended_and_half_pasted(monkeypatch):
    images = torch.rand(400, 1, 8, 8, generator=generator())
    monkeypatch.setattr(dataset, "recolour", lambda images, _: images)
    changed = strong(images, generator(1))
    assert torch.equal(changed, strong(images, generator(1)))
    taken = ((changed == images) | (changed == images.roll(1, 0))).flatten(1).all(1)
    assert 170 < taken.sum() < 230  # a blend has pixels of neither


@pytest.mark.parametrize("warmup", [0, 1])
def test_new_batches_are_merged_and_used_at_once(tiny, monkeypatch, warmup):
    used = []
    monkeypatch.setattr(distillation, "augment", lambda x, *_, **__: used.append(x.clone()) or x)
    images = torch.cat([some_images(8), some_images(24, 5)])
    source = FixedImages(images, start=8, batch_size=8, warmup_rounds=warmup)
    teacher, student = tiny(0).freeze(), tiny(1)
    before = agreement(teacher, student, images[8:16])
    result = distill(teacher, student, source, SETTINGS)
    sizes = [8] * warmup + [16, 24, 32] + [32] * (1 - warmup)  # after the last batch nothing new comes
    assert [record["images"] for record in result.history] == sizes
    assert ["fresh" in r for r in result.history] == [size > 8 for size in sizes[:3]] + [warmup == 1]
    if warmup == 0:  # taken before they are learnt
        assert result.history[0]["fresh"] == pytest.approx(before)
    assert torch.equal(result.images, images[8:])
    for number, part in enumerate(images[8:].split(8)):
        first = used[(number + warmup) * SETTINGS.updates]
        assert torch.equal(first.flatten(1).sort(0).values, part.flatten(1).sort(0).values)
    assert len(used) == SETTINGS.rounds * SETTINGS.updates


def test_plain_and_adaptive_are_one_loop_with_one_term_more(tiny):
    """Weight 0 leaves the term out, and a pool made beforehand gives the same student as made on the way."""
    teacher = tiny(0).freeze()
    inverter = Inverter(teacher, objective(), INVERSION)
    pool = synthesize(inverter, torch.arange(50) % 10 % 5, batch_size=10, seed=3).images
    settings = replace(SETTINGS, rounds=5)

    def student(source):
        model = tiny(1)
        result = distill(teacher, model, source, settings)
        return state(model), result.images

    on_the_way, images = student(inversion_source(teacher, start=pool[:10]))
    fixed, same = student(FixedImages(pool, 10, 10))
    adaptive, other = student(inversion_source(teacher, start=pool[:10], competition=5.0))
    assert torch.equal(images, pool[10:]) and torch.equal(images, same) and not torch.equal(images, other)
    assert equal(on_the_way, fixed) and not equal(on_the_way, adaptive)


def test_the_student_that_competes_is_the_one_being_trained(tiny, monkeypatch):
    teacher, rivals, original = tiny(0).freeze(), [], Inverter.__call__

    def spy(self, *arguments, **options):
        result = original(self, *arguments, **options)
        rivals.append(state(self.prepare(10).objective.parts[-1][1].student))
        return result

    monkeypatch.setattr(Inverter, "__call__", spy)
    source, start = inversion_source(teacher, competition=1.0), state(tiny(1))
    after = []
    distill(teacher, tiny(1), source, SETTINGS, watch=lambda _, model: after.append(state(model)) or {})
    assert len(rivals) == 4 and equal(rivals[0], start)
    assert all(equal(rival, student) for rival, student in zip(rivals[1:], after, strict=False))
    assert not any(equal(a, b) for a, b in zip(rivals, rivals[1:], strict=False))


def test_what_watches_is_told_every_round_and_changes_nothing(tiny):
    """Nor do images as floats."""
    teacher, told = tiny(0).freeze(), []
    watched, alone = tiny(1), tiny(1)

    def watch(number, student):
        told.append(student.training)
        return {"number": number}

    history = distill(teacher, watched, some_images().float() / 255, SETTINGS, watch=watch).history
    distill(teacher, alone, some_images(), SETTINGS)
    assert told == [False] * 4 and [record["number"] for record in history] == [1, 2, 3, 4]
    assert equal(state(watched), state(alone))


def test_the_key_of_a_student_follows_its_source(tiny):
    teacher = tiny(0).freeze()
    sources = {kind: make(teacher) for kind, make in SOURCES.items()}
    keys = {kind: files.digest(source) for kind, source in sources.items()}
    assert len(set(keys.values())) == 6
    for kind, source in sources.items():
        distill(teacher, tiny(1), source, replace(SETTINGS, rounds=2))
        assert files.digest(source) == files.digest(SOURCES[kind](teacher)) == keys[kind]  # used or not
    assert files.digest(FixedImages(some_images(40, 6), 10, 10)) != keys["fixed"]
    assert files.digest(inversion_source(tiny(2).freeze())) != keys["inversion"]


def test_seconds_are_those_of_the_rounds_and_the_last_update_counts(tiny, monkeypatch):
    original = torch.Tensor.item

    def waiting(tensor):  # as for a card that is still at work on the update
        time.sleep(0.2)
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "item", waiting)
    teacher = tiny(0).freeze()
    result = distill(teacher, tiny(1), inversion_source(teacher), replace(SETTINGS, rounds=2))
    assert all(record["distillation"] > 0.2 > record["watching"] > 0 for record in result.history)
    assert result.synthesis_seconds == sum(record["synthesis"] for record in result.history) > 0
    assert result.distillation_seconds == sum(record["distillation"] for record in result.history)
    assert result.compile_seconds == 0


@pytest.mark.parametrize("kind", SOURCES)
def test_an_interrupted_distillation_ends_in_the_same_bytes(tiny, memory, kind):
    teacher = tiny(0).freeze()

    def run(student, checkpoint, seed=0):
        return distill(teacher, student, SOURCES[kind](teacher), SETTINGS, seed=seed, checkpoint=checkpoint)

    whole = tiny(1)
    expected = run(whole, memory())
    for fail in (1, 3):
        stopped, resumed = memory(fail), tiny(1)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(1), stopped)
        stopped.fail = None
        result = run(resumed, stopped)
        assert stopped.saves == SETTINGS.rounds  # it went on, and did not begin again
        assert equal(state(whole), state(resumed)) and torch.equal(expected.images, result.images)
        for name in ("round", "images", "loss", "agreement", "fresh"):
            assert [r.get(name) for r in result.history] == [r.get(name) for r in expected.history]
    other = tiny(1)
    run(other, memory(), seed=1)
    assert not equal(state(whole), state(other))


def stage() -> stages.Distilled:
    """A distillation against its own student as a stage: four rounds of five updates."""
    teacher, student = (create_model("resnet_digits", "digits", seed=seed) for seed in (1, 2))
    source = inversion_source(teacher.freeze(), start=some_images()[:, :1], competition=5.0, warmup_rounds=0)
    return stages.distill(teacher, student, source, replace(SETTINGS, augmentation="mixup"))


@pytest.mark.parametrize("number, first", [(0, 2), (1, 1), (2, 4)], ids=["in a round", "in a write", "last"])
def test_a_distillation_killed_goes_on_to_the_same_bytes(killed, apart, monkeypatch, number, first):
    whole = stage()
    (one,) = files.cache_root().glob("student-*/data.safetensors")
    monkeypatch.setenv("DINV_CACHE", str(killed["distillation"][number]))
    rounds, original = [], Inverter.__call__
    monkeypatch.setattr(Inverter, "__call__", lambda *a, **k: rounds.append(1) or original(*a, **k))
    resumed = stage()
    (other,) = files.cache_root().glob("student-*/data.safetensors")
    assert len(rounds) == SETTINGS.rounds - first
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]
    assert one != other
    assert equal(*(files.read_tensors(path)[0] for path in (one, other)))


def test_a_compiled_step_serves_every_student_of_its_kind(tiny):
    teacher = tiny(0).freeze()
    step = DistillStep(teacher, tiny(0))
    compiled = replace(SETTINGS, compile="always")
    for seed in (1, 2):
        fast, plain = tiny(seed), tiny(seed)
        one = distill(teacher, fast, some_images(), compiled, step=step)
        other = distill(teacher, plain, some_images(), SETTINGS)
        for name, value in state(plain).items():
            torch.testing.assert_close(state(fast)[name], value, rtol=1e-3, atol=1e-4)
        assert one.history[-1]["loss"] == pytest.approx(other.history[-1]["loss"], rel=1e-3)
        assert (one.compile_seconds > 0) == (seed == 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rounds": 0}, "rounds=0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine': choose linear, steps"),
        ({"compile": "auto"}, "unknown compile 'auto': choose always, never"),
        ({"augmentation": "weak"}, "unknown augmentation 'weak': choose basic, mixup, strong"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        DistillationSettings(**change)


def test_bad_input(tiny):
    teacher = tiny(0).freeze()

    def refuses(message, source, student=None, **options):
        with pytest.raises(ValueError, match=message):
            distill(teacher, student or tiny(1), source, SETTINGS, **options)

    beyond = torch.linspace(-1, 1, 768).view(4, 3, 8, 8)
    refuses(r"must be uint8, or float in \[0, 1\], got .*, torch.float32", beyond)
    refuses(r"must be uint8, or float in \[0, 1\], got .*, torch.int64", some_images().long())
    refuses("there are no images to learn from", some_images(0))
    refuses("there are no images to learn from", inversion_source(teacher, warmup_rounds=1))
    refuses(r"takes images of shape \(N, 3, 8, 8\), got \(4, 3, 6, 6\)", some_images(4)[..., :6, :6])
    refuses("the same classes: tiny has 4, tiny has 5", some_images(), tiny(1, classes=4))
    step = DistillStep(teacher, tiny(1), temperature=1.0, compile="never")
    refuses(r"a step of temperature and precision \(1.0, '\w+'\) for \(3.0, ", some_images(), step=step)


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(FloatingPointError, match=r"is not finite: lower lr=1e\+30"):
        distill(tiny(0).freeze(), tiny(1), some_images(), replace(SETTINGS, lr=1e30))
