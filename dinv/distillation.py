"""Data-free distillation: a student learns from its teacher on images that nobody ever took.

    distill(teacher, student, InversionSource(teacher, objective, settings, competition=10.0))

Every round a new batch is synthesised, used at once and merged into the pool, then batches are drawn from the
pool. With `competition` it is made against the student as it is in that round (Adaptive DeepInversion).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinv.checks import check_settings
from dinv.compiling import Compiled, compiler_available
from dinv.data import augment, mixup, strong
from dinv.files import NO_CHECKPOINT, NoCheckpoint, strip_prefix
from dinv.group import Group, average_, normalise_together, of_first, share
from dinv.inversion import InversionSettings, Inverter, balanced_labels
from dinv.models import Classifier, evaluating, places
from dinv.objectives import Competition, Objective, Term
from dinv.pool import batch_seed, to_uint8
from dinv.precision import autocast, choose, settled
from dinv.preflight import preflight, private
from dinv.training import GradientStep, Updates, UpdateSettings, predict


@dataclass(frozen=True)
class DistillationSettings(UpdateSettings):
    """How a student is distilled: in `rounds`, each of a new batch and `updates` updates (paper: 50).

    `temperature` softens the outputs (paper: 3; for hundreds or thousands of updates 30 teaches more);
    `augmentation` is "basic", shifts and flips, "mixup" or "strong"; `compile` is "always" or "never".
    """

    rounds: int = 20
    updates: int = 50
    lr: float = 0.1
    temperature: float = 3.0
    augmentation: str = "basic"
    compile: str = "always"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"augmentation": ("basic", "mixup", "strong"), "compile": ("always", "never")}
        check_settings(self, ("rounds", "updates", "temperature"), **choices)


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL( p_T || p_S ) of the outputs softened by the temperature, times its square, mean over images.

    Paper, equation 1 [M]; the square keeps the gradient's size at any temperature (Hinton et al., 2015).
    Logits are (N, K).
    """
    log_p, log_q = (F.log_softmax(z.float() / temperature, dim=1) for z in (teacher_logits, student_logits))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class Source:
    """Images of a distillation, uint8 (N, C, H, W): `start`, which may be empty, and a new batch per round.

    What `state` gives and `restore` takes is what the next batch depends on besides the arguments.
    """

    start: Tensor
    group: Group | None = None  # set by `distill`: processes that may share the work; each returns all
    compile_seconds = 0.0

    def __call__(self, round: int, student: Classifier) -> Tensor | None:
        """The new images of round `round` (from 0) for the student as it is; None or empty: no new ones."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass

    def digest_parts(self) -> dict[str, Any]:
        """All that decides the images, for `files.digest`."""
        return {k: v for k, v in vars(self).items() if k[0] != "_" and k not in ("compile_seconds", "group")}


class FixedImages(Source):
    """Images that are there already: a pool made before, or real images.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].
        start: the number of those at the start; None: all. The others follow, `batch_size` per round, after
            `warmup_rounds` rounds without new ones.
    """

    def __init__(
        self, images: Tensor, start: int | None = None, batch_size: int = 256, warmup_rounds: int = 1
    ) -> None:
        images, start = _as_uint8(images), len(images) if start is None else start
        self.start, self.rest = images[:start], images[start:]
        self.batch_size, self.warmup_rounds = batch_size, warmup_rounds

    def __call__(self, round: int, student: Classifier) -> Tensor | None:
        first = (round - self.warmup_rounds) * self.batch_size
        return self.rest[first : first + self.batch_size] if first >= 0 else None


class InversionSource(Source):
    """New batches by inversion of the pixels; with `competition`, against the student as it is.

    Args:
        start: uint8 or float in [0, 1], the first batches of a pool of equal objective, settings and seed,
            which the new ones carry on; None: no images.
        competition: weight of R_compete; 0 leaves the term out.
        warmup_rounds: rounds without a new batch, as a student that knows nothing is no rival; None: one, or
            none without images to start from.
    """

    def __init__(
        self,
        teacher: Classifier,
        objective: Objective | Term,
        settings: InversionSettings,
        *,
        start: Tensor | None = None,
        batch_size: int = 256,
        seed: int = 0,
        competition: float = 0.0,
        warmup_rounds: int | None = None,
    ) -> None:
        empty = torch.empty(0, *teacher.shape, dtype=torch.uint8)
        self.start = empty if start is None else _as_uint8(start)
        self.teacher, self.objective, self.settings = teacher, 1.0 * objective, settings
        self.batch_size, self.seed, self.competition = batch_size, seed, competition
        self.warmup_rounds = int(len(self.start) > 0) if warmup_rounds is None else warmup_rounds
        self._first = len(self.start) // batch_size - self.warmup_rounds
        self._inverter: Inverter | None = None

    def labels(self, round: int) -> Tensor:
        """The classes of the new images of a round: they run on from batch to batch, as in a pool."""
        end = (self._first + round + 1) * self.batch_size
        return balanced_labels(end, len(self.teacher.classes))[-self.batch_size :]

    def __call__(self, round: int, student: Classifier) -> Tensor | None:
        if round < self.warmup_rounds:
            return None
        if self._inverter is None:
            objective = self.objective
            if self.competition:
                objective = objective + self.competition * Competition(student)
            self._inverter = Inverter(self.teacher, objective, self.settings, self.group)
        if self.competition:
            self._inverter.prepare(self.batch_size).load_student(student)
        result = self._inverter(self.labels(round), seed=batch_seed(self.seed, self._first + round))
        self.compile_seconds += result.compile_seconds
        return to_uint8(result.images)


class DistillStep:
    """`step(images) -> (loss, agreement)` on one batch, from private copies of both networks, compiled.

    `student` is the copy that learns. `begin` takes over the weights of a teacher and a student, so that one
    compiled step serves every student of the same kind, as long as you hold it. With a `group` each rank is
    given the whole batch and takes its share, uncompiled; loss, gradient and BatchNorm are of the whole.
    """

    def __init__(
        self,
        teacher: Classifier,
        student: Classifier,
        temperature: float = 3.0,
        compile: str = "always",
        precision: str = "auto",
        group: Group | None = None,
    ) -> None:
        self.teacher, self.student = private(teacher).freeze(), private(student).requires_grad_(True)
        self.temperature, self.group, self.places = temperature, group, places(student, teacher) or ...
        device, compiled = teacher.mean.device, compile == "always" and group is None
        self.precision = choose(precision, device, teacher, student)
        normalise_together(self.student, group)
        self._compiled = Compiled(self._forward, self.student, compiled and compiler_available(device))
        self._step = GradientStep(self._compiled, self.student, group is None)

    @property
    def compile_seconds(self) -> float:
        return self._compiled.seconds

    def begin(self, teacher: Classifier, student: Classifier) -> None:
        self.teacher.load_state_dict(teacher.state_dict())
        self.student.load_state_dict(student.state_dict())
        self.student.train()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, whose gradient is left in the student's parameters, and the share of equal answers."""
        if self.group is None:
            return self._step(images)
        outputs = self._step(images[share(len(images), self.group)])
        average_([*outputs, *(p.grad for p in self._step.parameters if p.grad is not None)], self.group)
        return outputs

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(images.device, self.precision):
            with torch.no_grad():
                teacher_logits = self.teacher(images)[:, self.places]
            student_logits = self.student(images)
        agreement = (student_logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
        return distillation_loss(student_logits, teacher_logits, self.temperature), agreement


@dataclass
class DistillationResult:
    """The result of a distillation besides the student: the `images` (uint8) that joined the pool, in order.

    `history` has one record per round: images in the pool; loss and agreement with the teacher (percent) on
    the round's batches; `fresh`, the same agreement on the new images before they are learnt; seconds of
    synthesis, distillation, watching, and of compilation within them; and the numbers of `watch`.
    """

    history: list[dict[str, float]]
    images: Tensor
    compile_seconds: float = 0.0

    synthesis_seconds = property(lambda self: sum(record["synthesis"] for record in self.history))
    distillation_seconds = property(lambda self: sum(record["distillation"] for record in self.history))


class _Pool:
    """The images of a distillation so far, on `device`, and in `new` those that joined on the way."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.new, self.images = source, [source.start[:0].cpu()], source.start.to(device)

    def grow(self, round: int, student: Classifier) -> Tensor:
        """The new images of this round, which are at the end of `images` from now on."""
        new = self.source(round, student)
        new = self.images[:0] if new is None else new
        self.new.append(new.cpu())
        self.images = torch.cat([self.images, new.to(self.images.device)])
        if not len(self.images):
            raise ValueError("there are no images to learn from: none at the start, no new ones")
        return new

    def state(self) -> dict[str, Tensor]:
        source = {f"source.{name}": value for name, value in self.source.state().items()}
        return source | {"images": torch.cat(self.new)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.new = [state["images"]]
        self.images = torch.cat([self.images, state["images"].to(self.images.device)])
        self.source.restore(strip_prefix("source.", state))


@settled
def distill(
    teacher: Classifier,
    student: Classifier,
    source: Source | Tensor,
    settings: DistillationSettings | None = None,
    *,
    seed: int = 0,
    watch: Callable[[int, Classifier], dict[str, float]] | None = None,
    step: DistillStep | None = None,
    checkpoint: NoCheckpoint = NO_CHECKPOINT,
) -> DistillationResult:
    """Train `student` in place to answer as `teacher` does, on synthesised images and without labels.

    The last update's weights are the result; at the end the student is in eval mode.

    Args:
        source: a `Source`, or images as for `FixedImages`; `seed` is that of draws and augmentation.
        watch: called with the round (from 1) and the student, in eval mode, after every round; its numbers
            go into the history and nowhere else.
        step: for this temperature and kinds of networks: a compiled one to use again, or one with a group.
        checkpoint: with it, a killed distillation goes on at a later round to the same bytes.

    Raises:
        ValueError: nothing to learn from; images of another shape or range; other classes; another step.
        FloatingPointError: the loss is not finite.
    """
    settings = settings or DistillationSettings()
    source = source if isinstance(source, Source) else FixedImages(source)
    _require_fitting(teacher, student, source.start)
    step = step or DistillStep(teacher, student, settings.temperature, settings.compile, settings.precision)
    precision = choose(settings.precision, teacher.mean.device, teacher, student)
    if (own := (step.temperature, step.precision)) != (asked := (settings.temperature, precision)):
        raise ValueError(f"a step of temperature and precision {own} for {asked}: make another")
    share(settings.batch_size, step.group)  # refused now if the processes do not divide it
    source.group, checkpoint = step.group, of_first(checkpoint, step.group)
    step.begin(teacher, student)
    generator, pool = torch.Generator().manual_seed(seed), _Pool(source, teacher.mean.device)
    total = settings.rounds * settings.updates
    loop = Updates(step.student, settings, total, settings.updates, generator, checkpoint, pool)
    for number in loop:
        began, compiled = time.perf_counter(), step.compile_seconds + source.compile_seconds
        with evaluating(step.student):
            new = pool.grow(number, step.student)
        synthesised, record = time.perf_counter(), {"images": len(pool.images)}
        if len(new):
            logits = predict(step.teacher, new)[:, step.places], predict(step.student, new)
            record["fresh"] = 100 * torch.eq(*(x.argmax(1) for x in logits)).float().mean().item()
        pairs = []
        for batch in _batches(len(new), pool.images, settings, generator):
            pairs.append(torch.stack(step(batch)))
            loop.update()
        loss, agreement = torch.stack(pairs).mean(0).tolist()
        distilled = time.perf_counter()  # now that the last update is over: a card lags behind
        record |= {"synthesis": synthesised - began, "distillation": distilled - synthesised}
        record["compilation"] = step.compile_seconds + source.compile_seconds - compiled
        if watch is not None:
            with evaluating(step.student):
                record |= watch(number + 1, step.student)
        record["watching"] = time.perf_counter() - distilled
        loop.record(record, round=number + 1, loss=loss, agreement=100 * agreement)
    student.eval().load_state_dict(step.student.state_dict())
    compile_seconds = sum(record["compilation"] for record in loop.history)
    return DistillationResult(loop.history, torch.cat(pool.new), compile_seconds)


def _batches(
    new: int, pool: Tensor, settings: DistillationSettings, generator: torch.Generator
) -> Iterator[Tensor]:
    """The round's batches, float32 [0, 1], augmented: the last `new` images of the pool, then draws of all.

    Each new image comes once, as far as the updates reach; a batch of fewer is filled up from the pool.
    """
    size, count = settings.batch_size, settings.updates * settings.batch_size
    fresh = len(pool) - new + torch.randperm(new, generator=generator)
    drawn = torch.randint(len(pool), (count,), generator=generator)
    change = {"basic": lambda batch, _: batch, "mixup": mixup, "strong": strong}[settings.augmentation]
    for picked in torch.cat([fresh, drawn])[:count].to(pool.device).split(size):
        batch = augment(pool[picked], generator, pad=settings.pad, flip=settings.flip).float().div_(255)
        yield change(batch, generator).contiguous(memory_format=torch.channels_last)


def _as_uint8(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8 or (images.is_floating_point() and ((images >= 0) & (images <= 1)).all()):
        return images if images.dtype == torch.uint8 else to_uint8(images)
    span = f"{images.min():.3g} to {images.max():.3g}, {images.dtype}"
    raise ValueError(f"images must be uint8, or float in [0, 1], got {span}")


def _require_fitting(teacher: Classifier, student: Classifier, images: Tensor) -> None:
    if preflight(teacher) and preflight(student) and len(images):
        teacher.check(images)
    if teacher.shape != student.shape:
        pair = " and ".join(f"{net.name} with {net.shape}" for net in (teacher, student))
        raise ValueError(f"a student takes its teacher's images, not {pair}")
