"""What the images are worth: to the teacher, to a network that took no part, to its statistics."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor, nn

from dinv.features import (
    Statistics,
    batchnorm_statistics,
    layer_distances,
    measure_statistics,
)
from dinv.models import Classifier, evaluating, inputs_of, resized, to_float
from dinv.training import accuracy, predict

__all__ = [
    "Cover", "accuracy", "agreement", "confidence", "confusion", "cover", "embed", "feature_distances",
    "nearest", "predict",
]  # fmt: skip


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


def confusion(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrix (K, K), float32: row k holds, in percent, what the network makes of class k."""
    classes = len(model.classes)
    said = predict(model, images).argmax(1).cpu()
    counts = (labels.cpu() * classes + said).bincount(minlength=classes**2).view(classes, classes).float()
    return 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)


def top(
    model: Classifier, images: Tensor, labels: Tensor, k: int = 5, batch: int = 50, resize: bool = True
) -> float:
    """Percent of the images whose label is among the model's `k` likeliest answers.

    Images of another size than the model's are resized: a judge may have a size of its own. Those that were
    made at a coarser size are seen as they are with `resize=False`.
    """
    if resize:
        logits = predict(model, resized(images, model.size), batch)
    else:
        with torch.no_grad(), evaluating(model):
            logits = model(to_float(images, model.mean.device)).float()
    return 100 * (logits.topk(k, 1).indices == labels.to(logits.device)[:, None]).any(1).float().mean().item()


def inception_score(model: Classifier, images: Tensor, batch: int = 50) -> float:
    """exp of the mean KL of single answers from their mean (Salimans et al., 2016), as `model` answers.

    Between 1 and the number of classes, and never above the number of images: scores of different counts
    do not compare, nor do those of different networks. By torchmetrics, one split.

    Args:
        images: uint8 or float in [0, 1], resized to the model's size.
    """
    from torchmetrics.image.inception import InceptionScore

    class Answers(nn.Module):
        def forward(self, part: Tensor) -> Tensor:
            return predict(model, resized(part, model.size), batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the memory it takes, and of the deviation over a single split
        score = InceptionScore(feature=Answers(), splits=1)
        for part in images.split(batch):
            score.update(part)
        return score.compute()[0].item()


def diversity(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Mean cosine distance between embeddings of two images of one class: 0 if they are all the same."""
    features = F.normalize(embed(model, resized(images, model.size)).cpu(), dim=1)
    labels = labels.cpu()
    pairs = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
    if not pairs.any():
        raise ValueError("no class has two images, so there is nothing to compare")
    return (1 - features @ features.T)[pairs].mean().item()


# ---- in the space of features ----------------------------------------------------------------------


def spectrum(images: Tensor, bands: int = 8) -> Tensor:
    """Share of the images' energy by spatial frequency, each image's mean apart: (bands,), sum 1.

    Bands are equally wide rings from 0 to sqrt(1/2), the highest that a square grid of pixels knows, in
    cycles a pixel.

    Args:
        images: uint8 or float (N, C, H, W), H equal to W.
    """
    pixels = to_float(images, images.device)
    energy = torch.fft.fft2(pixels - pixels.mean((2, 3), keepdim=True)).abs().square().sum((0, 1))
    axis = torch.fft.fftfreq(pixels.shape[-1], device=pixels.device)
    ring = (axis.square() + axis.square()[:, None]).sqrt() / 0.5**0.5
    index = (ring * bands).long().clamp_max(bands - 1).flatten()
    return energy.new_zeros(bands).index_add_(0, index, energy.flatten()) / energy.sum()


def embed(model: Classifier, images: Tensor) -> Tensor:
    """What the network's last linear layer sees, float32 (N, D): images that mean the same lie close.

    Raises:
        ValueError: the network has no linear layer.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{model.name} has no linear layer, so no embedding before it")
    with inputs_of(linear[-1]) as seen:
        predict(model, images)
    return torch.cat(seen).flatten(1).float()


@dataclass(frozen=True)
class Cover:
    """How a set of images lies to real ones in an embedding; shares in [0, 1], density from 0 up.

    Attributes:
        precision, recall: the share of the images near a real one, and of the real ones near an image
            (Kynkaanniemi et al., NeurIPS 2019).
        density, coverage: in how many real neighbourhoods an image lies, over k, and the share of real
            neighbourhoods that have an image (Naeem et al., ICML 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def cover(real: Tensor, made: Tensor, k: int = 5) -> Cover:
    """Precision, recall, density and coverage of `made` (M, D) for `real` (N, D).

    A point's neighbourhood is the ball that reaches its k-th nearest neighbour in its own set.

    Raises:
        ValueError: a set has no k neighbours.
    """
    if not 1 <= k < min(len(real), len(made)):
        raise ValueError(f"{k} neighbours want more points in each set than {len(real)} and {len(made)}")

    def radii(points: Tensor) -> Tensor:
        return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the nearest is the point itself

    apart = torch.cdist(real, made)  # (N, M)
    in_real, in_made = apart <= radii(real)[:, None], apart <= radii(made)[None, :]
    return Cover(
        precision=in_real.any(0).float().mean().item(),
        recall=in_made.any(1).float().mean().item(),
        density=in_real.sum(0).float().mean().item() / k,
        coverage=in_real.any(1).float().mean().item(),
    )


def nearest(points: Tensor, among: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, count) of the nearest of `among` (M, D) to each of `points` (N, D)."""
    parts = [torch.cdist(part, among).topk(count, largest=False) for part in points.split(1024)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def holds(values: Sequence[float], at_least: float = -math.inf, at_most: float = math.inf) -> bool | None:
    """Whether the mean of `values`, one a seed, lies within the bounds with all of its 95 % interval.

    The interval is Student's t. None, open, for one value within them: a single run shows no scatter.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return None if at_least <= mean <= at_most else False
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return bool(at_least <= mean - half and mean + half <= at_most)
