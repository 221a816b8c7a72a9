"""Noise -> images: the optimiser of the paper, on the pixels.

    images = invert(teacher, labels, objective, InversionSettings(steps=2000)).images

The pixels are held in the teacher's normalised units, as in the paper, and projected back into the
range of real images after every step. The teacher itself is never touched: a frozen private copy of
it carries the hooks, so the caller's network keeps its mode, its flags and its bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinv.descent import Descent
from dinv.models import Classifier
from dinv.objectives import Objective, Term
from dinv.step import inversion_step

VERSION = 1  # part of a pool's key: raise it when the same settings give other images


@dataclass(frozen=True)
class InversionSettings:
    """How the pixels are optimised.

    Attributes:
        steps: iterations at the teacher's own image size (paper: 2,000 on CIFAR-10).
        rate: Adam's learning rate, in normalised pixel units (paper: 0.05).
        octaves, chroma: what Adam descends on, see `descent.Descent`; 1 and 0: the pixels (paper).
        betas: Adam's decay rates.
        schedule: "constant", as in the paper, or "cosine" down to zero.
        jitter: the batch is rolled by up to so many pixels either way before each step (paper: 2).
        flip: each image is mirrored with probability one half before each step.
        stages: multi-resolution schedule, pairs (steps, size) from coarse to fine; with it `steps` is
            not used. Between stages the images are resized, and Adam and the schedule start anew.
        keep: "best", the images of the smallest objective seen, or "last".
        compile: "auto" compiles where it pays (see `step.compiling_pays`), "always" or "never".
    """

    steps: int = 2000
    rate: float = 0.05
    octaves: int = 1
    chroma: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "constant"
    jitter: int = 2
    flip: bool = True
    stages: tuple[tuple[int, int], ...] = ()
    keep: str = "best"
    compile: str = "auto"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("schedule", self.schedule, ("constant", "cosine")),
            ("keep", self.keep, ("best", "last")),
            ("compile", self.compile, ("auto", "always", "never")),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: choose {', '.join(choices)}")
        if any(steps < 1 or size < 1 for steps, size in self.stages):
            raise ValueError(f"stages {self.stages} must be pairs of positive steps and size")
        if not (self.steps >= 1 and 0 < self.rate < math.inf and self.jitter >= 0):
            raise ValueError(
                f"steps={self.steps} and rate={self.rate} must be positive, jitter={self.jitter} not negative"
            )
        if not (self.octaves >= 1 and 0 <= self.chroma < math.inf):
            raise ValueError(f"octaves={self.octaves} must be positive, chroma={self.chroma} not negative")

    def config(self) -> dict[str, Any]:
        """In plain words and numbers: part of the key of what is made with them.

        A descent on the pixels is not named, so that pools from before there was another are still found.
        """
        config = asdict(self)
        if (self.octaves, self.chroma) == (1, 0):
            del config["octaves"], config["chroma"]
        return config

    def plan(self, size: int) -> tuple[tuple[int, int], ...]:
        """The (steps, size) pairs to run for a teacher of this image size."""
        return self.stages or ((self.steps, size),)


@dataclass
class Inversion:
    """What an inversion gives back.

    Attributes:
        images: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        losses: term name -> one unweighted value a step; "objective" is the weighted sum.
        snapshots: step -> images (as above) on their way.
        seconds: wall time, compilation included.
        compiled: whether the compiled path ran.
    """

    images: Tensor
    labels: Tensor
    losses: dict[str, list[float]]
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    compiled: bool = False


@dataclass(frozen=True)
class Progress:
    """What a callback is told: steps done of how many, and the newest unweighted terms."""

    step: int
    steps: int
    terms: dict[str, float]
    images: Callable[[], Tensor]


class NotFinite(FloatingPointError):
    """A term of the objective left the real numbers."""


def invert(
    teacher: Classifier,
    labels: Tensor,
    objective: Objective | Term,
    settings: InversionSettings | None = None,
    *,
    seed: int = 0,
    snapshots: Sequence[int] = (),
    callback: Callable[[Progress], None] | None = None,
    every: int = 50,
    at_once: int = 0,
) -> Inversion:
    """Synthesise one batch of images that `teacher` takes for `labels`, from noise.

    Args:
        teacher: the trained network; its parameters and buffers stay as they are.
        labels: (N,) integers, one wanted class an image.
        objective: a sum of terms, for instance CrossEntropy() + 10.0 * FeatureStatistics().
        seed: fixes noise, jitter and flips; the same seed on the same machine gives the same bytes.
        snapshots: steps before which the images are copied (0 is the noise).
        callback: called after every `every` steps and after the last.
        at_once: images that go through the networks together: the memory of so many, while the statistics
            are still those of the whole batch. It costs one more forward pass. 0 takes all.

    Raises:
        ValueError: labels empty, of a wrong type, or out of the teacher's range; objective all zero;
            a snapshot that no step makes.
        NoBatchNorm: feature statistics of a network that keeps none.
        NotFinite: names the term that became NaN or infinite, itself or its gradient, and the step.
    """
    began = time.perf_counter()
    settings = settings or InversionSettings()
    labels = check_labels(labels, len(teacher.classes))
    device = teacher.mean.device
    labels = labels.to(device)
    objective = objective if isinstance(objective, Objective) else 1.0 * objective
    if at_once < 0:
        raise ValueError(f"at_once={at_once} must be a number of images, or 0 for all")
    step = inversion_step(teacher, objective, settings, batch=len(labels), at_once=at_once)
    generator = torch.Generator().manual_seed(seed)
    plan = settings.plan(teacher.size)
    total = sum(steps for steps, _ in plan)
    if any(not 0 <= snapshot <= total for snapshot in snapshots) or every < 1:
        raise ValueError(
            f"snapshots {list(snapshots)} must lie in 0 to {total}, the number of steps, "
            f"and every={every} be at least 1"
        )
    low = (0 - teacher.mean) / teacher.std
    high = (1 - teacher.mean) / teacher.std
    weights = torch.tensor(step.weights, device=device)

    def to_images(pixels: Tensor) -> Tensor:
        return (pixels * teacher.std + teacher.mean).clamp(0, 1).contiguous()

    noise = torch.randn((len(labels), teacher.channels, plan[0][1], plan[0][1]), generator=generator)
    pixels = noise.to(device).contiguous(memory_format=torch.channels_last)
    pixels = pixels.clamp_(low, high)
    history = torch.zeros(total, len(step.names) + 1, device=device)  # the terms, the gradient's sum
    sound = torch.ones((), dtype=torch.bool, device=device)
    taken: dict[int, Tensor] = {}
    done = 0
    for steps, size in plan:
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        descent = Descent(pixels, settings.betas, settings.octaves, settings.chroma)
        best, best_pixels = torch.full((), math.inf, device=device), pixels.clone()
        suspect = pixels
        for index in range(steps):
            if done in snapshots:
                taken[done] = to_images(pixels)
            seen, restore = jittered(pixels, settings, generator)
            terms, gradient = step(seen, labels, weights)
            value = terms @ weights
            best_pixels = torch.where(value < best, pixels, best_pixels)
            best = torch.minimum(value, best)
            history[done, :-1], history[done, -1] = terms, gradient.sum()
            suspect = torch.where(sound, seen, suspect)  # stays where the gradient first was not finite
            sound = sound & history[done, -1].isfinite()
            descent.step(restore(gradient), _rate(settings, index, steps))
            torch.maximum(torch.minimum(pixels, high, out=pixels), low, out=pixels)
            done += 1
            if done % every == 0 or index == steps - 1:
                since = max(0, done - every)
                require_finite(history[:done], since, step.names, partial(step.culprit, suspect, labels))
            if callback is not None and (done % every == 0 or done == total):
                newest = dict(zip(step.names, history[done - 1].tolist(), strict=False))
                callback(Progress(done, total, newest, partial(to_images, pixels)))
        pixels = pixels.detach()
        if settings.keep == "best":
            pixels = best_pixels.contiguous(memory_format=torch.channels_last)
    if total in snapshots:
        taken[total] = to_images(pixels)
    losses = {name: history[:, i].tolist() for i, name in enumerate(step.names)}
    losses["objective"] = (history[:, :-1] @ weights).tolist()
    return Inversion(to_images(pixels), labels, losses, taken, time.perf_counter() - began, step.compiled)


def check_labels(labels: Tensor, classes: int) -> Tensor:
    """`labels` as int64 of shape (N,), or a ValueError that says what is wrong with them."""
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() != 1:
        raise ValueError(
            f"labels must be one integer an image, got shape {tuple(labels.shape)}, {labels.dtype}"
        )
    if labels.numel() == 0:
        raise ValueError("labels are empty: at least one image is needed")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"label {low if low < 0 else high} is out of range: the teacher knows {classes} classes, "
            f"0 to {classes - 1}"
        )
    return labels.long()


def balanced_labels(count: int, classes: int) -> Tensor:
    """0, 1, ..., K-1, 0, 1, ...: `count` labels with every class as often as can be."""
    return torch.arange(count) % classes


def _rate(settings: InversionSettings, index: int, steps: int) -> float:
    if settings.schedule == "constant":
        return settings.rate
    return settings.rate * 0.5 * (1 + math.cos(math.pi * index / steps))


def jittered(
    pixels: Tensor, settings: Any, generator: torch.Generator
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Roll the batch and flip some images; also the way back for the gradient.

    Both only permute pixels, so the gradient comes back by the inverse permutation, and the compiled
    step sees one fixed graph, whatever the offsets.
    """
    span = 2 * settings.jitter + 1
    down, right = (torch.randint(span, (2,), generator=generator) - settings.jitter).tolist()
    mask = None
    if settings.flip:
        mask = torch.rand(len(pixels), 1, 1, 1, generator=generator).to(pixels.device) < 0.5

    def mirror(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x.flip(3), x)

    def restore(gradient: Tensor) -> Tensor:
        back = torch.roll(mirror(gradient), (-down, -right), (2, 3))
        return back.contiguous(memory_format=torch.channels_last)

    seen = mirror(torch.roll(pixels.detach(), (down, right), (2, 3)))
    return seen.contiguous(memory_format=torch.channels_last), restore


def require_finite(
    history: Tensor, since: int, names: Sequence[str], culprit: Callable[[], str]
) -> None:
    """Raise NotFinite at the first row from `since` on that is not: its terms, then their gradient."""
    bad = (~history[since:].isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        what = names[column] if column < len(names) else f"the gradient of {culprit()}"
        raise NotFinite(
            f"{what} became {history[since + row, column].item()} at step {since + row + 1}: "
            "lower the learning rate or that term's weight"
        )
