"""The paper's equations, one class each, that add up: CrossEntropy() + 10.0 * FeatureStatistics()."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinv.feature_statistics import DISTANCES, Statistics, at_least_float32, batchnorm_statistics, moments
from dinv.files import sha256_text
from dinv.group import Group, moments_of_all
from dinv.models.classifier import Classifier, places
from dinv.precision import autocast
from dinv.preflight import private


@dataclass(frozen=True)
class View:
    """What a term makes its scalar of.

    Attributes:
        pixels: (N, C, H, W) in the teacher's normalised units, as the paper's optimiser holds them.
        labels: (N,) int64.
        logits, features: the teacher's (N, K), and its tensors by layer name (`feature_statistics.recorded`).
        images: the same pixels in [0, 1], for networks with a normalisation of their own.
        precision: what networks compute in, "float32" or "bfloat16".
        group: the processes that share the batch, of which this is one's part; None: this is all of it.
    """

    pixels: Tensor
    labels: Tensor
    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None
    precision: str = "float32"
    group: Group | None = None


class Term:
    """One equation. A subclass sets `name` and defines `__call__(view) -> scalar`."""

    name = "term"

    def bind(self, teacher: nn.Module) -> Term:
        """The term, ready for this teacher: looks up what it needs and refuses early.

        Keep references to the teacher's tensors, not copies: its weights may change between inversions.
        """
        return self

    def layers(self) -> tuple[str, ...]:
        """Layers of the teacher whose tensors the term wants in `view.features`."""
        return ()

    def digest_parts(self) -> dict | tuple:
        """For `files.digest`: the attributes; of a class outside `dinv` its source as well."""
        if type(self).__module__.startswith("dinv."):
            return vars(self)
        with suppress(OSError, TypeError):  # typed at a prompt, it has none
            return sha256_text(inspect.getsource(type(self))), vars(self)
        return "", vars(self)

    def __call__(self, view: View) -> Tensor:
        raise NotImplementedError

    def __add__(self, other: Term | Objective) -> Objective:
        return 1.0 * self + other

    def __mul__(self, weight: float) -> Objective:
        return Objective(((_weight(weight), self),))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms; it can be added to and scaled as well."""

    parts: tuple[tuple[float, Term], ...]

    def __add__(self, other: Term | Objective) -> Objective:
        other = 1.0 * other if isinstance(other, Term) else other
        return Objective(self.parts + other.parts) if isinstance(other, Objective) else NotImplemented

    def __mul__(self, weight: float) -> Objective:
        weight = _weight(weight)
        return Objective(tuple((_weight(weight * w), term) for w, term in self.parts))

    __rmul__ = __mul__

    @property
    def names(self) -> tuple[str, ...]:
        """One name per term; where two terms share theirs, the second is numbered."""
        names = [term.name for _, term in self.parts]
        earlier = [names[:index].count(name) for index, name in enumerate(names)]
        return tuple(f"{name} #{n + 1}" if n else name for name, n in zip(names, earlier, strict=True))

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(weight for weight, _ in self.parts)

    def bind(self, teacher: nn.Module) -> Objective:
        """Drop the terms of weight zero and make the others ready for `teacher` (see `Term.bind`)."""
        parts = tuple((weight, term.bind(teacher)) for weight, term in self.parts if weight > 0)
        if not parts:
            raise ValueError("every weight of the objective is zero: there is nothing to minimise")
        return Objective(parts)

    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, term in self.parts for name in term.layers()))

    def terms(self, view: View) -> Tensor:
        """The unweighted values, shape (terms,), in the order of `names`."""
        return torch.stack([at_least_float32(term(view)) for _, term in self.parts])

    def __call__(self, view: View) -> Tensor:
        terms = self.terms(view)
        return terms @ terms.new_tensor(self.weights)

    def __str__(self) -> str:
        return " + ".join(term.name if w == 1 else f"{w:g} * {term.name}" for w, term in self.parts)


def _weight(weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"a term is scaled by a number, got {type(weight).__name__}")
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight {weight} of a term must be finite and not negative: it is minimised")
    return float(weight)


class CrossEntropy(Term):
    """L(x, y): cross-entropy of the teacher's logits with the labels, mean over images. Equation 2 [M]."""

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

    def __init__(self, distance: str = "l2", first: float = 1.0, statistics: Statistics | None = None):
        if distance not in DISTANCES:
            raise ValueError(f"unknown distance {distance!r}: choose {' or '.join(DISTANCES)}")
        self.distance, self.first, self.statistics = distance, _weight(first), statistics

    def bind(self, teacher: nn.Module) -> FeatureStatistics:
        statistics = self.statistics or batchnorm_statistics(teacher, copy=False)
        bound = copy.copy(self)  # of a subclass, too
        bound.statistics = statistics.to(next(teacher.parameters()).device)
        return bound

    def layers(self) -> tuple[str, ...]:
        return self.statistics.layers if self.statistics is not None else ()

    def __call__(self, view: View) -> Tensor:
        if self.statistics is None:
            raise ValueError("FeatureStatistics must be bound to a teacher first: term.bind(teacher)")
        total, known = view.pixels.new_zeros(()), self.statistics
        means, variances = ([at_least_float32(x) for x in xs] for xs in (known.means, known.variances))
        pairs = [moments(view.features[x], shift=mean) for x, mean in zip(known.layers, means, strict=True)]
        if view.group is not None:
            pairs = moments_of_all(pairs, means, view.group)
        for index, four in enumerate(zip(*zip(*pairs, strict=True), means, variances, strict=True)):
            part = DISTANCES[self.distance](*four)
            total = total + (self.first * part if index == 0 else part)
        return total


class Competition(Term):
    """R_compete(x) = 1 - JS(p_T(x), p_S(x)): images on which teacher and student disagree cost less.

    Paper, equations 8 and 9 [M]; see `jensen_shannon`. An inversion uses a frozen copy of the student in eval
    mode, as it is when the inversion begins: train it further, and the next one sees the new weights.

    Args:
        student: a network over the teacher's classes, matched by name (`places`), of images in [0, 1].
        agreeing: count only images that both put into one class (as Fast-DFKD, Fang et al., AAAI 2022).
    """

    name = "competition"
    _places: list[int] | None = None  # of the teacher's classes among the student's

    def __init__(self, student: Classifier, agreeing: bool = False) -> None:
        self.student, self.agreeing = student, agreeing

    def bind(self, teacher: Classifier) -> Competition:
        bound = copy.copy(self)
        bound.student = private(self.student).freeze().to(teacher.mean.device)
        bound._places = places(teacher, self.student)
        return bound

    def __call__(self, view: View) -> Tensor:
        with autocast(view.pixels.device, view.precision):
            logits = self.student(view.images)
        logits = logits if self._places is None else logits[:, self._places]
        divergences = jensen_shannon(view.logits, logits)
        if self.agreeing:
            divergences = divergences * (view.logits.argmax(1) == logits.argmax(1))
        return 1 - divergences.mean()


def jensen_shannon(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """JS(p, q) = 1/2 KL(p | m) + 1/2 KL(q | m), m = (p + q) / 2, per image, from 0 to ln 2 (nats).

    From logits (N, K), in log space from end to end: no probability is clamped, so that an image counts as
    much with 1,000 classes as with 10, and one on which a network is certain still has a finite gradient.
    """
    log_p, log_q = (F.log_softmax(at_least_float32(logits), dim=1) for logits in (p_logits, q_logits))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * sum((log_x.exp() * (log_x - log_m)).sum(1) for log_x in (log_p, log_q))


def total_variation(pixels: Tensor) -> Tensor:
    """Sum over shifts by a pixel (right, down, two diagonals) of the differences' l2 norm; image mean."""
    height, width = pixels.shape[2:]
    row = torch.arange(height, device=pixels.device).view(-1, 1)
    column = torch.arange(width, device=pixels.device)
    total = pixels.new_zeros(())
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        # Not sliced: a slice's gradient is a copy into zeros, and eight of those took a tenth of a step.
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
