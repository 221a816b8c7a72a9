"""The notebooks as they are committed: their form, their outputs, their checked cells."""

import ast
import json
import re
from types import ModuleType

import nbformat
import pytest

from dinv.reproduce import execution
from dinv.runs import repository_root

NOTEBOOKS = sorted((repository_root() / "notebooks").glob("[0-9]*.ipynb"))
MARK = "# NBVAL_CHECK_OUTPUT"
SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def solutions(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return SOLUTION.findall(text)


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS][:3] == ["00_teacher", "01_deepdream", "02_feature_statistics"]


def test_one_parameters_cell_of_plain_literals(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = {}
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign)
        names[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert names == {"profile": "auto", "seeds": 0, "overrides": {}}


def test_what_a_notebook_takes_from_a_module_is_there(notebook):
    """In branches as well that no committed run enters: those for a user's folder of photographs."""
    tree = ast.parse("\n".join(cell.source for cell in code_cells(notebook)))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "dinv":
            names = [name.name for name in node.names]
            taken = {name: getattr(__import__("dinv", fromlist=names), name) for name in names}
            modules |= {name: found for name, found in taken.items() if isinstance(found, ModuleType)}
    asked = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    asked = [(n.value.id, n.attr) for n in asked if n.value.id in modules]
    missing = [f"{module}.{name}" for module, name in asked if not hasattr(modules[module], name)]
    assert modules and not missing


def test_at_least_four_checked_cells_none_empty(notebook):
    checked = [cell for cell in code_cells(notebook) if cell.source.startswith(MARK)]
    assert len(checked) >= 4
    for cell in checked:
        assert text_of(cell).strip(), f"nothing to compare in:\n{cell.source}"


def test_committed_outputs_are_whole_and_clean(notebook):
    for cell in code_cells(notebook):
        assert cell.execution_count is not None, f"not executed:\n{cell.source}"
        for output in cell.outputs:
            assert output.output_type != "error", f"{output.get('evalue')} in:\n{cell.source}"
            assert output.get("name") != "stderr", f"stderr in:\n{cell.source}"
    assert "no band" not in json.dumps(notebook) and "OUT OF BAND" not in json.dumps(notebook)


def test_checked_bands_hold_in_the_committed_outputs(notebook):
    lines = [x for cell in code_cells(notebook) if MARK in cell.source for x in text_of(cell).splitlines()]
    banded = [line for line in lines if "band" in line]
    assert banded and all(line.endswith(": within band") for line in banded)


def test_form(notebook):
    first, text = notebook.cells[0], "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "**" in first.source
    for heading in ("## What you will learn", "**Time.**", "## Take away", "## Exercises", "## References"):
        assert heading in text, heading
    assert text.count("<details>") >= 2 and text.count("<details>") == text.count("</details>")


def test_every_exercise_has_a_solution_that_is_python(notebook):
    exercises = notebook.cells[-1].source.partition("## Exercises")[2].partition("## References")[0]
    assert len(solutions(notebook)) == len(re.findall(r"^\d\. \*\*", exercises, re.MULTILINE)) >= 2
    for solution in solutions(notebook):
        ast.parse(solution)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_solutions_run_where_a_reader_would_paste_them(notebook, tmp_path, monkeypatch):
    """One after the other, at the end of the notebook, on the smoke profile."""
    for name in ("CACHE", "FIGURES"):
        monkeypatch.setenv(f"DINV_{name}", str(tmp_path / name.lower()))
    notebook.cells += [nbformat.v4.new_code_cell(solution) for solution in solutions(notebook)]
    nbformat.write(notebook, tmp_path / "source.ipynb")
    with execution.own_kernel():
        done = execution.execute(tmp_path / "source.ipynb", tmp_path / "done.ipynb", {"profile": "smoke"})
    for cell in done.cells[-len(solutions(notebook)) :]:
        shown = [output.output_type for output in cell.outputs if output.get("name") != "stderr"]
        assert cell.execution_count and shown, f"shows nothing:\n{cell.source}"


def test_code_cells_are_short(notebook):
    for cell in code_cells(notebook):
        assert cell.source.count("\n") < 30, cell.source


def test_every_band_belongs_to_a_checked_line():
    bands = json.loads((repository_root() / "tests" / "bands.json").read_text())
    sources = "\n".join(
        cell.source for path in NOTEBOOKS for cell in code_cells(nbformat.read(path, as_version=4))
    )
    for profile, names in bands.items():
        for name, (low, high) in names.items():
            assert f'run.check("{name}"' in sources, f"{profile}: {name} is never checked"
            assert low <= high
