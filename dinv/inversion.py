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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinv.checks import check_settings, near
from dinv.compiling import compiler_available, compiling_pays
from dinv.group import Group, averaged, gathered, share
from dinv.models.classifier import Classifier, Size, sides
from dinv.objectives import Objective, Term
from dinv.precision import CHOICES, setting, settled
from dinv.preflight import preflight
from dinv.pyramid import PyramidAdam
from dinv.step import Step, jittered, require_finite


@dataclass(frozen=True)
class InversionSettings:
    """How the pixels are optimised.

    Attributes:
        steps: iterations at the teacher's own image size (paper: 2,000 on CIFAR-10).
        lr: Adam's learning rate, in normalised pixel units (paper: 0.05).
        octaves, chroma_lr: what Adam descends on, see `PyramidAdam`; 1 and 0: the pixels (paper).
        betas: Adam's decay rates.
        schedule: "constant", as in the paper, or "cosine" down to zero.
        jitter: the batch is rolled by up to so many pixels either way before each step (paper: 2).
        flip: each image is mirrored with probability one half before each step.
        stages: multi-resolution schedule, pairs (steps, size) from coarse to fine; with it `steps` is
            not used. Between stages the images are resized, and Adam and the schedule start anew. A size is
            that of a square, or (height, width) for a teacher whose images are none.
        keep: "best", the images of the smallest objective so far, or "last".
        compile: "auto" compiles where it pays (see `compiling_pays`), "always" or "never".
        precision: what networks compute in, see `precision.choose`.
    """

    steps: int = 2000
    lr: float = 0.05
    octaves: int = 1
    chroma_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "constant"
    jitter: int = 2
    flip: bool = True
    stages: tuple[tuple[int, int], ...] = ()
    keep: str = "best"
    compile: str = "auto"
    precision: str = setting()

    def __post_init__(self) -> None:
        choices = {"schedule": ("constant", "cosine"), "keep": ("best", "last"), "precision": CHOICES}
        check_settings(self, ("steps", "lr", "octaves"), **choices, compile=("auto", "always", "never"))
        if any(steps < 1 or min(sides(size)) < 1 for steps, size in self.stages):
            raise ValueError(f"stages {self.stages} must be pairs of positive steps and size")

    def plan(self, size: Size) -> tuple[tuple[int, Size], ...]:
        """The (steps, size) pairs to run for a teacher of this image size."""
        height, width = sides(size)
        if height != width and any(isinstance(side, int) for _, side in self.stages):
            raise ValueError(f"stages of images of {height} x {width} need (steps, (height, width))")
        return self.stages or ((self.steps, size),)


@dataclass
class Inversion:
    """The result of an inversion.

    Attributes:
        images: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        losses: term name -> one unweighted value per step; "objective" is the weighted sum.
        snapshots: step -> images (as above) on their way.
        seconds, compile_seconds: wall time, and the part of it spent compiling.
        compiled: whether the compiled path ran.
    """

    images: Tensor
    labels: Tensor
    losses: dict[str, list[float]]
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    compiled: bool = False


@dataclass(frozen=True)
class Progress:
    """What a callback is told: steps done of how many, the newest unweighted terms, `images()`."""

    step: int
    steps: int
    terms: dict[str, float]
    images: Callable[[], Tensor]


class Inverter:
    """`inverter(labels, seed=0)`, the same as `invert`, with one step kept for all calls.

    Nothing is copied or compiled before the first call. Every call works with the weights that the teacher,
    and a student that competes, have at that moment.
    """

    def __init__(
        self,
        teacher: Classifier,
        objective: Objective | Term,
        settings: InversionSettings | None = None,
        group: Group | None = None,
    ) -> None:
        self.teacher, self.objective, self.group = teacher, 1.0 * objective, group
        self.settings = settings or InversionSettings()
        self._step: Step | None = None

    def digest_parts(self) -> Any:
        return self.teacher, self.objective, self.settings

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_step": None}  # whose hooks cannot be sent to another process

    def prepare(self, images: int) -> Step:
        """The step, made the first time; "auto" compiles it if `images` images are worth it."""
        if self._step is None:
            compiled = self.settings.compile == "always"
            if self.settings.compile == "auto":
                plan = self.settings.plan(self.teacher.size)
                reads = bool(self.objective.bind(self.teacher).layers())
                compiled = compiling_pays(self.teacher, plan, images, reads)
            compiled = compiled and self.group is None and compiler_available(self.teacher.mean.device)
            options = {"precision": self.settings.precision, "group": self.group}
            self._step = Step(self.teacher, self.objective, compiled, **options)
        return self._step

    @settled
    def __call__(
        self,
        labels: Tensor | Sequence[str],
        *,
        seed: int = 0,
        snapshots: Sequence[int] = (),
        callback: Callable[[Progress], None] | None = None,
        every: int = 50,
    ) -> Inversion:
        """Invert one batch; arguments and errors are those of `invert`."""
        began = time.perf_counter()
        preflight(self.teacher, pixels=True)
        teacher, settings, device = self.teacher, self.settings, self.teacher.mean.device
        labels = check_labels(labels, teacher.classes).to(device)
        plan = settings.plan(teacher.size)
        total = sum(steps for steps, _ in plan)
        if any(not 0 <= snapshot <= total for snapshot in snapshots) or every < 1:
            raise ValueError(
                f"snapshots {list(snapshots)} must lie in 0 to {total}, the number of steps, "
                f"and every={every} be at least 1"
            )
        step = self.prepare(len(labels))
        step.reload()
        compiled_before = step.compile_seconds
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
        low = (0 - teacher.mean) / teacher.std
        high = (1 - teacher.mean) / teacher.std
        weights = torch.tensor(step.weights, device=device, dtype=dtype)

        def to_images(pixels: Tensor) -> Tensor:
            return (pixels * teacher.std + teacher.mean).clamp(0, 1).contiguous()

        def whole() -> Tensor:
            return gathered(to_images(pixels), self.group)

        shape = (len(labels), teacher.channels, *sides(plan[0][1]))
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        own, every_label = share(len(labels), self.group), labels
        labels, pixels = labels[own], noise[own].to(device, dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last).clamp_(low, high)
        history = torch.zeros(total, len(step.names) + 1, device=device, dtype=dtype)  # terms, gradient's sum
        finite = torch.ones((), dtype=torch.bool, device=device)
        copies: dict[int, Tensor] = {}
        done = 0
        for steps, size in plan:
            if pixels.shape[2:] != sides(size):
                pixels = F.interpolate(pixels, size=sides(size), mode="bilinear", align_corners=False)
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            adam = PyramidAdam(pixels, settings.betas, settings.octaves, settings.chroma_lr)
            best, best_pixels = torch.full((), math.inf, device=device, dtype=dtype), pixels.clone()
            suspect = pixels
            for index in range(steps):
                if done in snapshots:
                    copies[done] = whole()
                moved, restore = jittered(pixels, settings, generator, self.group)
                terms, gradient = step(moved, labels, weights)
                value = terms @ weights
                best_pixels = torch.where(value < best, pixels, best_pixels)
                best = torch.minimum(value, best)
                history[done, :-1], history[done, -1] = terms, gradient.sum()
                if self.group is not None:  # all ranks stop where one must
                    history[done, -1] = averaged(history[done, -1], self.group)
                suspect = torch.where(finite, moved, suspect)  # stays where the gradient first was not finite
                finite = finite & history[done, -1].isfinite()
                adam.step(restore(gradient), _lr(settings, index, steps))
                torch.maximum(torch.minimum(pixels, high, out=pixels), low, out=pixels)
                done += 1
                if done % every == 0 or index == steps - 1:
                    find = partial(step.find_nonfinite_term, suspect, labels)
                    require_finite(history[:done], max(0, done - every), step.names, find)
                if callback is not None and (done % every == 0 or done == total):
                    newest = dict(zip(step.names, history[done - 1].tolist(), strict=False))
                    callback(Progress(done, total, newest, partial(to_images, pixels)))
            if settings.keep == "best":
                pixels = best_pixels.contiguous(memory_format=torch.channels_last)
        if total in snapshots:
            copies[total] = whole()
        losses = {name: history[:, i].tolist() for i, name in enumerate(step.names)}
        losses["objective"] = (history[:, :-1] @ weights).tolist()
        images, compile_seconds = whole(), step.compile_seconds - compiled_before
        seconds = time.perf_counter() - began
        return Inversion(images, every_label, losses, copies, seconds, compile_seconds, step.compiled)


def invert(
    teacher: Classifier,
    labels: Tensor | Sequence[str],
    objective: Objective | Term,
    settings: InversionSettings | None = None,
    *,
    seed: int = 0,
    snapshots: Sequence[int] = (),
    callback: Callable[[Progress], None] | None = None,
    every: int = 50,
    group: Group | None = None,
) -> Inversion:
    """Synthesise one batch of images that `teacher` takes for `labels`, from noise.

    Args:
        teacher: the trained network; its parameters and buffers stay as they are.
        labels: (N,) integers or class names, the target class of each image.
        objective: a sum of terms, for instance CrossEntropy() + 10.0 * FeatureStatistics().
        seed: fixes noise, jitter and flips. The same seed, machine and number of threads give the same bytes;
            on a card, with torch.use_deterministic_algorithms(True).
        snapshots: steps before which the images are copied (0 is the noise).
        callback: called after every `every` steps and after the last.
        group: processes that share the batch, see `dinv.group`; each calls with the same arguments and gets
            the whole batch, the images of a single process up to rounding. A callback's images are its share.

    Raises:
        ValueError: labels empty, of a wrong type, or out of the teacher's range; objective all zero;
            a snapshot at a step that is not made; a batch that the processes do not divide.
        NoBatchNorm: feature statistics of a network that keeps none.
        Unfit: a ValueError: no logits, no copy that answers alike, or no gradient that reaches the pixels.
        NotFinite: names the term that became NaN or infinite, itself or its gradient, and the step.
    """
    inverter = Inverter(teacher, objective, settings, group)
    return inverter(labels, seed=seed, snapshots=snapshots, callback=callback, every=every)


def check_labels(labels: Tensor | Sequence[str], classes: Sequence[str]) -> Tensor:
    """`labels`, numbers or names, as int64 (N,), or a ValueError that says what is wrong with them."""
    labels = [labels] if isinstance(labels, str) else labels
    if isinstance(labels, list | tuple) and any(isinstance(label, str) for label in labels):
        unknown = [label for label in labels if label not in classes]
        if unknown:
            raise ValueError(f"the teacher knows no class {unknown[0]!r}{near(unknown[0], classes)}")
        labels = [classes.index(label) for label in labels]
    labels, classes = torch.as_tensor(labels, device=getattr(labels, "device", "cpu")).clone(), len(classes)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() != 1:
        raise ValueError(
            f"labels must be one integer per image, got shape {tuple(labels.shape)}, {labels.dtype}"
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


def balanced_labels(count: int, classes: int | Sequence[str]) -> Tensor | list[str]:
    """`count` labels with every class as often as can be: 0, 1, ..., K-1, 0, 1, ..., or names in turn."""
    if not isinstance(classes, int):
        return [classes[index % len(classes)] for index in range(count)]
    return torch.arange(count, device="cpu") % classes


def _lr(settings: InversionSettings, index: int, steps: int) -> float:
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * index / steps))
