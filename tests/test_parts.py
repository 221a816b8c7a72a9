"""A batch taken in parts: the gradient, the terms and the images of the whole, in the memory of a part."""

import subprocess
import sys

import pytest
import torch

from dinv.inversion import InversionSettings, NotFinite, balanced_labels, invert
from dinv.objectives import (
    Competition,
    CrossEntropy,
    FeatureStatistics,
    L2Norm,
    Term,
    TotalVariation,
)
from dinv.step import inversion_step

SETTINGS = InversionSettings(steps=3, rate=0.1, compile="never")
LABELS = balanced_labels(12, 5)


def objective(student):
    prior = CrossEntropy() + 0.1 * TotalVariation() + 0.01 * L2Norm() + 0.5 * Competition(student)
    return prior + 2.0 * FeatureStatistics() + 0.3 * FeatureStatistics("kl", first=10.0)


def both(teacher, student, size, compiled="never"):
    """Terms and gradient of the whole batch, and of the same in parts."""
    pixels = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    settings = InversionSettings(compile=compiled)
    for at_once in (0, size):
        step = inversion_step(teacher, objective(student), settings, 12, at_once)
        yield step(pixels, LABELS, torch.tensor(step.weights))


@pytest.mark.parametrize("size", [1, 4, 5, 12])
def test_terms_and_gradient_are_those_of_the_whole(tiny, size):
    (terms, gradient), (in_parts, parts_gradient) = both(tiny(0).freeze(), tiny(1), size)
    torch.testing.assert_close(in_parts, terms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts_gradient, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_in_float64_they_are_equal_to_the_last_digits(tiny):
    teacher, student = tiny(0).double().freeze(), tiny(1).double()
    pixels = torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for at_once in (0, 5):
        step = inversion_step(teacher, objective(student), SETTINGS, 12, at_once)
        found.append(step(pixels, LABELS, torch.tensor(step.weights, dtype=torch.float64)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)


def test_compiled_as_well(tiny):
    (terms, gradient), (in_parts, parts_gradient) = both(tiny(0).freeze(), tiny(1), 4, "always")
    torch.testing.assert_close(in_parts, terms, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts_gradient, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_the_images_are_those_of_the_whole_batch(tiny):
    teacher, student = tiny(0).freeze(), tiny(1)
    whole, parts = (
        invert(teacher, LABELS, objective(student), SETTINGS, seed=3, at_once=size) for size in (0, 4)
    )
    torch.testing.assert_close(parts.images, whole.images, atol=1e-3, rtol=0)
    for name, values in whole.losses.items():
        assert parts.losses[name] == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_statistics_of_the_parts_alone_would_be_others(tiny):
    """What the rest is there for: without it the term sees four images."""
    teacher = tiny(0).freeze()
    term = 1.0 * FeatureStatistics()
    pixels = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    step = inversion_step(teacher, term, SETTINGS, 12, 0)
    whole, _ = step(pixels, LABELS, torch.ones(1))
    alone, _ = step(pixels[:4], LABELS[:4], torch.ones(1))
    assert abs(alone - whole).item() > 0.01 * whole.item()


class Broken(Term):
    name = "broken"

    def __call__(self, view):
        return view.pixels.sum() * float("nan")


def test_what_goes_wrong_is_named(tiny):
    with pytest.raises(NotFinite, match="broken became nan at step 1"):
        invert(tiny().freeze(), LABELS, CrossEntropy() + 1.0 * Broken(), SETTINGS, at_once=4)
    with pytest.raises(ValueError, match="at_once=-1 must be a number of images, or 0 for all"):
        invert(tiny().freeze(), LABELS, CrossEntropy(), SETTINGS, at_once=-1)


MEMORY = """
import resource, sys
from dinv.inversion import InversionSettings, balanced_labels, invert
from dinv.models import create_model
from dinv.objectives import CrossEntropy, FeatureStatistics
network = create_model("resnet18").freeze()
settings = InversionSettings(steps=1, compile="never")
labels = balanced_labels(int(sys.argv[1]), 1000)
invert(network, labels, CrossEntropy() + 1.0 * FeatureStatistics(), settings, at_once=8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_at_224_pixels_is_that_of_a_part():
    def peak(count):
        run = subprocess.run([sys.executable, "-c", MEMORY, str(count)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert peak(64) < 1.3 * peak(8)
