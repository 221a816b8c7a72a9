"""`python -m dinv.reproduce`, what ./reproduce.sh runs: the notebooks in order, within a budget.

Exit status: 0 all well; 1 a notebook or a check failed, the others ran all the same; 2 the command
cannot be carried out as it is, or not on this machine; 75 the time budget is used up, and the same
command goes on; 130 interrupted.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from dinv import devices
from dinv.profiles import PROFILES, Profile, flat, load_profile
from dinv.reproduce import checks, cli, execution
from dinv.reproduce.clean import clean as remove
from dinv.reproduce.display import Display, duration
from dinv.reproduce.report import write_report
from dinv.runs import machine
from dinv.runs.results import Table, headline, read_provenance, read_rows, update_readme
from dinv.store import cache_root, figures_root, make_folder, repository_root

OK, FAILED, MISTAKEN, BUDGET_USED, INTERRUPTED = 0, 1, 2, 75, 130
TRACEBACK_LINES = 12


def main(argv: Sequence[str]) -> int:
    """Carry out one command; returns the exit status."""
    chosen = cli.parse(argv)
    words = {
        "reproduce": reproduce, "test": checks.test, "bench": checks.bench, "lab": lab, "clean": clean,
    }  # fmt: skip
    try:
        if chosen.list:
            return show_list(plan(chosen))
        return words[chosen.word](chosen, list(argv))
    except (ValueError, OSError) as error:
        print(f"reproduce.sh: {error}", file=sys.stderr)
        return MISTAKEN
    except KeyboardInterrupt:
        print("\nreproduce.sh: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def clean(chosen: Namespace, argv: list[str]) -> int:
    remove(repository_root(), chosen.dry_run)
    return OK


def lab(chosen: Namespace, argv: list[str]) -> int:
    execution.lab(cli.NOTEBOOKS, chosen.handed_on)
    return OK


# ---- what is to be done --------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One command, checked.

    Attributes:
        profile: with the settings of the command line.
        parameters: for the notebooks' cell of parameters.
        notebooks: in reading order.
        folder: where this profile's results are.
        provenance: of the last run, by chapter: what it took, and its stages.
    """

    profile: Profile
    parameters: dict
    notebooks: list[Path]
    folder: Path
    provenance: dict[str, dict]

    def stages(self, notebook: Path) -> list[dict]:
        """The stages of the notebook's last run, each with `cached`: whether it is stored now."""
        found = self.provenance.get(notebook.stem, {}).get("stages", [])
        return [stage | {"cached": (stage_folder(stage) / "meta.json").exists()} for stage in found]

    def expected(self) -> dict[Path, float | None]:
        """Seconds each notebook will take, by its last run and what is cached; None: not known."""
        result, made = {}, set()
        for notebook in self.notebooks:
            seconds = self.provenance.get(notebook.stem, {}).get("seconds")
            for stage in self.stages(notebook):
                if stage["cached"] or stage["key"] in made:
                    seconds -= stage["seconds"]
                made.add(stage["key"])
            result[notebook] = None if seconds is None else max(seconds, 0.0)
        return result


def plan(chosen: Namespace) -> Plan:
    """Check a command as far as it can be before anything runs; ValueError if it is wrong."""
    profile = load_profile(chosen.profile, chosen.set)
    settings = flat(profile)
    overrides = {key: settings[key] for key in chosen.set}
    overrides = {k: list(v) if isinstance(v, tuple) else v for k, v in overrides.items()}
    parameters = {"profile": profile.name, "seeds": chosen.seeds, "overrides": overrides}
    notebooks = sorted(cli.NOTEBOOKS.glob("[0-9]*.ipynb"))
    if chosen.only:
        notebooks = [path for path in notebooks if path.stem in chosen.only]
    if not notebooks:
        raise ValueError(f"there is no notebook to run in {cli.NOTEBOOKS}")
    for path in notebooks:
        execution.read(path)
    folder = figures_root() / profile.name
    read_rows(folder)
    check_forced(chosen.force)
    return Plan(profile, parameters, notebooks, folder, read_provenance(folder))


def stage_folder(stage: dict) -> Path:
    return cache_root() / f"{stage['kind']}-{stage['name']}-{stage['key'][:12]}"


def check_forced(patterns: Sequence[str]) -> None:
    """ValueError if `--force` names a stage that no run so far has had."""
    known = set()
    for name in PROFILES:
        for chapter in read_provenance(figures_root() / name).values():
            for stage in chapter["stages"]:
                known |= {stage["kind"], f"{stage['kind']}-{stage['name']}"}
    if cache_root().is_dir():
        known |= {path.name.rpartition("-")[0] for path in cache_root().glob("*-*-*/")}
    for pattern in patterns:
        if known and not any(fnmatch(stage, pattern) for stage in known):
            raise ValueError(
                f"--force: unknown stage {pattern!r}{cli.near(pattern, known)} "
                f"There are {', '.join(sorted(known))}"
            )


# ---- showing it ----------------------------------------------------------------------------------


def show_list(todo: Plan) -> int:
    """Notebooks and their stages: what is cached, and how long it will take."""
    print(title(todo))
    expected = todo.expected()
    for notebook in todo.notebooks:
        seconds = expected[notebook]
        last = todo.provenance.get(notebook.stem)
        took = f"{duration(last['seconds'])} from nothing" if last else "not run yet"
        now = f", {duration(seconds)} as things are" if seconds is not None else ""
        print(f"\n{notebook.stem}: {took}{now}")
        for stage in todo.stages(notebook):
            state = "cached" if stage["cached"] else f"to be made, {duration(stage['seconds'])}"
            print(f"  {stage['kind']} {stage['name']}  {state}")
    if any(seconds is not None for seconds in expected.values()):
        devices = {c["device"]: None for c in todo.provenance.values()}
        print(f"\nTimes are those of the last run, on {' and '.join(devices)}.")
    return OK


def title(todo: Plan) -> str:
    seeds = todo.parameters["seeds"] or todo.profile.seeds
    settings = "".join(f", {key}={value}" for key, value in todo.parameters["overrides"].items())
    number = len(todo.notebooks)
    return (
        f"dinv: profile {todo.profile.name}, {seeds} seed{'s' * (seeds > 1)}{settings}; "
        f"{number} notebook{'s' * (number > 1)}; results in {shown(todo.folder)}; {place(todo)}"
    )


def place(todo: Plan) -> str:
    """"on cpu: AMD EPYC, 2 threads", or that the profile cannot run here: to be listed it need not."""
    try:
        device = devices.pick(todo.profile.name)
    except ValueError:
        return "needs a CUDA device, and there is none"
    return f"on {machine.described(device)}"


def shown(path: Path) -> str:
    """A path as a person would type it here."""
    working = Path.cwd()
    return str(path.relative_to(working) if path.is_relative_to(working) else path)


def show_plan(todo: Plan) -> int:
    """`--dry-run`."""
    print(title(todo))
    for notebook, seconds in todo.expected().items():
        time_needed = "time not known" if seconds is None else f"about {duration(seconds)}"
        print(f"would run {shown(notebook)} ({time_needed})")
    return OK


# ---- doing it ------------------------------------------------------------------------------------


def reproduce(chosen: Namespace, argv: list[str]) -> int:
    """Run the notebooks, then write the report and print the results."""
    todo = plan(chosen)
    if chosen.dry_run:
        return show_plan(todo)
    device = devices.pick(todo.profile.name)
    make_folder(todo.folder, "DINV_FIGURES")
    make_folder(cache_root(), "DINV_CACHE")
    started = time.time()
    deadline = min(
        started + (chosen.budget or math.inf), float(os.environ.get("DINV_DEADLINE") or math.inf)
    )
    print(title(todo), flush=True)
    with tempfile.TemporaryDirectory(prefix="dinv-") as scratch, execution.own_kernel():
        progress = Path(scratch) / "progress.jsonl"
        variables = {
            "DINV_CACHE": str(cache_root()),
            "DINV_FIGURES": str(figures_root()),
            "DINV_DEVICE": device,
            "DINV_PROGRESS": str(progress),
            "DINV_FORCE": ",".join(chosen.force),
            "DINV_FORCE_SINCE": str(started),
            "DINV_DEADLINE": "" if deadline == math.inf else str(deadline),
        }
        with execution.environment(variables):
            status, failed = run_all(todo, progress, deadline, chosen.in_place, argv)
    if status == BUDGET_USED:
        return status
    # What the notebooks that did not fail have recorded is new: it is reported, and goes into the README.
    report = write_report(todo.folder, [path.stem for path in todo.notebooks], failed)
    readme = cli.NOTEBOOKS.parent / "README.md"
    if chosen.in_place and figures_root() == readme.parent / "figures":  # the README shows its own figures
        update_readme(readme, figures_root())
    show_results(todo, failed)
    done = f"{len(todo.notebooks) - len(failed)} of {len(todo.notebooks)}" if failed else "All"
    print(f"\n{done} done in {duration(time.time() - started)}. Report: {shown(report)}", flush=True)
    tell(failed)
    return status


def run_all(
    todo: Plan, progress: Path, deadline: float, in_place: bool, argv: list[str]
) -> tuple[int, list[str]]:
    """Run every notebook of the plan, as long as there is time, also after one failed.

    Returns:
        OK, FAILED or BUDGET_USED, and the names of those that failed.
    """
    failed: list[str] = []
    for number, source in enumerate(todo.notebooks, 1):
        status = BUDGET_USED
        if time.time() < deadline:
            print(f"[{number}/{len(todo.notebooks)}] {source.stem}", flush=True)
            began = time.monotonic()
            status = run_one(todo, source, progress)
        if status == BUDGET_USED:
            tell(failed)
            return stopped(todo, number, argv), failed
        output = executed(todo, source)
        if output.exists():  # unless its process died at once
            execution.write_html(output)
        if status == FAILED:
            failed.append(source.stem)
            continue
        if in_place:
            execution.write_in_place(output, source)
        print(f"  done in {duration(time.monotonic() - began)}: {shown(output)}", flush=True)
    return FAILED if failed else OK, failed


def tell(failed: list[str]) -> None:
    """Name the notebooks that failed, on stderr."""
    if failed:
        print(f"reproduce.sh: failed: {', '.join(failed)}; the reasons stand above", file=sys.stderr)


def executed(todo: Plan, source: Path) -> Path:
    return todo.folder / "notebooks" / source.name


def run_one(todo: Plan, source: Path, progress: Path) -> int:
    """Execute one notebook, showing its progress; OK, FAILED or BUDGET_USED."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    output = executed(todo, source)
    try:
        with Display(progress, sys.stdout):
            execution.execute(source, output, todo.parameters)
        return OK
    except PapermillExecutionError as error:
        if error.ename == "BudgetExceeded":
            return BUDGET_USED
        trace = execution.plain("\n".join(error.traceback)).splitlines()[-TRACEBACK_LINES:]
        reason = "\n".join(trace) or f"{error.ename}: {error.evalue}"
        where = f"in cell [{error.exec_count}]"
    except DeadKernelError:
        where, reason = "as its process died", "Most often that is for want of memory."
    print(f"\n{source.stem} failed {where}:\n\n{reason}\n", file=sys.stderr)
    print(f"reproduce.sh: executed so far: {shown(output)}", file=sys.stderr)
    return FAILED


def stopped(todo: Plan, number: int, argv: list[str]) -> int:
    """Say what is left, and how to go on."""
    left = ", ".join(path.stem for path in todo.notebooks[number - 1 :])
    words = without_force(argv)
    print(f"The time budget is used up; what was done is kept. Left: {left}.")
    again = "The same command goes on" if words == argv else "This goes on, forcing nothing again"
    print(f"{again}: {shlex.join(['./reproduce.sh', *words])}")
    return BUDGET_USED


def without_force(argv: list[str]) -> list[str]:
    """The command without `--force STAGE`, which would throw away what was just made."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--force" and not word.startswith("--force="):
            kept.append(word)
        skip = word == "--force"
    return kept


def show_results(todo: Plan, failed: Sequence[str] = ()) -> None:
    """The results of the notebooks that ran: what the paper has a number for, or a claim."""
    names = {path.stem for path in todo.notebooks} - set(failed)
    rows = [row for row in read_rows(todo.folder) if row["chapter"] in names]
    if rows:
        print(f"\n{Table(headline(rows), ('row', 'column', 'metric', 'paper', 'ours', 'holds'))}")

