"""Distillation: its loss, its loop, resumption to the same bytes, and what it refuses."""

import copy
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinv import distillation, store
from dinv.distillation import (
    DistillationSettings,
    Later,
    PixelSource,
    ReadySource,
    distill,
    distillation_loss,
    mixed,
    seconds,
)
from dinv.generator import GeneratorSettings, GeneratorSource
from dinv.inversion import InversionSettings
from dinv.metrics import agreement
from dinv.models import create_model
from dinv.objectives import CrossEntropy, FeatureStatistics
from dinv.pool import synthesize
from dinv.profiles import load_profile
from dinv.runs import Result, Run
from dinv.store import canonical_json

SETTINGS = DistillationSettings(rounds=4, updates=5, batch=8, rate=0.05, pad=1, compile="never")
INVERSION = InversionSettings(steps=4, rate=0.1, flip=False, compile="never")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=16, seed=0):
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator(seed))


def objective():
    return CrossEntropy() + 1.0 * FeatureStatistics()


def pixel_source(teacher, **options):
    return PixelSource(teacher, objective(), INVERSION, batch=10, seed=3, **options)


def generator_source(teacher, **options):
    settings = GeneratorSettings(steps=2, latent=6, width=4, jitter=1, compile="never")
    return GeneratorSource(teacher, objective(), settings, batch=10, seed=3, **options)


SOURCES = {
    "none": lambda teacher: None,
    "ready": lambda teacher: ReadySource(some_images(40, 5), 10),
    "pixels": pixel_source,
    "pixels in competition": lambda teacher: pixel_source(teacher, competition=5.0),
    "pixels in competition, later": lambda teacher: Later(pixel_source(teacher, competition=5.0), 1),
    "generator in competition": lambda teacher: generator_source(teacher, competition=5.0, warmup=2),
}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
def test_loss_against_numpy(temperature):
    student, teacher = (4 * torch.randn(5, 7, generator=generator(s)) for s in (1, 2))

    def softened(z):
        e = np.exp(z.double().numpy() / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = softened(teacher), softened(student)
    wanted = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(wanted, rel=1e-5)


def test_loss_is_zero_for_the_teachers_own_answers_whatever_is_added_to_them():
    logits = torch.randn(5, 7, generator=generator())
    assert distillation_loss(logits + 3, logits, 3.0).item() == pytest.approx(0, abs=1e-6)


# ---- the loop --------------------------------------------------------------------------------------


def test_a_student_comes_to_agree_with_its_teacher(tiny):
    teacher, student = tiny(0).freeze(), tiny(1)
    images = some_images(64)[..., :2, :2].repeat_interleave(4, 2).repeat_interleave(4, 3)  # of plain squares
    before = agreement(teacher, student, images)
    settings = DistillationSettings(10, updates=40, batch=32, pad=0, flip=False, compile="never")
    history = distill(teacher, student, images, settings, generator()).history
    assert agreement(teacher, student, images) > max(85, before + 20)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert history[-1]["agreement"] > history[0]["agreement"]
    assert not student.training and [record["round"] for record in history] == list(range(1, 11))


def test_the_teacher_is_left_as_it_was(tiny, portrait):
    teacher = tiny(0).freeze()
    before = portrait(teacher)
    distill(
        teacher, tiny(1), some_images(), SETTINGS, generator(), source=pixel_source(teacher, competition=1.0)
    )
    assert portrait(teacher) == before


def test_blends_of_two_images():
    images = torch.rand(64, 3, 4, 4, generator=generator())
    blends = mixed(images, generator(1))
    again, other = mixed(images, generator(1)), mixed(images, generator(2))
    assert torch.equal(blends, again) and not torch.equal(blends, other)
    before = images.roll(1, 0)
    shares = (blends - images).flatten(1).norm(dim=1) / (before - images).flatten(1).norm(dim=1)
    assert 0 <= shares.min() < 0.1 and 0.9 < shares.max() <= 1
    assert len(shares.unique()) == len(images)  # one for every image, and for all its pixels:
    one = shares.view(-1, 1, 1, 1)
    torch.testing.assert_close(blends, images * (1 - one) + before * one)


def test_blends_are_made_of_what_a_lesson_has_drawn(tiny, monkeypatch):
    teacher, settings, seen = tiny(0).freeze(), replace(SETTINGS, mix=True), []
    monkeypatch.setattr("dinv.distillation.mixed", lambda images, _: seen.append(images.clone()) or images)
    plain, blended = tiny(1), tiny(1)
    distill(teacher, plain, some_images(), SETTINGS, generator())
    assert not seen
    distill(teacher, blended, some_images(), settings, generator())
    assert len(seen) == settings.rounds * settings.updates and equal(state(plain), state(blended))
    assert seen[0].dtype == torch.float32 and seen[0].min() >= 0 and seen[0].max() <= 1


def test_new_batches_are_merged_and_used_at_once(tiny, monkeypatch):
    teacher = tiny(0).freeze()
    seen = []

    def spy(images, generator, pad, flip):
        seen.append(images.clone())
        return images

    monkeypatch.setattr("dinv.distillation.augment", spy)
    ready = some_images(32, 5)
    found = distill(teacher, tiny(1), some_images(8), SETTINGS, generator(), source=ReadySource(ready, 8))
    assert [record["images"] for record in found.history] == [16, 24, 32, 40]
    assert torch.equal(found.images, ready)
    for number, part in enumerate(ready.split(8)):
        first = seen[number * SETTINGS.updates]
        assert torch.equal(first.flatten(1).sort(0).values, part.flatten(1).sort(0).values)
    assert len(seen) == SETTINGS.rounds * SETTINGS.updates


def test_a_source_may_begin_later(tiny):
    ready = some_images(24, 5)
    source = Later(ReadySource(ready, 8), 1)
    found = distill(tiny(0).freeze(), tiny(1), some_images(8), SETTINGS, generator(), source=source)
    assert [record["images"] for record in found.history] == [8, 16, 24, 32]
    assert ["fresh" in record for record in found.history] == [False, True, True, True]
    assert torch.equal(found.images, ready)
    assert source.config() == ReadySource(ready, 8).config() | {"after": 1}


def test_a_fixed_pool_stays_as_it_is(tiny):
    found = distill(tiny(0).freeze(), tiny(1), some_images(12), SETTINGS, generator())
    assert [record["images"] for record in found.history] == [12] * 4 and len(found.images) == 0


def test_plain_and_adaptive_are_one_loop_with_one_term_more(tiny):
    """Weight 0 leaves the term out, and a pool made beforehand gives the same student as made on the way."""
    teacher = tiny(0).freeze()
    pool = synthesize(teacher, torch.arange(50) % 10 % 5, objective(), INVERSION, batch=10, seed=3).images
    first, rest = pool[:10], pool[10:]

    def student(source):
        model = tiny(1)
        found = distill(teacher, model, first, SETTINGS, generator(), source=source)
        return state(model), found.images

    on_the_way, images = student(pixel_source(teacher, first=1))
    ready, same = student(ReadySource(rest, 10))
    adaptive, other = student(pixel_source(teacher, first=1, competition=5.0))
    assert torch.equal(images, rest) and torch.equal(images, same) and not torch.equal(images, other)
    assert equal(on_the_way, ready) and not equal(on_the_way, adaptive)


def test_the_student_that_competes_is_the_one_being_trained(tiny, monkeypatch):
    teacher, competed = tiny(0).freeze(), []
    original = PixelSource.__call__

    def spy(self, number, student):
        assert not student.training
        competed.append(state(student))
        return original(self, number, student)

    monkeypatch.setattr(PixelSource, "__call__", spy)
    student = tiny(1)
    start = state(student)
    source = pixel_source(teacher, competition=1.0)
    distill(teacher, student, some_images(), SETTINGS, generator(), source=source)
    assert equal(competed[0], start)
    assert not any(equal(a, b) for a, b in zip(competed, competed[1:], strict=False))


def test_what_watches_is_told_every_round_and_changes_nothing(tiny):
    teacher, told = tiny(0).freeze(), []

    def watch(number, student):
        told.append(student.training)
        return {"number": number}

    watched, alone = tiny(1), tiny(1)
    found = distill(teacher, watched, some_images(), SETTINGS, generator(), watch=watch)
    distill(teacher, alone, some_images(), SETTINGS, generator())
    assert told == [False] * 4 and [record["number"] for record in found.history] == [1, 2, 3, 4]
    assert equal(state(watched), state(alone))


def test_agreement_on_fresh_images_is_taken_before_they_are_learnt(tiny):
    teacher, student = tiny(0).freeze(), tiny(1)
    images = some_images(32, 5)
    wanted = agreement(teacher, student, images[:8])
    found = distill(teacher, student, some_images(), SETTINGS, generator(), source=ReadySource(images, 8))
    assert found.history[0]["fresh"] == pytest.approx(wanted)
    assert "fresh" not in distill(teacher, student, images, SETTINGS, generator()).history[0]


def test_a_students_key_follows_its_source(tiny):
    teacher = tiny(0).freeze()
    configs = [make(teacher).config() for kind, make in SOURCES.items() if kind != "none"]
    assert len({canonical_json(config) for config in configs}) == len(configs) == 5
    assert ReadySource(some_images(40, 5)).config() != ReadySource(some_images(40, 6)).config()
    assert pixel_source(teacher).config() == pixel_source(teacher).config()


def test_seconds_are_those_of_the_rounds(tiny):
    teacher = tiny(0).freeze()
    found = distill(teacher, tiny(1), some_images(), SETTINGS, generator(), source=pixel_source(teacher))
    for what in ("synthesis", "distillation", "watching"):
        assert seconds(found.history, what) == sum(record[what] for record in found.history) > 0


def test_the_last_update_counts_as_distillation_and_not_as_watching(tiny, monkeypatch):
    original = torch.Tensor.item

    def waiting(tensor):  # as for a card that is still at work on the update
        time.sleep(0.2)
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "item", waiting)
    settings = replace(SETTINGS, rounds=1)
    (record,) = distill(tiny(0).freeze(), tiny(1), some_images(), settings, generator()).history
    assert record["distillation"] > 0.2 and record["watching"] < 0.2


@pytest.mark.parametrize("kind", SOURCES)
def test_equal_seeds_equal_students(tiny, kind):
    def student(seed):
        teacher, model = tiny(0).freeze(), tiny(1)
        distill(teacher, model, some_images(), SETTINGS, generator(seed), source=SOURCES[kind](teacher))
        return state(model)

    assert equal(student(0), student(0)) and not equal(student(0), student(1))


@pytest.mark.parametrize("fail", [1, 3])
@pytest.mark.parametrize("kind", SOURCES)
def test_an_interrupted_distillation_ends_in_the_same_bytes(tiny, memory, monkeypatch, kind, fail):
    monkeypatch.setattr("dinv.store.Sparingly.share", float("inf"))  # a save after every round
    teacher = tiny(0).freeze()

    def run(student, checkpoint):
        source = SOURCES[kind](teacher)
        return distill(
            teacher, student, some_images(), SETTINGS, generator(), source=source, checkpoint=checkpoint
        )

    whole, halves = tiny(1), tiny(1)
    expected = run(whole, memory())
    stopped = memory(fail=fail)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(1), stopped)
    stopped.fail = None
    found = run(halves, stopped)
    assert stopped.saves == SETTINGS.rounds  # it went on, and did not begin again
    assert equal(state(whole), state(halves)) and torch.equal(expected.images, found.images)
    drop = ("synthesis", "distillation", "watching")
    for one, other in zip(expected.history, found.history, strict=True):
        assert {k: v for k, v in one.items() if k not in drop} == {
            k: v for k, v in other.items() if k not in drop
        }


def stage() -> Result:
    """A distillation against its own student as a stage: four rounds of five updates."""
    store.Sparingly.share = float("inf")  # a save after every round
    teacher = create_model("resnet_digits", "digits", seed=1).freeze()

    def make(checkpoint):
        student = create_model("resnet_digits", "digits", seed=2)
        source = pixel_source(teacher, competition=5.0)
        first = some_images(16)[:, : teacher.channels]
        found = distill(
            teacher, student, first, replace(SETTINGS, mix=True), generator(), source=source,
            checkpoint=checkpoint,
        )  # fmt: skip
        return student.state_dict() | {"made": found.images}, {"losses": [r["loss"] for r in found.history]}

    return Run("02_example", load_profile("smoke")).stage("student", "x", {}, make)


@pytest.mark.parametrize(
    "number, first", [(0, 2), (1, 1), (2, 4)], ids=["in a round", "in a write", "before the last write"]
)
def test_a_distillation_killed_by_sigkill_goes_on_to_the_same_bytes(
    killed, apart, monkeypatch, number, first
):
    monkeypatch.setattr(store.Sparingly, "share", store.Sparingly.share)  # the stage's own, given back
    whole = stage()
    monkeypatch.setenv("DINV_CACHE", str(killed["distillation"][number]))
    rounds, original = [], distillation.invert

    def counted(*given, **options):
        rounds.append(1)
        return original(*given, **options)

    monkeypatch.setattr(distillation, "invert", counted)
    resumed = stage()
    assert not resumed.cached and len(rounds) == SETTINGS.rounds - first
    assert resumed.key == whole.key == store.sha256_file(resumed.path / "data.safetensors")
    assert resumed.meta == whole.meta and equal(resumed.tensors, whole.tensors)


def test_a_compiled_lesson_serves_every_student_of_its_kind(tiny):
    teacher = tiny(0).freeze()
    compiled = DistillationSettings(**{**vars(SETTINGS), "compile": "always"})
    for seed in (1, 2):
        fast, plain = tiny(seed), tiny(seed)
        one = distill(teacher, fast, some_images(), compiled, generator())
        other = distill(teacher, plain, some_images(), SETTINGS, generator())
        for name, value in state(plain).items():
            torch.testing.assert_close(state(fast)[name], value, rtol=1e-3, atol=1e-4)
        assert one.history[-1]["loss"] == pytest.approx(other.history[-1]["loss"], rel=1e-3)
    from dinv import distillation

    assert len(distillation._lessons[teacher]) == 1


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rounds": 0}, "rounds=0 of a distillation must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine': choose linear, steps"),
        ({"compile": "auto"}, "unknown compile 'auto': choose always, never"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        DistillationSettings(**change)


def test_bad_input(tiny):
    teacher, student = tiny(0).freeze(), tiny(1)

    def attempt(images, student=student, source=None):
        distill(teacher, student, images, SETTINGS, generator(), source=source)

    with pytest.raises(ValueError, match="must be uint8, got torch.float32: see dinv.pool.to_uint8"):
        attempt(torch.rand(4, 3, 8, 8))
    with pytest.raises(ValueError, match="an empty pool and no source"):
        attempt(some_images(0))
    with pytest.raises(ValueError, match=r"takes images of shape \(N, 3, 8, 8\), got \(4, 3, 6, 6\)"):
        attempt(some_images(4)[..., :6, :6])
    with pytest.raises(ValueError, match="tiny has 8 px and 5 classes, tiny 8 px and 4"):
        attempt(some_images(), student=tiny(1, classes=4))
    with pytest.raises(ValueError, match="there is no batch 2: only 2 lie ready"):
        attempt(some_images(), source=ReadySource(some_images(16), 8))


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    teacher = tiny(0).freeze()
    wild = DistillationSettings(**{**vars(SETTINGS), "rate": 1e30})
    with pytest.raises(FloatingPointError, match="lower rate=1e\\+30"):
        distill(teacher, copy.deepcopy(tiny(1)), some_images(), wild, generator())
