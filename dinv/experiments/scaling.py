"""Notebook 09: processes that share a batch, timed beside a single one, and the memory of a fresh process."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from timeit import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinv.group import Group, averaged
from dinv.inversion import InversionSettings, Inverter
from dinv.models import Classifier
from dinv.objectives import FeatureStatistics, Objective, View
from dinv.pool import synthesize


def processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each of `count` new processes returns from `work(group, *arguments)`; by rank.

    Each has one thread, and is forked from a server that has imported this package, not from the caller: a
    notebook may start them, and a card may be in use. Where there are fewer cards than ranks, they share.

    Args:
        work: a function of a module. Its group is None where `count` is 1.

    Raises:
        BrokenProcessPool: one of them died. What `work` raises in one rank is raised here.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the latter for the optimiser: seconds
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(count, context) as pool:
        calls = [pool.submit(_rank, n, count, f"{folder}/meeting", work, arguments) for n in range(count)]
        return [call.result() for call in calls]


def _rank(number: int, count: int, meeting: str, work: Callable[..., Any], arguments: tuple) -> Any:
    torch.set_num_threads(1)
    if count == 1:
        return work(None, *arguments)
    cards = torch.cuda.device_count()
    if cards:
        torch.cuda.set_device(number % cards)
    backend = "nccl" if cards >= count else "gloo"  # NCCL has no two ranks on one card
    dist.init_process_group(backend, f"file://{meeting}", rank=number, world_size=count)
    try:
        return work(dist.group.WORLD, *arguments)
    finally:
        dist.destroy_process_group()  # after an error the others would wait for half an hour


def beside(
    group: Group,
    teacher: Classifier,
    objective: Objective,
    settings: InversionSettings,
    labels: Tensor,
    turns: int,
) -> tuple[dict[str, list[float]], dict[str, list[Tensor]]]:
    """One batch by rank 0 alone and by all ranks, in turn, so that a slow moment hits every side.

    Returns:
        Seconds and images of every turn, whose number is the seed, for four sides: one process; one process
        with as many threads as there are ranks; the ranks; the ranks with as many times the images. Rank 0's
        count: the others have nothing of the first two.
    """
    ranks, teacher = group.size(), teacher.to(_place(teacher))
    alone, shared = (Inverter(teacher, objective, settings, who) for who in (None, group))
    sides = {
        "1 process, 1 thread": (alone, labels, 1),
        f"1 process, {ranks} threads": (alone, labels, ranks),
        f"{ranks} ranks": (shared, labels, 1),
        f"{ranks} ranks, {ranks} × the images": (shared, labels.repeat(ranks), 1),
    }
    seconds, images = ({name: [] for name in sides} for _ in range(2))
    for turn in range(-1, turns):  # the first is left out: it loads and prepares
        for name, (inverter, asked, threads) in sides.items():
            dist.barrier(group)  # nobody computes while rank 0 is alone
            if inverter is shared or group.rank() == 0:
                torch.set_num_threads(threads)
                made = inverter(asked, seed=max(turn, 0))
                seconds[name] += [made.seconds] * (turn >= 0)
                images[name] += [made.images.cpu()] * (turn >= 0)
    return seconds, images


class OwnShare(FeatureStatistics):
    """The statistics of each rank's own share: what happens where nothing is exchanged."""

    def __call__(self, view: View) -> Tensor:
        return super().__call__(replace(view, group=None))


def inverted(
    group: Group | None,
    teacher: Classifier,
    objective: Objective,
    settings: InversionSettings,
    labels: Tensor,
    turns: int,
) -> list[Tensor]:
    """The images of so many batches, whose number is the seed."""
    inverter = Inverter(teacher.to(_place(teacher)), objective, settings, group)
    return [inverter(labels, seed=turn).images.cpu() for turn in range(turns)]


def message_seconds(group: Group, device: str, lengths: Sequence[int], turns: int) -> list[list[float]]:
    """Seconds to average so many float32 numbers over the ranks, for every length those of every turn."""
    parts = [torch.zeros(length, device=device) for length in lengths]
    calls = [lambda part=part: averaged(part, group).sum().item() for part in parts]
    return [repeat(call, number=1, repeat=turns + 1)[1:] for call in calls]


def pool_cost(
    group: None,
    teacher: Classifier,
    objective: Objective,
    settings: InversionSettings,
    labels: Tensor,
    batch_size: int,
) -> tuple[float, float]:
    """Seconds of a pool, and by how many MiB the process, or the card, grew for it at the most."""
    inverter = Inverter(teacher.to(_place(teacher)), objective, settings)
    inverter(labels[:1])  # what is loaded at the first call is no matter of images
    before = _peak()
    pool = synthesize(inverter, labels, batch_size=batch_size)
    return pool.seconds, _peak() - before


def _place(teacher: Classifier) -> str:
    return "cuda" if teacher.mean.is_cuda else "cpu"  # this rank's card


def _peak() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
