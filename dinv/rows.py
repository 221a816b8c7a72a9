"""The rows of Table 1: which images a student learns from, and what became of it.

A row is the images before the first round, and a source for every round after it. All rows of a column
begin with the same weights and make the same updates; they differ by their images alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinv import chapters, distillation
from dinv.datasets import load_dataset
from dinv.distillation import Later, PixelSource, ReadySource, Source
from dinv.generator import GeneratorSource
from dinv.inversion import InversionSettings
from dinv.metrics import accuracy
from dinv.models import Classifier
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, Objective, TotalVariation
from dinv.pool import Pool, to_uint8
from dinv.profiles import Profile
from dinv.runs import Result, Run, stage_name
from dinv.step import distillation_flops, inversion_flops

DATA_FREE = ("noise", "deepdream", "deepinversion", "adi", "generator")
CEILINGS = ("1 % real", "all real")  # no part of the method: the same loop on real images
ALONE = 1  # rounds in which a student learns from the first images, before new ones are made
LOOK = 2000  # test images for the curves; the tables take them all


def objective(profile: Profile, row: str) -> Objective:
    """What a row's images minimise, without the competition: "deepdream", "deepinversion" or "generator"."""
    weights = profile.weights
    tv = weights.tv if row == "generator" else profile.distillation.tv
    prior = CrossEntropy() + tv * TotalVariation() + weights.l2 * L2Norm()
    feature = {"deepdream": 0.0, "deepinversion": weights.feature, "generator": profile.generator.feature}
    return prior + feature[row] * FeatureStatistics() if feature[row] else prior


def image_count(profile: Profile) -> int:
    """Images of a row at the end, the generator's and the ceilings apart."""
    chosen = profile.distillation
    return chosen.first + (chosen.rounds - ALONE) * profile.inversion.batch


def inversion_settings(profile: Profile) -> InversionSettings:
    """The optimiser of a student's images: the profile's, from coarse to fine where it says so."""
    return chapters.inversion_settings(profile, stages=profile.distillation.stages)


def pool(run: Run, row: str, teacher: Classifier, seed: int) -> tuple[Pool, Result]:
    """All images of "deepdream" or "deepinversion", which need no student: a cached stage."""
    profile, made = run.profile, image_count(run.profile)
    return chapters.pool(
        run, f"{row}{made}", teacher, objective(profile, row),
        seed=seed, images=made, settings=inversion_settings(profile),
    )  # fmt: skip


def noise(teacher: Classifier, count: int, seed: int) -> Tensor:
    """Gaussian noise in the teacher's units, where every inversion begins; uint8 (count, C, H, W)."""
    shape = (count, teacher.channels, teacher.size, teacher.size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return to_uint8((pixels * teacher.std.cpu() + teacher.mean.cpu()).clamp(0, 1))


def work(profile: Profile, row: str, teacher: Classifier, student: Classifier) -> tuple[float, float]:
    """Floating-point operations of a row, the generator's apart: (synthesis, distillation).

    What a profile costs is this over a rate. See `step.inversion_flops` and `step.distillation_flops`.
    """
    chosen, plan = profile.distillation, inversion_settings(profile).plan(teacher.size)
    synthesis = 0.0
    if row in ("deepdream", "deepinversion", "adi"):
        synthesis = inversion_flops(teacher, plan) * image_count(profile)
    if row == "adi":
        synthesis += inversion_flops(student, plan) * (chosen.rounds - ALONE) * profile.inversion.batch
    return synthesis, distillation_flops(teacher, student) * chosen.rounds * chosen.updates * chosen.batch


def images_of(run: Run, row: str, teacher: Classifier, seed: int) -> tuple[Tensor, Source, float]:
    """A data-free row's images before the first round, its source, and what the former took in seconds."""
    profile, first, batch = run.profile, run.profile.distillation.first, run.profile.inversion.batch
    if row == "generator":
        chosen = profile.generator
        settings = chapters.generator_settings(profile)
        options = {"batch": chosen.images, "competition": chosen.competition, "warmup": chosen.warmup}
        source = GeneratorSource(teacher, objective(profile, row), settings, seed=seed, **options)
        return noise(teacher, 0, seed), source, 0.0
    if row == "noise":
        images, seconds = noise(teacher, image_count(profile), seed), 0.0
    else:  # adaptive images begin with those of DeepInversion
        made, result = pool(run, "deepinversion" if row == "adi" else row, teacher, seed)
        images, seconds = made.images, result.seconds
    source = ReadySource(images[first:], batch)
    if row == "adi":  # and go on against the student
        settings = inversion_settings(profile)
        options = {"batch": batch, "first": first // batch, "competition": profile.distillation.competition}
        source = PixelSource(teacher, objective(profile, "deepinversion"), settings, seed=seed, **options)
        seconds *= first / len(images)
    return images[:first], Later(source, ALONE), seconds


def real_images(run: Run, row: str, seed: int) -> Tensor:
    """The real training images of a ceiling: "1 % real" of every class, any other share so, or "all real"."""
    data = load_dataset(run.profile.dataset, "train")
    if row == "all real":
        return data.images
    share = max(1, int(len(data) * float(row.split()[0])) // (100 * len(data.classes)))
    return data.per_class(share, torch.Generator().manual_seed(seed)).images


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        student: frozen, after the last update.
        accuracy: top-1 in percent on the whole test set.
        history: one record a round, see `distillation.Distilled`; "real" is the accuracy on the first
            `LOOK` test images, where it was taken.
        made: uint8, the images that the source gave, round after round.
        before: seconds of synthesis before the first round.
        synthesis, distillation: seconds in all.
        total: seconds end to end, with compilation, files and all else, but without looking on.
    """

    student: Classifier
    accuracy: float
    history: list[dict[str, float]]
    made: Tensor
    before: float
    synthesis: float
    distillation: float
    total: float


def distilled(run: Run, row: str, pair: str, seed: int = 0, **changes: Any) -> Cell:
    """Distil one cell of Table 1, or find it made.

    Args:
        row: one of `DATA_FREE` or `CEILINGS`.
        pair: "teacher->student".
        changes: settings of the distillation other than the profile's.
    """
    profile = run.profile
    teacher, architecture = chapters.pair(run, pair)
    every = profile.distillation.every
    if row in CEILINGS:
        images, source, before = real_images(run, row, seed), None, 0.0
    else:
        images, source, before = images_of(run, row, teacher, seed)
    if row == "generator":
        every = profile.generator.every
        changes = {name: getattr(profile.generator, name) for name in ("rounds", "updates", "mix")} | changes
    test_set = load_dataset(profile.dataset, "test", chapters.device())

    def watch(number: int, student: Classifier) -> dict[str, float]:
        """For Figure 4. Nothing follows from it."""
        look = slice(0, LOOK)
        return {"real": accuracy(student, test_set.images[look], test_set.labels[look])}

    student, result = chapters.student(
        run, stage_name(f"{row}-{pair}"), teacher, architecture, images, seed=seed, source=source,
        watch=watch, watch_every=every, settings=chapters.distillation_settings(profile, **changes),
    )  # fmt: skip
    history = result.meta["history"]
    spent = {what: distillation.seconds(history, what) for what in ("synthesis", "distillation", "watching")}
    return Cell(
        student,
        accuracy(student, test_set.images, test_set.labels),
        history,
        result.tensors["made"],
        before,
        before + spent["synthesis"],
        spent["distillation"],
        before + result.seconds - spent["watching"],
    )
