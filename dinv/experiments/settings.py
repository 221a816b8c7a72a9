"""What a profile is: everything that a notebook may vary, with the paper's numbers as defaults.

Where the paper is silent the comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dinv.continual import ContinualSettings
from dinv.distillation import DistillationSettings
from dinv.experiments.overrides import flat, written
from dinv.generator import GeneratorSettings
from dinv.inversion import InversionSettings
from dinv.pruning import PruningSettings
from dinv.training import TrainingSettings


@dataclass(frozen=True)
class Octaves:
    """Notebook 02's longer and smoother descent, all of it ours: Adam on octaves, see `pyramid`."""

    images: int = 256
    inversion: InversionSettings = InversionSettings(
        lr=0.2, octaves=4, chroma_lr=0.3, betas=(0.5, 0.9), schedule="cosine"
    )
    tv: float = 0.03
    alpha_f: float = 1.0
    dream_tv: tuple[float, ...] = (0.01, 0.05, 0.2, 1.0)  # DeepDream's own
    seeds: int = 3

    @property
    def snapshots(self) -> tuple[int, ...]:
        """Steps after which notebooks 02 and 07 keep the images, closer together where more changes."""
        return tuple(round(share * self.inversion.steps) for share in (0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1))


@dataclass(frozen=True)
class Sweep:
    """Notebook 02's comparisons: images of each variant, and what is varied."""

    images: int = 2560
    alpha_f: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0, 100.0)  # the paper searched {1, 5, 10, 100} [M]
    real: tuple[int, ...] = (10, 100, 1000)  # the paper: 100 (Table 8)
    batch_sizes: tuple[int, ...] = (16, 64, 256)
    without_batchnorm: int = 2560  # images of the network without BatchNorm


@dataclass(frozen=True)
class Distillation:
    """Table 1: the columns, the images of the students, the updates."""

    # fmt: off
    pairs: tuple[str, ...] = (
        "cifar_resnet34->cifar_resnet18", "cifar_vgg11->cifar_vgg11", "cifar_vgg11->cifar_resnet18")
    # fmt: on
    start_images: int = 6656  # of the first round: with a batch in every later one, 256,000 at the end
    # 250 epochs of 195 updates, a new batch every 50; a tenth of the rate after every 100 epochs
    settings: DistillationSettings = DistillationSettings(rounds=975, updates=50, schedule="steps")
    # Notebooks 01 and 02 keep to one size and the paper's weight of total variation.
    inversion: InversionSettings = InversionSettings(flip=False, stages=((2000, 32),))
    tv: float = 2.5e-5
    alpha_c: float = 10.0  # [M]
    competitions: tuple[float, ...] = (1.0, 5.0, 10.0, 30.0)  # weights that are compared; ours
    seeds: int = 3  # of notebooks 03 and 04, which take longest
    eval_every: int = 25  # rounds between two measurements of Figure 4


@dataclass(frozen=True)
class Generator:
    """The training-based row of Table 1, and notebook 08; all of it ours."""

    settings: GeneratorSettings = GeneratorSettings(steps=10, width=64, flip=False)
    distillation: DistillationSettings = DistillationSettings(rounds=975, updates=50, schedule="steps")
    images: int = 256  # a round
    alpha_f: float = 2.0
    alpha_c: float = 2.0
    warmup: int = 100  # rounds before the student competes
    seeds: int = 3
    eval_every: int = 25
    compare: int = 100  # rounds of notebook 08's comparison with the pixels
    pixel_batches: int = 10  # batches of pixel inversion in that comparison, about as long


@dataclass(frozen=True)
class Pruning:
    """Tables 4, 5, 9 and 10. The paper prunes ResNet-50, and gives the ratios alone."""

    ratios: tuple[float, ...] = (0.2, 0.5)  # of the filters
    images: int = 4096  # on which importance is measured; ours, as all that follows
    settings: PruningSettings = PruningSettings(step=0.01)
    distillation: DistillationSettings = DistillationSettings(
        rounds=1, updates=5000, lr=0.02, compile="never"
    )  # compiled never, as no two networks have the same shape
    front: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7)  # Table 5
    latency_shares: tuple[float, ...] = (0.2, 0.4, 0.6)  # shares of the latency that go in Table 9
    etas: tuple[float, ...] = (0.0, 0.003, 0.03, 0.3)  # Table 9, per millisecond of a batch of 64
    seeds: int = 3


@dataclass(frozen=True)
class Continual:
    """Table 7. The paper extends ImageNet by birds, and by flowers."""

    domain: str = "mnist"  # ten new classes of another kind
    splits: tuple[tuple[int, ...], ...] = ((5, 5), (6, 2, 2))  # of one data set: classes that are alike
    epochs: int = 60  # of the teachers that know a part of the classes
    images: int = 25_600  # inverted images of the old classes, each step; ours, as all that follows
    settings: ContinualSettings = ContinualSettings(updates=5000, batch_size=256)
    alpha_features: float = 30.0  # of Always Be Dreaming: of 1, 3, 10, 30, 100 the best on training images
    seeds: int = 3


@dataclass(frozen=True)
class Imagenet:
    """Notebook 07. Of a tuple of teachers the first whose weights are in reach is taken."""

    teacher: tuple[str, ...] = ("torchvision:resnet50", "package:efficientnet_lite0")
    # fmt: off
    verifiers: tuple[str, ...] = (
        "torchvision:resnet18", "torchvision:inception_v3", "torchvision:mobilenet_v2", "torchvision:vgg11",
        "package:efficientnet_lite1", "package:efficientnet_lite2")
    classes: tuple[str, ...] = ("pizza", "daisy", "strawberry", "tiger", "brown bear", "goldfish", "monarch",
                                "lemon", "peacock", "balloon", "volcano", "school bus")
    # fmt: on
    images_per_class: int = 7  # 84 images, as in the paper's fast schedule
    inversion: InversionSettings = InversionSettings(jitter=30, stages=((2000, 112), (1000, 224)))
    distance: str = "l2"
    alpha_f: float = 0.01
    first_layer: float = 10.0
    l2_weights: tuple[float, ...] = (0.01, 0.1, 1.0)  # of the statistics, compared; ours but the first
    kl_weights: tuple[float, ...] = (1.0, 3.0, 10.0)
    tv: float = 1e-4
    l2: float = 1e-2  # the paper used 0 as well
    alpha_c: float = 0.2
    comparison_stages: tuple[tuple[int, int], ...] = ((2000, 112),)  # ours
    transfer_images: int = 140_000  # of Table 6, where there are photographs to test on; 0 leaves it open
    transfer_epochs: int = 90  # of its distillation; the paper had 250 as well
    folder: str = ""  # an ImageFolder of the user's: `./reproduce.sh --imagenet DIR`
    seeds: int = 3


@dataclass(frozen=True)
class Scaling:
    """Notebook 09, all of it ours; not compiled, as a shared step is not. A tenth of the steps is timed."""

    batch_size: int = 240  # of the batch that is shared
    inversion: InversionSettings = InversionSettings(steps=200, lr=0.1, schedule="cosine", compile="never")
    ranks: int = 2
    turns: int = 5
    pools: tuple[int, ...] = (120, 240, 480, 960)  # images, in one batch or in batches of the first size


@dataclass(frozen=True)
class Profile:
    """Everything a notebook may vary. Frozen: `load_profile(name, overrides)` makes variants.

    `tv`, `l2` and `alpha_f` are the weights of the objective in notebooks 01 and 02 (paper, section 4.1),
    `alpha_f_kl` that of the divergence in place of the l2 distance.
    """

    name: str
    dataset: str
    teacher: str
    verifier: str
    teacher_training: TrainingSettings
    verifier_training: TrainingSettings
    retrain: bool  # train teacher and verifier although weights are shipped
    seeds: int
    images: int = 256_000  # of each kind and seed
    batch_size: int = 256
    inversion: InversionSettings = InversionSettings(flip=False)  # the paper flips on ImageNet only
    tv: float = 2.5e-5
    l2: float = 3e-8  # [M]
    alpha_f: float = 10.0
    alpha_f_kl: float = 1.0  # ours: the paper knows only the l2 distance
    octaves: Octaves = field(default_factory=Octaves)
    sweep: Sweep = field(default_factory=Sweep)
    distillation: Distillation = field(default_factory=Distillation)
    generator: Generator = field(default_factory=Generator)
    pruning: Pruning = field(default_factory=Pruning)
    continual: Continual = field(default_factory=Continual)
    imagenet: Imagenet = field(default_factory=Imagenet)
    scaling: Scaling = field(default_factory=Scaling)

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows of text: setting, here, what the paper states, with its mark, or else what `paper` has."""
        full, rows = flat(PAPER), []
        for name, value in flat(self).items():
            mark, chosen = STATED.get(name, ""), written(full[name])
            if name != "name":
                rows.append((name, written(value), *((f"{chosen} [{mark}]", "") if mark else ("", chosen))))
        return rows


# fmt: off
# What the paper states, by how well that is known: V confirmed in a second public source, S one secondary
# source, M recalled and not confirmed. On all other settings it is silent, as far as is known.
STATED = {name: mark for mark, names in {
    "V": "dataset teacher images batch_size inversion.steps inversion.lr inversion.jitter tv alpha_f "
         "distillation.settings.rounds distillation.settings.updates distillation.settings.lr "
         "distillation.settings.schedule distillation.settings.temperature distillation.inversion.lr "
         "distillation.inversion.jitter distillation.inversion.stages distillation.tv "
         "imagenet.images_per_class imagenet.inversion.lr imagenet.inversion.stages imagenet.first_layer "
         "imagenet.transfer_images imagenet.transfer_epochs",
    "S": "distillation.pairs imagenet.inversion.jitter imagenet.inversion.flip imagenet.alpha_f imagenet.tv "
         "imagenet.l2 imagenet.alpha_c",
    "M": "l2 distillation.alpha_c",
    "S+M": "pruning.ratios",
}.items() for name in names.split()}

# The paper does not describe the training of its CIFAR teachers: this is a common strong recipe.
_LONG = TrainingSettings(epochs=200, batch_size=128, lr=0.1)
PAPER = Profile(
    name="paper", dataset="cifar10", teacher="cifar_resnet34", verifier="cifar_vgg11",
    teacher_training=_LONG, verifier_training=_LONG, retrain=True, seeds=3,  # the paper: single numbers
)
# fmt: on
