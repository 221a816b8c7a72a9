"""`test` and `bench`: each check a process of its own, all of them run, the time of each."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from dinv import devices
from dinv.profiles import load_profile
from dinv.reproduce import cli, execution
from dinv.reproduce.display import duration
from dinv.store import repository_root

CELL_TIMEOUT = 1800  # seconds


def test(chosen: Namespace, argv: list[str]) -> int:
    """ruff, pytest, and nbval on the smoke profile; nothing in the checkout is written to."""
    _refuse_settings(chosen)
    python = [sys.executable, "-m"]
    notebooks = [str(cli.NOTEBOOKS / f"{name}.ipynb") for name in chosen.only]
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    commands = {
        "ruff": [*python, "ruff", "check", "--no-cache", "."],
        "pytest": [*pytest, "-m", "" if chosen.slow else "not slow and not network", "tests"],
        "nbval": [
            *pytest, "--nbval-lax", "--nbval-current-env",
            f"--nbval-cell-timeout={CELL_TIMEOUT}", *(notebooks or [str(cli.NOTEBOOKS)]),
        ],
    }  # fmt: skip
    profile = "smoke" if chosen.profile == "auto" else chosen.profile
    devices.pick(profile)  # what would fail in every notebook is told now
    with tempfile.TemporaryDirectory(prefix="dinv-") as scratch, execution.own_kernel():
        variables = {
            "DINV_PROFILE": profile,
            "DINV_CACHE": f"{scratch}/runs",
            "DINV_FIGURES": f"{scratch}/figures",
            "DINV_PROGRESS": f"{scratch}/progress.jsonl",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with execution.environment(variables):
            return run_all(commands, chosen)


def bench(chosen: Namespace, argv: list[str]) -> int:
    """Every script in benchmarks/, in order."""
    _refuse_settings(chosen)
    folder = repository_root() / "benchmarks"
    scripts = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    if not scripts:
        raise ValueError(f"there is no benchmark in {folder}")
    profile = load_profile(chosen.profile).name
    variables = {
        "PYTHONPATH": execution.python_path(),
        "DINV_PROFILE": profile,
        "DINV_DEVICE": devices.pick(profile),
    }
    with execution.environment(variables):
        return run_all({path.stem: [sys.executable, str(path)] for path in scripts}, chosen)


def _refuse_settings(chosen: Namespace) -> None:
    for name in ("set", "seeds", "force"):
        if getattr(chosen, name):
            raise ValueError(f"--{name} goes with `reproduce`, not with `{chosen.word}`")


def run_all(commands: dict[str, list[str]], chosen: Namespace, root: Path | None = None) -> int:
    """Run every command, also after one failed; then a line for each. 0, 1, or 75 out of time."""
    if chosen.dry_run:
        for command in commands.values():
            print(f"would run {shlex.join(command)}")
        return 0
    deadline = time.monotonic() + (chosen.budget or math.inf)
    outcomes: dict[str, str] = {}
    for name, command in commands.items():
        left = deadline - time.monotonic()
        if left <= 0:
            outcomes[name] = "not run: the time budget is used up"
            continue
        print(f"── {name}: {shlex.join(['python', *command[1:]])}", flush=True)
        began = time.monotonic()
        try:
            timeout = None if left == math.inf else left
            status = subprocess.run(command, cwd=root or repository_root(), timeout=timeout)
            outcome = f"FAILED (status {status.returncode})" if status.returncode else "passed"
        except subprocess.TimeoutExpired:
            outcome = "not finished: the time budget is used up"
        outcomes[name] = f"{outcome}, {duration(time.monotonic() - began)}"
        print(f"── {name}: {outcomes[name]}\n", flush=True)
    width = max(map(len, outcomes))
    for name, outcome in outcomes.items():
        print(f"{name:{width}}  {outcome}")
    if any(outcome.startswith("FAILED") for outcome in outcomes.values()):
        return 1
    return 75 if any(outcome.startswith("not") for outcome in outcomes.values()) else 0
