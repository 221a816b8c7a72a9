"""Feature statistics: what BatchNorm remembers of a lost training set, and what a batch shows.

For every BatchNorm layer the tensor of interest is its *input*. Its mean and biased variance, per
channel over images and positions, are compared with the layer's running mean and running variance.
Whatever else keeps these two counts as well: SyncBatchNorm, frozen BatchNorm, InstanceNorm that tracks.
A network without BatchNorm remembers nothing; there the same statistics are measured on images
that the user has, at the outputs of its convolutions (in a transformer, of its LayerNorms).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dinv.models.classifier import Classifier, check_range, evaluating, to_float
from dinv.preflight import preflight


class NoBatchNorm(ValueError):
    """A network without BatchNorm was asked for the statistics that only BatchNorm keeps."""


@dataclass(frozen=True)
class Statistics:
    """Per-channel means and biased variances, one pair per layer, in forward order of the modules.

    Attributes:
        layers: module names inside the classifier.
        means, variances: tensors of shape (C_l,), float32 unless the network is in another precision.
        source: where they come from, for tables.
    """

    layers: tuple[str, ...]
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]
    source: str = field(compare=False)

    def to(self, device: torch.device | str) -> Statistics:
        means = tuple(m.to(device) for m in self.means)
        return Statistics(self.layers, means, tuple(v.to(device) for v in self.variances), self.source)


def feature_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers to read: BatchNorm layers, else convolutions, LayerNorm or linear layers.

    Of a classifier those that are called in eval mode. A single convolution, such as the one that cuts a
    transformer's image into patches, counts only where there is no LayerNorm.
    """
    modules = _called(model)
    for kind, least in ((_BatchNorm, 1), (nn.Conv2d, 2), (nn.LayerNorm, 1), (nn.Conv2d, 1), (nn.Linear, 1)):
        names = tuple(
            name
            for name, module in modules.items()
            if isinstance(module, kind) or (kind is _BatchNorm and keeps_statistics(module))
        )
        if len(names) >= least:
            return names
    raise ValueError(f"{type(model).__name__} has no BatchNorm, convolution or linear layer to read")


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a layer holds a running mean and variance: BatchNorm of any kind, frozen or not, and such."""
    pair = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return all(isinstance(x, Tensor) and x.dim() == 1 for x in pair)


def _called(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name; of a classifier those that eval mode calls, in the order of their calls."""
    modules = dict(model.named_modules())
    if not isinstance(model, Classifier):
        return modules
    return {name: modules[name] for name in preflight(model).calls if name in modules}


def batchnorm_statistics(model: nn.Module, copy: bool = True) -> Statistics:
    """The running means and variances that the BatchNorm layers of `model` hold, see `keeps_statistics`.

    Of a classifier those of the layers that it calls in eval mode. A warning names BatchNorm layers that
    track no statistics.

    Args:
        copy: False gives the buffers themselves, which change when the network is trained or loaded.

    Raises:
        NoBatchNorm: there is no BatchNorm layer, or none that tracks running statistics.
    """
    called, title = _called(model), getattr(model, "name", type(model).__name__)
    modules = {name: module for name, module in called.items() if keeps_statistics(module)}
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if not modules or scripted:
        reason = "has no BatchNorm layer with running statistics, so nothing in it remembers the training set"
        if scripted:
            reason = "is TorchScript, whose layers cannot be watched, though they may hold statistics"
        raise NoBatchNorm(
            f"{title} {reason}: measure them on images you have, measure_statistics(model, images), and pass "
            "FeatureStatistics(statistics=...)"
        )
    without = [n for n, m in called.items() if isinstance(m, _BatchNorm) and not keeps_statistics(m)]
    if without:
        text = f"{title} keeps no statistics in {', '.join(without)}, which are left out"
        warnings.warn(text, UserWarning, stacklevel=2)
    means = [module.running_mean for module in modules.values()]
    variances = [module.running_var for module in modules.values()]
    if copy:
        means, variances = ([at_least_float32(x).clone() for x in xs] for xs in (means, variances))
    return Statistics(tuple(modules), tuple(means), tuple(variances), "BatchNorm buffers")


@contextmanager
def recorded(model: nn.Module, layers: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass of `model` leaves the tensors of `layers` in the yielded dict.

    For a BatchNorm layer that is its input, for any other layer its output, channels on the second axis. A
    layer that is called several times gives all its calls as one batch. The hooks are gone when the block
    is left, also by an exception.
    """
    features: dict[str, Tensor] = {}
    handles = register_hooks(model, layers, features)
    handles.append(model.register_forward_pre_hook(lambda module, inputs: features.clear()))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def register_hooks(model: nn.Module, layers: tuple[str, ...], features: dict[str, Tensor]) -> list:
    """Install the hooks behind `recorded`, which write into `features`; returns their handles.

    Clear the dictionary before each forward pass.
    """
    modules = dict(model.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        raise ValueError(f"the network has no layer {missing[0]!r}; it has {', '.join(modules)[:200]}")

    def keep(name, x):
        if name in features:  # a layer that is used twice
            x = torch.cat([y.flatten(2) if y.dim() > 2 else y[..., None] for y in (features[name], x)], dim=2)
        features[name] = x

    def keep_input(name, module, inputs):
        x = inputs[0]
        if isinstance(module, _InstanceNorm):  # the spread around each image's mean is what it remembers
            axes = list(range(2, x.dim()))
            x = x - x.mean(axes, keepdim=True) + x.mean([0, *axes], keepdim=True)
        keep(name, x)

    def keep_output(name, module, inputs, output):
        last = isinstance(module, nn.Linear) or len(getattr(module, "normalized_shape", ())) == 1
        last = last and not type(module).__name__.endswith("2d")  # LayerNorm2d sees (N, C, H, W)
        # cloned, as an in-place activation may write over it
        keep(name, output.movedim(-1, 1).clone() if last else output.clone())

    return [
        modules[name].register_forward_pre_hook(partial(keep_input, name))
        if keeps_statistics(modules[name]) or isinstance(modules[name], _BatchNorm)
        else modules[name].register_forward_hook(partial(keep_output, name))
        for name in layers
    ]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, unless it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def moments(x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of x, (N, C, ...).

    One pass over x: E[d] and E[d^2] of d = x - shift. With the shift near the mean, as the running
    mean is, their difference loses no digits, which plain E[x^2] - E[x]^2 would.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        return _Moments.apply(x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    x = at_least_float32(x)
    if shift is None:
        variance, mean = torch.var_mean(x, dim=axes, unbiased=False)
        return mean, variance
    d = x - shift.view(-1, *[1] * (x.dim() - 2))
    first = d.mean(axes)
    return first + shift, (d * d).mean(axes) - first * first


class _Moments(torch.autograd.Function):
    """`moments` on a card by the kernels of its BatchNorm: one pass forward, one back, in x's own precision.

    d mean / dx = 1/n and d variance / dx = 2 (x - mean) / n, n values per channel.
    """

    @staticmethod
    def forward(context, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = torch.batch_norm_stats(x, 1e-12)  # the scale: 1 / sqrt(variance + 1e-12)
        context.save_for_backward(x, mean)
        return mean, scale**-2 - 1e-12

    @staticmethod
    def backward(context, by_mean: Tensor, by_variance: Tensor) -> Tensor:
        x, mean = context.saved_tensors
        count = x.numel() // x.shape[1]
        one = torch.ones_like(mean)
        return torch.batch_norm_elemt(x, 2 * by_variance / count, by_mean / count, mean, one, 0.0)


@torch.no_grad()
def measure_statistics(
    model: nn.Module, images: Tensor, layers: tuple[str, ...] | None = None, batch_size: int = 500
) -> Statistics:
    """Statistics of `images`, float32 NCHW in [0, 1] or uint8, at `layers` of `model` (`feature_layers`).

    All images count as one batch, whatever `batch_size` says: sums run over the parts in float64.

    Raises:
        ValueError: no images, floats outside [0, 1], or a layer that the network does not have or call.
    """
    if images.shape[0] == 0:
        raise ValueError("measure_statistics was given an empty batch: at least one image is needed")
    check_range(images)
    layers = feature_layers(model) if layers is None else layers
    device = next(model.parameters()).device
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    with evaluating(model), recorded(model, layers) as features:
        for part in images.split(batch_size):
            model(to_float(part, device))
            weight = part.shape[0] / images.shape[0]
            missing = [name for name in layers if name not in features]
            if missing:
                raise ValueError(f"layer {missing[0]} is never called: it is no part of an image's way")
            for name in layers:
                mean, variance = (m.cpu().double() for m in moments(features[name]))  # some have no float64
                first[name] = first.get(name, 0) + weight * mean
                second[name] = second.get(name, 0) + weight * (variance + mean**2)
    return Statistics(
        layers,
        tuple(first[n].float().to(device) for n in layers),
        tuple((second[n] - first[n] ** 2).clamp_min(0).float().to(device) for n in layers),
        f"{images.shape[0]} images",
    )


def l2_distance(mean: Tensor, variance: Tensor, mean0: Tensor, variance0: Tensor) -> Tensor:
    """One layer's part of R_feature: ||mu - mu0||_2 + ||var - var0||_2 (paper, equation 4 [M])."""
    return torch.linalg.vector_norm(mean - mean0) + torch.linalg.vector_norm(variance - variance0)


def kl_distance(mean: Tensor, variance: Tensor, mean0: Tensor, variance0: Tensor) -> Tensor:
    """KL( N(mu, var) || N(mu0, var0) ), mean over channels: free of the layer's scale."""
    variance, variance0 = variance.clamp_min(1e-8), variance0.clamp_min(1e-8)
    ratio = variance / variance0
    return 0.5 * (ratio - ratio.log() - 1 + (mean - mean0) ** 2 / variance0).mean()


DISTANCES = {"l2": l2_distance, "kl": kl_distance}


def layer_distances(statistics: Statistics, reference: Statistics, distance: str = "l2") -> Tensor:
    """One distance per layer, float32 of shape (layers,)."""
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}: choose {' or '.join(DISTANCES)}")
    if statistics.layers != reference.layers:
        raise ValueError("the two statistics are of different layers")
    pairs = (statistics.means, statistics.variances, reference.means, reference.variances)
    return torch.stack([DISTANCES[distance](*four) for four in zip(*pairs, strict=True)])
