"""What several notebooks share: a profile's networks and pools as cached stages."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from IPython.display import Image
from matplotlib.figure import Figure
from torch import Tensor

from dinv import devices, distillation, figures, generator, inversion, training
from dinv.datasets import Dataset, load_dataset
from dinv.distillation import DistillationSettings, PixelSource, Source
from dinv.generator import GeneratorSettings, GeneratorSource
from dinv.inversion import InversionSettings, balanced_labels
from dinv.models import Classifier, create_model, load_model, shipped_models
from dinv.objectives import Objective
from dinv.pool import Pool, synthesize
from dinv.profiles import SEEDED, Profile, load_profile
from dinv.runs import Result, Run
from dinv.store import sha256_tensors, stored, under
from dinv.training import TrainingSettings


def device() -> torch.device:
    """What DINV_DEVICE and the profile of the chapter say: CUDA where it is, else the CPU; see `devices`."""
    return torch.device(devices.current())


def stage_seed(seed: int, name: str) -> int:
    """A seed of its own for every stage, from the run's seed and the stage's name."""
    digest = hashlib.sha256(f"{name}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def digest(model: Classifier) -> str:
    """SHA-256 over a network's parameters and buffers: two with the same one answer alike."""
    return sha256_tensors(stored(model.state_dict()), model.name)


def training_settings(profile: Profile, role: str) -> TrainingSettings:
    """The profile's settings for `role`, "teacher" or "judge"."""
    return TrainingSettings(**dataclasses.asdict(getattr(profile, f"{role}_training")))


def inversion_settings(profile: Profile, **changes: Any) -> InversionSettings:
    """The profile's settings of the optimiser, with `changes`."""
    chosen = dataclasses.asdict(profile.inversion)
    del chosen["batch"], chosen["images"]
    return InversionSettings(**{**chosen, **changes})


def network(run: Run, role: str, seed: int = 0) -> Classifier:
    """The profile's teacher or judge, frozen: as shipped, or trained by a cached stage.

    It is trained where the profile says `retrain` and where no weights are shipped.
    """
    profile = run.profile
    name = getattr(profile, role)
    if name in shipped_models() and not profile.retrain:
        return load_model(name).to(device())
    model, _ = trained(run, role, seed)
    return model


def trained(run: Run, role: str, seed: int = 0) -> tuple[Classifier, Result]:
    """Train the profile's teacher or judge from scratch, or find it trained: a cached stage."""
    profile = run.profile
    name = getattr(profile, role)
    model = create_model(name, profile.dataset, seed=stage_seed(seed, name)).to(device())

    def data() -> Dataset:
        return load_dataset(profile.dataset, "train", device())

    return supervised(run, name, model, data, training_settings(profile, role), stage_seed(seed, name))


def supervised(
    run: Run,
    name: str,
    model: Classifier,
    data: Callable[[], Dataset],
    settings: TrainingSettings,
    seed: int,
    **more: Any,
) -> tuple[Classifier, Result]:
    """Train a fresh `model` in place, and freeze it: a cached and resumable stage.

    Args:
        data: called for the images where the stage is not found.
        more: what decides the result besides the network's name, the data set, the settings and the seed.
    """

    def make(checkpoint):
        draws = torch.Generator().manual_seed(seed)
        history = training.train(model, data(), settings, draws, checkpoint)
        return model.state_dict(), {"history": history}

    config = {"network": model.name, "dataset": run.profile.dataset, "seed": seed}
    config |= more | dataclasses.asdict(settings)
    result = run.stage("network", name, config, make, version=training.VERSION)
    model.load_state_dict(result.tensors)
    return model.freeze(), result


def pool(
    run: Run,
    name: str,
    teacher: Classifier,
    objective: Objective,
    *,
    seed: int = 0,
    images: int | None = None,
    batch: int | None = None,
    settings: InversionSettings | None = None,
    snapshots: tuple[int, ...] = (),
    labels: Tensor | None = None,
    at_once: int = 0,
) -> tuple[Pool, Result]:
    """A pool of inverted images as a cached and resumable stage.

    Noise, jitter and flips depend on `seed` alone, not on `name`: two objectives with the same seed
    start from the same noise and can be laid side by side.

    Args:
        images, batch, settings: the profile's, where not given.
        labels: the wanted classes; by default every class as often.
        at_once: as for `invert`.
    """
    profile = run.profile
    given: dict[str, Any] = {"at_once": at_once} if at_once else {}
    if labels is None:
        labels = balanced_labels(images or profile.inversion.images, len(teacher.classes))
    else:
        given["labels"] = labels.tolist()
    batch = min(batch or profile.inversion.batch, len(labels))
    settings = settings or inversion_settings(profile)
    config: Mapping[str, Any] = {
        "objective": objective.config(),
        "settings": settings.config(),
        "images": len(labels),
        "batch": batch,
        "seed": seed,
        "snapshots": list(snapshots),
    } | given

    def make(checkpoint):
        made = synthesize(
            teacher, labels, objective, settings,
            batch=batch, seed=seed, snapshots=snapshots, at_once=at_once, checkpoint=checkpoint,
        )  # fmt: skip
        return made.tensors(), made.meta()

    result = run.stage(
        "pool", f"{name}-seed{seed}", config, make, [digest(teacher)], version=inversion.VERSION
    )
    return Pool.of(result.tensors, result.meta), result


def generated(
    run: Run,
    name: str,
    source: GeneratorSource | PixelSource,
    rounds: int,
    seed: int = 0,
    student: Classifier | None = None,
) -> tuple[Pool, Result]:
    """A pool by a source, as a cached and resumable stage; meta: `seconds` a batch.

    Args:
        student: whom the source competes with, where it does; stays as it is.
    """
    competitor = source.teacher if student is None else student

    def make(checkpoint):
        images, seconds = generator.synthesize(source, rounds, competitor, checkpoint)
        return {"images": images}, {"seconds": seconds}

    config = {"source": source.config(), "rounds": rounds}
    inputs = [digest(network) for network in (source.teacher, student) if network is not None]
    result = run.stage("pool", f"{name}-seed{seed}", config, make, inputs, version=generator.VERSION)
    labels = torch.cat([source.labels(number) for number in range(rounds)])
    return Pool(result.tensors["images"], labels), result


# ---- students --------------------------------------------------------------------------------------


def pair(run: Run, text: str) -> tuple[Classifier, str]:
    """A column of Table 1, such as "resnet_small->resnet_tiny": the teacher, frozen, and a student's name.

    Raises:
        ValueError: its teacher is neither the profile's teacher nor its judge.
    """
    name, _, student = text.partition("->")
    roles = {getattr(run.profile, role): role for role in ("judge", "teacher")}
    if name not in roles or not student:
        raise ValueError(f"pair {text!r} must read TEACHER->STUDENT, the teacher one of {', '.join(roles)}")
    return network(run, roles[name]), student


def distillation_settings(profile: Profile, **changes: Any) -> DistillationSettings:
    """The profile's settings of a distillation, with `changes`."""
    chosen = dataclasses.asdict(profile.distillation)
    names = [field.name for field in dataclasses.fields(DistillationSettings)]
    taken = {name: chosen[name] for name in names if name in chosen}
    images = profile.teacher_training
    taken |= {"pad": images.pad, "flip": images.flip, "compile": _always_or_never(profile)}
    return DistillationSettings(**{**taken, **changes})


def generator_settings(profile: Profile, **changes: Any) -> GeneratorSettings:
    """The profile's settings of a generator, with `changes`."""
    chosen = {name: getattr(profile.generator, name) for name in ("steps", "rate", "width", "meta_rate")}
    inverted = profile.inversion
    chosen |= {"jitter": inverted.jitter, "flip": inverted.flip, "compile": _always_or_never(profile)}
    return GeneratorSettings(**{**chosen, **changes})


def _always_or_never(profile: Profile) -> str:
    return "never" if profile.inversion.compile == "never" else "always"


def student(
    run: Run,
    name: str,
    teacher: Classifier,
    architecture: str,
    images: Tensor,
    *,
    seed: int = 0,
    source: Source | None = None,
    settings: DistillationSettings | None = None,
    watch: Callable[[int, Classifier], dict[str, float]] | None = None,
    watch_every: int = 1,
) -> tuple[Classifier, Result]:
    """A student distilled from `teacher` by a cached and resumable stage.

    Its first weights, its draws and its crops depend on `seed` and `architecture`, not on `name`: two rows
    of a table differ by their images and by nothing else. The result's meta has the `history`, its tensors
    the images `made` on the way.

    Args:
        images, source, settings, watch: as for `distillation.distill`.
        watch_every: `watch` is called at every so many rounds.
    """
    settings = settings or distillation_settings(run.profile)
    first = stage_seed(seed, architecture)
    model = create_model(architecture, run.profile.dataset, seed=first).to(device())
    config = {
        "student": architecture,
        "dataset": run.profile.dataset,
        "seed": first,
        "settings": dataclasses.asdict(settings),
        "images": sha256_tensors(stored({"images": images}), ""),
        "source": source.config() if source is not None else None,
    }
    look = None
    if watch is not None:
        config["watch_every"] = watch_every  # what it saw is in the history

        def look(number: int, student: Classifier) -> dict[str, float]:
            return {} if number % watch_every else watch(number, student)

    def make(checkpoint):
        draws = torch.Generator().manual_seed(first)
        found = distillation.distill(
            teacher, model, images, settings, draws, source=source, watch=look, checkpoint=checkpoint
        )
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        return state | {"made": found.images}, {"history": found.history}

    result = run.stage(
        "student", f"{name}-seed{seed}", config, make, [digest(teacher)], version=distillation.VERSION
    )
    model.load_state_dict(under("model.", result.tensors))
    return model.freeze(), result


# ---- what a notebook opens with, and how it shows things -------------------------------------------


def start(
    chapter: str, profile: str = "auto", seeds: int = 0, overrides: Mapping[str, Any] | None = None
) -> Run:
    """Open a chapter: its profile with the notebook's parameters, and its account of results.

    Args:
        profile, seeds, overrides: the notebook's parameters cell; `seeds` 0 keeps the profile's number.
    """
    chosen = load_profile(profile, overrides)
    devices.begin(chosen.name)
    if seeds:
        longest = {part: dataclasses.replace(getattr(chosen, part), seeds=seeds) for part in SEEDED}
        chosen = dataclasses.replace(chosen, seeds=seeds, **longest)
    return Run(chapter, chosen)


def settings_table(profile: Profile, *parts: str) -> pd.DataFrame:
    """The profile's settings, the paper's, and what `paper` has where the paper is silent.

    Args:
        parts: keep these settings and groups of settings.
    """
    rows = [row for row in profile.table() if not parts or {row[0], row[0].partition(".")[0]} & set(parts)]
    columns = ["setting", f"{profile.name} profile", "the paper", "profile paper where the paper is silent"]
    pd.set_option("display.max_colwidth", None)  # a long setting is shown whole
    return pd.DataFrame(rows, columns=columns).set_index("setting")


def show(run: Run, name: str, figure: Figure) -> Image:
    """Keep a figure as `figures/<profile>/<name>.png` and return it for display.

    What is displayed lies in the notebook: as JPEG where that is smaller, as it is for images of grain.
    """
    data = figures.png(figure)
    (run.folder / f"{name}.png").write_bytes(data)
    return Image(data=min(data, figures.jpeg(data), key=len))
