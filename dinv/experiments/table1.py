"""What the students' notebooks share: the methods of Table 1, their images, objectives and costs.

All methods of a column begin with the same weights and make the same updates; only their images differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dinv.compiling import counted_flops, distillation_flops, forward_flops, inversion_flops
from dinv.data import load_dataset
from dinv.distillation import DistillationResult, DistillationSettings
from dinv.experiments.settings import Profile
from dinv.generator import create_generator
from dinv.models import Classifier
from dinv.pool import to_uint8

PIXELS = ("noise", "DeepDream", "DeepInversion", "ADI")  # methods that optimise pixels
WARMUP_ROUNDS = 1  # rounds in which a student learns from the first images, before new ones come


def image_count(profile: Profile) -> int:
    """Images that a student of pixel inversion or of noise has seen at the end."""
    chosen = profile.distillation
    return chosen.start_images + (chosen.settings.rounds - WARMUP_ROUNDS) * profile.batch_size


def noise(teacher: Classifier, count: int, seed: int = 0) -> Tensor:
    """Gaussian noise in the teacher's units, with which every inversion begins; uint8 (count, C, H, W).

    The paper's row "noise" is another: images optimised by the cross-entropy alone [M].
    """
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
    """Floating-point operations of a method: (synthesis, distillation); none for images that are there.

    What a profile costs is this over a rate. See `compiling.inversion_flops` and `distillation_flops`.
    """
    chosen, settings = profile.distillation, settings_of(profile, method)
    plan, synthesis = chosen.inversion.plan(teacher.size), 0.0
    if method in PIXELS:
        synthesis = inversion_flops(teacher, plan) * image_count(profile)
    if method == "ADI":
        synthesis += inversion_flops(student, plan) * (image_count(profile) - chosen.start_images)
    if method == "generator":
        made = profile.generator
        competing = made.images * max(0, settings.rounds - made.warmup) if made.alpha_c else 0
        passes = 2.0 * forward_flops(teacher) + 3 * _generator_flops(profile, teacher)
        synthesis = passes * made.images * settings.rounds + 2.0 * forward_flops(student) * competing
        synthesis *= made.settings.steps
    updates = settings.rounds * settings.updates * settings.batch_size
    return synthesis, distillation_flops(teacher, student) * updates


def settings_of(profile: Profile, method: str) -> DistillationSettings:
    """How a method's student learns where nothing is made equal: the generator's has rounds of its own."""
    return profile.generator.distillation if method == "generator" else profile.distillation.settings


def at_equal_updates(profile: Profile, method: str) -> DistillationSettings:
    """As `settings_of`, with as many rounds as make the updates of the pixels' students, or nearly so."""
    settings, pixels = settings_of(profile, method), profile.distillation.settings
    return replace(settings, rounds=max(1, round(pixels.rounds * pixels.updates / settings.updates)))


def at_equal_work(
    profile: Profile, method: str, teacher: Classifier, student: Classifier
) -> DistillationSettings:
    """As `settings_of`, with as many rounds as the operations of ADI's row would pay for."""
    settings = settings_of(profile, method)
    spent = sum(work(profile, method, teacher, student))
    ratio = sum(work(profile, "ADI", teacher, student)) / spent
    return replace(settings, rounds=max(1, int(settings.rounds * ratio)))


def _generator_flops(profile: Profile, teacher: Classifier) -> int:
    """Operations of one image's way through the profile's generator."""
    settings, device = profile.generator.settings, teacher.mean.device
    latent = torch.zeros(1, settings.latent_dim, device=device)
    label = torch.zeros(1, dtype=int, device=device)
    return counted_flops(create_generator(teacher, settings).eval(), latent, label)
