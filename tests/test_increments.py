"""Table 7's rows: scenarios, what each row may see, that data-free rows need no old image."""

import dataclasses

import pytest
import torch

from dinv import chapters, continual, increments, load_profile
from dinv.datasets import DATASETS
from dinv.metrics import accuracy
from dinv.models import load_model

SHORT = {
    "distillation.stages": ((3, 8),), "inversion.batch": 20, "continual.images": 40, "continual.updates": 3,
    "continual.batch": 20, "continual.epochs": 1,
}  # fmt: skip


@pytest.fixture
def run(short_run):
    return short_run("06_continual_learning", SHORT)


def scene(run):
    old = chapters.network(run, "teacher")
    data = increments.scenario(run, (10,))
    return old, data, accuracy(old, data["old test"].images, data["old test"].labels)


def test_the_steps_of_a_split(run):
    counts = (6, 2, 2)
    names = [increments.scenario(run, counts, number)["new train"].classes for number in range(3)]
    assert names[:2] == [("6", "7"), ("8", "9")] and names[2][0] == "negative 0" and len(names[2]) == 10
    old = [increments.scenario(run, counts, number)["old test"].classes for number in range(3)]
    assert [len(classes) for classes in old] == [6, 8, 10]
    part = increments.scenario(run, counts, 1)["new train"]
    assert part.labels.unique().tolist() == [0, 1]


def test_a_teacher_of_some_classes(run):
    model, result = increments.trained_on_part(run, 4)
    assert model.classes == ("0", "1", "2", "3") and not model.training
    assert increments.trained_on_part(run, 4)[1].cached and result.meta["history"]
    assert chapters.digest(increments.teacher_of_part(run, 4)) == chapters.digest(model)  # none is shipped


def test_a_teacher_of_some_classes_is_the_shipped_one(run):
    run.profile = load_profile("cpu")
    for counts in run.profile.continual.splits:
        model = increments.teacher_of_part(run, counts[0])
        known = load_model(increments.name_of_part(run, counts[0]))
        assert model.classes == DATASETS["cifar10"][: counts[0]] and not model.training
        assert chapters.digest(model) == chapters.digest(known)


@pytest.mark.parametrize("row", (*increments.BARE, *increments.DATA_FREE, increments.REMEDY))
def test_a_row_without_old_data_does_not_touch_them(run, monkeypatch, row):
    old, data, before = scene(run)
    del data["old train"]  # a row that asked for it would raise
    original = chapters.load_dataset

    def raises(name, split, *more):
        assert split == "test", "the old training images are gone"
        return original(name, split, *more)

    for module in ("chapters", "increments", "rows"):
        monkeypatch.setattr(f"dinv.{module}.load_dataset", raises)
    done = increments.step(run, row, old, data, 0, before)
    assert done.network.classes == (*old.classes, *data["new train"].classes)
    assert 0 <= done.mixture.mean <= 100 and done.seconds > 0
    assert done.forgotten == pytest.approx(before - done.mixture.old)


@pytest.mark.parametrize("row", increments.ORACLES)
def test_an_oracle_asks_for_the_old_images(run, row):
    old, data, before = scene(run)
    assert increments.step(run, row, old, data, 0, before).history
    del data["old train"]
    with pytest.raises(KeyError, match="old train"):
        increments.step(run, row, old, data, 0, before)


def test_rows_differ_by_their_terms(run):
    settings = {row: increments.settings_of(run, row) for row in (*increments.ROWS, increments.REMEDY)}
    assert [row for row, chosen in settings.items() if not chosen.keep] == [
        "fine-tuning", "oracle classification",
    ]  # fmt: skip
    assert [row for row, chosen in settings.items() if chosen.local] == [increments.REMEDY]


def test_adaptive_images_begin_with_the_plain_ones(run):
    old, data, before = scene(run)
    plain, _ = increments.inverted(run, old, 0)
    network = increments.step(run, "deepinversion", old, data, 0, before).network
    images, seconds = increments.adaptive(run, old, network, plain, 0)
    assert images.shape == plain.shape and seconds > 0
    assert torch.equal(images[:20], plain[:20]) and not torch.equal(images[20:], plain[20:])


def test_a_sequence_extends_what_the_last_step_left(run):
    done = increments.sequence(run, "lwf.mc", (6, 2, 2), 0)
    assert [len(one.network.classes) for one in done] == [8, 10, 20]
    for number in (1, 2):
        old = increments.scenario(run, (6, 2, 2), number)["old test"]
        before = accuracy(done[number - 1].network, old.images, old.labels)
        assert done[number].forgotten == pytest.approx(before - done[number].mixture.old, abs=1e-3)
    again = increments.sequence(run, "lwf.mc", (6, 2, 2), 0)
    assert chapters.digest(again[-1].network) == chapters.digest(done[-1].network)


def test_an_unknown_domain(run):
    run.profile = dataclasses.replace(
        run.profile, continual=dataclasses.replace(run.profile.continual, domain="birds")
    )
    with pytest.raises(ValueError, match="unknown domain 'birds': choose mnist or negative digits"):
        increments.new_domain(run, "test")


def test_equal_seeds_equal_networks(run):
    old, data, before = scene(run)
    first = increments.step(run, "lwf.mc", old, data, 0, before)
    other = increments.step(run, "lwf.mc", old, data, 1, before)
    assert chapters.digest(first.network) != chapters.digest(other.network)
    assert continual.old_part(first.network, 10).classes == old.classes
