"""What the images are worth: to the teacher, to a network that took no part, beside real images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinv.feature_statistics import Statistics, batchnorm_statistics, layer_distances, measure_statistics
from dinv.models import Classifier, evaluating, inputs_of, places, resized, to_float
from dinv.preflight import preflight
from dinv.training import accuracy, predict

__all__ = [
    "PRDC", "accuracy", "agreement", "confidence", "confusion_matrix", "diversity", "embed", "predict",
    "feature_distances", "inception_score", "nearest_neighbors", "prdc", "spectrum", "topk_accuracy",
]  # fmt: skip


def feature_distances(
    model: Classifier,
    images: Tensor,
    batch_size: int = 256,
    distance: str = "l2",
    reference: Statistics | None = None,
) -> Tensor:
    """Distance of the images' feature statistics to the network's own: float32 (layers,), sum R_feature.

    A batch's statistics depend on its size, so the images are measured `batch_size` at a time, without
    the last incomplete batch, and the distances are averaged over the batches.

    Args:
        images: (N, C, H, W), uint8 or float32 in [0, 1], N at least `batch_size`, else a ValueError.
        distance: "l2" or "kl".
        reference: the statistics to compare with; by default the BatchNorm buffers.
    """
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"{len(images)} images do not fill one batch of {batch_size}")
    reference = (reference or batchnorm_statistics(model)).to("cpu")
    whole = images[: len(images) // batch_size * batch_size]
    distances = [
        layer_distances(measure_statistics(model, part, reference.layers).to("cpu"), reference, distance)
        for part in whole.split(batch_size)
    ]
    return torch.stack(distances).mean(0)


def confidence(model: Classifier, images: Tensor) -> float:
    """Mean probability of the network's first choice, in percent."""
    return 100 * predict(model, images).softmax(1).max(1).values.mean().item()


def agreement(one: Classifier, other: Classifier, images: Tensor) -> float:
    """Percent of the images that two networks put into the same class, right or wrong; see `places`."""
    order, logits = places(one, other), predict(other, images)
    answers = (logits if order is None else logits[:, order]).argmax(1)
    return 100 * (predict(one, images).argmax(1) == answers).float().mean().item()


def confusion_matrix(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrix (K, K), float32: row k holds the predictions for class k, in percent."""
    classes, predictions = range(len(model.classes)), predict(model, images).argmax(1).cpu()
    shares = sklearn.metrics.confusion_matrix(labels.cpu(), predictions, labels=classes, normalize="true")
    return torch.from_numpy(100 * shares).float()


def topk_accuracy(
    model: Classifier, images: Tensor, labels: Tensor, k: int = 5, batch_size: int = 50, resize: bool = True
) -> float:
    """Percent of the images whose label is among the model's `k` most probable classes.

    Images of another size than the model's are resized, since a verifier may have a size of its own.
    With `resize=False` they go in as they are, all in one batch.
    """
    if resize:
        logits = predict(model, resized(images, model.size), batch_size)
    else:
        with torch.no_grad(), evaluating(model):
            logits = model(to_float(images, model.mean.device)).float()
    return 100 * (logits.topk(k, 1).indices == labels.to(logits.device)[:, None]).any(1).float().mean().item()


def inception_score(model: Classifier, images: Tensor, batch_size: int = 50) -> float:
    """exp of the mean KL of the model's answers from their mean (Salimans et al., 2016).

    Between 1 and the number of classes, and never above the number of images: scores of different counts
    do not compare, nor do those of different networks. Images, uint8 or float in [0, 1], are resized to the
    model's size. By torchmetrics, one split.
    """
    from torchmetrics.image.inception import InceptionScore  # seconds, which only this metric has to spend

    class Logits(nn.Module):
        def forward(self, part: Tensor) -> Tensor:
            return predict(model, resized(part, model.size), batch_size)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory it takes, and the deviation over a single split
        score = InceptionScore(feature=Logits(), splits=1)
        for part in images.split(batch_size):
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


def spectrum(images: Tensor, bands: int = 8) -> Tensor:
    """Share of the images' energy by spatial frequency, without each image's mean: (bands,), sum 1.

    Bands are equally wide rings from 0 to sqrt(1/2) cycles per pixel, the highest frequency of square
    images, uint8 or float (N, C, H, H).
    """
    pixels = to_float(images, images.device)
    energy = torch.fft.fft2(pixels - pixels.mean((2, 3), keepdim=True)).abs().square().sum((0, 1))
    axis = torch.fft.fftfreq(pixels.shape[-1], device=pixels.device)
    ring = (axis.square() + axis.square()[:, None]).sqrt() / 0.5**0.5
    index = (ring * bands).long().clamp_max(bands - 1).flatten()
    return energy.new_zeros(bands).index_add_(0, index, energy.flatten()) / energy.sum()


def embed(model: Classifier, images: Tensor) -> Tensor:
    """Inputs of the layer that gives the logits, float32 (N, D): images that mean the same lie close.

    Before a 1x1 convolution they are averaged over positions.
    """
    head = preflight(model).head
    if not head:
        raise ValueError(
            f"{model.name} has no embedding: no linear layer nor 1x1 convolution gives its logits"
        )
    with inputs_of(model.get_submodule(head)) as inputs:
        predict(model, images)
    whole = torch.cat(inputs)
    return (whole.mean((2, 3)) if whole.dim() == 4 else whole.flatten(1)).float()


@dataclass(frozen=True)
class PRDC:
    """How images lie to real ones in an embedding; shares in [0, 1], density from 0 up.

    Attributes:
        precision, recall: the share of the images near a real one, and of the real ones near an image
            (Kynkaanniemi et al., NeurIPS 2019).
        density, coverage: the mean number of real neighbourhoods around an image, over k, and the share of
            real neighbourhoods that have an image (Naeem et al., ICML 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, images: Tensor, k: int = 5) -> PRDC:
    """Precision, recall, density and coverage of embedded `images` (M, D) for embedded `real` ones (N, D).

    A point's neighbourhood is the ball that reaches its k-th nearest neighbour in its own set."""
    if not 1 <= k < min(len(real), len(images)):
        raise ValueError(f"k={k} neighbours need more points in each set than {len(real)} and {len(images)}")

    def radii(points: Tensor) -> Tensor:
        return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the nearest is the point itself

    distances = torch.cdist(real, images)  # (N, M)
    in_real, in_images = distances <= radii(real)[:, None], distances <= radii(images)[None, :]
    return PRDC(
        precision=in_real.any(0).float().mean().item(),
        recall=in_images.any(1).float().mean().item(),
        density=in_real.sum(0).float().mean().item() / k,
        coverage=in_real.any(1).float().mean().item(),
    )


def nearest_neighbors(points: Tensor, among: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, count) of the nearest of `among` (M, D) to each of `points` (N, D)."""
    parts = [torch.cdist(part, among).topk(count, largest=False) for part in points.split(1024)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
