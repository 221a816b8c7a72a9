"""One step of inversion of networks as torchvision and timm make them, with random weights."""

import pytest
import torch

from dinv.feature_statistics import NoBatchNorm, feature_layers, measure_statistics
from dinv.inversion import InversionSettings, invert
from dinv.models import create_model
from dinv.objectives import CrossEntropy, FeatureStatistics, L2Norm, TotalVariation

WITH_BATCHNORM = {
    "torchvision:resnet18": 64, "torchvision:densenet121": 64, "torchvision:regnet_y_400mf": 64,
    "torchvision:mobilenet_v2": 64, "torchvision:mobilenet_v3_small": 64, "torchvision:googlenet": 64,
    "torchvision:inception_v3": 96, "torchvision:efficientnet_b0": 64, "torchvision:vgg11_bn": 64,
    "torchvision:shufflenet_v2_x0_5": 64, "timm:regnetx_002": 64, "timm:resnet10t": 64,
}  # fmt: skip
WITHOUT = {"torchvision:convnext_tiny": 64, "torchvision:vit_b_32": 224}
PRIOR = CrossEntropy() + 1e-4 * TotalVariation() + 1e-5 * L2Norm()


def one_step(model, size, terms):
    """The images after one step, the objective, and how far the step went."""
    model.size = size  # for the trial pass, too
    settings = InversionSettings(stages=((2, size),), lr=0.1, jitter=4, keep="last", compile="never")
    result = invert(model.freeze(), torch.tensor([3, 7]), terms, settings, snapshots=[0])
    return result.images, result.losses["objective"], (result.images - result.snapshots[0]).abs().mean()


@pytest.mark.parametrize("name, size", WITH_BATCHNORM.items())
@pytest.mark.parametrize("distance", ["l2", "kl"])
def test_a_step_of_any_network_with_batchnorm(name, size, distance):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model = create_model(name)
    images, values, moved = one_step(model, size, PRIOR + FeatureStatistics(distance, first=10.0))
    assert images.shape == (2, 3, size, size) and images.min() >= 0 and images.max() <= 1
    assert all(0 < value < float("inf") for value in values) and moved > 1e-3
    assert all(q.grad is None for q in model.parameters())


@pytest.mark.parametrize("name, size", WITHOUT.items())
def test_without_batchnorm_it_says_so_and_works_with_measured_statistics(name, size):
    model = create_model(name)
    model.size = size
    with pytest.raises(NoBatchNorm, match="measure_statistics"):
        one_step(model, size, PRIOR + FeatureStatistics())
    statistics = measure_statistics(model, torch.rand(4, 3, size, size))
    assert statistics.layers == feature_layers(model) and len(statistics.layers) > 1
    images, values, moved = one_step(model, size, PRIOR + FeatureStatistics("kl", statistics=statistics))
    assert images.shape == (2, 3, size, size) and all(value < float("inf") for value in values)
    assert moved > 1e-3
