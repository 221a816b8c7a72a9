"""Table 1's rows: what they have in common, where they differ, and that they need no data."""

import dataclasses
import json

import pytest
import torch

from dinv import chapters, reference, rows
from dinv.distillation import Later, PixelSource, ReadySource
from dinv.generator import GeneratorSource
from dinv.models import create_model
from dinv.profiles import PAPER, Training, load_profile
from dinv.step import forward_flops

PAIR = "resnet_digits->vgg_digits"
SHORT = {
    "distillation.stages": ((3, 8),), "inversion.batch": 20, "distillation.first": 40,
    "distillation.rounds": 3,
    "distillation.updates": 2, "distillation.batch": 20, "generator.rounds": 3, "generator.updates": 2,
    "generator.images": 20, "generator.steps": 2, "generator.warmup": 1, "generator.every": 1,
}  # fmt: skip


@pytest.fixture
def run(short_run):
    return short_run("04_knowledge_distillation", SHORT)


def test_a_rows_objective_is_a_sum_that_grows(run):
    names = {
        row: rows.objective(run.profile, row).names for row in ("deepdream", "deepinversion", "generator")
    }
    assert names["deepdream"] == ("cross-entropy", "total variation", "l2 norm")
    assert names["deepinversion"] == names["generator"] == (*names["deepdream"], "feature statistics")


def test_every_row_has_the_same_number_of_images(run):
    teacher, architecture = chapters.pair(run, PAIR)
    assert architecture == "vgg_digits" and rows.image_count(run.profile) == 80
    kinds = {"noise": ReadySource, "deepdream": ReadySource, "deepinversion": ReadySource, "adi": PixelSource}
    for row, kind in kinds.items():
        images, source, seconds = rows.images_of(run, row, teacher, 0)
        assert isinstance(source, Later) and isinstance(source.source, kind)
        assert images.shape == (40, 1, 8, 8) and images.dtype == torch.uint8
        assert (seconds > 0) == (row != "noise")
        if kind is ReadySource:
            assert sum(len(part) for part in source.source.parts) == 40
    images, source, seconds = rows.images_of(run, "generator", teacher, 0)
    assert len(images) == 0 and isinstance(source, GeneratorSource) and seconds == 0


def test_the_work_of_a_row_is_counted_by_hand(run):
    teacher, student = (create_model(name, "digits").freeze() for name in ("resnet_digits", "vgg_digits"))
    one, two = forward_flops(teacher), forward_flops(student)
    updates = 3 * 2 * 20 * (one + 3 * two)  # rounds, updates, batch
    assert one != two
    assert rows.work(run.profile, "noise", teacher, student) == (0, updates)
    assert rows.work(run.profile, "deepinversion", teacher, student) == (80 * 3 * 2 * one, updates)
    adaptive = 80 * 3 * 2 * one + 40 * 3 * 2 * two  # the student looks at the images of the rounds alone
    assert rows.work(run.profile, "adi", teacher, student) == (adaptive, updates)


def test_adaptive_begins_with_the_images_of_deepinversion_and_goes_on_with_its_seeds(run):
    teacher, _ = chapters.pair(run, PAIR)
    plain, ready, _ = rows.images_of(run, "deepinversion", teacher, 0)
    adaptive, source, _ = rows.images_of(run, "adi", teacher, 0)
    assert torch.equal(plain, adaptive)
    source.source.competition = 0.0  # without the term it makes the very batches of the other row
    student, _ = chapters.pair(run, PAIR)
    assert source(0, student) is ready(0, student) is None
    for number in (1, 2):
        assert torch.equal(source(number, student), ready(number, student))


@pytest.mark.parametrize("row", rows.DATA_FREE)
def test_a_data_free_row_needs_no_training_image(run, monkeypatch, row):
    original = rows.load_dataset

    def only_tests(name, split, *more):
        assert split == "test", "a data-free row asked for training images"
        return original(name, split, *more)

    monkeypatch.setattr("dinv.rows.load_dataset", only_tests)
    monkeypatch.setattr("dinv.chapters.load_dataset", only_tests)
    cell = rows.distilled(run, row, PAIR)
    made = 60 if row == "generator" else 40  # else the first of three rounds has the first images alone
    assert len(cell.history) == 3 and len(cell.made) == made and 0 <= cell.accuracy <= 100
    assert 0 <= cell.before <= cell.synthesis and cell.distillation > 0
    assert cell.total > cell.synthesis - cell.before
    assert all("real" in record for record in cell.history)


@pytest.mark.parametrize("row, count", [("1 % real", 10), ("all real", 1437)])
def test_the_ceilings_learn_from_real_images(run, row, count):
    images = rows.real_images(run, row, 0)
    assert len(images) == count and images.dtype == torch.uint8
    cell = rows.distilled(run, row, PAIR)
    assert cell.synthesis < 0.01 and len(cell.made) == 0


def test_rows_begin_with_the_same_weights_and_are_found_again(run):
    one, again = (rows.distilled(run, "noise", PAIR) for _ in range(2))
    other = rows.distilled(run, "noise", PAIR, seed=1)
    assert chapters.digest(one.student) == chapters.digest(again.student) != chapters.digest(other.student)
    assert one.history == again.history


@pytest.mark.parametrize("row, part", [("noise", "distillation"), ("generator", "generator")])
def test_a_student_that_is_watched_at_other_rounds_is_another_stage(run, row, part):
    def rounds(every):
        changed = dataclasses.replace(getattr(run.profile, part), every=every)
        run.profile = dataclasses.replace(run.profile, **{part: changed})
        return [record["round"] for record in rows.distilled(run, row, PAIR).history if "real" in record]

    assert rounds(1) == [1, 2, 3] and rounds(2) == [2] and rounds(3) == [3]


def test_a_student_nobody_watches_has_the_key_it_always_had(run):
    teacher, architecture = chapters.pair(run, PAIR)
    images = rows.noise(teacher, 20, 0)
    _, result = chapters.student(run, "x", teacher, architecture, images)
    config = json.loads((result.path / "meta.json").read_text())["config"]
    assert set(config) == {"student", "dataset", "seed", "settings", "images", "source"}


def test_a_pair_names_a_teacher_of_the_profile(run):
    with pytest.raises(
        ValueError, match="must read TEACHER->STUDENT, the teacher one of vgg_digits, resnet_digits"
    ):
        chapters.pair(run, "resnet->vgg_digits")
    with pytest.raises(ValueError, match="must read TEACHER->STUDENT"):
        chapters.pair(run, "resnet_digits")


# ---- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu", "paper"])
def test_every_profile_makes_valid_settings(name):
    profile = load_profile(name)
    found = chapters.distillation_settings(profile)
    assert (found.rounds, found.updates) == (profile.distillation.rounds, profile.distillation.updates)
    assert found.compile == ("never" if name == "smoke" else "always")
    assert chapters.generator_settings(profile).steps == profile.generator.steps
    for pair in profile.distillation.pairs:
        assert pair.partition("->")[0] in (profile.teacher, profile.judge)
    assert profile.distillation.first % profile.inversion.batch == 0


def test_the_paper_profile_holds_the_papers_numbers():
    d = PAPER.distillation
    assert (d.batch, d.rate, d.temperature, d.competition, d.schedule) == (256, 0.1, 3.0, 10.0, "steps")
    assert d.rounds * d.updates == 250 * 195 and d.updates == 50
    assert rows.image_count(PAPER) == 1000 * 256
    assert set(d.pairs) == set(reference.PAIRS)


def test_references_carry_their_marks():
    assert reference.table1("adi", "cifar_resnet34->cifar_resnet18") == {"paper": 93.26, "paper_mark": "V"}
    assert reference.table1("generator", "cifar_vgg11->cifar_vgg11") == {}
    assert reference.table1("adi", "resnet_small->resnet_tiny") == reference.table1("all real", "x") == {}
    marks = [entry[1] for row in reference.TABLE1.values() for entry in row if entry]
    assert set(marks) <= set("VSM") and all(len(row) == 3 for row in reference.TABLE1.values())


def test_a_generated_pool_is_a_stage(run):
    teacher, _ = chapters.pair(run, PAIR)

    def source():
        settings = chapters.generator_settings(run.profile)
        return GeneratorSource(teacher, rows.objective(run.profile, "generator"), settings, batch=20)

    pool, result = chapters.generated(run, "g", source(), 3)
    again, cached = chapters.generated(run, "g", source(), 3)
    assert pool.images.shape == (60, 1, 8, 8) and torch.equal(pool.images, again.images)
    assert not result.cached and cached.cached and len(result.meta["seconds"]) == 3
    assert torch.equal(pool.labels, torch.arange(20).repeat(3) % 10)


def test_training_settings_stay_out_of_a_students(run):
    run.profile = dataclasses.replace(run.profile, teacher_training=Training(1, 64, 9.9, 5e-4, 0, 1, False))
    assert chapters.distillation_settings(run.profile).rate == run.profile.distillation.rate
