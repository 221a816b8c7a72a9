"""Data-free pruning (paper, section 4.3): whole filters go, and with them everything that only they fed.

    pruned = prune(teacher, pool.images, filters=0.2)
    distill(teacher, pruned.network, pool.images, settings)

No label is needed: an image matters only for what it tells about the filters. Which layers must lose a
channel together is found by torch-pruning (Fang et al., CVPR 2023); which channel goes is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dinv.checks import check_settings
from dinv.compiling import forward_flops
from dinv.files import read_tensors, write_tensors
from dinv.latency import LatencyTable
from dinv.models import Classifier, to_float
from dinv.models.classifier import check_range
from dinv.precision import settled
from dinv.pruning_graph import (
    Group,
    check_prunable,
    dependencies,
    filter_count,
    filter_groups,
    name_of,
    refused,
    try_forward,
)
from dinv.training import predict

IMPORTANCES = ("kl", "cross-entropy", "magnitude", "random")


@dataclass(frozen=True)
class PruningSettings:
    """Which filters go first, and how many at a time.

    Attributes:
        importance: "kl", Taylor on the divergence from the original, no label anywhere; "cross-entropy",
            Taylor on the loss with labels; "magnitude" of the weights; "random".
        eta: weight per millisecond of I_lat in I = I_err + eta I_lat: the latency without the channel less
            that with it, so that the time saved is taken off the importance.
        step: share of the original filters that goes before importance is measured again.
        keep: share of its channels that every group keeps, at least one channel.
        multiple: widths become multiples of it, as channels go in blocks: 8 suits a card, whose matrix units
            want widths of bfloat16 that 8 divides; 1 lets them go one by one.
    """

    importance: str = "kl"
    eta: float = 0.0
    step: float = 0.02
    keep: float = 0.1
    multiple: int = field(default=1, metadata={"silent": True})

    def __post_init__(self) -> None:
        check_settings(self, ("step", "multiple"), importance=IMPORTANCES)
        if max(self.step, self.keep) > 1:
            raise ValueError(f"step={self.step} and keep={self.keep} are shares, at most 1")


def taylor(groups: list[Group], images: Tensor, labels: Tensor, batch_size: int = 128) -> list[Tensor]:
    """First-order Taylor importance of every channel, one float32 tensor (width,) per group.

    E_x[ (sum a dL/da)^2 ] with L = -log p(y | x): the sum runs over the channel's pixels and over all that
    the group shuts with it, the mean over images (Molchanov et al., CVPR 2019). To first order it is the
    squared change of an image's loss when the channel is shut. Images are uint8 or float32, labels (N,).
    """
    network, device, outputs = groups[0].network, groups[0].network.mean.device, {}
    totals = [torch.zeros(group.width, dtype=torch.float64, device="cpu") for group in groups]

    def keep(layer, inputs, output):
        outputs[layer] = output
        return output.clone()  # an in-place activation may write over it

    with torch.enable_grad(), ExitStack() as hooks:
        for layer in dict.fromkeys(layer for group in groups for layer, _, _ in group.gates):
            hooks.enter_context(layer.register_forward_hook(keep))
        for part, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            loss = F.cross_entropy(network(to_float(part, device)), targets.to(device), reduction="sum")
            gradients = zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True)
            change = {
                layer: _by_image(network, layer, len(part), outputs[layer], g) for layer, g in gradients
            }
            for total, group in zip(totals, groups, strict=True):
                shut = change[group.gates[0][0]].new_zeros(len(part), group.width)
                for layer, own, root in group.gates:
                    shut.index_add_(1, root.to(device), change[layer][:, own.to(device)])
                total += shut.cpu().double().square().sum(0)  # Apple's cards have no float64
    return [(total / len(images)).float() for total in totals]


def _by_image(network: Classifier, layer: nn.Module, count: int, output: Tensor, gradient: Tensor) -> Tensor:
    if len(output) != count:  # rows of another kind, such as the tokens of all images one after the other
        seen = f"{name_of(network, layer)} sees {len(output)} rows of {count} images"
        raise ValueError(
            f"{network.name} cannot be pruned: its layer {seen}, "
            'so their importance is no image\'s; PruningSettings(importance="magnitude") does without'
        )
    return (output.detach() * gradient).unsqueeze(-1).flatten(2).sum(2)


def sampled_labels(network: Classifier, images: Tensor, generator: torch.Generator) -> Tensor:
    """A class for every image, drawn from the network's own probabilities.

    KL( p_T || p_S ) is the mean of -log p_S(y) over y drawn from p_T, up to a constant: with these in the
    place of labels, `taylor` measures the divergence from the original network. (Its plain gradient would
    be of no use: it is zero while both networks are equal.)
    """
    return torch.multinomial(predict(network, images).softmax(1).cpu(), 1, generator=generator)[:, 0]


class Unreachable(ValueError):
    """So large a share cannot be removed; `most` is the largest that can."""

    def __init__(self, message: str, most: float) -> None:
        super().__init__(message)
        self.most = most


@dataclass
class Pruned:
    """A smaller network, frozen, and how it came about.

    Attributes:
        removed: (layer, channels) in the order of removal; with the original's structure, the structure.
        history: one record per step: share of filters and of FLOPs left, and of latency with a table.
    """

    network: Classifier
    removed: list[tuple[str, list[int]]]
    history: list[dict[str, float]]

    def save(self, path: str | Path) -> Path:
        """Write state and structure as one safetensors file; returns its path."""
        structure = {"network": self.network.name, "removed": self.removed}
        write_tensors(Path(path), self.network.state_dict(), structure)
        return Path(path)


@settled
def prune(
    network: Classifier,
    images: Tensor,
    *,
    filters: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    settings: PruningSettings | None = None,
    labels: Tensor | None = None,
    table: LatencyTable | None = None,
    seed: int = 0,
) -> Pruned:
    """A copy of `network` without its least important filters; the original stays as it is.

    Args:
        images: uint8 or float32 in [0, 1], (N, C, H, W), on which importance is measured.
        filters, flops, latency: one of them: the share to remove, from 0 to below 1; latency by `table`.
        labels: (N,), for the importance "cross-entropy" alone.

    Raises:
        ValueError: not one target; labels or a table missing; a network that cannot be followed; or, as
            `Unreachable`, a share that cannot be removed.
    """
    settings = settings or PruningSettings()
    shares = {"filters": filters, "flops": flops, "latency": latency}
    named = [name for name, value in shares.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"name one target of {', '.join(shares)}, got {', '.join(named) or 'none'}")
    target, share = named[0], float(shares[named[0]])
    if not 0 <= share < 1:
        raise ValueError(f"{target}={share} must be a share from 0 to below 1: something has to be left")
    if settings.importance == "cross-entropy" and labels is None:
        raise ValueError('importance="cross-entropy" needs labels; "kl" does without')
    if table is None and (target == "latency" or settings.eta):
        raise ValueError("latency is measured first: pass table=LatencyTable.measure(network)")
    check_prunable(network)
    check_range(images)
    generator, graph = torch.Generator().manual_seed(seed), dependencies(network)
    small: Classifier = graph.model

    def size() -> dict[str, float]:
        sizes = {"filters": float(filter_count(small)), "flops": float(forward_flops(small))}
        return sizes | ({"latency": table.of(small)} if table is not None else {})

    with refused(small, "its operations cannot be counted"):
        whole = size()
    least = {g.makers[0]: max(1, math.ceil(settings.keep * g.width)) for g in filter_groups(graph)}
    if settings.importance == "kl":
        labels = sampled_labels(network, images, generator)
    left, history = {name: 1.0 for name in whole}, []
    while 1 - left[target] < share - 1e-9:
        groups = filter_groups(graph)
        if settings.importance == "magnitude":
            scores = [group.magnitude() for group in groups]
        elif settings.importance == "random":
            scores = [torch.rand(group.width, generator=generator) for group in groups]
        else:
            scores = taylor(groups, images, labels)
        if settings.eta:
            saved = [table.saving(small, group.makers, group.consumers) for group in groups]
            scores = [score - settings.eta * time for score, time in zip(scores, saved, strict=True)]
        room = settings.step * whole["filters"]
        if target == "filters":
            room = min(room, share * whole["filters"] - (1 - left["filters"]) * whole["filters"])
        chosen: dict[Group, list[int]] = {}
        for _, group, channels in sorted(_blocks(groups, scores, settings.multiple), key=itemgetter(0)):
            rest = group.width - len(chosen.get(group, ())) - len(channels)
            if room > 0 and rest >= least[group.makers[0]]:
                chosen.setdefault(group, []).extend(channels)
                room -= len(group.makers) * len(channels)
        if not chosen:
            most = 1 - left[target]
            limit = f"at {most:.2f} every layer is down to the share of {settings.keep:g} that it keeps"
            raise Unreachable(f"{target}={share:g} cannot be removed from {network.name}: {limit}", most)
        with refused(small, "its layers do not belong together as they seem to"):
            for group, channels in chosen.items():
                group.remove(channels)
        try_forward(small)
        left = {name: value / whole[name] for name, value in size().items()}
        history.append(left)
    removed = [(name, [int(index) for index in channels]) for name, _, channels in graph.pruning_history()]
    return Pruned(small.freeze(), removed, history)


def _blocks(groups: list[Group], scores: list[Tensor], size: int) -> Iterator[tuple[float, Group, list[int]]]:
    """Mean score, group and channels of blocks of units that go together, every group's lowest first.

    The first block of a group makes its width a multiple of `size`, the others keep it so.
    """
    for group, score in zip(groups, scores, strict=True):
        values, count = score[torch.tensor(group.units)].mean(1), len(group.units)
        order, each = values.argsort(stable=True).tolist(), group.width // count
        cuts = [0, *(cut for cut in range(1, count + 1) if (count - cut) * each % size == 0)]
        for start, stop in pairwise(cuts):
            channels = [channel for unit in order[start:stop] for channel in group.units[unit]]
            yield values[order[start:stop]].mean().item(), group, channels


@settled
def restructured(original: Classifier, removed: list[tuple[str, list[int]]]) -> Classifier:
    """A frozen copy of `original` without these channels of `Pruned.removed`, else a ValueError."""
    graph = dependencies(original)
    layers = dict(graph.model.named_modules())
    for name, channels in removed:
        layer = layers.get(name)
        if not isinstance(layer, _ConvNd) or max(channels) >= layer.out_channels:
            raise ValueError(f"{original.name} is not the network that was pruned: look at its layer {name}")
        graph.load_pruning_history([(name, True, list(channels))])
    return graph.model.freeze()


def load_pruned(path: str | Path, original: Classifier) -> Pruned:
    """Read what `Pruned.save` wrote; `original`, the same network with any weights, lends the structure.

    Raises:
        Corrupt: the file is damaged, or nothing of dinv's.
        ValueError: it holds something else, or another network.
    """
    state, structure = read_tensors(Path(path))
    if "removed" not in (structure or {}):
        raise ValueError(f"{path} holds no pruned network")
    if structure["network"] != original.name:
        raise ValueError(f"{path} was {structure['network']} before it was pruned, not {original.name}")
    removed = [(name, channels) for name, channels in structure["removed"]]
    small = restructured(original, removed)
    small.load_state_dict(state)
    return Pruned(small, removed, history=[])
