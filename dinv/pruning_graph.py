"""What depends on what in a network that is to be pruned: which channels go together, and whether they can.

The dependencies are torch-pruning's (Fang et al., CVPR 2023). It follows any graph that autograd leaves,
rightly or wrongly, so nothing is believed before it was tried: `check_prunable`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dinv.models import Classifier, Unfit, inputs_of
from dinv.models.classifier import duplicate
from dinv.preflight import preflight

FROZEN = {"weight", "bias", "running_mean", "running_var"}  # torchvision's and timm's frozen BatchNorm


def frozen_norm(layer: nn.Module) -> bool:
    """Whether this is a BatchNorm whose weights are buffers, too: a class of its own, no `_BatchNorm`."""
    return set(getattr(layer, "_buffers", ())) == FROZEN  # torch-pruning's layers may be bare parameters


class _FrozenPruner:
    """For torch-pruning, which does not know these layers: every buffer loses the channels."""

    def prune_out_channels(self, layer: nn.Module, channels: list[int]) -> nn.Module:
        kept = sorted(set(range(len(layer.running_mean))) - set(channels))
        for name in FROZEN:
            setattr(layer, name, getattr(layer, name)[kept])
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        return len(layer.running_mean)

    prune_in_channels, get_in_channels = prune_out_channels, get_out_channels


class Group:
    """`width` channels that only go together, such as those on both sides of an addition.

    Attributes:
        makers, consumers: names of the convolutions whose filters they are, and of the layers that take them.
        gates: where a channel shuts when it goes: the BatchNorms, or the convolutions where there are none.
            A gate is a layer, its channels, and the group's channels that they go with.
        units: what can go: single channels, or where a convolution or a norm has groups of them, as many from
            each; none, if that cannot be.
    """

    def __init__(self, graph: Any, root: nn.Conv2d) -> None:
        remove = graph.get_pruner_of_module(root).prune_out_channels
        self.network, self.width = graph.model, root.out_channels
        self._dependencies = graph.get_pruning_group(root, remove, list(range(self.width)))
        self.makers, self.consumers, convolutions, norms = [], set(), [], []
        self.inputs, self.mixes, divided = [], False, []
        for item in self._dependencies:
            layer, name = item.dep.target.module, graph._module2name.get(item.dep.target.module, "")
            own, channels = (torch.tensor(idxs, device="cpu") for idxs in (item.idxs, item.root_idxs))
            gate, parts = (layer, own, channels), 1
            self.mixes |= isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.MultiheadAttention)
            if isinstance(layer, nn.GroupNorm):
                count, parts = layer.num_channels, layer.num_groups
            if not graph.is_out_channel_pruning_fn(item.dep.handler):
                if isinstance(layer, (_ConvNd, nn.Linear)):
                    self.consumers.add(name)
                    self.inputs.append(gate)
                if isinstance(layer, _ConvNd):
                    count, parts = layer.in_channels, layer.groups
            elif isinstance(layer, _ConvNd):
                self.makers.append(name)
                convolutions.append(gate)
                if layer.groups < layer.out_channels:  # a depthwise layer loses groups instead
                    count, parts = layer.out_channels, layer.groups
            elif isinstance(layer, _BatchNorm) or frozen_norm(layer):
                norms.append(gate)
            if parts > 1:
                divided.append((item, count, parts))
        self.gates, self.makers_and_norms = norms or convolutions, norms + convolutions
        self.units = self._units(divided)

    def _units(self, divided: list[tuple[Any, int, int]]) -> list[list[int]]:
        units = {channel: {channel} for channel in range(self.width)}
        for item, count, parts in divided:
            if sorted(item.idxs) != list(range(count)):
                return []  # only some of its groups would get smaller
            first: dict[int, int] = {}
            for own, channel in zip(item.idxs, item.root_idxs, strict=True):
                unit = units[channel] | units[first.setdefault(own % (count // parts), channel)]
                units.update(dict.fromkeys(unit, unit))
        found = sorted({min(unit): sorted(unit) for unit in units.values()}.values())
        return found if len({len(unit) for unit in found}) == 1 else []

    def magnitude(self) -> Tensor:
        """Norm of all weights of a channel, over the group's mean; float32 (width,)."""
        import torch_pruning

        if len(self.units) == 1:
            return torch.zeros(self.width, device="cpu")  # they stay, and torch-pruning may not know them
        score = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="sum")
        return score(self._dependencies).detach().float().cpu()

    def remove(self, channels: list[int]) -> None:
        """Take these channels out of every layer that has them."""
        self._dependencies.prune(channels, record_history=False)  # the smaller group records itself


def dependencies(network: Classifier) -> Any:
    """The graph of what depends on what in a copy of `network`, its `model`; what is pruned is the copy."""
    import torch_pruning  # with timm: seconds, which only pruning has to spend

    with refused(network, "its graph cannot be followed: it must consist of PyTorch's layers"):
        small = duplicate(network, preflight(network).hooks).eval()
        small.requires_grad_(True)  # the graph is traced through its gradients
        example = small.mean.new_zeros(1, *small.shape)
        pruners = {type(layer): _FrozenPruner() for layer in small.modules() if frozen_norm(layer)}
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every tensor that is no layer's
            graph = torch_pruning.DependencyGraph()
            return graph.build_dependency(small, example, customized_pruners=pruners, verbose=False)


@contextmanager
def refused(network: Classifier, reason: str) -> Iterator[None]:
    """Any error inside becomes a ValueError: `network` cannot be pruned, the reason, the layer, the error."""
    try:
        yield
    except Unfit:
        raise
    except Exception as error:
        names, frame, where = {id(m): n for n, m in network.named_modules()}, error.__traceback__, ""
        while frame:  # the innermost layer that was being called
            where = names.get(id(frame.tb_frame.f_locals.get("self")), where)
            frame = frame.tb_next
        if shape := re.match(r"shape '\[(.*)\]' is invalid for", str(error)):
            said = f"{where or 'it'} reshapes to {shape[1]}, written out"
        else:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            said = f"in {where}: {text}" if where else text
        raise ValueError(f"{network.name} cannot be pruned: {reason} ({said})") from error


@torch.no_grad()
def try_forward(network: Classifier) -> None:
    """A ValueError that names the layer unless a pruned network takes one image, of zeros."""
    with refused(network, "with fewer filters its layers do not fit"):
        logits = network(network.mean.new_zeros(1, *network.shape))
        if logits.shape != (1, len(network.classes)):
            raise ValueError(f"one image gives an output of shape {tuple(logits.shape)}")


def check_prunable(network: Classifier) -> None:
    """Refuse a network that is followed wrongly, before minutes are spent: one unit of every group is tried.

    Raises:
        ValueError: it does not run without them; or a layer would lose other inputs than those that are shut.
    """
    graph = dependencies(network)
    groups = [group for group in filter_groups(graph) if len(group.units) > 1]
    with refused(graph.model, "its layers do not belong together as they seem to"):
        wrong = _wrong_input(graph.model, [group for group in groups if not group.mixes])
        for group in groups:
            group.remove(group.units[0])
    if wrong:
        reason = f"its channels are split, reshaped or shuffled before {wrong}"
        raise ValueError(f"{network.name} cannot be pruned: {reason}")
    try_forward(graph.model)


@torch.no_grad()
def _wrong_input(network: Classifier, groups: list[Group]) -> str:
    """The first layer that would lose other inputs than those that a group's first unit gives it, if any.

    Where that unit is shut they must be the same for two images. (A norm over channels mixes them all.)
    """
    images = torch.rand(2, *network.shape, generator=torch.Generator())
    shut: dict[nn.Module, list[Tensor]] = {}
    for group in groups:
        for layer, own, channels in group.makers_and_norms:
            shut.setdefault(layer, []).append(own[torch.isin(channels, torch.tensor(group.units[0]))])

    def close(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.cat(shut[layer]).to(output.device), 0.0)

    with ExitStack() as hooks:
        for layer in shut:
            hooks.enter_context(layer.register_forward_hook(close))
        seen = {layer: hooks.enter_context(inputs_of(layer)) for g in groups for layer, _, _ in g.inputs}
        network(images.to(network.mean))
    for group in groups:
        for layer, own, channels in group.inputs:
            lost = own[torch.isin(channels, torch.tensor(group.units[0]))]
            for x in seen[layer]:
                given = x.index_select(x.dim() - 1 if isinstance(layer, nn.Linear) else 1, lost.to(x.device))
                if lost.numel() and given.diff(dim=0).abs().max() > 1e-3 * x.abs().max():
                    return name_of(network, layer)
    return ""


def name_of(network: nn.Module, layer: nn.Module) -> str:
    return next(name for name, other in network.named_modules() if other is layer)


def filter_groups(graph: Any) -> list[Group]:
    """All groups of filters that may go, in the network's order; those of the outputs, the classes, stay."""
    groups, grouped = [], set()
    for name, layer in graph.model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer in graph.module2node and name not in grouped:
            groups.append(Group(graph, layer))
            grouped.update(groups[-1].makers)
    if not any(group.consumers for group in groups):
        reason = "it has no convolution whose filters another layer takes"
        raise ValueError(f"{graph.model.name} cannot be pruned: {reason}")
    return [group for group in groups if group.consumers and group.units]


def filter_count(network: nn.Module) -> int:
    """Filters in all: output channels of every convolution."""
    return sum(layer.out_channels for layer in network.modules() if isinstance(layer, _ConvNd))
