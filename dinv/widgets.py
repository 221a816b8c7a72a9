"""Pictures with controls, for JupyterLab: each a function of networks, images or results.

    panel = inspector({"ADI": (images, labels)}, {"teacher": teacher, "verifier": verifier})
    panel.controls["image"].value = 7  # as the slider does; the new picture is panel.picture.value

Where no kernel runs (a saved notebook, GitHub, a page of the book) a panel is the picture that was drawn
last. Only a scrubber holds all its pictures: its slider works there, too.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as ipw
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dinv import figures, metrics
from dinv.feature_statistics import batchnorm_statistics, recorded
from dinv.inversion import InversionSettings, balanced_labels, invert
from dinv.models import Classifier, evaluating, to_float
from dinv.objectives import CrossEntropy, FeatureStatistics, TotalVariation

LAYOUT, STYLE = {"max_width": "660px"}, {"description_width": "7em"}
Pools = Mapping[str, tuple[Tensor, Tensor]]  # name -> images (N, C, H, W), labels (N,)


class Panel(ipw.VBox):
    """Widgets, with a picture and a sentence for where widgets are not shown.

    Attributes:
        picture: the `ipywidgets.Image` that is shown.
        alt: what it shows, in words.
        controls: name -> widget; set its `.value`.
        caption: the `ipywidgets.HTML` under the picture: numbers, or why there is no new picture.
        button: the `ipywidgets.Button` that draws; None where every change of a control does.
    """

    def __init__(self, children: Sequence[ipw.Widget], picture: ipw.Image, alt: str) -> None:
        super().__init__(children)
        self.picture, self.alt, self.caption = picture, alt, ipw.HTML()
        self.controls: dict[str, Any] = {}
        self.button: ipw.Button | None = None

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, kind = super()._repr_mimebundle_(**options), f"image/{self.picture.format}"
        data[kind] = base64.b64encode(self.picture.value).decode()
        words = (self.alt, html.unescape(self.caption.value), "(The controls are not shown here.)")
        data["text/plain"] = "\n".join(filter(None, words))
        return data, {kind: {"alt": self.alt}}


def scrubber(strips: Mapping[str, Tensor], steps: Sequence[int], columns: int) -> Panel:
    """A slider over snapshots, method -> (S, N, C, H, W), which works without a kernel, too.

    Raises:
        ValueError: a method has not one snapshot for each of `steps`.
    """
    wrong = [f"{name} has {len(strip)}" for name, strip in strips.items() if len(strip) != len(steps)]
    if wrong or not strips:
        raise ValueError(f"{len(steps)} steps need as many snapshots; {wrong[0] if wrong else 'none given'}")
    grids = [{name: strip[index] for name, strip in strips.items()} for index in range(len(steps))]
    drawn = [figures.jpeg(figures.png(figures.image_grids(grid, columns))) for grid in grids]
    pictures = [ipw.Image(value=data, format="jpeg") for data in drawn]
    last = len(steps) - 1
    stack = ipw.Stack(pictures, selected_index=last, layout=LAYOUT)
    options = [(str(step), index) for index, step in enumerate(steps)]
    slider = ipw.SelectionSlider(options=options, index=last, description="iteration")
    ipw.jslink((slider, "index"), (stack, "selected_index"))
    panel = Panel([slider, stack], pictures[-1], f"iteration {steps[-1]}")
    panel.controls["iteration"] = slider
    return panel


def workbench(
    teacher: Classifier,
    verifier: Classifier,
    real: Tensor,
    settings: InversionSettings,
    *,
    tv: float,
    alpha_f: float,
    images: int = 32,
) -> Panel:
    """Dream a batch by weights of one's own: the images, what two networks say, and how far each layer is.

    Args:
        real: real images, at least `images`: batches of that size are the yardstick of the distances.
        settings: how to descend; of its stages the steps are scaled together.
        tv, alpha_f: the weights that the controls begin with, with others below and above them.

    Raises:
        ValueError: too few real images, or a weight that is not positive.
    """
    if min(tv, alpha_f) <= 0:
        raise ValueError(f"tv={tv} and alpha_f={alpha_f} must be positive: the controls offer 0 as well")
    plan = settings.plan(teacher.size)
    whole = sum(steps for steps, _ in plan)
    roles = {"teacher": teacher, "verifier": verifier}
    yardstick = metrics.feature_distances(teacher, real, images)
    controls = {
        "α_tv": _weights(tv, (0, 1 / 30, 0.1, 1 / 3, 1, 3, 10, 30)),
        "α_f": _weights(alpha_f, (0, 0.01, 0.1, 1 / 3, 1, 3, 10, 100)),
        "steps": ipw.IntSlider(whole, len(plan), 4 * whole, continuous_update=False),
        "class": ipw.Dropdown(options=["all classes", *teacher.classes]),
        "seed": ipw.BoundedIntText(0, min=0, max=9999),
    }

    def draw(**chosen: Any) -> tuple[bytes, str]:
        objective = CrossEntropy() + chosen["α_tv"] * TotalVariation() + chosen["α_f"] * FeatureStatistics()
        stages = tuple((max(1, round(n * chosen["steps"] / whole)), size) for n, size in plan)
        labels = balanced_labels(images, len(teacher.classes))
        if controls["class"].index:
            labels = torch.full_like(labels, controls["class"].index - 1)
        scaled = replace(settings, stages=stages)
        made = invert(teacher, labels, objective, scaled, seed=chosen["seed"]).images
        words = (f"{who} {metrics.accuracy(n, made, labels):.0f} %" for who, n in roles.items())
        distances = {"these images": metrics.feature_distances(teacher, made, images), "real": yardstick}
        times = (distances["these images"].sum() / yardstick.sum()).item()
        grid = figures.image_grids({"these images": made}, 8, [said := ", ".join(words)])
        text = f"{objective}: {said}; {times:.1f} times as far as {images} real images."
        return _stacked(grid, figures.layer_distances(distances)), text

    about = f"{images} dreamt images, and the distance of each layer's statistics beside that of real images"
    return _live(controls, draw, about, button="dream")


def inspector(pools: Pools, networks: Mapping[str, Classifier]) -> Panel:
    """One image of a pool, enlarged, and the three surest answers of each network.

    Args:
        pools: name -> (images, labels); a network's name -> the network, all with the same classes.

    Raises:
        ValueError: no pool or no network; a pool without images, or without a label for each.
    """
    if not pools or not networks:
        raise ValueError("an inspector needs at least one pool and one network")
    for name, (images, labels) in pools.items():
        if not 0 < len(images) == len(labels):
            raise ValueError(f"{name} has {len(images)} images and {len(labels)} labels: one each is needed")
    first = next(iter(pools))
    pool = ipw.Dropdown(options=[(figures.label(name), name) for name in pools], value=first)
    number = ipw.IntSlider(0, 0, len(pools[first][0]) - 1, continuous_update=False)
    pool.observe(lambda change: number.set_trait("max", len(pools[change["new"]][0]) - 1), "value")

    def draw(pool: str, image: int) -> tuple[bytes, str]:
        picture, wanted = pools[pool][0][image], int(pools[pool][1][image])
        says = {}
        for name, network in networks.items():
            shares = 100 * metrics.predict(network, picture[None]).softmax(1)[0].cpu()
            best = shares.topk(min(3, len(shares)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            says[name] = {network.classes[k]: share for share, k in pairs}
        label = next(iter(networks.values())).classes[wanted]
        words = (f"{name} {next(iter(said))}" for name, said in says.items())
        figure = figures.answers(picture, says, f"{figures.label(pool)}, image {image}: {label}")
        return figures.png(figure), f"Label {label}; {', '.join(words)}."

    about = f"One image of a pool, and what {', '.join(networks)} say that it is"
    return _live({"pool": pool, "image": number}, draw, about)


def batchnorm_viewer(model: Classifier, kinds: Mapping[str, Tensor]) -> Panel:
    """What a BatchNorm layer keeps of a channel, over what kinds of images give that channel.

    Args:
        kinds: name -> images (N, C, H, W).

    Raises:
        NoBatchNorm: the network keeps no statistics.
        ValueError: no images.
    """
    if not kinds or not all(map(len, kinds.values())):
        raise ValueError("a BatchNorm viewer needs images: name -> (N, C, H, W)")
    kept = batchnorm_statistics(model).to("cpu")
    layer = ipw.Dropdown(options=[(name, index) for index, name in enumerate(kept.layers)], value=0)
    channel = ipw.IntSlider(0, 0, len(kept.means[0]) - 1, continuous_update=False)
    layer.observe(lambda change: channel.set_trait("max", len(kept.means[change["new"]]) - 1), "value")

    def draw(layer: int, channel: int) -> tuple[bytes, str]:
        name, inputs = kept.layers[layer], {}
        mean, deviation = kept.means[layer][channel].item(), kept.variances[layer][channel].sqrt().item()
        with torch.no_grad(), evaluating(model), recorded(model, (name,)) as features:
            for kind, images in kinds.items():
                model(to_float(images, model.mean.device))
                inputs[kind] = features[name][:, channel].float().flatten().cpu()
        title, color = "Shaded: the running mean, one deviation either way", figures.STYLES["teacher"][0]
        figure = figures.histograms(inputs, f"input of {name}, channel {channel}", title)
        figure.axes[0].axvspan(mean - deviation, mean + deviation, color=color, alpha=0.3, lw=0)
        figure.axes[0].axvline(mean, color=color, lw=1.6)
        words = [f"{figures.label(k)} {x.mean():.2f} ± {x.std(correction=0):.2f}" for k, x in inputs.items()]
        return figures.png(figure), f"Kept {mean:.2f} ± {deviation:.2f}; {'; '.join(words)}."

    about = "Histograms of a channel's inputs over the mean and deviation that BatchNorm keeps"
    return _live({"layer": layer, "channel": channel}, draw, about)


def _live(controls: Mapping[str, Any], draw: Callable, alt: str, button: str = "") -> Panel:
    """A panel that draws whenever a control changes; with `button`, when that is pressed.

    `draw`, called with the controls' values by name, returns a PNG and a caption. An error in the first
    drawing is raised; later ones are told in the caption, and the picture stays.
    """
    picture = ipw.Image(layout=LAYOUT)
    press = ipw.Button(description=button, button_style="primary") if button else None
    panel = Panel([*controls.values(), *filter(None, [press]), picture], picture, alt)
    panel.children += (panel.caption,)
    panel.controls, panel.button = dict(controls), press

    def show() -> None:
        data, text = draw(**{name: control.value for name, control in controls.items()})
        with picture.hold_sync():
            picture.value, picture.format = figures.smaller(data)
        panel.caption.value = html.escape(text)

    def update(_: Any) -> None:
        if press is not None:
            press.disabled, panel.caption.value = True, f"{button} …"
        try:
            show()
        except (ValueError, ArithmeticError, RuntimeError) as error:
            panel.caption.value = html.escape(f"No new picture: {error}")
        if press is not None:
            press.disabled = False

    show()
    for name, control in controls.items():
        control.description, control.style = name, STYLE
        if press is None:
            control.observe(update, "value")
    if press is not None:
        press.on_click(update)
    return panel


def _weights(start: float, factors: Sequence[float]) -> ipw.SelectionSlider:
    """Weights in steps around the first one, and 0."""
    options = [(f"{start * factor:.2g}", start * factor) for factor in factors]
    return ipw.SelectionSlider(options=options, value=start, continuous_update=False)


def _stacked(*parts: Figure) -> bytes:
    """Figures under each other, as one PNG."""
    pictures = [Image.open(io.BytesIO(figures.png(figure))).convert("RGB") for figure in parts]
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    canvas, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        canvas.paste(picture, ((size[0] - picture.width) // 2, top))
        top += picture.height
    canvas.save(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()
