"""PyramidAdam: the pixels as in the paper, byte for byte; octaves and opponent colours by their equations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dinv.inversion import InversionSettings, invert
from dinv.objectives import CrossEntropy, FeatureStatistics, TotalVariation
from dinv.pyramid import PyramidAdam, interpolation, opponents

BETAS = (0.9, 0.999)
PLAIN = InversionSettings(steps=40, lr=0.1, compile="never")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change(gradient, seed=0, **options):
    """What one step against `gradient` adds to the pixels."""
    adam = PyramidAdam(noise(*gradient.shape, seed=seed), BETAS, **options)
    before = adam.pixels.clone()
    adam.step(gradient, 0.1)
    return adam.pixels - before


def test_one_octave_is_adam_on_the_pixels():
    pixels = noise(2, 3, 8, 8)
    mine, plain = pixels.clone(), pixels.clone()
    pyramid, adam = PyramidAdam(mine, BETAS), torch.optim.Adam([plain], lr=0.1, betas=BETAS)
    for number in range(5):
        plain.grad = noise(2, 3, 8, 8, seed=number)
        pyramid.step(plain.grad.clone(), 0.1)
        adam.step()
    assert torch.equal(mine, plain)


def test_the_matrices_interpolate_as_pytorch_does():
    small = noise(2, 3, 4, 5)
    large = interpolation(4, 8) @ small @ interpolation(5, 9).T
    torch.testing.assert_close(large, F.interpolate(small, size=(8, 9), mode="bilinear", align_corners=False))
    assert torch.equal(interpolation(7, 7), torch.eye(7))


def test_a_flat_gradient_moves_every_octave_by_its_learning_rate():
    flat = torch.ones(2, 1, 8, 8)
    torch.testing.assert_close(change(flat, octaves=3), -0.1 * (1 + 1 / 2 + 1 / 4) * flat)


def test_steps_go_downhill_and_are_as_large_at_every_scale():
    gradient, shares = noise(1, 1, 32, 32), []
    for octaves in (1, 4):
        step = change(gradient, seed=1, octaves=octaves)
        assert (step * gradient).sum() < 0
        shares.append((F.avg_pool2d(step, 4).std() / step.std()).item())
    assert shares[0] == pytest.approx(0.25, abs=0.05)  # white noise, averaged over 16 pixels
    assert shares[1] > 0.6


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_opponent_colours_are_an_orthonormal_basis(channels):
    basis = opponents(channels, 1.0)
    torch.testing.assert_close(basis @ basis.T, torch.eye(channels))
    torch.testing.assert_close(basis[0], torch.full((channels,), channels**-0.5))
    torch.testing.assert_close(opponents(channels, 0.3)[1:], 0.3 * basis[1:])


@pytest.mark.parametrize("colour, share", [((1.0, -1.0, 0.0), 0.25), ((1.0, 1.0, 1.0), 1.0)])
def test_chroma_lr_slows_colour_and_leaves_brightness(colour, share):
    gradient = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    whole, less = (change(gradient, chroma_lr=chroma_lr) for chroma_lr in (1.0, 0.25))
    torch.testing.assert_close(less, share * whole, atol=1e-6, rtol=1e-5)


def test_more_octaves_than_halvings_are_refused():
    PyramidAdam(noise(1, 3, 8, 8), BETAS, octaves=3)
    with pytest.raises(ValueError, match="octaves=4: an image of 8x8 pixels cannot be halved 3 times"):
        PyramidAdam(noise(1, 3, 8, 8), BETAS, octaves=4)


def test_inversion_by_octaves_reaches_its_objective_and_keeps_to_its_seed(tiny):
    objective = CrossEntropy() + 1e-3 * TotalVariation() + 1.0 * FeatureStatistics()
    settings = replace(PLAIN, octaves=3, chroma_lr=0.3, schedule="cosine")
    one, two = (invert(tiny(), torch.arange(10) % 5, objective, settings) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert one.images.min() >= 0 and one.images.max() <= 1
    assert one.losses["objective"][-1] < 0.75 * one.losses["objective"][0]
