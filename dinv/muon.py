"""SGD that moves a bank of filters in all its directions alike (Muon).

The momentum of a bank, as a matrix with a row per filter, has a few large singular values and many small
ones, so SGD learns a few directions first. Muon replaces them all by about one (Jordan et al., *Muon*, 2024).
A step's length is a share of the bank's own, so nothing depends on the gradient's scale or the bank's.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"] if "share" in group else ():
                if parameter.grad is not None:
                    self._move(parameter, group["lr"] * group["share"])
                    parameter.grad = None  # nothing is left for SGD to do
        super().step()

    def _move(self, parameter: Tensor, length: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].mul_(self.momentum).add_(gradient)
        ahead = gradient.add(average, alpha=self.momentum)
        direction = orthogonalized(ahead.reshape(len(ahead), -1)).view(ahead.shape)
        norm = direction.norm().clamp(min=1e-12)
        parameter.sub_(direction * (length * parameter.norm() / norm))
        parameter.mul_((self.longest / parameter.norm()).clamp(max=1))
