"""Inversion rate against a plain loop: same loss, teacher, batch and iterations, in one run.

    ./reproduce.sh bench

The plain loop is what one writes down first, and what the released implementations do: the teacher is not
frozen, so weight gradients are computed and thrown away; the variance copies every activation; nothing is
compiled; images are in NCHW order. Where networks compute in bfloat16, the plain loop runs under autocast as
well. All sides take turns, so that a machine's changing speed meets all alike, and the medians are compared.

The last column is the rate of operations as a share of what a single convolution of 128 channels reaches
here, forward and back to its input.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _shared import compare, rates, seconds
from torch import Tensor, nn

from dinv.compiling import inversion_flops
from dinv.experiments.device import device
from dinv.experiments.profiles import load_profile
from dinv.experiments.results import Run
from dinv.inversion import balanced_labels
from dinv.models import Classifier, WeightsUnavailable, create_model, load_model, shipped_models
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, TotalVariation
from dinv.precision import autocast, choose
from dinv.step import Step

CASES = {  # network, batch size, side of the images, iterations a turn, turns, least ratio by precision
    "smoke": [("resnet_digits", 64, 8, 10, 3, {})],
    "cpu": [
        ("resnet_small", 256, 32, 4, 5, {"float32": 2.8, "bfloat16": 4.5}),
        ("cifar_vgg11", 256, 32, 1, 3, {"float32": 2.0, "bfloat16": 5.0}),
        ("cifar_resnet34", 64, 32, 1, 3, {"float32": 2.0, "bfloat16": 5.5}),
        ("package:efficientnet_lite0", 12, 112, 2, 5, {"float32": 1.5}),
        ("package:efficientnet_lite0", 12, 224, 1, 3, {"float32": 1.5}),
    ],
    "gpu": [
        ("resnet_small", 256, 32, 50, 5, {"bfloat16": 2.5}),
        ("cifar_vgg11", 256, 32, 50, 5, {"bfloat16": 2.5}),
        ("cifar_resnet34", 256, 32, 20, 5, {"bfloat16": 2.5}),
    ],
}
TV, L2, ALPHA_F = 2.5e-5, 3e-8, 10.0


def plain_loop(teacher: Classifier, labels: Tensor, precision: str) -> Callable[[Tensor, int], float]:
    """A straightforward DeepInversion loop; returns a function that runs it for some iterations."""
    teacher.requires_grad_(True).eval().to(memory_format=torch.contiguous_format)
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]

    def run(start: Tensor, iterations: int) -> float:
        pixels = start.clone().contiguous().requires_grad_(True)
        optimizer = torch.optim.Adam([pixels], lr=0.05)
        inputs: list[Tensor] = []
        handles = [m.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for m in layers]
        for _ in range(iterations):
            inputs.clear()
            optimizer.zero_grad()
            teacher.zero_grad()
            with autocast(pixels.device, precision):
                logits = teacher.net(pixels)
            feature = 0.0
            for layer, x in zip(layers, (x.float() for x in inputs), strict=True):
                mean = x.mean((0, 2, 3))
                variance = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
                feature = feature + (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
            shifts = (
                pixels[..., :, 1:] - pixels[..., :, :-1],
                pixels[..., 1:, :] - pixels[..., :-1, :],
                pixels[..., 1:, 1:] - pixels[..., :-1, :-1],
                pixels[..., 1:, :-1] - pixels[..., :-1, 1:],
            )
            prior = TV * sum(d.flatten(1).norm(dim=1).mean() for d in shifts)
            prior = prior + L2 * pixels.flatten(1).norm(dim=1).mean()
            loss = F.cross_entropy(logits, labels) + prior + ALPHA_F * feature
            loss.backward()
            optimizer.step()
        for handle in handles:
            handle.remove()
        return loss.item()

    return run


def ours(teacher: Classifier, labels: Tensor) -> Callable[[Tensor, int], float]:
    """The same iterations by `dinv`'s step, compiled."""
    objective = CrossEntropy() + TV * TotalVariation() + L2 * L2Norm() + ALPHA_F * FeatureStatistics()
    step = Step(teacher, objective, compiled=True)
    weights = torch.tensor(step.weights, device=labels.device)

    def run(start: Tensor, iterations: int) -> float:
        pixels = start.clone().contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam([pixels], lr=0.05)
        for _ in range(iterations):
            terms, pixels.grad = step(pixels, labels, weights)
            optimizer.step()
        return float(terms @ weights)

    return run


def convolution_rate(precision: str, batch_size: int = 64) -> float:
    """Operations a second of one convolution, 128 channels at 16x16, forward and back to its input."""
    x = torch.randn(batch_size, 128, 16, 16, device=device()).contiguous(memory_format=torch.channels_last)
    layer = nn.Conv2d(128, 128, 3, padding=1, bias=False).to(device(), memory_format=torch.channels_last)
    layer.requires_grad_(False)
    x.requires_grad_()

    def both_ways() -> None:
        with autocast(x.device, precision):
            y = layer(x)
        torch.autograd.grad(y, x, y)

    return 2 * 2 * x.numel() * 128 * 9 / statistics.median(seconds([both_ways], 10)[0])


def measure(
    name: str, batch_size: int, size: int, iterations: int, turns: int
) -> tuple[Classifier, str, dict[str, list[float]]]:
    """The teacher, its precision, and images x iterations a second of every side, one of each a turn."""
    make = load_model if ":" in name or name in shipped_models() else create_model
    teacher, plain = make(name).to(device()).freeze(), make(name).to(device())
    labels = balanced_labels(batch_size, len(teacher.classes)).to(device())
    start = torch.randn(batch_size, teacher.channels, size, size, generator=torch.Generator().manual_seed(0))
    start, precision = start.to(device()), choose("auto", device(), teacher)
    sides = {
        f"plain loop, {kind}": plain_loop(plain, labels, kind)
        for kind in dict.fromkeys(("float32", precision))
    }
    sides["dinv"] = ours(teacher, labels)
    first = {side: run(start, 2) for side, run in sides.items()}  # warms up, compiles, compares the losses
    if abs(first["dinv"] / first[f"plain loop, {precision}"] - 1) > 1e-2:
        raise AssertionError(f"{name}: the sides differ, {first}")
    calls = {side: partial(run, start, iterations) for side, run in sides.items()}
    return teacher, precision, rates(calls, batch_size * iterations, turns)


def main() -> int:
    profile = load_profile("auto")
    run = Run("bench_inversion", profile)
    print(f"{'network, batch at side':38} {'plain':>8} {'dinv':>8}  ratio: median (range)  share")
    cells: dict[str, dict[str, list[float]]] = {}
    for name, batch_size, size, iterations, turns, least in CASES.get(profile.name, CASES["gpu"]):
        try:
            teacher, precision, measured = measure(name, batch_size, size, iterations, turns)
        except WeightsUnavailable as reason:
            print(f"no {name}: {reason}")
            continue
        case, operations = f"{name}, {batch_size} at {size}", inversion_flops(teacher, ((1, size),))
        share = statistics.median(measured["dinv"]) * operations / convolution_rate(precision)
        text = compare(run, case, measured["plain loop, float32"], measured["dinv"], precision, least)
        print(f"{case:38} {text}  {100 * share:.0f} %", flush=True)
        cells[case] = measured | {"share of a convolution's rate, %": [100 * share]}
    if cells:
        run.table("own", cells, "images x iterations / s")
    run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
