"""Profiles: overrides by name and type, and that the five are one experiment with other numbers."""

import dataclasses

import pytest
import torch

from dinv.data import DATASETS
from dinv.experiments.overrides import flat
from dinv.experiments.profiles import PROFILES, SEEDED, load_profile, with_seeds
from dinv.experiments.settings import STATED
from dinv.models import DOMAINS, NETWORKS


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("DINV_PROFILE", raising=False)
    monkeypatch.delenv("DINV_DEVICE", raising=False)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_the_same_settings_of_the_same_types_and_can_be_run(name):
    profile, settings, paper = load_profile(name), flat(load_profile(name)), flat(load_profile("paper"))
    assert profile.name == name
    assert {key: type(value) for key, value in settings.items()} == {k: type(v) for k, v in paper.items()}
    assert profile.dataset in DATASETS and profile.dataset in DOMAINS
    assert {profile.teacher, profile.verifier} <= set(NETWORKS) and profile.teacher != profile.verifier
    sweep = profile.sweep
    for images in (profile.images, sweep.images, sweep.without_batchnorm):
        assert images % min(profile.batch_size, images) == 0
    assert all(sweep.images % min(batch, sweep.images) == 0 for batch in sweep.batch_sizes)
    assert min(value for key, value in settings.items() if key.endswith("seeds")) >= 1


def test_the_paper_profile_holds_the_papers_numbers():
    paper = load_profile("paper")
    assert (paper.inversion.steps, paper.inversion.lr, paper.batch_size) == (2000, 0.05, 256)
    assert (paper.images, paper.inversion.jitter, paper.inversion.schedule) == (256_000, 2, "constant")
    assert (paper.dataset, paper.tv, paper.l2, paper.alpha_f) == ("cifar10", 2.5e-5, 3e-8, 10.0)


def test_a_table_puts_the_papers_number_and_its_mark_beside_each():
    rows = {name: rest for name, *rest in load_profile("smoke", {"inversion.steps": 7}).table()}
    assert rows["inversion.steps"] == ["7", "2000 [V]", ""]
    assert rows["l2"] == ["3e-08", "3e-08 [M]", ""]  # no digit is lost
    assert rows["alpha_f_kl"] == ["10", "", "1"]  # the paper is silent
    assert rows["distillation.inversion.stages"] == ["(200, 8)", "(2000, 32) [V]", ""]
    assert rows["distillation.settings.rounds"] == ["5", "975 [V]", ""]
    assert rows.keys() == flat(load_profile("smoke")).keys() - {"name"} and STATED.keys() <= rows.keys()


def test_profiles_are_frozen():
    profile = load_profile("cpu")
    for part, name in ((profile, "seeds"), (profile.inversion, "steps"), (profile.distillation, "tv")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)


def test_seeds_are_set_everywhere():
    profile = with_seeds(load_profile("cpu"), 5)
    assert profile.seeds == 5 and {getattr(profile, part).seeds for part in SEEDED} == {5}


@pytest.mark.parametrize(
    "cuda, wish, variable, name",
    [(True, "", "", "gpu"), (False, "", "", "cpu"), (True, "cpu", "", "cpu"), (True, "", "smoke", "smoke")],
)
def test_auto_follows_the_machine_and_the_environment(monkeypatch, cuda, wish, variable, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("DINV_DEVICE", wish)
    monkeypatch.setenv("DINV_PROFILE", variable)
    assert load_profile().name == load_profile("auto", {"seeds": 4}).name == name
    assert load_profile("paper").name == "paper"


# ---- overrides -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "key, given, value",
    [
        ("inversion.steps", 400, 400), ("inversion.steps", "400", 400), ("inversion.lr", "0.1", 0.1),
        ("inversion.lr", 1, 1.0), ("tv", "2.5e-5", 2.5e-5), ("l2", "0", 0.0),
        ("teacher", "vgg_small", "vgg_small"), ("inversion.schedule", "cosine", "cosine"),
        ("retrain", "true", True), ("retrain", False, False),
        ("distillation.settings.rounds", "3", 3), ("generator.distillation.flip", "False", False),
        ("sweep.alpha_f", "(0, 1, 2.5)", (0.0, 1.0, 2.5)), ("sweep.real", [10, 20], (10, 20)),
        ("distillation.pairs", "a->b,a->c", ("a->b", "a->c")), ("imagenet.classes", "cat", ("cat",)),
        ("sweep.batch_sizes", "8,16", (8, 16)), ("inversion.betas", "0.5, 1", (0.5, 1.0)),
        ("inversion.stages", "((2, 4), (3, 8))", ((2, 4), (3, 8))), ("inversion.stages", "()", ()),
    ],
)  # fmt: skip
def test_overrides(key, given, value):
    before, after = flat(load_profile("cpu")), flat(load_profile("cpu", {key: given}))
    assert after[key] == value and type(after[key]) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in after[key]] == [type(item) for item in value]
    assert {name for name in after if after[name] != before[name]} <= {key}
    assert flat(load_profile("cpu")) == before


@pytest.mark.parametrize(
    "key, message",
    [
        ("inversion.step", "'inversion.step': did you mean inversion.steps.*imagenet.seeds"),
        ("sed", "'sed': did you mean seeds"), ("name", "'name'"), ("inversion", "The settings are"),
        ("distillation.rounds", "did you mean distillation.settings.rounds"),
        ("", "The settings are dataset, teacher"),
    ],
)  # fmt: skip
def test_an_unknown_setting_is_answered_with_the_nearest_and_all(key, message):
    with pytest.raises(ValueError, match=f"unknown setting .*{message}"):
        load_profile("cpu", {key: 1})


@pytest.mark.parametrize("name, nearest", [("smokey", "smoke"), ("Paper", "paper"), ("gpus", "gpu")])
def test_an_unknown_profile_is_answered_with_the_nearest_and_all(name, nearest):
    with pytest.raises(ValueError, match=f"profile '{name}': did you mean {nearest}.*smoke, cpu, night, gpu"):
        load_profile(name)


@pytest.mark.parametrize(
    "key, value, message",
    [
        *(("inversion.steps", value, "must be int, like 80") for value in ("many", 1.5, "1e3", True, None)),
        ("inversion.lr", "fast", "must be float"), ("inversion.lr", "nan", "must be float"),
        ("retrain", 1, "must be bool"), ("teacher", 3, "must be str"), ("sweep.real", 5, "must be tuple"),
        ("sweep.real", (1, 2.5), "must be int"), ("inversion.betas", (0.5,), "must be tuple"),
        ("inversion.steps", -1, "not negative"), ("inversion.lr", "1e999", "must be finite"),
        ("sweep.real", (10, -1), "not negative"), ("tv", float("nan"), "must be finite"),
        ("seeds", 0, "at least one seed"), ("octaves.seeds", "0", "at least one seed"),
        ("inversion.schedule", "cosin", "unknown schedule"), ("distillation.settings.rounds", 0, "positive"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_or_out_of_range(key, value, message):
    with pytest.raises(ValueError, match=message):
        load_profile("cpu", {key: value})
