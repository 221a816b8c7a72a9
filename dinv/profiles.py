"""The four profiles: the same experiments with other numbers.

`paper` holds the paper's settings; where the paper is silent the comment says so. The other three shorten
them, each number beside the paper's in `Profile.table()`, which the notebooks print.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PROFILES = ("smoke", "cpu", "gpu", "paper")
# parts with seeds of their own
SEEDED = ("octaves", "distillation", "generator", "pruning", "continual", "imagenet")


@dataclass(frozen=True)
class Training:
    """A supervised training from scratch; see `training.TrainingSettings`."""

    epochs: int
    batch: int
    rate: float
    decay: float
    small_epochs: int
    pad: int
    flip: bool


@dataclass(frozen=True)
class Inversion:
    """The optimiser of the pixels; see `inversion.InversionSettings`."""

    steps: int = 2000
    rate: float = 0.05
    schedule: str = "constant"
    jitter: int = 2
    flip: bool = False  # the paper flips on ImageNet only
    batch: int = 256
    images: int = 256_000  # of each kind and seed
    compile: str = "auto"


@dataclass(frozen=True)
class Weights:
    """The objective's weights."""

    tv: float = 2.5e-5
    l2: float = 3e-8  # [M]
    feature: float = 10.0
    feature_kl: float = 1.0  # ours: the paper knows only the l2 distance


@dataclass(frozen=True)
class Octaves:
    """Notebook 02's longer and smoother descent, all of it ours: Adam on octaves, see `descent.Descent`."""

    images: int = 256
    steps: int = 2000
    rate: float = 0.2
    octaves: int = 4
    chroma: float = 0.3
    betas: tuple[float, ...] = (0.5, 0.9)
    jitter: int = 2
    flip: bool = True
    tv: float = 0.03
    feature: float = 1.0
    seeds: int = 3


@dataclass(frozen=True)
class Sweep:
    """Notebook 02's comparisons: images of each variant, and what is varied."""

    images: int = 2560
    features: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0, 100.0)  # the paper searched {1, 5, 10, 100} [M]
    real: tuple[int, ...] = (10, 100, 1000)  # the paper: 100 (Table 8)
    batches: tuple[int, ...] = (16, 64, 256)
    bare: int = 2560  # images of the network without BatchNorm


@dataclass(frozen=True)
class Distillation:
    """Table 1: the columns, the pool, the updates; see `distillation.DistillationSettings`."""

    pairs: tuple[str, ...] = (
        "cifar_resnet34->cifar_resnet18", "cifar_vgg11->cifar_vgg11", "cifar_vgg11->cifar_resnet18",
    )  # fmt: skip
    first: int = 6656  # images of the first round: with a batch in every later one, 256,000 at the end
    rounds: int = 975  # 250 epochs of 195 updates, a new batch every 50
    updates: int = 50
    batch: int = 256
    rate: float = 0.1
    schedule: str = "steps"  # a tenth after every 100 epochs
    temperature: float = 3.0
    mix: bool = False  # blends of two images, see `distillation.mixed`; ours
    competition: float = 10.0  # [M]
    # The images of a student; notebooks 01 and 02 keep to one size and the paper's weight.
    stages: tuple[tuple[int, int], ...] = ((2000, 32),)  # (steps, size) of an inversion, from coarse to fine
    tv: float = 2.5e-5
    seeds: int = 3  # of notebooks 03 and 04, which take longest
    every: int = 25  # rounds between two measurements of Figure 4
    ablation: int = 1  # which pair the ablations take; ours


@dataclass(frozen=True)
class Generator:
    """The training-based row, all of it ours; see `generator.GeneratorSettings`."""

    rounds: int = 975
    updates: int = 50
    mix: bool = False  # its pool is renewed all the time
    images: int = 256  # a round
    steps: int = 10
    rate: float = 2e-3
    width: int = 64
    meta_rate: float = 0.5
    feature: float = 2.0
    competition: float = 2.0
    warmup: int = 100  # rounds before the student competes
    seeds: int = 3  # of this row of Table 1, and of notebook 08
    every: int = 25
    compare: int = 100  # rounds of notebook 08's comparison with the pixels
    pixels: int = 10  # batches of pixel inversion in that comparison, about as long


@dataclass(frozen=True)
class Pruning:
    """Tables 4, 5, 9 and 10; see `pruning.prune`. The paper prunes ResNet-50, and gives the ratios alone."""

    ratios: tuple[float, ...] = (0.2, 0.5)  # of the filters
    images: int = 4096  # on which importance is measured; ours, as all that follows
    step: float = 0.01
    updates: int = 5000  # of the distillation afterwards
    batch: int = 256
    rate: float = 0.02
    front: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7)  # Table 5
    faster: tuple[float, ...] = (0.2, 0.4, 0.6)  # shares of the latency that go in Table 9
    etas: tuple[float, ...] = (0.0, 0.003, 0.03, 0.3)  # Table 9, per millisecond of a batch of 64
    seeds: int = 3


@dataclass(frozen=True)
class Continual:
    """Table 7; see `continual.ContinualSettings`. The paper extends ImageNet by birds, and by flowers."""

    domain: str = "mnist"  # ten new classes of another kind
    splits: tuple[tuple[int, ...], ...] = ((5, 5), (6, 2, 2))  # of one data set: classes that are alike
    epochs: int = 60  # of the teachers that know a part of the classes
    images: int = 25_600  # inverted images of the old classes, each step; ours, as all that follows
    updates: int = 5000
    batch: int = 256
    rate: float = 0.02
    features: float = 30.0  # weight in the remedy: of 1, 3, 10, 30, 100 the best on training images
    seeds: int = 3


@dataclass(frozen=True)
class Imagenet:
    """Notebook 07; see `gallery`. Of a tuple of teachers the first whose weights are in reach is taken."""

    teacher: tuple[str, ...] = ("torchvision:resnet50", "package:efficientnet_lite0")
    judges: tuple[str, ...] = (
        "torchvision:resnet18", "torchvision:inception_v3", "torchvision:mobilenet_v2",
        "torchvision:vgg11", "package:efficientnet_lite1", "package:efficientnet_lite2",
    )  # fmt: skip
    classes: tuple[str, ...] = (
        "pizza", "daisy", "strawberry", "tiger", "brown bear", "goldfish",
        "monarch", "lemon", "peacock", "balloon", "volcano", "school bus",
    )  # fmt: skip
    each: int = 7  # images of a class: 84, as in the paper's fast schedule
    stages: tuple[tuple[int, int], ...] = ((2000, 112), (1000, 224))
    rate: float = 0.05
    octaves: int = 1
    chroma: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    schedule: str = "constant"
    jitter: int = 30
    flip: bool = True
    at_once: int = 0
    distance: str = "l2"
    feature: float = 0.01
    first: float = 10.0
    tv: float = 1e-4
    l2: float = 1e-2  # the paper used 0 as well
    competition: float = 0.2
    compare: tuple[tuple[int, int], ...] = ((2000, 112),)  # of the comparisons; ours
    transfer: int = 140_000  # images of Table 6, where there are photographs to test on; 0 leaves it open
    epochs: int = 90  # of its distillation; the paper had 250 as well
    folder: str = ""  # an ImageFolder of the user's: `./reproduce.sh --imagenet DIR`
    seeds: int = 3


@dataclass(frozen=True)
class Profile:
    """Everything a notebook may vary. Frozen: `load_profile(name, overrides)` makes variants."""

    name: str
    dataset: str
    teacher: str
    judge: str
    teacher_training: Training
    judge_training: Training
    retrain: bool  # train teacher and judge although weights are shipped
    seeds: int
    inversion: Inversion = field(default_factory=Inversion)
    weights: Weights = field(default_factory=Weights)
    octaves: Octaves = field(default_factory=Octaves)
    sweep: Sweep = field(default_factory=Sweep)
    distillation: Distillation = field(default_factory=Distillation)
    generator: Generator = field(default_factory=Generator)
    pruning: Pruning = field(default_factory=Pruning)
    continual: Continual = field(default_factory=Continual)
    imagenet: Imagenet = field(default_factory=Imagenet)

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows of text (setting, here, what the paper states with its mark, what `paper` has instead).

        The third is empty where the paper is silent, the fourth where it is not.
        """
        here, full = flat(self), flat(PAPER)
        rows = []
        for name, value in here.items():
            mark, chosen = STATED.get(name, ""), written(full[name])
            if name != "name":
                paper = (f"{chosen} [{mark}]", "") if mark else ("", chosen)
                rows.append((name, written(value), *paper))
        return rows


# What the paper states, by setting, and how well that is known: V confirmed in a second public source, S one
# secondary source, M recalled and not confirmed. On all other settings it is silent, as far as is known.
STATED = {
    "dataset": "V", "teacher": "V",
    "inversion.steps": "V", "inversion.rate": "V", "inversion.jitter": "V", "inversion.batch": "V",
    "inversion.images": "V", "weights.tv": "V", "weights.l2": "M", "weights.feature": "V",
    "distillation.pairs": "S", "distillation.rounds": "V", "distillation.updates": "V",
    "distillation.rate": "V",
    "distillation.schedule": "V", "distillation.temperature": "V", "distillation.competition": "M",
    "distillation.stages": "V", "distillation.tv": "V", "pruning.ratios": "S+M",
    "imagenet.each": "V", "imagenet.stages": "V", "imagenet.rate": "V", "imagenet.jitter": "S",
    "imagenet.flip": "S", "imagenet.feature": "S", "imagenet.first": "V", "imagenet.tv": "S",
    "imagenet.l2": "S", "imagenet.competition": "S", "imagenet.transfer": "V", "imagenet.epochs": "V",
}  # fmt: skip

# The paper does not describe the training of its CIFAR teachers: this is a common strong recipe.
LONG = Training(epochs=200, batch=128, rate=0.1, decay=5e-4, small_epochs=0, pad=4, flip=True)

PAPER = Profile(
    name="paper",
    dataset="cifar10",
    teacher="cifar_resnet34",
    judge="cifar_vgg11",
    teacher_training=LONG,
    judge_training=LONG,
    retrain=True,
    seeds=3,  # the paper gives single numbers
)

GPU = replace(
    PAPER,
    name="gpu",
    teacher_training=Training(60, 256, 0.2, 5e-4, 0, 4, True),
    judge_training=Training(60, 256, 0.2, 5e-4, 0, 4, True),
    inversion=Inversion(images=2560, schedule="cosine", steps=1000, compile="always"),
    octaves=Octaves(steps=1000),
    sweep=Sweep(images=1024, bare=1024),
    distillation=Distillation(
        first=2560, rounds=90, updates=200, schedule="linear", stages=((1000, 32),), every=5
    ),
    generator=Generator(rounds=400, updates=50, warmup=40, every=10, compare=100, pixels=8),
    pruning=Pruning(images=2048, step=0.02, updates=2000),
    continual=Continual(epochs=30, images=5120, updates=2000),
    imagenet=Imagenet(transfer=0, seeds=1),
)

CPU = replace(
    PAPER,
    name="cpu",
    teacher="resnet_small",
    judge="vgg_small",
    teacher_training=Training(30, 256, 0.2, 5e-4, 15, 4, True),
    judge_training=Training(18, 256, 0.2, 5e-4, 9, 4, True),
    retrain=False,
    inversion=Inversion(steps=80, rate=0.2, schedule="cosine", images=512, compile="always"),
    # The paper's 10 wants the paper's 2,000 steps: in 80 the teacher would not be satisfied any more.
    weights=Weights(feature=1.0, feature_kl=10.0),
    octaves=Octaves(images=128, steps=1000, seeds=1),
    sweep=Sweep(images=256, batches=(16, 256), bare=128),
    distillation=Distillation(
        pairs=("resnet_small->resnet_small", "resnet_small->resnet_tiny"),
        first=1024,
        rounds=7,
        updates=120,
        batch=128,
        rate=0.2,
        schedule="linear",
        mix=True,  # a few images have to last for many updates
        competition=1.0,  # the paper's ratio to the feature statistics
        # At one size, 160 steps leave the noise of the start where the teacher does not look: 43 % of an
        # image's energy lie above 0.35 cycles a pixel, of a real one's 3 %. Coarse to fine and with more
        # total variation 8 % do, and an image costs about a quarter. Notebook 04 draws the spectra.
        stages=((40, 8), (40, 16), (40, 32)),
        tv=0.03,
        seeds=1,
        every=1,
    ),
    generator=Generator(
        rounds=110, updates=22, steps=5, width=16, warmup=20, seeds=1, every=5, compare=40, pixels=5
    ),
    pruning=Pruning(
        images=256,
        step=0.05,
        updates=100,
        batch=128,
        front=(0.2, 0.5, 0.7),
        etas=(0.0, 0.01, 0.1),
        seeds=1,
    ),
    continual=Continual(epochs=12, images=512, updates=60, batch=128, seeds=1),
    imagenet=Imagenet(
        teacher=("package:efficientnet_lite0",),
        judges=("package:efficientnet_lite1", "package:efficientnet_lite2"),
        each=1,
        stages=((800, 112), (300, 224)),
        # On the pixels the same steps end in grain and false colours: see `descent`, and notebook 07.
        rate=0.4,
        octaves=5,
        chroma=0.3,
        betas=(0.5, 0.9),
        schedule="cosine",
        # Running variances between 0.05 and 566 leave the l2 distance to a few layers: see notebook 07.
        distance="kl",
        feature=1.0,
        tv=3e-3,  # with the paper's 1e-4 there is coloured grain on everything
        l2=1e-5,
        compare=((200, 112),),
        transfer=0,
        seeds=1,
    ),
)

SMOKE = replace(
    CPU,
    name="smoke",
    dataset="digits",
    teacher="resnet_digits",
    judge="vgg_digits",
    teacher_training=Training(8, 64, 0.1, 5e-4, 0, 1, False),
    judge_training=Training(8, 64, 0.1, 5e-4, 0, 1, False),
    retrain=True,
    seeds=2,
    inversion=Inversion(
        steps=200,
        rate=0.3,
        schedule="cosine",
        jitter=0,  # at 8x8 a shift by two pixels is a quarter of the digit
        flip=False,
        batch=64,
        images=128,
        compile="never",
    ),
    weights=Weights(feature=0.1, feature_kl=10.0),
    octaves=Octaves(
        images=40, steps=200, octaves=2, jitter=0, flip=False, tv=2.5e-5, feature=0.1, seeds=2
    ),
    sweep=Sweep(images=64, features=(0.0, 0.01, 0.1, 1.0), real=(10, 100, 500), batches=(16, 64), bare=64),
    distillation=Distillation(
        pairs=("resnet_digits->resnet_digits", "resnet_digits->vgg_digits"),
        first=64,
        rounds=5,
        updates=10,
        batch=64,
        schedule="linear",
        competition=0.1,
        stages=((200, 8),),
        seeds=2,
        every=1,
    ),
    generator=Generator(
        rounds=20,
        updates=5,
        images=64,
        steps=5,
        width=8,
        feature=0.1,
        competition=0.1,
        warmup=4,
        seeds=2,
        every=5,
        compare=10,
        pixels=2,
    ),
    pruning=Pruning(
        images=128,
        step=0.05,
        updates=30,
        batch=64,
        front=(0.2, 0.5),
        faster=(0.05,),  # of 8x8 images little time goes into what a filter less makes less
        etas=(0.0, 0.1),
        seeds=2,
    ),
    continual=Continual(domain="negative digits", epochs=8, images=128, updates=60, batch=64, seeds=2),
    imagenet=Imagenet(
        teacher=("resnet_digits",),
        judges=("vgg_digits",),
        classes=("0", "1", "2", "3", "4", "5"),
        each=2,
        stages=((60, 4), (120, 8)),
        rate=0.3,
        schedule="cosine",
        jitter=0,
        flip=False,
        at_once=4,
        distance="kl",
        feature=10.0,
        tv=2.5e-5,
        l2=3e-8,
        compare=((100, 8),),
        transfer=128,
        epochs=10,
        seeds=2,
    ),
)

_ALL = {"smoke": SMOKE, "cpu": CPU, "gpu": GPU, "paper": PAPER}


def load_profile(name: str = "auto", overrides: Mapping[str, Any] | None = None) -> Profile:
    """The profile of this name, with single settings replaced.

    Args:
        name: smoke, cpu, gpu or paper; "auto" is the environment variable DINV_PROFILE where it is
            set, else gpu where CUDA is and DINV_DEVICE is not cpu, else cpu.
        overrides: settings by dotted name, as `--set` gives them: {"inversion.steps": 400}. Text is
            read as a Python literal of the setting's type.

    Raises:
        ValueError: unknown profile or setting (the message names the nearest and lists all), or a
            value of the wrong type or out of range.
    """
    if name == "auto":
        name = os.environ.get("DINV_PROFILE") or ("gpu" if _cuda() else "cpu")
    if name not in _ALL:
        raise ValueError(f"unknown profile {name!r}{_near(name, _ALL)} The profiles are {', '.join(_ALL)}")
    profile = _ALL[name]
    for key, value in (overrides or {}).items():
        profile = _override(profile, key, value)
    return profile


def as_dict(profile: Any) -> dict[str, Any]:
    """A profile, or a part of one, as a plain nested dictionary."""
    return dataclasses.asdict(profile)


def flat(profile: Profile) -> dict[str, Any]:
    """Settings by dotted name."""
    rows: dict[str, Any] = {}
    for key, value in as_dict(profile).items():
        if isinstance(value, dict):
            rows.update({f"{key}.{inner}": v for inner, v in value.items()})
        else:
            rows[key] = value
    return rows


def written(value: Any) -> str:
    """A setting as it is shown: no digit lost, a tuple's items after each other."""
    if isinstance(value, tuple):
        return ", ".join(f"({written(item)})" if isinstance(item, tuple) else written(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _override(profile: Profile, key: str, value: Any) -> Profile:
    settings = flat(profile)
    if key not in settings or key == "name":
        names = [name for name in settings if name != "name"]
        raise ValueError(f"unknown setting {key!r}{_near(key, names)} The settings are {', '.join(names)}")
    value = _convert(key, value, settings[key])
    if "." not in key:
        return replace(profile, **{key: value})
    part, inner = key.split(".")
    return replace(profile, **{part: replace(getattr(profile, part), **{inner: value})})


def _convert(key: str, value: Any, old: Any) -> Any:
    wanted = type(old)
    if isinstance(value, str) and wanted is not str:
        text = {"true": "True", "false": "False"}.get(value.lower(), value)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(_mistyped(key, value, old)) from None
    if wanted is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(key, item, old[0]) for item in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ValueError(_mistyped(key, value, old))
    if wanted in (int, float) and not 0 <= value < float("inf"):
        raise ValueError(f"setting {key}={value} must be finite and not negative")
    if value == 0 and key.rpartition(".")[2] == "seeds":
        raise ValueError(f"setting {key}=0: at least one seed is needed")
    return value


def _mistyped(key: str, value: Any, old: Any) -> str:
    return f"setting {key}={value!r} must be {type(old).__name__}, like {old!r}"


def _near(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else "."


def _cuda() -> bool:
    import torch

    return os.environ.get("DINV_DEVICE") != "cpu" and torch.cuda.is_available()
