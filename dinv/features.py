"""Feature statistics: what BatchNorm remembers of a lost training set, and what a batch shows.

For every BatchNorm layer the tensor of interest is its *input*. Its mean and biased variance, per
channel over images and positions, are compared with the layer's running mean and running variance.
A network without BatchNorm remembers nothing; there the same statistics are measured on images
that the user gives, at the outputs of its convolutions (in a transformer, of its LayerNorms).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dinv.models.classifier import evaluating, to_float
from dinv.store import sha256_tensors


class NoBatchNorm(ValueError):
    """A network without BatchNorm was asked for the statistics that only BatchNorm keeps."""


@dataclass(frozen=True)
class Statistics:
    """Per-channel means and biased variances, one pair a layer, in forward order of the modules.

    Attributes:
        layers: module names inside the classifier.
        means, variances: float32 tensors of shape (C_l,).
        source: where they come from, for tables.
    """

    layers: tuple[str, ...]
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]
    source: str

    def to(self, device: torch.device | str) -> Statistics:
        means = tuple(m.to(device) for m in self.means)
        return Statistics(self.layers, means, tuple(v.to(device) for v in self.variances), self.source)

    def digest(self) -> str:
        """SHA-256 over layers and values."""
        pairs = zip(self.layers, self.means, self.variances, strict=True)
        tensors = {name: torch.stack([m, v]).cpu() for name, m, v in pairs}
        return sha256_tensors(tensors, "statistics")


def feature_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers to watch: BatchNorm layers, else convolutions, LayerNorm or linear layers.

    A single convolution, such as the one that cuts a transformer's image into patches, is taken only where
    there is no LayerNorm.
    """
    for kind, least in ((_BatchNorm, 1), (nn.Conv2d, 2), (nn.LayerNorm, 1), (nn.Conv2d, 1), (nn.Linear, 1)):
        names = tuple(name for name, module in model.named_modules() if isinstance(module, kind))
        if len(names) >= least:
            return names
    raise ValueError(f"{type(model).__name__} has no BatchNorm, convolution or linear layer to watch")


def batchnorm_statistics(model: nn.Module) -> Statistics:
    """The running means and variances that the BatchNorm layers of `model` hold.

    Raises:
        NoBatchNorm: there is none (or none that tracks running statistics).
    """
    layers, means, variances = [], [], []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            layers.append(name)
            means.append(at_least_float32(module.running_mean.detach()).clone())
            variances.append(at_least_float32(module.running_var.detach()).clone())
    if not layers:
        raise NoBatchNorm(
            f"{getattr(model, 'name', type(model).__name__)} has no BatchNorm layer with running "
            "statistics, so nothing in it remembers the training set: measure them on images you "
            "have, measure_statistics(model, images), and pass FeatureStatistics(statistics=...)"
        )
    return Statistics(tuple(layers), tuple(means), tuple(variances), "BatchNorm buffers")


@contextmanager
def recorded(model: nn.Module, layers: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass of `model` leaves the watched tensors in the yielded dict.

    For a BatchNorm layer that is its input, for any other layer its output. The hooks are gone when
    the block is left, also by an exception.
    """
    features: dict[str, Tensor] = {}
    handles = watch(model, layers, features)
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def watch(model: nn.Module, layers: tuple[str, ...], features: dict[str, Tensor]) -> list:
    """Install the hooks behind `recorded`; returns their handles."""
    modules = dict(model.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        raise ValueError(f"the network has no layer {missing[0]!r}; it has {', '.join(modules)[:200]}")

    def keep_input(name):
        def hook(module, inputs):
            features[name] = inputs[0]

        return hook

    def keep_output(name):
        def hook(module, inputs, output):
            features[name] = output.clone()  # an in-place activation may write over it

        return hook

    return [
        modules[name].register_forward_pre_hook(keep_input(name))
        if isinstance(modules[name], _BatchNorm)
        else modules[name].register_forward_hook(keep_output(name))
        for name in layers
    ]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, where it is not float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def moments(x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of x, (N, C, ...) or, for tokens, (N, T, C).

    One pass over x: E[d] and E[d^2] of d = x - shift. With the shift near the mean, as the running
    mean is, their difference loses no digits, which plain E[x^2] - E[x]^2 would.
    """
    channel = 1 if x.dim() != 3 else 2
    axes = [axis for axis in range(x.dim()) if axis != channel]
    x = at_least_float32(x)
    if shift is None:
        variance, mean = torch.var_mean(x, dim=axes, unbiased=False)
        return mean, variance
    shape = [1] * x.dim()
    shape[channel] = -1
    d = x - shift.view(shape)
    first = d.mean(axes)
    return first + shift, (d * d).mean(axes) - first * first


@torch.no_grad()
def measure_statistics(
    model: nn.Module, images: Tensor, layers: tuple[str, ...] | None = None, batch: int = 500
) -> Statistics:
    """Statistics of `images`, float32 NCHW in [0, 1] or uint8, at the watched layers of `model`.

    All images count as one batch, whatever `batch` says: sums run over the parts in float64.
    """
    if images.shape[0] == 0:
        raise ValueError("measure_statistics was given an empty batch: at least one image is needed")
    layers = feature_layers(model) if layers is None else layers
    device = next(model.parameters()).device
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    with evaluating(model), recorded(model, layers) as features:
        for part in images.split(batch):
            model(to_float(part, device))
            weight = part.shape[0] / images.shape[0]
            for name in layers:
                mean, variance = (m.double() for m in moments(features[name]))
                first[name] = first.get(name, 0) + weight * mean
                second[name] = second.get(name, 0) + weight * (variance + mean**2)
    return Statistics(
        layers,
        tuple(first[n].float() for n in layers),
        tuple((second[n] - first[n] ** 2).clamp_min(0).float() for n in layers),
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


def layer_distances(found: Statistics, reference: Statistics, distance: str = "l2") -> Tensor:
    """One distance a layer, float32 of shape (layers,)."""
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}: choose {' or '.join(DISTANCES)}")
    if found.layers != reference.layers:
        raise ValueError("the two statistics are of different layers")
    return torch.stack(
        [
            DISTANCES[distance](*four)
            for four in zip(found.means, found.variances, reference.means, reference.variances, strict=True)
        ]
    )
