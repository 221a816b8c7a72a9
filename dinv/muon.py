"""SGD that moves a bank of filters in all its directions alike (Muon).

The momentum of a bank, as a matrix with a row per filter, has a few large singular values and many small
ones, so SGD learns a few directions first. Muon replaces them all by about one (Jordan et al., *Muon*, 2024).
A step's length is a share of the bank's own, so nothing depends on the gradient's scale or the bank's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinv.compiling import Recorded


def orthogonalized(matrix: Tensor, iterations: int = 3) -> Tensor:
    """U V' of the singular value decomposition U S V' of (R, C), roughly: values near one, not ones.

    By Newton and Schulz's iteration with Jordan's coefficients, which are chosen for speed.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-12)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.SGD):
    """`torch.optim.SGD`, but groups with a `share` are moved by Muon.

    Such a group's parameters have two dimensions or more. An update moves each by `lr * share` of its own
    norm, after momentum as Nesterov's, so a bank of zeros stays; one of length `longest` grows no longer.
    `momentum_buffer` is as SGD has it.
    """

    momentum = 0.6  # Jordan's for convolutions
    longest = 1e10  # BatchNorm hides a bank's length, so it grows; the squares of its outputs have to fit

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._recordings: dict[tuple[int, ...], Recorded] = {}  # by the banks that have a gradient

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            banks = [p for p in group["params"] if "share" in group and p.grad is not None]
            if banks:
                length = banks[0].new_full((), group["lr"] * group["share"])
                self._moves(banks)(length, *(bank.grad for bank in banks))
            for bank in banks:
                bank.grad = None  # nothing is left for SGD to do
        super().step()

    def _moves(self, banks: list[Tensor]) -> Recorded:
        """What moves these banks, given (length, *gradients): thirty kernels a bank, so a card records it."""
        key = tuple(map(id, banks))
        if key not in self._recordings:
            name = "momentum_buffer"  # from a checkpoint, where there is one
            averages = [self.state[bank].setdefault(name, torch.zeros_like(bank)) for bank in banks]

            def move(length: Tensor, *gradients: Tensor) -> tuple[()]:
                for bank, average, gradient in zip(banks, averages, gradients, strict=True):
                    self._move(bank, average, gradient, length)
                return ()

            self._recordings[key] = Recorded(move, lambda: [*banks, *averages])
        return self._recordings[key]

    def _move(self, bank: Tensor, average: Tensor, gradient: Tensor, length: Tensor) -> None:
        average.mul_(self.momentum).add_(gradient)
        ahead = gradient.add(average, alpha=self.momentum)
        direction = orthogonalized(ahead.reshape(len(ahead), -1)).view(ahead.shape)
        norm = direction.norm().clamp(min=1e-12)
        bank.sub_(direction * (length * bank.norm() / norm))
        bank.mul_((self.longest / bank.norm()).clamp(max=1))
