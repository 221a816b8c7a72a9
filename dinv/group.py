"""One batch over several processes: each rank makes its share, and all match the statistics of the whole.

Run with `torchrun --nproc-per-node N`, call `torch.distributed.init_process_group()`, and hand
`torch.distributed.group.WORLD` to `invert`. Where every rank matches the statistics of its own share instead,
the objective is another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def share(count: int, group: Group | None) -> slice:
    """This rank's part of `count` images; all without a group. ValueError unless the ranks divide them."""
    if group is None:
        return slice(None)
    size, ranks = divmod(count, group.size())
    if ranks:
        raise ValueError(f"{count} images cannot be shared equally by {group.size()} processes")
    return slice(group.rank() * size, (group.rank() + 1) * size)


class _Mean(torch.autograd.Function):
    """The mean over the ranks. Every rank goes on to the same scalar, so what comes back is summed."""

    @staticmethod
    def forward(context, values: Tensor, group: Group) -> Tensor:
        context.group, values = group, values.contiguous().clone()
        dist.all_reduce(values, group=group)
        return values / group.size()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=context.group)
        return gradient / context.group.size(), None


def averaged(values: Tensor, group: Group) -> Tensor:
    """The mean of `values` over the ranks, with its gradient: of the sum of all ranks' results."""
    return _Mean.apply(values, group)


def moments_of_all(
    pairs: Sequence[tuple[Tensor, Tensor]], shifts: Sequence[Tensor], group: Group
) -> list[tuple[Tensor, Tensor]]:
    """Means and biased variances of the whole batch from those of equal shares, in one message.

    E[d] and E[d^2] of d = x - shift are averaged: near the shift their difference loses no digits.
    """
    means = [mean - shift for (mean, _), shift in zip(pairs, shifts, strict=True)]
    parts = [*means, *(variance + d * d for (_, variance), d in zip(pairs, means, strict=True))]
    parts = averaged(torch.cat(parts), group).split([len(part) for part in parts])
    both = zip(parts[: len(means)], parts[len(means) :], shifts, strict=True)
    return [(first + shift, second - first * first) for first, second, shift in both]


def gathered(images: Tensor, group: Group | None) -> Tensor:
    """The whole batch (N, ...) on every rank, from each rank's share."""
    if group is None:
        return images
    parts = [torch.empty_like(images) for _ in range(group.size())]
    dist.all_gather(parts, images.contiguous(), group=group)
    return torch.cat(parts)
