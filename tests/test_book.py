"""The book: every page, link and equation, nothing fetched; the code on its pages; the cards beside it."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup, Tag

import dinv
from dinv.files import repository_root
from dinv.reproduce import notebooks, parse

ROOT = repository_root()
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "book_source").glob("*.md")}
NUMBER = re.compile(r"\d+(?:\.\d+)?")


# ---- what needs no build -------------------------------------------------------------------------
def test_the_worked_example_runs_and_prints_what_the_page_says(capsys):
    blocks, names = re.findall(r"```python\n(.*?)```", PAGES["your_own.md"], re.DOTALL), {}
    for block in blocks:
        exec(compile(block, "your_own.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    promised = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("# ")]
    assert [NUMBER.sub("#", line) for line in printed] == [NUMBER.sub("#", line) for line in promised]
    for one, other in zip(printed, promised, strict=True):  # other roundings elsewhere
        pairs = zip(map(float, NUMBER.findall(one)), map(float, NUMBER.findall(other)), strict=True)
        assert all(abs(a - b) <= (15 if b > 1 else 0.08) for a, b in pairs), (one, other)
    (term,) = (block for block in blocks if "class Margin(Term)" in block)
    assert len(re.findall(r"^.*\S", term.partition("class ")[2], re.MULTILINE)) <= 15


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    for name in re.findall(r"\{py:obj\}`~?([\w.]+)`", PAGES[page]):
        owner, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(owner), attribute), name
    for file in re.findall(r"`(dinv/[\w/]+\.py)`", PAGES[page]):
        assert (ROOT / file).is_file(), file
    texts = [path.read_text(encoding="utf-8") for path in notebooks()]
    headings = {heading for text in texts for heading in re.findall(r'"## (.*?)\\n', text)}
    for section in re.findall(r"\), \*(.+?)\*", PAGES[page], re.DOTALL):  # [02](...), *How strong?*
        found = " ".join(section.split())
        assert any(heading.startswith(found) for heading in headings), section


def test_the_map_has_every_equation_table_and_figure():
    paper = PAGES["paper_map.md"]
    for kind, numbers in {"equation": range(1, 11), "Table": range(1, 11), "Figure": range(3, 9)}.items():
        rows = [line.split("|")[1] for line in paper.splitlines() if line.startswith(f"| {kind}")]
        named = {int(n) for row in rows for n in re.findall(r"\d+", row.partition("section")[0])}
        assert named >= set(numbers), kind


def test_the_cell_for_colab_uses_options_that_exist():
    (words,) = re.findall(r"reproduce\.sh (.*)", PAGES["colab.md"])
    assert [path.stem[:2] for path in parse(words.split())[2]] == ["01", "02"]


def test_one_version_and_one_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    card = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert card["version"] == newest == dinv.__version__ == project["project"]["version"]
    assert f"version = {{{card['version']}}}" in (ROOT / "CITATION.cff").read_text()
    assert card["license"] == project["project"]["license"] and len(card["references"][0]["authors"]) == 8
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["dinv"]
    assert (ROOT / "dinv" / "py.typed").exists()
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["./reproduce.sh test"]
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    docker = (ROOT / "Dockerfile").read_text()
    assert f" AS {container['build']['target']}\n" in docker
    for command in (container["postCreateCommand"], *re.findall(r"^RUN (\./.*)", docker, re.MULTILINE)):
        program, *words = command.split()
        assert program == "./reproduce.sh" and parse(words)[0].list


# ---- the built pages -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """The folder of the pages; a warning of Sphinx is an error."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, str(ROOT / "book_source" / "build.py"), str(folder), "-W", "--keep-going"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(book) -> dict[Path, BeautifulSoup]:
    return {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in book.rglob("*.html")}


def addresses(page: BeautifulSoup) -> Iterator[tuple[Tag, str]]:
    for element in page.find_all(["a", "area", "form", "iframe", "img", "link", "script", "source", "video"]):
        for name in ("href", "src", "srcset", "action"):
            if element.get(name):
                yield element, element[name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_notebook_page_and_public_name_is_in_the_navigation(book, pages):
    linked = {urlsplit(href).path for _, href in addresses(pages[book / "index.html"])}
    written = [name.replace(".md", ".html") for name in PAGES if name != "index.md"]
    written += ["notebooks/solutions/solutions.html", "course/instructor.html"]
    assert {f"notebooks/{path.stem}.html" for path in notebooks()} | set(written) <= linked
    anchors = {element["id"] for page in pages.values() for element in page.find_all(id=re.compile("^dinv"))}
    assert {f"{getattr(dinv, name).__module__}.{name}" for name in dinv.__all__} <= anchors
    for name in written:  # docstrings name much that is PyTorch's; a page of our own names what is here
        loose = [code.text for code in pages[book / name].select("code.xref") if not code.find_parent("a")]
        assert not loose, (name, loose)


@pytest.mark.slow
def test_no_link_leads_nowhere(book, pages):
    anchors = {path: {element["id"] for element in page.find_all(id=True)} for path, page in pages.items()}
    for path, page in pages.items():
        for _, address in addresses(page):
            parts = urlsplit(address)
            if parts.scheme in ("http", "https", "data", "mailto"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.relative_to(book)}: {address}"
            if parts.fragment and target in anchors:
                assert unquote(parts.fragment) in anchors[target], f"{path.relative_to(book)}: {address}"


@pytest.mark.slow
def test_nothing_is_fetched_from_another_host(book, pages):
    for path, page in pages.items():
        for element, address in addresses(page):
            outside = bool(urlsplit(address).netloc)
            assert element.name == "a" or not outside, f"{path.relative_to(book)}: {address}"
        for inline in page.find_all(["script", "style"]):
            assert not re.search(r"(https?:)?//\w+\.\w", inline.text), f"{path.name}: {inline.text[:200]}"
    for sheet in book.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", text), sheet


@pytest.mark.slow
def test_equations_are_drawn_and_pictures_have_their_text(book, pages):
    for path in notebooks():
        notebook, page = nbformat.read(path, as_version=4), pages[book / "notebooks" / f"{path.stem}.html"]
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        assert len(page.select(".equation math")) >= text.count("$$") // 2, path.stem
        shown = {image["alt"] for image in page.find_all("img")}
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        kept = [about for output in outputs for about in output.get("metadata", {}).values()]
        assert {about["alt"] for about in kept if "alt" in about} <= shown, path.stem
    for path, page in pages.items():
        assert all(image.get("alt") for image in page.find_all("img")), path
        for code in page(["pre", "code", "script", "annotation"]):
            code.extract()
        raw = re.findall(r".{0,20}(?:\$\$|\\math|\\frac).{0,20}", page.text)
        raw += [equation.text for equation in page.find_all("math") if "\\" in equation.text]
        assert not raw, (path.relative_to(book), raw)


@pytest.mark.slow
def test_the_slider_of_notebook_02_works_without_a_kernel(book, pages):
    (box,) = pages[book / "notebooks" / "02_feature_statistics.html"].select(".scrubber")
    pictures = box.find_all("img")
    assert len(pictures) == int(box.find("input")["max"]) + 1
    assert [image.has_attr("hidden") for image in pictures] == [True] * (len(pictures) - 1) + [False]
