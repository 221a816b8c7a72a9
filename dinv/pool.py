"""Pools: many inverted images, batch by batch, resumable, kept as uint8 in one file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinv import files
from dinv.group import Group, by_rank, of_first
from dinv.inversion import Inverter, Progress, check_labels
from dinv.models.classifier import resized
from dinv.precision import settled


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


@settled
def synthesize(
    inverter: Inverter,
    labels: Tensor,
    *,
    batch_size: int = 256,
    seed: int = 0,
    snapshots: tuple[int, ...] = (),
    checkpoint: Any = files.NO_CHECKPOINT,
    group: Group | None = None,
) -> Pool:
    """Invert for all `labels`, `batch_size` images at a time; a larger batch size means one batch.

    Every batch has a seed of its own, derived from `seed` and its number; with a checkpoint a
    killed synthesis goes on at its next batch and ends in the same images.

    Args:
        group: processes that all call with equal arguments. Each makes every n-th batch and gets the whole
            pool, byte for byte that of one process with as many threads. (With an inverter that has a group
            they share every batch.) Rank 0's checkpoint is that of all, for any number of processes.

    Raises:
        ValueError: the number of labels is no multiple of `batch_size`, besides what `invert` raises.
    """
    labels = check_labels(labels, inverter.teacher.classes)
    batch_size = min(batch_size, len(labels))
    if batch_size < 1 or len(labels) % batch_size:
        raise ValueError(f"{len(labels)} images cannot be made in whole batches of {batch_size}")
    by_rank(lambda: inverter.prepare(len(labels)) and None, group)
    size = inverter.teacher.size
    steps = sum(steps for steps, _ in inverter.settings.plan(size))
    pool = Pool(torch.zeros(0), labels.cpu(), snapshot_steps=tuple(snapshots))
    parts, batches = labels.split(batch_size), []
    checkpoint = of_first(checkpoint, group or inverter.group)
    saved = checkpoint.load()
    if saved is not None:
        tensors, meta = saved
        batches = list(tensors["images"].split(batch_size))
        pool = files.unpacked(Pool, tensors, meta)

    def one_batch() -> Pool | None:
        number = len(batches) + (group.rank() if group else 0)
        if number >= len(parts):
            return None

        def report(progress: Progress) -> None:
            checkpoint.progress(number * steps + progress.step, len(parts) * steps)

        now = snapshots if number == 0 else ()
        result = inverter(parts[number], seed=batch_seed(seed, number), snapshots=now, callback=report)
        curves = torch.tensor(list(result.losses.values()), dtype=torch.float64).T
        batch = Pool(to_uint8(result.images), parts[number].cpu(), curves, terms=tuple(result.losses))
        if now:
            batch.snapshots = torch.stack([to_uint8(resized(result.snapshots[s], size)) for s in now])
        return replace(batch, seconds=result.seconds, compile_seconds=result.compile_seconds)

    while len(batches) < len(parts):
        made = [batch for batch in by_rank(one_batch, group) if batch is not None]
        for batch in made:
            batches.append(batch.images)
            if len(batches) == 1:
                pool.losses, pool.snapshots, pool.terms = batch.losses, batch.snapshots, batch.terms
            else:
                pool.losses = pool.losses + (batch.losses - pool.losses) / len(batches)
        pool.seconds += max(batch.seconds for batch in made)
        pool.compile_seconds += max(batch.compile_seconds for batch in made)
        checkpoint.save(lambda: files.packed(replace(pool, images=torch.cat(batches))))
    return replace(pool, images=torch.cat(batches))


def batch_seed(seed: int, number: int) -> int:
    """The seed of batch `number` of a pool: the first 8 bytes of a hash, so that pools never overlap."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] float images as uint8, rounded, on the CPU."""
    return images.mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
