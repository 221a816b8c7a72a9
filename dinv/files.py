"""Files that are whole or absent: where they live, digests, atomic writes, locks."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Corrupt(Exception):
    """A stored file is not what was written; the message names it and says in what way."""


class NoCheckpoint:
    """For work that is not resumed. A checkpoint calls `make() -> (tensors, meta)` if it is time to save."""

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """What was saved last, if anything."""

    def save(self, make: Callable[[], tuple[Mapping[str, Tensor], Mapping]]) -> None: ...

    def progress(self, done: int, total: int, **numbers: float) -> None: ...


NO_CHECKPOINT = NoCheckpoint()


def repository_root() -> Path:
    """The checkout around this package, else around the working directory, else that directory itself."""
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd(), *Path.cwd().parents):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "dinv"' in project.read_text(encoding="utf-8"):
            return folder
    return Path.cwd()


def cache_root() -> Path:
    """Where stages are kept: the environment variable DINV_CACHE, else `runs/`."""
    return Path(os.environ.get("DINV_CACHE") or repository_root() / "runs").absolute()


def figures_root() -> Path:
    """Where results and figures go: the environment variable DINV_FIGURES, else `figures/`."""
    return Path(os.environ.get("DINV_FIGURES") or repository_root() / "figures").absolute()


def make_folder(path: Path, variable: str) -> Path:
    """Make the folder `path`. Where that fails, the message names the environment variable that moves it."""
    advice = f"set {variable} to another folder"
    if file := next((p for p in (path, *path.parents) if p.is_file()), None):
        raise NotADirectoryError(f"{file} is a file, but a folder should be there: move it away, or {advice}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror}; {advice}") from error
    return path


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value, where: str = "") -> str:
    """SHA-256 of what `value` holds, the same in every process; 1, 1.0 and True differ, (1,) and [1] do not.

    Takes None, bool, int, finite float, str, tensors, networks, dataclasses, lists, tuples, dicts with string
    keys, and objects whose `digest_parts()` returns such a value. Anything else raises a TypeError that says
    what was found and where, e.g. at `settings.callback`; `where` names the root.
    """
    return sha256_text(json.dumps(_plain(value, where), sort_keys=True, allow_nan=False))


def _plain(value, where: str):
    """`value` as JSON holds it: tensors by their checksum, objects by their class and parts."""
    name = type(value).__qualname__
    if isinstance(value, None | bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}".removeprefix(".")) for key, item in value.items()}
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if hasattr(value, "digest_parts") and not isinstance(value, type):
        return [name, _plain(value.digest_parts(), where)]
    if isinstance(value, nn.Module):
        return [name, repr(value), _plain(dict(value.state_dict()), where)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare
        }
        for field in dataclasses.fields(value):  # a setting that came later keeps the digests there were
            if field.metadata.get("silent") and fields[field.name] == field.default:
                del fields[field.name]
        return [name, _plain(fields, where)]
    raise TypeError(
        f"{where or 'the value'} is a {name} ({value!r:.60}), expected None, bool, int, finite float, str, "
        "lists and dicts (keys: str) of them; a digest takes also tensors, networks and dataclasses"
    )


@contextmanager
def atomic_write(path: Path, size: int) -> Iterator[Path]:
    """Yield a temporary name that becomes `path` if the block ends well. `size`: bytes it needs."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors would keep the file to its owner
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}. It needs {size / 1e6:.3g} "
            f"MB, {free / 1e6:.3g} MB are free there: make room, or set DINV_CACHE and DINV_FIGURES to "
            "folders on another disk; the same command then goes on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path, len(text.encode())) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file holds them: on the CPU, contiguous, no two sharing memory."""
    result, addresses = {}, set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"'{name}' is a {type(tensor).__name__}, expected a tensor: keep it in meta")
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if address in addresses else plain
        addresses.add(address)
    return result


def strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Any = None) -> None:
    """Write one safetensors file, in its header `meta`, which JSON can hold, and a checksum of all."""
    _plain(meta, "meta")  # names what JSON cannot hold
    tensors, text = to_cpu(tensors), json.dumps(meta, sort_keys=True, allow_nan=False)
    header = {"dinv": f"{digest([tensors, text])} {text}"}  # one entry: safetensors does not keep their order
    with atomic_write(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(tensors, temporary, header)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the meta of a file; `Corrupt` if it holds anything but what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            names, header = list(file.keys()), (file.metadata() or {}).get("dinv", "")
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise Corrupt(f"{path} cannot be read ({error})") from error
    checksum, _, text = header.partition(" ")
    if checksum != digest([tensors, text]):
        raise Corrupt(f"{path} is corrupt (its checksum does not match), or of another origin")
    return tensors, json.loads(text)


def packed(record: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A dataclass for `write_tensors`: its tensors, those of its dicts under dotted names; other fields."""
    tensors, values = {}, {}
    for name, value in ((item.name, getattr(record, item.name)) for item in dataclasses.fields(record)):
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping) and any(isinstance(part, Tensor) for part in value.values()):
            tensors |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            values[name] = value
    return tensors, values


def unpacked(kind: type, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Any:
    """The object of the dataclass `kind` that `packed` took apart."""
    hints, parts = get_type_hints(kind), {}
    for name in (item.name for item in dataclasses.fields(kind)):
        if name in values:
            parts[name] = _typed(hints[name], values[name])
        else:
            parts[name] = tensors[name] if name in tensors else strip_prefix(f"{name}.", tensors)
    return kind(**parts)


def _typed(hint: Any, value: Any) -> Any:
    """A value from JSON, with its lists as tuples where the type says so."""
    kinds = get_args(hint)
    if not isinstance(value, list) or not kinds:
        return value
    kinds = kinds[:1] * len(value) if len(kinds) == 1 or kinds[-1] is Ellipsis else kinds
    items = map(_typed, kinds, value)
    return tuple(items) if get_origin(hint) is tuple else list(items)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder against other processes; the lock ends with the process, however it ends."""
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    with suppress(OSError):  # a folder that is read-only or without locks: go on, every write is a rename
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"dinv: another process is busy with {what}; waiting for it", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open
            if lock.is_locked:
                os.unlink(lock.lock_file)  # who waits for this one sees that it is gone, and makes another
        lock.release()
