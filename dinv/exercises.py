"""Exercises on cards: `check`, which tells a reader how far an answer is, and the copies for a class.

A card is a markdown cell, and for two of the three cards of a notebook a code cell after it, with a stub that
raises NotImplementedError, and its `check`. Both are tagged `exercise` and with the card's number, such as
`02-1`. Solutions live once: in notebooks/solutions/solutions.ipynb, in cells tagged with the same numbers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbformat import NotebookNode
from torch import Tensor

from dinv.files import make_folder, repository_root, write_text

SOLUTIONS = repository_root() / "notebooks" / "solutions" / "solutions.ipynb"
NUMBER = re.compile(r"\d\d-\d")
OPEN = "*open question*"  # a card of this kind has no code cell


def check(answer: Any, expected: Any, *, within: float = 1e-3, hint: str = "") -> None:
    """Print "right", "not yet: ..." or "hint: ...".

    An error in the answer other than NotImplementedError keeps its traceback, which says where it is.

    Args:
        answer: the reader's value, or a function without arguments that returns it.
        expected: the right value, or a function that returns it, called only if there is an answer. It may
            be a word, a number, a tensor, or a list or dict of these.
        within: how far a number may be away, as a share of the right one, or of 1 where that is larger.
        hint: what to think about; shown for an answer of the right shape that is wrong.
    """
    try:
        answer = answer() if callable(answer) else answer
    except NotImplementedError as error:
        print("not yet:", error)
        return
    if answer is None:
        print("not yet: the answer is None. Is there a `return`?")
        return
    expected = expected() if callable(expected) else expected
    if complaint := misfit(answer, expected):
        print("not yet:", complaint)
    elif same(answer, expected, within):
        print("right")
    else:
        print("hint:", f"{direction(answer, expected)}{hint}".strip() or "not this one")


def misfit(answer: Any, expected: Any) -> str:
    """What is wrong with the kind of an answer, before its value counts; "" if it has the right one."""
    if isinstance(expected, str):
        return "" if isinstance(answer, str) else f"expected a word, got {kind(answer)}"
    if isinstance(expected, Mapping):
        if not isinstance(answer, Mapping) or set(answer) != set(expected):
            return f"expected a dict of {', '.join(map(repr, expected))}, got {kind(answer)}"
        return next(filter(None, (misfit(answer[key], expected[key]) for key in expected)), "")
    if isinstance(expected, Sequence):
        many = hasattr(answer, "__len__") and getattr(answer, "shape", True)  # a tensor may have one
        if isinstance(answer, str) or not many or len(answer) != len(expected):
            return f"expected {len(expected)} values, got {kind(answer)}"
        return next(filter(None, map(misfit, answer, expected)), "")
    ours, theirs = numbers(answer), numbers(expected)
    if ours is None or ours.shape != theirs.shape:
        return f"expected {kind(expected)}, got {kind(answer)}"
    return "" if ours.isfinite().all() else "the answer is not finite"


def same(answer: Any, expected: Any, within: float) -> bool:
    """Whether two values of one kind are equal, numbers up to a share `within`."""
    if isinstance(expected, str):
        return answer.strip().lower() == expected.lower()
    if isinstance(expected, Mapping):
        return all(same(answer[key], expected[key], within) for key in expected)
    if isinstance(expected, Sequence):
        return all(same(a, b, within) for a, b in zip(answer, expected, strict=True))
    ours, theirs = numbers(answer), numbers(expected)
    return bool(((ours - theirs).abs() <= within * theirs.abs().clamp_min(1)).all())


def direction(answer: Any, expected: Any) -> str:
    """Where a single number lies, "too high. " or "too low. "; "" of anything else."""
    if isinstance(expected, str | Mapping | Sequence) or numbers(expected).dim():
        return ""
    return "too high. " if numbers(answer) > numbers(expected) else "too low. "


def numbers(value: Any) -> Tensor | None:
    """A number, an array or a tensor as float64 on the CPU; None if it is none of these."""
    try:
        return torch.as_tensor(value).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None


def kind(value: Any) -> str:
    """What a value is, in words: "a number", "a tensor of shape (8,)", "a list"."""
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, str | Sequence):
        return "a word" if isinstance(value, str) else f"a {type(value).__name__} of {len(value)}"
    found = numbers(value)
    if found is None:
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(found.shape)}" if found.dim() else "a number"


def number_of(cell: NotebookNode) -> str:
    """The number of the card that a cell belongs to, such as "02-1"; "" of any other cell."""
    return next(filter(NUMBER.fullmatch, cell.metadata.get("tags", ())), "")


def solutions() -> dict[str, dict[str, str]]:
    """By number of the card: the text ("markdown") and the Python ("code") of its solution."""
    found: dict[str, dict[str, str]] = {}
    for cell in nbformat.read(SOLUTIONS, as_version=4).cells:
        if number := number_of(cell):
            found.setdefault(number, {})[cell.cell_type] = cell.source
    return found


def solved(card: str, solution: str) -> str:
    """The code of a card with its stub replaced by the solution."""
    (stub,) = (
        node
        for node in ast.parse(card).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and "NotImplementedError" in ast.unparse(node)
    )
    lines = card.splitlines()
    return "\n".join([*lines[: stub.lineno - 1], solution.strip(), *lines[stub.end_lineno :]])


def hand_out(folder: Path, sources: Sequence[Path]) -> None:
    """Write the copies for a class: `folder`/notebooks without outputs, and `folder`/solutions.ipynb.

    The first have no solution and no link to one. The second is the teacher's: all cards with their
    solutions, for reading; its code runs at the end of the notebook that the card is from.
    """
    answers = solutions()
    text = "# Solutions to all cards\n\nFor the teacher. The code of a card runs at the end of its notebook."
    cells = [nbformat.v4.new_markdown_cell(text, id="title")]
    make_folder(folder / "notebooks", "DIR")
    for source in sources:
        notebook = nbformat.read(source, as_version=4)
        title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
        cells.append(nbformat.v4.new_markdown_cell(f"## {title}", id=f"title-{source.stem[:2]}"))
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            else:  # without the line that says where the solutions are
                lines = [line for line in cell.source.splitlines() if SOLUTIONS.name not in line]
                cell.source = "\n".join(lines).strip()
            if number := number_of(cell):
                cells += with_solution(cell, number, answers[number])
        notebook.metadata.pop("widgets", None)
        write_text(folder / "notebooks" / source.name, nbformat.writes(notebook) + "\n")
    notebook.cells = cells
    write_text(folder / "solutions.ipynb", nbformat.writes(notebook) + "\n")


def with_solution(cell: NotebookNode, number: str, answer: Mapping[str, str]) -> list[NotebookNode]:
    """A cell of a card as the teacher reads it: the stub filled in, the text of the solution at the end."""
    text = nbformat.v4.new_markdown_cell(answer["markdown"], id=f"text-{number}")
    if cell.cell_type == "code":
        return [nbformat.v4.new_code_cell(solved(cell.source, answer["code"]), id=f"code-{number}"), text]
    card = nbformat.v4.new_markdown_cell(cell.source, id=f"card-{number}")
    if OPEN not in cell.source:
        return [card]
    return [card, text, nbformat.v4.new_code_cell(answer["code"], id=f"code-{number}")]
