"""One step of inversion: terms and gradient, from a frozen private copy of the teacher, compiled."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinv.features import moments, watch
from dinv.models import Classifier, autocast, structure
from dinv.objectives import Objective, Term, View

if TYPE_CHECKING:
    from dinv.inversion import InversionSettings

# Compiling costs 20 to 60 s a size on a CPU and saves about half of an eager step, which runs at some
# 60 GFLOP/s on two cores. A rule of arithmetic, not of measured time: equal calls take equal paths.
WORTH_COMPILING = 6e12


class Step:
    """`step(pixels, labels, weights) -> (terms, gradient)` for one teacher and one set of terms.

    The teacher is copied once. `refresh` takes over its present weights, so that a step compiled for a
    network serves it again after more training.
    """

    def __init__(self, teacher: Classifier, objective: Objective, compiled: bool) -> None:
        self.teacher = copy.deepcopy(teacher).freeze().to(memory_format=torch.channels_last)
        self.features: dict[str, Tensor] = {}
        self.objective = objective
        self.weights = objective.weights
        watch(self.teacher, objective.layers(), self.features)
        self._terms = Compiled(self._forward, self.teacher, compiled)

    @property
    def compiled(self) -> bool:
        return self._terms.on

    @property
    def names(self) -> tuple[str, ...]:
        return self.objective.names

    def refresh(self, teacher: Classifier, objective: Objective) -> Step:
        """Take over the weights of `teacher` and the weights and tensors of `objective`."""
        self.teacher.load_state_dict(teacher.state_dict())
        for old, new in zip(self.objective.tensors(), objective.tensors(), strict=True):
            old.copy_(new)
        self.weights = objective.weights
        return self

    def _forward(
        self, pixels: Tensor, labels: Tensor, weights: Tensor, share: Tensor | None = None, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        terms = self.objective.terms(self._view(pixels, labels, share, *rest))
        # Left in the dictionary, the features would be results of the compiled graph, each with a gradient
        # of zeros to be made and copied: a fifth of a step.
        self.features.clear()
        return terms @ weights, terms

    def _view(self, pixels: Tensor, labels: Tensor, share: Tensor | None = None, *rest: Tensor) -> View:
        teacher = self.teacher
        with autocast(pixels.device):
            logits = teacher.net(pixels)
        images = pixels * teacher.std + teacher.mean
        if share is None:
            return View(pixels, labels, logits, self.features, images)
        triples = zip(rest[0::3], rest[1::3], rest[2::3], strict=True)
        others = dict(zip(self.objective.layers(), triples, strict=True))
        return View(pixels, labels, logits, self.features, images, share, others)

    def __call__(
        self, pixels: Tensor, labels: Tensor, weights: Tensor, share: Tensor | None = None, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Terms and gradient; of a part of a batch with its share and, for every layer, `View.rest`."""
        pixels = pixels.detach().requires_grad_(True)
        total, terms = self._terms(pixels, labels, weights, *(() if share is None else (share, *rest)))
        (gradient,) = torch.autograd.grad(total, pixels)
        return terms.detach(), gradient

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance per channel of every watched layer."""
        with autocast(pixels.device):
            self.teacher.net(pixels)
        found = [moments(self.features[name]) for name in self.objective.layers()]
        self.features.clear()
        return found

    def culprit(self, pixels: Tensor, labels: Tensor) -> str:
        """The first term whose gradient at `pixels` is not finite, or "the objective" itself."""
        for name, (_, term) in zip(self.names, self.objective.parts, strict=True):
            point = pixels.detach().requires_grad_(True)
            value = term(self._view(point, labels))
            (gradient,) = torch.autograd.grad(value, point, materialize_grads=True)
            self.features.clear()
            if not gradient.isfinite().all():
                return name
        return "the objective"


class PartsStep:
    """A step over a batch that is taken a few images at a time: their memory, the statistics of all.

    A first pass, without gradients, measures each part's moments. In the second a part's gradient is that
    of the whole batch's objective of which only the part moves, so that together they are the gradient.
    """

    def __init__(self, step: Step, size: int) -> None:
        self.step, self.size = step, size
        self.names, self.weights, self.compiled = step.names, step.weights, step.compiled

    def __call__(self, pixels: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        parts = pixels.split(self.size)
        shares = weights.new_tensor([len(part) / len(pixels) for part in parts])
        layers = []  # of each the centre, and for every part what the others add to the moments about it
        for found in zip(*(self.step.moments(part) for part in parts), strict=True):
            means, variances = (torch.stack(part) for part in zip(*found, strict=True))
            centre = shares @ means
            firsts = shares[:, None] * (means - centre)  # their sum is zero
            seconds = shares[:, None] * (variances + (means - centre) ** 2)
            layers.append((centre, -firsts, seconds.sum(0) - seconds))
        whole = torch.tensor([term.whole for _, term in self.step.objective.parts], device=pixels.device)
        total, gradients = torch.zeros_like(weights), []
        for index, (part, wanted) in enumerate(zip(parts, labels.split(self.size), strict=True)):
            share = shares[index]
            rest = [x for centre, first, second in layers for x in (centre, first[index], second[index])]
            scaled = torch.where(whole, weights, share * weights)
            terms, gradient = self.step(part, wanted, scaled, share, *rest)
            total += share * terms
            gradients.append(gradient)
        self.compiled = self.step.compiled
        return total, torch.cat(gradients)

    def culprit(self, pixels: Tensor, labels: Tensor) -> str:
        """The first term whose gradient is not finite on some part, or "the objective" itself."""
        for part in zip(pixels.split(self.size), labels.split(self.size), strict=True):
            name = self.step.culprit(*part)
            if name != "the objective":
                return name
        return "the objective"


_steps: WeakKeyDictionary[Classifier, dict[tuple, Step]] = WeakKeyDictionary()


def inversion_step(
    teacher: Classifier, objective: Objective, settings: InversionSettings, batch: int, at_once: int = 0
) -> Step | PartsStep:
    """The step for this teacher and objective: a compiled one is made once and used again.

    It serves every network of the same `structure` as long as one of them lives.

    Args:
        at_once: images that go through the network together; 0 is the whole batch.
    """
    if 0 < at_once < batch:
        return PartsStep(inversion_step(teacher, objective, settings, at_once), at_once)
    objective = objective.bind(teacher)
    pays = settings.compile == "always" or (
        settings.compile == "auto" and compiling_pays(teacher, objective, settings, batch)
    )
    if not (pays and compiler_available(teacher.mean.device)):
        return Step(teacher, objective, compiled=False)
    steps = _steps.setdefault(teacher, {})
    sizes = tuple(size for _, size in settings.plan(teacher.size))
    key = (batch, sizes, teacher.mean.device, objective.signature(), structure(teacher))
    if key not in steps:
        alike = (others[key] for others in _steps.values() if key in others)
        steps[key] = next(alike, None) or Step(teacher, objective, compiled=True)
    return steps[key].refresh(teacher, objective)


def compiling_pays(
    teacher: Classifier, objective: Objective | Term, settings: InversionSettings, images: int
) -> bool:
    """Whether `images` images are work enough to compile for.

    On a CPU it makes the reading of statistics cheap, and nothing else: a step that reads none is as
    fast plain, more or less, or up to twice as fast (benchmarks/compiling.py).
    """
    plan = settings.plan(teacher.size)
    if teacher.mean.is_cuda:
        return sum(steps for steps, _ in plan) >= 200
    reads = bool(objective.bind(teacher).layers())
    return reads and images * inversion_flops(teacher, plan) > WORTH_COMPILING


def inversion_flops(teacher: Classifier, plan: tuple[tuple[int, int], ...]) -> float:
    """Floating-point operations to invert one image: forward, and the same again for the gradient."""
    area = sum(steps * (size / teacher.size) ** 2 for steps, size in plan)
    return 2.0 * forward_flops(teacher) * area


def distillation_flops(teacher: Classifier, student: Classifier) -> float:
    """Floating-point operations of one image in an update of the student.

    Forward through both, and twice the student's forward for its gradients.
    """
    return float(forward_flops(teacher) + 3 * forward_flops(student))


def forward_flops(network: Classifier) -> int:
    """Floating-point operations of one image's way through `network`; a backward pass costs as many again."""
    net = copy.deepcopy(network.net).eval()  # in training mode a forward pass would change BatchNorm
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(network.mean.new_zeros(1, network.channels, network.size, network.size))
    return counter.get_total_flops()


# ---- compilation -----------------------------------------------------------------------------------


class Compiled:
    """A method of tensors, compiled where that works; where it does not, the method itself, and a warning.

    Every new shape is tried before it counts, backward as well: that half is compiled when it is first asked
    for. The trial leaves nothing behind in the network's buffers, in gradients or in random numbers.

    Args:
        network: whose parameters and buffers the method uses.
        on: False leaves the method as it is.

    Attributes:
        on: whether it is compiled still.
    """

    def __init__(self, method: MethodType, network: nn.Module, on: bool = True) -> None:
        self.method, self.network, self.on = method, network, on
        self._compiled = compile_method(method) if on else None
        self._tried: set[tuple[torch.Size, ...]] = set()

    def __call__(self, *inputs: Tensor) -> Any:
        if not self.on:
            return self.method(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._tried:
            reason = self._failure(inputs)
            if reason:
                outputs = self.method(*inputs)  # what fails here as well is no fault of the compiler's
                warnings.warn(f"going on without compilation: {reason}", RuntimeWarning, stacklevel=4)
                self.on = False
                return outputs
            self._tried.add(shapes)
        return self._compiled(*inputs)

    def _failure(self, inputs: tuple[Tensor, ...]) -> str:
        """Why these inputs cannot be compiled for, forward and backward; empty where they can."""
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        leaves = [leaf for leaf in (*inputs, *self.network.parameters()) if leaf.requires_grad]
        try:
            with torch.random.fork_rng([x.device for x in inputs[:1] if x.is_cuda]):
                outputs = self._compiled(*inputs)
                outputs = [outputs] if isinstance(outputs, Tensor) else outputs
                given = [output for output in outputs if output.requires_grad]
                if given:
                    ones = [torch.ones_like(output) for output in given]
                    torch.autograd.grad(given, leaves, ones, allow_unused=True)
        except Exception as error:  # of Dynamo, of Triton, of the C compiler: of any class
            text = str(error).strip() or type(error).__name__
            return " ".join(text.split("\n\n")[0].split())[:300]
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        return ""


def compile_method(method: MethodType) -> Callable:
    """`method` compiled for the shapes it is first called with, under a code object of its own.

    Dynamo counts compilations by code object and after eight gives up without a word in the result;
    a process that goes through many objectives and batch sizes compiles `Step._forward` more often.
    """
    function = method.__func__
    copied = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    if not torch.cuda.is_available():  # where its tools are installed all the same, compiling warns of that
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(MethodType(copied, method.__self__), dynamic=False)


def compiler_available(device: torch.device) -> bool:
    """Whether what is compiled can be: for a CPU Inductor needs a C++ compiler.

    For CUDA Triton compiles a driver, with a C compiler and Python's headers; what is lacking is told once.
    """
    if device.type != "cuda":
        names = (os.environ.get("CXX"), "g++", "clang++", "c++")
        return any(name and shutil.which(name) for name in names)
    lacking, given = [], os.environ.get("CC")
    if not any(shutil.which(name) for name in ([given] if given else ["gcc", "clang"])):
        lacking.append(f"CC={given} is no program" if given else "neither gcc nor clang is there")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if not header.is_file():
        lacking.append(f"{header} is not there (install python3-dev)")
    if lacking:
        _tell_once(
            "going on without compilation: for CUDA it wants a C compiler and Python's headers, but "
            + ", and ".join(lacking)
        )
    return not lacking


@cache
def _tell_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
