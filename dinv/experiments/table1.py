"""What the students' notebooks share: the methods of Table 1, their images, objectives and costs.

All methods of a column begin with the same weights and make the same updates; only their images differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinv.compiling import distillation_flops, inversion_flops
from dinv.data import load_dataset
from dinv.distillation import DistillationResult
from dinv.experiments.profiles import Profile
from dinv.models import Classifier
from dinv.pool import to_uint8

PIXELS = ("DeepDream", "DeepInversion", "ADI")  # methods that optimise pixels
WARMUP_ROUNDS = 1  # rounds in which a student learns from the first images, before new ones come


def image_count(profile: Profile) -> int:
    """Images that a student of pixel inversion or of noise has seen at the end."""
    chosen = profile.distillation
    return chosen.start_images + (chosen.settings.rounds - WARMUP_ROUNDS) * profile.batch_size


def noise(teacher: Classifier, count: int, seed: int = 0) -> Tensor:
    """Gaussian noise in the teacher's units, with which every inversion begins; uint8 (count, C, H, W)."""
    shape = (count, teacher.channels, teacher.size, teacher.size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return to_uint8((pixels * teacher.std.cpu() + teacher.mean.cpu()).clamp(0, 1))


def real_images(profile: Profile, share: str, seed: int = 0) -> Tensor:
    """Real training images, uint8: "all real", or a share of every class such as "1 % real".

    Raises:
        ValueError: `share` is neither.
    """
    data = load_dataset(profile.dataset, "train")
    if share == "all real":
        return data.images
    percent, _, rest = share.partition(" ")
    if rest != "% real" or not percent.replace(".", "", 1).isdigit():
        raise ValueError(f'share {share!r} of the real images must read "all real" or like "1 % real"')
    count = max(1, int(len(data) * float(percent)) // (100 * len(data.classes)))
    return data.per_class(count, torch.Generator().manual_seed(seed)).images


def cost(result: DistillationResult, before: float = 0.0) -> dict[str, float]:
    """Seconds of "synthesis" and "distillation", and in all, with compilation and files.

    Args:
        result: of the cached `distill`.
        before: seconds of synthesis of the images that the student began with.
    """
    watching = sum(record["watching"] for record in result.history)
    return {
        "synthesis": before + result.synthesis_seconds,
        "distillation": result.distillation_seconds,
        "total": before + result.seconds - watching,
    }


def timeline(result: DistillationResult, before: float = 0.0) -> tuple[list[float], list[float]]:
    """Minutes since the first image, and accuracy on real images, at every round where it was measured."""
    minutes, accuracies, spent = [], [], before
    for record in result.history:
        spent += record["synthesis"] + record["distillation"]
        if "real" in record:
            minutes.append(spent / 60)
            accuracies.append(record["real"])
    return minutes, accuracies


def work(profile: Profile, method: str, teacher: Classifier, student: Classifier) -> tuple[float, float]:
    """Floating-point operations of a method other than the generator: (synthesis, distillation).

    What a profile costs is this over a rate. See `compiling.inversion_flops` and `distillation_flops`.
    """
    settings, plan = profile.distillation.settings, profile.distillation.inversion.plan(teacher.size)
    synthesis = inversion_flops(teacher, plan) * image_count(profile) if method in PIXELS else 0.0
    if method == "ADI":
        in_rounds = (settings.rounds - WARMUP_ROUNDS) * profile.batch_size
        synthesis += inversion_flops(student, plan) * in_rounds
    updates = settings.rounds * settings.updates * settings.batch_size
    return synthesis, distillation_flops(teacher, student) * updates
