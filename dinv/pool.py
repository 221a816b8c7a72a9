"""Pools: many inverted images, batch by batch, resumable, kept as uint8 in one file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinv import files
from dinv.inversion import Inverter, Progress, check_labels
from dinv.models.classifier import resized


@dataclass
class Pool:
    """Inverted images ready for use.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), the target classes.
        losses: (steps, terms) unweighted, mean over the batches; `terms` names the columns.
        snapshots: uint8 (S, B, C, H, W), the first batch on its way; `snapshot_steps` says when.
        seconds, compile_seconds: wall time of the synthesis, and the part of it spent compiling.
    """

    images: Tensor
    labels: Tensor
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    snapshots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))
    terms: tuple[str, ...] = ()
    snapshot_steps: tuple[int, ...] = ()
    seconds: float = 0.0
    compile_seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, under a temporary name first; returns its path."""
        tensors, values = files.packed(self)
        files.write_tensors(Path(path), tensors, {"pool": values})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Pool:
        """Read a pool; `files.Corrupt` if the file is damaged or was not written by `save`."""
        tensors, meta = files.read_tensors(Path(path))
        if "pool" not in (meta or {}):
            raise files.Corrupt(f"{path} is not a pool: it was not written by Pool.save")
        return files.unpacked(cls, tensors, meta["pool"])


def synthesize(
    inverter: Inverter,
    labels: Tensor,
    *,
    batch_size: int = 256,
    seed: int = 0,
    snapshots: tuple[int, ...] = (),
    checkpoint: Any = files.NO_CHECKPOINT,
) -> Pool:
    """Invert for all `labels`, `batch_size` images at a time; a larger batch size means one batch.

    Every batch has a seed of its own, derived from `seed` and its number; with a checkpoint a
    killed synthesis goes on at its next batch and ends in the same images.

    Raises:
        ValueError: the number of labels is no multiple of `batch_size`, besides what `invert` raises.
    """
    labels = check_labels(labels, inverter.teacher.classes)
    batch_size = min(batch_size, len(labels))
    if batch_size < 1 or len(labels) % batch_size:
        raise ValueError(f"{len(labels)} images cannot be made in whole batches of {batch_size}")
    inverter.prepare(len(labels))
    size = inverter.teacher.size
    steps = sum(steps for steps, _ in inverter.settings.plan(size))
    pool = Pool(torch.zeros(0), labels.cpu(), snapshot_steps=tuple(snapshots))
    parts, batches = labels.split(batch_size), []
    saved = checkpoint.load()
    if saved is not None:
        tensors, meta = saved
        batches = list(tensors["images"].split(batch_size))
        pool = files.unpacked(Pool, tensors, meta)
    for number in range(len(batches), len(parts)):

        def report(progress: Progress, number: int = number) -> None:
            checkpoint.progress(number * steps + progress.step, len(parts) * steps)

        now = snapshots if number == 0 else ()
        result = inverter(parts[number], seed=batch_seed(seed, number), snapshots=now, callback=report)
        batches.append(to_uint8(result.images))
        pool.terms = tuple(result.losses)
        curves = torch.tensor([result.losses[name] for name in pool.terms], dtype=torch.float64).T
        pool.losses = curves if number == 0 else pool.losses + (curves - pool.losses) / (number + 1)
        if now:
            pool.snapshots = torch.stack([to_uint8(resized(result.snapshots[s], size)) for s in snapshots])
        pool.seconds += result.seconds
        pool.compile_seconds += result.compile_seconds
        checkpoint.save(lambda: files.packed(replace(pool, images=torch.cat(batches))))
    return replace(pool, images=torch.cat(batches))


def batch_seed(seed: int, number: int) -> int:
    """The seed of batch `number` of a pool: the first 8 bytes of a hash, so that pools never overlap."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] float images as uint8, rounded, on the CPU."""
    return images.mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
