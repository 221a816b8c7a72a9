"""The methods of `dinv` as cached stages, with the names and signatures that they have there.

A network that is trained in place is frozen afterwards. Keys are made of all that is handed in: see `cache`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from dinv import continual, distillation, generator, pool, training
from dinv.continual import ContinualSettings
from dinv.data import Dataset, load_dataset
from dinv.distillation import DistillationResult, DistillationSettings, DistillStep, Source
from dinv.experiments.cache import stage
from dinv.experiments.device import device
from dinv.experiments.settings import Profile
from dinv.files import NO_CHECKPOINT
from dinv.models import NETWORKS, Classifier, create_model, load_model, shipped_models
from dinv.training import TrainingSettings

EVAL_IMAGES = 2000  # test images for the curves; the tables take them all


def stage_seed(seed: int, name: str) -> int:
    """A seed of its own for every kind of work, from the run's seed and a name."""
    digest = hashlib.sha256(f"{name}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ---- networks --------------------------------------------------------------------------------------
@dataclass
class _Trained:
    state: dict[str, Tensor]
    history: list[dict[str, float]]
    seconds: float = 0.0


def train_network(
    model: Classifier, data: Dataset, settings: TrainingSettings, *, seed: int = 0
) -> list[dict[str, float]]:
    """`training.train` as a stage: one record per epoch."""

    @stage("network", version=1)
    def train(model, data, settings, seed, checkpoint=NO_CHECKPOINT) -> _Trained:
        history = training.train(model, data, settings, seed=seed, checkpoint=checkpoint)
        return _Trained(model.state_dict(), history)

    return _finished(model, train(model, data, settings, seed))


def network(profile: Profile, role: str, seed: int = 0) -> Classifier:
    """The profile's "teacher" or "verifier", frozen: as shipped, or trained by a stage.

    It is trained where the profile says `retrain` and where no weights are shipped.
    """
    name = getattr(profile, role)
    if name in shipped_models() and not profile.retrain:
        return load_model(name).to(device())
    return trained(profile, role, seed)[0]


def trained(profile: Profile, role: str, seed: int = 0) -> tuple[Classifier, list[dict[str, float]]]:
    """Train the profile's teacher or verifier from scratch, or find it trained: (network, history)."""
    name = getattr(profile, role)
    seed = stage_seed(seed, name)
    model = create_model(name, profile.dataset, seed=seed).to(device())
    data = load_dataset(profile.dataset, "train", device())
    return model, train_network(model, data, getattr(profile, f"{role}_training"), seed=seed)


def _finished(model: Classifier, result: Any) -> list[dict[str, float]]:
    model.load_state_dict(result.state)
    model.freeze()
    return result.history


@dataclass
class _Score:
    percent: float


@stage("accuracy", version=1)
def _score(model: Classifier, data: Dataset) -> _Score:
    return _Score(training.accuracy(model, data.images, data.labels))


def accuracy(model: Classifier, data: Dataset) -> float:
    """`training.accuracy` on a whole data set, percent, as a stage: a table asks for dozens of them."""
    return _score(model, data).percent


joint_accuracy = stage("accuracy", version=1)(continual.joint_accuracy)


# ---- images ----------------------------------------------------------------------------------------


# The same seed starts from the same noise, whatever the objective.
synthesize = stage("pool", version=1)(pool.synthesize)
synthesize_from = stage("pool", version=1)(generator.synthesize_from)


# ---- students --------------------------------------------------------------------------------------
def networks_of(profile: Profile, pair: str) -> tuple[Classifier, str]:
    """A column of Table 1, such as "resnet_small->resnet_tiny": the teacher, frozen, and a student's name.

    A teacher that is neither the profile's teacher nor its verifier is shipped, or trained as its teacher is.

    Raises:
        ValueError: it is no pair of networks.
    """
    name, _, student = pair.partition("->")
    if not {name, student} <= set(NETWORKS):
        raise ValueError(f"pair {pair!r} must read TEACHER->STUDENT, each one of {', '.join(NETWORKS)}")
    role = "verifier" if name == profile.verifier else "teacher"
    return network(replace(profile, **{role: name}), role), student


def fresh_student(profile: Profile, architecture: str, seed: int) -> Classifier:
    """An untrained network of the profile's classes: for all methods of a column the same."""
    return create_model(architecture, profile.dataset, seed=stage_seed(seed, architecture)).to(device())


@dataclass
class Distilled(DistillationResult):
    """A `DistillationResult` with the student's weights and the seconds of the stage, all in all."""

    state: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def distill(
    teacher: Classifier,
    student: Classifier,
    source: Source | Tensor,
    settings: DistillationSettings,
    *,
    seed: int = 0,
    eval_data: Dataset | None = None,
    eval_every: int = 1,
    step: DistillStep | None = None,
) -> Distilled:
    """`distillation.distill` as a stage. All draws depend on `seed` and the student's name.

    Args:
        eval_data: real images for Figure 4: after every `eval_every` rounds the accuracy on the first
            `EVAL_IMAGES` of them goes into the history as "real". Nothing follows from it.
        step: to use again what is compiled; it changes no result, and is not part of the key.
    """

    @stage("student", version=1)
    def run(teacher, student, source, settings, seed, data, every, checkpoint=NO_CHECKPOINT) -> Distilled:
        def watch(number: int, model: Classifier) -> dict[str, float]:
            if data is None or number % every:
                return {}
            return {"real": training.accuracy(model, data.images[:EVAL_IMAGES], data.labels[:EVAL_IMAGES])}

        options = {"watch": watch, "step": step, "checkpoint": checkpoint}
        seed = stage_seed(seed, student.name)
        result = distillation.distill(teacher, student, source, settings, seed=seed, **options)
        return Distilled(result.history, result.images, result.compile_seconds, student.state_dict())

    result = run(teacher, student, source, settings, seed, eval_data, eval_every)
    _finished(student, result)
    return result


def learn(
    old: Classifier,
    network: Classifier,
    new: Dataset,
    settings: ContinualSettings,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
) -> list[dict[str, float]]:
    """`continual.learn` as a stage: the records of its history."""

    @stage("extended", version=1)
    def run(old, network, new, settings, images, labels, seed, checkpoint=NO_CHECKPOINT) -> _Trained:
        options = {"images": images, "labels": labels, "seed": seed, "checkpoint": checkpoint}
        history = continual.learn(old, network, new, settings, **options)
        return _Trained(network.state_dict(), history)

    return _finished(network, run(old, network, new, settings, images, labels, seed))
