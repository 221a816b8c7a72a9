"""Feature statistics: moments and distances against NumPy, what is recorded, and that hooks go away."""

import numpy as np
import pytest
import torch
from torch import nn

from dinv import feature_statistics as fs
from dinv.feature_statistics import Statistics, kl_distance, measure_statistics, moments, recorded


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, **kind):
    return torch.randn(*shape, generator=generator(seed), **kind)


def equal(one, other):
    pairs = zip(one.means + one.variances, other.means + other.variances, strict=True)
    return one.layers == other.layers and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "shape, axes", [((6, 3, 4, 5), (0, 2, 3)), ((6, 3, 7), (0, 2)), ((6, 3), (0,))], ids=str
)
@pytest.mark.parametrize("shifted", [False, True])
def test_moments_against_numpy(shape, axes, shifted):
    x = 2 * random(*shape, dtype=torch.float64) + 1
    mean, variance = moments(x, random(3, seed=1, dtype=torch.float64) if shifted else None)
    assert mean.dtype == variance.dtype == torch.float64
    np.testing.assert_allclose(mean, x.numpy().mean(axes), rtol=1e-12)
    np.testing.assert_allclose(variance, x.numpy().var(axes, ddof=0), rtol=1e-12)  # biased


def test_the_shift_saves_the_digits_where_the_mean_is_large():
    deviation = torch.tensor([0.01, 0.1, 1.0])
    x = 1000 + deviation.view(3, 1, 1) * random(50, 3, 8, 8)
    exact = x.double().numpy().var((0, 2, 3))
    naive = ((x * x).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2).numpy()
    assert np.abs(naive / exact - 1).max() > 1  # what the shift is for
    mean, variance = moments(x, shift=1000 + 2 * deviation)
    np.testing.assert_allclose(variance, exact, rtol=1e-4)
    np.testing.assert_allclose(mean, x.double().numpy().mean((0, 2, 3)), rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [None, torch.tensor([3.0, 2.0])], ids=["plain", "shifted"])
def test_moments_of_half_precision_are_computed_in_float32(dtype, shift):
    x = (random(40, 2, 16, 16) + 3).to(dtype)
    mean, variance = moments(x, shift)
    assert mean.dtype == variance.dtype == torch.float32
    np.testing.assert_allclose(mean, x.double().numpy().mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(variance, x.double().numpy().var((0, 2, 3)), rtol=1e-4)


def test_layers_to_read_are_batchnorm_else_convolutions_else_linear(tiny):
    assert fs.feature_layers(tiny()) == ("net.1", "net.4")
    assert fs.feature_layers(tiny(norm=False)) == ("net.0", "net.3")
    assert fs.feature_layers(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))) == ("1", "2")
    with pytest.raises(ValueError, match="ReLU has no BatchNorm, convolution or linear layer"):
        fs.feature_layers(nn.ReLU())


def test_recorded_are_a_batchnorms_input_and_any_other_layers_output(tiny):
    model, images = tiny(), torch.rand(4, 3, 8, 8, generator=generator())
    with recorded(model, ("net.1", "net.3", "net.8")) as features:
        logits = model(images)
    x = (images - model.mean) / model.std
    assert torch.equal(features["net.1"], model.net[:1](x))
    assert torch.equal(features["net.3"], model.net[:4](x))
    assert torch.equal(features["net.8"], logits)
    assert features["net.1"].requires_grad  # and the graph leads through them
    assert list(features) == ["net.1", "net.3", "net.8"]


def test_an_activation_in_place_does_not_reach_what_is_recorded():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    nn.init.constant_(plain[0].bias, -9)
    inplace = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2])
    images = torch.rand(8, 3, 8, 8, generator=generator())
    expected, measured = measure_statistics(plain, images), measure_statistics(inplace, images)
    assert torch.equal(expected.means[0], measured.means[0])
    assert measured.means[0].min() < 0  # before the activation


def test_hooks_are_gone_afterwards_also_after_an_exception(tiny, hooks):
    model = tiny()
    with recorded(model, ("net.1", "net.4")):
        assert hooks(model) == 3  # the layers', and one that clears what they left
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="channels"), recorded(model, ("net.1", "net.3")):
        model.net(torch.zeros(1, 5, 8, 8))
    with pytest.raises(RuntimeError, match="channels"):
        measure_statistics(nn.Sequential(model.net), torch.zeros(1, 5, 8, 8))
    message = "no layer 'net.11'; it has .*net.4"
    with pytest.raises(ValueError, match=message), recorded(model, ("net.1", "net.11")):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 29, 500])
def test_measured_statistics_against_numpy(tiny, batch_size):
    model, images = tiny(), torch.rand(30, 3, 8, 8, generator=generator())
    measured = measure_statistics(model, images, batch_size=batch_size)
    assert measured.layers == ("net.1", "net.4") and measured.source == "30 images"
    with torch.no_grad():
        x = (images - model.mean) / model.std
        inputs = [model.net[:1](x).double().numpy(), model.net[:4](x).double().numpy()]
    for mean, variance, x in zip(measured.means, measured.variances, inputs, strict=True):
        assert mean.dtype == variance.dtype == torch.float32
        np.testing.assert_allclose(mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, x.var((0, 2, 3)), rtol=1e-5)


def test_statistics_of_uint8_images_are_those_in_0_to_1(tiny):
    images = torch.randint(256, (20, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    before = images.clone()
    assert equal(measure_statistics(tiny(), images), measure_statistics(tiny(), images.float() / 255))
    assert torch.equal(images, before)
    with pytest.raises(ValueError, match="empty batch: at least one image"):
        measure_statistics(tiny(), images[:0])


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_network_as_it_was(tiny, portrait, training):
    model = tiny().train(training)
    model.net[1].eval()  # one layer frozen
    before = portrait(model)
    measure_statistics(model, torch.rand(10, 3, 8, 8, generator=generator()))
    fs.batchnorm_statistics(model)
    assert portrait(model) == before


def test_batchnorm_statistics_are_copies_unless_the_buffers_are_asked_for(tiny):
    model, untouched = tiny(), tiny()
    copied, buffers = fs.batchnorm_statistics(model), fs.batchnorm_statistics(model, copy=False)
    model.net[1].running_mean.zero_()
    assert equal(copied, fs.batchnorm_statistics(untouched)) and copied.source == "BatchNorm buffers"
    assert buffers.means[0] is model.net[1].running_mean and not equal(copied, buffers)
    with pytest.raises(fs.NoBatchNorm, match="measure_statistics"):
        fs.batchnorm_statistics(tiny(norm=False))


def test_kl_distance_is_the_mean_kl_of_gaussians_and_free_of_scale():
    mean, mean0 = random(5), random(5, seed=1)
    variance, variance0 = random(5, seed=2).exp(), random(5, seed=3).exp()
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, variance.sqrt()), normal(mean0, variance0.sqrt()))
    distance = kl_distance(mean, variance, mean0, variance0)
    assert distance.item() == pytest.approx(exact.mean().item(), rel=1e-5)
    scaled = kl_distance(100 * mean, 1e4 * variance, 100 * mean0, 1e4 * variance0)
    assert scaled.item() == pytest.approx(distance.item(), rel=1e-5)


def test_kl_distance_is_finite_for_a_dead_channel():
    zero, one = torch.zeros(3, requires_grad=True), torch.ones(3)
    for four in ((one, zero, one, one), (one, one, one, zero), (zero, zero, zero, zero)):
        value = kl_distance(*four)
        (gradient,) = torch.autograd.grad(value, zero)
        assert value.isfinite() and gradient.isfinite().all()


def test_layer_distances():
    ones = torch.ones(1)
    one = Statistics(("a", "b"), (torch.zeros(2), ones), (torch.ones(2), ones), "")
    other = Statistics(("a", "b"), (torch.tensor([3.0, 4]), ones), (torch.ones(2), 3 * ones), "")
    assert fs.layer_distances(one, other).tolist() == [5, 2]
    assert fs.layer_distances(one, other, "kl")[1] == kl_distance(ones, ones, ones, 3 * ones)
    assert fs.l2_distance(ones, ones, ones, 3 * ones) == 2
    with pytest.raises(ValueError, match="unknown distance 'cosine': choose l2 or kl"):
        fs.layer_distances(one, other, "cosine")
    with pytest.raises(ValueError, match="different layers"):
        fs.layer_distances(one, Statistics(("a",), one.means[:1], one.variances[:1], ""))
