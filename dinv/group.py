"""One batch over several processes: each rank makes its share, and all match the statistics of the whole.

Run with `torchrun --nproc-per-node N`, call `torch.distributed.init_process_group()`, and hand
`torch.distributed.group.WORLD` to `invert`, `synthesize` or a `DistillStep`. Where every rank matches the
statistics of its own share instead, the objective is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinv.files import NoCheckpoint

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


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: Group) -> None:
    """Each of the tensors, all of one type, becomes its mean over the ranks, in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = (flat / group.size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def normalise_together(network: nn.Module, group: Group | None) -> None:
    """From now on the BatchNorm layers of `network` use, in training, the moments of all ranks' shares.

    It is torch's SyncBatchNorm, which runs on cards alone. ValueError for a layer of another kind.
    """

    class GroupBatchNorm(nn.BatchNorm2d):  # the group is in the class: a layer with one could not be copied
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return super().forward(x)
            variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
            [(mean, variance)] = moments_of_all([(mean, variance)], [self.running_mean], group)
            count = group.size() * x.numel() / x.shape[1]
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            mean, scale, bias = (v[:, None, None] for v in (mean, scale, self.bias))
            return ((x.float() - mean) * scale + bias).to(x.dtype)

    for name, layer in network.named_modules() if group else ():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            needed = (layer.weight, layer.running_mean, layer.momentum)
            if type(layer) is not nn.BatchNorm2d or any(x is None for x in needed):
                raise ValueError(f"{name} = {layer} cannot be shared by processes, a BatchNorm2d could be")
            layer.__class__ = GroupBatchNorm


def from_first(value: Any, group: Group) -> Any:
    """What rank 0 has for `value`, on every rank; tensors must lie on the CPU."""
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def by_rank(make: Callable[[], Any], group: Group | None) -> list[Any]:
    """What `make` gives on every rank, tensors on the CPU; what it raises on one, all ranks raise."""
    if group is None:
        return [make()]
    results: list[Any] = [None] * group.size()
    try:
        mine = make()
    except Exception as error:
        mine = error
    dist.all_gather_object(results, mine, group=group)
    for error in (result for result in results if isinstance(result, Exception)):
        raise error
    return results


def of_first(checkpoint: NoCheckpoint, group: Group | None) -> Any:
    """Rank 0's checkpoint for all ranks: it alone writes, and where it goes on, all do."""
    if group is None:
        return checkpoint
    own = NoCheckpoint() if group.rank() else checkpoint
    return SimpleNamespace(load=lambda: from_first(own.load(), group), save=own.save, progress=own.progress)
