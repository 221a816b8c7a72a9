"""Networks by name, their normalisation, and checkpoints that are not what they should be."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinv.feature_statistics import feature_layers
from dinv.files import digest
from dinv.models import (
    DOMAINS,
    NETWORKS,
    Classifier,
    CorruptCheckpoint,
    WeightsUnavailable,
    create_model,
    evaluating,
    load_model,
    load_weights,
    parameter_count,
    pretrained,
    shipped_models,
    zoo,
)

SIZES = {  # millions of parameters as published, BatchNorm layers
    "cifar_resnet18": (11.17, 20), "cifar_resnet34": (21.28, 36), "cifar_vgg11": (9.23, 8),
    "resnet_small": (0.74, 8), "resnet_tiny": (0.14, 5), "vgg_small": (0.43, 5),
    "resnet_digits": (0.034, 4), "vgg_digits": (0.015, 3),
}  # fmt: skip


def test_every_network_has_its_size_written_down():
    assert SIZES.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_parameters(name):
    with torch.device("meta"):  # no memory, no time
        for classes, channels, size in ((10, 3, 32), (7, 1, 28), (10, 3, 16)):
            net = NETWORKS[name](classes, channels)
            assert net(torch.zeros(2, channels, size, size)).shape == (2, classes)
        net = NETWORKS[name](10, 3)
    millions, norms = SIZES[name]
    assert parameter_count(net) / 1e6 == pytest.approx(millions, abs=0.006 if millions > 0.1 else 0.0006)
    assert len(feature_layers(net)) == norms
    assert all(isinstance(net.get_submodule(layer), nn.BatchNorm2d) for layer in feature_layers(net))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_network_for_every_domain(domain):
    spec = DOMAINS[domain]
    model = create_model("resnet_digits", domain)
    assert (model.channels, model.size, model.classes) == (len(spec.mean), spec.size, spec.classes)
    images = torch.rand(2, model.channels, model.size, model.size)
    model.check(images)
    assert model(images).shape == (2, 10) and model(images).isfinite().all()
    assert model.net[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.requires_grad for p in model.parameters()) and model.training
    other = create_model("vgg_digits", domain, classes=["even", "odd"])
    assert other.classes == ("even", "odd") and other(images).shape == (2, 2)


def test_equal_seeds_equal_weights_and_nobody_elses_random_numbers():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = create_model("resnet_digits", "digits", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert digest(one) == digest(create_model("resnet_digits", "digits", seed=3))
    assert digest(one) != digest(create_model("resnet_digits", "digits", seed=4))


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (create_model, ["resnet_smal"], "unknown network 'resnet_smal': did you mean resnet_small"),
        (load_model, ["vgg_smal"], "unknown network 'vgg_smal': did you mean vgg_small.*NETWORKS, torch"),
        (load_model, ["torchvision:resnet19"], "'torchvision:resnet19': did you mean resnet1"),
        (load_model, ["elsewhere:resnet18"], "use torchvision:NAME, timm:NAME or package:NAME"),
        (create_model, ["vgg_small", "cifar-10"], "'cifar-10': did you mean cifar10.*cifar10, mnist, digits"),
        (create_model, ["vgg_small", "imagenet"], "unknown domain 'imagenet'. Known: cifar10, mnist, digits"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_weights_out_of_reach(monkeypatch, tmp_path, name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with pytest.raises(WeightsUnavailable, match="are out of reach .*take one of the shipped networks"):
        load_model(name)
    assert pretrained.TIMEOUT <= 10


# ---- classifiers ---------------------------------------------------------------------------------
def test_a_classifier_owns_its_normalisation(tiny):
    model, images = tiny(), torch.rand(4, 3, 8, 8)
    mean, std = (np.array(values)[:, None, None] for values in ((0.3, 0.45, 0.6), (0.2, 0.25, 0.3)))
    normalised = torch.from_numpy((images.numpy() - mean) / std).float()
    torch.testing.assert_close(model(images), model.net(normalised))
    assert {"mean", "std"} < set(model.state_dict())
    assert Classifier(nn.Flatten(), [0.5], [0.5], 8, ["a"]).name == "Flatten"


@pytest.mark.parametrize("mean, std", [((0.5,), (0.2, 0.2)), ((0.5,), (0.0,)), ((0.5, 0.5), (0.2, -1.0))])
def test_a_normalisation_that_is_none(mean, std):
    with pytest.raises(ValueError, match="one positive std per channel"):
        Classifier(nn.Flatten(), mean, std, 8, ["a"])


@pytest.mark.parametrize("shape", [(4, 3, 9, 8), (4, 1, 8, 8), (3, 8, 8), (4, 3, 16, 16)])
def test_images_of_a_wrong_shape(tiny, shape):
    expected = r"tiny takes images of shape \(N, 3, 8, 8\), got \(" + ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=expected + r"\): resize or choose another network"):
        tiny().check(torch.zeros(shape))
    with pytest.raises(ValueError, match="tiny was given an empty batch: at least one image"):
        tiny().check(torch.zeros(0, 3, 8, 8))


def test_freeze_and_evaluating(tiny):
    model = tiny().train()
    model.net[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert model.freeze() is model
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


# ---- checkpoints ---------------------------------------------------------------------------------
@pytest.fixture
def digits():
    """A fresh network, and the weights of another one."""
    other = create_model("resnet_digits", "digits", seed=2).state_dict()
    return create_model("resnet_digits", "digits", seed=1), {k: v.contiguous() for k, v in other.items()}


def refused(model, path, message):
    """`path` is refused with this message, and `model` left as it was."""
    before = digest(model)
    with pytest.raises(CorruptCheckpoint, match=message):
        load_weights(model, path)
    assert digest(model) == before


def test_checkpoints_are_read_from_safetensors_and_from_state_dictionaries(digits, tmp_path):
    _, state = digits
    paths = [tmp_path / name for name in ("a.safetensors", "b.pt", "c.pth")]
    save_file(state, paths[0])
    torch.save(state, paths[1])
    torch.save({"state_dict": state, "epoch": 7}, paths[2])
    for path in paths:
        model = create_model("resnet_digits", "digits", seed=1)
        assert load_weights(model, str(path)) is model
        assert digest(model.state_dict()) == digest(state)
        assert model.net[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    loaded = load_model("resnet_digits", checkpoint=paths[0])
    assert digest(loaded.state_dict()) == digest(state) and not loaded.training


def test_truncated_or_altered_files(digits, tmp_path):
    model, state = digits
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], b"\xff" + whole[1:]):
        (tmp_path / "a.safetensors").write_bytes(damaged)
        refused(model, tmp_path / "a.safetensors", "(?s)a.safetensors cannot be read .*fetch it again")
    whole = (tmp_path / "a.pt").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint at all"):
        (tmp_path / "a.pt").write_bytes(damaged)
        refused(model, tmp_path / "a.pt", "a.pt ")


class Trap:
    """What an attacker would put into a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o, 2))])
def test_nothing_is_unpickled(digits, tmp_path, save):
    model, state = digits
    for content in (Trap(tmp_path / "sprung"), state | {"more": Trap(tmp_path / "sprung")}):
        save(content, tmp_path / "a.pt")
        refused(model, tmp_path / "a.pt", "a.pt cannot be read as tensors alone")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 5}, {1: torch.zeros(2)}, {"a": "b"}, 3], ids=repr)
def test_a_checkpoint_of_something_else(digits, tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    refused(digits[0], tmp_path / "a.pt", "a.pt (cannot be read|does not fit resnet_digits)")


def test_weights_of_another_network_or_not_finite(digits, tmp_path):
    model, state = digits
    path, name = tmp_path / "a.safetensors", next(n for n in state if n.endswith("conv.weight"))
    for changed, message in (
        (state | {name: torch.zeros(2, 2)}, "does not fit resnet_digits: 1 tensors of another shape"),
        ({n: v for n, v in state.items() if n != name}, "does not fit resnet_digits: 1 tensors missing"),
        (state | {"more": torch.zeros(1)}, "does not fit resnet_digits: 1 tensors unexpected"),
        (state | {name: state[name] * float("nan")}, f"values that are not finite, in {name}"),
        (state | {name: state[name] * float("inf")}, f"values that are not finite, in {name}"),
    ):
        save_file(changed, path)
        refused(model, path, message)
    for absent in (tmp_path / "nothing.safetensors", tmp_path):
        refused(model, absent, "is not a file: name a .safetensors or a .pt file")


# ---- shipped networks ----------------------------------------------------------------------------
def test_a_shipped_file_that_was_altered_or_is_gone(tmp_path, monkeypatch):
    entry = shipped_models()["resnet_digits"]
    path = tmp_path / entry["file"]
    shutil.copy(zoo.WEIGHTS / entry["file"], path)
    (tmp_path / "manifest.json").write_text(json.dumps({"resnet_digits": entry}))
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    assert load_model("resnet_digits").size == 8
    with pytest.raises(ValueError, match="cifar_resnet34 is not shipped .*train it.*resnet_digits"):
        load_model("cifar_resnet34")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match=r"is corrupt \(SHA-256 \w{12}.*expected \w{12}.*restore it"):
        load_model("resnet_digits")
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{path.name} is missing: install the package again"):
        load_model("resnet_digits")
