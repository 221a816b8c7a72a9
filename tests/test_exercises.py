"""The cards at the end of the notebooks, the check that answers a reader, the copies for a class."""

import ast
import math
import re
from itertools import pairwise

import nbformat
import numpy as np
import pytest
import torch

from dinv import reproduce
from dinv.exercises import NUMBER, OPEN, SOLUTIONS, check, number_of, solutions, solved
from dinv.experiments.results import read_rows
from dinv.files import repository_root

NOTEBOOKS = reproduce.notebooks()
SHAPE = "a tensor of shape"
QUICK = "00"  # the notebook whose cards the default tests run
HEAD = re.compile(
    r"### (?P<place>[123]) · (?P<title>.+)\n\n(?P<stars>★{1,3}) · \d+ minutes · "
    r"\*(?P<kind>predict and run|write ten lines|open question)\* · answer: .+\n"
)


def cards(notebook, kind="code"):
    return {number_of(c): c.source for c in notebook.cells if c.cell_type == kind and number_of(c)}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


# ---- the check -----------------------------------------------------------------------------------
def stub():
    raise NotImplementedError("write it")


@pytest.mark.parametrize(
    ("answer", "expected", "printed"),
    [
        (stub, 1, "not yet: write it"),
        (lambda: None, 1, "not yet: the answer is None. Is there a `return`?"),
        (2, lambda: 2.0005, "right"),
        (lambda: 1, 2, "hint: too low. think"),
        (3, 2, "hint: too high. think"),
        (True, True, "right"),
        (" Teacher", "teacher", "right"),
        ("verifier", "teacher", "hint: think"),
        (1, "teacher", "not yet: expected a word, got a number"),
        ([16, 64], (16, 64), "right"),
        (np.array([16, 64]), [16, 64], "right"),
        ([64, 16], [16, 64], "hint: think"),
        (torch.tensor(64), [16, 64], "not yet: expected 2 values, got a number"),
        ([64], [16, 64], "not yet: expected 2 values, got a list of 1"),
        (torch.ones(3), torch.ones(3), "right"),
        (torch.ones(2), torch.ones(3), f"not yet: expected {SHAPE} (3,), got {SHAPE} (2,)"),
        (math.nan, 1, "not yet: the answer is not finite"),
        ({"a": 1, "b": torch.ones(2)}, {"b": torch.ones(2), "a": 1}, "right"),
        ({"a": 2}, {"a": 1}, "hint: think"),
        ({"a": "x"}, {"a": 1}, "not yet: expected a number, got a word"),
        ({}, {"a": 1}, "not yet: expected a dict of 'a', got a dict of nothing"),
        (torch.nn.ReLU, 1, "not yet: expected a number, got a ReLU"),
    ],
)
def test_an_answer_is_right_or_not_yet_or_gets_a_hint(capsys, answer, expected, printed):
    check(answer, expected, hint="think")
    assert capsys.readouterr().out == printed + "\n"


def test_the_truth_is_not_computed_for_a_stub_and_an_error_is_shown(capsys):
    check(stub, lambda: 1 / 0)
    assert capsys.readouterr().out == "not yet: write it\n"
    with pytest.raises(ZeroDivisionError):
        check(lambda: 1 / 0, 1)


def test_a_number_may_be_away_by_a_share(capsys):
    for answer in (109, 111):
        check(answer, 100, within=0.1)
    assert capsys.readouterr().out == "right\nhint: too high.\n"


# ---- the cards -----------------------------------------------------------------------------------
def test_three_cards_of_three_kinds_with_what_a_reader_wants_to_know(notebook):
    texts, codes = cards(notebook, "markdown"), cards(notebook)
    (number,) = {name[:2] for name in texts}
    assert list(texts) == [f"{number}-{place}" for place in (1, 2, 3)]
    heads = [HEAD.match(text) for text in texts.values()]
    assert [head["place"] for head in heads] == ["1", "2", "3"]
    assert [head["kind"] for head in heads] == ["predict and run", "write ten lines", "open question"]
    assert all(text.count("<details><summary>Help</summary>") == 1 for text in texts.values())
    assert [name for name, text in texts.items() if OPEN not in text] == list(codes)
    assert "<summary>Solution" not in "".join(cell.source for cell in notebook.cells)


def test_a_card_has_one_stub_and_prints_not_yet(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code" and number_of(cell):
            (raised,) = [node.exc for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Raise)]
            assert raised.func.id == "NotImplementedError", cell.source
            (output,) = cell.outputs
            assert output.text == f"not yet: {raised.args[0].value}\n"


def test_every_card_has_its_solution_under_the_same_title():
    answers, titles = solutions(), {}
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for name, text in cards(notebook, "markdown").items():
            titles[name] = HEAD.match(text)["title"]
        for name, code in cards(notebook).items():
            filled = solved(code, answers[name]["code"])
            assert "NotImplementedError" not in filled and ast.parse(filled)
    assert list(answers) == list(titles)
    for name, answer in answers.items():
        assert answer["markdown"].startswith(f"### {name[-1]} · {titles[name]}\n"), name
        assert ast.parse(answer["code"]).body, name


def run_cards(path, folder, monkeypatch):
    """What the cards print in a run on smoke, by number: as they are, with a wrong answer, solved."""
    for name in ("DINV_CACHE", "DINV_FIGURES", "JUPYTER_PATH"):
        monkeypatch.setenv(name, str(folder / name.lower()))
    for name in ("PYTHONPATH", "PYDEVD_DISABLE_FILE_VALIDATION"):
        monkeypatch.setenv(name, "")  # `own_kernel` changes them
    reproduce.own_kernel(str(folder / "jupyter"))
    notebook, answers = nbformat.read(path, as_version=4), solutions()
    codes, number = cards(notebook), path.stem[:2]
    terms = [name for name, code in codes.items() if "\nclass " in code]  # whose value must be a tensor
    raising = re.compile(r"raise NotImplementedError\(.*\)")
    wrong = {name: raising.sub("return 0", code) for name, code in codes.items() if name not in terms}
    filled = {name: solved(code, answers[name]["code"]) for name, code in codes.items()}
    filled[f"{number}-3"] = answers[f"{number}-3"]["code"]  # an open question has no stub
    notebook.cells += map(nbformat.v4.new_code_cell, (*wrong.values(), *filled.values()))
    nbformat.write(notebook, folder / "source.ipynb")
    failure = reproduce.execute(folder / "source.ipynb", folder / "done.ipynb", {"profile": "smoke"})
    assert not failure, failure
    done = nbformat.read(folder / "done.ipynb", as_version=4)
    stubs = {number_of(cell): cell for cell in done.cells if cell.cell_type == "code" and number_of(cell)}
    pasted = [printed(cell) for cell in done.cells[-len(wrong) - len(filled) :]]
    of_stubs = {name: printed(cell) for name, cell in stubs.items()}
    return of_stubs, pasted[: len(wrong)], dict(zip(filled, pasted[len(wrong) :], strict=True))


def printed(cell):
    """The text of a cell's outputs; tables and pictures count as their plain text."""
    texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    return "".join(text for out, text in zip(cell.outputs, texts, strict=True) if out.get("name") != "stderr")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "path",
    [p if p.stem.startswith(QUICK) else pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_stubs_are_not_yet_wrong_answers_get_a_word_and_solutions_are_right(path, tmp_path, monkeypatch):
    """The solutions one after the other, at the end of the notebook, on the smoke profile."""
    stubs, wrong, filled = run_cards(path, tmp_path, monkeypatch)
    assert len(stubs) == 2 and all(re.fullmatch(r"not yet: .+\n", text) for text in stubs.values()), stubs
    assert wrong and all(re.match("not yet: |hint: ", text.splitlines()[-1]) for text in wrong), wrong
    for name, text in filled.items():
        assert text.strip() if name.endswith("-3") else text.splitlines()[-1] == "right", (name, text)


# ---- the copies for a class ----------------------------------------------------------------------
def test_the_copies_for_a_class(tmp_path, capsys):
    assert reproduce.main(["student", str(tmp_path / "class")]) == 0
    folder, answers = tmp_path / "class", solutions()
    assert str(folder / "notebooks") in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["notebooks", "solutions.ipynb"]
    for path in NOTEBOOKS:
        own, master = (nbformat.read(file, as_version=4) for file in (folder / "notebooks" / path.name, path))
        nbformat.validate(own)
        assert len(own.cells) == len(master.cells) and cards(own) == cards(master)
        assert all(not cell.outputs and not cell.execution_count for cell in own.cells if "outputs" in cell)
        text = "\n".join(cell.source for cell in own.cells)
        assert SOLUTIONS.name not in text and "## Exercises" in text
        assert not [name for name, answer in answers.items() if answer["code"] in text]
    teachers = nbformat.read(folder / "solutions.ipynb", as_version=4)
    nbformat.validate(teachers)
    text = "\n".join(cell.source for cell in teachers.cells)
    assert "NotImplementedError" not in text and text.count("\n### ") == 2 * len(answers)
    assert all(answer["code"] in text and answer["markdown"] in text for answer in answers.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "smoke"], "takes the name of a folder"),
        (["one", "two"], "takes the name of a folder"),
        ([str(repository_root())], "has the notebooks that the copies are made from"),
    ],
)
def test_student_takes_one_folder_that_is_not_its_own(words, message, capsys):
    assert reproduce.main(["student", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_solutions_are_python_that_nothing_else_repeats():
    cells = nbformat.read(SOLUTIONS, as_version=4).cells
    assert all(not cell.outputs for cell in cells if cell.cell_type == "code")
    tagged = [number_of(cell) for cell in cells if number_of(cell)]
    assert len(tagged) == 2 * 3 * len(NOTEBOOKS) and all(NUMBER.fullmatch(name) for name in tagged)


# ---- the instructor's page -----------------------------------------------------------------------
def test_the_numbers_of_the_instructors_page_are_in_the_file_it_names():
    page = (repository_root() / "course" / "instructor.md").read_text(encoding="utf-8")
    rows = read_rows(repository_root() / "figures" / "cpu").set_index(["chapter", "table", "row", "column"])
    stated = re.findall(r"^\| (\d\d_\w+) \| (.+) \| (.+) \| (.+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(stated) > 10
    for *where, number in stated:
        assert abs(float(rows.loc[tuple(where)].value) - float(number)) <= 1, where


def test_the_lessons_of_the_instructors_page_take_75_minutes_each():
    page = (repository_root() / "course" / "instructor.md").read_text(encoding="utf-8")
    for lesson in page.split("\n## Lesson ")[1:]:
        spans = [tuple(map(int, span)) for span in re.findall(r"^\| (\d+)–(\d+) \|", lesson, re.MULTILINE)]
        assert spans[0][0] == 0 and spans[-1][1] == 75
        assert all(one[1] == other[0] for one, other in pairwise(spans))
