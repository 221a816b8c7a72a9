"""The cells of Tables 4, 5, 9 and 10: a teacher pruned on some images, then distilled into on the same ones.

A row is its images; importance is measured on them and the smaller network learns from them. All cells of
a table make the same updates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dinv import chapters, distillation, gallery, latency, pruning, rows
from dinv.datasets import Dataset, load_dataset
from dinv.latency import LatencyTable, Layer
from dinv.metrics import accuracy
from dinv.models import Classifier
from dinv.pruning import Pruned, Unreachable
from dinv.runs import Run
from dinv.runs.machine import device_name
from dinv.step import distillation_flops, inversion_flops
from dinv.store import sha256_tensors, stored, under

DATA_FREE = ("noise", "deepdream", "deepinversion", "adi")
CEILINGS = ("1 % real", "10 % real", "all real")


def images_of(run: Run, row: str, teacher: Classifier, seed: int) -> Tensor:
    """A row's images, uint8: the same pools as in Table 1, for `adi` those of its first column."""
    if row in CEILINGS:
        return rows.real_images(run, row, seed)
    if row == "noise":
        return rows.noise(teacher, rows.image_count(run.profile), seed)
    if row == "adi":
        made, _ = rows.pool(run, "deepinversion", teacher, seed)
        cell = rows.distilled(run, "adi", run.profile.distillation.pairs[0], seed)
        return torch.cat([made.images[: run.profile.distillation.first], cell.made])
    return rows.pool(run, row, teacher, seed)[0].images


def of_imagenet(run: Run, row: str, teacher: Classifier) -> Tensor:
    """As many images as importance is measured on, uint8, made from a network of notebook 07 as there.

    Args:
        row: "noise", "deepdream" or "deepinversion".
    """
    chosen = run.profile
    if row == "noise":
        return rows.noise(teacher, chosen.pruning.images, 0)
    return gallery.many(run, row, teacher, chosen.pruning.images)[0].images


def hours_of_imagenet(run: Run, network: Classifier, rate: float) -> tuple[float, float]:
    """What a row of that kind takes: (its images, and then one cell), at `rate` operations a second."""
    chosen = run.profile.pruning
    synthesis = chosen.images * inversion_flops(network, run.profile.imagenet.stages)
    healing = chosen.updates * chosen.batch * distillation_flops(network, network)
    return synthesis / rate / 3600, healing / rate / 3600


@dataclass(frozen=True)
class Cut:
    """One cell.

    Attributes:
        pruned: the network as it was cut.
        network: the same after distillation, frozen; equal to `pruned.network` where there was none.
        before, accuracy: top-1 in percent on the whole test set, before and after distillation.
        seconds: of pruning and distillation.
    """

    pruned: Pruned
    network: Classifier
    before: float
    accuracy: float
    seconds: float


def table_of(run: Run, teacher: Classifier) -> LatencyTable:
    """The latency of every layer on this device, measured once and kept."""
    batch = latency.batch_of(teacher.mean.device)
    machine = {"device": device_name(), "threads": torch.get_num_threads()}
    if teacher.mean.is_cuda:
        machine["batch"] = batch

    def make(checkpoint):
        return {}, {"layers": LatencyTable.measure(teacher, batch).config()}

    result = run.stage("latency", teacher.name, machine, make, [chapters.digest(teacher)], latency.VERSION)
    return LatencyTable({name: _layer(entry) for name, entry in result.meta["layers"].items()}, batch)


def _layer(entry: Mapping[str, Any]) -> Layer:
    return Layer(**{**entry, "milliseconds": tuple(map(tuple, entry["milliseconds"]))})


def cut(
    run: Run,
    name: str,
    teacher: Classifier,
    images: Tensor,
    *,
    seed: int = 0,
    labels: Tensor | None = None,
    table: LatencyTable | None = None,
    updates: int | None = None,
    test: Dataset | None = None,
    **options: Any,
) -> Cut:
    """Prune `teacher` on `images` and distil it into what is left, or find it done: a cached stage.

    Args:
        name: of the stage.
        labels: where `importance` wants them.
        updates: the profile's, where not given; 0 leaves the network as it was cut.
        test: on what accuracy is taken; the profile's test set, where not given.
        options: target, importance, eta: as for `pruning.prune`.

    Raises:
        pruning.Unreachable: the target cannot be reached; found again, as a cell would be.
    """
    chosen = run.profile.pruning
    updates = chosen.updates if updates is None else updates
    count = min(chosen.images, len(images))
    seen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    settings = chapters.distillation_settings(
        run.profile, rounds=1, updates=max(1, updates), batch=chosen.batch, rate=chosen.rate,
        schedule="linear", mix=False,  # its settings are its own: those of a fresh student are other ones
        compile="never",  # no two networks have the same shape
    )  # fmt: skip
    config = {
        "options": options, "step": chosen.step, "seed": seed, "count": count, "updates": updates,
        "settings": asdict(settings), "images": sha256_tensors(stored({"images": images}), ""),
        "labels": sha256_tensors(stored({"labels": labels}), "") if labels is not None else None,
        "latency": table.config() if table is not None else None, "distillation": distillation.VERSION,
    }  # fmt: skip

    def make(checkpoint):
        try:
            pruned = pruning.prune(
                teacher, images[seen], step=chosen.step, seed=seed, table=table,
                labels=labels[seen] if labels is not None else None, **options,
            )  # fmt: skip
        except Unreachable as error:
            return {}, {"unreachable": str(error), "most": error.most}
        student = copy.deepcopy(pruned.network)
        if updates:
            draws = torch.Generator().manual_seed(seed)
            distillation.distill(teacher, student, images, settings, draws)
        state = {f"pruned.{key}": value for key, value in pruned.network.state_dict().items()}
        state |= {f"model.{key}": value for key, value in student.state_dict().items()}
        return state, {"removed": pruned.removed, "history": pruned.history}

    result = run.stage(
        "pruned", f"{name}-seed{seed}", config, make, [chapters.digest(teacher)], version=pruning.VERSION
    )
    if "unreachable" in result.meta:
        raise Unreachable(result.meta["unreachable"], result.meta["most"])
    removed = [(layer, channels) for layer, channels in result.meta["removed"]]
    structure = pruning.restructured(teacher, removed)
    networks = [structure, copy.deepcopy(structure)]
    for network, part in zip(networks, ("pruned.", "model."), strict=True):
        network.load_state_dict(under(part, result.tensors))
    if test is None:
        test = load_dataset(run.profile.dataset, "test", chapters.device())
    scores = [accuracy(network, test.images, test.labels) for network in networks]
    return Cut(Pruned(networks[0], removed, result.meta["history"]), networks[1], *scores, result.seconds)


def reached(run: Run, name: str, teacher: Classifier, images: Tensor, **options: Any) -> Cut | Unreachable:
    """`cut`, or what it raises where the target cannot be reached: then the table has that for a row."""
    try:
        return cut(run, name, teacher, images, **options)
    except Unreachable as missed:
        return missed.with_traceback(None)  # which holds the images
