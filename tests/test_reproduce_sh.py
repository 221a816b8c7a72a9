"""./reproduce.sh from outside: in a copy with a tiny lock, a tiny package and no network."""

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
START = (
    "reproduce/cli.py", "reproduce/clean.py", "reproduce/environment.py", "devices.py", "profiles.py",
)  # fmt: skip
WHOLE = "ANSWER = 42\n"
# Stands in for dinv/reproduce/__main__.py: tells who runs, with what.
STUB = """\
import os, sys
print("ran by", sys.executable)
print("with", sys.argv[1:], "path", os.environ.get("PYTHONPATH"))
"""
# Stands in for setuptools, which may be out of reach; waits while a file named `hold` is there.
BACKEND = """\
import pathlib, shutil, time
def build_editable(folder, *_):
    pathlib.Path("reached").touch()
    while pathlib.Path("hold").exists():
        time.sleep(0.05)
    shutil.copy("wheels/dinv-0.1.0-py3-none-any.whl", folder)
    return "dinv-0.1.0-py3-none-any.whl"
"""
# Stands in for uv: called as `uv pip install --python PYTHON ...`, it lets pip do it.
UV = """\
#!/bin/sh
test -e "$HOME/no-uv" && exit 1
python=$4; shift 4; exec "$python" -m pip install "$@"
"""


def wheel(folder: Path, name: str, version: str, module: str, text: str) -> str:
    """Write a wheel of one file; its line in the lock."""
    info = f"{name}-{version}.dist-info"
    files = {
        module: text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD,,\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest())
            record += f"{inside},sha256={digest.decode().rstrip('=')},{len(content)}\n"
            entry = zipfile.ZipInfo(inside)
            entry.external_attr = 0o100755 << 16  # scripts must be executable
            archive.writestr(entry, content)
        archive.writestr(f"{info}/RECORD", record)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name}=={version} \\\n    --hash=sha256:{digest}\n"


class House:
    """A checkout with a lock that no environment satisfies, but that is quickly installed."""

    def __init__(self, root: Path):
        self.root, self.venv = root, root / ".venv"
        for folder in ("dinv/reproduce", "notebooks", "wheels", "home"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "reproduce.sh", root)
        for name in START:
            shutil.copy(ROOT / "dinv" / name, root / "dinv" / name)
        (root / "dinv" / "__init__.py").touch()
        (root / "dinv" / "reproduce" / "__init__.py").touch()
        (root / "dinv" / "reproduce" / "__main__.py").write_text(STUB)
        (root / "notebooks" / "02_feature_statistics.ipynb").touch()
        (root / "backend.py").write_text(BACKEND)
        (root / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
            '[project]\nname = "dinv"\nversion = "0.1.0"\n'
        )
        wheel(root / "wheels", "dinv", "0.1.0", "dinv.pth", f"{root}\n")
        fluff = wheel(root / "wheels", "fluff", "1.0", "fluff.py", WHOLE)
        uv = wheel(root / "wheels", "uv", "0.1", "uv-0.1.data/scripts/uv", UV)
        self.lock = root / "requirements.lock"
        self.lock.write_text(fluff + uv)

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in (*hidden, "WORLD_SIZE") and not name.startswith(("DINV_", "PIP_", "UV_"))
        }
        env |= {
            "HOME": str(self.root / "home"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": (self.root / "wheels").as_uri(),
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(self.root / "reproduce.sh"), *words],
            cwd=self.root.parent,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(*words, **variables)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def installed(self, module: str) -> Path:
        return next(self.venv.glob("lib/python*/site-packages")) / module


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path / "some house")  # the space is meant: paths have them


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tset", "unknown word 'tset': did you mean test?"),
        ("--profil cpu", "unknown option --profil: did you mean --profile?"),
        ("--profile cpuu", "unknown profile 'cpuu': did you mean cpu?"),
        ("--set inversion.stepz=1", "unknown setting 'inversion.stepz'"),
        ("--only 2,07", "unknown notebook '07'. There are 02_feature_statistics"),
    ],
)
def test_misspelt_ends_before_anything_is_installed(house, line, message):
    done = house.call(*line.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert not house.venv.exists()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DINV_DEVICE", "gpu", "DINV_DEVICE='gpu': expected one of auto, cpu, cuda"),
        ("WORLD_SIZE", "4", "torchrun: not yet (WORLD_SIZE=4)"),
    ],
)
def test_a_wish_that_cannot_be_met_ends_before_anything_is_installed(house, variable, value, message):
    done = house.call(**{variable: value})
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not house.venv.exists()


def test_another_shell_is_told_to_take_bash(house):
    shell = shutil.which("dash") or shutil.which("sh")
    done = subprocess.run([shell, "reproduce.sh", "--list"], cwd=house.root, capture_output=True, text=True)
    if "bash" in os.path.realpath(shell):
        pytest.skip(f"{shell} is bash")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "reproduce.sh: error: run it with bash: ./reproduce.sh or bash reproduce.sh\n"


def test_help_installs_nothing_and_works_through_a_link(house, tmp_path):
    link = tmp_path / "bin" / "again"
    link.parent.mkdir()
    link.symlink_to(house.root / "reproduce.sh")
    (tmp_path / "bin" / "link").symlink_to("again")
    done = subprocess.run(
        ["bash", str(tmp_path / "bin" / "link"), "--help"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ./reproduce.sh [reproduce|test|bench|lab|clean]")
    assert not house.venv.exists()


def test_clean_removes_runs_and_keeps_data_and_figures(house):
    kept = ("data/cifar.bin", "figures/cpu/results.csv", ".venv/file")
    made = ("runs/pool/a.safetensors", "figures/cpu/notebooks/02.ipynb")
    for name in (*kept, *made):
        (house.root / name).parent.mkdir(parents=True, exist_ok=True)
        (house.root / name).touch()
    done = house.call("clean", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "would remove runs/" in done.stdout
    assert all((house.root / name).exists() for name in (*kept, *made))
    done = house.call("clean")
    assert "kept: data, .venv" in done.stdout
    assert all((house.root / name).exists() for name in kept)
    assert not any((house.root / name).exists() for name in made)
    assert "nothing to remove" in house.call("clean").stdout


def test_no_python_is_said(house, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")  # too old
    (tools / "python3").chmod(0o755)
    done = house.call(PATH=str(tools))
    assert done.returncode == 1
    assert "error: no Python 3.11 to 3.14 among: python3 python" in done.stderr


def test_an_active_environment_that_satisfies_the_lock_is_used_as_it_is(house):
    from importlib.metadata import version

    house.lock.write_text(f"pytest=={version('pytest')}\n")
    done = house.call("--profile", "smoke", PYTHONPATH="/elsewhere")
    assert done.returncode == 0, done.stderr
    assert f"with ['--profile', 'smoke'] path {house.root}:/elsewhere" in done.stdout
    assert not house.venv.exists()


def test_a_chosen_python_is_used_and_the_difference_told(house):
    done = house.call(DINV_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert f"ran by {sys.executable}" in done.stdout
    assert "differs from the lock: fluff is missing" in done.stderr
    assert not house.venv.exists()


def test_somebody_elses_venv_is_left_alone(house):
    house.venv.mkdir()
    (house.venv / "precious").touch()
    done = house.call()
    assert done.returncode == 1
    assert ".venv was not made by reproduce.sh" in done.stderr
    assert [path.name for path in house.venv.iterdir()] == ["precious"]


def test_a_file_in_the_place_of_venv_is_named(house):
    house.venv.write_text("mine")
    done = house.call()
    assert done.returncode == 1
    assert f"error: cannot make {house.venv}: [Errno" in done.stderr
    assert house.venv.read_text() == "mine"


@pytest.mark.slow
def test_a_package_that_is_not_the_locked_one_is_refused(house):
    wheel(house.root / "wheels", "fluff", "1.0", "fluff.py", "ANSWER = 'changed on the way'\n")
    done = house.call()
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "Check the network and the free disk space, then call again" in done.stderr
    assert not house.installed("fluff.py").exists()
    assert done.stdout == ""


def test_an_interrupted_installation_repairs_itself(house):
    """SIGKILL in the middle: the next call waits for orphans and makes .venv anew."""
    hold, reached = house.root / "hold", house.root / "reached"
    hold.touch()
    without_uv = house.root / "home" / "no-uv"
    without_uv.touch()
    first = house.start()
    try:
        deadline = time.monotonic() + 300
        while not reached.exists():
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()
            time.sleep(0.05)
        assert house.installed("fluff.py").read_text() == WHOLE, "pip did it where uv could not"
        without_uv.unlink()
        first.send_signal(signal.SIGKILL)  # pip, its child, goes on
        assert first.wait() == -signal.SIGKILL
        house.installed("fluff.py").write_text("ANS")  # a package cut off in the middle

        second = house.start("--list")
        assert "another call is installing; waiting for it" in second.stderr.readline()
        assert house.installed("fluff.py").read_text() == "ANS"
    finally:
        hold.unlink()
    out, err = second.communicate(timeout=240)
    assert "uv could not do it; once more with pip" in first.communicate()[1]
    assert "uv could not" not in err
    assert second.returncode == 0, err
    assert ".venv was cut off while installing; making it anew" in err
    assert f"ran by {house.venv}/bin/python" in out
    assert "with ['--list'] path None" in out
    assert house.installed("fluff.py").read_text() == WHOLE

    third = house.call()
    assert (third.returncode, third.stderr) == (0, ""), "nothing was left to install"

    house.installed("fluff.py").unlink()
    shutil.rmtree(house.installed("fluff-1.0.dist-info"))
    fourth = house.call()
    assert ".venv differs from requirements.lock: fluff is missing" in fourth.stderr
    assert house.installed("fluff.py").read_text() == WHOLE
