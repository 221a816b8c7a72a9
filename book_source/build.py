"""./reproduce.sh book: notebooks, pages and docstrings as a site. Nothing is executed, nothing is fetched.

    python book_source/build.py FOLDER [OPTIONS OF SPHINX]

Sphinx wants all its sources in one folder. They are laid there as they lie in the checkout, so that every
relative link of the README and of a notebook still points to its page.
"""

from __future__ import annotations

import base64
import html
import importlib
import pkgutil
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from sphinx.cmd.build import main as sphinx

import dinv
from dinv.exercises import SOLUTIONS
from dinv.reproduce import ROOT, notebooks

FOLDERS = ("book_source", "benchmarks", "course")  # of pages beside those at the top
WIDGET, STATE = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("view", "state"))
SCRUBBER = """<div class="scrubber"><label>{name} <input type="range" min="0" max="{last}" value="{last}"
oninput="const box = this.closest('.scrubber'); box.querySelectorAll('img').forEach((image, index) =>
image.hidden = index != this.value); box.querySelector('output').value = {labels}[this.value]">
<output>{shown}</output></label>{images}</div>"""


def build(folder: Path, *options: str) -> int:
    """The pages into `folder`; returns Sphinx's exit status."""
    with tempfile.TemporaryDirectory(prefix="dinv-book-") as scratch:
        source = Path(scratch, "source")
        lay_out(source)
        pages = Path(scratch, "pages")  # myst-nb writes beside this folder, too
        status = sphinx(["-q", "-b", "html", "-d", f"{scratch}/trees", *options, str(source), str(pages)])
        if pages.exists():
            shutil.copytree(pages, folder, dirs_exist_ok=True)
        return status


def lay_out(source: Path) -> None:
    """All that the site is made of, into the new folder `source`."""
    shutil.copytree(ROOT / "book_source", source, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    shutil.copytree(ROOT / "figures", source / "figures", ignore=shutil.ignore_patterns("notebooks"))
    pages = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))]
    for path in (*pages, ROOT / "LICENSE", ROOT / "CITATION.cff"):
        inside = path.relative_to(ROOT)
        top = inside.parts[0] == "book_source"  # these lie at the top here
        copied = source / (inside.name if top else inside)
        copied.parent.mkdir(exist_ok=True)
        text = re.sub(r"\]\(((?:\.\./)?)book_source/", r"](\1", path.read_text(encoding="utf-8"))
        text = text.replace("](../", "](") if top else text
        # A link to a source file leads to the page of that module.
        text = re.sub(r"\]\(dinv/([\w/]+)\.py\)", lambda link: f"](api/{link[1].replace('/', '.')}.md)", text)
        copied.write_text(text, encoding="utf-8")
    index = source / "index.md"  # the README and the table of contents
    opening = (source / "README.md").read_text(encoding="utf-8")
    index.write_text(index.read_text(encoding="utf-8").replace("{{opening}}", opening), encoding="utf-8")
    (source / "README.md").unlink()
    for path in (*notebooks(), SOLUTIONS):
        copied = source / path.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        nbformat.write(readable(nbformat.read(path, as_version=4)), copied)
    write_api(source / "api")


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as a page can show it: widgets as far as they need no kernel, folded cells folded."""
    state = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata.setdefault("tags", []).append("hide-input")
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            if "text/html" in data:  # their colours are those of a white page; the theme has its own
                data["text/html"] = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
            if view := data.pop(WIDGET, None):
                data |= {"text/html": page} if (page := scrubber(state, view["model_id"])) else {}
    return notebook


def scrubber(state: dict, model: str) -> str:
    """The slider over pictures of `widgets.scrubber` as HTML; "" of any other, shown as a picture."""
    children = [state[name[10:]] for name in state.get(model, {}).get("state", {}).get("children", ())]
    if [child["model_name"] for child in children] != ["SelectionSliderModel", "StackModel"]:
        return ""
    slider, stack = (child["state"] for child in children)
    labels, last = slider["_options_labels"], len(slider["_options_labels"]) - 1
    pictures = [state[name[10:]] for name in stack["children"]]
    images = "".join(
        f'<img alt="{slider["description"]} {label}" src="data:image/{picture["state"]["format"]};base64,'
        f'{base64.b64encode(base64.b64decode(picture["buffers"][0]["data"])).decode()}"{hidden}>'
        for picture, label, hidden in zip(pictures, labels, [" hidden"] * last + [""], strict=True)
    )
    shown = {"name": slider["description"], "last": last, "shown": labels[last], "images": images}
    return SCRUBBER.format(labels=html.escape(str(list(labels))), **shown)


def write_api(folder: Path) -> None:
    """A page for every module that says what it is, and one that lists the names of `dinv` itself."""
    folder.mkdir()
    modules = sorted(info.name for info in pkgutil.walk_packages(dinv.__path__, "dinv."))
    described = [name for name in modules if importlib.import_module(name).__doc__]
    for name in described:
        title = name.removeprefix("dinv.")
        directive = f".. automodule:: {name}\n   :members:\n   :ignore-module-all:\n"
        page = f"# {title}\n\n```{{eval-rst}}\n{directive}```\n"
        (folder / f"{title}.md").write_text(page, encoding="utf-8")
    names = "\n".join(f"   ~{getattr(dinv, name).__module__}.{name}" for name in dinv.__all__)
    text = ["# The package", "What `from dinv import ...` gives; each name leads to its page."]
    text.append(f"```{{eval-rst}}\n.. autosummary::\n\n{names}\n```")
    for title, inner in {"Science": False, "Experiments": True}.items():
        pages = [name.removeprefix("dinv.") for name in described if ("dinv.experiments" in name) == inner]
        text += [f"## {title}", "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(pages) + "\n```"]
    (folder / "index.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]), *sys.argv[2:]))
