"""The report of a profile: results, where they came from, what they took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinv.reproduce.display import duration
from dinv.runs.results import Table, read_provenance, read_rows
from dinv.store import write_text

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ border: 1px solid #ccc; padding: .25em .6em; text-align: left }}
</style></head><body>
{body}
</body></html>
"""


def write_report(folder: Path, ran: Sequence[str] = (), failed: Sequence[str] = ()) -> Path:
    """Write `report.md` and `report.html` into a profile's folder; returns the page.

    All chapters with results are in it, and those that `ran`; of those that `failed` it says so.
    """
    from nbconvert.filters.markdown import markdown2html

    text = report(folder, ran, failed)
    write_text(folder / "report.md", text)
    body = markdown2html(text.replace(".ipynb)", ".html)"))
    page = folder / "report.html"
    write_text(page, PAGE.format(title=f"dinv, profile {folder.name}", body=body))
    return page


def report(folder: Path, ran: Sequence[str] = (), failed: Sequence[str] = ()) -> str:
    """The report as Markdown."""
    rows, provenance = read_rows(folder), read_provenance(folder)
    parts = [f"# Results, profile {folder.name}"]
    if not rows:
        parts.append("No notebook has recorded a result.")
    chapters = dict.fromkeys([*provenance, *(row["chapter"] for row in rows), *ran])
    for chapter in sorted(chapters):
        parts.append(f"## {chapter}")
        notebook = folder / "notebooks" / f"{chapter}.ipynb"
        if notebook.exists():
            parts.append(f"[Executed notebook](notebooks/{notebook.name})")
        if chapter in failed:
            parts.append("**It failed when it was last run.** What stands below may be of an earlier run.")
        own = [row for row in rows if row["chapter"] == chapter]
        if own:
            parts.append(Table(own).markdown())
        if chapter in provenance:
            parts += [origin(provenance[chapter]), times(provenance[chapter])]
    return "\n\n".join(filter(None, parts)) + "\n"


def origin(entry: dict) -> str:
    """One paragraph of provenance."""
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    commit = f"commit {entry['commit'][:12]}" if entry["commit"] else "outside a checkout"
    commit += " with changes" if entry["dirty"] else ""
    memory = f"{entry['peak_memory_mb']} MiB"
    if entry["peak_cuda_memory_mb"]:
        memory += f", {entry['peak_cuda_memory_mb']} MiB on the GPU"
    return (
        f"`{entry['command']}`, {entry['date']}, {commit}, {entry['seeds']} seeds, on "
        f"{entry['device']} with {entry['threads']} threads; {versions}; peak memory {memory}."
    )


def times(entry: dict) -> str:
    """Wall time by step, as a table."""
    stages = [(f"{stage['kind']} {stage['name']}", stage["seconds"]) for stage in entry["stages"]]
    rest = max(entry["seconds"] - sum(seconds for _, seconds in stages), 0.0)
    lines = [("step", "wall time"), ("---", "---")]
    lines += [(name, duration(seconds)) for name, seconds in [*stages, ("all else", rest)]]
    lines += [("**together**", f"**{duration(entry['seconds'])}**")]
    return "\n".join(f"| {name} | {text} |" for name, text in lines)
