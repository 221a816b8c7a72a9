"""Small CIFAR-10 and MNIST archives in the formats of the real ones, for tests of the downloads."""

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, TEST = 10, 4  # images in the small CIFAR-10; five batches of two
RANDOM = np.random.RandomState(0)
CIFAR = {
    "train.images": RANDOM.randint(0, 256, (TRAIN, 3, 32, 32), dtype=np.uint8),
    "train.labels": np.arange(TRAIN),
    "test.images": RANDOM.randint(0, 256, (TEST, 3, 32, 32), dtype=np.uint8),
    "test.labels": np.arange(TEST)[::-1].copy(),
}
MNIST = {
    "train.images": RANDOM.randint(0, 256, (6, 1, 28, 28), dtype=np.uint8),
    "train.labels": np.arange(6),
    "test.images": RANDOM.randint(0, 256, (3, 1, 28, 28), dtype=np.uint8),
    "test.labels": np.arange(3),
}


def python2_pickle(images, labels) -> bytes:
    """A batch opcode by opcode as Python 2 and numpy 1 wrote it: byte strings, the old module."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    raw = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n"
    array += integer(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + integer(1) + integer(len(images)) + integer(3072) + b"\x86"
    array += b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    array += b"(" + integer(3) + text(b"|") + b"NNN" + 2 * integer(-1) + integer(0) + b"tb"
    array += b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    numbers = b"](" + b"".join(map(integer, labels.tolist())) + b"e"
    label = text(b"batch_label") + text(b"one of a few")
    items = text(b"data") + array + text(b"labels") + numbers + label
    return b"\x80\x02}(" + items + b"u."


def python_version() -> dict[str, bytes]:
    images, labels = CIFAR["train.images"], CIFAR["train.labels"]
    files = {
        f"data_batch_{i + 1}": python2_pickle(images[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2])
        for i in range(5)
    }
    return files | {"test_batch": python2_pickle(CIFAR["test.images"], CIFAR["test.labels"])}


def png_version() -> dict[str, bytes]:
    def picture(images) -> bytes:
        rows = images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3)
        Image.fromarray(rows).save(buffer := io.BytesIO(), "png")
        return buffer.getvalue()

    images = CIFAR["train.images"]
    files = {f"data_batch_{i + 1}.png": picture(images[2 * i : 2 * i + 2]) for i in range(5)}
    files["test_batch.png"] = picture(CIFAR["test.images"])
    for split in ("train", "test"):
        files[f"{split}_lables.json"] = json.dumps(CIFAR[f"{split}.labels"].tolist()).encode()
    return files


def idx_version() -> dict[str, bytes]:
    files = {}
    for split, file in (("train", "train"), ("test", "t10k")):
        for kind, sides in (("images", 3), ("labels", 1)):
            array = MNIST[f"{split}.{kind}"].astype(np.uint8).squeeze()
            head = b"\0\0\x08" + bytes([sides]) + struct.pack(f">{sides}I", *array.shape)
            files[f"{file}-{kind}-idx{sides}-ubyte"] = head + array.tobytes()
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
