"""How long a network takes, measured: whole networks beside each other, layers by their width."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from timeit import timeit

import numpy as np
import torch
from scipy.interpolate import interpn
from torch import Tensor, nn

from dinv.models import Classifier, inputs_of
from dinv.preflight import private

CALLS = 20  # in one CUDA graph
WIDTHS = (0.25, 0.5, 0.75, 1.0)  # shares of its channels at which a layer is measured


def batch_of(device: torch.device) -> int:
    """Images in a timed batch. With few of them a GPU takes equally long for a layer of any width."""
    return 1024 if device.type == "cuda" else 64


def interleaved(
    calls: Sequence[Callable[[], object]], repeats: int, device: torch.device | None = None
) -> Tensor:
    """Seconds of every call, float64 (repeats, calls), taken in turn so that a slow moment hits them all.

    On CUDA each call is captured as a graph (see `_captured`): it must be GPU work of fixed shapes.
    """
    cuda = device is not None and device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext():
        timers = _captured(calls) if cuda else [partial(timeit, call, number=1) for call in calls]
        for timer in timers:
            timer()  # memory, kernels
        rows = [[timer() for timer in timers] for _ in range(repeats)]
    return torch.tensor(rows, dtype=torch.float64).view(repeats, len(calls))


def _captured(calls: Sequence[Callable[[], object]]) -> list[Callable[[], float]]:
    """Timers of the calls on CUDA: each replays `CALLS` of them as one graph, timed by the GPU's clock.

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
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def _forward(module: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: module(images))


@torch.no_grad()
def latencies(networks: Sequence[Classifier], batch_size: int | None = None, repeats: int = 15) -> Tensor:
    """Seconds per batch of every network, float64 (repeats, networks); compare by medians of ratios."""
    device = networks[0].mean.device
    count = batch_size or batch_of(device)
    calls = []
    for network in networks:
        network = private(network).freeze()
        images = _noise(count, *network.shape, device=device)
        calls.append(_forward(network, images))
    return interleaved(calls, repeats, device)


def above(line: Sequence[tuple[float, float]], points: Sequence[tuple[float, float]]) -> list[float]:
    """How far points (time, accuracy) lie above the straight segments through `line`, at their own time.

    The order of `line` does not matter; points outside its times are left out.
    """
    times, heights = zip(*sorted(line), strict=True)
    within = [(time, height) for time, height in points if times[0] <= time <= times[-1]]
    return [height - float(np.interp(time, times, heights)) for time, height in within]


@dataclass(frozen=True)
class Layer:
    """Measured latencies of a convolution with its BatchNorm and activation.

    Attributes:
        inputs, outputs: channels at full width.
        milliseconds: by share of inputs, then of outputs, at `WIDTHS`.
    """

    inputs: int
    outputs: int
    milliseconds: tuple[tuple[float, ...], ...]

    def at(self, inputs: float, outputs: float) -> float:
        """Milliseconds at these widths, by linear interpolation; below the smallest, as at the smallest."""
        shares = np.clip((inputs / self.inputs, outputs / self.outputs), WIDTHS[0], WIDTHS[-1])
        return float(interpn((WIDTHS, WIDTHS), np.asarray(self.milliseconds), shares)[0])


@dataclass(frozen=True)
class LatencyTable:
    """What every convolution of a network costs on this device, by its width (paper, section 4.3).

    Attributes:
        layers: by name.
        batch_size: images that take so many milliseconds.
    """

    layers: dict[str, Layer]
    batch_size: int = 64

    @classmethod
    @torch.no_grad()
    def measure(cls, network: Classifier, batch_size: int | None = None, repeats: int = 7) -> LatencyTable:
        """Measure `network`, layer by layer, in float32. It holds for this device and batch size."""
        network = private(network).freeze()
        convolutions, device = _convolutions(network), network.mean.device
        count = batch_size or batch_of(device)
        with ExitStack() as stack:
            inputs = {name: stack.enter_context(inputs_of(layer)) for name, layer in convolutions.items()}
            network(torch.zeros(1, *network.shape, device=device))
        layers = {}
        for name, layer in convolutions.items():
            if not inputs[name]:
                continue  # of a head that only training uses
            fixed = 1 < layer.groups == layer.in_channels or name == next(iter(convolutions))
            sides = (1.0,) if fixed else WIDTHS  # a depthwise layer has as many inputs as outputs
            units = [(side, out) for side in sides for out in WIDTHS]
            calls = [_unit(layer, inputs[name][0].shape, count, *unit, device) for unit in units]
            medians = (1e3 * interleaved(calls, repeats, device).median(0).values).view(len(sides), -1)
            cells = tuple(tuple(row) for row in medians.expand(len(WIDTHS), -1).tolist())
            layers[name] = Layer(layer.in_channels, layer.out_channels, cells)
        return cls(layers, count)

    def of(self, network: nn.Module) -> float:
        """Milliseconds of `network`, the measured one with fewer channels: the sum over its convolutions."""
        named = [(name, layer) for name, layer in _convolutions(network).items() if name in self.layers]
        return sum(self.layers[name].at(layer.in_channels, layer.out_channels) for name, layer in named)

    def saving(self, network: nn.Module, makers: Collection[str], consumers: Collection[str]) -> float:
        """Milliseconds saved when the layers named `makers` lose an output and `consumers` an input.

        Only convolutions count.
        """
        saved = 0.0
        for name, layer in _convolutions(network).items():
            if name in makers or name in consumers:
                inputs, outputs = layer.in_channels, layer.out_channels
                fewer = inputs - (name in consumers), outputs - (name in makers)
                saved += self.layers[name].at(inputs, outputs) - self.layers[name].at(*fewer)
        return saved


def _convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}


def _unit(
    layer: nn.Conv2d, shape: torch.Size, count: int, side: float, out: float, device: torch.device
) -> Callable[[], Tensor]:
    """A call of a convolution like `layer` at these shares of its width, with BatchNorm and activation."""
    outputs = max(1, round(out * layer.out_channels))
    inputs = max(1, round(side * layer.in_channels))
    groups = 1
    if layer.groups > 1:  # fewer groups, each as wide as before
        groups = max(1, round(out * layer.groups))
        inputs = groups * (layer.in_channels // layer.groups)
        outputs = groups * (layer.out_channels // layer.groups)
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    with torch.random.fork_rng(devices=[]):
        convolution = nn.Conv2d(inputs, outputs, *window, groups, bias=layer.bias is not None)
    unit = nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
    unit = unit.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return _forward(unit, _noise(count, inputs, *shape[2:], device=device))


def _noise(*shape: int, device: torch.device) -> Tensor:
    """Images to be timed; the user's own random numbers stay as they are."""
    return torch.rand(shape, device=device, generator=torch.Generator(device))
