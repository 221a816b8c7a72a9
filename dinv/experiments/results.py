"""Results: the tables and claims of a notebook, where they came from, and the pages that show them.

`figures/<profile>/results.csv` is the single source of every number that is shown anywhere.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student_t

from dinv.checks import near
from dinv.experiments import cache, device, processes
from dinv.experiments.overrides import flat
from dinv.experiments.profiles import SEEDED, load_profile
from dinv.experiments.settings import Profile
from dinv.files import cache_root, figures_root, locked, make_folder, repository_root, write_text

COLUMNS = "chapter,table,row,column,metric,value,sd,n,values,holds,command"
RICHEST_FIRST = ("paper", "gpu", "night", "cpu", "smoke")
LEDGER_STATUSES = ("at scale", "in the small", "open", "not attempted")
INTRODUCTION = """\
# Results

Table 1 and every claim, of all notebooks. *ours* is the mean ± standard deviation over n seeds. A claim holds
(*yes*) if all of the 95 % interval of its mean lies within the bound; with one seed it is *open*. The paper's
own numbers stand in the notebooks, beside its networks and its budgets. Written from each profile's
`results.csv`, which has every other number of the notebooks as well."""


def number(value: float, digits: int) -> str:
    """`value` with so many significant digits and no trailing zeros: 91.43, 0.00123, 256000."""
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and 1 <= abs(value) < 1e12 else text


def with_deviation(mean: float | str, sd: float | str) -> str:
    """91.43 ± 0.27: as many decimals as the deviation's second digit has, at most 4; 91.43 without one."""
    if sd == "":
        return number(float(mean), 4)
    mean, sd = float(mean), float(sd)
    decimals = min(max(1 - math.floor(math.log10(sd or abs(mean) / 100 or 1.0)), 0), 4)
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"


@dataclass(frozen=True)
class Claim:
    """A sentence about `values`, one per seed, whose mean lies from `at_least` to `at_most` if it is true."""

    sentence: str
    values: tuple[float, ...]
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean by Student's t; of a single value all numbers."""
        n, mean, half = len(self.values), float(np.mean(self.values)), math.inf
        if n > 1:
            half = float(student_t.ppf(0.975, n - 1) * np.std(self.values, ddof=1) / math.sqrt(n))
        return mean - half, mean + half

    @property
    def direction(self) -> bool:
        """Whether the mean is on the right side."""
        return bool(self.at_least <= np.mean(self.values) <= self.at_most)

    @property
    def holds(self) -> bool | None:
        """True if the whole interval lies within the bounds; None, open, for one value within them."""
        if len(self.values) == 1:
            return None if self.direction else False
        low, high = self.interval
        return self.at_least <= low and high <= self.at_most

    @property
    def bound(self) -> str:
        low, high = number(self.at_least, 6), number(self.at_most, 6)
        return f"≥ {low}" if high == "inf" else f"≤ {high}" if low == "-inf" else f"{low} to {high}"

    def __repr__(self) -> str:
        n, verdict = len(self.values), {True: "holds", False: "does not hold", None: "open"}[self.holds]
        ours = with_deviation(np.mean(self.values), np.std(self.values, ddof=1) if n > 1 else "")
        text = f"{verdict}: {self.sentence}: {ours} (n = {n})"
        return text + (", 95 % interval {:.4g} to {:.4g}".format(*self.interval) if n > 1 else "")

    _repr_markdown_ = __repr__


class Run:
    """One chapter's tables and claims, and where they came from.

    Args:
        chapter: the notebook's name, such as "02_feature_statistics", or "bench_" and a benchmark's.
        profile: its name picks the folder under `figures/`.
    """

    def __init__(self, chapter: str, profile: Profile):
        self.chapter, self.profile = chapter, profile
        self.folder = make_folder(figures_root() / profile.name, "DINV_FIGURES")
        make_folder(cache_root(), "DINV_CACHE")
        read_rows(self.folder), read_provenance(self.folder)  # a broken file is told of now
        self._began, self._stages = time.monotonic(), len(cache.ledger)
        self._rows: dict[tuple[str, ...], dict[str, str]] = {}
        self._claims: dict[str, Claim] = {}

    def table(self, name: str, cells: Mapping[str, Mapping[str, Any]], metric: str = "") -> pd.DataFrame:
        """Record {row: {column: a number, or one per seed}} and return it as text, "59.5 ± 2.0".

        It is in results.csv at once, whatever becomes of the run. The same cell again replaces.
        """
        shown, counts = {row: {} for row in cells}, set()
        for row, column in [(row, column) for row, entries in cells.items() for column in entries]:
            entry = self._record(name, row, column, metric, cells[row][column])
            shown[row][column] = with_deviation(entry["value"], entry["sd"])
            counts.add(int(entry["n"]))
        self._write()
        frame = pd.DataFrame.from_dict(shown, orient="index").fillna("")
        seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        return frame.rename_axis(columns=f"{metric} (n = {seeds})".strip())

    def claim(
        self, sentence: str, values: Any, at_least: float = -math.inf, at_most: float = math.inf
    ) -> Claim:
        """Record whether `values`, one per seed, bear a sentence out; ValueError without a bound."""
        if math.isinf(at_least) and math.isinf(at_most):
            raise ValueError(f"the claim {sentence!r} needs a bound: at_least=..., at_most=... or both")
        claim = Claim(sentence, tuple(_floats(sentence, values)), at_least, at_most)
        holds = {True: "yes", False: "no", None: "open"}[claim.holds]
        self._record("claims", sentence, claim.bound, "", claim.values, holds=holds)
        self._claims[sentence] = claim
        return claim

    def _record(self, table, row, column, metric, values, holds="") -> dict[str, str]:
        values = _floats(f"{table}, {row}, {column}", values)
        entry = (
            *(self.chapter, table, row, column, metric, number(np.mean(values), 6)),
            *(number(np.std(values, ddof=1), 3) if len(values) > 1 else "", str(len(values))),
            *(" ".join(number(value, 6) for value in values), holds),
            command_line(self.chapter, self.profile),
        )
        place = (table, row, metric) if table == "claims" else (table, row, column, metric)
        self._rows.pop(place, None)  # so that a table told once more has its own order
        self._rows[place] = dict(zip(COLUMNS.split(","), entry, strict=True))
        return self._rows[place]

    def directions(self, *sentences: str) -> None:
        """Print whether the means of these claims are on the right side: no number, to be compared."""
        for sentence in sentences:
            if sentence not in self._claims:
                raise ValueError(f"no claim {sentence!r} was made{near(sentence, self._claims)}")
            print(f"{sentence}: {'yes' if self._claims[sentence].direction else 'NO'}")

    def claims(self) -> pd.DataFrame:
        """All claims of this chapter so far."""
        return claims_table(self._frame())

    def _frame(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows.values(), columns=COLUMNS.split(","))

    def finish(self) -> None:
        """Write `results.csv` and `provenance.json` without what earlier runs of this chapter left there.

        Other columns of Table 1 stay, where this run was asked for some of them only.
        """
        self._write(earlier="distillation.pairs" in changed_settings(self.profile))

    def _write(self, earlier: bool = True) -> None:
        """Put the rows so far into results.csv, in place of the same cells or, not `earlier`, of the chapter.

        `seconds` is what the chapter takes with nothing cached. The ledger of its stages goes to
        `<cache root>/chapters/<profile>-<chapter>.json`.
        """
        stages, mine = cache.ledger[self._stages :], self._frame()
        cell = ["table", "row", "column", "metric"]
        first = {entry["folder"]: entry for entry in reversed(stages)}  # asked for again, it costs nothing
        found = sum(entry["seconds"] for entry in first.values() if entry["cached"])
        spent = time.monotonic() - self._began + found
        entry = provenance(self.chapter, self.profile) | {"seconds": round(spent, 1)}
        with locked(self.folder, str(self.folder)):
            rows = read_rows(self.folder)
            made, cells = set(mine[cell].itertuples(index=False)), rows[cell].itertuples(index=False)
            others = rows.chapter != self.chapter
            kept = [
                other or (earlier and place not in made) for other, place in zip(others, cells, strict=True)
            ]
            rows = pd.concat([rows[kept], mine])
            rows = rows.sort_values("chapter", kind="stable")
            chapters = read_provenance(self.folder) | {self.chapter: entry}
            write_text(self.folder / "results.csv", rows.to_csv(index=False, lineterminator="\n"))
            write_text(self.folder / "provenance.json", _json(dict(sorted(chapters.items()))))
        folder = make_folder(cache_root() / "chapters", "DINV_CACHE")
        ledger = {"seconds": entry["seconds"], "stages": stages}
        write_text(folder / f"{self.profile.name}-{self.chapter}.json", _json(ledger))


def _floats(where: str, values: Any) -> list[float]:
    numbers = np.atleast_1d(np.asarray(values, dtype=float)).tolist()
    if not numbers or not np.isfinite(numbers).all():
        raise ValueError(f"{where}: got {numbers}, expected one finite number per seed, and at least one")
    return numbers


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# ---- where they came from --------------------------------------------------------------------------
def changed_settings(profile: Profile) -> dict[str, Any]:
    """What `profile` has other than the profile of its name."""
    defaults = flat(load_profile(profile.name))
    return {name: value for name, value in flat(profile).items() if value != defaults[name]}


def command_line(chapter: str, profile: Profile) -> str:
    """The line that regenerates a chapter with this profile, every changed setting included."""
    if chapter.startswith("bench_"):
        return "./reproduce.sh bench"
    changed, words = changed_settings(profile), ["./reproduce.sh", "--profile", profile.name]
    words += ["--only", re.match(r"\d*", chapter).group() or chapter]
    if "seeds" in changed and all(getattr(profile, part).seeds == profile.seeds for part in SEEDED):
        changed = {name: value for name, value in changed.items() if not name.endswith("seeds")}
        words += ["--seeds", str(profile.seeds)]  # which sets them all
    for name, value in changed.items():
        names = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        words += ["--set", f"{name}={','.join(value) if names else value}"]
    return shlex.join(words)


def provenance(chapter: str, profile: Profile) -> dict[str, Any]:
    """Command, date, commit, changed settings, versions, device, threads, precision, peak memory in MiB."""
    commit, dirty, peak = None, None, None
    with suppress(ImportError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(OSError, subprocess.CalledProcessError):

        def git(*words: str) -> str:
            command = ["git", "-C", str(repository_root()), *words]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

        if not git("rev-parse", "--show-prefix"):  # else the checkout around it is somebody else's
            commit, dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "dinv"))
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    described = {"command": command_line(chapter, profile), "date": time.strftime("%Y-%m-%d")}
    described |= {"commit": commit, "dirty": dirty, "settings": changed_settings(profile)}
    described |= {"versions": versions | {"python": sys.version.split()[0]}, "device": device.device_name()}
    described |= {"processes": processes.count()}
    described |= {"threads": torch.get_num_threads(), "precision": device.precision()}
    described |= {"peak_memory_mb": peak and round(peak / (2**20 if sys.platform == "darwin" else 2**10))}
    return described | {"peak_cuda_memory_mb": round(torch.cuda.max_memory_reserved() / 2**20)}


def read_rows(folder: Path) -> pd.DataFrame:
    """The rows of `folder/results.csv`, all text; none without a file. ValueError for other columns."""
    path = folder / "results.csv"
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS.split(","), dtype=str)
    with suppress(ValueError):
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        whole = ",".join(rows) == COLUMNS and isinstance(rows.index, pd.RangeIndex)
        if whole and rows["command"].str.len().gt(0).all():
            return rows
    raise ValueError(
        f"{path} does not hold the columns {COLUMNS}: restore it, or delete it and reproduce all chapters"
    )


def read_provenance(folder: Path) -> dict[str, dict]:
    """`folder/provenance.json`, by chapter; empty where there is none. ValueError if it is not JSON."""
    path = folder / "provenance.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        message = "restore it, or delete it and reproduce its chapters again"
        raise ValueError(f"{path} is not JSON ({error}): {message}") from error


# ---- the pages ---------------------------------------------------------------------------------------
def _ours(rows: pd.DataFrame) -> list[str]:
    return [with_deviation(value, sd) for value, sd in zip(rows.value, rows.sd, strict=True)]


def claims_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The claims among the rows as people read them: claim, bound, ours, n, holds."""
    rows = rows[rows.table == "claims"]
    frame = rows.assign(claim=rows.row, bound=rows.column, ours=_ours(rows))
    return frame.set_index("claim")[["bound", "ours", "n", "holds"]]


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table of a frame of text, its index first."""
    frame = frame.reset_index()
    lines = [list(frame), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def results_page(figures: Path) -> str:
    """Table 1 and the claims, of every chapter by all profiles that have it; smoke's where no other has."""
    runs: dict[str, list] = {}
    for profile in RICHEST_FIRST:
        for chapter, rows in read_rows(figures / profile).groupby("chapter"):
            if profile != "smoke" or chapter not in runs:
                runs.setdefault(chapter, []).append((profile, rows))
    parts = []
    for chapter, profile, rows in ((name, *run) for name in sorted(runs) for run in runs[name]):
        table1 = rows[(rows.table == "table1") & rows.chapter.str.startswith("04")]
        cells = table1.assign(ours=_ours(table1)).pivot(index="row", columns="column", values="ours")
        frames = [cells.reindex(table1.row.unique()).fillna("").rename_axis("method"), claims_table(rows)]
        entry = read_provenance(figures / profile).get(chapter, {"device": "?", "command": "./reproduce.sh"})
        if any(map(len, frames)):
            parts.append(f"## {chapter}, {profile}\n\nOn {entry['device']}: `{entry['command']}`")
            parts += [markdown(frame) for frame in frames if len(frame)]
    parts = parts or ["No results yet: run `./reproduce.sh`."]
    return "\n\n".join([INTRODUCTION, *parts]) + "\n"


def ledger_page(figures: Path) -> str:
    """`ledger.csv` as a page: every table and figure of the paper, and what became of it here."""
    frame = pd.read_csv(figures / "ledger.csv", dtype=str, keep_default_na=False)
    counts = frame.status.value_counts()
    said = ", ".join(f"{counts.get(status, 0)} {status}" for status in LEDGER_STATUSES)
    frame["command"] = [f"`{command}`" if command else "" for command in frame.command]
    text = "Every table and figure of the paper, and what became of it here"
    return f"# Ledger\n\n{text}: {said}. Written from `ledger.csv`.\n\n{markdown(frame.set_index('item'))}\n"


def write_pages(figures: Path) -> None:
    """Write RESULTS.md and, from a ledger, LEDGER.md into the folder of figures."""
    write_text(figures / "RESULTS.md", results_page(figures))
    if (figures / "ledger.csv").exists():
        write_text(figures / "LEDGER.md", ledger_page(figures))
