"""Pools: many inverted images, batch by batch, resumable, kept as uint8 in one file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinv.inversion import InversionSettings, Progress, check_labels, invert
from dinv.models import Classifier, resized
from dinv.objectives import Objective, Term
from dinv.step import compiling_pays
from dinv.store import Corrupt, Sparingly, canonical_json, read_tensors, sha256_tensors, stored, write_tensors


class CorruptPool(RuntimeError):
    """A pool file that is not what it should be."""


@dataclass
class Pool:
    """Inverted images ready for use.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), the classes asked for.
        losses: (steps, terms) unweighted, mean over the batches; `terms` names the columns.
        snapshots: uint8 (S, B, C, H, W), the first batch on its way; `snapshot_steps` says when.
    """

    images: Tensor
    labels: Tensor
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    snapshots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))
    terms: tuple[str, ...] = ()
    snapshot_steps: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> dict[str, Tensor]:
        names = ("images", "labels", "losses", "snapshots")
        return stored({name: getattr(self, name) for name in names})

    def meta(self) -> dict[str, Any]:
        return {"terms": list(self.terms), "snapshot_steps": list(self.snapshot_steps)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Pool:
        return cls(**tensors, terms=tuple(meta["terms"]), snapshot_steps=tuple(meta["snapshot_steps"]))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, under a temporary name first; returns its path."""
        meta = canonical_json(self.meta(), "meta")
        checksum = sha256_tensors(self.tensors(), meta)
        write_tensors(Path(path), self.tensors(), f"pool {checksum} {meta}")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Pool:
        """Read a pool; CorruptPool if the file is damaged or is something else."""
        try:
            tensors, text = read_tensors(Path(path))
        except Corrupt as problem:
            raise CorruptPool(f"{problem}: synthesise it again") from problem
        kind, _, rest = text.partition(" ")
        checksum, _, meta = rest.partition(" ")
        if kind != "pool":
            raise CorruptPool(f"{path} is not a pool: it was not written by Pool.save")
        if sha256_tensors(tensors, meta) != checksum:
            raise CorruptPool(f"{path} is corrupt (its checksum differs): synthesise it again")
        return cls.of(tensors, json.loads(meta))


def synthesize(
    teacher: Classifier,
    labels: Tensor,
    objective: Objective | Term,
    settings: InversionSettings | None = None,
    *,
    batch: int = 256,
    seed: int = 0,
    snapshots: tuple[int, ...] = (),
    at_once: int = 0,
    checkpoint: Any = None,
) -> Pool:
    """Invert `teacher` for all `labels`, `batch` images at a time, `at_once` of them together in memory.

    Every batch has a seed of its own, derived from `seed` and its number; with a `runs.Checkpoint` a
    killed synthesis goes on at its next batch and ends in the same bytes.

    Raises:
        ValueError: the number of labels is no multiple of `batch`, besides what `invert` raises.
    """
    settings = settings or InversionSettings()
    labels = check_labels(labels, len(teacher.classes))
    if batch < 1 or len(labels) % batch:
        raise ValueError(f"{len(labels)} images cannot be made in whole batches of {batch}")
    if settings.compile == "auto":
        pays = compiling_pays(teacher, objective, settings, images=len(labels))
        settings = replace(settings, compile="always" if pays else "never")
    done: list[Tensor] = []
    losses, taken, terms = torch.zeros(0, 0), torch.zeros(0, dtype=torch.uint8), ()
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        tensors, meta = saved
        done = list(tensors["images"].split(batch))
        losses, taken, terms = tensors["losses"], tensors["snapshots"], tuple(meta["terms"])
    parts = labels.split(batch)
    steps = sum(steps for steps, _ in settings.plan(teacher.size))

    def report(number: int):
        def callback(progress: Progress) -> None:
            checkpoint.progress(number * steps + progress.step, len(parts) * steps)

        return callback if checkpoint is not None else None

    save = Sparingly(checkpoint)
    for number in range(len(done), len(parts)):
        result = invert(
            teacher,
            parts[number],
            objective,
            settings,
            seed=batch_seed(seed, number),
            snapshots=snapshots if number == 0 else (),
            callback=report(number),
            at_once=at_once,
        )
        done.append(to_uint8(result.images))
        terms = tuple(result.losses)
        new = torch.tensor([result.losses[name] for name in terms], dtype=torch.float64).T
        losses = new if number == 0 else losses + (new - losses) / (number + 1)
        if number == 0 and snapshots:
            taken = torch.stack([to_uint8(resized(result.snapshots[s], teacher.size)) for s in snapshots])
        so_far, names = {"losses": losses, "snapshots": taken}, {"terms": list(terms)}
        save(lambda so_far=so_far, names=names: (so_far | {"images": torch.cat(done)}, names))
    return Pool(torch.cat(done), labels.cpu(), losses, taken, terms, tuple(snapshots))


def batch_seed(seed: int, number: int) -> int:
    """The seed of batch `number` of a pool: the first 8 bytes of a hash, so that pools never overlap."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] float images as uint8, rounded, on the CPU."""
    return images.mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
