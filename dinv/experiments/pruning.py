"""The cells of Tables 4, 5, 9 and 10: a teacher is pruned on some images, then distilled on the same ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinv import pruning
from dinv.distillation import DistillationSettings, distill
from dinv.experiments.cache import stage
from dinv.experiments.device import device_name
from dinv.latency import LatencyTable, Layer, batch_of
from dinv.models import Classifier
from dinv.pruning import Pruned, PruningSettings, Unreachable


@dataclass(frozen=True)
class PrunedCell:
    """One cell of a table.

    Attributes:
        pruned: the network before distillation, and how it came about.
        network: the same after distillation, frozen.
        seconds: of pruning and distillation.
    """

    pruned: Pruned
    network: Classifier
    seconds: float


def prune_and_distill(
    teacher: Classifier,
    images: Tensor,
    count: int,
    distillation: DistillationSettings,
    *,
    settings: PruningSettings | None = None,
    labels: Tensor | None = None,
    table: LatencyTable | None = None,
    seed: int = 0,
    **target: float,
) -> PrunedCell | Unreachable:
    """Prune `teacher` on `count` of the images, then distil on all of them what is left: a cached stage.

    Args:
        images: float or uint8 (N, C, H, W).
        labels: of the images, for the importance "cross-entropy".
        target: filters, flops or latency, as for `pruning.prune`.

    Returns:
        The cell; or, where the target cannot be reached, the exception that says so.
    """
    options = {"settings": settings or PruningSettings(), "labels": labels, "table": table, **target}
    record = _cell(teacher, images, count, distillation, options, seed)
    if record.unreachable:
        return Unreachable(record.unreachable, record.most)
    networks = [pruning.restructured(teacher, record.removed) for _ in range(2)]
    for network, state in zip(networks, (record.pruned, record.distilled), strict=True):
        network.load_state_dict(state)
    return PrunedCell(Pruned(networks[0], record.removed, record.history), networks[1], record.seconds)


def latency_table(teacher: Classifier) -> LatencyTable:
    """The latency of every layer on this device, measured once and kept."""
    batch_size = batch_of(teacher.mean.device)
    record = _measure(teacher, batch_size, device_name(), torch.get_num_threads())
    return LatencyTable({name: Layer(*layer) for name, *layer in record.layers}, batch_size)


@dataclass
class _Cell:
    pruned: dict[str, Tensor] = field(default_factory=dict)
    distilled: dict[str, Tensor] = field(default_factory=dict)
    removed: list[tuple[str, list[int]]] = field(default_factory=list)
    history: list = field(default_factory=list)
    unreachable: str = ""  # the error's message
    most: float = 0.0
    seconds: float = 0.0


@stage("pruned", version=1)
def _cell(teacher, images, count, distillation, options: dict, seed) -> _Cell:
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    labels = options["labels"]
    options = options | {"labels": labels[chosen] if labels is not None else None, "seed": seed}
    try:
        pruned = pruning.prune(teacher, images[chosen], **options)
    except Unreachable as error:
        return _Cell(unreachable=str(error), most=error.most)
    student = copy.deepcopy(pruned.network)
    distill(teacher, student, images, distillation, seed=seed)
    return _Cell(pruned.network.state_dict(), student.state_dict(), pruned.removed, pruned.history)


@dataclass
class _Layers:
    layers: list[tuple[str, int, int, tuple[tuple[float, ...], ...]]]  # name, and the fields of a `Layer`


@stage("latency", version=1)
def _measure(teacher, batch_size, machine, threads) -> _Layers:
    table = LatencyTable.measure(teacher, batch_size)
    return _Layers([(name, x.inputs, x.outputs, x.milliseconds) for name, x in table.layers.items()])
