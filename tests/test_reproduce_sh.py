"""./reproduce.sh from outside: in a copy with a tiny lock, a tiny package and no network."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# Stands in for dinv/reproduce.py: tells who runs, with what.
STUB = (
    "import os, sys\nprint('ran by', sys.executable, sys.argv[1:], *map(os.getenv, ('PYTHONPATH', 'HOME')))"
)
# Stands in for uv, called as `uv pip sync OPTIONS LOCK`: pip does it; waits while `hold` is there.
UV = """#!/bin/sh
touch reached; while [ -e hold ]; do sleep 0.05; done
exec .venv/bin/python -m pip install --require-hashes -r requirements.lock
"""


def wheel(folder: Path, name: str, inside: str, text: str) -> str:
    """Write a wheel of one file; its entry in the lock."""
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(inside, text)
        archive.filelist[0].external_attr = 0o100755 << 16  # scripts must be executable
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in archive.namelist()))
    return f"{name}==1.0 \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


class House:
    """A checkout with a lock that no environment satisfies, but that is quickly installed."""

    def __init__(self, root: Path):
        self.root, self.venv, self.lock = root, root / ".venv", root / "requirements.lock"
        for folder in ("dinv", "wheels", "home"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "reproduce.sh", root)
        (root / "home" / "link").symlink_to(root / "reproduce.sh")
        (root / "dinv" / "__init__.py").touch()
        (root / "dinv" / "reproduce.py").write_text(STUB)
        fluff = wheel(root / "wheels", "fluff", "fluff.py", "ANSWER = 42\n")
        uv = wheel(root / "wheels", "uv", "uv-1.0.data/scripts/uv", UV)
        self.lock.write_text(f"{fluff}{uv}    # via x\n")

    def start(self, *words: str, shell: str = "bash", **variables: str) -> subprocess.Popen:
        hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "DINV_", "PIP_", "UV_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        env |= {"HOME": f"{self.root}/home", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
        env |= {"PIP_FIND_LINKS": (self.root / "wheels").as_uri()} | variables
        options = {"cwd": self.root.parent, "env": env, "text": True, "start_new_session": True}
        options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([shell, f"{self.root}/home/link", *words], **options)

    def call(self, *words: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*words, **variables)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path / "some house")  # the space is meant: paths have them


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tset", "unknown word 'tset': did you mean test? The words are reproduce, test, bench, lab"),
        ("xyz", "unknown word 'xyz'. The words are"),
        ("smoke", "unknown word 'smoke': did you mean --profile smoke?"),
        ("clean --dry-run", "clean takes no option"),
    ],
)
def test_a_misspelt_word_ends_before_anything_is_installed(house, line, message):
    status, out, err = house.call(*line.split())
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"reproduce.sh: error: {message}")
    assert not house.venv.exists()


def test_another_shell_is_told_to_take_bash(house):
    if "bash" in os.path.realpath(shell := shutil.which("dash") or shutil.which("sh")):
        pytest.skip(f"{shell} is bash")
    assert house.call(shell=shell) == (2, "", "reproduce.sh: error: run it with bash: bash reproduce.sh\n")


def test_help_installs_nothing(house):
    assert "DINV_PYTHON" in house.call("--help")[1].splitlines()[-1] and not house.venv.exists()


def test_clean_removes_what_runs_make_and_keeps_data_and_figures(house):
    kept = ("data/cifar.bin", "figures/cpu/results.csv", ".venv/file", "notebooks/02.ipynb")
    made = (
        "runs/pool-0/x",
        "figures/cpu/notebooks/02.ipynb",
        "book/index.html",
        "student/notebooks/02.ipynb",
        ".ruff_cache/a",
    )
    for name in (*kept, *made):
        (house.root / name).parent.mkdir(parents=True, exist_ok=True)
        (house.root / name).touch()
    assert house.call("clean") == house.call("clean") == (0, "", "")
    assert [name for name in (*kept, *made) if (house.root / name).exists()] == list(kept)


def test_an_environment_is_used_as_it_is_if_it_is_chosen_or_active_and_equal_to_the_lock(house):
    out = f"ran by {sys.executable} ['--list'] {house.root}:/elsewhere {house.root}/runs/.home\n"
    for name in ("DINV_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"):
        own = {name: sys.executable if name == "DINV_PYTHON" else sys.prefix, "PYTHONPATH": "/elsewhere"}
        assert house.call("--list", HOME="/nowhere", **own) == (0, out, "")
        house.lock.write_text(f"pytest=={version('pytest')} \\\n    --hash=sha256:{64 * '0'}\n")
    assert not house.venv.exists()


def test_somebody_elses_venv_is_left_alone(house):
    house.venv.mkdir()
    (house.venv / "precious").touch()
    status, _, err = house.call(VIRTUAL_ENV=sys.prefix)  # which lacks fluff
    assert status == 1 and "/.venv is not reproduce.sh's own: move it away" in err
    assert [path.name for path in house.venv.iterdir()] == ["precious"]


def test_an_interrupted_installation_repairs_itself(house):
    """SIGKILL in the middle: the next call makes .venv again, and one beside it waits."""
    hold, reached, making = house.root / "hold", house.root / "reached", "making .venv equal to requirements"

    def start_and_reach_uv() -> subprocess.Popen:
        process, deadline = house.start(), time.monotonic() + 300
        while not reached.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        reached.unlink()
        return process

    hold.touch()
    try:
        os.killpg(start_and_reach_uv().pid, signal.SIGKILL)
        second = start_and_reach_uv()
        third = house.start("--list")
        assert third.stderr.readline() == "reproduce.sh: waiting for another installation\n"
    finally:
        hold.unlink()
    (_, second_err), (out, err) = second.communicate(timeout=240), third.communicate(timeout=240)
    assert (second.returncode, third.returncode) == (0, 0) and making in second_err and making not in err
    assert out.startswith(f"ran by {house.venv}/bin/python ['--list'] {house.root} ")
    ask = [house.venv / "bin" / "python", "-I", "-c", "import dinv, fluff; print(dinv.__file__)"]
    assert subprocess.check_output(ask, text=True, cwd="/") == f"{house.root}/dinv/__init__.py\n"
    house.lock.write_text(house.lock.read_text() + "# changed\n")
    active = {"VIRTUAL_ENV": str(house.venv), "PATH": f"{house.venv}/bin:{os.environ['PATH']}"}
    assert making in house.call(**active)[2], "from its own Python, which goes first"
    assert house.call()[::2] == (0, ""), "nothing was left to install"


def test_the_lock_has_what_is_declared_with_hashes_and_names_no_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(r"(?m)^([\w.-]+)==([^\s;]+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}\b", text)
    assert len(entries) == len(re.findall(r"(?m)^[^\s#]", text))
    for line in (*project["dependencies"], *sum(project["optional-dependencies"].values(), [])):
        need = Requirement(line)
        pinned = [number for name, number in entries if name == need.name]
        assert pinned and all(map(need.specifier.contains, pinned)), f"{line}, but the lock has {pinned}"
    assert not re.search(r"(?m)://|file:|(^|\s)/|^\s*-", text.replace("    --hash=", ""))
    assert "- -r requirements.lock\n" in (ROOT / "environment.yml").read_text()
