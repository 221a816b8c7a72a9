"""The widgets: a control that is moved changes what is shown, and what cannot be shown says why."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import matplotlib
import nbformat
import pytest
import torch
from ipywidgets.embed import embed_data
from PIL import Image

from dinv import InversionSettings, NoBatchNorm, figures, reproduce, widgets

matplotlib.use("Agg")
SETTINGS = InversionSettings(lr=0.1, schedule="cosine", jitter=1, compile="never", stages=((3, 4), (4, 8)))
IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 5


@pytest.fixture
def bench(tiny):
    return widgets.workbench(tiny(), tiny(1), IMAGES, SETTINGS, tv=0.01, alpha_f=1.0, images=10)


def shown(panel):
    """The picture's bytes and the caption; the bytes are of a picture of the format that is announced."""
    with Image.open(io.BytesIO(panel.picture.value)) as picture:
        assert picture.format.lower() == panel.picture.format
    return panel.picture.value, panel.caption.value


def test_a_panel_is_a_picture_with_its_words_where_no_widget_is_shown(tiny):
    panel = widgets.batchnorm_viewer(tiny(), {"real": IMAGES})
    data, about = panel._repr_mimebundle_()
    kind = f"image/{panel.picture.format}"
    assert base64.b64decode(data[kind]) == panel.picture.value and about[kind]["alt"] == panel.alt
    assert panel.alt in data["text/plain"] and "VBox(" not in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    json.dumps([data, about])  # as the notebook keeps it


# ---- the scrubber --------------------------------------------------------------------------------
def test_the_scrubber_holds_a_picture_for_every_step():
    strip = torch.rand(3, 2, 3, 4, 4)
    panel = widgets.scrubber({"one": strip, "two": strip}, [0, 5, 10], 2)
    slider, stack = panel.children
    assert len({picture.value for picture in stack.children}) == 3
    assert (slider.index, slider.label, stack.selected_index) == (2, "10", 2)
    drawn = figures.image_grids({"one": strip[2], "two": strip[2]}, 2)
    assert panel.picture.value == figures.jpeg(figures.png(drawn))
    with pytest.raises(ValueError, match="4 steps need as many snapshots; one has 3"):
        widgets.scrubber({"one": strip}, [0, 1, 2, 3], 2)


def test_in_the_book_the_scrubber_has_its_slider_and_another_panel_its_picture(tiny):
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("build", reproduce.ROOT / "book_source" / "build.py")
    spec.loader.exec_module(build := importlib.util.module_from_spec(spec))
    scrubber = widgets.scrubber({"one": torch.rand(2, 2, 3, 4, 4)}, [0, 5], 2)
    panels = (scrubber, widgets.batchnorm_viewer(tiny(), {"real": IMAGES}))
    notebook = nbformat.v4.new_notebook()
    for panel in panels:
        data, metadata = panel._repr_mimebundle_()
        output = nbformat.v4.new_output("display_data", data, metadata=metadata)
        notebook.cells.append(nbformat.v4.new_code_cell(outputs=[output]))
    notebook.metadata.widgets = {build.STATE: embed_data(panels)["manager_state"]}
    slider, picture = (cell.outputs[0].data for cell in build.readable(notebook).cells)
    assert slider["text/html"].count("<img") == 2 and f'alt="{scrubber.alt}"' in slider["text/html"]
    assert set(picture) == {"text/plain", f"image/{panels[1].picture.format}"}


# ---- the workbench -------------------------------------------------------------------------------
def test_the_workbench_dreams_when_the_button_is_pressed_and_not_before(bench):
    first = shown(bench)
    assert re.search(r"teacher \d+ %, verifier \d+ %; [\d.]+ times as far as 10 real images", first[1])
    for name, value in {"α_f": 10.0, "seed": 3, "class": "class2", "steps": 14}.items():
        bench.controls[name].value = value
        assert shown(bench) == first
        bench.button.click()
        assert shown(bench) != first and not bench.button.disabled
        first = shown(bench)
    assert first[1].startswith("cross-entropy + 0.01 ")


def test_the_workbench_has_no_memory(bench):
    first = shown(bench)
    bench.controls["seed"].value = 1
    bench.button.click()
    assert shown(bench)[0] != first[0]
    bench.controls["seed"].value = 0
    bench.button.click()
    assert shown(bench) == first


def test_the_workbench_runs_all_stages_and_asks_for_the_class(bench, monkeypatch):
    calls, invert = [], widgets.invert
    monkeypatch.setattr(widgets, "invert", lambda *a, **b: calls.append(a) or invert(*a, **b))
    bench.controls["steps"].value = 14
    bench.controls["class"].value = "class3"
    bench.controls["α_tv"].value = 0
    bench.button.click()
    ((_, labels, objective, settings),) = calls
    assert settings.stages == ((6, 4), (8, 8)) and labels.tolist() == [3] * 10
    assert dict(zip(objective.names, objective.weights, strict=True))["total variation"] == 0


def test_a_failed_dream_is_told_in_the_caption(bench, monkeypatch):
    picture, _ = shown(bench)

    def fail(*given, **options):
        raise ArithmeticError("the <term> is not finite")

    monkeypatch.setattr(widgets, "invert", fail)
    bench.button.click()
    assert shown(bench) == (picture, "No new picture: the &lt;term&gt; is not finite")
    assert not bench.button.disabled


def test_a_workbench_refuses_what_cannot_work(tiny):
    with pytest.raises(ValueError, match="40 images do not fill one batch of 64"):
        widgets.workbench(tiny(), tiny(1), IMAGES, SETTINGS, tv=0.01, alpha_f=1.0, images=64)
    with pytest.raises(ValueError, match="tv=0 and alpha_f=1.0 must be positive"):
        widgets.workbench(tiny(), tiny(1), IMAGES, SETTINGS, tv=0, alpha_f=1.0)
    with pytest.raises(NoBatchNorm):
        widgets.workbench(tiny(norm=False), tiny(1), IMAGES, SETTINGS, tv=0.01, alpha_f=1.0)


# ---- the others ----------------------------------------------------------------------------------
def test_the_inspector_shows_one_image_and_the_surest_answers(tiny, monkeypatch):
    drawn, answers = [], figures.answers
    monkeypatch.setattr(figures, "answers", lambda *a: drawn.append(a) or answers(*a))
    pools = {"adi": (IMAGES, LABELS), "real": ((255 * IMAGES[:7]).byte(), LABELS[:7])}
    networks = {"teacher": tiny(), "verifier": tiny(1)}
    panel = widgets.inspector(pools, networks)
    first = shown(panel)
    panel.controls["image"].value = 9
    image, says, title = drawn[-1]
    assert torch.equal(image, IMAGES[9]) and title == "ADI, image 9: class4"
    shares = 100 * networks["verifier"](IMAGES[9:10]).softmax(1)[0]
    best = {f"class{k}": shares[k].item() for k in shares.argsort(descending=True)[:3]}
    assert says["verifier"] == pytest.approx(best, abs=0.01) and list(says["verifier"]) == list(best)
    assert shown(panel)[0] != first[0] and f"verifier {next(iter(best))}" in panel.caption.value
    panel.controls["pool"].value = "real"
    assert panel.controls["image"].max == panel.controls["image"].value == 6
    assert torch.equal(drawn[-1][0], pools["real"][0][6])
    with pytest.raises(ValueError, match="adi has 40 images and 7 labels"):
        widgets.inspector({"adi": (IMAGES, LABELS[:7])}, networks)
    with pytest.raises(ValueError, match="at least one pool"):
        widgets.inspector({}, networks)


def test_the_figure_of_answers_has_a_bar_for_each():
    says = {"teacher": {"cat": 90.0, "dog": 8.0}, "verifier": {"dog": 60.0, "cat": 30.0, "frog": 5.0}}
    figure = figures.answers(IMAGES[0], says, "ADI, image 0: cat")
    image, teacher, verifier = figure.axes
    assert image.get_title() == "ADI, image 0: cat"
    assert [bar.get_width() for bar in verifier.patches] == [60, 30, 5]
    assert [text.get_text() for text in verifier.get_yticklabels()] == ["dog", "cat", "frog"]
    assert (teacher.get_title(), verifier.get_title()) == ("teacher", "verifier")


def test_the_batchnorm_viewer_has_the_numbers_of_the_layer(tiny, portrait):
    model = tiny()
    before = portrait(model)
    panel = widgets.batchnorm_viewer(model, {"real": IMAGES, "noise": 1 - IMAGES})
    first = shown(panel)
    panel.controls["layer"].value = 1
    panel.controls["channel"].value = 5
    norm = model.net[4]
    inputs = model.net[:4]((IMAGES - model.mean) / model.std)[:, 5]
    kept, of_real = (
        f"{mean:.2f} ± {deviation:.2f}"
        for mean, deviation in (
            (norm.running_mean[5], norm.running_var[5].sqrt()),
            (inputs.mean(), inputs.std(correction=0)),
        )
    )
    assert panel.caption.value.startswith(f"Kept {kept}; real images {of_real}; noise ")
    assert shown(panel)[0] != first[0] and portrait(model) == before
    panel.controls["layer"].value = 0
    assert panel.controls["channel"].max == panel.controls["channel"].value == 3
    with pytest.raises(NoBatchNorm):
        widgets.batchnorm_viewer(tiny(norm=False), {"real": IMAGES})
    with pytest.raises(ValueError, match="needs images"):
        widgets.batchnorm_viewer(model, {"real": IMAGES[:0]})


# ---- in a browser --------------------------------------------------------------------------------
NOTEBOOK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import _tiny
from dinv import InversionSettings, widgets

images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
settings = InversionSettings(lr=0.1, compile="never", stages=((3, 4), (4, 8)))
"""
CELLS = (
    "widgets.batchnorm_viewer(_tiny(), {'real': images})",
    "widgets.workbench(_tiny(), _tiny(1), images, settings, tv=0.01, alpha_f=1.0, images=10)",
    "widgets.scrubber({'one': images.view(4, 10, 3, 8, 8)}, [0, 1, 2, 3], 5)",
)
DRIVER = """
const { chromium } = require('playwright-core');
(async () => {
  const [address, executablePath] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath, args: ['--no-sandbox'] });
  const page = await (await browser.newContext({ viewport: { width: 1200, height: 3000 } })).newPage();
  const errors = [];
  page.on('pageerror', error => errors.push(String(error)));
  page.on('console', line => { // that a host of JupyterLab's own is out of reach is nothing of ours
    const text = line.text();
    if (line.type() == 'error' && !text.startsWith('Failed to load resource')) errors.push(text);
  });
  await page.goto(address);
  await page.waitForSelector('.jp-Notebook .jp-Cell', { timeout: 240000 });
  await page.getByText('| Idle').waitFor({ timeout: 240000 }); // the kernel's name stands before it
  await page.getByRole('menuitem', { name: 'Run', exact: true }).click();
  await page.getByText('Run All Cells', { exact: true }).click();
  const panels = page.locator('.jp-OutputArea-output .widget-vbox:has(img)');
  await page.waitForFunction(count => document.querySelectorAll('.jp-OutputArea-output .widget-vbox').length
    >= count, 3, { timeout: 240000 });
  const told = {};
  const sources = panel => panel.locator('img:visible').evaluateAll(all => Promise.all(all.map(async image =>
    (await (await fetch(image.src)).text()))));
  const act = async (name, index, what) => {
    const panel = panels.nth(index);
    await panel.locator('img:visible').first().waitFor();
    const before = String(await sources(panel));
    await what(panel);
    for (let turn = 0; turn < 600 && String(await sources(panel)) == before; turn++)
      await page.waitForTimeout(100);
    told[name] = String(await sources(panel)) != before;
  };
  const press = key => async panel => {
    await panel.locator('.noUi-handle').last().focus();
    await page.keyboard.press(key);
  };
  await act('viewer', 0, press('ArrowRight'));
  await act('workbench', 1, async panel => {
    await panel.locator('input[type=number]').last().fill('7');
    await panel.locator('input[type=number]').last().press('Enter');
    await panel.getByRole('button', { name: 'dream' }).click();
  });
  await act('scrubber', 2, press('ArrowLeft'));
  console.log(JSON.stringify({ told, errors }));
  await browser.close();
})().catch(error => { console.error(error); process.exit(1); });
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_widgets_work_in_jupyterlab_in_a_browser(tmp_path):
    node, browser = shutil.which("node"), shutil.which("chromium") or shutil.which("chromium-browser")
    if not node or not browser:
        pytest.skip("needs node and chromium")
    found = [node, "-e", "require('playwright-core')"]
    if subprocess.run(found, capture_output=True, cwd=tmp_path).returncode:
        pytest.skip("needs npm's playwright-core, found by NODE_PATH")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "drive.js").write_text(DRIVER, encoding="utf-8")
    sources = [NOTEBOOK.format(tests=os.path.dirname(__file__)), *CELLS]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, sources)))
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    nbformat.write(notebook, tmp_path / "notebooks" / "panels.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", f"--port={port}"]
    command += [f"--ServerApp.root_dir={tmp_path / 'notebooks'}", "--IdentityProvider.token=secret"]
    folders = {"HOME": tmp_path, "JUPYTER_RUNTIME_DIR": tmp_path / "runtime", "PYTHONPATH": reproduce.ROOT}
    variables = os.environ | {name: str(path) for name, path in folders.items()}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    server = subprocess.Popen(command, env=variables, cwd=tmp_path, **pipes)
    try:
        while not re.search(rf":{port}/lab\?token=", line := server.stderr.readline().decode()):
            assert line, f"it ended with status {server.wait()}"
        address = f"http://127.0.0.1:{port}/lab/tree/panels.ipynb?token=secret"
        drive = [node, str(tmp_path / "drive.js"), address, browser]
        run = subprocess.run(drive, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result == {"told": {"viewer": True, "workbench": True, "scrubber": True}, "errors": []}
