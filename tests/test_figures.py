"""The figures: what is drawn is what was given."""

import matplotlib
import pytest
import torch
from matplotlib.colors import to_hex

from dinv import figures

matplotlib.use("Agg")


def test_tile_puts_every_pixel_in_its_place():
    images = torch.arange(3 * 3 * 2 * 2, dtype=torch.float32).reshape(3, 3, 2, 2) / 36
    canvas = figures.tile(images, columns=2)
    assert canvas.shape == (5, 5, 3)
    assert torch.equal(canvas[:2, :2], images[0].permute(1, 2, 0))
    assert torch.equal(canvas[:2, 3:], images[1].permute(1, 2, 0))
    assert torch.equal(canvas[3:, :2], images[2].permute(1, 2, 0))
    assert (canvas[2] == 1).all() and (canvas[:, 2] == 1).all()


def test_tile_of_grey_uint8():
    canvas = figures.tile(torch.full((1, 1, 2, 2), 51, dtype=torch.uint8), columns=1)
    assert canvas.shape == (2, 2, 3) and torch.allclose(canvas, torch.tensor(0.2))


def test_first_of_each_class_takes_the_first():
    labels = torch.tensor([1, 0, 1, 0, 0])
    images = torch.arange(5, dtype=torch.float32).view(5, 1, 1, 1)
    assert figures.first_of_each_class(images, labels, 2, each=2).flatten().tolist() == [1, 3, 0, 2]


def test_method_grids_names_methods_notes_and_classes():
    labels = torch.arange(20) % 4
    pools = {name: (torch.rand(20, 3, 4, 4), labels) for name in ("noise", "DeepDream")}
    figure = figures.method_grids(pools, ["a", "b", "c", "d"], ["judge 1 %", "judge 2 %"], each=3)
    assert [axis.get_title() for axis in figure.axes] == ["noise\njudge 1 %", "DeepDream\njudge 2 %"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c", "d"]
    figures.png(figure)


def test_film_strip_has_a_row_an_image_and_a_column_a_step():
    strip = torch.rand(3, 2, 1, 4, 4)
    figure = figures.film_strip({"one": strip, "two": strip}, [0, 5, 10], ["a", "b"])
    for axis in figure.axes:
        assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "5", "10"]
        drawn = torch.as_tensor(axis.get_images()[0].get_array().data)
        assert torch.allclose(drawn[:4, 5:9, 0], strip[1, 0, 0], atol=1e-6)  # first image, second step
    figures.png(figure)


def test_loss_curves_leave_out_what_a_method_has_not():
    curves = {
        "DeepDream": (("cross-entropy", "objective"), torch.ones(4, 2)),
        "DeepInversion": (("cross-entropy", "feature statistics", "objective"), torch.ones(4, 3)),
    }
    figure = figures.loss_curves(curves)
    assert [axis.get_title() for axis in figure.axes] == ["cross-entropy", "feature statistics"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 1]
    figures.png(figure)


def test_accuracy_bars_show_mean_and_deviation():
    figure = figures.accuracy_bars({"x": {"judge": [40.0, 60.0]}, "y": {"judge": [80.0]}}, chance=10)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [50.0, 80.0]
    (errors,) = figure.axes[0].collections
    several, single = errors.get_segments()
    assert several[0, 1] < 50 < several[1, 1] and not len(single)  # one value has no deviation
    figures.png(figure)


@pytest.mark.parametrize("name", ["deepdream", "DeepDream", "Deep Dream"])
def test_one_colour_a_method(name):
    assert figures.color_of(name) == "tab:orange"


def test_no_two_lines_share_a_colour():
    names = ("a", "deepinversion", "b", "DeepDream")
    figure = figures.curve([0, 1], {name: [1, 2] for name in names}, "x", "y")
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert colors[1::2] == ["tab:blue", "tab:orange"]
    assert len({to_hex(color) for color in colors}) == 4
    figures.png(figure)


def test_png_is_the_same_bytes_twice():
    def make():
        return figures.png(figures.curve([0, 1, 10], {"a": [1, 2, 3]}, "x", "y", log=True))

    assert make() == make() and make().startswith(b"\x89PNG")


def test_a_photograph_is_smaller_as_jpeg_and_a_line_as_png():
    noise = torch.randint(256, (4, 3, 224, 224), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    grain = figures.png(figures.named_images(noise, "abcd"))
    lines = figures.png(figures.curve([0, 1, 10], {"a": [1, 2, 3]}, "x", "y"))
    assert figures.jpeg(grain).startswith(b"\xff\xd8") and len(figures.jpeg(grain)) < len(grain) / 2
    assert len(figures.jpeg(lines)) > len(lines)


def test_progress_has_a_panel_a_method_with_both_lines():
    history = [(1, 20.0, 10.0), (2, 50.0, 30.0)]
    figure = figures.progress({"adi": history, "generator": history[:1]})
    assert [axis.get_title() for axis in figure.axes] == ["adi", "generator"]
    made, real = figure.axes[0].lines
    assert list(made.get_ydata()) == [20, 50] and list(real.get_ydata()) == [10, 30]


def test_curves_keep_their_own_x_and_whole_numbers_whole_ticks():
    figure = figures.curves({"one": ([1, 2, 3], [4, 5, 6]), "two": ([2, 4], [1, 0])}, "x", "y")
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[1, 2, 3], [2, 4]]
    figure.canvas.draw()
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())


def test_confusion_draws_every_matrix_with_its_classes():
    figure = figures.confusion({"teacher": 100 * torch.eye(3), "student": torch.zeros(3, 3)}, ["a", "b", "c"])
    shown = [axis.get_images()[0].get_array() for axis in figure.axes[:2]]
    assert shown[0][1, 1] == 100 and shown[1].max() == 0
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]


def test_embedding_lays_each_kind_over_the_real_ones():
    points = {"real": torch.rand(9, 2), "deepinversion": torch.rand(4, 2), "adi": torch.rand(5, 2)}
    figure = figures.embedding(points)
    counts = [[len(c.get_offsets()) for c in axis.collections] for axis in figure.axes]
    assert counts == [[9, 4], [9, 5]]


def test_histograms_are_densities_over_one_axis():
    figure = figures.histograms({"real": torch.rand(50), "adi": 2 * torch.rand(50)}, "distance")
    assert figure.axes[0].get_xlabel() == "distance"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["real", "adi"]
