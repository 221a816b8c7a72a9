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
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinv.distillation import Source
from dinv.inversion import (
    Inversion,
    InversionSettings,
    Progress,
    balanced_labels,
    check_labels,
    jittered,
    require_finite,
)
from dinv.models import Classifier
from dinv.objectives import Competition, Objective, Term
from dinv.pool import batch_seed, to_uint8
from dinv.step import Compiled, compiler_available, inversion_step
from dinv.store import Sparingly, under

VERSION = 1  # part of a student's key: raise it when the same settings give other images


@dataclass(frozen=True)
class GeneratorSettings:
    """How a generator is trained for one batch.

    Attributes:
        steps: updates a batch.
        rate: Adam's learning rate of the generator's weights.
        latent_rate: the same of the latent vectors, which are learnt as well.
        betas: Adam's decay rates.
        latent: length of a latent vector.
        width: channels at full resolution; twice as many before.
        meta_rate: how far the starting point moves towards where a batch ended: 0 starts every batch
            afresh, 1 simply goes on.
        jitter, flip: as in `InversionSettings`.
        compile: "always" or "never".
    """

    steps: int = 5
    rate: float = 2e-3
    latent_rate: float = 1e-2
    betas: tuple[float, float] = (0.5, 0.999)
    latent: int = 128
    width: int = 32
    meta_rate: float = 0.5
    jitter: int = 2
    flip: bool = True
    compile: str = "always"

    def __post_init__(self) -> None:
        for name in ("steps", "rate", "latent_rate", "latent", "width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} of a generator must be positive")
        if not (0 <= self.meta_rate <= 1 and self.jitter >= 0):
            raise ValueError(
                f"meta_rate={self.meta_rate} must lie in 0 to 1, jitter={self.jitter} not be negative"
            )
        if self.compile not in ("always", "never"):
            raise ValueError(f"unknown compile {self.compile!r}: choose always, never")


class ImageGenerator(nn.Module):
    """Latent vectors (N, latent) and labels (N,) to images (N, C, size, size) in [0, 1].

    A linear layer to a map of a quarter of the size, then twice: enlarge, convolve, normalise.
    """

    def __init__(self, classes: int, channels: int, size: int, latent: int = 128, width: int = 32) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f"a generator makes images whose side is a multiple of 4, not {size}")
        self.classes, self.side = classes, size // 4
        self.first = nn.Linear(latent + classes, 2 * width * self.side**2)
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
        wanted = nn.functional.one_hot(labels, self.classes).to(latent.dtype)
        x = self.first(torch.cat([latent, wanted], dim=1)).view(len(latent), -1, self.side, self.side)
        return self.blocks(x.contiguous(memory_format=torch.channels_last))


def create_generator(teacher: Classifier, settings: GeneratorSettings, seed: int = 0) -> ImageGenerator:
    """A generator of `teacher`'s images with fresh weights drawn from `seed`, on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = ImageGenerator(
            len(teacher.classes), teacher.channels, teacher.size, settings.latent, settings.width
        )
    return network.to(teacher.mean.device, memory_format=torch.channels_last)


def generate(
    teacher: Classifier,
    labels: Tensor,
    objective: Objective | Term,
    settings: GeneratorSettings | None = None,
    *,
    seed: int = 0,
    network: ImageGenerator | None = None,
    snapshots: Sequence[int] = (),
    callback: Callable[[Progress], None] | None = None,
    every: int = 50,
) -> Inversion:
    """`inversion.invert` by a generator: one batch of images that `teacher` takes for `labels`.

    Args:
        network: the generator to go on with; it is trained in place. None: a fresh one, from `seed`.
        others: as for `invert`. The result is the batch of the smallest objective seen.

    Raises:
        what `invert` raises.
    """
    began = time.perf_counter()
    settings = settings or GeneratorSettings()
    labels = check_labels(labels, len(teacher.classes)).to(teacher.mean.device)
    objective = objective if isinstance(objective, Objective) else 1.0 * objective
    if any(not 0 <= snapshot < settings.steps for snapshot in snapshots) or every < 1:
        raise ValueError(
            f"snapshots {list(snapshots)} must lie in 0 to {settings.steps - 1}, the steps made, "
            f"and every={every} be at least 1"
        )
    as_pixels = InversionSettings(steps=settings.steps, compile=settings.compile)
    step = inversion_step(teacher, objective, as_pixels, batch=len(labels))
    weights = torch.tensor(step.weights, device=labels.device)
    network = network or create_generator(teacher, settings, seed)
    network.train()
    forward = _forward(network, settings, labels.device)
    draw = torch.Generator().manual_seed(seed)
    latent = torch.randn(len(labels), settings.latent, generator=draw).to(labels.device).requires_grad_()
    groups = [
        {"params": list(network.parameters()), "lr": settings.rate},
        {"params": [latent], "lr": settings.latent_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=settings.betas)
    history = torch.zeros(settings.steps, len(step.names) + 1, device=labels.device)
    taken: dict[int, Tensor] = {}
    best, best_images = torch.full((), math.inf, device=labels.device), None
    for index in range(settings.steps):
        images = forward(latent, labels)
        now = images.detach()
        if index in snapshots:
            taken[index] = now.contiguous().clone()
        pixels = (images - teacher.mean) / teacher.std
        seen, restore = jittered(pixels, settings, draw)
        terms, gradient = step(seen, labels, weights)
        value = terms @ weights
        best_images = now.clone() if best_images is None else torch.where(value < best, now, best_images)
        best = torch.minimum(value, best)
        history[index, :-1], history[index, -1] = terms, gradient.sum()
        optimizer.zero_grad(set_to_none=True)
        pixels.backward(restore(gradient))
        optimizer.step()
        done = index + 1
        if done % every == 0 or done == settings.steps:
            since = max(0, done - every)
            require_finite(history[:done], since, step.names, partial(step.culprit, seen, labels))
            if callback is not None:
                newest = dict(zip(step.names, terms.tolist(), strict=True))
                callback(Progress(done, settings.steps, newest, now.contiguous))
    losses = {name: history[:, i].tolist() for i, name in enumerate(step.names)}
    losses["objective"] = (history[:, :-1] @ weights).tolist()
    seconds = time.perf_counter() - began
    return Inversion(best_images.contiguous(), labels, losses, taken, seconds, step.compiled)


def _forward(network: ImageGenerator, settings: GeneratorSettings, device: torch.device) -> Callable:
    """The generator's forward pass, compiled once for each network."""
    if settings.compile == "never" or not compiler_available(device):
        return network
    if "compiled" not in vars(network):
        vars(network)["compiled"] = Compiled(network.forward, network)
    return vars(network)["compiled"]


class GeneratorSource(Source):
    """New batches for `distillation.distill` from one generator, whose starting point is meta-learnt.

    Args:
        competition: weight of R_compete against the student as it is; 0 leaves the term out.
        agreeing: as in `Competition`.
        warmup: the competition begins after so many rounds: before, the student knows nothing yet.
    """

    def __init__(
        self,
        teacher: Classifier,
        objective: Objective,
        settings: GeneratorSettings,
        *,
        batch: int = 256,
        seed: int = 0,
        competition: float = 0.0,
        agreeing: bool = True,
        warmup: int = 0,
    ) -> None:
        self.teacher, self.objective, self.settings = teacher, objective, settings
        self.batch = batch
        self.seed, self.competition, self.agreeing, self.warmup = seed, competition, agreeing, warmup
        self.network = create_generator(teacher, settings, seed)
        self.start = {name: value.clone() for name, value in self.network.state_dict().items()}

    def labels(self, number: int) -> Tensor:
        """The classes that a batch is made for: every round the same."""
        return balanced_labels(self.batch, len(self.teacher.classes))

    def __call__(self, number: int, student: Classifier) -> Tensor:
        objective = self.objective
        if self.competition:
            weight = self.competition if number >= self.warmup else 1e-12  # not 0: one compiled step
            objective = objective + weight * Competition(student, self.agreeing)
        self.network.load_state_dict(self.start)
        seed = batch_seed(self.seed, number)
        labels = self.labels(number)
        made = generate(self.teacher, labels, objective, self.settings, seed=seed, network=self.network)
        for name, end in self.network.state_dict().items():
            if end.is_floating_point():
                self.start[name].lerp_(end, self.settings.meta_rate)
        return to_uint8(made.images)

    def config(self) -> dict[str, Any]:
        return {
            "source": "generator", "version": VERSION, "objective": self.objective.config(),
            "settings": asdict(self.settings), "batch": self.batch, "seed": self.seed,
            "competition": self.competition, "agreeing": self.agreeing, "warmup": self.warmup,
        }  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        return self.start

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.start[name].copy_(value)


def synthesize(
    source: Source, rounds: int, student: Classifier, checkpoint: Any = None
) -> tuple[Tensor, list[float]]:
    """`rounds` batches of a source for a student that stays as it is: uint8 images, and seconds of each.

    With a `runs.Checkpoint` a killed synthesis goes on at a later batch and ends in the same bytes.
    """
    made, seconds = [], []
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        tensors, meta = saved
        made, seconds = [tensors["images"]], meta["seconds"]
        source.restore(under("source.", tensors))
    save = Sparingly(checkpoint)
    for number in range(len(seconds), rounds):
        began = time.perf_counter()
        made.append(source(number, student))
        seconds.append(time.perf_counter() - began)
        if checkpoint is not None:
            checkpoint.progress(number + 1, rounds)
        state = {f"source.{name}": value for name, value in source.state().items()}
        save(lambda state=state: (state | {"images": torch.cat(made)}, {"seconds": seconds}))
    return torch.cat(made), seconds
