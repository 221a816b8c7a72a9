"""Every figure one function: tensors and numbers in, a matplotlib figure out. Nothing here computes a result.

5.5 inches wide; colour (Okabe and Ito's, no two alike to the colour-blind), marker and line style are fixed
for each method, internal names ("adi") shown as `label(name)`. Images are uint8, or float in [0, 1], NCHW:
one channel is grey, of more than three the first three are red, green and blue; images[:, [3, 2, 1]] chooses
others. Lines and bars take one number, or one per seed: then they show mean ± sample deviation, and n.
"""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from IPython import display, get_ipython
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

WIDTH, GREY = 5.5, "#8c8c8c"
OKABE_ITO = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#56B4E9", "#009E73", "#D55E00")
STYLES = {  # name as shown -> colour, marker, line style
    "noise": ("#5f5f5f", "X", ":"), "raw noise": ("#c4c4c4", "x", ":"),
    "DeepDream": ("#E69F00", "s", "--"), "DeepInversion": ("#0072B2", "o", "-"),
    "ADI": ("#D55E00", "D", "-."), "generator": ("#CC79A7", "^", ":"), "real images": ("#000000", "p", "-"),
    "teacher": ("#56B4E9", "P", "-"), "verifier": ("#009E73", "v", "--"),
}  # fmt: skip
LABELS = {  # internal name -> name as shown
    "real": "real images", "all real": "all real images", "adi": "ADI",
    "deepdream": "DeepDream", "deepinversion": "DeepInversion", "lwf.mc": "LwF.MC", "kl": "Taylor (KL)",
}  # fmt: skip
KINDS = {  # what matplotlib calls a thing that is drawn -> what it is
    "AxesImage": "Images", "QuadMesh": "Confusion matrices", "Rectangle": "Bars", "PathCollection": "Points",
}  # fmt: skip
WORDS = {"->": " → ", "cifar_": "", "resnet_?": "ResNet-", "vgg_?": "VGG-", "efficientnet_": "EfficientNet-"}
RC = {"figure.dpi": 140, "figure.constrained_layout.use": True, "legend.frameon": False}
sns.set_theme("paper", "ticks", OKABE_ITO, font_scale=1.04, rc=RC)
Lines = Mapping[str, tuple[Sequence[float], Any]]  # name -> x, values (points) or (seeds, points)


def label(name: str) -> str:
    """The name to show: "ADI" for "adi", "ResNet-34 → VGG-11" for "cifar_resnet34->cifar_vgg11"."""
    for pattern, text in () if name in LABELS else WORDS.items():
        name = re.sub(pattern, text, name)
    return LABELS.get(name, name)


def styles(names: Iterable[str], points: int = 1) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line style of each name: its own, else the next that none of those has."""
    own = {name: STYLES[label(name)] for name in names if label(name) in STYLES}
    used, kinds = {*itertools.chain(*own.values())}, (OKABE_ITO, "o^sDvP", ("-", "--", ":", "-."))
    free = ([look for look in kind if look not in used] or kind for kind in kinds)
    others = zip(*map(itertools.cycle, free), strict=False)
    looks = {name: own.get(name) or next(others) for name in names}
    return {name: (c, m if points <= 40 else "", line) for name, (c, m, line) in looks.items()}


def tile(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """(N, C, H, W) as one (H', W', 3) float image in [0, 1]: row by row, white gaps."""
    from torchvision.utils import make_grid  # takes seconds to import

    images = images.detach().cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    if images.shape[1] != 1:
        images = F.pad(images[:, :3], (0, 0, 0, 0, 0, max(0, 3 - images.shape[1])))  # of two, blue is black
    grid = make_grid(images, columns, padding=gap, pad_value=1.0)  # frames several images, but not one
    return (grid[:, gap:-gap, gap:-gap] if len(images) > 1 else grid).permute(1, 2, 0)


def first_of_each_class(images: Tensor, labels: Tensor, classes: int, each: int = 1) -> Tensor:
    """The first `each` images of every class, class after class: chosen by nothing else."""
    first = [(labels == k).nonzero().flatten()[:each] for k in range(classes)]
    return images[torch.cat(first).to(images.device)]


def image_grids(grids, columns: int, notes: Sequence[str] = (), across: int = 0) -> Figure:
    """Grids of images, name -> (N, C, H, W), `columns` in a row; `across` grids (or all) side by side."""
    pairs = list(grids.items()) if isinstance(grids, Mapping) else grids
    canvases, across = [tile(images, columns).numpy() for _, images in pairs], across or len(pairs)
    height = WIDTH / across * max(canvas.shape[0] / canvas.shape[1] for canvas in canvases)
    figure, axes = _panels(len(pairs), across, height + 0.25)
    for axis, (name, _), canvas, note in itertools.zip_longest(axes, pairs, canvases, notes, fillvalue=""):
        axis.imshow(canvas, interpolation="nearest")
        lines = [re.sub(r" (?=[\d%])", "\u00a0", line) for line in (label(name), *note.splitlines())]
        lines = [textwrap.fill(line, 80 // across, break_long_words=False) for line in lines]
        axis.set_title((": " if across == 1 else "\n").join(lines), fontsize=9)
        _name_cells(axis)
    return figure


def method_grids(pools: Mapping, classes: Sequence[str], notes: Sequence[str] = (), each: int = 3) -> Figure:
    """Figure 3 of the paper: method -> (images, labels), the first `each` of each class, one row a class."""
    grids = {name: first_of_each_class(*pool, len(classes), each) for name, pool in pools.items()}
    figure = image_grids(grids, each, notes)
    _name_cells(figure.axes[0], classes)
    return figure


def class_rows(pools: Mapping, classes: Sequence[str], notes: Sequence[str] = (), each: int = 2) -> Figure:
    """Method -> (images, labels), the first `each` of every class, one column a class, one panel a method."""
    count, order = len(classes), torch.arange(len(classes) * each, device="cpu").view(-1, each).T.flatten()
    grids = {name: first_of_each_class(*pool, count, each)[order] for name, pool in pools.items()}
    figure = image_grids(grids, count, notes, across=1)
    _name_cells(figure.axes[-1], (), classes, rotation=30, ha="right", rotation_mode="anchor")
    return figure


def named_images(images: Tensor, names: Sequence[str], columns: int = 4) -> Figure:
    """Images large enough to be looked at, each under its name: the layout of the paper's Figure 5."""
    short = [textwrap.shorten(name, 80 // columns, placeholder=" …") for name in names]
    return image_grids(list(zip(short, images.split(1), strict=True)), 1, across=columns)


def film_strip(strips: Mapping[str, Tensor], steps: Sequence[int], names: Sequence[str]) -> Figure:
    """Images on their way from noise: method -> (S, N, C, H, W); one column a step, one row an image."""
    grids = {name: strip.transpose(0, 1).flatten(0, 1) for name, strip in strips.items()}
    figure = image_grids(grids, len(steps), across=1)
    for axis in figure.axes:
        _name_cells(axis, names, [str(step) for step in steps] if axis is figure.axes[-1] else ())
    figure.axes[-1].set_xlabel("iteration")
    return figure


def emerging(columns: int = 4) -> Callable:
    """A callback for `invert`: shows the images as they are in place of those before, in a notebook only."""
    handle, shown = display.DisplayHandle(), []

    def callback(progress) -> None:
        if get_ipython() is not None:
            figure = image_grids({f"step {progress.step} of {progress.steps}": progress.images()}, columns)
            picture = display.Image(data=jpeg(png(figure)), format="jpeg", alt=describe(figure))
            handle.display(picture, update=bool(shown))
            shown.append(progress.step)

    return callback


def curve(x: Sequence[float], lines: Mapping[str, Any], xlabel: str, ylabel: str, **options) -> Figure:
    """`curves` over one x axis."""
    return curves({name: (x, values) for name, values in lines.items()}, xlabel, ylabel, **options)


def curves(lines: Lines, xlabel: str, ylabel: str, log=False, logy=False, title="") -> Figure:
    """Lines, each with its own x; with `log` a tick at each x."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4))
    looks = styles(lines, max(len(x) for x, _ in lines.values()))
    seeds = _draw(axis, lines, looks)
    ticks = sorted({float(value) for x, _ in lines.values() for value in x})
    if log:
        least = min(tick for tick in ticks if tick > 0)
        axis.set_xscale("symlog", linthresh=least)  # linear below the least x, so that 0 has a place
        axis.set_xlim(-0.3 * least if ticks[0] <= 0 else 0.8 * least, 1.25 * ticks[-1])
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    elif all(tick.is_integer() for tick in ticks):
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if logy else "linear")
    return _finish(figure, title, looks, seeds)


def layer_distances(distances, ylabel: str = "distance to BatchNorm statistics", **options) -> Figure:
    """Distance to the BatchNorm statistics, layer by layer: kind of image -> (layers) or (seeds, layers)."""
    layers = range(1, np.shape(next(iter(distances.values())))[-1] + 1)
    return curve(layers, distances, "BatchNorm layer, from the image up", ylabel, logy=True, **options)


def loss_curves(curves: Mapping[str, tuple[Sequence[str], Tensor]], title: str = "") -> Figure:
    """One panel a term, one line a method: method -> (term names, unweighted values (steps, terms))."""
    names = list(dict.fromkeys(name for terms, _ in curves.values() for name in terms if name != "objective"))
    looks = styles(curves, max(len(values) for _, values in curves.values()))
    figure, axes = _panels(len(names), 2, 2.1)
    for axis, term in zip(axes, names, strict=True):
        lines = {m: v[:, list(terms).index(term)] for m, (terms, v) in curves.items() if term in terms}
        values = torch.cat(list(lines.values()))
        _draw(axis, {m: (range(1, len(v) + 1), v) for m, v in lines.items()}, looks)
        axis.set(title=term, yscale="log" if 0 < 20 * values.min() < values.max() else "linear")
    return _finish(figure, title, looks, labels=("iteration", "unweighted value"))


def answers(image: Tensor, says: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """One image (C, H, W), enlarged, and bars: network -> class -> percent, the surest class first."""
    rows = [["image", name] for name in says]
    figure, axes = plt.subplot_mosaic(rows, figsize=(WIDTH, 0.5 + max(2, 0.95 * len(rows))))
    axes["image"].imshow(tile(image[None], 1), interpolation="nearest")
    axes["image"].set_title(textwrap.fill(title, 36), fontsize=9)
    axes["image"].set_axis_off()
    for name, (color, _, _) in styles(says).items():
        axis, shares = axes[name], list(says[name].values())
        bars = axis.barh(list(map(str, says[name])), shares, color=color)
        axis.bar_label(bars, [f"{share:.1f}" for share in shares], padding=2, fontsize=8)
        axis.set(xlim=(0, 118), xticks=range(0, 101, 25))
        axis.set_title(label(name), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    axes[rows[-1][1]].set_xlabel("probability, %")
    return _finish(figure, "", {})


def progress(histories: Mapping[str, Sequence[tuple]], xlabel: str = "round", title: str = "") -> Figure:
    """Figure 4 of the paper: method -> (round, agreement on synthetic images, accuracy on real ones)."""
    figure, axes = _panels(len(histories), 2, 2.1, sharey=True)
    for axis, (name, history) in zip(axes, histories.items(), strict=True):
        rounds, synthetic, real = zip(*history, strict=True)
        axis.plot(rounds, synthetic, "--", rounds, real, "-", color=styles([name])[name][0])
        axis.set(title=label(name), ylim=(0, 101))
    kinds = {"synthetic images (teacher's answers)": ("0.3", "", "--"), "real test images": ("0.3", "", "-")}
    return _finish(figure, title, kinds, labels=(xlabel, "student's accuracy, %"))


def accuracy_bars(groups, xlabel="top-1 accuracy, %", chance=0.0, title="") -> Figure:
    """Bars: group (method) -> network -> %, one or one per seed; hatched: with (old) real images."""
    bars = {(label(g), label(n)): values for g, row in groups.items() for n, values in row.items()}
    cells = [(*name, float(v)) for name, vs in bars.items() for v in np.atleast_1d(vs)]
    rows, names, values = zip(*cells, strict=True)
    order = list(dict.fromkeys(rows))
    looks = {name: (color, "s", "") for name, (color, _, _) in styles(dict.fromkeys(names)).items()}
    figure, axis = plt.subplots(figsize=(WIDTH, 0.9 + len(groups) * (0.16 + 0.2 * len(looks))))
    options = {"saturation": 1, "errorbar": "sd", "capsize": 0.3, "err_kws": {"lw": 1}, "legend": False}
    options["palette"] = [color for color, _, _ in looks.values()]
    sns.barplot(x=values, y=rows, hue=names, order=order, hue_order=list(looks), ax=axis, **options)
    for bar in itertools.chain(*axis.containers):
        middle, mean = bar.get_y() + bar.get_height() / 2, bar.get_width()
        axis.text(101, middle, f"{mean:.1f}", va="center", fontsize=8)
        if re.search("real|oracle", order[round(middle)]):
            bar.set(hatch="///", edgecolor="white", linewidth=0)
    if chance:
        looks["chance"] = (axis.axvline(chance, color=GREY, ls=":", lw=1.2).get_color(), "", ":")
    axis.set(xlabel=xlabel, xlim=(0, 100))
    return _finish(figure, title, looks, set(map(np.size, bars.values())) - {1})


def confusion(matrices: Mapping[str, Tensor], classes: Sequence[str], boundary: int = 0) -> Figure:
    """True class down, answer across, rows in percent; a line after `boundary` classes: the old ones."""
    figure, axes = _panels(len(matrices), 2, 3.0, sharey=True)
    options = {"xticklabels": classes, "yticklabels": classes, "vmin": 0, "vmax": 100, "cmap": "Blues"}
    options |= {"annot": len(classes) <= 12, "fmt": ".0f", "annot_kws": {"size": 6}, "cbar": False}
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        sns.heatmap(matrix.numpy(), square=True, ax=axis, **options)
        for line in (axis.axhline, axis.axvline) if boundary else ():
            line(boundary, color="#D55E00", lw=1)
        axis.tick_params(length=0, labelsize=8 if len(classes) <= 12 else 6)
        axis.set_title(label(name), fontsize=9)
    return _finish(figure, "", {}, labels=("answer, % of the true class", "true class"))


def embedding(points: Mapping[str, Tensor], real: str = "real", title: str = "") -> Figure:
    """Figure 7 of the paper: each kind's points (N, 2) over those of `real`, in two principal components."""
    looks = {k: ("0.72" if k == real else color, "o", "") for k, (color, _, _) in styles(points).items()}
    kinds = [name for name in points if name != real]
    figure, axes = _panels(len(kinds), 2, 2.6, sharex=True, sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for name in (real, kind):
            axis.scatter(*points[name].T, s=7, lw=0, alpha=0.6, color=looks[name][0])
        axis.set_title(label(kind))
    return _finish(figure, title, looks, labels=("first component", "second component"))


def histograms(values: Mapping[str, Tensor], xlabel: str, title: str = "") -> Figure:
    """Densities of several sets of numbers over one axis."""
    edges = np.histogram_bin_edges(np.concatenate([numbers.numpy() for numbers in values.values()]), bins=50)
    figure, axis = plt.subplots(figsize=(WIDTH, 3.0))
    options, looks = {"element": "step", "stat": "density", "fill": False}, styles(values, len(edges))
    for name, (color, _, line) in looks.items():
        sns.histplot(x=values[name].numpy(), bins=edges, color=color, ls=line, ax=axis, **options)
    axis.set(xlabel=xlabel, ylabel="density")
    return _finish(figure, title, looks)


def describe(figure: Figure, finding: str = "") -> str:
    """A text in place of a figure: the finding or the title, then kind, names, panels and axes as drawn."""
    axes, first, last = figure.axes, figure.axes[0], figure.axes[-1]
    drawn = {type(artist).__name__ for artist in first.get_children() if artist is not first.patch}
    kind = next((word for name, word in KINDS.items() if name in drawn), "Lines")
    labels = figure.get_supylabel() or first.get_ylabel(), figure.get_supxlabel() or last.get_xlabel()
    rows, columns = kind not in ("Lines", "Points"), kind not in ("Lines", "Points", "Bars")
    parts = {
        kind: [text.get_text() for legend in figure.legends for text in legend.get_texts()],
        "Panels": [axis.get_title() for axis in axes],
        "Axes": [" against ".join(filter(None, labels))],
        "Rows": [text.get_text() for text in first.get_yticklabels()] if rows else [],
        "Columns": [text.get_text() for text in last.get_xticklabels()] if columns else [],
    }
    title = finding or "".join(legend.get_title().get_text() for legend in figure.legends)
    lines = [f"{name}: {'; '.join(filter(None, texts))}" for name, texts in parts.items() if any(texts)]
    lines = lines if any(parts[kind]) else [kind, *lines]
    return " ".join(" ".join(line.split()).rstrip(".") + "." for line in (title, *lines) if line)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes without metadata that changes from run to run; closes the figure."""
    figure.savefig(buffer := io.BytesIO(), format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def jpeg(data: bytes, quality: int = 88) -> bytes:
    """A PNG as JPEG: a third of its bytes for photographs, more than its bytes for lines."""
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer := io.BytesIO(), "jpeg", quality=quality)
    return buffer.getvalue()


def smaller(data: bytes) -> tuple[bytes, str]:
    """A PNG as it is or as JPEG, whichever has fewer bytes, and which it is: grain as JPEG, lines as PNG."""
    return min((data, "png"), (jpeg(data), "jpeg"), key=lambda pair: len(pair[0]))


def _panels(count: int, columns: int, height: float, **share) -> tuple[Figure, list[plt.Axes]]:
    rows, columns = -(-count // columns), min(columns, count)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height * rows + 0.5), squeeze=False, **share)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def _name_cells(axis: plt.Axes, rows: Sequence[str] = (), columns: Sequence[str] = (), **options) -> None:
    bottom, top, left, right = *axis.get_ylim(), *axis.get_xlim()
    axis.set_yticks(np.linspace(top, bottom, 2 * len(rows) + 1)[1::2], rows, fontsize=8)
    axis.set_xticks(np.linspace(left, right, 2 * len(columns) + 1)[1::2], columns, fontsize=8, **options)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _draw(axis: plt.Axes, lines: Lines, looks: Mapping[str, tuple]) -> set[int]:
    """Means and deviations over seeds; returns the numbers of seeds of lines that have several."""
    seeds = {len(np.atleast_2d(np.asarray(values))) for _, values in lines.values()} - {1}
    options = {"errorbar": "sd" if seeds else None, "err_style": "bars", "lw": 1.6, "mew": 0}
    for name, (x, values) in lines.items():
        places, values = np.asarray(x, float), np.atleast_2d(np.asarray(values, float))
        look = dict(zip(("color", "marker", "ls"), looks[name], strict=True))
        sns.lineplot(x=np.tile(places, len(values)), y=values.ravel(), ax=axis, **options, **look)
    return seeds


def _finish(figure: Figure, title: str, looks: Mapping, seeds=frozenset(), labels=("", "")) -> Figure:
    """Title and legend above the axes, where no line can lie under them; n in the corner."""
    names, n = [label(name) for name in looks if len(looks) > 1], " to ".join(map(str, sorted(seeds)))
    lines = [plt.Line2D([], [], color=c, marker=m, ls=ls) for c, m, ls in looks.values()][: len(names)]
    columns = max(1, min(len(names), 84 // (6 + max(map(len, names), default=0))))
    figure.legend(lines, names, title=textwrap.fill(title, 72), ncols=columns, loc="outside upper center")
    figure.text(0.995, 0.005, f"± sd, n = {n}" if seeds else "", ha="right", fontsize=8)
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    sns.despine(figure)
    return figure
