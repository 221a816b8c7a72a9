"""The paper's equations, one class each, added up and scaled like the sums they are.

    objective = CrossEntropy() + 2.5e-5 * TotalVariation() + 10.0 * FeatureStatistics()

A term sees a `View`: the pixels, the labels, and what the teacher made of them. It returns one scalar.
An `Objective` is a weighted sum of terms.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinv.features import DISTANCES, Statistics, at_least_float32, batchnorm_statistics, moments
from dinv.models.classifier import Classifier, autocast, structure
from dinv.store import sha256_tensors, stored


@dataclass(frozen=True)
class View:
    """What a term may look at.

    Attributes:
        pixels: (N, C, H, W) in the teacher's normalised units, as the paper's optimiser holds them.
        labels: (N,) int64.
        logits: (N, K) of the teacher.
        features: the teacher's watched tensors by layer name (see `features.recorded`).
        images: the same pixels in [0, 1], for networks with a normalisation of their own.
        share: of the whole batch that these images are; 1 unless it is taken in parts.
        rest: by layer, what the other parts add to the batch's moments, see `moments`.
    """

    pixels: Tensor
    labels: Tensor
    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None
    share: float | Tensor = 1.0
    rest: Mapping[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def moments(self, name: str, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel of a watched layer, over the whole batch.

        Where the batch is taken in parts, `rest` has a centre c of the layer, and the sums of the other
        parts' E[x - c] and E[(x - c)^2], each times the part's share.
        """
        mean, variance = moments(self.features[name], shift)
        if name not in self.rest:
            return mean, variance
        centre, first, second = self.rest[name]
        away = mean - centre
        first = first + self.share * away
        return centre + first, second + self.share * (variance + away**2) - first**2


class Term:
    """One equation. Subclasses set `name` and define `__call__(view) -> scalar`.

    The scalar is a mean over images, or with `whole` a function of the batch's moments (`View.moments`).
    """

    name = "term"
    whole = False

    def bind(self, teacher: nn.Module) -> Term:
        """The term, ready for this teacher: looks up what it needs and refuses early."""
        return self

    def layers(self) -> tuple[str, ...]:
        """Layers of the teacher whose tensors the term wants in `view.features`."""
        return ()

    def signature(self) -> tuple:
        """What makes a compiled step of this term another one: kind, options, shapes.

        A term with attributes is by default interchangeable with itself alone.
        """
        return (type(self), self) if vars(self) else (type(self),)

    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that may differ between two terms of one signature."""
        return ()

    def config(self) -> dict[str, Any]:
        """The term in plain words and numbers: part of the key of what is made with it."""
        return {"term": self.name, **vars(self)}

    def __call__(self, view: View) -> Tensor:
        raise NotImplementedError

    def __add__(self, other: Term | Objective) -> Objective:
        return Objective(((1.0, self),)) + other

    def __mul__(self, weight: float) -> Objective:
        return Objective(((_weight(weight), self),))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, itself to be added to and scaled."""

    parts: tuple[tuple[float, Term], ...]

    def __add__(self, other: Term | Objective) -> Objective:
        if isinstance(other, Term):
            other = Objective(((1.0, other),))
        if not isinstance(other, Objective):
            return NotImplemented
        return Objective(self.parts + other.parts)

    def __mul__(self, weight: float) -> Objective:
        weight = _weight(weight)
        return Objective(tuple((_weight(weight * w), term) for w, term in self.parts))

    __rmul__ = __mul__

    @property
    def names(self) -> tuple[str, ...]:
        """One name a term; where two terms share theirs, the second is numbered."""
        names = [term.name for _, term in self.parts]
        earlier = [names[:index].count(name) for index, name in enumerate(names)]
        return tuple(f"{name} #{n + 1}" if n else name for name, n in zip(names, earlier, strict=True))

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(weight for weight, _ in self.parts)

    def bind(self, teacher: nn.Module) -> Objective:
        """Drop the terms of weight zero and make the others ready for `teacher`."""
        parts = tuple((weight, term.bind(teacher)) for weight, term in self.parts if weight > 0)
        if not parts:
            raise ValueError("every weight of the objective is zero: there is nothing to minimise")
        return Objective(parts)

    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, term in self.parts for name in term.layers()))

    def signature(self) -> tuple:
        return tuple(term.signature() for _, term in self.parts)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for _, term in self.parts for tensor in term.tensors())

    def config(self) -> list[dict[str, Any]]:
        return [{"weight": weight, **term.config()} for weight, term in self.parts if weight > 0]

    def terms(self, view: View) -> Tensor:
        """The unweighted values, shape (terms,), in the order of `names`."""
        return torch.stack([at_least_float32(term(view)) for _, term in self.parts])

    def __call__(self, view: View) -> Tensor:
        """The weighted sum, a scalar."""
        terms = self.terms(view)
        return terms @ terms.new_tensor(self.weights)

    def __str__(self) -> str:
        return " + ".join(
            term.name if weight == 1 else f"{weight:g} * {term.name}" for weight, term in self.parts
        )


def _weight(weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"a term is scaled by a number, got {type(weight).__name__}")
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(
            f"weight {weight} of a term must be finite and not negative: every term is minimised"
        )
    return float(weight)


class CrossEntropy(Term):
    """L(x, y): cross-entropy of the teacher's logits with the wanted labels, mean over images.

    Paper, equation 2 [M].
    """

    name = "cross-entropy"

    def __call__(self, view: View) -> Tensor:
        return F.cross_entropy(at_least_float32(view.logits), view.labels)


class TotalVariation(Term):
    """R_TV(x): see `total_variation`. Paper, equation 3 [M]."""

    name = "total variation"

    def __call__(self, view: View) -> Tensor:
        return total_variation(view.pixels)


class L2Norm(Term):
    """R_l2(x): the l2 norm of an image, mean over images. Paper, equation 3 [M]."""

    name = "l2 norm"

    def __call__(self, view: View) -> Tensor:
        return l2_norm(view.pixels)


class FeatureStatistics(Term):
    """R_feature(x): distance of a batch's feature statistics to the training set's. Equation 4 [M].

    Args:
        distance: "l2", the paper's sum of norms, or "kl", the scale-free Gaussian KL per channel.
        first: multiplier of the first layer's part; the released ImageNet settings use 10.
        statistics: what to match; by default the teacher's own BatchNorm buffers.
    """

    name = "feature statistics"
    whole = True

    def __init__(
        self, distance: str = "l2", first: float = 1.0, statistics: Statistics | None = None
    ) -> None:
        if distance not in DISTANCES:
            raise ValueError(f"unknown distance {distance!r}: choose {' or '.join(DISTANCES)}")
        self.distance = distance
        self.first = _weight(first)
        self.statistics = statistics

    def bind(self, teacher: nn.Module) -> FeatureStatistics:
        statistics = self.statistics or batchnorm_statistics(teacher)
        device = next(teacher.parameters()).device
        # a copy: a step that is used again overwrites what it holds
        return FeatureStatistics(self.distance, self.first, copy.deepcopy(statistics.to(device)))

    def layers(self) -> tuple[str, ...]:
        return self.statistics.layers if self.statistics is not None else ()

    def signature(self) -> tuple:
        return (type(self), self.distance, self.first, self.layers())

    def tensors(self) -> tuple[Tensor, ...]:
        return self.statistics.means + self.statistics.variances if self.statistics else ()

    def config(self) -> dict[str, Any]:
        source = self.statistics.digest() if self.statistics else "BatchNorm buffers"
        return {
            "term": self.name, "distance": self.distance, "first": self.first, "statistics": source,
        }  # fmt: skip

    def __call__(self, view: View) -> Tensor:
        if self.statistics is None:
            raise ValueError("FeatureStatistics must be bound to a teacher first: term.bind(teacher)")
        distance, reference = DISTANCES[self.distance], self.statistics
        total = view.pixels.new_zeros(())
        for index, name in enumerate(reference.layers):
            mean0, variance0 = reference.means[index], reference.variances[index]
            mean, variance = view.moments(name, shift=mean0)
            part = distance(mean, variance, mean0, variance0)
            total = total + (self.first * part if index == 0 else part)
        return total


class Competition(Term):
    """R_compete(x) = 1 - JS(p_T(x), p_S(x)): images on which teacher and student disagree cost less.

    Paper, equations 8 and 9 [M]; see `jensen_shannon`. The student is copied, frozen and in eval mode, as an
    inversion begins: train it further, and the next inversion competes with what it has become.

    Args:
        student: a network over the teacher's classes. It sees the images in [0, 1].
        agreeing: count only images that both put into the same class, as Fast-DFKD (Fang et al., AAAI 2022)
            does: where they disagree already there is nothing to gain.
    """

    name = "competition"

    def __init__(self, student: Classifier, agreeing: bool = False) -> None:
        self.student, self.agreeing = student, agreeing

    def bind(self, teacher: nn.Module) -> Competition:
        classes = [len(net.classes) for net in (teacher, self.student)]
        if classes[0] != classes[1]:
            raise ValueError(
                f"teacher and student compete over the same classes, got {classes[0]} and {classes[1]}"
            )
        student = copy.deepcopy(self.student).freeze().to(next(teacher.parameters()).device)
        return Competition(student.to(memory_format=torch.channels_last), self.agreeing)

    def signature(self) -> tuple:
        return (type(self), self.agreeing, structure(self.student))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.student.state_dict().values())

    def config(self) -> dict[str, Any]:
        student = sha256_tensors(stored(self.student.state_dict()), "")
        return {"term": self.name, "student": student, "agreeing": self.agreeing}

    def __call__(self, view: View) -> Tensor:
        with autocast(view.pixels.device):
            logits = self.student(view.images)
        divergences = jensen_shannon(view.logits, logits)
        if self.agreeing:
            divergences = divergences * (view.logits.argmax(1) == logits.argmax(1))
        return 1 - divergences.mean()


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """JS(p, q) = 1/2 KL(p | m) + 1/2 KL(q | m), m = (p + q) / 2, in nats, one an image.

    From logits (N, K), in log space from end to end: no probability is clamped, so that an image counts
    as much with a thousand classes as with ten, and one on which either network is certain still has
    a finite gradient. Between 0 and ln 2.
    """
    log_p, log_q = (F.log_softmax(at_least_float32(logits), dim=1) for logits in (one, other))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergences = (log_x.exp() * (log_x - log_m) for log_x in (log_p, log_q))
    return 0.5 * sum(d.sum(1) for d in divergences)


def total_variation(pixels: Tensor) -> Tensor:
    """Sum of the l2 norms of an image's differences to its four one-pixel shifts, mean over images.

    The shifts are horizontal, vertical and the two diagonals.
    """
    height, width = pixels.shape[2:]
    row = torch.arange(height, device=pixels.device).view(-1, 1)
    column = torch.arange(width, device=pixels.device)
    total = pixels.new_zeros(())
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        # Rolled and masked, not sliced: the gradient of a slice is a copy into zeros, and eight of those
        # took a tenth of a compiled step.
        neighbour = torch.roll(pixels, (-down, -right), (2, 3))
        inside = (row + down < height) & (column + right >= 0) & (column + right < width)
        total = total + _norms((neighbour - pixels) * inside).mean()
    return total


def l2_norm(pixels: Tensor) -> Tensor:
    """l2 norm of an image over channels and positions, mean over images."""
    return _norms(pixels).mean()


def _norms(x: Tensor) -> Tensor:
    """(N,) l2 norms of (N, C, H, W); the small constant keeps the gradient finite at zero."""
    return (at_least_float32(x).square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()
