"""The methods as cached stages: what their keys hold, in place and frozen, and that images need no data."""

import dataclasses

import pytest
import torch

from dinv import CrossEntropy, FeatureStatistics, training
from dinv.continual import ContinualSettings, extend, renumbered
from dinv.data import load_dataset
from dinv.distillation import DistillationSettings, FixedImages, InversionSource
from dinv.experiments import stages
from dinv.experiments.notebook import settings_table, show, source, start
from dinv.experiments.profiles import load_profile
from dinv.figures import curve
from dinv.files import digest
from dinv.inversion import InversionSettings, Inverter, balanced_labels

SHORT = InversionSettings(steps=3, jitter=0, compile="never")
UPDATES = DistillationSettings(rounds=2, updates=2, batch_size=8, pad=1, compile="never")
OBJECTIVE = CrossEntropy() + 0.1 * FeatureStatistics()


@pytest.fixture
def profile(short_profile):
    return short_profile({"retrain": True, "teacher_training.epochs": 1, "verifier_training.epochs": 1})


@pytest.fixture
def teacher(short_profile):
    return stages.network(short_profile(), "teacher")


@pytest.fixture
def cached(ledger):
    """`cached()`: whether the newest stage was found."""
    return lambda: ledger[-1]["cached"]


def test_a_network_is_the_shipped_one_unless_retrained(profile, ledger):
    shipped = stages.network(dataclasses.replace(profile, retrain=False), "teacher")
    assert shipped.name == "resnet_digits" and not ledger
    model, history = stages.trained(profile, "teacher")
    again = stages.network(profile, "teacher")
    assert [entry["cached"] for entry in ledger] == [False, True] and len(history) == 1
    assert digest(model) == digest(again) != digest(shipped)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_a_pool_depends_on_teacher_objective_settings_labels_and_seed_and_on_nothing_else(teacher, cached):
    def pool(objective=OBJECTIVE, settings=SHORT, labels=16, teacher=teacher, **options):
        inverter = Inverter(teacher, objective, settings)
        stages.synthesize(inverter, balanced_labels(labels, 10), **{"batch_size": 8} | options)
        return cached()

    assert not pool() and pool()
    assert not pool(seed=1) and not pool(batch_size=16) and not pool(labels=8) and not pool(snapshots=(0,))
    assert not pool(objective=CrossEntropy() + 0.2 * FeatureStatistics())
    assert not pool(settings=dataclasses.replace(SHORT, steps=4))
    with torch.no_grad():
        next(teacher.parameters()).mul_(1.01)
    assert not pool()


def test_pools_of_two_objectives_start_from_the_same_noise(teacher):
    pools = [
        stages.synthesize(Inverter(teacher, objective, SHORT), torch.arange(10), snapshots=(0,))
        for objective in (CrossEntropy(), OBJECTIVE)
    ]
    assert torch.equal(pools[0].snapshots, pools[1].snapshots)
    assert not torch.equal(pools[0].images, pools[1].images)


def test_images_and_students_reach_no_dataset(teacher, profile, monkeypatch):
    def no_data(*arguments, **options):
        raise AssertionError("a data-free stage asked for data")

    for module in ("experiments.stages", "data", "data.dataset"):
        monkeypatch.setattr(f"dinv.{module}.load_dataset", no_data)
    inverter = Inverter(teacher, OBJECTIVE, SHORT)
    pool = stages.synthesize(inverter, torch.arange(10))
    assert len(pool) == 10 and pool.seconds > 0
    student = stages.fresh_student(profile, "resnet_digits", 0)
    images = InversionSource(teacher, OBJECTIVE, SHORT, start=pool.images, batch_size=10, competition=0.1)
    stages.distill(teacher, student, images, UPDATES)
    with pytest.raises(AssertionError, match="asked for data"):  # the guard is a guard
        stages.trained(profile, "verifier")


def test_a_source_alone_makes_a_pool(teacher, cached):
    pools = []
    for _ in range(2):
        images = InversionSource(teacher, OBJECTIVE, SHORT, batch_size=10)
        pools.append(stages.synthesize_from(images, 2))
    assert cached() and torch.equal(pools[0].images, pools[1].images)
    assert pools[1].labels.tolist() == 2 * list(range(10))


def test_a_student_is_distilled_in_place_and_its_curve_never_goes_stale(teacher, profile, cached):
    data, images = load_dataset("digits", "test"), torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8)

    def distilled(**options):
        student = stages.fresh_student(profile, "resnet_digits", 0)
        result = stages.distill(teacher, student, FixedImages(images), UPDATES, **options)
        assert not student.training and not any(p.requires_grad for p in student.parameters())
        assert result.seconds >= result.distillation_seconds > 0
        return ["real" in record for record in result.history], digest(student)

    plain = distilled(eval_data=data)
    assert plain[0] == [True, True] and not cached()
    assert distilled(eval_data=data) == plain and cached()
    assert distilled(eval_data=data, eval_every=2) == ([False, True], plain[1])  # the same student
    assert not cached() and distilled(seed=1)[1] != plain[1]


def test_a_pair_names_a_teacher_and_a_student(short_profile, monkeypatch):
    teacher, student = stages.networks_of(short_profile(), "vgg_digits->resnet_digits")
    assert (teacher.name, student) == ("vgg_digits", "resnet_digits")
    asked = []
    monkeypatch.setattr(stages, "network", lambda profile, role: asked.append((profile.teacher, role)))
    assert stages.networks_of(short_profile(), "resnet_tiny->vgg_digits")[1] == "vgg_digits"
    assert asked == [("resnet_tiny", "teacher")]  # neither of the profile's: trained as its teacher is
    for pair in ("resnet_digits->resnet", "resnet_digits"):
        with pytest.raises(ValueError, match="must read TEACHER->STUDENT, .* resnet_digits, vgg_digits"):
            stages.networks_of(short_profile(), pair)


def test_new_classes_are_learnt_in_place(teacher, cached):
    data = load_dataset("digits", "test")
    data = dataclasses.replace(data, classes=tuple(f"new {name}" for name in data.classes))
    records = []
    for _ in range(2):
        network = extend(teacher, data.classes, seed=0)
        settings = ContinualSettings(updates=2, batch_size=20, pad=1, flip=False)
        records.append(stages.learn(teacher, network, renumbered(data, network), settings))
        assert not network.training
    assert cached() and records[0] == records[1]


def test_accuracies_are_kept_by_network_and_data(teacher, cached):
    data = load_dataset("digits", "test")
    whole = stages.accuracy(teacher, data)
    assert whole == training.accuracy(teacher, data.images, data.labels) and not cached()
    assert stages.accuracy(teacher, data) == whole and cached()
    stages.accuracy(teacher, data.take(slice(20)))
    assert not cached()
    both = [stages.joint_accuracy(teacher, data, data, 5) for _ in range(2)]
    assert both[0] == both[1] and both[0].old == whole and cached()
    with torch.no_grad():
        next(teacher.parameters()).mul_(-1)
    assert stages.accuracy(teacher, data) != whole and not cached()


def test_stage_seeds_differ_by_name_and_by_seed():
    assert len({stages.stage_seed(seed, name) for seed in range(3) for name in ("a", "b")}) == 6


def test_a_notebook_shows_profile_settings_figures_and_source(apart, capsys):
    several = start("x", "smoke", seeds=5, overrides={"inversion.steps": 7}).profile
    assert several.seeds == several.distillation.seeds == 5 and several.inversion.steps == 7
    assert capsys.readouterr().out.startswith("profile smoke on ")
    table = settings_table(load_profile("cpu"), "inversion", "seeds")
    assert list(table.columns) == ["cpu profile", "the paper", "profile paper where the paper is silent"]
    assert list(table.loc["inversion.steps"]) == ["80", "2000 [V]", ""]
    assert table.index[0] == "seeds" and all(name.startswith("inversion.") for name in table.index[1:])
    run = start("x", "smoke")
    image = show(run, "name", curve([1, 2], {"a": [3, 4]}, "x", "y"), alt="two points")
    assert (run.folder / "name.png").read_bytes()[:4] == b"\x89PNG" and image.alt.startswith("two points. ")
    assert "def stage_seed" in source(stages.stage_seed, stages.network).data
