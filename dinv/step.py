"""One step of inversion, of pixels or of a generator: terms, gradient, jitter and flips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dinv.compiling import Compiled, Recorded
from dinv.data.dataset import sent
from dinv.feature_statistics import register_hooks
from dinv.group import Group, averaged, share
from dinv.models.classifier import Classifier
from dinv.objectives import Competition, Objective, Term, View
from dinv.precision import autocast, choose
from dinv.preflight import preflight, private


class NotFinite(FloatingPointError):
    """A term of the objective left the real numbers."""


class Step:
    """`step(pixels, labels, weights) -> (terms, gradient)` for one teacher and one objective.

    It works on frozen private copies of the teacher and of every student that competes; `reload` brings
    them up to date, so that one compiled step serves networks that are trained further.
    """

    def __init__(
        self,
        teacher: Classifier,
        objective: Objective | Term,
        compiled: bool,
        precision: str = "auto",
        group: Group | None = None,
    ) -> None:
        objective, called = 1.0 * objective, preflight(teacher, pixels=True).calls
        self.teacher = private(teacher).freeze()
        self.objective = objective.bind(self.teacher)
        self.names, self.weights = self.objective.names, self.objective.weights
        self.features: dict[str, Tensor] = {}
        for name in self.objective.layers():
            if name in dict(teacher.named_modules()) and name not in called:
                advice = "it is no part of what an image goes through"
                raise ValueError(f"layer {name} of {teacher.name} is never called: {advice}")
        register_hooks(self.teacher, self.objective.layers(), self.features)
        terms = [term for weight, term in objective.parts if weight > 0]
        pairs = zip((term for _, term in self.objective.parts), terms, strict=True)
        students = [(own.student, term.student) for own, term in pairs if isinstance(own, Competition)]
        self._copies = [(self.teacher, teacher), *students]
        self.precision = choose(precision, teacher.mean.device, *(own for own, _ in self._copies))
        self._terms = Compiled(self._forward, self.teacher, compiled)
        self._recorded, self.group = Recorded(self._descent, self.teacher.buffers), group
        self._recorded.on = group is None

    @property
    def compiled(self) -> bool:
        return self._terms.on

    @property
    def compile_seconds(self) -> float:
        return self._terms.seconds

    def reload(self) -> None:
        """Take over the weights that the teacher and the students have now."""
        _load(self._copies)

    def load_student(self, student: Classifier) -> None:
        """From now on `student`, a network of the same kind, competes in place of the objective's own."""
        if len(self._copies) == 1:
            raise ValueError("no student competes in this objective: add weight * Competition(student)")
        copies = [self._copies[0], *((own, student) for own, _ in self._copies[1:])]
        _load(copies)
        self._copies = copies

    def _forward(self, pixels: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        terms = self.objective.terms(self._view(pixels, labels))
        # Left in the dictionary, the features would be results of the compiled graph, each with a gradient
        # of zeros to be made and copied: a fifth of a step.
        self.features.clear()
        return terms @ weights, terms

    def _view(self, pixels: Tensor, labels: Tensor) -> View:
        with autocast(pixels.device, self.precision):
            logits = self.teacher.logits(pixels)
        images = pixels * self.teacher.std + self.teacher.mean
        return View(pixels, labels, logits, self.features, images, self.precision, self.group)

    def __call__(self, pixels: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The unweighted terms at `pixels`, and the gradient of their sum under `weights`.

        On a card both are overwritten by the next call.
        """
        return self._recorded(pixels, labels, weights)

    def _descent(self, pixels: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        self.features.clear()  # of a step that was interrupted
        pixels = pixels.detach().requires_grad_(True)
        total, terms = self._terms(pixels, labels, weights)
        (gradient,) = torch.autograd.grad(total, pixels)
        if self.group is not None:  # each rank's total counts its own images in full, and statistics once
            return averaged(terms.detach(), self.group), gradient / self.group.size()
        return terms.detach(), gradient

    def find_nonfinite_term(self, pixels: Tensor, labels: Tensor) -> str:
        """The first term whose gradient at `pixels` is not finite, or "the objective" itself."""
        parts = zip(self.names, self.objective.parts, strict=True)
        for name, (_, term) in parts if self.group is None else ():  # no rank may search further than others
            point = pixels.detach().requires_grad_(True)
            value = term(self._view(point, labels))
            (gradient,) = torch.autograd.grad(value, point, materialize_grads=True)
            self.features.clear()
            if not gradient.isfinite().all():
                return name
        return "the objective"


def _load(copies: list[tuple[Classifier, Classifier]]) -> None:
    for own, original in copies:
        try:
            own.load_state_dict(original.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{original.name} does not fit this step, make a new one: {reason}") from None


def jittered(
    pixels: Tensor, settings: Any, generator: torch.Generator, group: Group | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Roll the batch and flip some images; also the way back for the gradient.

    Both only permute pixels, so the gradient comes back by the inverse permutation, and the compiled
    step has one fixed graph, whatever the offsets.
    """
    span = 2 * settings.jitter + 1
    down, right = (torch.randint(span, (2,), generator=generator) - settings.jitter).tolist()
    mask = None
    if settings.flip:
        count = len(pixels) * (group.size() if group else 1)  # drawn for all, as by a single process
        drawn = torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float32)[share(count, group)]
        mask = sent(drawn, pixels.device) < 0.5

    def mirror(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x.flip(3), x)

    def restore(gradient: Tensor) -> Tensor:
        back = torch.roll(mirror(gradient), (-down, -right), (2, 3))
        return back.contiguous(memory_format=torch.channels_last)

    moved = mirror(torch.roll(pixels.detach(), (down, right), (2, 3)))
    return moved.contiguous(memory_format=torch.channels_last), restore


def require_finite(
    history: Tensor, since: int, names: Sequence[str], find_nonfinite_term: Callable[[], str]
) -> None:
    """Raise NotFinite at the first row from `since` on that is not: its terms, then their gradient."""
    bad = (~history[since:].isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        what = names[column] if column < len(names) else f"the gradient of {find_nonfinite_term()}"
        raise NotFinite(
            f"{what} became {history[since + row, column].item()} at step {since + row + 1}: "
            "lower the learning rate or that term's weight"
        )
