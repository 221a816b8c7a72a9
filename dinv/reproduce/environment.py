"""Find or make the environment ./reproduce.sh runs in; standard library only.

Run by path (`python dinv/reproduce/environment.py WORDS`), as nothing may be installed yet. An environment
that satisfies requirements.lock is used as it is. Otherwise .venv is made, and a mark in it tells
how far that got: "installing" from before its first file, the hash of the lock when all is done.
What was cut off in between is made anew: a package half written cannot be told from a whole one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MARK = "dinv-environment"
_UNFINISHED = "installing"
_GIGABYTES = 7 if sys.platform == "linux" else 2  # Linux packages bring CUDA's libraries


class SetupError(RuntimeError):
    """The environment could not be made; the message says what to do."""


@dataclass(frozen=True)
class Pin:
    """One entry of the lock: a package, its version, where it applies, and its own lines."""

    name: str
    version: str
    marker: str
    text: str


def pins(lock: Path) -> list[Pin]:
    """The entries of a lock file, in its order.

    Raises:
        SetupError: the file is missing, or holds no entry.
    """
    try:
        lines = lock.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    except OSError as error:
        message = f"cannot read {lock}: {error.strerror}; is the checkout whole?"
        raise SetupError(message) from None
    found = []
    for line in lines:
        match = re.match(r"([\w.-]+)==([^\s;]+)(?:\s*;\s*(.*?))?\s*(?:--hash|$)", line)
        if match:
            name, version, marker = match.groups(default="")
            found.append(Pin(name.lower(), version, marker, line))
    if not found:
        raise SetupError(f"{lock.name} names no package; restore it: git checkout {lock.name}")
    return found


def differences(lock: Path) -> list[str]:
    """What this interpreter's packages lack of the lock, a line a package; empty if nothing."""
    try:
        from packaging import markers, specifiers
    except ImportError:
        try:
            from pip._vendor.packaging import markers, specifiers
        except ImportError:
            return ["pip is missing"]

    def installed(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    # A build of torch for the CPU alone needs none of CUDA's packages.
    cpu_only = (installed("torch") or "").endswith("+cpu")
    lacking = []
    for pin in pins(lock):
        if pin.marker and not markers.Marker(pin.marker).evaluate():
            continue
        if cpu_only and re.match("nvidia-|cuda-|triton$", pin.name):
            continue
        version = installed(pin.name)
        if version is None:
            lacking.append(f"{pin.name} is missing")
        elif version not in specifiers.SpecifierSet(f"=={pin.version}", prereleases=True):
            lacking.append(f"{pin.name} is {version}, the lock has {pin.version}")
    return lacking


def prepare() -> Path:
    """The interpreter to run with: of the active environment if it will do, else of .venv.

    Makes or repairs .venv where it must, telling each step and its seconds on stderr.

    Raises:
        SetupError: it cannot be made.
    """
    if os.environ.get("DINV_PYTHON"):
        if lacking := differences(LOCK):
            _say(f"DINV_PYTHON is used although it differs from the lock: {_some(lacking)}")
        return Path(sys.executable)
    if Path(sys.prefix).resolve() != VENV.resolve() and not differences(LOCK):
        return Path(sys.executable)
    try:
        with _locked(LOCK) as lock:
            return _own(lock)
    except OSError as error:
        raise SetupError(f"cannot make {VENV}: {error}") from None


def _own(lock: int) -> Path:
    """The interpreter of .venv, which is made or repaired as needed while `lock` is held."""
    mark = VENV / MARK
    finished = f"{hashlib.sha256(LOCK.read_bytes()).hexdigest()} {ROOT}"
    state = mark.read_text(encoding="utf-8") if mark.exists() else ""
    if state == _UNFINISHED:
        _say(".venv was cut off while installing; making it anew")
        _make(lock)
    elif not VENV.exists() or not any(VENV.iterdir()):
        _say(f"no active environment satisfies {LOCK.name}; making .venv")
        _make(lock)
    else:
        lacking = _lacking(PYTHON)
        if not state and lacking != []:
            raise SetupError(
                f"{VENV} was not made by reproduce.sh and differs from {LOCK.name}: "
                f"{_some(lacking)}. Activate an environment that satisfies it, or move .venv away"
            )
        if not state or (state == finished and lacking == []):
            return PYTHON
        if lacking is None or not state.endswith(f" {ROOT}"):
            _say(".venv was moved, or its Python is gone; making it anew")
            _make(lock)
        else:
            _say(f".venv differs from {LOCK.name}: {_some(lacking) or 'it has changed since'}")
            _write(mark, _UNFINISHED)
    _install(lock)
    _write(mark, finished)
    return PYTHON


def _make(lock: int) -> None:
    """An empty .venv, marked as unfinished from before its first file."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < _GIGABYTES:
        _say(f"only {free:.1f} GB are free on this disk; .venv takes about {_GIGABYTES} GB")
    VENV.mkdir(exist_ok=True)
    _write(VENV / MARK, _UNFINISHED)
    for path in VENV.iterdir():  # not the folder itself, which may be a link to another disk
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    version = ".".join(map(str, sys.version_info[:3]))
    base = getattr(sys, "_base_executable", None) or sys.executable
    with _step(f"1/4 .venv with Python {version}"):
        _run([base, "-m", "venv", str(VENV)], lock)


def _install(lock: int) -> None:
    """Everything in the lock, by hash, then the package itself."""
    pip = [str(PYTHON), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    wheels = ["--require-hashes", "--only-binary", ":all:", "-r"]
    uv = next(pin for pin in pins(LOCK) if pin.name == "uv")
    packages = "3/4 the locked packages, some gigabytes where they are not cached"
    try:
        alone = VENV / "uv.txt"
        _write(alone, uv.text + "\n")
        with _step(f"2/4 uv {uv.version}, which installs several times faster than pip"):
            _run([*pip, "-q", "--retries", "1", *wheels, str(alone)], lock)
        with _step(packages):
            command = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON)]
            _run([*command, *wheels, str(LOCK)], lock)
    except SetupError:
        _say("uv could not do it; once more with pip, which is slower")
        _make(lock)  # pip would take for whole what uv left half written
        with _step(packages):
            _run([*pip, *wheels, str(LOCK)], lock)
    with _step("4/4 dinv itself"):
        _run([*pip, "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)], lock)


def _run(command: Sequence[str], lock: int) -> None:
    """Run a command, its output on stderr. It inherits the lock: an orphan goes on holding it."""
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": sys.stderr}
    try:
        status: int | str = subprocess.run(command, pass_fds=[lock], **options).returncode
    except OSError as error:
        status = error.strerror
    if status:
        raise SetupError(
            f"this ended with status {status}: {shlex.join(command)}\nIts reason stands above. "
            "Check the network and the free disk space, then call again: it goes on"
        )


def _lacking(python: Path) -> list[str] | None:
    """`differences` of another interpreter; None if it does not run."""
    command = [str(python), "-I", str(Path(__file__).resolve()), "--differences"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a file against other calls; the lock ends with the last process that has it."""
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another call is installing; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    _say(f"{what} ...")
    start = time.monotonic()
    yield
    _say(f"{what.partition(' ')[0]} done in {time.monotonic() - start:.0f} s")


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _some(lacking: Sequence[str] | None) -> str:
    if lacking is None:
        return "its Python does not run"
    more = f", and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    return ", ".join(lacking[:3]) + more


def _say(text: str) -> None:
    print(f"reproduce.sh: {text}", file=sys.stderr, flush=True)


def variables(python: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The environment variables to run `python` with."""
    chosen = dict(given)
    if python == PYTHON:
        chosen["VIRTUAL_ENV"] = str(VENV)
        chosen["PATH"] = f"{python.parent}{os.pathsep}{given.get('PATH', os.defpath)}"
    else:  # nothing is installed into it, so the package is found by its path
        paths = (str(ROOT), given.get("PYTHONPATH"))
        chosen["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return chosen


def _homeless(given: Mapping[str, str]) -> dict[str, str]:
    """Writable folders for the tools that need one, where the home folder is not."""
    if os.access(os.path.expanduser("~"), os.W_OK):
        return {}
    folders = {"MPLCONFIGDIR": "matplotlib", "IPYTHONDIR": "ipython", "UV_CACHE_DIR": "uv",
               "JUPYTER_CONFIG_DIR": "jupyter", "JUPYTER_DATA_DIR": "jupyter"}  # fmt: skip
    home = ROOT / "runs" / ".home"
    return {name: str(home / folder) for name, folder in folders.items() if name not in given}


def main(argv: Sequence[str]) -> None:
    """What ./reproduce.sh does: check the words, prepare, and become `python -m dinv.reproduce`."""
    import clean  # run by path: this folder is on the path, the package is not
    import cli

    chosen = cli.parse(argv)
    if chosen.word == "clean":
        clean.clean(ROOT, chosen.dry_run)
        return
    os.environ.update(_homeless(os.environ))
    try:
        python = prepare()
    except SetupError as error:
        _say(f"error: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say("interrupted; the next call makes .venv anew from what is cached")
        raise SystemExit(130) from None
    command = [str(python), "-m", "dinv.reproduce", *argv]
    os.execve(python, command, variables(python, os.environ))


if __name__ == "__main__":
    if sys.argv[1:] == ["--differences"]:
        print(*(f"{line}\n" for line in differences(LOCK)), sep="", end="")
    else:
        main(sys.argv[1:])
