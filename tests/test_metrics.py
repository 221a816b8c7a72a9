"""Metrics against a direct computation."""

import numpy as np
import pytest
import torch

from dinv.features import measure_statistics
from dinv.metrics import (
    agreement,
    confidence,
    confusion,
    cover,
    embed,
    feature_distances,
    holds,
    nearest,
    predict,
    spectrum,
)


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
    found = feature_distances(model, images, batch)
    assert found.shape == (2,) and found.dtype == torch.float32
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-4)


def test_feature_distances_of_uint8_and_by_kl_and_to_another_reference(tiny, portrait):
    model, images = tiny().train(), some_images()
    before = portrait(model)
    levels = images.mul(255).round()
    by_bytes = feature_distances(model, levels.to(torch.uint8), 11)
    torch.testing.assert_close(by_bytes, feature_distances(model, levels / 255, 11))
    reference = measure_statistics(model, images)
    for distance in ("l2", "kl"):
        own = feature_distances(model, images, 22, distance, reference)
        assert own.max() < 1e-5
        assert feature_distances(model, images, 22, distance).min() > 1e-3
    assert portrait(model) == before


@pytest.mark.parametrize("batch", [23, 256, 0])
def test_images_that_fill_no_batch(tiny, batch):
    with pytest.raises(ValueError, match=f"22 images do not fill one batch of {batch}"):
        feature_distances(tiny(), some_images(), batch)


def test_a_distance_that_is_none(tiny):
    with pytest.raises(ValueError, match="unknown distance 'cosine': choose l2 or kl"):
        feature_distances(tiny(), some_images(), 22, "cosine")


def test_confidence_by_hand(tiny):
    model, images = tiny(), some_images()
    logits = model(images).detach().double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert confidence(model, images) == pytest.approx(100 * shares.max(1).mean(), rel=1e-5)


def test_agreement_counts_equal_choices(tiny):
    one, other, images = tiny(), tiny(1), some_images()
    same = (one(images).argmax(1) == other(images).argmax(1)).sum().item()
    assert 0 < same < 22  # else nothing is tested
    assert agreement(one, other, images) == pytest.approx(100 * same / 22)
    assert agreement(one, one, images) == 100


# ---- confusion, embeddings, cover ------------------------------------------------------------------


def test_confusion_is_a_count_in_percent_of_each_class(tiny):
    model, images = tiny(), some_images(40)
    labels = torch.arange(40) % 4  # none of class 4
    said = predict(model, images).argmax(1)
    found = confusion(model, images, labels)
    for k in range(5):
        for j in range(5):
            among = said[labels == k]
            expected = 100 * (among == j).float().mean().item() if len(among) else 0
            assert found[k, j].item() == pytest.approx(expected)


def test_an_embedding_is_what_the_last_linear_layer_sees(tiny, hooks):
    model, images = tiny(), some_images()
    found = embed(model, images)
    assert found.shape == (22, 6) and hooks(model) == 0
    torch.testing.assert_close(model.net[-1](found), predict(model, images))


def by_hand(real, made, k):
    """Precision, recall, density and coverage, point by point."""

    def radius(points, i):
        return sorted(float(np.linalg.norm(points[i] - p)) for p in points)[k]

    def apart(a, b):
        return float(np.linalg.norm(a - b))

    reach, reach_made = ([radius(x, i) for i in range(len(x))] for x in (real, made))
    precision = np.mean([any(apart(r, m) <= reach[i] for i, r in enumerate(real)) for m in made])
    recall = np.mean([any(apart(r, m) <= reach_made[j] for j, m in enumerate(made)) for r in real])
    density = np.mean([sum(apart(r, m) <= reach[i] for i, r in enumerate(real)) for m in made]) / k
    coverage = np.mean([any(apart(r, m) <= reach[i] for m in made) for i, r in enumerate(real)])
    return precision, recall, density, coverage


@pytest.mark.parametrize("shift", [0.0, 1.0, 9.0])
@pytest.mark.parametrize("k", [1, 5])
def test_cover_against_a_count_by_hand(shift, k):
    draw = np.random.RandomState(0)
    real, made = draw.randn(30, 2), 0.7 * draw.randn(20, 2) + shift
    found = cover(torch.tensor(real), torch.tensor(made), k)
    assert vars(found) == pytest.approx(dict(zip(vars(found), by_hand(real, made, k), strict=True)), abs=1e-6)


def test_cover_of_a_set_by_itself_is_whole_and_by_one_of_its_points_is_not():
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    itself = cover(points, points)
    assert itself.precision == itself.recall == itself.coverage == 1
    one = cover(points, points[:1] + 1e-3 * torch.randn(50, 3, generator=torch.Generator().manual_seed(1)))
    assert one.precision == 1 and one.recall < 0.1 and one.coverage < 0.4
    with pytest.raises(ValueError, match="5 neighbours want more points in each set than 50 and 5"):
        cover(points, points[:5])


def test_nearest_against_a_search_by_hand():
    points, among = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (7, 11))
    distances, indices = nearest(points, among, 2)
    for point, found, which in zip(points, distances, indices, strict=True):
        apart = (among - point).norm(dim=1)
        assert which.tolist() == apart.argsort()[:2].tolist()
        torch.testing.assert_close(found, apart.sort().values[:2], rtol=1e-4, atol=1e-4)


def test_a_wave_lies_in_the_band_of_its_frequency():
    x = torch.arange(32)
    for cycles in (1, 7, 16):  # in 32 pixels, along one axis
        wave = 0.5 + 0.4 * torch.cos(2 * np.pi * cycles * x / 32).expand(2, 3, 32, 32)
        shares = spectrum(wave, 8)
        assert int(cycles / 32 / 0.5**0.5 * 8) == shares.argmax() and shares.max() > 0.999
    noise = torch.randint(256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shares = spectrum(noise, 4)
    rings = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32))) / 0.5**0.5
    expected = np.histogram(rings, [0, 0.25, 0.5, 0.75, 1.01])[0] / 1024
    np.testing.assert_allclose(shares.numpy(), expected, atol=0.01)


@pytest.mark.parametrize(
    "values, bounds, verdict",
    [
        ([5.0, 6.0, 7.0], {"at_least": 0}, True),  # 6 ± 2.5
        ([5.0, 6.0, 7.0], {"at_least": 4}, False),  # the mean is above, the interval is not
        ([-0.2, 0.0, 0.2], {"at_least": 0}, False),  # -0.00 ± 0.19 is no "yes"
        ([0.1, 0.4, 0.7], {"at_most": 4}, True),
        ([1.0], {"at_least": 0}, None),  # one seed shows no scatter
        ([-1.0], {"at_least": 0}, False),
    ],
)
def test_a_claim_holds_only_with_all_of_its_interval(values, bounds, verdict):
    assert holds(values, **bounds) is verdict
