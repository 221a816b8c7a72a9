"""Notebook 07: networks that others trained turn names of classes into images, and verify each other's.

teacher = imagenet.network(profile, profile.imagenet.teacher)
labels = imagenet.labels(teacher, profile.imagenet.classes)
pool = synthesize(Inverter(teacher, objective, profile.imagenet.inversion), labels, batch_size=len(labels))
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from dinv.compiling import distillation_flops, inversion_flops
from dinv.data import Dataset, load_dataset
from dinv.experiments import stages
from dinv.experiments.device import device
from dinv.experiments.profiles import load_profile
from dinv.experiments.settings import Imagenet, Profile
from dinv.inversion import check_labels
from dinv.models import Classifier, WeightsUnavailable, load_model, resized
from dinv.precision import settled

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
    """The numbers of these classes, `each` times in turn: a, b, c, a, b, c. Errors are `check_labels`'s."""
    return check_labels([*names] * each, teacher.classes)


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


def labels_of_names(names: Collection[str], model: Classifier, where: str) -> dict[str, int]:
    """Which of the model's classes each name is: of the folders in `where`, or in its list of labels.

    Some of the classes' own names, large or small, with spaces or underscores; or all numbers, from 0 or
    from 1, in the order of numbers (as text 10 comes before 2); or WordNet's ids, in their order, which is
    that of ImageNet's thousand classes, or some of these thousand.

    Raises:
        ValueError: they are none of these.
    """
    names, count = sorted(names), len(model.classes)
    for spelt in (str, lambda name: name.replace("_", " ").casefold()):
        numbers = {spelt(name): number for number, name in enumerate(model.classes)}
        unique = len(numbers) == count and len({spelt(name) for name in names}) == len(names)
        if names and unique and all(spelt(name) in numbers for name in names):
            return {name: numbers[spelt(name)] for name in names}
    advice = ""
    if names and all(re.fullmatch(r"n\d{8}", name) for name in names):
        if len(names) == count:
            return {name: number for number, name in enumerate(names)}
        known = _wordnet_ids() if count == 1000 else []
        if set(names) <= set(known):
            return {name: known.index(name) for name in names}
        if count == 1000 and not known:
            advice = ". Which of the thousand some of them are, only timm knows: pip install 'dinv[timm]'"
    if len(names) == count and all(re.fullmatch("[0-9]+", name) for name in names):
        names.sort(key=int)
        first = int(names[0])
        if first < 2 and [int(name) for name in names] == list(range(first, first + count)):
            return {name: number for number, name in enumerate(names)}
    if inner := [name for name in ("val", "test", "validation") if name in names]:
        advice = f". Is it {Path(where) / inner[0]}?"
    raise ValueError(
        f"{where} has {len(names)} classes: {_some(names)}; expected names of the {count} classes of "
        f"{model.name} ({_some(model.classes)}), the numbers 0 to {count - 1}, or WordNet's ids such as "
        f"n01440764{advice}"
    )


def _wordnet_ids() -> list[str]:
    """Those of ImageNet's thousand classes, in the order of the networks' outputs; none without timm."""
    if importlib.util.find_spec("timm") is None:
        return []
    return importlib.import_module("timm.data").ImageNetInfo().label_names()


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join([*names[:count], "..."] if len(names) > count else names) or "none"


def _samples(folder: Path, model: Classifier) -> list[tuple[str, int]]:
    """Every image in `folder` and its class: by its folder, or where there are none by a list beside it."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import is_image_file

    if not folder.is_dir():
        raise ValueError(f"imagenet.folder={str(folder)!r} is no folder")
    folders = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    images = [] if folders else sorted(path for path in folder.iterdir() if is_image_file(path.name))
    if not images:
        numbered = labels_of_names(folders, model, str(folder))
        data = ImageFolder(folder)
        return [(path, numbered[data.classes[number]]) for path, number in data.samples]
    for place in (folder, folder.parent):
        for path in sorted([*place.glob("*.txt"), *place.glob("*.csv")]):
            rows = [
                re.split(r"[\s,]+", line.strip()) for line in path.read_text("utf-8", "replace").splitlines()
            ]
            said = {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}
            if all(image.stem in said for image in images):
                said.pop("ImageId", None)  # the first line of Kaggle's list
                if all(name.isdecimal() for name in said.values()) and "0" not in said.values():
                    order = "numbers from 1 are the development kit's, which has an order of its own"
                    raise ValueError(f"{path}: {order}; expected WordNet's ids, names, or numbers from 0")
                numbered = labels_of_names(set(said.values()), model, str(path))
                return [(str(image), numbered[said[image.stem]]) for image in images]
    raise ValueError(
        f"{folder} has {len(images)} images ({_some([path.name for path in images], 2)}) and no folders; "
        "expected a folder for each class, or beside the images a .txt or .csv file with a line for each: "
        "its name and its class, such as LOC_val_solution.csv"
    )


@settled
def of_folder(folder: str, model: Classifier, count: int) -> Dataset:
    """`count` images at random from a folder with one folder for each class, or with images and a list.

    The labels are the model's outputs, whichever of the classes there are: see `labels_of_names`. A list is
    a .txt or .csv file, each line an image's name and its class.

    Raises:
        ValueError: no such folder, or its classes are not the model's.
    """
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    samples = _samples(Path(folder), model)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:count].tolist()
    images, numbers = [], []
    for path, number in (samples[index] for index in order):
        image = default_loader(path).convert("RGB" if model.channels == 3 else "L")
        images.append(
            pil_to_tensor(center_crop(resize(image, round(model.size * 256 / 224)), [model.size] * 2))
        )
        numbers.append(number)
    return Dataset("imagenet", "test", torch.stack(images), torch.tensor(numbers), model.classes)
