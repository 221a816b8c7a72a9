"""The notebooks in order, in place, after failures; the checks; what is misspelt."""

import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dinv import reproduce
from dinv.experiments.overrides import flat
from dinv.experiments.profiles import PROFILES, load_profile
from dinv.experiments.results import Run

CHECKOUT = reproduce.ROOT
PARAMETERS = 'profile = "auto"\nseeds = 0\noverrides = {}'
PLAIN = "import os, sys\n(profile, seeds, overrides, os.path.basename(os.getcwd()), sys.executable)"
CLAIM = """
from dinv.experiments.profiles import load_profile
from dinv.experiments.results import Run
run = Run("01_claim", load_profile(profile, overrides))
run.claim("it counts", [3.0, 3.1, 3.2], at_least=2)
run.finish()"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkout of the test's own, in which a kernel `python3` of the user's plays no part."""
    (tmp_path / "notebooks").mkdir()
    wrong = tmp_path / "jupyter" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "X", "language": "python"}')
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    own = {"DINV_CACHE": tmp_path / "runs", "DINV_FIGURES": tmp_path / "figures", "PYTHONPATH": CHECKOUT}
    own |= {"DINV_DEVICE": "", "DINV_PROFILE": "", "JUPYTER_PATH": tmp_path / "jupyter"}
    with mock.patch.dict(os.environ, {name: str(path) for name, path in own.items()}):
        yield tmp_path


def write_notebook(folder: Path, name: str, *codes: str) -> Path:
    tagged = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    metadata = {"kernelspec": {"name": "python3", "display_name": "P", "language": "python"}}
    cells = [new_markdown_cell("# T"), tagged, *map(new_code_cell, codes)]
    path = folder / "notebooks" / f"{name}.ipynb"
    nbformat.write(new_notebook(metadata=metadata, cells=cells), path)
    return path


def test_notebooks_run_in_order_in_place_and_one_that_fails_does_not_stop_the_others(folder, capsys):
    bad = write_notebook(folder, "00_bad", "def f():\n    1 / 0\nf()")
    write_notebook(folder, "01_claim", CLAIM)
    plain = write_notebook(folder, "02_plain", PLAIN)
    before, ids = bad.read_bytes(), [cell.id for cell in nbformat.read(plain, as_version=4).cells]
    words = ["--profile", "smoke", "--seeds", "3", "--set", "inversion.steps=7", "--in-place"]
    assert reproduce.main(words) == 1
    out, err = capsys.readouterr()

    assert "00_bad failed:" in err and "ZeroDivisionError: division by zero" in err and "\x1b" not in err
    partial = folder / "figures" / "smoke" / "notebooks" / "00_bad.ipynb"
    assert "batch" not in err
    assert f"executed so far: {partial}" in err and "ZeroDivisionError" in partial.read_text()
    assert err.endswith("reproduce.sh: failed: 00_bad; the reasons stand above\n"), err
    assert bad.read_bytes() == before
    assert out.startswith("dinv: profile smoke on c") and "[2/3] 01_claim" in out
    assert re.search(r"^ yes  it counts: 3.10 ± 0.10, expected ≥ 2\n2 of 3 done in ", out, re.MULTILINE)
    assert "it counts" in (folder / "figures" / "RESULTS.md").read_text()

    notebook = nbformat.read(plain, as_version=4)
    output = notebook.cells[2].outputs[0]
    expected = repr(("smoke", 3, {"inversion.steps": 7}, "notebooks", sys.executable))
    assert output.data["text/plain"].replace("\n", "") == expected and output.execution_count == 2
    assert [cell.id for cell in notebook.cells] == ids and notebook.cells[1].execution_count == 1
    assert notebook.cells[1].source == PARAMETERS and notebook.cells[1].metadata == {"tags": ["parameters"]}
    assert notebook.cells[2].metadata == {} and notebook.metadata.keys() == {"kernelspec"}


def test_list_tells_what_is_cached_and_runs_nothing(folder, capsys):
    for name in ("00_bad", "01_claim"):
        write_notebook(folder, name, "1 / 0")
    Run("01_claim", load_profile("smoke")).finish()
    stages = [{"label": f"pool, {name}", "folder": name, "seconds": 126.0} for name in ("kept", "gone")]
    (folder / "runs" / "chapters" / "smoke-01_claim.json").write_text(json.dumps({"stages": stages}))
    (folder / "runs" / "kept").mkdir()
    (folder / "runs" / "kept" / "data.safetensors").touch()
    assert reproduce.main(["--profile", "smoke", "--list"]) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "00_bad: not run yet" and re.match(r"01_claim: 00:0\d on \w", second)
    assert rest == ["  pool, kept: cached, 02:06", "  pool, gone: to be made, 02:06"]


def test_a_card_that_is_too_small_is_told_of_with_the_settings_that_help(folder, capsys):
    write_notebook(folder, "00_large", "import torch\nraise torch.OutOfMemoryError('CUDA out of memory')")
    assert reproduce.main(["--profile", "smoke"]) == 1
    err = capsys.readouterr().err
    names = re.findall(r"[a-z_.]*batch_size", err)
    assert err.index("CUDA out of memory") < err.index("The card's memory is too small") and len(names) == 3
    assert set(names) <= set(flat(load_profile("smoke")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--profil=smoke", "unknown option --profil=smoke: did you mean --profile? The options are --help"),
        ("--seeds -1", "seeds=-1 must be finite and not negative"),
        ("--profile gpuu", "unknown profile 'gpuu': did you mean gpu?"),
        ("--set steps", "--set steps: expected KEY=VALUE, such as inversion.steps=400"),
        ("--set inversion.step=4", "'inversion.step': did you mean inversion.steps?"),
        ("--set inversion.steps=x", "inversion.steps='x' must be int"),
        ("--only 00,77", "--only: unknown notebook '77'. There are 00_teacher"),
        ("--imagenet nowhere", "--imagenet: 'nowhere' is no folder"),
        ("bench --in-place", "'bench --in-place': expected `bench` or `book`, which take no options"),
        ("lab --port 8899", "unknown option --port: JupyterLab's stand after --, lab -- --port 8899"),
        ("--profile gpu", "needs a CUDA device, and there is none: torch"),
        ("--profile smoke", "is a file, but a folder should be there"),
    ],
)
def test_misspelt_or_impossible_ends_before_anything_runs(folder, capsys, monkeypatch, line, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_notebook(folder, "00_teacher")
    (folder / "runs").touch()
    assert reproduce.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and not (folder / "figures" / "smoke" / "notebooks").exists()


@pytest.mark.parametrize(
    ("name", "value", "line", "message"),
    [
        (
            "DINV_PRECISION",
            "half",
            "--profile smoke",
            "unknown precision 'half': choose auto, float32, bfloat16",
        ),
        ("WORLD_SIZE", "2", "bench", "torchrun's processes would all do the same: `bench` runs in one"),
    ],
)
def test_a_surrounding_that_does_not_fit_ends_before_anything_runs(
    folder, capsys, monkeypatch, name, value, line, message
):
    monkeypatch.setenv(name, value)
    write_notebook(folder, "00_teacher")
    assert reproduce.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_what_the_words_run_also_after_one_failed(folder, capsys):
    (folder / "benchmarks").mkdir()
    for name, code in {"a": "raise SystemExit(3)", "b": "", "_common": "1 / 0"}.items():
        (folder / "benchmarks" / f"{name}.py").write_text(code)
    assert reproduce.main(["bench"]) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "a         FAILED (status 3), " in first and "b         passed, 00:" in second
    checks = reproduce.steps("test", ["-m", "slow"], "scratch")
    assert list(checks) == ["ruff", "pytest", "nbval"] and checks["pytest"][-2:] == ["-m", "slow"]
    assert "--nbval-lax" in checks["nbval"] and os.environ["DINV_PROFILE"] == "smoke"
    assert os.environ["DINV_CACHE"] == "scratch/runs" and os.environ["DINV_FIGURES"] == "scratch/figures"
    (folder / "book_source").mkdir()
    (folder / "book_source" / "build.py").write_text("import sys; open('built', 'w').write(sys.argv[1])")
    assert reproduce.main(["book"]) == 0 and (folder / "built").read_text() == "book"
    assert f"    {' | '.join(PROFILES)}) fail 2" in (CHECKOUT / "reproduce.sh").read_text()
