"""The scenarios and rows of Table 7: what is remembered of the old classes while new ones are learnt.

All methods of a scenario begin with the same extended network and make the same updates; they differ by what
stands for the lost images, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from dinv.continual import ContinualSettings, JointAccuracy, extend, renumbered
from dinv.data import DATASETS, Dataset, load_dataset, to_rgb
from dinv.experiments.device import device
from dinv.experiments.settings import Profile
from dinv.experiments.stages import joint_accuracy, learn, stage_seed, train_network
from dinv.models import Classifier, create_model, load_model, shipped_models


# ---- scenarios -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scenario:
    """Images of the old and of the new classes, labels from 0; `old_train` is for the oracles alone."""

    old_train: Dataset | None
    old_test: Dataset
    new_train: Dataset
    new_test: Dataset


def scenario(profile: Profile, counts: tuple[int, ...], step: int = 0) -> Scenario:
    """One step of a split of the profile's data set.

    Args:
        counts: classes that the teacher knows, then those that join at every step; (6, 2, 2) has two steps.
        step: which, from 0. The one after the last adds the classes of another kind.
    """
    train, test = (load_dataset(profile.dataset, split, device()) for split in ("train", "test"))
    known = sum(counts[: step + 1])
    if step == len(counts) - 1:
        new = [new_domain(profile.continual.domain, split) for split in ("train", "test")]
    else:
        new = [part_of(data, known, counts[step + 1]) for data in (train, test)]
    return Scenario(part_of(train, 0, known), part_of(test, 0, known), *new)


def new_domain(name: str, split: str) -> Dataset:
    """Ten new classes of another kind: "mnist" in three channels at 32 pixels, or "negative digits".

    Raises:
        ValueError: another name.
    """
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
    part = data.take((data.labels >= first) & (data.labels < first + count))
    return Dataset(data.name, data.split, part.images, part.labels - first, names)


def teacher_of_part(profile: Profile, count: int) -> Classifier:
    """A network of the teacher's kind that has seen the first `count` classes alone, frozen.

    As shipped, or trained by a cached stage where the profile says `retrain` or no weights are shipped.
    """
    name = f"{profile.teacher}-{count}-classes"
    if name in shipped_models() and not profile.retrain:
        return load_model(name).to(device())
    return trained_on_part(profile, count)[0]


def trained_on_part(profile: Profile, count: int) -> tuple[Classifier, list[dict[str, float]]]:
    """Train that network from scratch, or find it trained: (network, history)."""
    epochs, settings = profile.continual.epochs, profile.teacher_training
    settings = replace(settings, epochs=epochs, low_res_epochs=min(settings.low_res_epochs, epochs // 2))
    seed, classes = stage_seed(0, f"{profile.teacher}-{count}"), DATASETS[profile.dataset][:count]
    model = create_model(profile.teacher, profile.dataset, seed=seed, classes=classes).to(device())
    data = part_of(load_dataset(profile.dataset, "train", device()), 0, count)
    return model, train_network(model, data, settings, seed=seed)


# ---- learning --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Increment:
    """A network after a step.

    Attributes:
        network: frozen; knows the old and the new classes.
        accuracy: on the whole test sets of both.
        history: of the loss, see `continual.learn`.
    """

    network: Classifier
    accuracy: JointAccuracy
    history: list[dict[str, float]]


def learn_increment(
    old: Classifier,
    data: Scenario,
    settings: ContinualSettings,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
) -> Increment:
    """Extend `old` by the new classes and learn them by a cached stage.

    Args:
        images, labels: what stands for the lost images, as for `continual.learn`.
        seed: of the new rows of the head and of all draws; with the number of old classes.
    """
    seed = stage_seed(seed, f"extend-{len(old.classes)}")
    network = extend(old, data.new_train.classes, seed=seed)
    new = renumbered(data.new_train, network)
    history = learn(old, network, new, settings, images=images, labels=labels, seed=seed)
    tests = [renumbered(part, network) for part in (data.old_test, data.new_test)]
    return Increment(network, joint_accuracy(network, *tests, len(old.classes)), history)


def sequence(
    profile: Profile, counts: tuple[int, ...], step: Callable[[Classifier, Scenario], Increment]
) -> list[Increment]:
    """The steps of a split one after the other, then the classes of another kind.

    Args:
        step: one increment of a network; it must invert the network that it is given.
    """
    network, increments = teacher_of_part(profile, counts[0]), []
    for number in range(len(counts)):
        increments.append(step(network, scenario(profile, counts, number)))
        network = increments[-1].network
    return increments
