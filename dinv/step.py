"""One step of inversion: terms and gradient, from a frozen private copy of the teacher, compiled."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dinv.features import watch
from dinv.models import Classifier, autocast
from dinv.objectives import Objective, View

if TYPE_CHECKING:
    from dinv.inversion import InversionSettings

# Compiling costs 20 to 40 s on a CPU and saves about half of an eager step, which runs at some
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
        self.compiled = compiled
        self.objective = objective
        self.weights = objective.weights
        watch(self.teacher, objective.layers(), self.features)
        self._terms = compile_method(self._forward) if compiled else None

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

    def _forward(self, pixels: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        terms = self.objective.terms(self._view(pixels, labels))
        # Left in the dictionary, the features would be results of the compiled graph, each with a gradient
        # of zeros to be made and copied: a fifth of a step.
        self.features.clear()
        return terms @ weights, terms

    def _view(self, pixels: Tensor, labels: Tensor) -> View:
        teacher = self.teacher
        with autocast(pixels.device):
            logits = teacher.net(pixels)
        return View(pixels, labels, logits, self.features, pixels * teacher.std + teacher.mean)

    def __call__(self, pixels: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixels.detach().requires_grad_(True)
        total, terms = self._run(pixels, labels, weights)
        (gradient,) = torch.autograd.grad(total, pixels)
        return terms.detach(), gradient

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

    def _run(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        if not self.compiled:
            return self._forward(*inputs)
        try:
            return self._terms(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).strip().split("\n\n")[0].split())[:300]
            warnings.warn(f"going on without compilation: {reason}", RuntimeWarning, stacklevel=4)
            self.compiled = False
            self.features.clear()
            return self._forward(*inputs)


_steps: WeakKeyDictionary[Classifier, dict[tuple, Step]] = WeakKeyDictionary()


def inversion_step(
    teacher: Classifier, objective: Objective, settings: InversionSettings, batch: int
) -> Step:
    """The step for this teacher and objective: a compiled one is made once and used again."""
    objective = objective.bind(teacher)
    pays = settings.compile == "always" or (
        settings.compile == "auto" and compiling_pays(teacher, settings, batch)
    )
    if not (pays and compiler_available(teacher.mean.device)):
        return Step(teacher, objective, compiled=False)
    steps = _steps.setdefault(teacher, {})
    sizes = tuple(size for _, size in settings.plan(teacher.size))
    shapes = tuple(tensor.shape for tensor in teacher.state_dict().values())
    key = (batch, sizes, teacher.mean.device, objective.signature(), shapes)
    if key in steps:
        return steps[key].refresh(teacher, objective)
    steps[key] = Step(teacher, objective, compiled=True)
    return steps[key]


def compiling_pays(teacher: Classifier, settings: InversionSettings, images: int) -> bool:
    """Whether `images` images are work enough to compile for."""
    plan = settings.plan(teacher.size)
    if teacher.mean.is_cuda:
        return sum(steps for steps, _ in plan) >= 200
    return images * inversion_flops(teacher, plan) > WORTH_COMPILING


def inversion_flops(teacher: Classifier, plan: tuple[tuple[int, int], ...]) -> float:
    """Floating-point operations to invert one image: forward, and the same again for the gradient."""
    area = sum(steps * (size / teacher.size) ** 2 for steps, size in plan)
    return 2.0 * forward_flops(teacher) * area


def forward_flops(network: Classifier) -> int:
    """Floating-point operations of one image's way through `network`; a backward pass costs as many again."""
    net = copy.deepcopy(network.net).eval()  # in training mode a forward pass would change BatchNorm
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(network.mean.new_zeros(1, network.channels, network.size, network.size))
    return counter.get_total_flops()


def compile_method(method: MethodType) -> Callable:
    """`method` compiled for the shapes it is first called with, under a code object of its own.

    Dynamo counts compilations by code object and after eight gives up without a word in the result;
    a process that goes through many objectives and batch sizes compiles `Step._forward` more often.
    """
    function = method.__func__
    copied = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )
    if not torch.cuda.is_available():  # where its tools are installed all the same, compiling warns of that
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(MethodType(copied, method.__self__), dynamic=False)


def compiler_available(device: torch.device) -> bool:
    """Inductor needs a C++ compiler for the CPU; for CUDA it brings its own."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return device.type == "cuda" or any(name and shutil.which(name) for name in names)
