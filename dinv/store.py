"""Files that are whole or absent: where they live, atomic writes, checksums, locks."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class Corrupt(Exception):
    """A stored file is not what was written; the message names it and says in what way."""


# ---- where things live -------------------------------------------------------------------------


def repository_root() -> Path:
    """The folder of the checkout: around this package, else around the working directory.

    Outside any checkout (an installed package) it is the working directory itself.
    """
    working = Path.cwd()
    for folder in (Path(__file__).resolve().parent.parent, working, *working.parents):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "dinv"' in project.read_text(encoding="utf-8"):
            return folder
    return working


def cache_root() -> Path:
    """Where stages are kept: the environment variable DINV_CACHE, else `runs/`."""
    return Path(os.environ.get("DINV_CACHE") or repository_root() / "runs").absolute()


def figures_root() -> Path:
    """Where results and figures go: the environment variable DINV_FIGURES, else `figures/`."""
    return Path(os.environ.get("DINV_FIGURES") or repository_root() / "figures").absolute()


def make_folder(path: Path, variable: str) -> Path:
    """Make `path` a folder, or say why it cannot be one. `variable` names the way round it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next((p for p in (path, *path.parents) if p.is_file()), path)
        raise NotADirectoryError(
            f"{file} is a file, but a folder should be there: "
            f"move it away, or set {variable} to another folder"
        ) from None
    except OSError as error:
        raise OSError(
            f"cannot make the folder {path}: {error.strerror}; set {variable} to a folder "
            "that can be written to"
        ) from error
    return path


# ---- JSON and checksums ------------------------------------------------------------------------


def canonical_json(value, where: str = "config") -> str:
    """The one spelling of `value`: keys sorted, no blanks, finite numbers only.

    ValueError names the first entry that JSON cannot hold exactly, e.g. `config.loss.weight`.
    """
    _check_plain(value, where)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_plain(value, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON keys are strings: use str()")
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; only finite numbers can be stored")
    elif not (value is None or isinstance(value, bool | int | str)):
        raise ValueError(
            f"{where} is a {type(value).__name__} ({value!r:.60}); only None, bool, int, float, "
            "str, lists and dicts of them can be stored: convert it, e.g. with float() or str()"
        )


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor], text: str) -> str:
    """Checksum over names, dtypes, shapes and bytes of the tensors, and over `text`."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- atomic writes -----------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, size: int) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it becomes `path` only if the block ends well."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}. It needs "
            f"{megabytes(size)}, {megabytes(free)} are free there: make room, or set "
            "DINV_CACHE and DINV_FIGURES to folders on another disk; the same command then goes on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


def write_text(path: Path, text: str) -> None:
    with replacing(path, len(text.encode())) as temporary:
        temporary.write_text(text, encoding="utf-8")


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file holds them: on the CPU, contiguous, none sharing memory."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"'{name}' is a {type(tensor).__name__}, expected a tensor: put other things "
                "into the meta dictionary"
            )
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if address in seen else plain
        seen.add(address)
    return result


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: str | None = None) -> None:
    """Write one safetensors file (`metadata`: one string kept in its header)."""
    size = sum(tensor.nbytes for tensor in tensors.values()) + len(metadata or "")
    with replacing(path, size) as temporary:
        save_file(dict(tensors), temporary, {"dinv": metadata} if metadata else None)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors and the metadata string of a file; `Corrupt` if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("dinv", "")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Corrupt(f"{path} cannot be read ({error})") from error


def write_record(path: Path, record: dict) -> None:
    """Write a JSON object together with its own checksum."""
    record = record | {"checksum": sha256_text(canonical_json(record, path.name))}
    write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def read_record(path: Path) -> dict:
    """What `write_record` wrote; `Corrupt` if it is anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("checksum")
        sound = checksum == sha256_text(canonical_json(record, path.name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{path} cannot be read ({error})") from error
    if not sound:
        raise Corrupt(f"{path} is corrupt (its checksum does not match)")
    return record


class Sparingly:
    """Saves a checkpoint that grows with the work, as often as its share of the time allows.

    Args:
        checkpoint: a `runs.Checkpoint`, or None, which is never saved.
    """

    share = 0.1

    def __init__(self, checkpoint: Any):
        self.checkpoint, self._next = checkpoint, 0.0

    def __call__(self, make: Callable[[], tuple[Mapping[str, Tensor], Mapping]]) -> None:
        """Save the tensors and the meta that `make` gives, if it is time."""
        began = time.monotonic()
        if self.checkpoint is not None and began >= self._next:
            self.checkpoint.save(*make())
            now = time.monotonic()
            self._next = now + (now - began) / self.share


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder against other processes; the lock ends with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"dinv: another process is busy with {what}; waiting for it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: go on, every write is still a rename
        yield
    finally:
        with suppress(OSError):  # by name, as a forked child may hold the handle as well
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
