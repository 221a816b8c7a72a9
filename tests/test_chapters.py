"""What the notebooks share: cached networks and pools, openings, and that a pool needs no data."""

import dataclasses

import pytest
import torch

from dinv import CrossEntropy, FeatureStatistics, TotalVariation, chapters, load_profile
from dinv.profiles import Training


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("DINV_CACHE", str(tmp_path / "runs"))
    monkeypatch.setenv("DINV_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("DINV_PROGRESS", str(tmp_path / "progress.jsonl"))
    short = {"inversion.steps": 3, "inversion.images": 16, "inversion.batch": 8}
    run = chapters.start("01_deepdream", "smoke", overrides=short)
    once = Training(1, 64, 0.1, 5e-4, 0, 1, False)
    run.profile = dataclasses.replace(run.profile, teacher_training=once, judge_training=once)
    return run


def test_start_takes_the_notebooks_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("DINV_CACHE", str(tmp_path / "runs"))
    monkeypatch.setenv("DINV_FIGURES", str(tmp_path / "figures"))
    assert chapters.start("x", "smoke").profile == load_profile("smoke")
    several = chapters.start("x", "smoke", seeds=5).profile
    assert several.seeds == several.distillation.seeds == several.generator.seeds == 5
    assert chapters.start("x", "smoke", overrides={"inversion.steps": 7}).profile.inversion.steps == 7
    with pytest.raises(ValueError, match="did you mean inversion.steps"):
        chapters.start("x", "smoke", overrides={"inversion.step": 7})


def test_training_is_a_stage_found_again(run):
    model, result = chapters.trained(run, "teacher")
    again, cached = chapters.trained(run, "teacher")
    assert not result.cached and cached.cached
    assert chapters.digest(model) == chapters.digest(again)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert len(result.meta["history"]) == 1


def test_network_is_the_shipped_one_unless_retrained(run):
    shipped = dataclasses.replace(run.profile, retrain=False)
    run.profile = shipped
    assert chapters.network(run, "teacher").name == "resnet_digits"
    assert not run._stages  # nothing was trained
    run.profile = dataclasses.replace(shipped, retrain=True)
    chapters.network(run, "teacher")
    assert len(run._stages) == 1


def test_pool_depends_on_objective_seed_and_teacher_and_nothing_else(run):
    teacher, _ = chapters.trained(run, "teacher")
    objective = CrossEntropy() + 0.1 * FeatureStatistics()

    def key(objective=objective, seed=0, teacher=teacher):
        return chapters.pool(run, "p", teacher, objective, seed=seed)[1]

    key()
    assert key().cached
    assert not key(seed=1).cached
    assert not key(objective=CrossEntropy() + 0.2 * FeatureStatistics()).cached
    assert key(objective=objective + 0.0 * TotalVariation()).cached  # a weight of zero is no term
    other, _ = chapters.trained(run, "teacher", seed=1)
    assert not key(teacher=other).cached


def test_pools_of_two_objectives_start_from_the_same_noise(run):
    teacher, _ = chapters.trained(run, "teacher")
    pools = [
        chapters.pool(run, f"p{i}", teacher, objective, snapshots=(0,))[0]
        for i, objective in enumerate((1.0 * CrossEntropy(), CrossEntropy() + 0.1 * FeatureStatistics()))
    ]
    assert torch.equal(pools[0].snapshots, pools[1].snapshots)
    assert not torch.equal(pools[0].images, pools[1].images)


def test_a_pool_reaches_no_dataset(run, monkeypatch):
    teacher, _ = chapters.trained(run, "teacher")

    def no_data(*arguments, **options):
        raise AssertionError("a data-free stage asked for data")

    monkeypatch.setattr("dinv.chapters.load_dataset", no_data)
    monkeypatch.setattr("dinv.datasets.load_dataset", no_data)
    monkeypatch.setattr("dinv.datasets.download.arrays", no_data)
    pool, _ = chapters.pool(run, "blind", teacher, CrossEntropy() + 0.1 * FeatureStatistics())
    assert len(pool) == 16
    with pytest.raises(AssertionError, match="asked for data"):  # the guard is a guard
        chapters.trained(run, "judge")


def test_stage_seeds_differ_by_stage_and_by_seed():
    seeds = {chapters.stage_seed(seed, name) for seed in range(3) for name in ("a", "b")}
    assert len(seeds) == 6
    assert chapters.stage_seed(1, "a") == chapters.stage_seed(1, "a")


def test_settings_table_puts_the_papers_number_beside(run):
    table = chapters.settings_table(load_profile("cpu"), "inversion")
    assert list(table.columns) == ["cpu profile", "the paper", "profile paper where the paper is silent"]
    assert list(table.loc["inversion.steps"]) == ["80", "2000 [V]", ""]
    assert list(table.loc["inversion.schedule"]) == ["cosine", "", "constant"]
    assert all(name.startswith("inversion.") for name in table.index)
    one_and_one = chapters.settings_table(load_profile("cpu"), "teacher", "seeds")
    assert list(one_and_one.index) == ["teacher", "seeds"]
