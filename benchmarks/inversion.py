"""Inversion rate against a plain loop: same loss, teacher, batch and iterations, in one run.

    ./reproduce.sh bench

The plain loop is what one writes down first, and what the released implementations do: the teacher is not
frozen, so weight gradients are computed and thrown away; the variance copies every activation; nothing is
compiled; images are in NCHW order. Both sides take turns, so that a machine's changing speed meets
both alike, and the medians are compared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinv.experiments.device import device
from dinv.experiments.profiles import load_profile
from dinv.experiments.results import Run
from dinv.inversion import balanced_labels
from dinv.models import Classifier, create_model, load_model, shipped_models
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, TotalVariation
from dinv.step import Step

CASES = {  # network -> (batch size, iterations a turn, turns, least ratio)
    "smoke": {"resnet_digits": (64, 10, 3, None)},
    "cpu": {"resnet_small": (256, 8, 5, 2.5), "cifar_resnet34": (32, 1, 5, 1.4)},
    "gpu": {"resnet_small": (256, 50, 5, 2.5), "cifar_resnet34": (256, 20, 5, 1.4)},
}
TV, L2, ALPHA_F = 2.5e-5, 3e-8, 10.0


def plain_loop(teacher: Classifier, labels: Tensor) -> Callable[[Tensor, int], float]:
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
            logits = teacher.net(pixels)
            feature = 0.0
            for layer, x in zip(layers, inputs, strict=True):
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


def measure(name: str, batch_size: int, iterations: int, turns: int) -> tuple[list[float], list[float]]:
    """Images x iterations a second of both, one pair a turn."""
    make = load_model if name in shipped_models() else create_model
    labels = balanced_labels(batch_size, 10).to(device())
    teacher, plain = make(name).to(device()).freeze(), make(name).to(device())
    shape = (batch_size, teacher.channels, teacher.size, teacher.size)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device())
    sides = (plain_loop(plain, labels), ours(teacher, labels))
    first = [side(start, 2) for side in sides]  # warms up, compiles, and compares the losses
    if abs(first[0] - first[1]) > 1e-2 * abs(first[0]):
        raise AssertionError(f"{name}: the two sides differ, {first[0]} and {first[1]}")
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for side, rate in zip(sides, rates, strict=True):
            began = time.perf_counter()
            side(start, iterations)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            rate.append(batch_size * iterations / (time.perf_counter() - began))
    return rates


def main() -> int:
    profile = load_profile("auto")
    run = Run("bench_inversion", profile)
    print(f"{'network':16} {'batch':>5} {'plain':>9} {'dinv':>9}   ratio: median (least to most)")
    cells: dict[str, dict[str, list[float]]] = {}
    for name, (batch_size, iterations, turns, least) in CASES.get(profile.name, CASES["gpu"]).items():
        plain, fast = measure(name, batch_size, iterations, turns)
        ratios = sorted(b / a for a, b in zip(plain, fast, strict=True))
        ratio = statistics.median(ratios)
        print(
            f"{name:16} {batch_size:5d} {statistics.median(plain):9.1f} {statistics.median(fast):9.1f}   "
            f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )
        cells[name] = {"plain loop": plain, "dinv": fast}
        if least:
            run.claim(
                f"{name}: inverts at least {least} times as fast as a plain loop", ratios, at_least=least
            )
    run.table("own", cells, "images x iterations / s")
    run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
