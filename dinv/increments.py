"""The rows of Table 7: what is remembered of the old classes while new ones are learnt.

All rows of a scenario begin with the same extended network and make the same updates; they differ by what
stands for the lost images, and by nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinv import chapters, continual, rows
from dinv.chapters import stage_seed
from dinv.continual import ContinualSettings, Mixture
from dinv.datasets import DATASETS, Dataset, load_dataset, to_rgb
from dinv.distillation import PixelSource
from dinv.metrics import accuracy
from dinv.models import Classifier, create_model, load_model, shipped_models
from dinv.runs import Result, Run
from dinv.store import sha256_tensors, stored

BARE = ("fine-tuning", "lwf.mc")  # nothing stands for the lost images
DATA_FREE = ("deepinversion", "adi")
ORACLES = ("oracle distillation", "oracle classification")  # the lost images themselves
ROWS = BARE + DATA_FREE + ORACLES
REMEDY = "local cross-entropy and features"  # against classes that are alike, on DeepInversion's images


# ---- scenarios -------------------------------------------------------------------------------------


def new_domain(run: Run, split: str) -> Dataset:
    """The ten new classes of another kind, in the teacher's size: digits in three channels, or negatives."""
    name = run.profile.continual.domain
    if name == "negative digits":
        data = load_dataset("digits", split)
        images, kind = 255 - data.images, "negative"
    elif name == "mnist":
        data = to_rgb(load_dataset("mnist", split), 32)
        images, kind = data.images, "digit"
    else:
        raise ValueError(f"unknown domain {name!r}: choose mnist or negative digits")
    return Dataset(name, split, images, data.labels, tuple(f"{kind} {label}" for label in data.classes))


def part_of(data: Dataset, first: int, count: int) -> Dataset:
    """`count` classes of a data set from number `first` on, with labels from 0."""
    names = data.classes[first : first + count]
    part = data.of_classes(names)
    return Dataset(data.name, data.split, part.images, part.labels - first, names)


def name_of_part(run: Run, count: int) -> str:
    """Of the network that knows the first `count` classes, among the stages and the shipped networks."""
    return f"{run.profile.teacher}-{count}-classes"


def teacher_of_part(run: Run, count: int) -> Classifier:
    """A network of the profile's teacher's kind that has seen the first `count` classes alone, frozen.

    As shipped, or trained by a cached stage where the profile says `retrain` or no weights are shipped.
    """
    name = name_of_part(run, count)
    if name in shipped_models() and not run.profile.retrain:
        return load_model(name).to(chapters.device())
    return trained_on_part(run, count)[0]


def trained_on_part(run: Run, count: int) -> tuple[Classifier, Result]:
    """Train that network from scratch, or find it trained: a cached stage."""
    profile = run.profile
    settings = dataclasses.replace(
        chapters.training_settings(profile, "teacher"), epochs=profile.continual.epochs,
        small_epochs=min(profile.teacher_training.small_epochs, profile.continual.epochs // 2),
    )  # fmt: skip
    classes = DATASETS[profile.dataset][:count]
    seed = stage_seed(0, f"{profile.teacher}-{count}")
    model = create_model(profile.teacher, profile.dataset, seed=seed, classes=classes).to(chapters.device())

    def data() -> Dataset:
        return part_of(load_dataset(profile.dataset, "train", chapters.device()), 0, count)

    name = name_of_part(run, count)
    return chapters.supervised(run, name, model, data, settings, seed, classes=list(classes))


def scenario(run: Run, counts: tuple[int, ...], step: int = 0) -> dict[str, Dataset]:
    """A step of a split of the profile's data set, as `step` of this module takes it.

    Args:
        counts: classes the teacher knows, then those that join at every step; (6, 2, 2) has two steps.
        step: which, from 0. The one after the last adds the classes of another kind.
    """
    data = {split: load_dataset(run.profile.dataset, split, chapters.device()) for split in ("train", "test")}
    known = sum(counts[: step + 1])
    parts = {f"old {split}": part_of(whole, 0, known) for split, whole in data.items()}
    if step == len(counts) - 1:
        return parts | {f"new {split}": new_domain(run, split) for split in data}
    return parts | {f"new {split}": part_of(whole, known, counts[step + 1]) for split, whole in data.items()}


# ---- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Increment:
    """One row's network after a step.

    Attributes:
        network: frozen; knows the old and the new classes.
        mixture: its accuracies on the whole test sets of both.
        forgotten: points of accuracy lost on the old classes, against the old network.
        history: of the loss, see `continual.learn`.
        seconds: of learning, and of synthesis where there is one.
    """

    network: Classifier
    mixture: Mixture
    forgotten: float
    history: list[dict[str, float]]
    seconds: float


def settings_of(run: Run, row: str) -> ContinualSettings:
    """The profile's settings with a row's terms."""
    chosen, images = run.profile.continual, run.profile.teacher_training
    settings = ContinualSettings(
        updates=chosen.updates, batch=chosen.batch, rate=chosen.rate, pad=images.pad, flip=images.flip
    )
    if row in ("fine-tuning", "oracle classification"):
        return dataclasses.replace(settings, keep=0.0)
    if row == REMEDY:
        return dataclasses.replace(settings, local=True, features=chosen.features)
    return settings


def inverted(run: Run, old: Classifier, seed: int) -> tuple[Tensor, float]:
    """DeepInversion's images of the old network's classes, uint8, and their seconds: a cached stage."""
    made, result = chapters.pool(
        run, f"old-{len(old.classes)}-classes", old, rows.objective(run.profile, "deepinversion"),
        seed=seed, images=run.profile.continual.images, settings=rows.inversion_settings(run.profile),
    )  # fmt: skip
    return made.images, result.seconds


def adaptive(
    run: Run, old: Classifier, network: Classifier, plain: Tensor, seed: int
) -> tuple[Tensor, float]:
    """ADI's images: the first half of DeepInversion's, then ones over which `network` has become unsure.

    The competition is with the network extended on DeepInversion's images, by what it still says of the old
    classes.
    """
    profile = run.profile
    batch = min(profile.inversion.batch, len(plain) // 2)
    source = PixelSource(
        old, rows.objective(profile, "deepinversion"), rows.inversion_settings(profile), batch=batch,
        seed=seed, first=len(plain) // batch, competition=profile.distillation.competition,
    )  # fmt: skip
    rounds = len(plain) // 2 // batch
    made, result = chapters.generated(
        run, f"old-adi-{len(old.classes)}-classes", source, rounds, seed,
        student=continual.old_part(network, len(old.classes)),
    )  # fmt: skip
    return torch.cat([plain[: len(plain) - len(made)], made.images]), result.seconds


def step(
    run: Run, row: str, old: Classifier, data: dict[str, Dataset], seed: int, before: float
) -> Increment:
    """One row of one step: extend `old` by the new classes and learn them, or find it done.

    Args:
        data: "new train", "new test" and "old test", labels from 0 in their own classes; "old train" too,
            for the oracles alone.
        before: accuracy of the old network on "old test", in percent.
    """
    spent, images, labels = 0.0, None, None
    if row in (*DATA_FREE, REMEDY):
        images, spent = inverted(run, old, seed)
    if row == "adi":
        network = step(run, "deepinversion", old, data, seed, before).network
        images, more = adaptive(run, old, network, images, seed)
        spent += more
    if row in ORACLES:
        images = data["old train"].images
        labels = data["old train"].labels if row == "oracle classification" else None
    draws = stage_seed(seed, f"extend-{len(old.classes)}")
    network = continual.extend(old, data["new train"].classes, torch.Generator().manual_seed(draws))
    new = continual.renumbered(data["new train"], network)
    settings = settings_of(run, row)
    config: dict[str, Any] = {
        "row": row, "seed": draws, "settings": dataclasses.asdict(settings),
        "new": sha256_tensors(stored({"images": new.images, "labels": new.labels}), ""),
        "old": sha256_tensors(stored({"images": images}), "") if images is not None else None,
    }  # fmt: skip

    def make(checkpoint):
        generator = torch.Generator().manual_seed(draws)
        history = continual.learn(
            old, network, new, settings, generator, images=images, labels=labels, checkpoint=checkpoint
        )
        return network.state_dict(), {"history": history}

    name = f"{row.replace(' ', '-')}-{len(old.classes)}-and-{len(new.classes) - len(old.classes)}-seed{seed}"
    result = run.stage("extended", name, config, make, [chapters.digest(old)], version=continual.VERSION)
    network.load_state_dict(result.tensors)
    network.freeze()
    tests = [continual.renumbered(data[name], network) for name in ("old test", "new test")]
    found = continual.mixture(network, *tests, len(old.classes))
    return Increment(network, found, before - found.old, result.meta["history"], spent + result.seconds)


def sequence(run: Run, row: str, counts: tuple[int, ...], seed: int) -> list[Increment]:
    """The steps of a split one after the other, then the classes of another kind; each inverts the last."""
    network = teacher_of_part(run, counts[0])
    data = scenario(run, counts)
    before = accuracy(network, data["old test"].images, data["old test"].labels)
    done: list[Increment] = []
    for number in range(len(counts)):
        if done:  # what was old and new there is old here
            sizes = [len(data[name]) for name in ("old test", "new test")]
            found = done[-1].mixture
            before = (found.old * sizes[0] + found.new * sizes[1]) / sum(sizes)
            data = scenario(run, counts, number)
        done.append(step(run, row, network, data, seed, before))
        network = done[-1].network
    return done
