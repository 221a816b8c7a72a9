"""Results: `results.csv`, the provenance beside it, and the tables made from them.

`figures/<profile>/results.csv` is the single source of every number that is shown anywhere.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from dinv import profiles
from dinv.store import locked, write_text

COLUMNS = (
    "chapter", "table", "row", "column", "metric", "value", "sd", "n", "paper", "paper_mark",
    "claim", "holds", "seconds", "command",
)  # fmt: skip
HOLDS = {True: "yes", False: "no", None: "open"}
RICHEST_FIRST = ("paper", "gpu", "cpu", "smoke")
README_BEGIN, README_END = "<!-- results:begin -->", "<!-- results:end -->"

Row = dict[str, str]


# ---- one row -----------------------------------------------------------------------------------


def make_row(
    chapter, table, row, column, metric, values, paper, paper_mark, claim, holds, seconds, command
) -> Row:
    """One line of `results.csv`; ValueError where the numbers or the mark cannot stand there."""
    where = f"{table}, {row}, {column}, {metric}"
    values = [float(value) for value in values]
    if not values:
        raise ValueError(f"{where}: no values; expected one a seed")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{where}: the values {values} are not all finite")
    if (paper is None) != (not paper_mark):
        raise ValueError(
            f"{where}: paper={paper!r} with paper_mark={paper_mark!r}; a number of the paper and "
            "its mark (V, S or M) go together"
        )
    if not re.fullmatch(r"([VSM]([+/][VSM])*)?", paper_mark):
        raise ValueError(f"{where}: paper_mark={paper_mark!r}; expected V, S, M, or e.g. S+M")
    if holds not in (True, False, None):
        raise ValueError(f"{where}: holds={holds!r}; expected True, False or None (open)")
    return {
        "chapter": chapter, "table": table, "row": row, "column": column, "metric": metric,
        "value": number(statistics.fmean(values), 6),
        "sd": number(statistics.stdev(values), 3) if len(values) > 1 else "",
        "n": str(len(values)),
        "paper": "" if paper is None else number(paper, 6), "paper_mark": paper_mark,
        "claim": " ".join(claim.split()), "holds": HOLDS[None if holds is None else bool(holds)],
        "seconds": "" if seconds is None else number(seconds, 3), "command": command,
    }  # fmt: skip


def number(value: float, digits: int) -> str:
    """`value` with so many significant digits and no trailing zeros: 91.43, 0.00123, 256000."""
    text = f"{value:.{digits}g}"
    if "e" in text and 1 <= abs(value) < 1e12:
        text = f"{float(text):.0f}"
    return text


def mean_and_deviation(row: Row) -> str:
    """"91.43 ± 0.27 (3)": as many decimals as the deviation's second digit, at most four."""
    value, n = float(row["value"]), row["n"]
    if not row["sd"]:
        return f"{number(value, 4)} ({n})"
    deviation = float(row["sd"])
    scale = deviation or abs(value) / 100 or 1.0
    decimals = min(max(1 - math.floor(math.log10(scale)), 0), 4)
    return f"{value:.{decimals}f} ± {deviation:.{decimals}f} ({n})"


def paper_number(row: Row) -> str:
    """"93.26 [V]": never a number of the paper without its mark."""
    marks = re.sub(r"\w", lambda mark: f"[{mark.group()}]", row["paper_mark"])
    return f"{row['paper']} {marks}" if row["paper"] else "–"


def command_line(chapter: str, profile) -> str:
    """The line that regenerates a chapter with this profile, every changed setting included.

    A chapter is a notebook's name, or "bench_" and the name of a benchmark.
    """
    if chapter.startswith("bench_"):
        return "./reproduce.sh bench"
    words = ["./reproduce.sh", "--profile", profile.name]
    words += ["--only", re.match(r"\d*", chapter).group() or chapter]
    defaults = profiles.flat(profiles.load_profile(profile.name))
    if profile.seeds != defaults["seeds"]:
        # --seeds sets them all
        defaults |= {f"{part}.seeds": getattr(profile, part).seeds for part in profiles.SEEDED}
    for key, value in profiles.flat(profile).items():
        if value != defaults[key]:
            words += ["--seeds", str(value)] if key == "seeds" else ["--set", f"{key}={value}"]
    return shlex.join(words)


# ---- files -------------------------------------------------------------------------------------


def read_rows(folder: Path) -> list[Row]:
    """The rows of `folder/results.csv`; none where there is no file."""
    path = folder / "results.csv"
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    whole = all(None not in row and None not in row.values() for row in rows)
    if tuple(reader.fieldnames or ()) != COLUMNS or not whole:
        raise ValueError(
            f"{path} does not hold the columns {','.join(COLUMNS)}: restore it, or delete it and "
            "reproduce its chapters again"
        )
    return rows


def read_provenance(folder: Path) -> dict[str, dict]:
    """`folder/provenance.json`, by chapter; empty where there is none."""
    path = folder / "provenance.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): restore it, or delete it and reproduce its chapters "
            "again"
        ) from error


def save_chapter(folder: Path, chapter: str, rows: Sequence[Row], provenance: dict) -> None:
    """Put a chapter's rows and provenance in place of its earlier ones; others' stay."""
    with locked(folder, str(folder)):
        others = [row for row in read_rows(folder) if row["chapter"] != chapter]
        merged = sorted([*others, *rows], key=lambda row: row["chapter"])
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
        chapters = read_provenance(folder) | {chapter: provenance}
        write_text(folder / "results.csv", text.getvalue())
        write_text(
            folder / "provenance.json",
            json.dumps(dict(sorted(chapters.items())), indent=1, ensure_ascii=False) + "\n",
        )


# ---- tables ------------------------------------------------------------------------------------

HEADERS = {"ours": "ours, mean ± sd (n)", "holds": "holds?"}
CELLS = {"ours": mean_and_deviation, "paper": paper_number}
DEFAULT_COLUMNS = ("profile", "table", "row", "column", "metric", "paper", "ours", "holds", "claim")


class Table:
    """Rows of results as people read them; `str`, Markdown and HTML.

    `columns` are names of `results.csv`, "ours" for mean ± deviation (n), and "profile" where rows of
    several are laid together. The default leaves out what is empty everywhere, and a `profile` or a
    `table` that is the same everywhere.
    """

    def __init__(self, rows: Sequence[Row], columns: Sequence[str] | None = None):
        unknown = set(columns or ()) - set(DEFAULT_COLUMNS) - set(COLUMNS)
        if unknown:
            raise ValueError(
                f"no column {', '.join(sorted(unknown))} in a table; there are: "
                f"{', '.join(dict.fromkeys(DEFAULT_COLUMNS + COLUMNS))}"
            )
        self.rows = list(rows)
        self.columns = tuple(columns or filter(self._worth_showing, DEFAULT_COLUMNS))

    def _worth_showing(self, column: str) -> bool:
        if column == "ours":
            return True
        found = {row.get(column, "") for row in self.rows}
        return len(found) > 1 or (column not in ("profile", "table") and found not in (set(), {""}))

    @property
    def cells(self) -> list[list[str]]:
        """The header and the rows, as text."""
        header = [HEADERS.get(column, column) for column in self.columns]
        return [header] + [
            [CELLS[column](row) if column in CELLS else row.get(column, "") for column in self.columns]
            for row in self.rows
        ]

    def __str__(self) -> str:
        cells = self.cells
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])

    __repr__ = __str__

    def markdown(self) -> str:
        """A Markdown table."""
        header, *rows = [[cell.replace("|", "\\|") for cell in line] for line in self.cells]
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def _repr_html_(self) -> str:
        header, *rows = [[html.escape(cell) for cell in line] for line in self.cells]
        lines = ["".join(f"<th>{cell}</th>" for cell in header)]
        lines += ["".join(f"<td>{cell}</td>" for cell in line) for line in rows]
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


# ---- the README's table ------------------------------------------------------------------------


def richest_rows(figures: Path) -> list[Row]:
    """The rows under `figures`, of every chapter those of the profile nearest to the paper's that has any.

    Each has its `profile` beside the columns of `results.csv`. A benchmark is a chapter like the others.
    """
    chapters: dict[str, list[Row]] = {}
    for profile in RICHEST_FIRST:
        found: dict[str, list[Row]] = {}
        for row in read_rows(figures / profile):
            found.setdefault(row["chapter"], []).append(row | {"profile": profile})
        chapters = found | chapters
    return [row for chapter in sorted(chapters) for row in chapters[chapter]]


def headline(rows: Sequence[Row]) -> list[Row]:
    """Table 1, and the rows with a number of the paper or a claim; all where there is no such row."""
    return [row for row in rows if row["paper"] or row["claim"] or row["table"] == "table1"] or list(rows)


def readme_results(figures: Path) -> str:
    """What stands between the README's markers: rows with a number of the paper or a claim."""
    rows = headline(richest_rows(figures))
    if not rows:
        return "No results yet: run `./reproduce.sh`."
    lines = []
    for profile in RICHEST_FIRST:
        chapters = {row["chapter"] for row in rows if row["profile"] == profile}
        provenance = read_provenance(figures / profile)
        devices = dict.fromkeys(provenance[name]["device"] for name in sorted(chapters) if name in provenance)
        if chapters:
            lines.append(
                f"Profile `{profile}` on {' and '.join(devices)}; "
                f"again with `./reproduce.sh --profile {profile}`."
            )
    return "\n\n".join([*lines, Table(rows).markdown()])


def update_readme(readme: Path, figures: Path) -> bool:
    """Write the table between the README's markers; returns whether anything changed."""
    text = readme.read_text(encoding="utf-8")
    if text.count(README_BEGIN) != 1 or text.count(README_END) != 1:
        raise ValueError(
            f"{readme} must hold the lines {README_BEGIN} and {README_END} once each: "
            "the table of results goes between them"
        )
    before, _, rest = text.partition(README_BEGIN)
    after = rest.partition(README_END)[2]
    new = f"{before}{README_BEGIN}\n{readme_results(figures)}\n{README_END}{after}"
    if new != text:
        write_text(readme, new)
    return new != text
