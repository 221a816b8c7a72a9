"""Supervised training and evaluation, and the loop of updates that every training here goes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinv.checks import check_settings
from dinv.compiling import Recorded
from dinv.data import Dataset, augment
from dinv.files import NO_CHECKPOINT, NoCheckpoint, strip_prefix
from dinv.models import Classifier, evaluating, to_float
from dinv.muon import Muon
from dinv.precision import CHOICES, autocast, choose, setting, settled
from dinv.preflight import HALVES, preflight

SCHEDULES = ("linear", "steps")


@dataclass(frozen=True)
class UpdateSettings:
    """SGD with `batch_size` images per update; `lr` is the peak of `scheduled_lr`.

    Random crops move by up to `pad` pixels; `flip` mirrors half of the images. `precision` is that of
    `precision.choose`. `muon` above 0 gives the filters to Muon: the share of its own length by which a bank
    moves at the peak of the schedule (0.2 for some 400 updates, 0.1 for 800, 0.05 for thousands).
    """

    batch_size: int = 256
    lr: float = 0.2
    weight_decay: float = 5e-4
    schedule: str = "linear"
    warmup: float = 0.15
    pad: int = 4
    flip: bool = True
    precision: str = setting()
    muon: float = field(default=0.0, metadata={"silent": True})  # at 0 no part of a digest

    def __post_init__(self) -> None:
        check_settings(self, ("batch_size", "lr"), schedule=SCHEDULES, precision=CHOICES)


@dataclass(frozen=True)
class TrainingSettings(UpdateSettings):
    """A training from scratch.

    The first `low_res_epochs` run on images of three quarters of their size, which cost 56 % of the time.
    """

    epochs: int = 30
    low_res_epochs: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, ("epochs",))


def scheduled_lr(settings: UpdateSettings, step: int, steps: int) -> float:
    """The learning rate of update `step` (from 0) of `steps`; `settings.lr` is its peak.

    Schedule "linear": up during the first share `warmup` of the updates, then down to zero. "steps": divided
    by ten after 40 % of them, and again after 80 %.
    """
    if settings.schedule == "steps":
        return settings.lr * 0.1 ** sum(step >= part * steps for part in (0.4, 0.8))
    rise = max(1.0, settings.warmup * steps)
    return settings.lr * max(0.0, min((step + 1) / rise, (steps - step) / max(1.0, steps - rise)))


def optimizer_for(model: nn.Module, settings: UpdateSettings) -> Muon:
    """SGD with Nesterov momentum 0.9; weight decay for matrices and filters, not for biases and BatchNorm.

    With `settings.muon` the filters are Muon's, without decay: their length does not count.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    filters = [p for p in weights if p.dim() > 2] if settings.muon else []
    weights = [p for p in weights if p.dim() == 2] if settings.muon else weights
    groups = [{"params": weights, "weight_decay": settings.weight_decay}, {"params": others}]
    groups += [{"params": filters, "share": settings.muon / settings.lr}] if filters else []
    return Muon(groups, lr=settings.lr, momentum=0.9, nesterov=True)


class GradientStep:
    """`step(*inputs)`: what `forward` gives, a loss first; its gradient is left in `model`'s parameters.

    On a card it is recorded unless `record` is False: outputs and gradients are overwritten by the next call.
    """

    def __init__(
        self, forward: Callable[..., tuple[Tensor, ...]], model: nn.Module, record: bool = True
    ) -> None:
        self.forward, self.parameters = forward, [p for p in model.parameters() if p.requires_grad]
        self._recorded = Recorded(self._run, model.buffers)
        self._recorded.on = record

    def _run(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        outputs = self.forward(*inputs)
        gradients = torch.autograd.grad(outputs[0], self.parameters, allow_unused=True)
        return *(output.detach() for output in outputs), *gradients

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = self._recorded(*inputs)
        outputs, gradients = results[: -len(self.parameters)], results[-len(self.parameters) :]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return outputs


@dataclass(eq=False)
class Updates:
    """SGD updates of `model` in rounds, each with a record in `history` and a checkpoint.

        loop = Updates(model, settings, epochs * n, n, generator, checkpoint)
        for number in loop:                           # the rounds left; model is in train mode
            for batch in batches:
                loop.update(loss(model(batch)))
            loop.record(epoch=number + 1, loss=mean)  # after the last one it is in eval mode

    Args:
        total, per_round: updates of all rounds, and of each; the last round has those left.
        generator: the CPU generator behind every draw.
        checkpoint: all is restored from it at once: a killed training ends in the same bytes as any other.
        state: what else the next round depends on: has `state()`, a dictionary of tensors, and `restore`.
    """

    model: nn.Module
    settings: UpdateSettings
    total: int
    per_round: int
    generator: torch.Generator
    checkpoint: NoCheckpoint = NO_CHECKPOINT
    state: Any = None
    history: list[dict[str, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        layout = getattr(self.model, "layout", torch.channels_last)
        self.optimizer = optimizer_for(self.model.to(memory_format=layout), self.settings)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        saved = self.checkpoint.load()
        if saved is not None:
            self._restore(*saved)
        self.rounds, self.done = math.ceil(self.total / self.per_round), len(self.history) * self.per_round

    def __iter__(self) -> Iterator[int]:
        self.model.train()
        devices = {p.device for p in self._parameters if p.is_cuda}
        for number in range(len(self.history), self.rounds):
            with torch.random.fork_rng(devices):  # of what a network draws itself, such as dropout
                torch.manual_seed(self.generator.initial_seed() + number)
                yield number
        self.model.eval()

    def update(self, loss: Tensor | None = None) -> None:
        """One step down the gradient of `loss`; without it, down the one that the parameters have."""
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled_lr(self.settings, self.done, self.total)
        if loss is not None:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        self.done += 1

    def record(self, extra: Mapping[str, float] | None = None, /, **numbers: float) -> None:
        """End a round: `numbers` say which (epoch=3), then its losses; `extra` is for the history alone.

        Raises:
            FloatingPointError: one of `numbers` is NaN or infinite.
        """
        (unit, count), *values = numbers.items()
        for name in (name for name, value in values if not math.isfinite(value)):
            raise FloatingPointError(f"{name} of {unit} {count} is not finite: lower lr={self.settings.lr}")
        self.history.append(numbers | dict(extra or {}))
        self.checkpoint.progress(len(self.history), self.rounds, **dict(values))
        self.checkpoint.save(self._snapshot)

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, parameter in enumerate(self._parameters):
            if parameter in self.optimizer.state:
                tensors[f"momentum.{index}"] = self.optimizer.state[parameter]["momentum_buffer"]
        if self.state is not None:
            tensors |= {f"state.{name}": value for name, value in self.state.state().items()}
        return tensors | {"generator": self.generator.get_state()}, {"history": self.history}

    def _restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self.model.load_state_dict(strip_prefix("model.", tensors))
        for index, value in strip_prefix("momentum.", tensors).items():
            parameter = self._parameters[int(index)]
            buffer = torch.empty_like(parameter)  # keeps the parameter's memory format
            self.optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(value)
        if self.state is not None:
            self.state.restore(strip_prefix("state.", tensors))
        self.generator.set_state(tensors["generator"])
        self.history = list(meta["history"])


@settled
def train(
    model: Classifier,
    dataset: Dataset,
    settings: TrainingSettings | None = None,
    *,
    seed: int = 0,
    checkpoint: NoCheckpoint = NO_CHECKPOINT,
) -> list[dict[str, float]]:
    """Train `model` in place and return one record per epoch: epoch, loss, accuracy (percent).

    The last epoch's weights are the result: no test image takes part in any choice. `seed` is that of
    shuffling and augmentation; with a `checkpoint` a killed training goes on to the same bytes.

    Raises:
        ValueError: fewer images than one batch.
        FloatingPointError: the loss is not finite.
    """
    require_trainable(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{model.name} is frozen: call .requires_grad_(True) first")
    settings, device = settings or TrainingSettings(), model.mean.device
    generator, updates = torch.Generator().manual_seed(seed), len(dataset) // settings.batch_size
    if updates == 0:
        raise ValueError(f"batch_size={settings.batch_size} is larger than the {len(dataset)} images")
    loop = Updates(model, settings, settings.epochs * updates, updates, generator, checkpoint)
    precision = choose(settings.precision, device, model)

    def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(device, precision):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        return loss, (logits.argmax(1) == labels).sum()

    step = GradientStep(forward, model)
    for epoch in loop:
        total, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for images, labels in epoch_batches(dataset, settings, generator, epoch < settings.low_res_epochs):
            loss, right = step(images, labels)
            loop.update()
            total += loss
            correct += right
        percent = 100 * float(correct) / (updates * settings.batch_size)
        loop.record(epoch=epoch + 1, loss=float(total) / updates, accuracy=percent)
    return loop.history


def require_trainable(model: Classifier) -> None:
    """Raise a ValueError where the network cannot work as it is, or is too coarse for updates."""
    preflight(model)
    if model.dtype in HALVES:
        raise ValueError(f"{model.name} is in {model.dtype}, which loses updates: call .float() first")


def epoch_batches(
    dataset: Dataset, settings: TrainingSettings, generator: torch.Generator, low_res: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented batches: float32 [0, 1] images, channels last, and their labels."""
    order = torch.randperm(len(dataset), generator=generator).to(dataset.device)
    for picked in order[: len(order) // settings.batch_size * settings.batch_size].split(settings.batch_size):
        batch = dataset.take(picked)
        images = augment(batch.images, generator, pad=settings.pad, flip=settings.flip).float().div_(255)
        if low_res:
            images = F.interpolate(images, scale_factor=0.75, mode="bilinear", antialias=True)
        yield images.contiguous(memory_format=torch.channels_last), batch.labels


@torch.no_grad()
def predict(model: Classifier, images: Tensor, batch_size: int = 128) -> Tensor:
    """Logits (N, K), float32, of images (N, C, H, W): uint8, or float32 in [0, 1]; eval mode.

    128 small images stay in a CPU's caches between the layers: a third faster than 500.
    """
    preflight(model)
    model.check(images)
    device, logits = model.mean.device, []
    with evaluating(model):
        for part in images.split(batch_size):
            part = to_float(part, device).contiguous(memory_format=torch.channels_last)
            logits.append(model(part).float())
    return torch.cat(logits)


def accuracy(model: Classifier, images: Tensor, labels: Tensor, batch_size: int = 128) -> float:
    """Top-1 accuracy in percent over all images."""
    logits = predict(model, images, batch_size)
    return 100 * (logits.argmax(1) == labels.to(logits.device)).float().mean().item()
