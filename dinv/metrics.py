"""What the images are worth: to the teacher, to a network that took no part, to its statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from dinv.features import (
    Statistics,
    batchnorm_statistics,
    layer_distances,
    measure_statistics,
)
from dinv.models import Classifier
from dinv.training import accuracy, predict

__all__ = ["accuracy", "agreement", "confidence", "feature_distances", "predict"]


def feature_distances(
    model: Classifier,
    images: Tensor,
    batch: int = 256,
    distance: str = "l2",
    reference: Statistics | None = None,
) -> Tensor:
    """Distance of the images' feature statistics to the network's own, layer by layer.

    A batch's statistics move with its size, so the images are taken `batch` at a time, the last
    incomplete batch left out, and the distances are averaged over the batches.

    Args:
        images: (N, C, H, W), uint8 or float32 in [0, 1], N at least `batch`.
        reference: what to compare with; by default the BatchNorm buffers.

    Returns:
        float32 (layers,). Their sum is R_feature.
    """
    if not 1 <= batch <= len(images):
        raise ValueError(f"{len(images)} images do not fill one batch of {batch}")
    reference = (reference or batchnorm_statistics(model)).to("cpu")
    whole = images[: len(images) // batch * batch]
    found = [
        layer_distances(measure_statistics(model, part, reference.layers).to("cpu"), reference, distance)
        for part in whole.split(batch)
    ]
    return torch.stack(found).mean(0)


def confidence(model: Classifier, images: Tensor) -> float:
    """Mean probability, in percent, that the network gives its own first choice."""
    return 100 * predict(model, images).softmax(1).max(1).values.mean().item()


def agreement(one: Classifier, other: Classifier, images: Tensor) -> float:
    """Percent of the images that two networks put into the same class, right or wrong."""
    return 100 * (predict(one, images).argmax(1) == predict(other, images).argmax(1)).float().mean().item()
