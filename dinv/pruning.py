"""Data-free pruning: whole filters go, and with them everything that only they fed.

    pruned = prune(teacher, pool.images, filters=0.2)
    distill(teacher, pruned.network, pool.images, settings, generator)

What an image is worth here is what it says about the filters: no label takes part. Which layers must lose
a channel together is torch-pruning's business (Fang et al., CVPR 2023); which channel goes is decided here.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dinv.latency import LatencyTable
from dinv.models import Classifier, to_float
from dinv.step import forward_flops
from dinv.store import canonical_json, read_tensors, stored, write_tensors
from dinv.training import predict

VERSION = 1  # part of a pruned network's key: raise it when the same settings remove other filters
IMPORTANCES = ("kl", "cross-entropy", "magnitude", "random")
TARGETS = ("filters", "flops", "latency")


# ---- what can go -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A layer of a group: channel `own[i]` of `layer` goes when the group's channel `root[i]` goes."""

    name: str
    layer: nn.Module
    own: Tensor
    root: Tensor


class Group:
    """Channels that only go together, such as those on both sides of an addition.

    Attributes:
        name: of the first convolution that makes them.
        convolutions: whose filters they are. One channel of the group is one filter of each.
        consumers: names of the convolutions and linear layers that take them.
        width: how many channels there are.
    """

    def __init__(self, graph: torch_pruning.DependencyGraph, dependencies: torch_pruning.Group) -> None:
        self._graph, self._dependencies = graph, dependencies
        self.convolutions, self._norms, self.consumers = [], [], set()
        for item in dependencies:
            layer = item.dep.target.module
            name = graph._module2name.get(layer, "")
            if not graph.is_out_channel_pruning_fn(item.dep.handler):
                if isinstance(layer, (_ConvNd, nn.Linear)):
                    self.consumers.add(name)
                continue
            member = Member(name, layer, torch.tensor(item.idxs), torch.tensor(item.root_idxs))
            if isinstance(layer, _ConvNd):
                self.convolutions.append(member)
            elif isinstance(layer, _BatchNorm):
                self._norms.append(member)
        root = self.convolutions[0]
        self.name, self.width = root.name, root.layer.out_channels

    @property
    def network(self) -> Classifier:
        """Whose channels these are."""
        return self._graph.model

    @property
    def gates(self) -> list[Member]:
        """Where a channel shuts when it goes: after the BatchNorm, or the convolution where there is none."""
        return self._norms or self.convolutions

    def magnitude(self) -> Tensor:
        """Norm of all weights of a channel, over the group's mean; float32 (width,)."""
        score = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="sum")
        return score(self._dependencies).detach().float().cpu()

    def remove(self, channels: list[int]) -> None:
        """Take these channels out of every layer that has them."""
        _coupled(self._graph, self.convolutions[0].layer, channels).prune()


def dependencies(network: Classifier) -> torch_pruning.DependencyGraph:
    """The graph of what depends on what in a copy of `network`, its `model`; what is pruned is the copy.

    Raises:
        ValueError: torch-pruning cannot follow the network.
    """
    small = copy.deepcopy(network).eval().requires_grad_(True)  # the graph is found by its gradients
    example = network.mean.new_zeros(1, network.channels, network.size, network.size)
    try:
        with torch.enable_grad(), _quiet():
            return torch_pruning.DependencyGraph().build_dependency(small, example, verbose=False)
    except Exception as error:
        raise ValueError(
            f"{network.name} cannot be pruned: its graph cannot be followed ({error}). It must be made of "
            "PyTorch's layers, and run on one image"
        ) from error


def groups_of(graph: torch_pruning.DependencyGraph) -> list[Group]:
    """All groups of filters that may go, in the network's order; the outputs, the classes, stay.

    Raises:
        ValueError: there is none.
    """
    found: list[Group] = []
    for layer in graph.model.modules():
        known = any(layer is member.layer for group in found for member in group.convolutions)
        if isinstance(layer, nn.Conv2d) and layer in graph.module2node and not known:
            found.append(Group(graph, _coupled(graph, layer, list(range(layer.out_channels)))))
    found = [group for group in found if group.consumers]
    if not found:
        raise ValueError(
            f"{graph.model.name} cannot be pruned: it has no convolution whose filters another layer takes"
        )
    return found


def _coupled(
    graph: torch_pruning.DependencyGraph, layer: nn.Module, channels: list[int]
) -> torch_pruning.Group:
    """All that goes when these filters of a convolution go."""
    with _quiet():
        return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, channels)


def filter_count(network: nn.Module) -> int:
    """Filters in all: output channels of every convolution."""
    return sum(layer.out_channels for layer in network.modules() if isinstance(layer, _ConvNd))


# ---- what may go first -----------------------------------------------------------------------------


def taylor(groups: list[Group], images: Tensor, labels: Tensor, batch: int = 128) -> list[Tensor]:
    """First-order Taylor importance of every channel in the groups' network, one tensor a group.

    E_x[ (sum a dL/da)^2 ] with L = -log p(y | x): the sum runs over the channel's pixels and over all that
    the group shuts with it, the mean over images (Molchanov et al., CVPR 2019). It is to first order the
    squared change of the loss of an image when the channel is shut.

    Args:
        images: uint8 or float32 (N, C, H, W).
        labels: y, (N,).
    """
    network = groups[0].network
    device = network.mean.device
    totals = [torch.zeros(group.width, dtype=torch.float64) for group in groups]
    for part, answer in zip(images.split(batch), labels.split(batch), strict=True):
        with torch.enable_grad(), _outputs(groups) as outputs:
            loss = F.cross_entropy(network(to_float(part, device)), answer.to(device), reduction="sum")
        wanted = list(outputs.values())
        slopes = torch.autograd.grad(loss, wanted)
        change = {
            layer: (value.detach() * slope).flatten(2).sum(2)
            for layer, value, slope in zip(outputs, wanted, slopes, strict=True)
        }
        for total, group in zip(totals, groups, strict=True):
            shut = change[group.gates[0].layer].new_zeros(len(part), group.width)
            for gate in group.gates:
                shut.index_add_(1, gate.root.to(device), change[gate.layer][:, gate.own.to(device)])
            total += shut.double().square().sum(0).cpu()
    return [(total / len(images)).float() for total in totals]


def drawn_answers(network: Classifier, images: Tensor, generator: torch.Generator) -> Tensor:
    """A class for every image, drawn from the network's own probabilities.

    KL( p_T || p_S ) is the mean of -log p_S(y) over y drawn from p_T, up to a constant: with these in the
    place of labels, `taylor` measures the divergence from the original network. (Its plain gradient would
    be of no use: it is zero while both networks are equal.)
    """
    return torch.multinomial(predict(network, images).softmax(1).cpu(), 1, generator=generator)[:, 0]


@contextmanager
def _outputs(groups: list[Group]) -> Iterator[dict[nn.Module, Tensor]]:
    """While open, the outputs of all gates as they are computed."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(layer, inputs, output):
        outputs[layer] = output
        return output.clone()  # an in-place activation may write over it

    layers = dict.fromkeys(gate.layer for group in groups for gate in group.gates)
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


# ---- pruning ---------------------------------------------------------------------------------------


class Unreachable(ValueError):
    """So large a share cannot be removed.

    Attributes:
        most: the share that can.
    """

    def __init__(self, message: str, most: float) -> None:
        super().__init__(message)
        self.most = most


@dataclass
class Pruned:
    """A smaller network, and how it came about.

    Attributes:
        network: frozen.
        removed: [layer, channels] in the order of removal; with the original's structure, the structure.
        history: one record a step: share of filters and of FLOPs left, latency left by the table where
            there is one.
    """

    network: Classifier
    removed: list[tuple[str, list[int]]]
    history: list[dict[str, float]]

    def save(self, path: str | Path) -> Path:
        """Write state and structure as one safetensors file; returns its path."""
        structure = canonical_json({"network": self.network.name, "removed": self.removed})
        write_tensors(Path(path), stored(self.network.state_dict()), structure)
        return Path(path)


def prune(
    network: Classifier,
    images: Tensor,
    *,
    filters: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    importance: str = "kl",
    labels: Tensor | None = None,
    table: LatencyTable | None = None,
    eta: float = 0.0,
    step: float = 0.02,
    keep: float = 0.1,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Pruned:
    """A copy of `network` without its least important filters; the original stays as it is.

    Filters go a few at a time, over all layers at once, and what is left is judged anew in between.

    Args:
        images: uint8 or float32 in [0, 1], (N, C, H, W), on which importance is measured.
        filters, flops, latency: one of them: the share to remove, 0 to below 1; latency by `table`.
        importance: "kl", Taylor on the divergence from the original, no label anywhere; "cross-entropy",
            Taylor on the loss with `labels`; "magnitude" of the weights; "random".
        eta: weight of the latency in I = I_err + eta I_lat (paper, section 4.3), per millisecond. I_lat(s)
            is the latency without the channel less that with it, by `table`: at most zero as a rule, so that
            the time saved is taken off the importance.
        step: share of the original filters that goes before importance is measured again.
        keep: share of its channels that every group keeps, at least one.
        progress: called with the share removed so far.

    Raises:
        Unreachable: the target cannot be reached; a ValueError as well.
        ValueError: no target or several; a network that cannot be followed.
    """
    target, wanted = _target(filters=filters, flops=flops, latency=latency)
    if importance not in IMPORTANCES:
        raise ValueError(f"unknown importance {importance!r}: choose {', '.join(IMPORTANCES)}")
    if importance == "cross-entropy" and labels is None:
        raise ValueError('importance="cross-entropy" wants labels; "kl" does without')
    if table is None and (target == "latency" or eta):
        raise ValueError("latency is measured first: give a table, LatencyTable.measure(network)")
    generator = torch.Generator().manual_seed(seed)
    graph = dependencies(network)
    small = graph.model

    def size() -> dict[str, float]:
        measured = {"filters": float(filter_count(small)), "flops": float(forward_flops(small))}
        return measured | ({"latency": table.of(small)} if table is not None else {})

    whole = size()
    least = {group.name: max(1, math.ceil(keep * group.width)) for group in groups_of(graph)}
    if importance == "kl":
        labels = drawn_answers(network, images, generator)
    left, history = {name: 1.0 for name in whole}, []
    while 1 - left[target] < wanted - 1e-9:
        groups = groups_of(graph)
        if importance in ("kl", "cross-entropy"):
            scores = taylor(groups, images, labels)
        elif importance == "magnitude":
            scores = [group.magnitude() for group in groups]
        else:
            scores = [torch.rand(group.width, generator=generator) for group in groups]
        if eta:
            scores = [
                score - eta * table.saving(small, group) for score, group in zip(scores, groups, strict=True)
            ]
        room = step * whole["filters"]
        if target == "filters":
            room = min(room, wanted * whole["filters"] - (1 - left["filters"]) * whole["filters"])
        chosen = _lowest(groups, scores, least, room)
        if not chosen:
            most = 1 - left[target]
            raise Unreachable(
                f"{target}={wanted:g} cannot be removed from {network.name}: at {most:.2f} every "
                f"layer is down to the share of {keep:g} that it keeps",
                most,
            )
        for group, channels in chosen.items():
            group.remove(channels)
        left = {name: value / whole[name] for name, value in size().items()}
        history.append(left)
        if progress is not None:
            progress(1 - left[target])
    removed = [(name, [int(index) for index in channels]) for name, _, channels in graph.pruning_history()]
    return Pruned(small.freeze(), removed, history)


def restructured(original: Classifier, removed: list[tuple[str, list[int]]]) -> Classifier:
    """A copy of `original` without these channels, as `Pruned.removed` has them: the structure alone.

    Raises:
        ValueError: they are not of this network.
    """
    graph = dependencies(original)
    layers = dict(graph.model.named_modules())
    for name, channels in removed:
        layer = layers.get(name)
        if not isinstance(layer, _ConvNd) or max(channels) >= layer.out_channels:
            raise ValueError(f"{original.name} is not the network that was pruned: look at its layer {name}")
        _coupled(graph, layer, list(channels)).prune()
    return graph.model.freeze()


def load_pruned(path: str | Path, original: Classifier) -> Pruned:
    """Read what `Pruned.save` wrote. `original` lends the structure; its weights do not matter.

    Raises:
        ValueError: the file is of another network.
    """
    state, text = read_tensors(Path(path))
    structure = json.loads(text) if text.startswith("{") else {}
    if "removed" not in structure:
        raise ValueError(f"{path} holds no pruned network")
    if structure["network"] != original.name:
        raise ValueError(f"{path} was {structure['network']} before it was pruned, not {original.name}")
    removed = [(name, channels) for name, channels in structure["removed"]]
    small = restructured(original, removed)
    small.load_state_dict(state)
    return Pruned(small, removed, [])


def _target(**targets: float | None) -> tuple[str, float]:
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"name one target of {', '.join(TARGETS)}, got {', '.join(given) or 'none'}")
    ((name, share),) = given.items()
    if not 0 <= share < 1:
        raise ValueError(f"{name}={share} must be a share from 0 to below 1: something has to be left")
    return name, float(share)


def _lowest(
    groups: list[Group], scores: list[Tensor], least: dict[str, int], room: float
) -> dict[Group, list[int]]:
    """The channels of lowest score over all groups, as long as there is room for their filters."""
    order = torch.cat(scores).argsort(stable=True).tolist()
    owner = [(group, channel) for group in groups for channel in range(group.width)]
    chosen: dict[Group, list[int]] = {}
    for index in order:
        group, channel = owner[index]
        if room <= 0:
            break
        if group.width - len(chosen.get(group, ())) > least[group.name]:
            chosen.setdefault(group, []).append(channel)
            room -= len(group.convolutions)
    return chosen


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning tells of every tensor that is no layer's
        yield
