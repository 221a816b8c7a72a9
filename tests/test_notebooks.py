"""The notebooks as they are committed: their form, their code, their outputs, their checked cells."""

import ast
import itertools
import re
from types import ModuleType

import nbformat
import pytest

from dinv.experiments.results import read_rows
from dinv.files import repository_root

NOTEBOOKS = sorted((repository_root() / "notebooks").glob("[0-9]*.ipynb"))
MARK = "# NBVAL_CHECK_OUTPUT"
# What makes an experiment, plain or cached. Other names of dinv read, measure, draw or record.
METHODS = {
    *("train", "train_network", "network", "invert", "synthesize", "generate", "synthesize_from"),
    *("distill", "prune", "prune_and_distill", "learn", "learn_increment", "teacher_of_part"),
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook, tag=None):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag is None or tag in cell.metadata.get("tags", [])]


def nodes(notebook, kind):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kind)]


def called(call):
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def test_one_parameters_cell_of_plain_literals(notebook):
    (cell,) = code_cells(notebook, "parameters")
    statements = ast.parse(cell.source).body
    names = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}
    assert names == {"profile": "auto", "seeds": 0, "overrides": {}}


def test_what_a_notebook_takes_from_dinv_is_there(notebook):
    """In branches as well that no committed run enters: those for a user's folder of photographs."""
    modules = {}
    for node in nodes(notebook, ast.ImportFrom):
        if node.module.split(".")[0] == "dinv":
            for alias in node.names:
                owner = __import__(node.module, fromlist=[alias.name])  # imports a module of that name
                assert hasattr(owner, alias.name), f"{node.module} has no {alias.name}"
                if isinstance(value := getattr(owner, alias.name), ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in nodes(notebook, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            assert hasattr(module, node.attr), f"{module.__name__} has no {node.attr}"


def test_cells_make_experiments_by_calling_methods(notebook):
    """No name of a stage and no name of a file says what is run: a method and its arguments do."""
    calls = [call for call in nodes(notebook, ast.Call) if called(call) in METHODS]
    assert calls
    for call in calls:
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
            assert not isinstance(argument, ast.JoinedStr), f"an f-string: {ast.unparse(call)}"
            if called(call) not in ("network", "train_network"):  # a role, an architecture
                assert not isinstance(getattr(argument, "value", None), str), f"a string: {ast.unparse(call)}"
            assert getattr(argument, "id", "") != "run", f"`run` as argument: {ast.unparse(call)}"
    texts = [node.value for node in nodes(notebook, ast.Constant) if isinstance(node.value, str)]
    assert not [text for text in texts if re.search(r"^runs/|DINV_CACHE", text)]
    assert not [n for n in nodes(notebook, ast.ImportFrom) if n.module == "dinv.experiments.cache"]


def test_code_cells_are_short_and_plain(notebook):
    for cell in code_cells(notebook):
        body = ast.parse(cell.source).body
        imports = [x for x in body if isinstance(x, ast.Import | ast.ImportFrom)]  # ruff: one name per line
        lines = cell.source.count("\n") + 1 - sum(x.end_lineno - x.lineno + 1 for x in imports)
        assert lines <= 30, cell.source
        for trick in (r"inspect\.getsource", r"1e-12 *\*", r"strict=True"):
            assert not re.search(trick, cell.source), f"{trick} in:\n{cell.source}"


def test_every_cell_is_led_in_by_a_sentence(notebook):
    """All that a reader sees: not the parameters, which the text before them names, nor what is folded."""
    for before, cell in itertools.pairwise(notebook.cells):
        folded = cell.metadata.get("jupyter", {}).get("source_hidden")
        if (
            cell.cell_type == "code"
            and not folded
            and not {"parameters", "checks"} & set(cell.metadata.get("tags", []))
        ):
            assert before.cell_type == "markdown", f"nothing leads in:\n{cell.source}"


def test_checks_stand_apart_one_a_section(notebook):
    sections = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"^## ", cell.source, re.MULTILINE):
            sections.append([])
        if "checks" in cell.metadata.get("tags", []):
            sections[-1].append(cell.source)
    assert all(len(checks) <= 1 for checks in sections), [len(checks) for checks in sections]
    checked = [cell for cell in code_cells(notebook) if MARK in cell.source]
    assert checked
    for cell in checked:
        assert cell.source.startswith(MARK) and "checks" in cell.metadata.get("tags", []), cell.source
        printed = [output.get("text", "") for output in cell.outputs if output.get("name") == "stdout"]
        assert "".join(printed).strip(), f"nothing to compare in:\n{cell.source}"


def test_committed_outputs_are_whole_and_clean(notebook):
    for cell in code_cells(notebook):
        assert cell.execution_count is not None, f"not executed:\n{cell.source}"
        for output in cell.outputs:
            assert output.output_type != "error", f"{output.get('evalue')} in:\n{cell.source}"
            assert output.get("name") != "stderr", f"stderr in:\n{cell.source}"


def test_form(notebook):
    first, text = notebook.cells[0], "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "**" in first.source
    for heading in ("## What you will learn", "**Time.**", "## Take away", "## Exercises", "## References"):
        assert heading in text, heading
    assert text.count("<details>") >= 2 and text.count("<details>") == text.count("</details>")


def test_a_take_away_tells_how_its_claims_stand(notebook, request):
    """As `figures/cpu/results.csv` has them: a run that changes a verdict turns the sentence's test red."""
    (text,) = (cell.source for cell in notebook.cells if "## Take away" in cell.source)
    text = text.partition("## Take away")[2].partition("\n## ")[0]
    told = re.findall(r'"([^"]+)" \((holds|open|does not hold)\)', text)
    chapter = request.node.callspec.id
    rows = read_rows(repository_root() / "figures" / "cpu")
    rows = rows[(rows.chapter == chapter) & (rows.table == "claims")].set_index("row").holds
    verdicts = {"yes": "holds", "no": "does not hold", "open": "open"}
    assert told == [(claim, verdicts[rows[claim]]) for claim, _ in told]
    assert told or chapter == "00_teacher"
