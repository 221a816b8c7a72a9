"""Stages: long computations that are made once, found again by all that they depend on, and survive a kill.

    @stage("pool", version=1)
    def synthesize(inverter, labels, *, seed=0, checkpoint=NO_CHECKPOINT) -> Pool: ...

The key of a call is the digest of every argument but `checkpoint` and `group`, of the kind of device and the
precision.
`<cache root>/<kind>-<key>/` holds

    data.safetensors      the tensors of the result; in its header the other fields, key, label, checksum
    partial.safetensors   the checkpoint of a stage that is not finished

Every write is a rename, so a killed run leaves whole files; a file that is corrupt all the same is found by
its checksum, named on stderr, and made again. To make a stage again, delete its folder.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor
from tqdm import tqdm

from dinv import files
from dinv.experiments import device, processes
from dinv.files import Corrupt
from dinv.models import Classifier

ledger: list[dict[str, Any]] = []  # of this process: kind, label, key, seconds, cached, folder


def stage(kind: str, version: int = 1) -> Callable:
    """Keep a function's results on the disk, by its arguments.

    The function returns a dataclass of tensors, dicts of tensors and what JSON can hold, named in its return
    annotation. A field `seconds` is filled with the wall time that the stage took over all its parts. The
    tensors of a result lie on the CPU. Raise `version` when the code makes something else of the same
    arguments. A function that takes `group` is called in all processes of the run, see `processes`.

    The decorated function raises TypeError for an argument that has no digest, naming it, and OSError when
    the disk is full.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @wraps(function)
        def cached(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            resumes = bound.arguments.pop("checkpoint", None) is not None
            call = function if "group" not in bound.arguments else partial(processes.together, function)
            bound.arguments.pop("group", None)
            parts = [kind, version, device.current(), device.precision()]
            given = files.digest(dict(bound.arguments), function.__name__)
            key = files.sha256_text(files.digest(parts) + given)
            label, result_class = _label(kind, bound.arguments), get_type_hints(function)["return"]
            folder = files.make_folder(files.cache_root() / f"{kind}-{key[:12]}", "DINV_CACHE")
            path = folder / "data.safetensors"
            with files.locked(folder, label):
                kept = _load(path, key, label, result_class)
                if made := kept is None:
                    checkpoint = Checkpoint(folder, label)
                    bound.arguments |= {"checkpoint": checkpoint} if resumes else {}
                    _make(lambda: call(*bound.args, **bound.kwargs), checkpoint, path, key)
                    kept = _load(path, key, label, result_class)
            result, seconds = kept
            entry = {"kind": kind, "label": label, "key": key, "seconds": round(seconds, 2)}
            ledger.append(entry | {"cached": not made, "folder": folder.name})
            return result

        return cached

    return decorate


def _label(kind: str, arguments: Mapping[str, Any]) -> str:
    """For people: the kind, and the names of networks, texts and the seed among the arguments."""
    words = []
    for name, value in arguments.items():
        if isinstance(value, Classifier):
            words.append(value.name)
        elif isinstance(value, str) and value:
            words.append(value)
        elif hasattr(value, "digest_parts"):
            teacher = getattr(value, "teacher", None)
            words += [type(value).__name__, *([teacher.name] if teacher else [])]
        elif name == "seed":
            words.append(f"seed {value}")
    return ", ".join(dict.fromkeys([kind, *words]))


class Checkpoint:
    """Where a long stage leaves what it has so far, so that a killed run resumes inside it."""

    share = 0.1  # of the time that may go into saving

    def __init__(self, folder: Path, label: str):
        self.path, self.label = folder / "partial.safetensors", label
        self._began, self._before, self._next = time.monotonic(), 0.0, 0.0
        self._bar: tqdm | None = None

    @property
    def seconds(self) -> float:
        """Wall time spent on the stage: now, and before the checkpoint it was resumed from."""
        return self._before + time.monotonic() - self._began

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The tensors (on the CPU) and meta of the last save, None where there is none."""
        if (saved := _read(self.path, f"{self.label} starts anew")) is None:
            return None
        tensors, record = saved
        self._before = record["seconds"]
        return tensors, record["meta"]

    def save(self, make: Callable[[], tuple[Mapping[str, Tensor], Mapping]]) -> None:
        """Replace the checkpoint by the tensors and meta that `make` gives, if `share` of the time allows."""
        began = time.monotonic()
        if began >= self._next:
            tensors, meta = make()
            files.write_tensors(self.path, tensors, {"meta": meta, "seconds": self.seconds})
            now = time.monotonic()
            self._next = now + (now - began) / self.share

    def progress(self, done: int, total: int, **numbers: float) -> None:
        """Show that `done` of `total` steps are over, with numbers such as `loss=0.3`."""
        live = sys.stderr.isatty() or "ipykernel" in sys.modules
        if live and not os.environ.get("DINV_QUIET"):
            if self._bar is None:
                self._bar = tqdm(desc=self.label, total=total, initial=done, leave=False, file=sys.stderr)
            self._bar.set_postfix({name: float(value) for name, value in numbers.items()}, refresh=False)
            self._bar.update(done - self._bar.n)

    def log(self, state: str) -> None:
        """One line in `<cache root>/log`; the bar goes."""
        if self._bar is not None:
            self._bar.close()
        with open(files.cache_root() / "log", "a", encoding="utf-8") as file:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{when}  {state:8} {self.seconds:8.1f} s  {self.path.parent.name}  {self.label}\n")


def _read(path: Path, otherwise: str) -> tuple[dict[str, Tensor], dict] | None:
    """What a file holds; None if it is not there, or corrupt: then it goes, and that is told."""
    try:
        return files.read_tensors(path) if path.exists() else None
    except Corrupt as problem:
        print(f"dinv: {problem}: {otherwise}", file=sys.stderr)
        path.unlink(missing_ok=True)
        return None


def _load(path: Path, key: str, label: str, result_class: type) -> tuple[Any, float] | None:
    """The result and its seconds; None if there is none, or, which is told, that of another key."""
    if (kept := _read(path, f"{label} is made again")) is None:
        return None
    tensors, record = kept
    if record.get("key") != key:
        print(f"dinv: {path} is of another key: {label} is made again", file=sys.stderr)
        return None
    return files.unpacked(result_class, tensors, record["values"]), record["seconds"]


def _make(function: Callable[[], Any], checkpoint: Checkpoint, path: Path, key: str) -> None:
    """Make and store a result."""
    for leftover in path.parent.glob("*.tmp"):
        leftover.unlink()
    checkpoint.log("start")
    state = "stopped"
    try:
        tensors, values = files.packed(function())
        values |= {"seconds": checkpoint.seconds} if "seconds" in values else {}
        record = {"key": key, "label": checkpoint.label, "seconds": checkpoint.seconds, "values": values}
        files.write_tensors(path, tensors, record)
        checkpoint.path.unlink(missing_ok=True)
        state = "done"
    finally:
        checkpoint.log(state)
