"""Notebook 07: networks that others trained turn the names of classes into images, and judge each other's.

    teacher = gallery.network(run, run.profile.imagenet.teacher)
    labels = gallery.labels(teacher, run.profile.imagenet.classes)
    pool, result = gallery.made(run, "deepinversion", teacher, labels)
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinv import chapters
from dinv.datasets import Dataset, load_dataset
from dinv.inversion import InversionSettings, balanced_labels
from dinv.models import Classifier, WeightsUnavailable, load_model, resized
from dinv.objectives import Competition, CrossEntropy, FeatureStatistics, L2Norm, Objective, TotalVariation
from dinv.pool import Pool
from dinv.profiles import Profile
from dinv.runs import Result, Run, stage_name
from dinv.step import distillation_flops, inversion_flops

OPTIMISER = ("stages", "rate", "octaves", "chroma", "betas", "schedule", "jitter", "flip")
PHOTOGRAPHS = {"china.jpg": "palace", "flower.jpg": "daisy"}  # those that scikit-learn carries


def network(run: Run, names: Sequence[str]) -> Classifier:
    """The first of these networks whose weights are in reach, frozen; the profile's own are trained.

    Raises:
        WeightsUnavailable: none of them is; the message says why, network by network.
    """
    own = {getattr(run.profile, role): role for role in ("judge", "teacher")}
    reasons = []
    for name in names:
        if name in own:
            return chapters.network(run, own[name])
        try:
            return load_model(name).to(chapters.device())
        except WeightsUnavailable as reason:
            reasons.append(f"{name}: {reason}")
    raise WeightsUnavailable("; ".join(reasons) or "no network is named")


def judges(run: Run, teacher: Classifier) -> list[Classifier]:
    """The profile's judges whose weights are in reach; never the teacher itself."""
    found = []
    for name in run.profile.imagenet.judges:
        try:
            judge = network(run, [name])
        except WeightsUnavailable as reason:
            print(f"no {name}: {reason}")
            continue
        if judge.name != teacher.name:
            found.append(judge)
    if not found:
        raise WeightsUnavailable(f"of {', '.join(run.profile.imagenet.judges)} no weights are in reach")
    return found


def labels(teacher: Classifier, names: Sequence[str], each: int = 1) -> Tensor:
    """The numbers of these classes, `each` times one after the other: a, b, c, a, b, c.

    Raises:
        ValueError: the teacher has no such class; the nearest are named.
    """
    numbers = []
    for name in names:
        if name not in teacher.classes:
            near = difflib.get_close_matches(name, teacher.classes, n=3)
            hint = f": did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"{teacher.name} knows no class {name!r}{hint}")
        numbers.append(list(teacher.classes).index(name))
    return torch.tensor(numbers).repeat(each)


def drawn(teacher: Classifier, count: int, apart_from: Sequence[str] = (), seed: int = 0) -> list[str]:
    """`count` of the teacher's classes at random, none of `apart_from`; all where these are fewer."""
    order = torch.randperm(len(teacher.classes), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [teacher.classes[number] for number in order]
    return [name for name in names if name not in apart_from][:count]


def objective(profile: Profile, row: str) -> Objective:
    """What "deepdream" or "deepinversion" minimises; "deepinversion, l2" has the paper's plain distance."""
    chosen = profile.imagenet
    prior = CrossEntropy() + chosen.tv * TotalVariation() + chosen.l2 * L2Norm()
    if row == "deepdream":
        return prior
    distance = "l2" if row == "deepinversion, l2" else chosen.distance
    return prior + chosen.feature * FeatureStatistics(distance, first=chosen.first)


def settings(profile: Profile, **changes: Any) -> InversionSettings:
    """The profile's optimiser of the pixels, with `changes`."""
    chosen = {name: getattr(profile.imagenet, name) for name in OPTIMISER}
    return InversionSettings(**{**chosen, **changes})


def made(
    run: Run,
    name: str,
    teacher: Classifier,
    wanted: Tensor,
    terms: Objective | None = None,
    *,
    snapshots: tuple[int, ...] = (),
    seed: int = 0,
    student: Classifier | None = None,
    batch: int = 0,
    **changes: Any,
) -> tuple[Pool, Result]:
    """Images of the `wanted` classes: a cached stage.

    Args:
        name: of the stage, and of the objective where `terms` are not given; any text.
        student: whom the images compete with, by the profile's weight.
        batch: images that share statistics; 0 is all of them.
        changes: settings of the optimiser other than the profile's.
    """
    terms = objective(run.profile, name) if terms is None else terms
    if student is not None:
        terms = terms + run.profile.imagenet.competition * Competition(student)
    return chapters.pool(
        run, stage_name(f"{teacher.name}-{name}"), teacher, terms,
        seed=seed, labels=wanted, batch=batch or len(wanted), settings=settings(run.profile, **changes),
        snapshots=snapshots, at_once=run.profile.imagenet.at_once,
    )  # fmt: skip


def many(run: Run, row: str, teacher: Classifier, count: int) -> tuple[Pool, Result]:
    """`count` images of all the teacher's classes, in batches of what a card holds: a cached stage."""
    wanted = balanced_labels(count, len(teacher.classes))
    batch = math.gcd(count, 64)
    return made(run, f"{row}-{count}", teacher, wanted, objective(run.profile, row), batch=batch)


def transferred(run: Run, teacher: Classifier, images: Tensor) -> tuple[Classifier, Result]:
    """A network of the teacher's kind with fresh weights, distilled on inverted images alone: Table 6.

    So many epochs as the profile says; `images` are uint8 (N, C, H, W).
    """
    batch = min(run.profile.distillation.batch, len(images))
    settings = chapters.distillation_settings(
        run.profile, rounds=run.profile.imagenet.epochs, updates=-(-len(images) // batch), batch=batch
    )
    name = f"{teacher.name}-transferred"
    return chapters.student(run, name, teacher, teacher.name, images, settings=settings)


def work_of_transfer(profile: Profile, teacher: Classifier) -> tuple[float, float]:
    """Floating-point operations of Table 6 by the profile's numbers: (synthesis, distillation)."""
    chosen = profile.imagenet
    synthesis = chosen.transfer * inversion_flops(teacher, chosen.stages)
    return synthesis, chosen.epochs * chosen.transfer * distillation_flops(teacher, teacher)


def test_set(run: Run, model: Classifier, count: int = 5000) -> Dataset | None:
    """Real images to test a network of the gallery on: `count` of the user's folder, None without one.

    For a small network those of the profile's data set.
    """
    profile = run.profile
    if model.size < 64:
        return load_dataset(profile.dataset, "test")
    return of_folder(profile.imagenet.folder, model, count) if profile.imagenet.folder else None


def photographs(run: Run, model: Classifier) -> tuple[Tensor, list[str]]:
    """Real images to try a network on, uint8 at its size, and what they show.

    The user's folder where there is one, else scikit-learn's two photographs; for a small network the
    first test image of every class.
    """
    data = test_set(run, model, count=1000)
    if data is None:
        return torch.cat([photograph(file, model.size) for file in PHOTOGRAPHS]), list(PHOTOGRAPHS.values())
    if model.size < 64:
        firsts = [int((data.labels == number).nonzero()[0]) for number in range(len(data.classes))]
        return data.images[firsts], list(data.classes)
    return data.images, [data.classes[number] for number in data.labels]


def photograph(file: str, size: int) -> Tensor:
    """The middle square of one of scikit-learn's photographs, uint8 (1, 3, size, size)."""
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.functional import center_crop

    image = torch.tensor(load_sample_image(file)).permute(2, 0, 1)[None]
    return resized(center_crop(image, [min(image.shape[2:])] * 2), size)


def labels_of_folders(folder: str, model: Classifier) -> dict[str, int]:
    """Which of the model's classes each folder in `folder` is, by the folder's name.

    The classes' own names; or numbers, from 0 or from 1, in the order of numbers (as text 10 comes before 2);
    or WordNet's ids, in their order, which is that of ImageNet's thousand classes.

    Raises:
        ValueError: they are none of these, or not one for every class.
    """
    names = sorted(entry.name for entry in Path(folder).iterdir() if entry.is_dir())
    if names == sorted(model.classes):
        return {name: list(model.classes).index(name) for name in names}
    if len(names) == len(model.classes):
        if all(re.fullmatch(r"n\d{8}", name) for name in names):
            return {name: number for number, name in enumerate(names)}
        if all(re.fullmatch("[0-9]+", name) for name in names):
            names.sort(key=int)
            first = int(names[0])
            if first < 2 and [int(name) for name in names] == list(range(first, first + len(names))):
                return {name: number for number, name in enumerate(names)}
    last = len(model.classes) - 1
    raise ValueError(
        f"{folder} has {len(names)} folders: {_some(names)}; expected one folder for each of the "
        f"{last + 1} classes of {model.name}: their names ({_some(model.classes)}), the numbers 0 to {last}, "
        "or WordNet's ids such as n01440764"
    )


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join([*names[:count], "..."] if len(names) > count else names) or "none"


def of_folder(folder: str, model: Classifier, count: int) -> Dataset:
    """`count` images drawn from an ImageFolder: one folder a class, named as `labels_of_folders` says.

    Raises:
        ValueError: no such folder, or its folders are not the model's classes.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    if not Path(folder).is_dir():
        raise ValueError(f"imagenet.folder={folder!r} is no folder")
    numbered = labels_of_folders(folder, model)
    data = ImageFolder(folder)
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count].tolist()
    images, numbers = [], []
    for index in drawn:
        image, number = data[index]
        image = image.convert("RGB" if model.channels == 3 else "L")
        image = center_crop(resize(image, round(model.size * 256 / 224)), [model.size] * 2)
        images.append(pil_to_tensor(image))
        numbers.append(numbered[data.classes[number]])
    return Dataset("imagenet", "test", torch.stack(images), torch.tensor(numbers), model.classes)
