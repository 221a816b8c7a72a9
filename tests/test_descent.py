"""Descent: the pixels as in the paper, byte for byte; octaves and opponent colours as their equations say."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dinv.descent import Descent, interpolation, opponents
from dinv.inversion import InversionSettings, invert
from dinv.objectives import CrossEntropy, FeatureStatistics, TotalVariation

BETAS = (0.9, 0.999)
PLAIN = InversionSettings(steps=40, rate=0.1, compile="never")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(descent, gradients, rate=0.1):
    before = descent.pixels.clone()
    for gradient in gradients:
        descent.step(gradient, rate)
    return descent.pixels - before


def test_one_octave_is_adam_on_the_pixels():
    pixels = noise(2, 3, 8, 8)
    mine, plain = pixels.clone(), pixels.clone()
    descent, adam = Descent(mine, BETAS), torch.optim.Adam([plain], lr=0.1, betas=BETAS)
    for number in range(5):
        plain.grad = noise(2, 3, 8, 8, seed=number)
        descent.step(plain.grad.clone(), 0.1)
        adam.step()
    assert torch.equal(mine, plain)


def test_the_matrices_interpolate_as_pytorch_does():
    small = noise(2, 3, 4, 5)
    large = interpolation(4, 8) @ small @ interpolation(5, 9).T
    torch.testing.assert_close(large, F.interpolate(small, size=(8, 9), mode="bilinear", align_corners=False))
    assert torch.equal(interpolation(7, 7), torch.eye(7))


def test_a_flat_gradient_moves_every_octave_by_its_rate():
    change = moved(Descent(noise(2, 1, 8, 8), BETAS, octaves=3), [torch.ones(2, 1, 8, 8)])
    torch.testing.assert_close(change, torch.full_like(change, -0.1 * (1 + 1 / 2 + 1 / 4)))


def test_steps_go_downhill_and_are_as_large_at_every_scale():
    gradient = noise(1, 1, 32, 32)
    shares = []
    for octaves in (1, 4):
        change = moved(Descent(noise(1, 1, 32, 32, seed=1), BETAS, octaves=octaves), [gradient])
        assert (change * gradient).sum() < 0
        shares.append((F.avg_pool2d(change, 4).std() / change.std()).item())
    assert shares[0] == pytest.approx(0.25, abs=0.05)  # white noise, averaged over 16 pixels
    assert shares[1] > 0.6


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_opponent_colours_are_an_orthonormal_basis(channels):
    basis = opponents(channels, 1.0)
    torch.testing.assert_close(basis @ basis.T, torch.eye(channels))
    torch.testing.assert_close(basis[0], torch.full((channels,), channels**-0.5))
    torch.testing.assert_close(opponents(channels, 0.3)[1:], 0.3 * basis[1:])


def test_chroma_slows_colour_and_leaves_brightness():
    red_against_green = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    gradient = red_against_green.expand(1, 3, 4, 4)
    whole, less = (moved(Descent(noise(1, 3, 4, 4), BETAS, chroma=c), [gradient]) for c in (1.0, 0.25))
    torch.testing.assert_close(less, 0.25 * whole)
    bright = torch.ones(1, 3, 4, 4)
    whole, less = (moved(Descent(noise(1, 3, 4, 4), BETAS, chroma=c), [bright]) for c in (1.0, 0.25))
    torch.testing.assert_close(less, whole, atol=1e-6, rtol=0)


def test_more_octaves_than_halvings_are_refused():
    Descent(noise(1, 3, 8, 8), BETAS, octaves=3)
    with pytest.raises(ValueError, match="octaves=4: an image of 8x8 pixels cannot be halved 3 times"):
        Descent(noise(1, 3, 8, 8), BETAS, octaves=4)
    for bad in ({"octaves": 0}, {"chroma": -1.0}):
        with pytest.raises(ValueError, match="octaves=.* must be positive, chroma=.* not negative"):
            replace(PLAIN, **bad)


def test_inversion_by_octaves_reaches_its_objective_and_keeps_to_its_seed(tiny):
    objective = CrossEntropy() + 1e-3 * TotalVariation() + 1.0 * FeatureStatistics()
    settings = replace(PLAIN, octaves=3, chroma=0.3, schedule="cosine")
    labels = torch.arange(10) % 5
    one, two = (invert(tiny(), labels, objective, settings) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert one.images.min() >= 0 and one.images.max() <= 1
    values = one.losses["objective"]
    assert values[-1] < 0.75 * values[0]


def test_settings_name_the_descent_only_where_it_is_not_the_pixels():
    assert "octaves" not in PLAIN.config() and "chroma" not in PLAIN.config()
    assert replace(PLAIN, octaves=2).config()["octaves"] == 2
    assert replace(PLAIN, chroma=0.3).config() == PLAIN.config() | {"octaves": 1, "chroma": 0.3}
