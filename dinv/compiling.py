"""When to compile, what to do where that fails; and CUDA graphs, which spare a card the wait for Python."""

from __future__ import annotations

import inspect
import logging
import math
import os
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinv.models.classifier import Classifier, Size, sides
from dinv.preflight import private

# Compiling costs 20 to 60 s per size on a CPU and saves about half of an eager step, which runs at some
# 60 GFLOP/s on two cores. A rule of arithmetic, not of measured time: equal calls take equal paths.
WORTH_COMPILING = 6e12
# On an H200 ResNet-34's step of 256 images takes 21.5 ms recorded and 6.6 ms recorded and compiled, and
# compiling 42 s per size: 3,000 steps of 1.2e12 operations.
WORTH_COMPILING_CUDA = 4e15

# Dynamo counts compilations by code object and after eight goes on without compiling, silently; one process
# compiles the same method for many objectives and batch sizes.
RECOMPILE_LIMIT = 64


class Compiled:
    """A method of tensors, compiled where that works; where it does not, the method itself, and a warning.

    Every new shape is tried first, backward as well, as that half is compiled when it is first asked for. The
    trial leaves nothing behind in the buffers of `network`, in gradients or in random numbers.

    Attributes:
        on: whether the method is compiled; False from the beginning leaves it as it is.
        seconds: spent compiling so far, that is in the trials.
    """

    def __init__(self, method: MethodType, network: nn.Module, on: bool = True) -> None:
        self.method, self.network, self.on, self.seconds = method, network, on, 0.0
        self._compiled = _compile(method) if on else None
        self._tried: set[tuple[torch.Size, ...]] = set()

    def __call__(self, *inputs: Tensor) -> Any:
        if not self.on:
            return self.method(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._tried:
            began = time.perf_counter()
            reason = self._failure(inputs)
            self.seconds += time.perf_counter() - began
            if reason:
                outputs = self.method(*inputs)  # what fails here as well is not the compiler's fault
                warnings.warn(f"going on without compilation: {reason}", RuntimeWarning, stacklevel=4)
                self.on = False
                return outputs
            self._tried.add(shapes)
        return self._compiled(*inputs)

    def _failure(self, inputs: tuple[Tensor, ...]) -> str:
        """Why these inputs cannot be compiled for, forward and backward; empty where they can."""
        leaves = [leaf for leaf in (*inputs, *self.network.parameters()) if leaf.requires_grad]
        try:
            devices = [x.device for x in inputs[:1] if x.is_cuda]
            with torch.random.fork_rng(devices), unchanged(self.network.buffers()):
                outputs = self._compiled(*inputs)
                outputs = [outputs] if isinstance(outputs, Tensor) else outputs
                outputs = [output for output in outputs if output.requires_grad]
                if outputs:
                    ones = [torch.ones_like(output) for output in outputs]
                    torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
        except Exception as error:  # of Dynamo, of Triton, of the C compiler: of any class
            text = str(error).strip() or type(error).__name__
            return " ".join(text.split("\n\n")[0].split())[:300]
        return ""


class Recorded:
    """A function of tensors, on a card recorded once for each shape of its inputs and then replayed.

    A network of a hundred layers is a thousand kernels, and Python takes longer to launch them than a card to
    run them; a CUDA graph launches all with one call. On a CPU, the function itself.

    What a replay returns is overwritten by the next one. The function must find what it reads besides its
    inputs (weights, buffers) at the same place every time, and draw no random numbers. One that cannot be
    recorded is called as it is from then on, after a warning.

    Args:
        kept: the tensors that the function changes. The warm-up that a recording needs leaves them as before.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor | None, ...]], kept: Callable[[], Iterable[Tensor]]
    ) -> None:
        self.function, self.kept, self.on = function, kept, True
        self._recordings: dict[tuple[torch.Size, ...], tuple] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        if not (self.on and inputs[0].is_cuda):
            return self.function(*inputs)
        with torch.cuda.device_of(inputs[0]):  # streams and recordings belong to the current card
            return self._replayed(inputs)

    def _replayed(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._recordings:
            try:
                self._recordings[shapes] = self._record(inputs)
            except Exception as error:  # of a network that asks the card for a number, say
                results = self.function(*inputs)  # what fails here as well is not the recording's fault
                reason = " ".join(str(error).split())[:300]
                warnings.warn(f"going on without a CUDA graph: {reason}", RuntimeWarning, stacklevel=5)
                self.on = False
                return results
        own, graph, outputs = self._recordings[shapes]
        torch._foreach_copy_(own, inputs)  # one launch for all of a type
        graph.replay()
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple:
        own, graph = [tensor.detach().clone() for tensor in inputs], torch.cuda.CUDAGraph()
        side, now = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(now)
        with torch.cuda.stream(side), unchanged(self.kept()):
            for _ in range(2):  # libraries prepare themselves at the first call, and must not while recording
                self.function(*own)
        now.wait_stream(side)
        with torch.cuda.graph(graph):
            outputs = self.function(*own)
        return own, graph, outputs


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While open, these tensors may change; afterwards they are as they were."""
    pairs = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in pairs:
                tensor.copy_(before)


def _compile(method: MethodType) -> Any:
    """`method` compiled for the shapes it is first called with, apart from all others of its code."""
    if not torch.cuda.is_available():  # compiling warns where CUDA's tools are installed without a device
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return torch.compile(method, dynamic=False, isolate_recompiles=True, recompile_limit=RECOMPILE_LIMIT)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # an older torch has one limit for all
    return torch.compile(method, dynamic=False)


def compiler_available(device: torch.device) -> bool:
    """Whether anything can be compiled for `device`; for CUDA a warning names, once, what is missing."""
    if device.type != "cuda":
        names = (os.environ.get("CXX"), "g++", "clang++", "c++")  # for Inductor
        return any(name and shutil.which(name) for name in names)
    missing, cc = [], os.environ.get("CC")
    if not any(shutil.which(name) for name in ([cc] if cc else ["gcc", "clang"])):
        missing.append(f"CC={cc} is no program" if cc else "neither gcc nor clang is there")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if not header.is_file():
        missing.append(f"{header} is not there (install python3-dev)")
    if missing:
        _warn_once(
            "going on without compilation: for CUDA it needs a C compiler and Python's headers, but "
            + ", and ".join(missing)
        )
    return not missing


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def compiling_pays(teacher: Classifier, plan: Sequence[tuple[int, Size]], images: int, reads: bool) -> bool:
    """Whether inverting `images` images is work enough to compile for; `reads`: it reads statistics.

    Compiling makes the reading of statistics cheap, and little else: on a CPU a step that reads none is
    as fast without, or up to twice as fast (benchmarks/compiling.py).
    """
    worth = WORTH_COMPILING_CUDA if teacher.mean.is_cuda else WORTH_COMPILING
    return reads and images * inversion_flops(teacher, plan) > worth


def inversion_flops(teacher: Classifier, plan: Sequence[tuple[int, Size]]) -> float:
    """Floating-point operations to invert one image: forward, and the same again for the gradient."""
    area = sum(steps * math.prod(sides(size)) for steps, size in plan) / math.prod(sides(teacher.size))
    return 2.0 * forward_flops(teacher) * area


def distillation_flops(teacher: Classifier, student: Classifier) -> float:
    """Floating-point operations of one image in an update: forward through both, twice the student back."""
    return float(forward_flops(teacher) + 3 * forward_flops(student))


def forward_flops(network: Classifier) -> int:
    """Floating-point operations of one image's way through `network`; a backward pass costs as many again."""
    own = private(network).freeze()
    return counted_flops(own, own.mean.new_zeros(1, *own.shape))


@torch.no_grad()
def counted_flops(module: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of `module(*inputs)`, by PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()
