"""Adam on an image, or on what it is the sum of: octaves from coarse to fine, brightness apart from colour.

The paper descends on the pixels. Adam gives every number it holds a step of about the same length, so a
step on pixels is as loud at the finest scale as at any coarser one, and in colour as in brightness: grain
and gaudy colours, which the objective has to take back. A step on octaves is shaped as images are. Nothing
is added to the objective and nothing is taken from data; only the path of the descent is another. Compare
Olah et al., *Feature Visualization* (Distill 2017) and Mordvintsev et al., *Differentiable Image
Parameterizations* (Distill 2018), who descend on Fourier coefficients and on colours decorrelated by data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class PyramidAdam:
    """Adam for `pixels` (N, C, H, W), which `step` changes in place.

    Args:
        octaves: 1 descends on the pixels themselves. With more, an image is the sum of so many images, each
            of half the size of the last, brought to full size by linear interpolation. The coarsest has
            the whole learning rate, each finer one half of it.
        chroma_lr: learning rate of the differences between the channels, as a share of that of their mean;
            0 descends on the channels as they are.

    Raises:
        ValueError: more octaves than the image can be halved.
    """

    def __init__(
        self, pixels: Tensor, betas: tuple[float, float], octaves: int = 1, chroma_lr: float = 0.0
    ) -> None:
        height, width = pixels.shape[2:]
        if min(height, width) >> (octaves - 1) < 2:
            raise ValueError(
                f"octaves={octaves}: an image of {height}x{width} pixels cannot be halved {octaves - 1} times"
            )
        self.pixels = pixels
        self.plain = octaves == 1 and not chroma_lr
        self.colours = opponents(pixels.shape[1], chroma_lr).to(pixels.device) if chroma_lr else None
        self.finest = pixels if self.plain else torch.zeros_like(pixels)
        self.coarser = []
        for octave in range(1, octaves):
            pair = [interpolation(-(-side >> octave), side).to(pixels.device) for side in (height, width)]
            small = pixels.new_zeros(*pixels.shape[:2], *(matrix.shape[1] for matrix in pair))
            self.coarser.append((small, *pair))
        self.parts = [self.finest, *(small for small, _, _ in self.coarser)]
        self.shares = [0.5 ** (octaves - 1 - octave) for octave in range(octaves)]
        self.adam = torch.optim.Adam([{"params": [part]} for part in self.parts], betas=betas)

    def step(self, gradient: Tensor, lr: float) -> None:
        """One step of Adam against `gradient`, that of the pixels."""
        for group, share in zip(self.adam.param_groups, self.shares, strict=True):
            group["lr"] = lr * share
        if self.plain:
            self.pixels.grad = gradient
            self.adam.step()
            self.pixels.grad = None
            return
        if self.colours is not None:
            gradient = torch.einsum("oc,nchw->nohw", self.colours, gradient)
        self.finest.grad = gradient
        for small, rows, columns in self.coarser:
            small.grad = rows.T @ gradient @ columns
        for part in self.parts:
            part.zero_()  # Adam does not look at where it is: a part can hold its last step alone
        self.adam.step()
        enlarged = (rows @ small @ columns.T for small, rows, columns in self.coarser)
        change = sum(enlarged, start=self.finest)
        if self.colours is not None:
            change = torch.einsum("oc,nohw->nchw", self.colours, change)
        self.pixels += change


def interpolation(small: int, size: int) -> Tensor:
    """(size, small): linear interpolation of `small` samples to `size`; the identity where they are equal.

    A matrix, so that the gradient's way back is its transpose, exactly.
    """
    columns = F.interpolate(torch.eye(small)[None], size=size, mode="linear", align_corners=False)
    return columns[0].T.contiguous()


def opponents(channels: int, chroma_lr: float) -> Tensor:
    """(C, C): an orthonormal basis of the channels, their mean first, the differences scaled by `chroma_lr`.

    For red, green and blue the differences are red - green, and red + green - 2 blue.
    """
    basis = torch.zeros(channels, channels)
    basis[0] = channels**-0.5
    for number in range(1, channels):
        basis[number, :number] = 1.0
        basis[number, number] = -float(number)
        basis[number] *= chroma_lr / basis[number].norm()
    return basis
