"""How long a network takes, measured: whole networks beside each other, layers by their width."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dinv.models import Classifier, inputs_of

if TYPE_CHECKING:
    from dinv.pruning import Group

VERSION = 2  # part of a measured table's key: raise it when a table holds something else
CALLS = 20  # in one CUDA graph
WIDTHS = (0.25, 0.5, 0.75, 1.0)  # shares of its channels at which a layer is measured


def batch_of(device: torch.device) -> int:
    """Images that latency is taken of. With few of them a card is done with any layer equally soon."""
    return 1024 if device.type == "cuda" else 64


def interleaved(
    calls: Sequence[Callable[[], object]], repeats: int, device: torch.device | None = None
) -> Tensor:
    """Seconds of every call, float64 (repeats, calls), taken in turn so that a slow moment hits them all.

    On a card they are taken as `_captured` says: a call must be work of fixed shapes for it alone.
    """
    cuda = device is not None and device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext():
        timers = _captured(calls) if cuda else [partial(_clocked, call) for call in calls]
        for timer in timers:
            timer()  # memory, kernels
        rows = [[timer() for timer in timers] for _ in range(repeats)]
    return torch.tensor(rows, dtype=torch.float64).view(repeats, len(calls))


def _clocked(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _captured(calls: Sequence[Callable[[], object]]) -> list[Callable[[], float]]:
    """What gives the seconds of every call on a card: `CALLS` of them as one CUDA graph, by the card's clock.

    Launched one by one, calls as short as a layer's last as long as their launch, at any width.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    timers = []
    for call in calls:
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels, which cannot be captured
                call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):  # all in the same memory: none is read
            for _ in range(CALLS):
                call()
        timers.append(partial(_replayed, graph))
    return timers


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / CALLS


@torch.no_grad()
def latencies(networks: Sequence[Classifier], batch: int | None = None, repeats: int = 15) -> Tensor:
    """Seconds a batch takes through every network, float64 (repeats, networks); take medians of ratios.

    Args:
        batch: images; by default `batch_of` the device.
    """
    device = networks[0].mean.device
    batch = batch or batch_of(device)
    calls = []
    for network in networks:
        network = copy.deepcopy(network).freeze().to(memory_format=torch.channels_last)
        images = torch.rand(batch, network.channels, network.size, network.size, device=device)
        calls.append(_Call(network, images.contiguous(memory_format=torch.channels_last)))
    return interleaved(calls, repeats, device)


def above(line: Sequence[tuple[float, float]], points: Sequence[tuple[float, float]]) -> list[float]:
    """By how much points (time, accuracy) lie above a line through others, at their own time.

    Args:
        line: points in any order; between two neighbours in time the line is straight.
        points: those outside the line's times are left out.
    """
    times, heights = zip(*sorted(line), strict=True)
    within = [(time, height) for time, height in points if times[0] <= time <= times[-1]]
    return [height - float(np.interp(time, times, heights)) for time, height in within]


@dataclass(frozen=True)
class Layer:
    """Measured latencies of a convolution with its BatchNorm and activation.

    Attributes:
        inputs, outputs: channels of the whole layer.
        milliseconds: by share of inputs, then of outputs, at `WIDTHS`.
    """

    inputs: int
    outputs: int
    milliseconds: tuple[tuple[float, ...], ...]

    def at(self, inputs: float, outputs: float) -> float:
        """Milliseconds at these widths, by linear interpolation; below the smallest, as at the smallest."""
        row, share = _place(inputs / self.inputs)
        column, part = _place(outputs / self.outputs)
        pair = self.milliseconds[row : row + 2]
        across = [line[column] * (1 - part) + line[column + 1] * part for line in pair]
        return across[0] * (1 - share) + across[1] * share


@dataclass(frozen=True)
class LatencyTable:
    """What every convolution of a network costs on this device, as its width changes.

    Attributes:
        layers: by name.
        batch: images that take so many milliseconds.
    """

    layers: dict[str, Layer]
    batch: int = 64

    @classmethod
    @torch.no_grad()
    def measure(cls, network: Classifier, batch: int | None = None, repeats: int = 7) -> LatencyTable:
        """Measure `network`, layer by layer, in float32. A table holds for this device and this batch.

        Args:
            batch: images; by default `batch_of` the device.
        """
        convolutions = {
            name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)
        }
        device = network.mean.device
        batch = batch or batch_of(device)
        with ExitStack() as stack:
            seen = {name: stack.enter_context(inputs_of(layer)) for name, layer in convolutions.items()}
            network(torch.zeros(1, network.channels, network.size, network.size, device=device))
        layers = {}
        for name, layer in convolutions.items():
            fixed = 1 < layer.groups == layer.in_channels or name == next(iter(convolutions))
            sides = (1.0,) if fixed else WIDTHS  # of a depthwise layer's inputs there are as many as outputs
            units = [(side, out) for side in sides for out in WIDTHS]
            calls = [_unit(layer, seen[name][0].shape, batch, *unit, device) for unit in units]
            medians = (1e3 * interleaved(calls, repeats, device).median(0).values).view(len(sides), -1)
            cells = tuple(tuple(row) for row in medians.expand(len(WIDTHS), -1).tolist())
            layers[name] = Layer(layer.in_channels, layer.out_channels, cells)
        return cls(layers, batch)

    def of(self, network: nn.Module) -> float:
        """Milliseconds of `network`, the measured one with fewer channels: the sum over its convolutions."""
        return sum(
            self.layers[name].at(layer.in_channels, layer.out_channels)
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Conv2d)
        )

    def saving(self, network: nn.Module, group: Group) -> float:
        """Milliseconds saved by one channel less of `group`, those that it feeds included."""
        makers = {member.name for member in group.convolutions}
        saved = 0.0
        for name, layer in network.named_modules():
            if not isinstance(layer, nn.Conv2d) or not (name in makers or name in group.consumers):
                continue
            inputs, outputs = layer.in_channels, layer.out_channels
            fewer = inputs - (name in group.consumers), outputs - (name in makers)
            saved += self.layers[name].at(inputs, outputs) - self.layers[name].at(*fewer)
        return saved

    def config(self) -> dict[str, dict]:
        """The layers in plain words and numbers."""
        return {name: asdict(layer) for name, layer in self.layers.items()}


class _Call:
    def __init__(self, module: nn.Module, images: Tensor) -> None:
        self.module, self.images = module, images

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.module(self.images)


def _unit(
    layer: nn.Conv2d, shape: torch.Size, batch: int, side: float, out: float, device: torch.device
) -> _Call:
    """A convolution like `layer` at these shares of its width, with BatchNorm and activation."""
    outputs = max(1, round(out * layer.out_channels))
    inputs = max(1, round(side * layer.in_channels))
    groups = 1
    if layer.groups > 1:  # what is left of the groups, each as wide as before
        groups = max(1, round(out * layer.groups))
        inputs, outputs = (
            groups * (width // layer.groups) for width in (layer.in_channels, layer.out_channels)
        )
    unit = nn.Sequential(
        nn.Conv2d(
            inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups,
            bias=layer.bias is not None,
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )  # fmt: skip
    unit = unit.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    images = torch.rand(batch, inputs, *shape[2:], device=device)
    return _Call(unit, images.contiguous(memory_format=torch.channels_last))


def _place(share: float) -> tuple[int, float]:
    """The measured width below `share`, by its number, and how far towards the next one."""
    share = min(max(share, WIDTHS[0]), WIDTHS[-1])
    index = min(sum(width <= share for width in WIDTHS) - 1, len(WIDTHS) - 2)
    return index, (share - WIDTHS[index]) / (WIDTHS[index + 1] - WIDTHS[index])
