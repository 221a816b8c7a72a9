"""Every loop on a device that is not there: fake tensors, which have shape, type and place but no data.

    python tests/without_a_card.py      # prints one line of JSON per case

It finds tensors on two devices, generators of another device than what they fill, and, by line, where the
host would wait for the card: `.item()`, `nonzero`, copies that block. It cannot find values, kernels or
time. torch without a driver runs no backward pass on fake "cuda", so the device is a stand-in (PrivateUse1,
a Python backend), and bfloat16 is played by a function mode.
"""

import json
import os
import traceback
import warnings
from collections import Counter
from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dinv import continual, metrics
from dinv.data import Dataset
from dinv.distillation import DistillationSettings, InversionSource, distill
from dinv.feature_statistics import measure_statistics
from dinv.generator import GeneratorSettings, GeneratorSource, generate
from dinv.inversion import InversionSettings, balanced_labels, invert
from dinv.models import create_model
from dinv.objectives import Competition, CrossEntropy, FeatureStatistics, L2Norm, Term, TotalVariation
from dinv.preflight import preflight
from dinv.training import TrainingSettings, accuracy, train

CARD = "stand_in"
ROOMS = ("continual", "distillation", "generator", "objectives", "step", "training")  # that use autocast
aten = torch.ops.aten


class Fake(FakeTensorMode):
    """Fake tensors; what would make the host wait is counted by the line of dinv that it came from."""

    avoid_device_init = True  # no constant is copied to a device for real

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)  # the state of a generator is a true tensor
        self.waits, self.quiet = Counter(), False

    def __deepcopy__(self, memo):
        return self  # every fake tensor carries its mode along

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        require_fitting_generator(func, args, kwargs)
        if func is aten._local_scalar_dense.default:  # a value is asked for
            self.wait("item", args[0])
            return 0.5 if args[0].is_floating_point() else 0
        if func is aten.nonzero.default:
            self.wait("nonzero", args[0])
            with self:
                return torch.empty(0, args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is aten.equal.default:
            self.wait("equal", args[0])
            return True
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source, target = (args[0], result) if func is aten._to_copy.default else (args[1], args[0])
            blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if blocks and source.device.type != target.device.type:
                self.wait("copy", max(source, target, key=lambda tensor: tensor.device.type != "cpu"))
        return result

    def wait(self, what, tensor):
        if tensor.device.type != "cpu" and not self.quiet:
            self.waits[f"{what} {where()}"] += 1


def tolist(tensor):
    """One copy to the host, as for a true tensor; a fake one asks for every number apart."""
    mode = tensor.fake_mode
    mode.wait("tolist", tensor)
    before, mode.quiet = mode.quiet, True
    try:
        return tensor.item() if tensor.dim() == 0 else [tolist(part) for part in tensor]
    finally:
        mode.quiet = before


def require_fitting_generator(func, args, kwargs):
    """What a card refuses and fake tensors do not."""
    generator = kwargs.get("generator") or next((a for a in args if isinstance(a, torch.Generator)), None)
    if generator is not None:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
        if generator.device.type != device.type:
            raise RuntimeError(f"a generator of {generator.device.type} for {device.type} ({func})")


def where():
    frames = reversed(traceback.extract_stack()[:-2])
    lines = (f"{f.filename.rpartition('/dinv/')[2]}:{f.name}" for f in frames if "/dinv/" in f.filename)
    return next(lines, "elsewhere")


class Bfloat16(TorchFunctionMode):
    """Autocast, as far as these networks need it: convolutions and linear layers in bfloat16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.conv2d, F.conv2d, F.linear):
            tensors = (isinstance(a, torch.Tensor) and a.is_floating_point() for a in args)
            args = tuple(a.bfloat16() if floats else a for a, floats in zip(args, tensors, strict=True))
        return func(*args, **(kwargs or {}))


def apply(module, function, recurse=True):
    """`nn.Module._apply` without the swapping of tensors, which parameters born fake refuse."""
    for child in module.children() if recurse else ():
        apply(child, function)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = torch.nn.Parameter(function(parameter), parameter.requires_grad)
                module._parameters[name] = fresh
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return module


def cases():
    """name -> work(n), in which n is how many steps or updates are made."""
    teacher, student = (create_model("resnet_digits", "digits", seed=seed).to(CARD) for seed in range(2))
    teacher.freeze()
    preflight(teacher), preflight(student)  # once, whatever follows
    prior = CrossEntropy() + 2.5e-5 * TotalVariation() + 3e-8 * L2Norm()
    full, labels = prior + 10.0 * FeatureStatistics(), balanced_labels(8, 10)
    pool = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    data = Dataset(
        "digits", "train", torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.arange(64) % 10, "0123456789"
    )
    small = GeneratorSettings(steps=2, width=8, compile="never")
    brief = InversionSettings(steps=2, compile="never")
    rival = Competition(student, agreeing=True)

    def inverting(objective=full, **changed):
        def work(n):
            return invert(teacher, labels, objective, InversionSettings(steps=n, compile="never", **changed))

        return work

    def distilling(source):
        def work(n):
            settings = DistillationSettings(
                rounds=2, updates=n, batch_size=8, compile="never", augmentation="mixup"
            )
            return distill(teacher, student, source(), settings)

        return work

    def adaptive():
        return InversionSource(teacher, full, brief, batch_size=8, competition=1.0)

    def generating():
        return GeneratorSource(teacher, full, small, batch_size=8, competition=1.0)

    def learning(**changed):
        given = {"images": pool} | ({"labels": torch.zeros(16, dtype=torch.int64)} if not changed else {})

        def work(n):
            extended = continual.extend(teacher, ["a", "b"])
            new = continual.renumbered(
                Dataset("x", "train", pool, torch.arange(16) % 2, ("a", "b")), extended
            )
            settings = continual.ContinualSettings(updates=n, batch_size=8, **changed)
            with patch(
                "dinv.continual._require_fitting", lambda *given: None
            ):  # it looks at labels: all are zero here
                continual.learn(teacher, extended, new, settings, **given)

        return work

    def training(n):
        model = create_model("resnet_digits", "digits").to(CARD)
        part = data.to(CARD).take(slice(0, 8 * n))
        train(model, part, TrainingSettings(epochs=2, batch_size=8, low_res_epochs=1))

    def measuring(n):
        accuracy(teacher, pool, labels.repeat(2))
        metrics.feature_distances(teacher, pool, 8)
        metrics.confidence(teacher, pool), metrics.agreement(teacher, student, pool)
        metrics.topk_accuracy(teacher, pool, labels.repeat(2), 3), metrics.embed(teacher, pool)

    class OnHost(Term):
        name = "on the host"

        def __call__(self, view):
            return (view.pixels - torch.ones(1, 1, 1)).square().mean()

    class Asking(Term):
        name = "asking"

        def __call__(self, view):
            return view.pixels.mean() * view.pixels.sum().item()

    return {
        "invert": inverting(flip=False),
        "invert, flips": inverting(),
        "invert, kl, competition": inverting(prior + FeatureStatistics("kl") + rival),
        "invert, octaves": inverting(octaves=2),
        "invert, measured statistics": lambda n: inverting(
            prior + FeatureStatistics(statistics=measure_statistics(teacher, pool))
        )(n),
        "distill": distilling(lambda: pool),
        "distill, adaptive": distilling(adaptive),
        "distill, generator": distilling(generating),
        "generate": lambda n: generate(
            teacher, labels, full, GeneratorSettings(steps=n, width=8, compile="never")
        ),
        "train": training,
        "learn": learning(local=True, alpha_features=1.0),
        "learn, an oracle": learning(),
        "measure": measuring,
        "control: a tensor on the host": inverting(1.0 * OnHost()),
        "control: a generator of the host": lambda n: torch.randn(
            3, device=CARD, generator=torch.Generator()
        ),
        "control: a term that asks": inverting(1.0 * Asking()),
    }


def main():
    _setup_privateuseone_for_python_backend(CARD)
    os.environ["DINV_PRECISION"] = "bfloat16"

    def autocast(device, precision):
        return Bfloat16() if device.type == CARD and precision == "bfloat16" else nullcontext()

    patches = {"torch.nn.Module._apply": apply, "torch._subclasses.fake_tensor.FakeTensor.tolist": tolist}
    patches |= {f"dinv.{room}.autocast": autocast for room in ROOMS}
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(
            torch.autograd.set_multithreading_enabled(False)
        )  # a card's own thread wants a card
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        mode = stack.enter_context(Fake())
        for name, work in cases().items():
            counts, error = [], ""
            for n in (2, 4):
                mode.waits.clear()
                try:
                    work(n)
                except Exception as problem:
                    error = f"{type(problem).__name__}: {problem}"[:400]
                counts.append(dict(mode.waits))
            print(json.dumps({"name": name, "error": error, "waits": counts}), flush=True)


if __name__ == "__main__":
    main()
