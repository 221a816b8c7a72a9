"""The gpu profile from end to end, its numbers reduced to what a CPU can do, interrupted once."""

import os
import signal
import subprocess
import sys

import pytest

from dinv.experiments.profiles import load_profile
from dinv.experiments.results import read_rows
from dinv.files import repository_root

# Networks, columns, methods and loops are the profile's own; the images are 8x8, every number is small.
STUDENT = {"rounds": 2, "updates": 1, "batch_size": 20, "compile": "never"}
REDUCED = {
    "dataset": "digits", "batch_size": 20, "teacher_training.epochs": 1, "verifier_training.epochs": 1,
    "teacher_training.lr": 0.05, "verifier_training.lr": 0.05,  # one epoch at 0.4 blows statistics up
    "distillation.start_images": 20, "distillation.seeds": 1, "distillation.eval_every": 1,
    "distillation.inversion.stages": ((2, 8),), "distillation.inversion.compile": "never",
    "generator.images": 20, "generator.warmup": 1, "generator.seeds": 1, "generator.eval_every": 1,
    "generator.compare": 2, "generator.pixel_batches": 1, "generator.settings.steps": 1,
    "generator.settings.width": 8, "generator.settings.compile": "never",
    **{f"distillation.settings.{name}": value for name, value in STUDENT.items()},
    **{f"generator.distillation.{name}": value for name, value in STUDENT.items()},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_gpu_profile_runs_whole_and_goes_on_after_an_interrupt(apart):
    words = ["--profile", "gpu", "--only", "03,04,08"]
    words += [word for name, value in REDUCED.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "dinv.reproduce", *words]
    options = {"cwd": repository_root(), "env": os.environ | {"DINV_DEVICE": "cpu"}, "text": True}
    first = subprocess.Popen(command, start_new_session=True, **options)
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(90)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(60) == 130
    kept = len(list((apart / "runs").glob("*/data.safetensors")))
    assert kept
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list((apart / "runs").glob("*/data.safetensors"))) > kept
    rows = read_rows(apart / "figures" / "gpu")
    columns = set(rows[(rows.table == "table1") & rows.chapter.str.startswith("04")].column)
    assert len(columns) == len(load_profile("gpu").distillation.pairs)
