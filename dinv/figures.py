"""Every figure one function: tensors and numbers in, a matplotlib figure out.

Images come as uint8 or as float in [0, 1], NCHW. Nothing here computes a result.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

COLORS = {
    "noise": "0.6", "deepdream": "tab:orange", "deepinversion": "tab:blue", "adi": "tab:red",
    "generator": "tab:green", "real": "0.2", "onesize": "tab:purple",
}  # fmt: skip


def tile(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """(N, C, H, W) as one (H', W', 3) float image in [0, 1]: row by row, white gaps."""
    images = images.detach().cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return canvas


def first_of_each_class(images: Tensor, labels: Tensor, classes: int, each: int = 1) -> Tensor:
    """The first `each` images of every class, class after class: chosen by nothing else."""
    picked = [images[(labels == k).nonzero().flatten()[:each].to(images.device)] for k in range(classes)]
    return torch.cat(picked)


def image_grids(
    grids: Mapping[str, Tensor], columns: int, titles: Sequence[str] = (), scale: float = 1.0
) -> Figure:
    """Grids of images side by side, one a method: the layout of the paper's Figure 3.

    Args:
        grids: title -> images, `columns` in a row.
        titles: second lines below the titles, such as an accuracy.
    """
    canvases = {name: tile(images, columns) for name, images in grids.items()}
    height, width = next(iter(canvases.values())).shape[:2]
    side = 3.1 * scale
    figure, axes = plt.subplots(
        1, len(grids), figsize=(side * len(grids), side * height / width + 0.7), squeeze=False
    )
    for index, (axis, (name, canvas)) in enumerate(zip(axes[0], canvases.items(), strict=True)):
        axis.imshow(canvas.numpy(), interpolation="nearest")
        axis.set_title(f"{name}\n{titles[index]}" if titles else name, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    return figure


def method_grids(
    pools: Mapping[str, tuple[Tensor, Tensor]],
    classes: Sequence[str],
    notes: Sequence[str] = (),
    each: int = 5,
) -> Figure:
    """Figure 3 of the paper: the same classes by every method, one row a class.

    Args:
        pools: method -> (images, labels).
        notes: one line under each method's name.
    """
    grids = {
        name: first_of_each_class(images, labels, len(classes), each)
        for name, (images, labels) in pools.items()
    }
    figure = image_grids(grids, each, notes, scale=0.75)
    axis = figure.axes[0]
    step = axis.get_images()[0].get_array().shape[0] / len(classes)
    axis.axis("on")
    axis.set_xticks([])
    axis.set_yticks([step * (k + 0.5) for k in range(len(classes))], classes, fontsize=7)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.tight_layout()
    return figure


def class_rows(
    pools: Mapping[str, tuple[Tensor, Tensor]],
    classes: Sequence[str],
    notes: Sequence[str] = (),
    each: int = 2,
) -> Figure:
    """The first `each` images of every class, a class a column, one panel below the other.

    Args:
        pools: method -> (images, labels).
        notes: what is said after each method's name.
    """
    count = len(classes)
    figure, axes = plt.subplots(len(pools), 1, figsize=(0.78 * count, (0.78 * each + 0.5) * len(pools)))
    for index, (axis, (name, (images, labels))) in enumerate(zip(_list(axes), pools.items(), strict=True)):
        found = first_of_each_class(images, labels, count, each)
        rows = found.unflatten(0, (count, each)).transpose(0, 1).flatten(0, 1)
        canvas = tile(rows, count)
        axis.imshow(canvas.numpy(), interpolation="nearest")
        axis.set_title(f"{name}: {notes[index]}" if notes else name, fontsize=10)
        pitch = canvas.shape[1] / count
        axis.set_xticks([pitch * (k + 0.5) for k in range(count)], classes, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.tight_layout()
    return figure


def named_images(images: Tensor, names: Sequence[str], columns: int = 4) -> Figure:
    """Images large enough to be looked at, each under its name: the layout of the paper's Figure 5."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, name in zip(axes.flat, images, names, strict=False):
        axis.imshow(tile(image[None], 1).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=9)
    figure.tight_layout()
    return figure


def emerging(columns: int = 4) -> Callable[[Any], None]:
    """A callback for `invert` that shows the images as they are, in place of those before.

    Where nothing is listening, as in a script, it shows nothing.
    """
    from IPython import get_ipython
    from IPython.display import DisplayHandle, Image

    handle = DisplayHandle()
    begun = False

    def callback(progress: Any) -> None:
        nonlocal begun
        if get_ipython() is None:
            return
        made = progress.images()
        grid = image_grids({f"step {progress.step} of {progress.steps}": made}, min(columns, len(made)))
        image = Image(data=png(grid), format="png")
        handle.update(image) if begun else handle.display(image)
        begun = True

    return callback


def film_strip(strips: Mapping[str, Tensor], steps: Sequence[int], names: Sequence[str]) -> Figure:
    """Images on their way from noise: one row an image, one column a step, one panel a method.

    Args:
        strips: method -> (S, N, C, H, W), S snapshots of N images.
    """
    columns = len(steps)
    count = next(iter(strips.values())).shape[1]
    figure, axes = plt.subplots(len(strips), 1, figsize=(columns * 1.05, len(strips) * count * 1.08))
    for axis, (name, strip) in zip(_list(axes), strips.items(), strict=True):
        canvas = tile(strip.transpose(0, 1).flatten(0, 1), columns)
        axis.imshow(canvas.numpy(), interpolation="nearest")
        pitch = canvas.shape[1] / columns
        axis.set_xticks([pitch * (i + 0.5) for i in range(columns)], [str(s) for s in steps], fontsize=8)
        pitch = canvas.shape[0] / count
        axis.set_yticks([pitch * (i + 0.5) for i in range(count)], names, fontsize=8)
        axis.tick_params(length=0)
        axis.set_title(name, fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    _list(axes)[-1].set_xlabel("iteration")
    figure.tight_layout()
    return figure


def scrubber(strips: Mapping[str, Tensor], steps: Sequence[int], columns: int) -> Any:
    """A slider over snapshots: images on their way from noise, a step at a time; works without a kernel, too.

    Args:
        strips: method -> (S, N, C, H, W), S snapshots of N images, `columns` of them in a row.
    """
    import ipywidgets as widgets

    def picture(index: int) -> widgets.Image:
        figure = image_grids({name: strip[index] for name, strip in strips.items()}, columns)
        return widgets.Image(value=jpeg(png(figure)), format="jpeg")

    stack = widgets.Stack([picture(index) for index in range(len(steps))], selected_index=len(steps) - 1)
    slider = widgets.SelectionSlider(options=[(str(s), i) for i, s in enumerate(steps)], index=len(steps) - 1)
    slider.description = "iteration"
    widgets.jslink((slider, "index"), (stack, "selected_index"))
    return widgets.VBox([slider, stack])


def loss_curves(curves: Mapping[str, tuple[Sequence[str], Tensor]]) -> Figure:
    """Every term of the objective over the iterations, one panel a term, one line a method.

    Args:
        curves: method -> (term names, values (steps, terms), unweighted).
    """
    names = list(dict.fromkeys(n for terms, _ in curves.values() for n in terms if n != "objective"))
    figure, axes = plt.subplots(1, len(names), figsize=(3.1 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for method, (terms, values) in curves.items():
            if name in terms:
                line = values[:, list(terms).index(name)]
                axis.plot(range(1, len(line) + 1), line, label=method, color=color_of(method))
        drawn = torch.cat([torch.as_tensor(line.get_ydata()) for line in axis.lines])
        if drawn.min() > 0 and drawn.max() > 20 * drawn.min():
            axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("iteration")
    axes[0][0].set_ylabel("unweighted value")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def layer_distances(
    distances: Mapping[str, Tensor], ylabel: str = "distance to BatchNorm statistics"
) -> Figure:
    """Distance to the BatchNorm statistics, layer by layer, one line a kind of image."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    colors = colors_of(distances)
    for name, values in distances.items():
        axis.plot(range(1, len(values) + 1), values, marker="o", ms=4, label=name, color=colors[name])
    axis.set_yscale("log")
    axis.set_xlabel("BatchNorm layer, from the image up")
    axis.set_ylabel(ylabel)
    axis.set_xticks(range(1, len(next(iter(distances.values()))) + 1))
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def accuracy_bars(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    ylabel: str = "top-1 accuracy, %",
    chance: float = 0.0,
) -> Figure:
    """Accuracies as bars, with their sample deviation where n > 1: groups along x, one colour a judge.

    Args:
        groups: x label -> judge -> one accuracy a seed, percent.
        chance: a dotted line at guessing.
    """
    judges = list(next(iter(groups.values())))
    figure, axis = plt.subplots(figsize=(1.6 + 1.15 * len(groups), 3.0))
    width = 0.8 / len(judges)
    for offset, judge in enumerate(judges):
        places = [i + (offset - (len(judges) - 1) / 2) * width for i in range(len(groups))]
        values = [torch.tensor(list(group[judge])) for group in groups.values()]
        heights = [v.mean().item() for v in values]
        spread = [v.std().item() if len(v) > 1 else math.nan for v in values]
        axis.bar(places, heights, width * 0.95, yerr=spread, capsize=3, label=judge)
    if chance:
        axis.axhline(chance, color="0.5", ls=":", lw=1, label="chance")
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.set_ylabel(ylabel)
    axis.set_ylim(0, 105)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    return figure


def curve(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, log: bool = False
) -> Figure:
    """Lines with markers over one x axis."""
    figure = curves({name: (x, values) for name, values in lines.items()}, xlabel, ylabel)
    axis = figure.axes[0]
    if log:
        axis.set_xscale("symlog", linthresh=min((v for v in x if v > 0), default=1))
        axis.set_xticks(list(x), [f"{v:g}" for v in x])
        axis.minorticks_off()
    figure.tight_layout()
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str
) -> Figure:
    """Lines with markers, each with an x of its own."""
    figure, axis = plt.subplots(figsize=(4.8, 3.0))
    colors = colors_of(lines)
    for name, (x, values) in lines.items():
        axis.plot(x, values, marker="o", ms=4, label=name, color=colors[name])
    if all(value == int(value) for x, _ in lines.values() for value in x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def progress(histories: Mapping[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """Figure 4 of the paper: accuracy on generated and on real images over the rounds, a panel a method.

    Args:
        histories: method -> (round, agreement on generated images, accuracy on real images), percent.
    """
    figure, axes = plt.subplots(
        1, len(histories), figsize=(3.0 * len(histories), 2.7), sharey=True, squeeze=False
    )
    for axis, (name, history) in zip(axes[0], histories.items(), strict=True):
        rounds, made, real = zip(*history, strict=True)
        axis.plot(rounds, made, color=color_of(name), ls="--", label="generated images, by the teacher")
        axis.plot(rounds, real, color=color_of("real"), label="real test images")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("round")
        axis.set_ylim(0, 100)
    axes[0][0].set_ylabel("student's accuracy, %")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def confusion(matrices: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """Confusion matrices side by side, rows in percent: the true class down, the answer across."""
    figure, axes = plt.subplots(
        1, len(matrices), figsize=(3.6 * len(matrices) + 0.6, 3.5), sharey=True, squeeze=False
    )
    for axis, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
        shown = axis.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=100)
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("answer")
    axes[0][0].set_yticks(range(len(classes)), classes, fontsize=7)
    axes[0][0].set_ylabel("true class")
    figure.tight_layout()
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8, label="%")
    return figure


def embedding(points: Mapping[str, Tensor], real: str = "real") -> Figure:
    """Figure 7 of the paper: each kind of image over the real ones, in the first two principal components.

    Args:
        points: kind -> (N, 2).
        real: the kind that lies behind all the others.
    """
    others = [name for name in points if name != real]
    figure, axes = plt.subplots(
        1, len(others), figsize=(3.2 * len(others), 3.1), sharex=True, sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], others, strict=True):
        for kind in (real, name):
            axis.scatter(*points[kind].T, s=3, alpha=0.5, lw=0, label=kind, color=color_of(kind))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("first component")
        axis.legend(fontsize=8, markerscale=3)
    axes[0][0].set_ylabel("second component")
    figure.tight_layout()
    return figure


def histograms(values: Mapping[str, Tensor], xlabel: str) -> Figure:
    """Densities of several sets of numbers over one axis."""
    low = min(v.min().item() for v in values.values())
    high = max(v.max().item() for v in values.values())
    figure, axis = plt.subplots(figsize=(5.6, 2.8))
    for name, numbers in values.items():
        color = color_of(name)
        axis.hist(
            numbers, bins=60, range=(low, high), density=True, histtype="step", label=name, color=color
        )
    axis.set_xlabel(xlabel)
    axis.set_ylabel("density")
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def color_of(name: str) -> str | None:
    """One colour a method, the same in every figure; None lets matplotlib choose."""
    return COLORS.get(name.lower().replace(" ", ""))


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """`color_of` each, and for what has none the next of matplotlib's that no other name has."""
    known = {name: color_of(name) for name in names}
    cycle = itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
    taken = {to_hex(color) for color in known.values() if color}
    free = (color for color in cycle if to_hex(color) not in taken)
    return {name: color or next(free) for name, color in known.items()}


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG bytes without metadata that changes from run to run; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def jpeg(data: bytes, quality: int = 88) -> bytes:
    """The same figure as JPEG: a third of the bytes of a PNG of photographs, and more than one of lines."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, format="jpeg", quality=quality)
    return buffer.getvalue()


def _list(axes) -> list:
    return [axes] if not hasattr(axes, "__len__") else list(axes)
