"""The shipped networks: whole, small enough, and as good as the manifest says."""

import json
import runpy

import pytest
import torch

from dinv.data import load_dataset
from dinv.experiments.continual import part_of
from dinv.files import repository_root
from dinv.models import create_model, load_model, parameter_count, shipped_models, zoo
from dinv.training import accuracy


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(repository_root() / "tools" / "ship_weights.py"))


def test_sizes(tool):
    sizes = [path.stat().st_size for path in zoo.WEIGHTS.glob("*.safetensors")]
    assert len(sizes) == len(shipped_models())
    assert max(sizes) <= tool["LARGEST_FILE"] and sum(sizes) <= tool["LARGEST_TOTAL"]


@pytest.mark.parametrize("name", list(shipped_models()))
def test_shipped_network_loads_frozen_and_matches_its_entry(name):
    model, entry = load_model(name), shipped_models()[name]
    assert parameter_count(model) == entry["parameters"]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    images = torch.rand(2, model.channels, model.size, model.size)
    assert model(images).shape == (2, len(model.classes))


def test_digits_network_is_as_good_as_stated():
    test_set = load_dataset("digits", "test")
    score = accuracy(load_model("resnet_digits"), test_set.images, test_set.labels)
    assert score == pytest.approx(shipped_models()["resnet_digits"]["accuracy"], abs=0.3)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", [n for n, entry in shipped_models().items() if entry["domain"] == "cifar10"])
def test_cifar_networks_are_as_good_as_stated(name):
    network = load_model(name)
    test_set = part_of(load_dataset("cifar10", "test"), 0, len(network.classes))
    score = accuracy(network, test_set.images, test_set.labels)
    assert score == pytest.approx(shipped_models()[name]["accuracy"], abs=0.05)


def test_large_networks_are_kept_in_float16_but_for_what_normalises(tool, tmp_path, monkeypatch):
    model = create_model("resnet_digits", "digits", seed=3)
    monkeypatch.setitem(tool["ship"].__globals__, "HALF", 1000)
    path = tool["ship"](model, "digits", 91.0, [], tmp_path)
    assert path.stat().st_size < 0.6 * sum(value.nbytes for value in model.state_dict().values())
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    pairs = zip(model.state_dict().items(), load_model("resnet_digits").state_dict().values(), strict=True)
    for (name, before), after in pairs:
        filters = name in dict(model.named_parameters()) and before.dim() > 1
        assert torch.equal(before.half().float() if filters else before, after), name


@pytest.mark.parametrize("name", ["resnet_digits", "resnet_digits-3-classes"])
def test_ship_writes_what_load_model_reads(tool, tmp_path, monkeypatch, name):
    model = create_model("resnet_digits", "digits", seed=3, classes="012")
    tool["ship"](model, "digits", 91.234, [{"epoch": 1, "loss": 0.51239}], tmp_path, name=name)
    entry = json.loads((tmp_path / "manifest.json").read_text())[name]
    assert entry["accuracy"] == 91.23 and entry["history"][0]["loss"] == 0.5124
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    other = load_model(name)
    assert other.classes == model.classes and other.name == "resnet_digits"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_too_large_a_network_is_not_shipped(tool, tmp_path):
    with pytest.raises(ValueError, match="at most 20 MB per file"):
        tool["ship"](create_model("cifar_resnet34"), "cifar10", 90.0, [], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
