"""Supervised training and evaluation: how the teachers and the judges come to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinv.datasets import Dataset, augment
from dinv.models import Classifier, autocast, evaluating, to_float
from dinv.step import Compiled, compiler_available
from dinv.store import under

VERSION = 1  # part of a cached training's key: raise it when the same settings give other weights

SCHEDULES = ("linear", "steps")


@dataclass(frozen=True)
class TrainingSettings:
    """A training from scratch.

    Attributes:
        epochs: passes over the training set.
        batch: images an update.
        rate: peak learning rate of SGD with Nesterov momentum 0.9.
        schedule: "linear": the rate rises linearly over the first `warmup` of the updates and falls linearly
            to zero. "steps": it is divided by ten after 40 and after 80 % of them.
        decay: weight decay of matrices and filters; biases and BatchNorm parameters have none.
        small_epochs: so many first epochs see the images at three quarters of their size, which costs
            56 % of the time (progressive resizing).
        pad: random crops move by up to so many pixels.
        flip: random horizontal flips.
        smoothing: label smoothing.
    """

    epochs: int = 30
    batch: int = 256
    rate: float = 0.2
    decay: float = 5e-4
    schedule: str = "linear"
    warmup: float = 0.15
    small_epochs: int = 0
    pad: int = 4
    flip: bool = True
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not 0 < self.rate < float("inf"):
            raise ValueError(
                f"epochs={self.epochs}, batch={self.batch} and rate={self.rate} must be positive"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: choose {', '.join(SCHEDULES)}")


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """The rate of update `step` of `steps`, by the settings' schedule."""
    if settings.schedule == "steps":
        return settings.rate * 0.1 ** sum(step >= part * steps for part in (0.4, 0.8))
    rise = max(1.0, settings.warmup * steps)
    fall = max(1.0, steps - rise)
    return settings.rate * max(0.0, min((step + 1) / rise, (steps - step) / fall))


def optimizer_for(model: nn.Module, settings: TrainingSettings) -> torch.optim.SGD:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.SGD(
        [{"params": decayed, "weight_decay": settings.decay}, {"params": free}],
        lr=settings.rate,
        momentum=0.9,
        nesterov=True,
    )


def epoch_batches(
    dataset: Dataset, settings: TrainingSettings, generator: torch.Generator, small: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented batches: float32 [0, 1] images, channels last, and their labels."""
    for images, labels in dataset.batches(settings.batch, generator=generator, drop_last=True):
        images = augment(images, generator, pad=settings.pad, flip=settings.flip).float().div_(255)
        if small:
            images = F.interpolate(
                images, scale_factor=0.75, mode="bilinear", antialias=True, align_corners=False
            )
        yield images.contiguous(memory_format=torch.channels_last), labels


def train(
    model: Classifier,
    dataset: Dataset,
    settings: TrainingSettings,
    generator: torch.Generator,
    checkpoint: Any = None,
) -> list[dict[str, float]]:
    """Train `model` in place and return one record (epoch, loss, accuracy) an epoch.

    The last epoch's weights are the result: no test image takes part in any choice.

    Args:
        generator: CPU generator behind shuffling and augmentation.
        checkpoint: a `runs.Checkpoint`; with it, a killed training goes on at its next epoch and ends
            in the same bytes as an uninterrupted one.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = next(model.parameters()).device
    model.train().to(memory_format=torch.channels_last)
    optimizer = optimizer_for(model, settings)
    steps_an_epoch = len(dataset) // settings.batch
    if steps_an_epoch == 0:
        raise ValueError(f"batch {settings.batch} is larger than the {len(dataset)} images")
    first, history = 0, []
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        tensors, meta = saved
        restore(model, optimizer, generator, tensors)
        first, history = meta["epoch"], meta["history"]
    forward = _forward(model, device)  # on a card compiled
    for epoch in range(first, settings.epochs):
        total, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        batches = epoch_batches(dataset, settings, generator, small=epoch < settings.small_epochs)
        for step, (images, labels) in enumerate(batches):
            rate = learning_rate(settings, epoch * steps_an_epoch + step, settings.epochs * steps_an_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast(device):
                logits = forward(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            correct += (logits.argmax(1) == labels).sum()
        mean = float(total) / steps_an_epoch
        if mean != mean or mean == float("inf"):
            raise FloatingPointError(
                f"the loss of epoch {epoch + 1} is not finite: lower rate={settings.rate}"
            )
        accuracy = 100 * float(correct) / (steps_an_epoch * settings.batch)
        history.append({"epoch": epoch + 1, "loss": mean, "accuracy": accuracy})
        if checkpoint is not None:
            checkpoint.progress(epoch + 1, settings.epochs, loss=mean, accuracy=accuracy)
            checkpoint.save(snapshot(model, optimizer, generator), {"epoch": epoch + 1, "history": history})
    model.eval()
    return history


def _forward(model: Classifier, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network's forward pass: on a card compiled, where that can be."""
    return Compiled(model.forward, model) if device.type == "cuda" and compiler_available(device) else model


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """Everything the next epoch depends on, as flat named tensors."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            state[f"momentum.{index}"] = momentum
    state["generator"] = generator.get_state()
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    state: dict[str, Tensor],
) -> None:
    """The inverse of `snapshot`."""
    model.load_state_dict(under("model.", state))
    for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        momentum = state.get(f"momentum.{index}")
        if momentum is not None:
            buffer = torch.empty_like(parameter)  # keeps the parameter's memory format
            optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(momentum)
    generator.set_state(state["generator"])


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch: int = 128) -> Tensor:
    """Logits (N, K), float32, of images (N, C, H, W): uint8, or float32 in [0, 1]; eval mode.

    128 small images stay in a CPU's caches between the layers: a third faster than 500.
    """
    if images.shape[0] == 0:
        raise ValueError("predict was given an empty batch: at least one image is needed")
    if isinstance(model, Classifier):
        model.check(images)
    device = next(model.parameters()).device
    logits = []
    with evaluating(model):
        for part in images.split(batch):
            part = to_float(part, device)
            logits.append(model(part.contiguous(memory_format=torch.channels_last)).float())
    return torch.cat(logits)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 128) -> float:
    """Top-1 accuracy in percent over all the images given."""
    logits = predict(model, images, batch)
    return 100 * (logits.argmax(1) == labels.to(logits.device)).float().mean().item()
