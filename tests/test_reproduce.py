"""The one command: notebooks in order, within a budget, with a report; the checks; the display."""

import io
import json
import os
import re
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dinv import reproduce
from dinv.profiles import load_profile
from dinv.reproduce import checks, cli, display, execution, report
from dinv.runs import Run
from dinv.runs.results import README_BEGIN, README_END, read_provenance, read_rows

PARAMETERS = 'profile = "auto"  # smoke, cpu, gpu or paper\nseeds = 0\noverrides = {}'
PLAIN = [
    "import os, sys",
    "(profile, seeds, overrides, os.path.basename(os.getcwd()), os.environ['DINV_DEVICE'] != 'auto')",
    "sys.executable",
]
STAGED = [
    "import os, torch\n"
    "from dinv.profiles import load_profile\n"
    "from dinv.runs import Run\n"
    'run = Run("01_staged", load_profile(profile, overrides))',
    "def make(checkpoint):\n"
    "    first = checkpoint.load()[1]['step'] if checkpoint.path.exists() else 0\n"
    "    for step in range(first, 10):\n"
    "        checkpoint.progress(step + 1, 10, loss=1 / (step + 1))\n"
    "        if first == 0 and step == 3:\n"
    "            os.environ['DINV_DEADLINE'] = '1'  # 1970: time is up\n"
    "        checkpoint.save({}, {'step': step + 1})\n"
    "    return {'x': torch.arange(10)}, {'first': first}\n"
    'result = run.stage("count", "ten", {}, make)',
    'run.record("table1", "adi", "", "top1", [93.1, 93.3], paper=93.26, paper_mark="V",\n'
    '           claim="it counts", holds=result.meta["first"] == 4)\n'
    "run.finish()",
]


def write_notebook(path: Path, *cells: str, parameters: int = 1) -> None:
    tagged = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"], "papermill": {"a": "b"}})
    notebook = new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "P", "language": "python"}},
        cells=[new_markdown_cell("# Title"), *[tagged] * parameters, *map(new_code_cell, cells)],
    )
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def isolate(patch, folder: Path) -> None:
    for name in ("DEADLINE", "DEVICE", "FORCE", "FORCE_SINCE", "PROGRESS", "PROFILE"):
        patch.delenv(f"DINV_{name}", raising=False)
    patch.setenv("DINV_CACHE", str(folder / "runs"))
    patch.setenv("DINV_FIGURES", str(folder / "figures"))
    patch.setattr(cli, "NOTEBOOKS", folder / "notebooks")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    isolate(monkeypatch, tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def command(*argv: str) -> tuple[int, str, str]:
    """Status, output and errors of one command."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = reproduce.main(argv)
    return status, out.getvalue(), err.getvalue()


# ---- a whole run: stopped by its budget, then gone on with ---------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, module_patch):
    """Two notebooks; a kernel `python3` of the user's that must play no part."""
    folder = tmp_path_factory.mktemp("whole")
    isolate(module_patch, folder)
    write_notebook(folder / "notebooks" / "00_plain.ipynb", *PLAIN)
    write_notebook(folder / "notebooks" / "01_staged.ipynb", *STAGED)
    readme = f"# T\n{README_BEGIN}\n{README_END}\n"
    (folder / "README.md").write_text(readme)
    wrong = folder / "jupyter" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text('{"argv": ["/bin/false"], "language": "python"}')
    module_patch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
    module_patch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    settings = ["--profile", "smoke", "--seeds", "3", "--set", "inversion.steps=7"]
    first = command(*settings, "--only", "01", "--budget", "1h", "--force", "count")
    second = command(*settings, "--in-place")
    return folder, first, second


def test_a_used_up_budget_is_told_with_what_is_left(whole):
    folder, (status, out, err), _ = whole
    assert status == 75 and err == ""
    assert "  count ten  stopped at 4/10 after " in out
    assert "budget is used up; what was done is kept. Left: 01_staged." in out
    assert out.endswith(
        "./reproduce.sh --profile smoke --seeds 3 --set inversion.steps=7 --only 01 --budget 1h\n"
    )


def test_the_same_command_goes_on_and_ends_with_table_and_report(whole):
    folder, _, (status, out, err) = whole
    assert status == 0 and err == ""
    lines = out.splitlines()
    assert lines[0].startswith("dinv: profile smoke, 3 seeds, inversion.steps=7; 2 notebooks; ")
    assert re.search(r"; on (cpu|cuda): .+$", lines[0])
    assert lines[1] == "[1/2] 00_plain" and "[2/2] 01_staged" in lines
    assert "  count ten: started" in lines
    assert "93.26 [V]  93.20 ± 0.14 (2)     yes" in out
    assert lines[-1].endswith("figures/smoke/report.html")
    assert read_rows(folder / "figures" / "smoke")[0]["holds"] == "yes"


def test_the_kernel_is_this_interpreter_and_gets_the_parameters(whole):
    folder = whole[0]
    notebook = nbformat.read(folder / "notebooks" / "00_plain.ipynb", as_version=4)
    seen, interpreter = notebook.cells[3], notebook.cells[4]
    expected = "('smoke', 3, {'inversion.steps': 7}, 'notebooks', True)"
    assert seen.outputs[0].data["text/plain"] == expected
    assert interpreter.outputs[0].data["text/plain"] == repr(sys.executable)


def test_in_place_leaves_nothing_but_outputs(whole):
    path = whole[0] / "notebooks" / "00_plain.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert [cell.id for cell in notebook.cells] == [f"cell-{n}" for n in range(5)]
    assert notebook.cells[1].source == PARAMETERS
    assert notebook.cells[1].metadata == {"tags": ["parameters"]}
    assert all(cell.metadata == {} for cell in notebook.cells[2:])
    counts = [cell.execution_count for cell in notebook.cells[1:]]
    assert counts == [1, 2, 3, 4] and notebook.cells[3].outputs[0].execution_count == 3
    assert notebook.metadata.keys() == {"kernelspec"}


def test_executed_notebooks_and_report(whole):
    folder = whole[0] / "figures" / "smoke"
    for name in ("00_plain", "01_staged"):
        text = (folder / "notebooks" / f"{name}.ipynb").read_text()
        assert "injected-parameters" in text and '"papermill"' not in text
        assert "<html" in (folder / "notebooks" / f"{name}.html").read_text()
    report = (folder / "report.md").read_text()
    assert "[Executed notebook](notebooks/01_staged.ipynb)" in report
    assert "| adi | top1 | 93.26 [V] | 93.20 ± 0.14 (2) | yes | it counts |" in report
    assert "`./reproduce.sh --profile smoke --only 01 --set inversion.steps=7`" in report
    assert "| count ten |" in report and "peak memory" in report
    page = (folder / "report.html").read_text()
    assert '<a href="notebooks/01_staged.html">' in page and "<td>93.26 [V]</td>" in page


def test_the_readme_is_regenerated_in_place(whole):
    assert "| adi | top1 | 93.26 [V] | 93.20 ± 0.14 (2) | yes |" in (
        whole[0] / "README.md"
    ).read_text()


def test_figures_elsewhere_leave_the_readme_alone(whole, monkeypatch):
    readme = whole[0] / "README.md"
    monkeypatch.setenv("DINV_FIGURES", str(whole[0] / "other"))
    before = readme.read_text()
    readme.write_text(f"# T\n{README_BEGIN}\n{README_END}\n")
    status, _, _ = command("--profile", "smoke", "--only", "01", "--in-place")
    assert status == 0 and (whole[0] / "other" / "smoke" / "report.md").is_file()
    assert readme.read_text() == f"# T\n{README_BEGIN}\n{README_END}\n"
    readme.write_text(before)


def test_list_tells_what_is_cached(whole, monkeypatch):
    status, out, _ = command("--profile", "smoke", "--list")
    assert status == 0 and "00_plain: not run yet" in out
    assert "01_staged: " in out and "  count ten  cached" in out and "as things are" in out
    monkeypatch.setenv("DINV_CACHE", str(whole[0] / "elsewhere"))
    assert "  count ten  to be made, " in command("--profile", "smoke", "--list")[1]


def test_a_misspelt_stage(whole):
    status, _, err = command("--profile", "smoke", "--force", "cuont")
    assert status == 2
    assert "unknown stage 'cuont': did you mean count? There are count, count-ten" in err


# ---- what ends early -----------------------------------------------------------------------------


def test_a_notebook_that_fails_does_not_stop_the_others(folder):
    write_notebook(folder / "notebooks" / "00_bad.ipynb", "x = 1", "def f():\n    1 / 0\nf()")
    write_notebook(folder / "notebooks" / "01_next.ipynb")
    for name in ("00_bad", "01_next"):
        run = Run(name, load_profile("smoke"))
        run.record("own", f"row of {name}", "", "top1", [1.0], claim="it counts", holds=True)
        run.finish()
    (folder / "README.md").write_text(f"{README_BEGIN}\n{README_END}\n")
    before = (folder / "notebooks" / "00_bad.ipynb").read_bytes()
    status, out, err = command("--profile", "smoke", "--in-place")
    assert status == 1
    assert "00_bad failed in cell [4]:" in err and "ZeroDivisionError: division by zero" in err
    assert "\x1b" not in err and len(err.splitlines()) < 20
    partial = folder / "figures" / "smoke" / "notebooks" / "00_bad.ipynb"
    assert f"executed so far: {partial}" in err and "ZeroDivisionError" in partial.read_text()
    assert (folder / "notebooks" / "00_bad.ipynb").read_bytes() == before

    assert err.endswith("reproduce.sh: failed: 00_bad; the reasons stand above\n")
    assert "[2/2] 01_next" in out and "\n1 of 2 done in " in out
    assert "row of 01_next" in out and "row of 00_bad" not in out, "its results are an earlier run's"
    assert "| row of 01_next |" in (folder / "README.md").read_text()
    text = (folder / "figures" / "smoke" / "report.md").read_text()
    assert "## 00_bad" in text and text.count("It failed when it was last run") == 1
    assert "ZeroDivisionError" in partial.with_suffix(".html").read_text()


def test_a_budget_that_ends_after_a_failure_tells_both(folder):
    write_notebook(folder / "notebooks" / "00_bad.ipynb", "import time\ntime.sleep(3)\n1 / 0")
    write_notebook(folder / "notebooks" / "01_next.ipynb")
    status, out, err = command("--profile", "smoke", "--budget", "3s")
    assert status == 75 and "Left: 01_next." in out and "reproduce.sh: failed: 00_bad;" in err
    assert not (folder / "figures" / "smoke" / "report.md").exists()


def test_a_budget_that_is_over_before_a_notebook_starts(folder):
    write_notebook(folder / "notebooks" / "00_a.ipynb")
    write_notebook(folder / "notebooks" / "01_b.ipynb")
    status, out, _ = command("--profile", "smoke", "--budget", "0.000001s")
    assert status == 75 and "Left: 00_a, 01_b." in out
    assert "The same command goes on: ./reproduce.sh --profile smoke --budget 0.000001s" in out


def test_dry_run_runs_nothing(folder):
    write_notebook(folder / "notebooks" / "00_a.ipynb", "1 / 0")
    status, out, _ = command("--profile", "smoke", "--dry-run")
    assert status == 0 and "00_a.ipynb (time not known)" in out
    assert not (folder / "figures").exists() and not (folder / "runs").exists()


def test_expected_time_counts_a_shared_stage_once(folder):
    for name in ("00_a", "01_b"):
        write_notebook(folder / "notebooks" / f"{name}.ipynb")
    stage = {"kind": "network", "name": "small", "key": "0" * 64, "seconds": 100.0}
    chapter = {"seconds": 130.0, "stages": [stage], "device": "CPU"}
    (folder / "figures" / "smoke").mkdir(parents=True)
    (folder / "figures" / "smoke" / "provenance.json").write_text(
        json.dumps({"00_a": chapter, "01_b": chapter})
    )
    status, out, _ = command("--profile", "smoke", "--dry-run")
    assert "00_a.ipynb (about 2:10)" in out and "01_b.ipynb (about 0:30)" in out


@pytest.mark.parametrize(
    "cells, message",
    [({"parameters": 0}, "has 0 cells tagged 'parameters'"), (None, "is not a notebook")],
)
def test_a_notebook_that_cannot_be_run_is_told_before_anything_runs(folder, cells, message):
    path = folder / "notebooks" / "00_a.ipynb"
    path.write_text("{")
    if cells:
        write_notebook(path, **cells)
    status, _, err = command("--profile", "smoke")
    assert status == 2 and str(path) in err and message in err


@pytest.mark.parametrize("argv", [["--profile", "gpu"], ["test", "--profile", "paper"], ["bench"]])
def test_without_cuda_what_needs_it_is_refused(folder, monkeypatch, argv):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DINV_PROFILE", "gpu")  # for bench
    write_notebook(folder / "notebooks" / "00_a.ipynb")
    status, out, err = command(*argv)
    assert status == 2 and out == "" and "needs a CUDA device, and there is none: torch" in err
    assert not (folder / "figures").exists()
    status, out, _ = command("--profile", "gpu", "--list")
    assert status == 0 and "; needs a CUDA device, and there is none\n" in out
    monkeypatch.setenv("DINV_DEVICE", "cpu")
    assert "; on cpu: " in command("--profile", "gpu", "--dry-run")[1]


def test_the_cpu_is_wished_for_although_there_is_a_card(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    write_notebook(folder / "notebooks" / "00_a.ipynb")
    assert "profile gpu, " in (out := command("--dry-run")[1]) and "; on cuda: H100\n" in out
    assert "; on cpu: " in command("--profile", "cpu", "--dry-run")[1]
    monkeypatch.setenv("DINV_DEVICE", "cpu")
    assert "profile cpu, " in (out := command("--dry-run")[1]) and "; on cpu: " in out


def test_no_notebook(folder):
    status, _, err = command()
    assert status == 2 and f"there is no notebook to run in {folder / 'notebooks'}" in err


def test_a_file_where_the_cache_should_be(folder, monkeypatch):
    write_notebook(folder / "notebooks" / "00_a.ipynb")
    (folder / "runs").write_text("")
    status, _, err = command("--profile", "smoke")
    assert status == 2 and "is a file, but a folder should be there" in err


def test_a_wrong_setting_ends_before_anything_runs(folder):
    write_notebook(folder / "notebooks" / "00_a.ipynb")
    with pytest.raises(SystemExit) as stopped, redirect_stderr(io.StringIO()) as err:
        reproduce.main(["--profile", "smoke", "--set", "inversion.stesp=4"])
    assert stopped.value.code == 2 and "did you mean inversion.steps" in err.getvalue()


@pytest.mark.parametrize(
    "argv, kept",
    [
        (["--force", "pool", "--only", "02"], ["--only", "02"]),
        (["--force=pool"], []),
        (["--profile", "cpu"], ["--profile", "cpu"]),
    ],
)
def test_going_on_forces_nothing_again(argv, kept):
    assert reproduce.without_force(argv) == kept


# ---- in-place editing and reports, without a kernel ----------------------------------------------


def test_tidy_keeps_widgets_and_drops_the_injected_cell():
    source = new_notebook(cells=[new_code_cell("a"), new_code_cell("b", metadata={"tags": ["t"]})])
    executed = nbformat.from_dict(source)
    executed.cells.insert(1, new_code_cell("p", metadata={"tags": ["injected-parameters"]}))
    executed.cells[2].outputs = [nbformat.v4.new_output("stream", text="said")]
    executed.metadata["widgets"] = {"state": 1}
    executed.metadata["papermill"] = {"input_path": "/home/somebody"}
    result = execution.tidy(executed, source)
    assert [cell.source for cell in result.cells] == ["a", "b"]
    assert result.cells[1].outputs[0].text == "said" and result.cells[1].metadata.tags == ["t"]
    assert result.metadata == {"widgets": {"state": 1}}


def test_a_report_without_results(folder):
    (folder / "figures" / "cpu").mkdir(parents=True)
    assert "No notebook has recorded a result." in report.report(folder / "figures" / "cpu")
    assert read_provenance(folder / "figures" / "cpu") == {}


# ---- the display ---------------------------------------------------------------------------------


def line(state: str, done=0, total=None, elapsed=0.0, **more) -> dict:
    return {
        "time": time.time(), "chapter": "c", "stage": "pool a", "state": state, "done": done,
        "total": total, "numbers": {}, "elapsed": elapsed,
    } | more  # fmt: skip


def test_the_running_line_has_rate_and_time_left():
    first = line("run", 100, 400, elapsed=10.0)  # resumed at 100
    last = line("run", 200, 400, elapsed=30.0, numbers={"loss": 0.51234})
    text = display.running_line(first, last)
    assert text == "  pool a  ━━━━━━━━━━──────────  200/400  5/s  0:40 left  loss 0.512"
    assert display.running_line(None, line("start", elapsed=61)) == "  pool a  1:01"


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0s"), (9.94, "9.9s"), (9.96, "0:10"), (126, "2:06"), (3726, "1:02:06")],
)
def test_durations(seconds, text):
    assert display.duration(seconds) == text


def show(lines: list[dict], folder: Path, out, every=30.0) -> str:
    with display.Display(folder / "progress.jsonl", out, every):
        for entry in lines:
            with open(folder / "progress.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            time.sleep(0.25)
    return out.getvalue()


def test_a_log_gets_a_line_at_start_and_end_and_now_and_then(tmp_path):
    lines = [
        line("start"),
        line("run", 1, 4, 0.1),
        line("run", 3, 4, 0.3),
        line("warning", message="x is corrupt"),
        line("done", 4, 4, 0.4, seconds=126.0),
        line("cached", seconds=5.0),
    ]
    ends = ["  pool a  done in 2:06", "  pool a  cached (5.0s when it was made)"]
    quiet = show(lines, tmp_path, io.StringIO()).splitlines()
    assert quiet == ["  pool a: started", "  warning: x is corrupt", *ends]
    often = show(lines, tmp_path, io.StringIO(), every=0.1).splitlines()
    assert any("3/4" in text for text in often) and often[-2:] == ends


def test_a_terminal_gets_one_line_that_changes(tmp_path, monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", "40")
    lines = [line("start"), line("run", 1, 4, 0.1), line("done", 4, 4, seconds=1.0)]
    text = show(lines, tmp_path, out)
    frames = text.split("\r\x1b[K")
    assert any("1/4" in frame for frame in frames) and "  pool a  done in 1.0s\n" in frames
    assert max(len(frame) for frame in frames) <= 40 and frames[-1] == ""


# ---- test and bench ------------------------------------------------------------------------------


def run_codes(*codes: str, **chosen) -> tuple[int, str]:
    options = {"dry_run": False, "budget": None} | chosen
    with redirect_stdout(io.StringIO()) as out:
        commands = {f"step{n}": [sys.executable, "-c", code] for n, code in enumerate(codes)}
        status = checks.run_all(commands, type("Chosen", (), options)())
    return status, out.getvalue()


def test_every_check_runs_even_after_one_failed(tmp_path):
    mark = tmp_path / "ran"
    status, out = run_codes("raise SystemExit(3)", f"open({str(mark)!r}, 'w')")
    assert status == 1 and mark.exists()
    last = out.splitlines()[-2:]
    assert last[0].startswith("step0  FAILED (status 3), ")
    assert last[1].startswith("step1  passed, ")


def test_checks_keep_to_the_budget():
    status, out = run_codes("import time; time.sleep(60)", "pass", budget=0.5)
    assert status == 75
    assert "step0  not finished: the time budget is used up" in out
    assert "step1  not run: the time budget is used up" in out


def test_what_the_word_test_runs(folder):
    write_notebook(folder / "notebooks" / "00_a.ipynb")
    status, out, _ = command("test", "--dry-run")
    assert status == 0
    ruff, pytest_line, nbval = out.splitlines()
    assert ruff.startswith(f"would run {sys.executable} -m ruff check") and ruff.endswith(" .")
    assert pytest_line.endswith("-m 'not slow and not network' tests")
    assert "--nbval-lax" in nbval and nbval.endswith(str(folder / "notebooks"))
    assert "-m '' tests" in command("test", "--dry-run", "--slow")[1]
    only = command("test", "--dry-run", "--only", "00")[1]
    assert only.splitlines()[2].endswith(str(folder / "notebooks" / "00_a.ipynb"))


@pytest.mark.parametrize(
    "option", [["--set", "inversion.steps=4"], ["--seeds", "2"], ["--force", "x"]]
)
def test_settings_that_a_word_would_not_heed(folder, option):
    status, _, err = command("test", *option)
    assert status == 2 and f"{option[0]} goes with `reproduce`, not with `test`" in err


def test_the_environment_is_as_before_afterwards():
    before = dict(os.environ)
    with execution.own_kernel():
        assert os.environ["JUPYTER_PATH"] != before.get("JUPYTER_PATH")
    assert dict(os.environ) == before
