"""Notebook 07: networks that others trained turn names of classes into images, and verify each other's.

teacher = imagenet.network(profile, profile.imagenet.teacher)
labels = imagenet.labels(teacher, profile.imagenet.classes)
pool = synthesize(Inverter(teacher, objective, profile.imagenet.inversion), labels, batch_size=len(labels))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from dinv.checks import near
from dinv.compiling import distillation_flops, inversion_flops
from dinv.data import Dataset, load_dataset
from dinv.experiments import stages
from dinv.experiments.device import device
from dinv.experiments.profiles import Imagenet, Profile, load_profile
from dinv.models import Classifier, WeightsUnavailable, load_model, resized

PHOTOGRAPHS = {"china.jpg": "palace", "flower.jpg": "daisy"}  # those that scikit-learn carries
SMALL = 64  # pixels: a network below takes the images of the profile's data set


def network(profile: Profile, names: Sequence[str]) -> Classifier:
    """The first of these networks whose weights are in reach, frozen; the profile's own are trained.

    Raises:
        WeightsUnavailable: none of them is; the message says why, network by network.
    """
    own = {getattr(profile, role): role for role in ("verifier", "teacher")}
    reasons = []
    for name in names:
        if name in own:
            return stages.network(profile, own[name])
        try:
            return load_model(name).to(device())
        except WeightsUnavailable as reason:
            reasons.append(f"{name}: {reason}")
    raise WeightsUnavailable("; ".join(reasons) or "no network is named")


def suited(profile: Profile, teacher: Classifier) -> Imagenet:
    """The profile's settings for this teacher; where it is a second choice, those that its family has on cpu.

    ResNet-50's objective, on an EfficientNet's pixels, ends in grain and false colours.
    """
    own, family = profile.imagenet, load_profile("cpu").imagenet
    if "efficientnet" not in teacher.name or "efficientnet" in own.teacher[0]:
        return own
    print(f"no {own.teacher[0]}: the settings are those that profile cpu has for {teacher.name}")
    names = ("inversion", "comparison_stages", "distance", "alpha_f", "tv", "l2")
    return replace(own, **{name: getattr(family, name) for name in names})


def verifiers(profile: Profile, teacher: Classifier) -> list[Classifier]:
    """The profile's verifiers whose weights are in reach; never the teacher itself.

    Raises:
        WeightsUnavailable: there is none.
    """
    reachable = []
    for name in profile.imagenet.verifiers:
        try:
            verifier = network(profile, [name])
        except WeightsUnavailable as reason:
            print(f"no {name}: {reason}")
            continue
        if verifier.name != teacher.name:
            reachable.append(verifier)
    if not reachable:
        raise WeightsUnavailable(f"of {', '.join(profile.imagenet.verifiers)} no weights are in reach")
    return reachable


def labels(teacher: Classifier, names: Sequence[str], each: int = 1) -> Tensor:
    """The numbers of these classes, `each` times one after the other: a, b, c, a, b, c.

    Raises:
        ValueError: the teacher has no such class; the nearest one is named.
    """
    numbers = {name: number for number, name in enumerate(teacher.classes)}
    for name in names:
        if name not in numbers:
            raise ValueError(f"{teacher.name} knows no class {name!r}{near(name, teacher.classes)}")
    return torch.tensor([numbers[name] for name in names]).repeat(each)


def sample_classes(
    teacher: Classifier, count: int, apart_from: Sequence[str] = (), seed: int = 0
) -> list[str]:
    """`count` of the teacher's classes at random, none of `apart_from`; all where these are fewer."""
    order = torch.randperm(len(teacher.classes), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [teacher.classes[number] for number in order]
    return [name for name in names if name not in apart_from][:count]


def work(profile: Profile, teacher: Classifier) -> tuple[float, float]:
    """Floating-point operations of Table 6 by the profile's numbers: (synthesis, distillation)."""
    chosen, plan = profile.imagenet, profile.imagenet.inversion.plan(teacher.size)
    synthesis = chosen.transfer_images * inversion_flops(teacher, plan)
    return synthesis, chosen.transfer_epochs * chosen.transfer_images * distillation_flops(teacher, teacher)


# ---- real images -----------------------------------------------------------------------------------


def test_set(profile: Profile, model: Classifier, count: int = 5000) -> Dataset | None:
    """Real images to test a network on: `count` of the user's folder, None without one.

    For a small network those of the profile's data set.
    """
    if model.size < SMALL:
        return load_dataset(profile.dataset, "test")
    return of_folder(profile.imagenet.folder, model, count) if profile.imagenet.folder else None


def photographs(profile: Profile, model: Classifier) -> tuple[Tensor, list[str]]:
    """Real images to try a network on, uint8 at its size, and what they show.

    The user's folder where there is one, else scikit-learn's two photographs; for a small network the
    first test image of every class.
    """
    data = test_set(profile, model, count=1000)
    if data is None:
        return torch.cat([photograph(file, model.size) for file in PHOTOGRAPHS]), list(PHOTOGRAPHS.values())
    if model.size < SMALL:
        data = data.take(torch.stack([data.labels.eq(n).nonzero()[0, 0] for n in range(len(data.classes))]))
    return data.images, [data.classes[number] for number in data.labels]


def photograph(file: str, size: int) -> Tensor:
    """The middle square of one of scikit-learn's photographs, uint8 (1, 3, size, size)."""
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
    """`count` images at random from an ImageFolder: one folder a class, named as `labels_of_folders` says.

    Raises:
        ValueError: no such folder, or its folders are not the model's classes.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    if not Path(folder).is_dir():
        raise ValueError(f"imagenet.folder={folder!r} is no folder")
    numbered = labels_of_folders(folder, model)
    data = ImageFolder(folder)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count].tolist()
    images, numbers = [], []
    for index in order:
        image, number = data[index]
        image = resize(image.convert("RGB" if model.channels == 3 else "L"), round(model.size * 256 / 224))
        images.append(pil_to_tensor(center_crop(image, [model.size] * 2)))
        numbers.append(numbered[data.classes[number]])
    return Dataset("imagenet", "test", torch.stack(images), torch.tensor(numbers), model.classes)
