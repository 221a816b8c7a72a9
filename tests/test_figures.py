"""The figures: what is drawn is what was given."""

import itertools
from types import SimpleNamespace

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from nbconvert import HTMLExporter

from dinv import figures
from dinv.experiments import notebook, paper

matplotlib.use("Agg")
CLASSES = ["a", "b", "c", "d"]
EYES = {  # linear RGB as it is seen (G. M. Machado et al., 2009, severity 1)
    "by most": np.eye(3),
    "by a deuteranope": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
    ],
    "by a protanope": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
    ],
}  # fmt: skip
TO_XYZ = [[0.4339, 0.3762, 0.1899], [0.2127, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]]  # white is (1, 1, 1)


def texts(labels):
    return [label.get_text() for label in labels]


def test_tile_puts_every_pixel_in_its_place():
    images = torch.arange(3 * 3 * 2 * 2, dtype=torch.float32).reshape(3, 3, 2, 2) / 36
    canvas = figures.tile(images, columns=2)
    for image, (top, left) in zip(images, [(0, 0), (0, 3), (3, 0)], strict=True):
        assert torch.equal(canvas[top : top + 2, left : left + 2], image.permute(1, 2, 0))
    assert canvas.shape == (5, 5, 3) and (canvas[2] == 1).all() and (canvas[:, 2] == 1).all()
    grey = torch.full((1, 1, 2, 2), 51, dtype=torch.uint8)
    assert torch.allclose(figures.tile(grey, columns=1), torch.full((2, 2, 3), 0.2))


def test_images_are_drawn_in_their_places_with_names():
    labels = torch.arange(20) % 4
    pools = {name: (torch.rand(20, 3, 4, 4), labels) for name in ("noise", "deepdream")}
    figure = figures.method_grids(pools, CLASSES, ["90 %", "5 %"], each=3)
    assert texts(axis.title for axis in figure.axes) == ["noise\n90\u00a0%", "DeepDream\n5\u00a0%"]
    figure = figures.class_rows(pools, CLASSES, each=2)
    assert (
        texts(axis.title for axis in figure.axes) == ["noise", "DeepDream"]
        and texts(figure.axes[1].get_xticklabels()) == CLASSES
    )
    drawn = torch.as_tensor(figure.axes[0].get_images()[0].get_array().data)
    assert torch.allclose(drawn[5:9, 5:9], pools["noise"][0][5].permute(1, 2, 0), atol=1e-6)  # b's second
    strip = torch.rand(3, 2, 1, 4, 4)
    figure = figures.film_strip({"one": strip, "two": strip}, [0, 5, 10], ["a", "b"])
    assert texts(figure.axes[-1].get_xticklabels()) == ["0", "5", "10"]
    drawn = torch.as_tensor(figure.axes[1].get_images()[0].get_array().data)
    assert torch.allclose(drawn[:4, 5:9, 0], strip[1, 0, 0], atol=1e-6)  # first image, second step


def test_loss_curves_leave_out_terms_that_a_method_has_not():
    one, two = (("prior", "objective"), torch.ones(4, 2)), (("prior", "l2", "objective"), torch.ones(4, 3))
    figure = figures.loss_curves({"DeepDream": one, "DeepInversion": two}, title="a finding")
    assert texts(axis.title for axis in figure.axes) == ["prior", "l2"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 1]
    assert figure.legends[0].get_title().get_text() == "a finding"


def test_accuracy_bars_show_mean_and_deviation():
    groups = {"x": [40.0, 60.0], "all real": [80.0], "oracle": [70.0]}  # an oracle has old real images
    figure = figures.accuracy_bars({name: {"verifier": values} for name, values in groups.items()}, chance=10)
    bars = [(bar.get_width(), bar.get_hatch()) for bar in figure.axes[0].patches]
    assert bars == [(50.0, None), (80.0, "///"), (70.0, "///")]
    assert texts(figure.axes[0].texts) == ["50.0", "80.0", "70.0"] and texts(figure.texts)[0] == "± sd, n = 2"
    ends = [x for line in figure.axes[0].lines for x in line.get_xdata() if x == x and x not in (10, 80, 70)]
    assert [min(ends), max(ends)] == pytest.approx([50 - 200**0.5, 50 + 200**0.5])
    figure = figures.accuracy_bars({"x": {"a": [40.0, 60.0], "b": [1.0, 2.0, 3.0]}})
    assert texts(figure.texts)[0] == "± sd, n = 2 to 3"


def test_a_method_looks_the_same_everywhere_and_no_two_lines_are_alike():
    names = ("a", "deepinversion", "b", "DeepDream", "teacher (resnet_small)")
    looks = figures.styles(names)
    for place in range(3):  # colour, marker, line style
        assert len({look[place] for look in looks.values()}) == (5, 5, 4)[place]
    assert looks["DeepDream"] == figures.styles(["deepdream"])["deepdream"] == figures.STYLES["DeepDream"]
    figure = figures.curve([0, 1], {name: [1, 2] for name in names}, "x", "y")
    drawn = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert drawn == [look[:2] for look in looks.values()]
    assert texts(figure.legends[0].get_texts())[-1] == "teacher (ResNet-small)"


def lightness_and_hue(color, eyes):
    """CIE L*, a*, b* of a colour, as these eyes see it."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(eyes @ linear, 0, 1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
def test_no_two_methods_have_one_colour_to_the_colour_blind(eyes):
    """2 is a difference that can be seen at all, side by side."""
    methods = {
        name: lightness_and_hue(look[0], np.array(EYES[eyes])) for name, look in figures.STYLES.items()
    }
    others = dict(enumerate(lightness_and_hue(c, np.array(EYES[eyes])) for c in figures.OKABE_ITO))
    for colors in (methods, others):
        apart = {
            pair: np.linalg.norm(np.subtract(*map(colors.get, pair)))
            for pair in itertools.combinations(colors, 2)
        }
        assert not {pair: distance for pair, distance in apart.items() if distance < 15}
    four = [others[index] for index in range(4)]  # figures of unnamed lines have four at most
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(four, 2)) > 20


def test_curves_keep_their_own_x_and_average_over_seeds():
    lines = {"one": ([1, 2, 3], [4, 5, 6]), "two": ([2, 4], torch.tensor([[1.0, 0], [3, 2]]))}
    figure = figures.curves(lines, "x", "y")
    one, two = (line for line in figure.axes[0].lines if line.get_marker() in "o^")
    assert list(one.get_xdata()) == [1, 2, 3] and list(two.get_ydata()) == [2, 1]
    assert texts(figure.texts)[0] == "± sd, n = 2"
    figure.canvas.draw()
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())


def test_a_figure_describes_itself():
    pools = {name: (torch.rand(8, 3, 4, 4), torch.arange(8) % 4) for name in ("noise", "adi")}
    lines = {"teacher": [[1.0, 2.0], [2.0, 3.0]], "verifier": [1, 2]}
    whole = 100 * torch.eye(4)
    for figure, text in {
        figures.method_grids(
            pools, CLASSES, ["5 %", ""]
        ): "Images. Panels: noise 5 %; ADI. Rows: a; b; c; d.",
        figures.film_strip({"x": torch.rand(2, 1, 3, 4, 4)}, [0, 9], ["a"]): (
            "Images. Panels: x. Axes: iteration. Rows: a. Columns: 0; 9."
        ),
        figures.curve([0, 1], lines, "steps", "of them,\n%", log=True, title="A finding"): (
            "A finding. Lines: teacher; verifier. Axes: of them, % against steps."
        ),
        figures.progress({"adi": [(1, 2.0, 3.0)]}): (
            "Lines: synthetic images (teacher's answers); real test images. Panels: ADI. "
            "Axes: student's accuracy, % against round."
        ),
        figures.accuracy_bars({"x": {"a": [4.0, 6.0], "b": 8}, "real": {"a": 9, "b": 9}}): (
            "Bars: a; b. Axes: top-1 accuracy, %. Rows: x; real images."
        ),
        figures.confusion({"x": whole}, CLASSES, boundary=2): (
            "Confusion matrices. Panels: x. Axes: true class against answer, % of the true class. "
            "Rows: a; b; c; d. Columns: a; b; c; d."
        ),
        figures.embedding({"real": torch.rand(3, 2), "a": torch.rand(3, 2)}): (
            "Points: real images; a. Panels: a. Axes: second component against first component."
        ),
        figures.histograms({"real": torch.rand(9), "adi": torch.rand(9)}, "x"): (
            "Lines: real images; ADI. Axes: density against x."
        ),
    }.items():
        assert figures.describe(figure) == text
    assert figures.describe(figure, "Given.") == f"Given. {text}"


def test_the_text_of_a_figure_is_in_the_notebook_and_on_a_page_made_of_it(tmp_path):
    run = SimpleNamespace(folder=tmp_path)
    shown = notebook.show(run, "a", figures.curve([0, 1], {"a": [1, 2], "b": [2, 3]}, "x", "y"), "Both rise.")
    data, metadata = InteractiveShell.instance().display_formatter.format(shown, include={"image/png"})
    (output,) = [nbformat.v4.new_output("display_data", nbformat.from_dict(data), metadata=metadata)]
    cell = nbformat.v4.new_code_cell("show()", outputs=[output])
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert 'alt="Both rise. Lines: a; b. Axes: y against x."' in page


def test_png_is_the_same_bytes_twice_and_a_photograph_is_smaller_as_jpeg():
    lines, again = (figures.png(figures.curve([0, 1], {"a": [1, 2]}, "x", "y", log=True)) for _ in range(2))
    assert lines == again and lines.startswith(b"\x89PNG") and len(figures.jpeg(lines)) > len(lines)
    noise = torch.randint(256, (4, 3, 224, 224), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    grain = figures.png(figures.named_images(noise, "abcd"))
    assert len(figures.jpeg(grain)) < len(grain)


def test_progress_confusion_embedding_and_histograms_draw_every_kind():
    figure = figures.progress({"adi": [(1, 20.0, 10.0), (2, 50.0, 30.0)], "generator": [(1, 2.0, 3.0)]})
    assert texts(axis.title for axis in figure.axes) == ["ADI", "generator"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[20, 50], [10, 30]]
    figure = figures.confusion({"one": 100 * torch.eye(4), "two": torch.zeros(4, 4)}, CLASSES, boundary=2)
    assert [axis.collections[0].get_array().max() for axis in figure.axes] == [100, 0]
    figure = figures.embedding({"real": torch.rand(9, 2), "a": torch.rand(4, 2), "b": torch.rand(5, 2)})
    assert [[len(c.get_offsets()) for c in axis.collections] for axis in figure.axes] == [[9, 4], [9, 5]]
    (legend,) = figures.histograms({"real": torch.rand(50), "adi": 2 * torch.rand(50)}, "x").legends
    assert texts(legend.get_texts()) == ["real images", "ADI"]


def test_no_number_of_the_paper_is_without_its_mark():
    for name, (columns, rows) in paper.TABLES.items():
        assert all(len(entries) == len(columns) for entries in rows.values()), name
        assert paper.table(name).map(lambda text: text == "–" or text.endswith("]")).all(axis=None)
    assert paper.table("table1").loc["ADI", "ResNet-34 → ResNet-18"] == "93.26 [V]"
