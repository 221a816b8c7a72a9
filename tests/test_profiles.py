"""Profiles: overrides by name and type, and that the four are one experiment with other numbers."""

import dataclasses
import json

import pytest
import torch

from dinv import chapters, profiles
from dinv.datasets import DATASETS
from dinv.inversion import InversionSettings
from dinv.models import DOMAINS, NETWORKS
from dinv.profiles import PROFILES, as_dict, flat, load_profile


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("DINV_PROFILE", raising=False)
    monkeypatch.delenv("DINV_DEVICE", raising=False)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_the_same_settings_of_the_same_types(name):
    profile, paper = load_profile(name), load_profile("paper")
    assert profile.name == name
    kinds = {key: type(value) for key, value in flat(profile).items()}
    assert kinds == {key: type(value) for key, value in flat(paper).items()}
    for key, value in flat(profile).items():
        declared = flat(paper)[key]
        if isinstance(value, tuple):
            assert value and {type(item) for item in value} == {type(item) for item in declared}


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_can_be_run(name):
    """Its settings are accepted where they are used, before any work."""
    profile = load_profile(name)
    assert profile.dataset in DATASETS and profile.dataset in DOMAINS
    assert profile.teacher in NETWORKS and profile.judge in NETWORKS and profile.teacher != profile.judge
    chapters.inversion_settings(profile)
    for role in ("teacher", "judge"):
        chapters.training_settings(profile, role)
    sweep, o = profile.sweep, profile.octaves
    InversionSettings(steps=o.steps, rate=o.rate, octaves=o.octaves, chroma=o.chroma, jitter=o.jitter)
    for images in (profile.inversion.images, sweep.images, sweep.bare):
        assert images % min(profile.inversion.batch, images) == 0
    assert all(sweep.images % min(batch, sweep.images) == 0 for batch in sweep.batches)
    assert profile.seeds >= 1


def test_the_paper_profile_holds_the_papers_numbers():
    paper = load_profile("paper")
    assert (paper.inversion.steps, paper.inversion.rate, paper.inversion.batch) == (2000, 0.05, 256)
    assert (paper.inversion.images, paper.inversion.jitter) == (256_000, 2)
    assert (paper.inversion.schedule, paper.dataset) == ("constant", "cifar10")
    assert (paper.weights.tv, paper.weights.l2, paper.weights.feature) == (2.5e-5, 3e-8, 10.0)


def test_a_table_puts_the_papers_number_and_its_mark_beside_each():
    rows = {name: rest for name, *rest in load_profile("smoke", {"inversion.steps": 7}).table()}
    assert rows["inversion.steps"] == ["7", "2000 [V]", ""]
    assert rows["weights.l2"] == ["3e-08", "3e-08 [M]", ""]  # no digit is lost
    assert rows["weights.feature_kl"] == ["10", "", "1"]  # the paper is silent
    assert rows["distillation.stages"] == ["(200, 8)", "(2000, 32) [V]", ""]
    assert rows.keys() == flat(load_profile("smoke")).keys() - {"name"}
    assert profiles.STATED.keys() <= rows.keys()


def test_profiles_are_frozen():
    profile = load_profile("cpu")
    for part, name in ((profile, "seeds"), (profile.inversion, "steps"), (profile.weights, "tv")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)


def test_a_profile_as_a_dictionary():
    plain = as_dict(load_profile("cpu"))
    assert plain["inversion"]["jitter"] == 2 and plain["teacher_training"]["epochs"] > 0
    assert json.loads(json.dumps(plain))["sweep"]["real"] == [10, 100, 1000]


# ---- auto ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda, name", [(True, "gpu"), (False, "cpu")])
def test_auto_follows_the_machine(monkeypatch, cuda, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert load_profile().name == load_profile("auto").name == name
    monkeypatch.setenv("DINV_PROFILE", "")
    assert load_profile().name == name


def test_auto_follows_the_environment(monkeypatch):
    monkeypatch.setenv("DINV_PROFILE", "smoke")
    assert load_profile("auto", {"seeds": 4}).name == "smoke"
    assert load_profile("paper").name == "paper"
    monkeypatch.setenv("DINV_PROFILE", "smok")
    with pytest.raises(ValueError, match="unknown profile 'smok': did you mean smoke"):
        load_profile("auto")


# ---- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, given, value",
    [
        ("inversion.steps", 400, 400),
        ("inversion.steps", "400", 400),
        ("inversion.rate", "0.1", 0.1),
        ("inversion.rate", 1, 1.0),
        ("weights.tv", "2.5e-5", 2.5e-5),
        ("weights.l2", "0", 0.0),
        ("seeds", "5", 5),
        ("teacher", "resnet_small", "resnet_small"),
        ("inversion.schedule", "cosine", "cosine"),
        ("retrain", "true", True),
        ("retrain", "False", False),
        ("retrain", False, False),
        ("teacher_training.flip", "False", False),
        ("sweep.features", "(0, 1, 2.5)", (0.0, 1.0, 2.5)),
        ("sweep.real", [10, 20], (10, 20)),
        ("sweep.batches", "8,16", (8, 16)),
    ],
)
def test_overrides(key, given, value):
    before = flat(load_profile("cpu"))
    after = flat(load_profile("cpu", {key: given}))
    assert after[key] == value and type(after[key]) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in after[key]] == [type(item) for item in value]
    assert {name for name in after if after[name] != before[name]} <= {key}
    assert flat(load_profile("cpu")) == before


def test_several_overrides_at_once():
    profile = load_profile("smoke", {"inversion.steps": 3, "inversion.rate": 0.5, "seeds": 1})
    assert (profile.inversion.steps, profile.inversion.rate, profile.seeds) == (3, 0.5, 1)
    assert profile.inversion.batch == load_profile("smoke").inversion.batch


@pytest.mark.parametrize(
    "key, nearest",
    [("inversion.step", "inversion.steps"), ("inversion_steps", "inversion.steps"), ("sed", "seeds")],
)
def test_an_unknown_setting_is_answered_with_the_nearest_and_all(key, nearest):
    with pytest.raises(ValueError, match=f"unknown setting '{key}': did you mean {nearest}.*weights.tv"):
        load_profile("cpu", {key: 1})


@pytest.mark.parametrize("key", ["name", "inversion", "xyzzy", ""])
def test_what_is_no_setting(key):
    with pytest.raises(ValueError, match=f"unknown setting '{key}'.*The settings are dataset, teacher"):
        load_profile("cpu", {key: "x"})


@pytest.mark.parametrize("name, nearest", [("smokey", "smoke"), ("Paper", "paper"), ("gpus", "gpu")])
def test_an_unknown_profile_is_answered_with_the_nearest_and_all(name, nearest):
    with pytest.raises(ValueError, match=f"profile '{name}': did you mean {nearest}.*smoke, cpu, gpu"):
        load_profile(name)


@pytest.mark.parametrize(
    "key, value, kind",
    [
        ("inversion.steps", "many", "int"),
        ("inversion.steps", 1.5, "int"),
        ("inversion.steps", "1e3", "int"),
        ("inversion.steps", True, "int"),
        ("inversion.steps", None, "int"),
        ("inversion.rate", "fast", "float"),
        ("inversion.rate", "nan", "float"),
        ("inversion.rate", True, "float"),
        ("retrain", 1, "bool"),
        ("retrain", "yes", "bool"),
        ("teacher", 5, "str"),
        ("sweep.real", 10, "tuple"),
        ("sweep.real", "(10, 1.5)", "int"),
        ("sweep.real", ["ten"], "int"),
        ("seeds", "__import__('os')", "int"),
    ],
)
def test_a_value_of_another_type(key, value, kind):
    with pytest.raises(ValueError, match=f"setting {key}=.* must be {kind}, like "):
        load_profile("cpu", {key: value})


@pytest.mark.parametrize(
    "key, value",
    [("inversion.steps", -1), ("weights.tv", "-1e-5"), ("inversion.rate", "1e999"), ("sweep.real", (10, -1)),
     ("inversion.rate", float("nan"))],
)  # fmt: skip
def test_a_value_out_of_range(key, value):
    with pytest.raises(ValueError, match=f"setting {key}=.* must be finite and not negative"):
        load_profile("cpu", {key: value})


def test_profiles_are_what_the_module_lists():
    assert tuple(profiles._ALL) == PROFILES == ("smoke", "cpu", "gpu", "paper")
