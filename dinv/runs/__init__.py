"""Stages that are made once, survive a kill, and account for their time; results that are recorded.

A stage is a long computation with a name: a teacher, a pool of images, a student. Its key is the
SHA-256 of what it depends on; `<cache root>/<kind>-<name>-<key>/` holds

    data.safetensors      the tensors
    meta.json             numbers beside them, the checksum of the tensors, seconds, versions
    partial.safetensors   the checkpoint of a stage that is not finished

Every write is a rename, so a killed run leaves whole files; a file that is corrupt all the same is
found by its checksum, named on stderr, and made again.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from dinv import profiles
from dinv.runs.machine import describe, versions
from dinv.runs.progress import Progress
from dinv.runs.results import Table, command_line, make_row, read_provenance, read_rows, save_chapter
from dinv.store import (
    Corrupt,
    cache_root,
    canonical_json,
    figures_root,
    locked,
    make_folder,
    read_record,
    read_tensors,
    repository_root,
    sha256_file,
    sha256_tensors,
    sha256_text,
    stored,
    write_record,
    write_tensors,
)

__all__ = [
    "BudgetExceeded", "Checkpoint", "Result", "Run",
    "cache_root", "figures_root", "repository_root", "stage_name",
]  # fmt: skip

_PROCESS_START = time.time()

Made = tuple[dict[str, Tensor], dict]


class BudgetExceeded(RuntimeError):
    """The time budget is used up. What was done is saved, and the same command goes on from it."""


def check_deadline() -> None:
    """Raise `BudgetExceeded` once DINV_DEADLINE (unix seconds) is over."""
    if time.time() > float(os.environ.get("DINV_DEADLINE") or math.inf):
        raise BudgetExceeded("the time budget is used up; the same command goes on from here")


@dataclass(frozen=True)
class Result:
    """What a stage made.

    Attributes:
        kind, name: as given to `Run.stage`.
        tensors: on the CPU, contiguous.
        meta: what JSON makes of the dictionary that the stage returned.
        key: SHA-256 of the file of tensors; give it to later stages as one of their `inputs`.
        seconds: wall time it took to make, end to end, over all resumed parts.
        cached: whether it was found rather than made.
        path: the stage's folder.
    """

    kind: str
    name: str
    tensors: dict[str, Tensor]
    meta: dict
    key: str
    seconds: float
    cached: bool
    path: Path

    def __repr__(self) -> str:  # the same at every run, as notebooks' outputs are compared
        return f"<{self.kind} {self.name}: {', '.join(self.tensors) or 'no tensors'}>"


class Checkpoint:
    """Where a long stage leaves what it has so far, so that a killed run resumes inside it."""

    def __init__(self, folder: Path, progress: Progress):
        self.path = folder / "partial.safetensors"
        self._progress = progress
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """Wall time spent on the stage: now, and before the checkpoint it was resumed from."""
        return self._before + time.monotonic() - self._progress.started

    def load(self) -> Made | None:
        """The tensors (on the CPU) and meta of the last `save`, None where there is none."""
        if not self.path.exists():
            return None
        try:
            tensors, text = read_tensors(self.path)
            checksum, _, content = text.partition(" ")
            if sha256_tensors(tensors, content) != checksum:
                raise Corrupt(f"{self.path} is corrupt (its checksum does not match)")
        except Corrupt as problem:
            self._progress.warn(f"{problem}: the stage starts anew")
            self.path.unlink(missing_ok=True)
            return None
        record = json.loads(content)
        self._before = record["seconds"]
        return tensors, record["meta"]

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping) -> None:
        """Replace the checkpoint, in one rename. Afterwards `BudgetExceeded` if time is up."""
        tensors = stored(tensors)
        _ = canonical_json(meta, "meta")
        content = canonical_json({"meta": meta, "seconds": self.seconds}, "checkpoint")
        write_tensors(self.path, tensors, f"{sha256_tensors(tensors, content)} {content}")
        check_deadline()

    def progress(self, done: int, total: int, **numbers: float) -> None:
        """Show that `done` of `total` steps are over, with numbers such as `loss=0.3`."""
        self._progress.update(done, total, numbers)


class Run:
    """One chapter's account: its stages, its results and where they came from.

    Args:
        chapter: the notebook's name, e.g. "02_feature_statistics".
        profile: from `profiles.load_profile`; its name picks the folder under `figures/`.
    """

    def __init__(self, chapter: str, profile):
        self.chapter, self.profile = chapter, profile
        self.folder = make_folder(figures_root() / profile.name, "DINV_FIGURES")
        make_folder(cache_root(), "DINV_CACHE")
        read_rows(self.folder), read_provenance(self.folder)  # a broken file is told of now
        self._started = time.monotonic()
        self._in_stages = 0.0
        self._stages: dict[Path, dict] = {}
        self._rows: dict[tuple, dict[str, str]] = {}

    # ---- stages --------------------------------------------------------------------------------

    def stage(
        self,
        kind: str,
        name: str,
        config: Mapping,
        make: Callable[[Checkpoint], Made],
        inputs: Sequence[str] = (),
        version: int = 1,
    ) -> Result:
        """Find or make one stage.

        Args:
            kind, name: e.g. "pool", "deepinversion-seed0"; letters, digits and `._+=-`.
            config: all that decides the result, as JSON can hold it.
            make: called with a `Checkpoint` if nothing is stored; returns tensors and a
                dictionary for JSON.
            inputs: keys of the results it builds on.
            version: raise it when the code makes something else of the same configuration.

        Errors: ValueError for a name or configuration that cannot be stored; BudgetExceeded when
        time is up and the stage is still to be made; OSError when the disk is full.
        """
        began = time.monotonic()
        stage = _Stage(kind, name, config, inputs, version)
        make_folder(stage.folder, "DINV_CACHE")
        progress = Progress(self.chapter, str(stage))
        with locked(stage.folder, str(stage)):
            stage.forget_if_forced()
            result = stage.load(progress)
            if result is None:
                result = stage.make(make, progress)
            else:
                progress.close("cached", seconds=result.seconds)
        self._in_stages += time.monotonic() - began
        self._stages[stage.folder] = {
            "kind": kind, "name": name, "key": stage.key, "sha256": result.key,
            "seconds": round(result.seconds, 2), "cached": result.cached,
        }  # fmt: skip
        return result

    # ---- results -------------------------------------------------------------------------------

    def record(
        self,
        table: str,
        row: str,
        column: str,
        metric: str,
        values: Sequence[float],
        paper: float | None = None,
        paper_mark: str = "",
        claim: str = "",
        holds: bool | None = None,
        seconds: float | None = None,
    ) -> None:
        """Record one number: `values`, one a seed, become mean, sample deviation and n.

        `paper` is the paper's number and `paper_mark` how well it is known: "V" confirmed in a
        second source, "S" one source, "M" recalled. `claim` is a sentence and `holds` whether these
        values bear it out (None: open). The same table, row, column and metric again replaces.
        """
        entry = make_row(
            self.chapter, table, row, column, metric, values, paper, paper_mark, claim, holds,
            seconds, command_line(self.chapter, self.profile),
        )  # fmt: skip
        self._rows[table, row, column, metric] = entry

    def table(self, table: str | None = None, columns: Sequence[str] | None = None) -> Table:
        """What was recorded, or one table of it, as *paper | ours, mean ± sd (n) | holds?*."""
        names = sorted({row["table"] for row in self._rows.values()})
        if table is not None and table not in names:
            raise ValueError(f"no table {table!r} was recorded; there are: {', '.join(names)}")
        rows = [row for row in self._rows.values() if table in (None, row["table"])]
        return Table(rows, columns)

    def check(self, name: str, value: float) -> None:
        """Print whether `value` lies within its band in `tests/bands.json`.

        The line holds no number as long as all is well, so a notebook's output can be compared.
        """
        path = repository_root() / "tests" / "bands.json"
        bands = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        band = bands.get(self.profile.name, {}).get(name)
        if band is None:
            print(f"{name}: no band")
        elif band[0] <= float(value) <= band[1]:
            print(f"{name}: within band")
        else:
            print(f"{name}: OUT OF BAND ({float(value):.6g}, band {band[0]:g} to {band[1]:g})")

    def finish(self) -> None:
        """Write `results.csv` and `provenance.json`, in place of this chapter's earlier entries.

        `seconds` in the provenance is what the chapter takes with nothing cached.
        """
        stages = list(self._stages.values())
        other = time.monotonic() - self._started - self._in_stages
        provenance = {
            "profile": self.profile.name,
            "command": command_line(self.chapter, self.profile),
            "seeds": getattr(self.profile, "seeds", None),
            "configuration": profiles.as_dict(self.profile),
            **describe(),
            "seconds": round(other + sum(stage["seconds"] for stage in stages), 2),
            "stages": stages,
        }
        save_chapter(self.folder, self.chapter, list(self._rows.values()), provenance)


# ---- the life of a stage -------------------------------------------------------------------------


def stage_name(text: str) -> str:
    """What a stage may be called, of any text: "1 % real" gives "1-percent-real"."""
    return re.sub(r"[^\w.+=]+", "-", text.replace("%", "percent"))


class _Stage:
    """One stage's folder, named by the hash of all that it depends on."""

    def __init__(self, kind, name, config, inputs=(), version=1):
        for word in (kind, name):
            if not re.fullmatch(r"[\w.+=-]+", word):
                raise ValueError(
                    f"a stage cannot be called {word!r}: expected letters, digits and ._+=- only"
                )
        self.kind, self.name = kind, name
        config = json.loads(canonical_json(config, "config"))
        self.parts = {"kind": kind, "name": name, "config": config, "version": version}
        self.parts["inputs"] = list(inputs)
        self.key = sha256_text(canonical_json(self.parts, "stage"))
        self.folder = cache_root() / f"{kind}-{name}-{self.key[:12]}"
        self.data, self.meta = self.folder / "data.safetensors", self.folder / "meta.json"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def forget_if_forced(self) -> None:
        """Drop what DINV_FORCE names, unless it was made since the command that forces it began."""
        patterns = os.environ.get("DINV_FORCE", "").split(",")
        names = (self.kind, f"{self.kind}-{self.name}")
        if not any(fnmatch(name, pattern) for name in names for pattern in patterns):
            return
        since = float(os.environ.get("DINV_FORCE_SINCE") or _PROCESS_START)
        for file in (self.meta, self.folder / "partial.safetensors"):
            if file.exists() and file.stat().st_mtime < since:
                file.unlink()

    def load(self, progress: Progress) -> Result | None:
        """The finished stage; None if it is not there, or corrupt, which is told."""
        if not self.meta.exists():
            return None
        try:
            record = read_record(self.meta)
            if record["key"] != self.key:
                raise Corrupt(f"{self.meta} belongs to another stage")
            found = sha256_file(self.data) if self.data.exists() else "none"
            if found != record["sha256"]:
                raise Corrupt(
                    f"{self.data} is corrupt or missing (SHA-256 {found[:12]}, "
                    f"expected {record['sha256'][:12]})"
                )
            tensors, _ = read_tensors(self.data)
        except Corrupt as problem:
            progress.warn(f"{problem}: {self} is made again")
            self.meta.unlink(missing_ok=True)
            return None
        return self._result(tensors, record, cached=True)

    def make(self, make: Callable[[Checkpoint], Made], progress: Progress) -> Result:
        """Make and store it: tensors first, then meta.json, which says that it is whole."""
        check_deadline()
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        progress.write("start")
        checkpoint = Checkpoint(self.folder, progress)
        try:
            tensors, meta = make(checkpoint)
            tensors, meta = stored(tensors), json.loads(canonical_json(meta, "meta"))
            write_tensors(self.data, tensors)
            record = self.parts | {
                "key": self.key, "sha256": sha256_file(self.data), "meta": meta,
                "seconds": checkpoint.seconds, "versions": versions(),
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }  # fmt: skip
            write_record(self.meta, record)
        except BaseException:
            progress.close("stopped")
            raise
        checkpoint.path.unlink(missing_ok=True)
        progress.close("done", seconds=record["seconds"])
        return self._result(tensors, record, cached=False)

    def _result(self, tensors: dict[str, Tensor], record: dict, cached: bool) -> Result:
        return Result(
            self.kind, self.name, tensors, record["meta"], record["sha256"], record["seconds"],
            cached, self.folder,
        )  # fmt: skip
