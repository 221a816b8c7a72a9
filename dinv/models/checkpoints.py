"""Weights as others save them: plain, behind prefixes, beside an optimiser, averaged; never unpickled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dinv.models.classifier import Classifier

WRAPPERS = ("module", "_orig_mod")  # those of DataParallel and torch.compile, anywhere in a name
TRAINING_ONLY = ("aux1.", "aux2.", "AuxLogits.")  # heads that `create_model` leaves out


class CorruptCheckpoint(RuntimeError):
    """A file of weights that is not what it should be."""


def load_weights(model: Classifier, path: str | Path) -> Classifier:
    """Load a checkpoint's tensors into `model` and return it.

    The names may be those of the network or of the whole `Classifier`, behind any prefix ("module.",
    "model.", "_orig_mod."), and the state dictionary an entry of another one ("net", "state_dict"). Of two
    that fit, the one with "ema" in its name is taken.

    Raises:
        CorruptCheckpoint: the file is damaged, does not fit, or holds several networks that do; `model` is
            as it was.
    """
    path = Path(path)
    content, found = _read(path), []
    wanted = {_bare(name): value for name, value in model.net.state_dict().items()}
    for where, tensors in _dictionaries(content):
        found += [(count, where + prefix, prefix, tensors) for prefix, count in _prefixes(tensors, wanted)]
    most = max((count for count, *_ in found), default=0)
    best = [item for item in found if item[0] == most]
    best = [item for item in best if "ema" in item[1].lower()] or best
    if 2 * most < len(wanted) or not best:
        inside = _listed([name for _, tensors in _dictionaries(content) for name in tensors])
        reason = f"it holds {inside}; expected tensors such as {next(iter(wanted), 'none')}"
        raise CorruptCheckpoint(f"{path} does not fit {model.name}: {reason}")
    if len(best) > 1:
        places = _listed([place for _, place, *_ in best])
        raise CorruptCheckpoint(f"{path} holds more than one {model.name}, at {places}: save one of them")
    _, _, prefix, tensors = best[0]
    if bad := [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise CorruptCheckpoint(f"{path} holds values that are not finite, in {bad[0]}")
    target, own = model.net, prefix.removesuffix("net.")
    if own != prefix and {f"{own}mean", f"{own}std"} <= set(tensors):  # of a Classifier: nothing is left over
        target, prefix = model, own
    names = {_bare(name): name for name in target.state_dict()}
    given = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    given = {k: v for k, v in given.items() if not k.removeprefix("net.").startswith(TRAINING_ONLY)}
    given = {names.get(name, name): value for name, value in given.items()}
    if problems := _problems(given, target.state_dict(), len(model.classes)):
        raise CorruptCheckpoint(f"{path} does not fit {model.name}: {problems}")
    target.load_state_dict(given)
    return model


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is not a file: name a .safetensors or a .pt file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what an unpickler refuses has no common base class
        reason = "it is damaged, or holds Python objects, and those are not unpickled"
        advice = f'fetch it again, or save it again with torch.save(net.state_dict(), "{path.name}")'
        raise CorruptCheckpoint(f"{path} cannot be read as tensors alone: {reason}.\n{advice}") from error


def _dictionaries(content: Any, where: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in `content` that holds tensors, and where; names without what wraps a layer."""
    if isinstance(content, Mapping):
        entries = [(name, value) for name, value in content.items() if isinstance(name, str)]
        tensors = {_bare(name): value for name, value in entries if torch.is_tensor(value)}
        if tensors:
            yield where, tensors
        for name, value in entries:
            yield from _dictionaries(value, f"{where}{name}.")


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The prefixes behind which most of the `wanted` names are among those of `tensors`, and how many."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        tails = [".".join(parts[start:]) for start in range(len(parts))]
        counts.update(name.removesuffix(tail) for tail in tails if tail in wanted)
    most = max(counts.values(), default=0)
    return [(prefix, count) for prefix, count in counts.items() if count == most]


def _problems(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], classes: int) -> str:
    """What is missing, left over or of another shape; empty if all fits."""
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    more = [name for name in given if name not in wanted]
    other = [k for k, v in given.items() if k in wanted and v.shape != wanted[k].shape]
    shapes = [f"{name} {tuple(given[name].shape)} for {tuple(wanted[name].shape)}" for name in other]
    heads = {
        len(given[k]) for k in other if given[k].dim() and wanted[k].shape == (classes, *given[k].shape[1:])
    }
    if other and len(heads) == 1 and len({name.rpartition(".")[0] for name in other}) == 1:
        return f"its head has {heads.pop()} outputs, not {classes}: pass classes= with their names"
    parts = (("missing", missing), ("unexpected", more), ("of another shape", shapes))
    return "; ".join(f"{len(names)} tensors {what} ({_listed(names)})" for what, names in parts if names)


def _listed(names: list[str], count: int = 3) -> str:
    return ", ".join([*names[:count], "..."] if len(names) > count else names) or "no tensor"
