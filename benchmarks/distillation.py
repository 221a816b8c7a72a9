"""Distillation updates against a plain loop: same networks, images, loss and optimiser, in one run.

    ./reproduce.sh bench

The plain loop is eager, in NCHW order and float32, with SGD as it comes. Both sides take turns, and the
medians of the images a second are compared.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from _shared import compare, rates
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
    print(f"{'networks, batch':36} {'plain':>8} {'dinv':>8}  ratio: median (least to most), GFLOP/s")
    cells: dict[str, dict[str, list[float]]] = {}
    for teacher, student, batch_size, updates, turns, least in CASES.get(profile.name, CASES["gpu"]):
        network = create_model(teacher)
        images = torch.rand(batch_size, network.channels, network.size, network.size).to(device())
        fast, precision = ours(teacher, student, images)
        sides = {"plain loop": plain_loop(teacher, student, images), "dinv": fast}
        calls = {side: partial(work, updates) for side, work in sides.items()}
        name, measured = f"{teacher} -> {student}, {batch_size}", rates(calls, batch_size * updates, turns)
        operations = distillation_flops(network, create_model(student))
        speed = statistics.median(measured["dinv"]) * operations / 1e9
        text = compare(run, name, measured["plain loop"], measured["dinv"], precision, least)
        print(f"{name:36} {text}, {speed:.0f}", flush=True)
        cells[name] = measured
    run.table("own", cells, "images / s")
    run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
