"""What ./reproduce.sh runs once there is an environment: the notebooks, the checks, JupyterLab, the pages.

Exit status: 0 all well; 1 a notebook or a check failed, the others ran; 2 a mistake; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import write_kernel_spec
from tqdm import tqdm

from dinv.checks import near
from dinv.exercises import hand_out
from dinv.experiments import device, processes
from dinv.experiments.overrides import flat
from dinv.experiments.profiles import load_profile
from dinv.experiments.results import claims_table, read_provenance, read_rows, write_pages
from dinv.files import cache_root, figures_root, make_folder, repository_root, write_text

ROOT = repository_root()
SMALLER = (
    "The card's memory is too small for a batch: make it smaller, for a pool with --set batch_size=64, for a "
    "student with distillation.settings.batch_size, for a network with teacher_training.batch_size"
)
duration = tqdm.format_interval  # "02:06" or "1:02:06"


def main(argv: Sequence[str]) -> int:
    """Carry out one command; returns the exit status."""
    word, *rest = argv if argv and not argv[0].startswith("-") else ["reproduce", *argv]
    try:
        with tempfile.TemporaryDirectory(prefix="dinv-") as scratch:
            own_kernel(scratch)
            if processes.count() > 1 and word != "reproduce":
                raise ValueError(f"torchrun's processes would all do the same: `{word}` runs in one")
            if word == "reproduce":
                return reproduce(rest)
            if word == "student":
                return student(rest)
            return lab(rest) if word == "lab" else run_all(steps(word, rest, scratch))
    except (ValueError, OSError) as error:
        if processes.rank() == 0:
            print(f"reproduce.sh: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as reason:
        text = str(reason) or "interrupted"
        print(f"\nreproduce.sh: {text}; the same command goes on", file=sys.stderr, flush=True)
        return 1 if str(reason) else 130


def own_kernel(folder: str) -> None:
    """From now on the kernel `python3`, listed as dinv, is this interpreter: its file goes into `folder`."""
    # of late ipykernel warns of unencrypted local TCP, and of every interrupt at the end
    quiet = ["--IPKernelApp.log_level=CRITICAL"]
    write_kernel_spec(f"{folder}/kernels/python3", {"display_name": "dinv"}, quiet)
    for name, path in {"JUPYTER_PATH": folder, "PYTHONPATH": str(ROOT)}.items():
        os.environ[name] = os.pathsep.join(filter(None, (path, os.environ.get(name))))
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # ipykernel's debugger warns of frozen modules


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, dict, list[Path]]:
    """The options of `reproduce`, the parameters of the notebooks, and the paths of the notebooks."""
    parser = argparse.ArgumentParser("./reproduce.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--only", action="append", default=[], metavar="02,04")
    parser.add_argument("--seeds", type=int, default=0, help="instead of the profile's number of seeds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--imagenet", metavar="DIR", help="validation images of ImageNet, a folder a class")
    parser.add_argument("--list", action="store_true", help="show notebooks and stages, run nothing")
    parser.add_argument("--in-place", action="store_true", help="write the outputs into notebooks/")
    options, rest = parser.parse_known_args(words)
    if rest:
        known = [name for name in parser._option_string_actions if name.startswith("--")]
        raise ValueError(f"unknown option {rest[0]}{near(rest[0], known)} The options are {', '.join(known)}")
    changed = {name: value for name, _, value in (text.partition("=") for text in options.set)}
    if not all(name and value for name, value in changed.items()):
        raise ValueError(f"--set {' '.join(options.set)}: expected KEY=VALUE, such as inversion.steps=400")
    if options.imagenet:
        if not Path(options.imagenet).is_dir():
            raise ValueError(f"--imagenet: {options.imagenet!r} is no folder")
        changed["imagenet.folder"] = str(Path(options.imagenet).resolve())
    profile = load_profile(options.profile, changed | ({"seeds": options.seeds} if options.seeds else {}))
    overrides = {name: value for name, value in flat(profile).items() if name in changed}
    parameters = {"profile": profile.name, "seeds": options.seeds, "overrides": overrides}
    only = [name.strip() for text in options.only for name in text.split(",")]
    return options, json.loads(json.dumps(parameters)), notebooks(only)


def notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The notebooks in order, all or those with these numbers or names."""
    paths = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    names = {name: path for path in paths for name in (path.stem, path.stem.partition("_")[0])}
    for name in only:
        if name.zfill(2) not in names:
            stems = ", ".join(path.stem for path in paths)
            raise ValueError(f"--only: unknown notebook {name!r}{near(name, names)} There are {stems}")
    return sorted({names[name.zfill(2)] for name in only}) or paths


def reproduce(words: Sequence[str]) -> int:
    """Run the notebooks in order, also after one failed; then show the claims. Other ranks help."""
    options, parameters, sources = parse(words)
    folder, began, failed = figures_root() / parameters["profile"], time.monotonic(), []
    if options.list:
        return 0 if processes.rank() else show_list(folder, sources)
    if processes.count() > 1:
        processes.begin(folder.name)
    if processes.rank():
        processes.help_with([source.stem for source in sources])
        return 0
    os.environ |= {"DINV_DEVICE": device.pick(folder.name), "DINV_QUIET": "1"}
    make_folder(folder, "DINV_FIGURES"), make_folder(cache_root(), "DINV_CACHE")
    where = f"{os.environ['DINV_DEVICE']} in {device.precision()}"
    print(f"dinv: profile {folder.name} on {where}, progress in {cache_root() / 'log'}")
    for number, source in enumerate(sources, 1):
        print(f"[{number}/{len(sources)}] {source.stem}", flush=True)
        started, output = time.monotonic(), folder / "notebooks" / source.name
        os.environ["DINV_NOTEBOOK"] = source.stem
        reason = execute(source, output, parameters)
        if processes.count() > 1:
            processes.over(source.stem)
        if reason:
            failed.append(source.stem)
            print(f"\n{source.stem} failed:\n{reason}\n\nexecuted so far: {output}", file=sys.stderr)
            continue
        if options.in_place:
            notebook = tidy(*(nbformat.read(path, as_version=4) for path in (output, source)))
            write_text(source, nbformat.writes(notebook) + "\n")
        print(f"  done in {duration(time.monotonic() - started)}: {output}", flush=True)
    write_pages(figures_root())
    rows, done = read_rows(folder), {path.stem for path in sources} - set(failed)
    for sentence, claim in claims_table(rows[rows.chapter.isin(done)]).iterrows():
        print(f"{claim.holds:>4}  {sentence}: {claim.ours}, expected {claim.bound}")
    print(f"{len(done)} of {len(sources)} done in {duration(time.monotonic() - began)}: {folder}", flush=True)
    if failed:
        print(f"reproduce.sh: failed: {', '.join(failed)}; the reasons stand above", file=sys.stderr)
    return int(bool(failed))


def show_list(folder: Path, sources: Sequence[Path]) -> int:
    """The notebooks with the time of their last run, and their stages, cached or not."""
    provenance = read_provenance(folder)
    for source in sources:
        last = provenance.get(source.stem)
        took = f"{duration(last['seconds'])} on {last['device']}" if last else "not run yet"
        print(f"{source.stem}: {took}")
        ledger = cache_root() / "chapters" / f"{folder.name}-{source.stem}.json"
        for stage in json.loads(ledger.read_text(encoding="utf-8"))["stages"] if ledger.exists() else ():
            cached = (cache_root() / stage["folder"] / "data.safetensors").exists()
            print(f"  {stage['label']}: {'cached' if cached else 'to be made'}, {duration(stage['seconds'])}")
    return 0


def execute(source: Path, output: Path, parameters: Mapping) -> str:
    """Run a notebook from start to end into `output`; returns why it failed, "" if it did not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    options = {"kernel_name": "python3", "progress_bar": sys.stderr.isatty(), "cwd": source.parent}
    try:
        papermill.execute_notebook(source, output, parameters, **options)
    except Exception as error:  # a cell's, a dead kernel's, or what is no notebook
        lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()[-12:]
        return "\n".join(lines + [SMALLER] * ("OutOfMemoryError" in str(error)))
    return ""


def tidy(executed: nbformat.NotebookNode, source: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """`source` with the outputs and widgets of its execution and nothing else of it; cells count from 1."""
    code, ran = ([cell for cell in part.cells if cell.cell_type == "code"] for part in (source, executed))
    ran = [cell for cell in ran if "injected-parameters" not in cell.metadata.get("tags", ())]
    for count, (cell, done) in enumerate(zip(code, ran, strict=True), 1):
        cell.outputs, cell.execution_count = done.outputs, count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    source.metadata.update({name: executed.metadata[name] for name in {"widgets"} & set(executed.metadata)})
    return source


def steps(word: str, words: Sequence[str], scratch: str) -> dict[str, list[str]]:
    """What Python is called with for `test` (words go to pytest), `bench`, `book`; sets the environment."""
    if word != "test" and (words or word not in ("bench", "book")):
        raise ValueError(f"{' '.join([word, *words])!r}: expected `bench` or `book`, which take no options")
    profile = "smoke" if word == "test" else load_profile().name
    os.environ |= {"DINV_PROFILE": profile, "DINV_DEVICE": device.pick(profile), "DINV_QUIET": "1"}
    if word == "bench":
        return {path.stem: [str(path)] for path in sorted((ROOT / "benchmarks").glob("[!_]*.py"))}
    if word == "book":
        return {"book": ["book_source/build.py", "book"]}
    os.environ |= {"DINV_CACHE": f"{scratch}/runs", "DINV_FIGURES": f"{scratch}/figures"}
    os.environ.setdefault("DINV_PRECISION", "float32")  # outputs are compared, on every machine
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1800"]
    nbval += ["--ignore=notebooks/solutions", "notebooks"]  # solutions run where their cards are
    ruff = ["-m", "ruff", "check", "--no-cache", "."]
    return {"ruff": ruff, "pytest": [*pytest, *words], "nbval": [*pytest, *nbval]}


def run_all(commands: Mapping[str, Sequence[str]]) -> int:
    """Run Python with each of these, also after one failed; then a line with the time of each."""
    lines, failed = [], False
    for name, words in commands.items():
        print(f"── {name}: python {' '.join(words)}", flush=True)
        began, status = time.monotonic(), subprocess.run([sys.executable, *words], cwd=ROOT).returncode
        outcome, failed = f"FAILED (status {status})" if status else "passed", failed or status != 0
        lines.append(f"{name:8}  {outcome}, {duration(time.monotonic() - began)}")
    print("", *lines, sep="\n")
    return int(failed)


def student(words: Sequence[str]) -> int:
    """The notebooks for a class, and the solutions for its teacher; see `dinv.exercises`."""
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise ValueError(f"{' '.join(words)!r}: `student` takes the name of a folder, and nothing else")
    folder = Path(*words) if words else ROOT / "student"
    if (folder / "notebooks").resolve() == ROOT / "notebooks":
        raise ValueError(f"{folder} has the notebooks that the copies are made from: name another folder")
    hand_out(folder, notebooks())
    print(f"for the class, without outputs and solutions: {folder / 'notebooks'}")
    print(f"for the teacher: {folder / 'solutions.ipynb'}")
    return 0


def lab(words: Sequence[str]) -> int:
    """JupyterLab on notebooks/, in this process, until it is stopped."""
    from jupyterlab.labapp import LabApp

    if words[:1] not in ([], ["--"]):
        raise ValueError(f"unknown option {words[0]}: JupyterLab's stand after --, lab -- --port 8899")
    LabApp.launch_instance([f"--ServerApp.root_dir={ROOT / 'notebooks'}", "--allow-root", *words[1:]])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
