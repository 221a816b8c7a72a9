"""Feature statistics: moments and distances against NumPy, what is watched, and that hooks go away."""

import numpy as np
import pytest
import torch
from torch import nn

from dinv.features import (
    NoBatchNorm,
    Statistics,
    batchnorm_statistics,
    feature_layers,
    kl_distance,
    l2_distance,
    layer_distances,
    measure_statistics,
    moments,
    recorded,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, **kind):
    return torch.randn(*shape, generator=generator(seed), **kind)


def normalised(model, images):
    return (images - model.mean) / model.std


# ---- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((6, 3, 4, 5), (0, 2, 3)),
        ((6, 7, 3), (0, 1)),  # tokens: (N, T, C)
        ((6, 3), (0,)),
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_moments_against_numpy(shape, axes, shifted):
    x = 2 * random(*shape, dtype=torch.float64) + 1
    mean, variance = moments(x, random(3, seed=1, dtype=torch.float64) if shifted else None)
    assert mean.dtype == variance.dtype == torch.float64
    np.testing.assert_allclose(mean, x.numpy().mean(axes), rtol=1e-12)
    np.testing.assert_allclose(variance, x.numpy().var(axes, ddof=0), rtol=1e-12)


def test_the_variance_is_biased():
    x = torch.tensor([[1.0], [3.0]])
    for shift in (None, torch.tensor([2.5])):
        mean, variance = moments(x, shift)
        assert (mean.item(), variance.item()) == (2, 1)


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
def test_moments_of_half_precision_are_reckoned_in_float32(dtype):
    x = (random(40, 2, 16, 16) + 3).to(dtype)
    for shift in (None, torch.tensor([3.0, 2.0])):
        mean, variance = moments(x, shift)
        assert mean.dtype == variance.dtype == torch.float32
        np.testing.assert_allclose(mean, x.double().numpy().mean((0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(variance, x.double().numpy().var((0, 2, 3)), rtol=1e-4)


# ---- what is watched -----------------------------------------------------------------------------


def test_layers_to_watch_are_batchnorm_else_convolutions_else_linear(tiny):
    assert feature_layers(tiny()) == ("net.1", "net.4")
    assert feature_layers(tiny(norm=False)) == ("net.0", "net.3")
    assert feature_layers(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))) == ("1", "2")
    with pytest.raises(ValueError, match="ReLU has no BatchNorm, convolution or linear layer"):
        feature_layers(nn.ReLU())


def test_recorded_are_a_batchnorms_input_and_any_other_layers_output(tiny):
    model, images = tiny(), torch.rand(4, 3, 8, 8, generator=generator())
    with recorded(model, ("net.1", "net.3", "net.8")) as features:
        logits = model(images)
    x = normalised(model, images)
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
    expected, found = measure_statistics(plain, images), measure_statistics(inplace, images)
    assert torch.equal(expected.means[0], found.means[0])
    assert found.means[0].min() < 0  # before the activation


def test_hooks_are_gone_afterwards_also_after_an_exception(tiny, hooks):
    model = tiny()
    with recorded(model, feature_layers(model)):
        assert hooks(model) == 2
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="channels"), recorded(model, ("net.1", "net.3")):
        model.net(torch.zeros(1, 5, 8, 8))
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="channels"):
        measure_statistics(nn.Sequential(model.net), torch.zeros(1, 5, 8, 8))
    assert hooks(model) == 0


def test_a_layer_that_is_not_there(tiny, hooks):
    model = tiny()
    message = "no layer 'net.11'; it has .*net.4"
    with pytest.raises(ValueError, match=message), recorded(model, ("net.1", "net.11")):
        pass
    assert hooks(model) == 0


# ---- statistics ----------------------------------------------------------------------------------


def test_measured_statistics_against_numpy(tiny):
    model, images = tiny(), torch.rand(30, 3, 8, 8, generator=generator())
    found = measure_statistics(model, images)
    assert found.layers == ("net.1", "net.4") and found.source == "30 images"
    with torch.no_grad():
        x = normalised(model, images)
        inputs = [model.net[:1](x).double().numpy(), model.net[:4](x).double().numpy()]
    for mean, variance, x in zip(found.means, found.variances, inputs, strict=True):
        assert mean.dtype == variance.dtype == torch.float32
        np.testing.assert_allclose(mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, x.var((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 29, 30])
def test_statistics_in_parts_are_those_of_the_whole(tiny, batch):
    model, images = tiny(), torch.rand(30, 3, 8, 8, generator=generator())
    whole, parts = measure_statistics(model, images), measure_statistics(model, images, batch=batch)
    for one, other in zip(whole.means + whole.variances, parts.means + parts.variances, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_statistics_of_uint8_images_are_those_in_0_to_1(tiny):
    model = tiny()
    images = torch.randint(256, (20, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    kept = images.clone()
    bytes_, floats = measure_statistics(model, images), measure_statistics(model, images.float() / 255)
    assert bytes_.digest() == floats.digest()
    assert torch.equal(images, kept)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_network_as_it_was(tiny, portrait, training):
    model = tiny().train(training)
    model.net[1].eval()  # one layer frozen
    before = portrait(model)
    measure_statistics(model, torch.rand(10, 3, 8, 8, generator=generator()))
    batchnorm_statistics(model)
    assert portrait(model) == before


def test_measuring_nothing_is_refused(tiny):
    with pytest.raises(ValueError, match="empty batch: at least one image"):
        measure_statistics(tiny(), torch.zeros(0, 3, 8, 8))


def test_batchnorm_statistics_are_copies(tiny):
    model = tiny()
    found = batchnorm_statistics(model)
    before = found.digest()
    model.net[1].running_mean.zero_()
    assert found.digest() == before and found.source == "BatchNorm buffers"
    assert batchnorm_statistics(model).digest() != before


def test_a_network_without_batchnorm_remembers_nothing(tiny):
    with pytest.raises(NoBatchNorm, match="measure_statistics"):
        batchnorm_statistics(tiny(norm=False))


def test_the_digest_is_of_layers_and_values():
    def digest(layer="a", mean=0.0, variance=1.0):
        return Statistics((layer,), (torch.tensor([mean]),), (torch.tensor([variance]),), "").digest()

    assert digest() == digest()
    assert len({digest(), digest("b"), digest(mean=1e-6), digest(variance=1.000001)}) == 4


# ---- distances -----------------------------------------------------------------------------------


def test_kl_distance_is_the_mean_kl_of_gaussians_and_free_of_scale():
    mean, mean0 = random(5), random(5, seed=1)
    variance, variance0 = random(5, seed=2).exp(), random(5, seed=3).exp()
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, variance.sqrt()), normal(mean0, variance0.sqrt()))
    found = kl_distance(mean, variance, mean0, variance0)
    assert found.item() == pytest.approx(exact.mean().item(), rel=1e-5)
    scaled = kl_distance(100 * mean, 1e4 * variance, 100 * mean0, 1e4 * variance0)
    assert scaled.item() == pytest.approx(found.item(), rel=1e-5)


def test_kl_distance_is_finite_for_a_dead_channel():
    zero, one = torch.zeros(3, requires_grad=True), torch.ones(3)
    for four in ((one, zero, one, one), (one, one, one, zero), (zero, zero, zero, zero)):
        value = kl_distance(*four)
        (gradient,) = torch.autograd.grad(value, zero)
        assert value.isfinite() and gradient.isfinite().all()


def test_layer_distances():
    found = Statistics(("a", "b"), (torch.zeros(2), torch.ones(1)), (torch.ones(2), torch.ones(1)), "")
    wanted = Statistics(
        ("a", "b"), (torch.tensor([3.0, 4]), torch.ones(1)), (torch.ones(2), torch.tensor([3.0])), ""
    )
    assert layer_distances(found, wanted).tolist() == [5, 2]
    four = found.means[1], found.variances[1], wanted.means[1], wanted.variances[1]
    assert layer_distances(found, wanted, "kl")[1] == kl_distance(*four)
    assert l2_distance(*four) == 2
    with pytest.raises(ValueError, match="unknown distance 'cosine': choose l2 or kl"):
        layer_distances(found, wanted, "cosine")
    with pytest.raises(ValueError, match="different layers"):
        layer_distances(found, Statistics(("a",), found.means[:1], found.variances[:1], ""))
