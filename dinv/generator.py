"""Training-based inversion: a small network learns to emit the images, a batch in a few steps.

The other family beside inversion of the pixels (DAFL and its successors). The objective is the same sum of
terms, the result the same `Inversion`. What is learnt for one batch is not thrown away: from round to round
the generator's starting point moves towards where it ended (first-order meta-learning: Reptile, Nichol et
al., 2018; for inversion Fast-DFKD, Fang et al., AAAI 2022), so that a few steps do for a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinv.checks import check_settings
from dinv.compiling import Compiled, compiler_available
from dinv.distillation import Source
from dinv.files import NO_CHECKPOINT, NoCheckpoint, strip_prefix
from dinv.inversion import Inversion, Progress, balanced_labels, check_labels
from dinv.models import Classifier
from dinv.models.classifier import Size, sides
from dinv.objectives import Competition, Objective, Term
from dinv.pool import Pool, batch_seed, to_uint8
from dinv.precision import CHOICES, autocast, own_defaults, setting, settled
from dinv.step import Step, jittered, require_finite


@dataclass(frozen=True)
class GeneratorSettings:
    """How a generator is trained for one batch, by Adam; `jitter` and `flip` as in `InversionSettings`.

    `lr` is that of the weights, `latent_lr` of the latent vectors, which are learnt as well. There are
    `width` channels at full resolution, twice as many before. By `meta_lr` the starting point moves towards
    where a batch ended: 0 starts every batch afresh, 1 simply goes on. `compile` is "always" or "never";
    `precision` is that of `precision.choose`.
    """

    steps: int = 5
    lr: float = 2e-3
    latent_lr: float = 1e-2
    betas: tuple[float, float] = (0.5, 0.999)
    latent_dim: int = 128
    width: int = 32
    meta_lr: float = 0.5
    jitter: int = 2
    flip: bool = True
    compile: str = "always"
    precision: str = setting()

    def __post_init__(self) -> None:
        positive = ("steps", "lr", "latent_lr", "latent_dim", "width")
        check_settings(self, positive, compile=("always", "never"), precision=CHOICES)
        if self.meta_lr > 1:
            raise ValueError(f"meta_lr={self.meta_lr} must lie in 0 to 1")


class ImageGenerator(nn.Module):
    """Latent vectors (N, latent_dim) and labels (N,) to images (N, C, size, size) in [0, 1].

    A linear layer to a map of a quarter of the size, then twice: enlarge, convolve, normalise.
    """

    def __init__(
        self, classes: int, channels: int, size: Size, latent_dim: int = 128, width: int = 32
    ) -> None:
        super().__init__()
        height, width_px = sides(size)
        if height % 4 or width_px % 4:
            raise ValueError(f"a generator makes images whose side is a multiple of 4, not {size}")
        self.classes, self.quarter = classes, (height // 4, width_px // 4)
        self.first = nn.Linear(latent_dim + classes, 2 * width * math.prod(self.quarter))
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(labels, self.classes).to(latent.dtype)
        x = self.first(torch.cat([latent, one_hot], dim=1)).view(len(latent), -1, *self.quarter)
        return self.blocks(x.contiguous(memory_format=torch.channels_last))


def create_generator(teacher: Classifier, settings: GeneratorSettings, seed: int = 0) -> ImageGenerator:
    """A generator of `teacher`'s images with fresh weights drawn from `seed`, on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        sizes = (teacher.channels, teacher.size, settings.latent_dim, settings.width)
        network = ImageGenerator(len(teacher.classes), *sizes)
    return network.to(teacher.mean.device, memory_format=torch.channels_last)


class GeneratorInverter:
    """`inverter(labels, seed=0)`, as by an `inversion.Inverter`, but from a generator.

    That is `network`, its first weights drawn from `seed`; every call trains it further.
    """

    def __init__(
        self,
        teacher: Classifier,
        objective: Objective | Term,
        settings: GeneratorSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.teacher, self.settings = teacher, settings or GeneratorSettings()
        compiled = self.settings.compile == "always" and compiler_available(teacher.mean.device)
        with own_defaults(teacher.dtype):
            self.network = create_generator(teacher, self.settings, seed)
            self.step = Step(teacher, objective, compiled, self.settings.precision)
        self._forward = Compiled(self._images, self.network, compiled)

    def _images(self, latent: Tensor, labels: Tensor) -> Tensor:
        with autocast(latent.device, self.step.precision):
            return self.network(latent, labels).float()

    @property
    def compile_seconds(self) -> float:
        return self.step.compile_seconds + self._forward.seconds

    @settled
    def __call__(
        self,
        labels: Tensor | Sequence[str],
        *,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        snapshots: Sequence[int] = (),
        callback: Callable[[Progress], None] | None = None,
        every: int = 50,
    ) -> Inversion:
        """One batch of images that the teacher takes for `labels`: the one of the smallest objective.

        `weights`, one per term, stand in for the objective's own; other arguments and errors as for `invert`.
        """
        began, compiled_before = time.perf_counter(), self.compile_seconds
        teacher, settings, step, device = self.teacher, self.settings, self.step, self.teacher.mean.device
        labels = check_labels(labels, teacher.classes).to(device)
        if any(not 0 <= snapshot < settings.steps for snapshot in snapshots) or every < 1:
            raise ValueError(
                f"snapshots {list(snapshots)} must lie in 0 to {settings.steps - 1}, the numbers of the "
                f"steps, and every={every} be at least 1"
            )
        step.reload()
        self.network.train()
        weights = torch.tensor(step.weights if weights is None else weights, device=device)
        draw = torch.Generator().manual_seed(seed)
        latent = torch.randn(len(labels), settings.latent_dim, generator=draw).to(device).requires_grad_()
        optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr, betas=settings.betas)
        optimizer.add_param_group({"params": [latent], "lr": settings.latent_lr})
        history = torch.zeros(settings.steps, len(step.names) + 1, device=device)
        copies: dict[int, Tensor] = {}
        best, best_images = torch.full((), math.inf, device=device), None
        for index in range(settings.steps):
            images = self._forward(latent, labels)
            now = images.detach()
            if index in snapshots:
                copies[index] = now.contiguous().clone()
            pixels = (images - teacher.mean) / teacher.std
            moved, restore = jittered(pixels, settings, draw)
            terms, gradient = step(moved, labels, weights)
            value = terms @ weights
            best_images = now if best_images is None else torch.where(value < best, now, best_images)
            best = torch.minimum(value, best)
            history[index, :-1], history[index, -1] = terms, gradient.sum()
            optimizer.zero_grad(set_to_none=True)
            pixels.backward(restore(gradient))
            optimizer.step()
            if (done := index + 1) % every == 0 or done == settings.steps:
                find = partial(step.find_nonfinite_term, moved, labels)
                require_finite(history[:done], max(0, done - every), step.names, find)
                if callback is not None:
                    newest = dict(zip(step.names, terms.tolist(), strict=True))
                    callback(Progress(done, settings.steps, newest, now.contiguous))
        losses = {name: history[:, i].tolist() for i, name in enumerate(step.names)}
        losses["objective"] = (history[:, :-1] @ weights).tolist()
        seconds = (time.perf_counter() - began, self.compile_seconds - compiled_before)
        return Inversion(best_images.contiguous(), labels, losses, copies, *seconds, step.compiled)


@settled
def generate(
    teacher: Classifier,
    labels: Tensor | Sequence[str],
    objective: Objective | Term,
    settings: GeneratorSettings | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Inversion:
    """`inversion.invert` by a fresh generator; `options` are its `snapshots`, `callback` and `every`."""
    return GeneratorInverter(teacher, objective, settings, seed)(labels, seed=seed, **options)


class GeneratorSource(Source):
    """New batches for `distillation.distill` from one generator, whose starting point is meta-learnt.

    Round 0 begins with fresh weights, so that a source may be used again.

    Args:
        competition: weight of R_compete against the student as it is; 0 leaves the term out.
        warmup: rounds in which that weight is 0, as a student that knows nothing is no rival.
        agreeing: as in `Competition`.
    """

    def __init__(
        self,
        teacher: Classifier,
        objective: Objective | Term,
        settings: GeneratorSettings,
        *,
        batch_size: int = 256,
        seed: int = 0,
        competition: float = 0.0,
        warmup: int = 0,
        agreeing: bool = True,
    ) -> None:
        self.start = torch.empty(0, *teacher.shape, dtype=torch.uint8)
        self.teacher, self.objective, self.settings = teacher, 1.0 * objective, settings
        self.batch_size, self.seed, self.competition = batch_size, seed, competition
        self.warmup, self.agreeing = warmup, agreeing
        self._weights: dict[str, Tensor] = {}  # of the generator, as the next batch starts
        self._inverter: GeneratorInverter | None = None

    def labels(self, round: int) -> Tensor:
        """The classes of the new images: every round the same."""
        return balanced_labels(self.batch_size, len(self.teacher.classes))

    def __call__(self, round: int, student: Classifier | None) -> Tensor:
        if self._inverter is None:
            objective = self.objective
            if self.competition:
                objective = objective + self.competition * Competition(student, self.agreeing)
            self._inverter = GeneratorInverter(self.teacher, objective, self.settings, self.seed)
        step, network = self._inverter.step, self._inverter.network
        weights = list(step.weights)
        if self.competition:
            step.load_student(student)
            if round < self.warmup:
                weights[-1] = 0.0  # of the competition: the last term
        if round == 0:
            self._weights = create_generator(self.teacher, self.settings, self.seed).state_dict()
        network.load_state_dict(self._weights)
        result = self._inverter(self.labels(round), seed=batch_seed(self.seed, round), weights=weights)
        for name, end in network.state_dict().items():
            if end.is_floating_point():
                self._weights[name].lerp_(end, self.settings.meta_lr)
        self.compile_seconds += result.compile_seconds
        return to_uint8(result.images)

    def state(self) -> dict[str, Tensor]:
        return self._weights

    def restore(self, state: dict[str, Tensor]) -> None:
        self._weights = {name: value.clone().to(self.teacher.mean.device) for name, value in state.items()}


@settled
def synthesize_from(
    source: Source,
    rounds: int,
    student: Classifier | None = None,
    *,
    checkpoint: NoCheckpoint = NO_CHECKPOINT,
) -> Pool:
    """`rounds` batches of a fresh source, for a student that stays as it is; by default its teacher.

    With a `checkpoint` a killed synthesis goes on at a later batch to the same bytes.
    """
    batches, began, saved = [], time.perf_counter(), checkpoint.load()
    if saved is not None:
        tensors, meta = saved
        batches = list(tensors["images"].split(meta["size"]))
        source.restore(strip_prefix("source.", tensors))

    def snapshot() -> tuple[dict[str, Tensor], dict[str, int]]:
        state = {f"source.{name}": value for name, value in source.state().items()}
        return state | {"images": torch.cat(batches)}, {"size": len(batches[0])}

    for number in range(len(batches), rounds):
        batches.append(source(number, student or source.teacher))
        checkpoint.progress(number + 1, rounds)
        checkpoint.save(snapshot)
    labels = torch.cat([source.labels(number) for number in range(rounds)])
    return Pool(torch.cat(batches), labels, seconds=time.perf_counter() - began)
