"""The gpu profile from end to end, its numbers reduced to what a CPU can do, in parts of a short budget."""

import csv
import os
import subprocess
import sys

import pytest

from dinv.profiles import load_profile
from dinv.runs import repository_root

# Networks, columns, rows and loops are the profile's own; the images are 8x8, every number is small.
REDUCED = {
    "dataset": "digits",
    "teacher_training.epochs": 1, "judge_training.epochs": 1,
    "inversion.batch": 20, "inversion.compile": "never",
    "distillation.first": 20, "distillation.rounds": 2, "distillation.updates": 1, "distillation.batch": 20,
    "distillation.stages": ((2, 8),), "distillation.seeds": 1, "distillation.every": 1,
    "generator.rounds": 2, "generator.updates": 1, "generator.images": 20, "generator.steps": 1,
    "generator.width": 8, "generator.warmup": 1, "generator.seeds": 1, "generator.every": 1,
    "generator.compare": 2, "generator.pixels": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_gpu_profile_runs_whole_in_parts_of_a_budget(tmp_path):
    # a budget has to be longer than it takes to go through what is cached, or it never ends
    words = ["--profile", "gpu", "--only", "03,04,08", "--budget", "90s"]
    for key, value in REDUCED.items():
        words += ["--set", f"{key}={value}"]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("DINV_")}
    variables |= {"DINV_CACHE": str(tmp_path / "runs"), "DINV_FIGURES": str(tmp_path / "figures")}
    variables["DINV_DEVICE"] = "cpu"
    statuses = []
    while not statuses or statuses[-1] == 75:
        done = subprocess.run(
            [sys.executable, "-m", "dinv.reproduce", *words],
            cwd=repository_root(), env=variables, capture_output=True, text=True,
        )  # fmt: skip
        statuses.append(done.returncode)
        assert len(statuses) < 6, "the budget is used up again and again: nothing is kept"
    assert statuses[-1] == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 75 in statuses, "the budget was never used up: make it shorter"
    with open(tmp_path / "figures" / "gpu" / "results.csv", newline="") as file:
        columns = {row["column"] for row in csv.DictReader(file) if row["table"] == "table1"}
    assert columns == set(load_profile("gpu").distillation.pairs)
