"""Metrics against a direct computation."""

import numpy as np
import pytest
import torch

from dinv.features import measure_statistics
from dinv.metrics import agreement, confidence, feature_distances


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
