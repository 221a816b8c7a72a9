"""What compiling a step gains, with statistics and without: the rule of `compiling.compiling_pays`, measured.

    ./reproduce.sh bench

The plain and the compiled step of one network and one objective take turns, and the medians are compared.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial

import torch
from _shared import seconds

from dinv.experiments.device import device
from dinv.experiments.profiles import load_profile
from dinv.experiments.results import Run
from dinv.models import Classifier, WeightsUnavailable, create_model, load_model
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, Objective, TotalVariation
from dinv.step import Step

CASES = {  # network -> (batch, size of the images, turns)
    "smoke": {"resnet_digits": (64, 8, 5)},
    "cpu": {
        "resnet_small": (256, 32, 9),
        "vgg_small": (128, 32, 9),
        "package:efficientnet_lite0": (12, 112, 9),
    },
    "gpu": {"resnet_small": (256, 32, 30), "cifar_resnet34": (256, 32, 30)},
}
PRIOR = CrossEntropy() + 2.5e-5 * TotalVariation() + 3e-8 * L2Norm()
OBJECTIVES = {"DeepDream": PRIOR, "DeepInversion": PRIOR + 1.0 * FeatureStatistics("kl")}


def step_seconds(
    teacher: Classifier, objective: Objective, batch_size: int, size: int, turns: int
) -> list[list[float]]:
    """Seconds of plain steps and of compiled ones, one of each a turn."""
    shape, generator = (batch_size, teacher.channels, size, size), torch.Generator().manual_seed(0)
    pixels = torch.randn(shape, generator=generator).to(device())
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=device()) % len(teacher.classes)
    steps = [Step(teacher, objective, compiled) for compiled in (False, True)]
    weights = torch.tensor(steps[0].weights, device=device())
    return seconds([partial(step, pixels, labels, weights) for step in steps], turns)


def main() -> int:
    profile = load_profile("auto")
    run = Run("bench_compiling", profile)
    print(f"{'network':28} {'objective':14} {'plain':>8} {'compiled':>9}   ratio: median (least to most)")
    cells: dict[str, dict[str, float]] = {}
    for name, (batch_size, size, turns) in CASES.get(profile.name, CASES["gpu"]).items():
        try:
            teacher = load_model(name) if ":" in name else create_model(name)
        except WeightsUnavailable as reason:
            print(f"no {name}: {reason}")
            continue
        for method, objective in OBJECTIVES.items():
            pair = step_seconds(teacher.to(device()).freeze(), objective, batch_size, size, turns)
            ratios = sorted(plain / fast for plain, fast in zip(*pair, strict=True))
            ratio = statistics.median(ratios)
            plain, fast = (1e3 * statistics.median(side) for side in pair)
            print(
                f"{name:28} {method:14} {plain:5.0f} ms {fast:6.0f} ms"
                f"   {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )
            cells.setdefault(name, {})[method] = ratio
    if cells:
        run.table("compiling", cells, "median ratio of a plain step to a compiled one")
    run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
