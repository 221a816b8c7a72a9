"""Metrics against a direct computation."""

import itertools

import numpy as np
import pytest
import torch

from dinv import metrics
from dinv.feature_statistics import measure_statistics


def some_images(n=22, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def inputs_of_batchnorm(model, images):
    with torch.no_grad():
        x = (images - model.mean) / model.std
        return [model.net[:1](x).double().numpy(), model.net[:4](x).double().numpy()]


@pytest.mark.parametrize("batch", [5, 10, 22])
def test_feature_distances_are_means_over_whole_batches(tiny, batch):
    model, images = tiny(), some_images()
    expected = []
    for start in range(0, 22 - batch + 1, batch):
        row = []
        inputs = inputs_of_batchnorm(model, images[start : start + batch])
        for x, norm in zip(inputs, (model.net[1], model.net[4]), strict=True):
            mean = x.mean((0, 2, 3)) - norm.running_mean.numpy()
            variance = x.var((0, 2, 3)) - norm.running_var.numpy()
            row.append(np.linalg.norm(mean) + np.linalg.norm(variance))
        expected.append(row)
    result = metrics.feature_distances(model, images, batch)
    assert result.shape == (2,) and result.dtype == torch.float32
    np.testing.assert_allclose(result, np.mean(expected, 0), rtol=1e-4)


def test_feature_distances_of_uint8_and_by_kl_and_to_another_reference(tiny, portrait):
    model, images = tiny().train(), some_images()
    before = portrait(model)
    levels = images.mul(255).round()
    by_bytes = metrics.feature_distances(model, levels.to(torch.uint8), 11)
    torch.testing.assert_close(by_bytes, metrics.feature_distances(model, levels / 255, 11))
    reference = measure_statistics(model, images)
    for distance in ("l2", "kl"):
        own = metrics.feature_distances(model, images, 22, distance, reference)
        assert own.max() < 1e-5
        assert metrics.feature_distances(model, images, 22, distance).min() > 1e-3
    assert portrait(model) == before


def test_what_feature_distances_refuse(tiny):
    for batch in (23, 256, 0):
        with pytest.raises(ValueError, match=f"22 images do not fill one batch of {batch}"):
            metrics.feature_distances(tiny(), some_images(), batch)
    with pytest.raises(ValueError, match="unknown distance 'cosine': choose l2 or kl"):
        metrics.feature_distances(tiny(), some_images(), 22, "cosine")


def test_confidence_and_agreement_by_hand(tiny):
    one, other, images = tiny(), tiny(1), some_images()
    logits = one(images).detach().double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert metrics.confidence(one, images) == pytest.approx(100 * shares.max(1).mean(), rel=1e-5)
    same = (one(images).argmax(1) == other(images).argmax(1)).sum().item()
    assert 0 < same < 22  # else nothing is tested
    assert metrics.agreement(one, other, images) == pytest.approx(100 * same / 22)
    assert metrics.agreement(one, one, images) == 100


def test_topk_accuracy_by_hand(tiny):
    model, images, labels = tiny(), some_images(), torch.arange(22) % 5
    order = metrics.predict(model, images).argsort(1, descending=True)
    for k in (1, 2, 5):
        expected = 100 * np.mean([labels[i].item() in order[i, :k].tolist() for i in range(22)])
        for options in ({"batch_size": 7}, {"resize": False}):
            assert metrics.topk_accuracy(model, images, labels, k, **options) == pytest.approx(expected)
    large = torch.nn.functional.interpolate(images, (16, 16))
    assert metrics.topk_accuracy(model, large, labels, 5) == 100  # resized to what the model takes


def test_inception_score_by_hand(tiny):
    model, images = tiny(), torch.randint(256, (40, 3, 8, 8)).to(torch.uint8)
    shares = metrics.predict(model, images).softmax(1).double().numpy()
    divergence = (shares * (np.log(shares) - np.log(shares.mean(0)))).sum(1).mean()
    assert metrics.inception_score(model, images, batch_size=9) == pytest.approx(np.exp(divergence), rel=1e-4)
    assert metrics.inception_score(model, images[:1].expand(8, -1, -1, -1)) == pytest.approx(1, abs=1e-4)


def test_diversity_is_zero_for_copies_and_asks_for_pairs(tiny):
    model, images = tiny(), some_images(4)
    copies = images[:1].expand(4, -1, -1, -1)
    assert metrics.diversity(model, copies, torch.zeros(4)) == pytest.approx(0, abs=1e-6)
    assert metrics.diversity(model, images, torch.zeros(4)) > 0
    with pytest.raises(ValueError, match="no class has two images"):
        metrics.diversity(model, images, torch.arange(4))


def test_confusion_is_a_count_in_percent_of_each_class(tiny):
    model, images = tiny(), some_images(40)
    labels = torch.arange(40) % 4  # none of class 4
    predictions = metrics.predict(model, images).argmax(1)
    result = metrics.confusion_matrix(model, images, labels)
    for k, j in itertools.product(range(5), range(5)):
        among = predictions[labels == k]
        expected = 100 * (among == j).float().mean().item() if len(among) else 0
        assert result[k, j].item() == pytest.approx(expected)


def test_an_embedding_is_what_the_last_linear_layer_sees(tiny, hooks):
    model, images = tiny(), some_images()
    result = metrics.embed(model, images)
    assert result.shape == (22, 6) and hooks(model) == 0
    torch.testing.assert_close(model.net[-1](result), metrics.predict(model, images))


def by_hand(real, images, k):
    """Precision, recall, density and coverage, point by point."""

    def radius(points, i):
        return sorted(float(np.linalg.norm(points[i] - p)) for p in points)[k]

    def apart(a, b):
        return float(np.linalg.norm(a - b))

    reach, reach_images = ([radius(x, i) for i in range(len(x))] for x in (real, images))
    precision = np.mean([any(apart(r, m) <= reach[i] for i, r in enumerate(real)) for m in images])
    recall = np.mean([any(apart(r, m) <= reach_images[j] for j, m in enumerate(images)) for r in real])
    density = np.mean([sum(apart(r, m) <= reach[i] for i, r in enumerate(real)) for m in images]) / k
    coverage = np.mean([any(apart(r, m) <= reach[i] for m in images) for i, r in enumerate(real)])
    return precision, recall, density, coverage


@pytest.mark.parametrize("shift", [0.0, 1.0, 9.0])
@pytest.mark.parametrize("k", [1, 5])
def test_prdc_against_a_count_by_hand(shift, k):
    draw = np.random.RandomState(0)
    real, images = draw.randn(30, 2), 0.7 * draw.randn(20, 2) + shift
    result = metrics.prdc(torch.tensor(real), torch.tensor(images), k)
    assert list(vars(result).values()) == pytest.approx(by_hand(real, images, k), abs=1e-6)


def test_prdc_of_a_set_by_itself_is_whole_and_by_one_of_its_points_is_not():
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    itself = metrics.prdc(points, points)
    assert itself.precision == itself.recall == itself.coverage == 1
    one = metrics.prdc(points, points[:1] + 1e-3 * torch.randn(50, 3))
    assert one.precision == 1 and one.recall < 0.1 and one.coverage < 0.4
    with pytest.raises(ValueError, match="k=5 neighbours need more points in each set than 50 and 5"):
        metrics.prdc(points, points[:5])


def test_nearest_neighbors_against_a_search_by_hand():
    points, among = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (7, 11))
    distances, indices = metrics.nearest_neighbors(points, among, 2)
    for point, result, which in zip(points, distances, indices, strict=True):
        apart = (among - point).norm(dim=1)
        assert which.tolist() == apart.argsort()[:2].tolist()
        torch.testing.assert_close(result, apart.sort().values[:2], rtol=1e-4, atol=1e-4)


def test_a_wave_lies_in_the_band_of_its_frequency():
    x = torch.arange(32)
    for cycles in (1, 7, 16):  # in 32 pixels, along one axis
        wave = 0.5 + 0.4 * torch.cos(2 * np.pi * cycles * x / 32).expand(2, 3, 32, 32)
        shares = metrics.spectrum(wave, 8)
        assert int(cycles / 32 / 0.5**0.5 * 8) == shares.argmax() and shares.max() > 0.999
    noise = torch.randint(256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shares = metrics.spectrum(noise, 4)
    rings = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32))) / 0.5**0.5
    expected = np.histogram(rings, [0, 0.25, 0.5, 0.75, 1.01])[0] / 1024
    np.testing.assert_allclose(shares.numpy(), expected, atol=0.01)
