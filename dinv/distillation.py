"""Data-free distillation: a student learns from its teacher on images that nobody ever took.

    source = PixelSource(teacher, objective, settings, competition=10.0)
    distill(teacher, student, pool.images, DistillationSettings(rounds=200), generator, source=source)

The pool lies in memory as uint8 and grows: every round one new batch is synthesised, used at once and
merged, then batches are drawn from the pool at random. With `competition` the new batch is made against
the student as it is in that round (Adaptive DeepInversion); without, the loop is the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dinv import inversion
from dinv.datasets import augment
from dinv.inversion import InversionSettings, balanced_labels, invert
from dinv.models import Classifier, autocast, evaluating
from dinv.objectives import Competition, Objective
from dinv.pool import batch_seed, to_uint8
from dinv.step import Compiled, compiler_available
from dinv.store import Sparingly, sha256_tensors, stored, under
from dinv.training import SCHEDULES, learning_rate, optimizer_for, predict, restore, snapshot

VERSION = 1  # part of a student's key: raise it when the same settings give other weights


@dataclass(frozen=True)
class DistillationSettings:
    """How a student is distilled.

    Attributes:
        rounds: so many times a new batch is synthesised, where there is a source.
        updates: updates a round (paper: 50); the new images come first, then draws from the pool.
        batch: images an update.
        rate, warmup, schedule, decay: SGD with Nesterov momentum 0.9, as in `training.TrainingSettings`.
        temperature: of the softened outputs (paper: 3).
        pad, flip: random crops and mirror images, as in training.
        mix: blend every image with another one of its batch, see `mixed`.
        compile: "always" compiles the update, "never" leaves it.
    """

    rounds: int = 20
    updates: int = 50
    batch: int = 256
    rate: float = 0.1
    warmup: float = 0.15
    schedule: str = "linear"
    decay: float = 5e-4
    temperature: float = 3.0
    pad: int = 4
    flip: bool = True
    mix: bool = False
    compile: str = "always"

    def __post_init__(self) -> None:
        for name in ("rounds", "updates", "batch", "rate", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} of a distillation must be positive")
        for name, choices in (("schedule", SCHEDULES), ("compile", ("always", "never"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose {', '.join(choices)}")


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL( p_T || p_S ) of the outputs softened by the temperature, times its square, mean over images.

    Paper, equation 1 [M]; the square keeps the gradient's size at any temperature (Hinton et al., 2015).
    Both arguments are logits (N, K).
    """
    log_p, log_q = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


# ---- where new images come from --------------------------------------------------------------------


class Source:
    """Makes a round's new batch: uint8 (N, C, H, W) or None, a function of its state, round and student."""

    def __call__(self, number: int, student: Classifier) -> Tensor | None:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """All that decides what it makes, in plain words and numbers: part of a student's key."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What the next call depends on besides its arguments; by default nothing."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


class PixelSource(Source):
    """New batches by inversion of the pixels; with `competition`, against the student as it is.

    Args:
        competition: weight of R_compete; 0 leaves the term out.
        first: number of the first batch, so that a pool made with the same seed is carried on.
    """

    def __init__(
        self,
        teacher: Classifier,
        objective: Objective,
        settings: InversionSettings,
        *,
        batch: int = 256,
        seed: int = 0,
        first: int = 0,
        competition: float = 0.0,
    ) -> None:
        self.teacher, self.objective, self.settings = teacher, objective, settings
        self.batch, self.seed, self.first, self.competition = batch, seed, first, competition

    def labels(self, number: int) -> Tensor:
        """The classes that batch `number` is made for: they run on from batch to batch, as in a pool."""
        before = (self.first + number) * self.batch
        return balanced_labels(before + self.batch, len(self.teacher.classes))[before:]

    def __call__(self, number: int, student: Classifier) -> Tensor:
        objective = self.objective
        if self.competition:
            objective = objective + self.competition * Competition(student)
        seed = batch_seed(self.seed, self.first + number)
        labels = self.labels(number)
        return to_uint8(invert(self.teacher, labels, objective, self.settings, seed=seed).images)

    def config(self) -> dict[str, Any]:
        return {
            "source": "pixels", "version": inversion.VERSION, "objective": self.objective.config(),
            "settings": self.settings.config(), "batch": self.batch, "labels": "running on",
            "seed": self.seed, "first": self.first, "competition": self.competition,
        }  # fmt: skip


class ReadySource(Source):
    """Batches that are there already, handed out in their order: a pool made before, real images.

    Args:
        images: uint8 (N, C, H, W).
    """

    def __init__(self, images: Tensor, batch: int = 256) -> None:
        self.parts = images.split(batch)

    def __call__(self, number: int, student: Classifier) -> Tensor:
        if number >= len(self.parts):
            raise ValueError(f"there is no batch {number}: only {len(self.parts)} lie ready")
        return self.parts[number]

    def config(self) -> dict[str, Any]:
        parts = {str(index): part for index, part in enumerate(self.parts)}
        return {"source": "ready", "images": sha256_tensors(stored(parts), "")}


class Later(Source):
    """Another source, silent for the first rounds: a student that knows nothing yet is no rival.

    Args:
        after: rounds without new images.
    """

    def __init__(self, source: Source, after: int = 1) -> None:
        self.source, self.after = source, after

    def __call__(self, number: int, student: Classifier) -> Tensor | None:
        return self.source(number - self.after, student) if number >= self.after else None

    def config(self) -> dict[str, Any]:
        return self.source.config() | {"after": self.after}

    def state(self) -> dict[str, Tensor]:
        return self.source.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.source.restore(state)


# ---- one update ------------------------------------------------------------------------------------


class Lesson:
    """Loss and agreement on one batch, from private copies of both networks, compiled.

    `student` is the copy that learns. A lesson is made once for a teacher and a kind of student; `begin`
    takes over the weights of both, so that what is compiled serves every student of that kind.
    """

    def __init__(self, teacher: Classifier, student: Classifier, temperature: float, compiled: bool) -> None:
        self.teacher = copy.deepcopy(teacher).freeze().to(memory_format=torch.channels_last)
        self.student = copy.deepcopy(student).requires_grad_(True).to(memory_format=torch.channels_last)
        self.temperature = temperature
        self._run = Compiled(self._forward, self.student, compiled)

    def begin(self, teacher: Classifier, student: Classifier) -> Lesson:
        self.teacher.load_state_dict(teacher.state_dict())
        self.student.load_state_dict(student.state_dict())
        self.student.train()
        return self

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(images.device):
            with torch.no_grad():
                wanted = self.teacher(images)
            given = self.student(images)
        agree = (given.argmax(1) == wanted.argmax(1)).float().mean()
        return distillation_loss(given, wanted, self.temperature), agree

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, with the student's gradients in place afterwards, and the share of equal answers."""
        self.student.zero_grad(set_to_none=True)
        loss, agree = self._run(images)
        loss.backward()
        return loss.detach(), agree


_lessons: WeakKeyDictionary[Classifier, dict[tuple, Lesson]] = WeakKeyDictionary()


def lesson_for(teacher: Classifier, student: Classifier, settings: DistillationSettings) -> Lesson:
    """The lesson for this teacher and this kind of student: a compiled one is made once and used again."""
    compiled = settings.compile == "always" and compiler_available(teacher.mean.device)
    if not compiled:
        return Lesson(teacher, student, settings.temperature, False).begin(teacher, student)
    lessons = _lessons.setdefault(teacher, {})
    key = (repr(student), student.mean.device, settings.batch, settings.temperature)
    if key not in lessons:
        lessons[key] = Lesson(teacher, student, settings.temperature, True)
    return lessons[key].begin(teacher, student)


# ---- the loop --------------------------------------------------------------------------------------


@dataclass
class Distilled:
    """What a distillation gives back, besides the student itself.

    Attributes:
        history: one record a round: images in the pool; loss and agreement with the teacher (percent) on
            the round's batches; the same agreement on the new images alone, before anything is learnt from
            them (`fresh`); seconds of synthesis, distillation and watching; and what `watch` said.
        images: uint8, those synthesised on the way, in order.
    """

    history: list[dict[str, float]]
    images: Tensor


def seconds(history: list[dict[str, float]], what: str) -> float:
    """Seconds of "synthesis", "distillation" or "watching", all rounds together."""
    return sum(record[what] for record in history)


def distill(
    teacher: Classifier,
    student: Classifier,
    images: Tensor,
    settings: DistillationSettings,
    generator: torch.Generator,
    *,
    source: Source | None = None,
    watch: Callable[[int, Classifier], dict[str, float]] | None = None,
    checkpoint: Any = None,
) -> Distilled:
    """Train `student` in place to answer as `teacher` does, on synthesised images and without labels.

    The last update's weights are the result. At the end the student is in eval mode.

    Args:
        images: uint8 (N, C, H, W), what the pool begins with; may be empty where there is a source.
        generator: CPU generator behind draws and augmentation.
        source: makes the new batch of every round; None leaves the pool as it is.
        watch: called with the round (from 1) and the student, in eval mode, after every round; its numbers
            go into the history and nowhere else.
        checkpoint: a `runs.Checkpoint`; with it, a killed distillation goes on at a later round and ends
            in the same bytes as an uninterrupted one.

    Raises:
        ValueError: nothing to learn from; images of another shape; other classes.
        FloatingPointError: the loss is not finite.
    """
    _require_fitting(teacher, student, images, source)
    lesson = lesson_for(teacher, student, settings)
    optimizer = optimizer_for(lesson.student, settings)
    made, history, save = [images[:0].cpu()], [], Sparingly(checkpoint)
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        tensors, meta = saved
        restore(lesson.student, optimizer, generator, tensors)
        made, history = [tensors["made"]], meta["history"]
        if source is not None:
            source.restore(under("source.", tensors))
    pool = torch.cat([images.cpu(), *made]).to(teacher.mean.device)
    for number in range(len(history), settings.rounds):
        began = time.perf_counter()
        new, record = pool[:0], {"round": number + 1}
        if source is not None:
            with evaluating(lesson.student):
                found = source(number, lesson.student)
            new = new if found is None else found
            made.append(new.cpu())
            pool = torch.cat([pool, new.to(pool.device)])
        synthesised = time.perf_counter()
        if len(new):
            answers = (predict(network, new).argmax(1) for network in (lesson.teacher, lesson.student))
            record["fresh"] = 100 * torch.eq(*answers).float().mean().item()
        losses, agreements = [], []
        for index, batch in enumerate(_batches(len(new), pool, settings, generator)):
            step = number * settings.updates + index
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, settings.rounds * settings.updates)
            loss, agree = lesson(batch)
            optimizer.step()
            losses.append(loss)
            agreements.append(agree)
        loss, agreement = (torch.stack(values).mean().item() for values in (losses, agreements))
        distilled = time.perf_counter()  # now that the last update is over: a card lags behind
        record |= {
            "images": len(pool),
            "loss": loss,
            "agreement": 100 * agreement,
            "synthesis": synthesised - began,
            "distillation": distilled - synthesised,
        }
        if not record["loss"] < float("inf"):
            raise FloatingPointError(
                f"the loss of round {number + 1} is not finite: lower rate={settings.rate}"
            )
        if watch is not None:
            with evaluating(lesson.student):
                record |= watch(number + 1, lesson.student)
        record["watching"] = time.perf_counter() - distilled
        history.append(record)
        if checkpoint is not None:
            numbers = {name: record[name] for name in ("loss", "agreement")}
            checkpoint.progress(number + 1, settings.rounds, **numbers)
        save(lambda: (_state(lesson, optimizer, generator, source, made), {"history": history}))
    student.load_state_dict(lesson.student.state_dict())
    student.eval()
    return Distilled(history, torch.cat(made))


def _batches(
    new: int, pool: Tensor, settings: DistillationSettings, generator: torch.Generator
) -> Iterator[Tensor]:
    """The round's batches, float32 [0, 1], augmented: the last `new` images of the pool, then draws of all.

    New images are taken each once, as far as the updates reach; a batch of fewer is filled up from the pool.
    """
    size, count = settings.batch, settings.updates * settings.batch
    fresh = len(pool) - new + torch.randperm(new, generator=generator)
    drawn = torch.randint(len(pool), (count,), generator=generator)
    for picked in torch.cat([fresh, drawn])[:count].split(size):
        batch = augment(pool[picked.to(pool.device)], generator, pad=settings.pad, flip=settings.flip)
        batch = batch.float().div_(255)
        if settings.mix:
            batch = mixed(batch, generator)
        yield batch.contiguous(memory_format=torch.channels_last)


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image (N, C, H, W) blended with the one before it, in shares of its own, uniform in [0, 1).

    Mixup (Zhang et al., 2018) without labels: the teacher says what a blend is (Beyer et al., *Knowledge
    distillation: A good teacher is patient and consistent*, 2022). A small pool becomes a large one.
    """
    share = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device).to(images.device)
    return torch.lerp(images, images.roll(1, 0), share)


def _state(
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    source: Source | None,
    made: list[Tensor],
) -> dict[str, Tensor]:
    """Everything the next round depends on, as flat named tensors."""
    state = snapshot(lesson.student, optimizer, generator) | {"made": torch.cat(made)}
    of_source = {} if source is None else source.state()
    return state | {f"source.{name}": value for name, value in of_source.items()}


def _require_fitting(teacher: Classifier, student: Classifier, images: Tensor, source: Source | None) -> None:
    if images.dtype != torch.uint8:
        raise ValueError(f"the pool's images must be uint8, got {images.dtype}: see dinv.pool.to_uint8")
    if len(images):
        teacher.check(images)
    elif source is None:
        raise ValueError("an empty pool and no source: there is nothing to learn from")
    if len(teacher.classes) != len(student.classes) or student.size != teacher.size:
        raise ValueError(
            f"a student takes its teacher's images and knows its classes: {teacher.name} has "
            f"{teacher.size} px and {len(teacher.classes)} classes, {student.name} {student.size} px and "
            f"{len(student.classes)}"
        )
