"""Distillation updates against a plain loop: same networks, images, loss and optimiser, in one run.

    ./reproduce.sh bench

The plain loop is eager, in NCHW order and float32, with SGD as it comes. Both sides take turns, and the
medians of the images a second are compared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dinv.compiling import distillation_flops
from dinv.distillation import DistillStep, distillation_loss
from dinv.experiments.device import device
from dinv.experiments.profiles import load_profile
from dinv.experiments.results import Run
from dinv.models import create_model
from dinv.training import Updates, UpdateSettings

CASES = {  # teacher, student, batch size, updates a turn, turns, least ratio by precision
    "smoke": [("resnet_digits", "vgg_digits", 64, 5, 3, {})],
    "cpu": [
        ("resnet_small", "resnet_small", 128, 3, 5, {"float32": 1.3, "bfloat16": 2.0}),
        ("resnet_small", "resnet_tiny", 128, 3, 5, {}),
    ],
    "gpu": [
        ("cifar_resnet34", "cifar_resnet18", 256, 20, 5, {}),
        ("cifar_vgg11", "cifar_vgg11", 256, 20, 5, {}),
    ],
}


def plain_loop(teacher: str, student: str, images: Tensor) -> Callable[[int], None]:
    old, new = create_model(teacher).to(device()).freeze(), create_model(student, seed=1).to(device()).train()
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def run(updates: int) -> None:
        for _ in range(updates):
            with torch.no_grad():
                wanted = old(images)
            optimizer.zero_grad()
            distillation_loss(new(images), wanted, 3.0).backward()
            optimizer.step()

    return run


def ours(teacher: str, student: str, images: Tensor) -> tuple[Callable[[int], None], str]:
    old, new = create_model(teacher).to(device()).freeze(), create_model(student, seed=1).to(device())
    step = DistillStep(old, new)
    loop = Updates(step.student.train(), UpdateSettings(), 10**6, 10**6, torch.Generator())
    images = images.contiguous(memory_format=torch.channels_last)

    def run(updates: int) -> None:
        for _ in range(updates):
            step(images)
            loop.update()

    return run, step.precision


def main() -> int:
    profile = load_profile("auto")
    run = Run("bench_distillation", profile)
    print(f"{'networks':32} {'batch':>5} {'plain':>8} {'dinv':>8}  ratio: median (least to most), GFLOP/s")
    cells: dict[str, dict[str, list[float]]] = {}
    for teacher, student, batch_size, updates, turns, least in CASES.get(profile.name, CASES["gpu"]):
        network = create_model(teacher)
        images = torch.rand(batch_size, network.channels, network.size, network.size).to(device())
        fast, precision = ours(teacher, student, images)
        sides = {"plain loop": plain_loop(teacher, student, images), "dinv": fast}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(turns + 1):  # the first warms up and compiles
            for side, work in sides.items():
                began = time.perf_counter()
                work(updates)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn:
                    rates[side].append(batch_size * updates / (time.perf_counter() - began))
        ratios = sorted(b / a for a, b in zip(rates["plain loop"], rates["dinv"], strict=True))
        medians = {side: statistics.median(values) for side, values in rates.items()}
        speed = medians["dinv"] * distillation_flops(network, create_model(student)) / 1e9
        name = f"{teacher} -> {student}, {batch_size}"
        print(
            f"{name:32} {batch_size:5d} {medians['plain loop']:8.1f} {medians['dinv']:8.1f}  "
            f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {speed:.0f}",
            flush=True,
        )
        cells[name] = rates
        if precision in least:
            claim = f"{name}: {least[precision]:g} times as fast as a plain loop, {precision}"
            run.claim(claim, ratios, at_least=least[precision])
    run.table("own", cells, "images / s")
    run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
