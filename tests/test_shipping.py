"""The shipped networks: whole, small enough, and as good as the manifest says."""

import json

import pytest
import torch

from dinv import load_dataset
from dinv.metrics import accuracy
from dinv.models import create_model, load_model, parameter_count, registry, shipped_models
from dinv.models.registry import WEIGHTS
from dinv.models.shipping import LARGEST_FILE, LARGEST_TOTAL, ship


def test_sizes_and_parameters():
    sizes = [path.stat().st_size for path in WEIGHTS.glob("*.safetensors")]
    assert len(sizes) == len(shipped_models())
    assert max(sizes) <= LARGEST_FILE and sum(sizes) <= LARGEST_TOTAL
    assert shipped_models()["resnet_small"]["parameters"] <= 1_300_000


@pytest.mark.parametrize("name", list(shipped_models()))
def test_shipped_network_loads_frozen_and_matches_its_entry(name):
    model, entry = load_model(name), shipped_models()[name]
    assert parameter_count(model) == entry["parameters"]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    images = torch.rand(2, model.channels, model.size, model.size)
    assert model(images).shape == (2, len(model.classes))


def test_digits_network_is_as_good_as_stated():
    test_set = load_dataset("digits", "test")
    found = accuracy(load_model("resnet_digits"), test_set.images, test_set.labels)
    assert found == pytest.approx(shipped_models()["resnet_digits"]["accuracy"], abs=0.3)


@pytest.mark.parametrize(("name", "least"), [("resnet_small", 90.5), ("vgg_small", 88.0)])
def test_cifar_networks_reach_what_was_asked(name, least):
    assert shipped_models()[name]["accuracy"] >= least


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", [n for n, entry in shipped_models().items() if entry["domain"] == "cifar10"])
def test_cifar_networks_are_as_good_as_stated(name):
    network = load_model(name)
    test_set = load_dataset("cifar10", "test").of_classes(network.classes)
    found = accuracy(network, test_set.images, test_set.labels)
    assert found == pytest.approx(shipped_models()[name]["accuracy"], abs=0.05)


def test_ship_writes_what_load_model_reads(tmp_path):
    model = create_model("resnet_digits", "digits", seed=3)
    path = ship(model, "digits", 91.234, [{"epoch": 1, "loss": 0.51239, "accuracy": 80.0}], tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["resnet_digits"]
    assert entry["accuracy"] == 91.23 and entry["history"][0]["loss"] == 0.5124
    other = load_model("resnet_digits", checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_network_of_some_classes_is_shipped_by_a_name_of_its_own(tmp_path, monkeypatch):
    model = create_model("resnet_digits", "digits", seed=3, classes=("0", "1", "2"))
    ship(model, "digits", 91.234, [], tmp_path, name="resnet_digits-3-classes")
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    other = load_model("resnet_digits-3-classes")
    assert other.classes == model.classes and other.name == "resnet_digits"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_too_large_a_network_is_not_shipped(tmp_path):
    with pytest.raises(ValueError, match="at most 5 MB a file"):
        ship(create_model("wrn40_2"), "cifar10", 90.0, [], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
