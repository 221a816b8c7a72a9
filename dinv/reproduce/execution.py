"""Execute notebooks through papermill, in this interpreter, and make them fit to be committed."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dinv.store import repository_root, write_text

NOISE = ("papermill", "execution", "ExecuteTime")  # metadata that differs from run to run


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def own_kernel(alone: bool = True) -> Iterator[None]:
    """Within, the kernel `python3` is this very interpreter and can import this `dinv`.

    Args:
        alone: neither kernels registered by others nor the user's Jupyter and IPython settings play a
            part. Otherwise they do, and the kernel is listed as "dinv" beside the others.
    """
    from ipykernel.kernelspec import write_kernel_spec

    with tempfile.TemporaryDirectory(prefix="dinv-") as folder:
        # of late ipykernel warns of unencrypted local TCP, and of every interrupt at the end
        quiet = ["--IPKernelApp.log_level=CRITICAL"]
        name = {} if alone else {"display_name": "dinv"}
        write_kernel_spec(f"{folder}/jupyter/kernels/python3", name, quiet)
        variables = {
            "JUPYTER_PATH": f"{folder}/jupyter",
            "PYTHONPATH": python_path(),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # ipykernel's debugger warns of frozen modules
        }
        if alone:
            variables |= {"JUPYTER_RUNTIME_DIR": f"{folder}/runtime", "IPYTHONDIR": f"{folder}/ipython"}
        elif os.environ.get("JUPYTER_PATH"):
            variables["JUPYTER_PATH"] += os.pathsep + os.environ["JUPYTER_PATH"]
        with environment(variables):
            yield


def lab(folder: Path, arguments: Sequence[str]) -> None:
    """JupyterLab on a folder with our own kernel, in this process, until it is stopped."""
    from jupyterlab.labapp import LabApp

    root = ["--allow-root"] if os.geteuid() == 0 else []
    with own_kernel(alone=False):
        LabApp.launch_instance([f"--ServerApp.root_dir={folder}", *root, *arguments])


def python_path() -> str:
    """PYTHONPATH for child processes: they import this checkout's `dinv`, installed or not."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join(filter(None, (str(repository_root()), before)))


def read(path: Path) -> NotebookNode:
    """A notebook; ValueError if it is none, or has not the one cell for parameters."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat lets through whatever its parsers raise
        raise ValueError(f"{path} is not a notebook: {error}") from error
    tagged = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    if len(tagged) != 1:
        raise ValueError(
            f"{path} has {len(tagged)} cells tagged 'parameters'; expected one, with profile, "
            "seeds and overrides"
        )
    return notebook


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def execute(source: Path, output: Path, parameters: Mapping) -> NotebookNode:
    """Run a notebook from start to end, keeping what is done so far in `output`.

    Raises papermill's PapermillExecutionError where a cell fails.
    """
    import papermill

    read(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        return papermill.execute_notebook(
            source, output, dict(parameters), kernel_name="python3", progress_bar=False,
            cwd=source.parent,
        )  # fmt: skip
    finally:
        with suppress(OSError, nbformat.reader.NotJSONError):  # not there, or cut off
            notebook = nbformat.read(output, as_version=4)
            write_text(output, nbformat.writes(without_noise(notebook)) + "\n")


def without_noise(notebook: NotebookNode) -> NotebookNode:
    """Drop metadata of the run: absolute paths and times."""
    for part in (notebook, *notebook.cells):
        for name in NOISE:
            part.metadata.pop(name, None)
    return notebook


def tidy(executed: NotebookNode, source: NotebookNode) -> NotebookNode:
    """The source notebook with the outputs of its execution, as it is committed.

    Source, tags and metadata are the source's, cells are numbered from 1, and of the execution
    nothing stays but outputs and the state of widgets.
    """
    result = without_noise(nbformat.from_dict(source))
    code = [cell for cell in result.cells if cell.cell_type == "code"]
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    ran = [cell for cell in ran if "injected-parameters" not in tags(cell)]
    for count, (cell, done) in enumerate(zip(code, ran, strict=True), 1):
        cell.outputs, cell.execution_count = done.outputs, count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    if "widgets" in executed.metadata:
        result.metadata["widgets"] = executed.metadata.widgets
    return result


def write_in_place(executed: Path, source: Path) -> None:
    """Put the outputs of `executed` into the notebook it came from."""
    notebook = tidy(nbformat.read(executed, as_version=4), read(source))
    write_text(source, nbformat.writes(notebook) + "\n")


def write_html(notebook: Path) -> Path:
    """A page beside the notebook."""
    from nbconvert import HTMLExporter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page, _ = HTMLExporter().from_notebook_node(nbformat.read(notebook, as_version=4))
    write_text(notebook.with_suffix(".html"), page)
    return notebook.with_suffix(".html")


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
