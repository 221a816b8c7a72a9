"""Networks by name, their normalisation, and checkpoints that are not what they should be."""

import copy
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinv.features import feature_layers
from dinv.models import (
    DOMAINS,
    NETWORKS,
    Classifier,
    CorruptCheckpoint,
    create_model,
    evaluating,
    load_model,
    load_weights,
    parameter_count,
    registry,
    shipped_models,
    structure,
)
from dinv.models.cifar import wide_resnet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- networks ------------------------------------------------------------------------------------

SIZES = {  # millions of parameters as published, BatchNorm layers
    "cifar_resnet18": (11.17, 20),
    "cifar_resnet34": (21.28, 36),
    "cifar_vgg11": (9.23, 8),
    "wrn40_2": (2.24, 37),
    "wrn40_1": (0.56, 37),
    "wrn16_2": (0.69, 13),
    "wrn16_1": (0.18, 13),
    "resnet_small": (0.74, 8),
    "resnet_tiny": (0.14, 5),
    "vgg_small": (0.43, 5),
    "resnet_digits": (0.034, 4),
    "vgg_digits": (0.015, 3),
}


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
    images = torch.rand(2, model.channels, model.size, model.size, generator=generator())
    model.check(images)
    assert model(images).shape == (2, 10) and model(images).isfinite().all()
    assert model.net[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.requires_grad for p in model.parameters()) and model.training


def test_classes_can_be_chosen():
    model = create_model("vgg_digits", "digits", classes=["even", "odd"])
    assert model.classes == ("even", "odd") and model(torch.rand(1, 1, 8, 8)).shape == (1, 2)


def test_equal_seeds_equal_weights_and_nobody_elses_random_numbers():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = create_model("resnet_digits", "digits", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(state_of(one), state_of(create_model("resnet_digits", "digits", seed=3)))
    assert not equal(state_of(one), state_of(create_model("resnet_digits", "digits", seed=4)))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown network 'resnet_smal': did you mean .*resnet_small"):
        create_model("resnet_smal")
    with pytest.raises(ValueError, match="unknown network 'wrn_40_2'.*wrn40_2"):
        load_model("wrn_40_2")
    with pytest.raises(ValueError, match="'cifar-10': did you mean cifar10.*cifar10, mnist, digits"):
        create_model("resnet_small", "cifar-10")
    with pytest.raises(ValueError, match="unknown .*'imagenet'.* Known: cifar10, mnist, digits"):
        create_model("resnet_small", "imagenet")


def test_a_depth_that_no_wide_residual_network_has():
    with pytest.raises(ValueError, match="depth 41 .* must be 4 more than 6n"):
        wide_resnet(41, 2, 10)


# ---- classifiers ---------------------------------------------------------------------------------


def test_a_classifier_owns_its_normalisation(tiny):
    model, images = tiny(), torch.rand(4, 3, 8, 8, generator=generator())
    mean, std = (np.array(values)[:, None, None] for values in ((0.3, 0.45, 0.6), (0.2, 0.25, 0.3)))
    normalised = torch.from_numpy((images.numpy() - mean) / std).float()
    torch.testing.assert_close(model(images), model.net(normalised))
    assert {"mean", "std"} < set(model.state_dict())


@pytest.mark.parametrize("mean, std", [((0.5,), (0.2, 0.2)), ((0.5,), (0.0,)), ((0.5, 0.5), (0.2, -1.0))])
def test_a_normalisation_that_is_none(mean, std):
    with pytest.raises(ValueError, match="one positive std per channel"):
        Classifier(nn.Flatten(), mean, std, 8, ["a"])


def test_a_classifier_is_called_after_its_network():
    assert Classifier(nn.Flatten(), [0.5], [0.5], 8, ["a"]).name == "Flatten"


def test_freeze(tiny):
    model = tiny().train()
    assert model.freeze() is model
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("shape", [(4, 3, 9, 8), (4, 1, 8, 8), (3, 8, 8), (4, 3, 16, 16)])
def test_images_of_a_wrong_shape(tiny, shape):
    wanted = r"tiny takes images of shape \(N, 3, 8, 8\), got \(" + ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=wanted + r"\): resize or choose another network"):
        tiny().check(torch.zeros(shape))


def test_an_empty_batch(tiny):
    tiny().check(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="tiny was given an empty batch: at least one image"):
        tiny().check(torch.zeros(0, 3, 8, 8))


def test_evaluating_gives_every_module_its_mode_back(tiny):
    model = tiny().train()
    model.net[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def digits():
    """A fresh network, and the weights of another one."""
    return create_model("resnet_digits", "digits", seed=1), state_of(
        create_model("resnet_digits", "digits", seed=2)
    )


def test_checkpoints_are_read_from_safetensors_and_from_state_dictionaries(digits, tmp_path):
    _, state = digits
    paths = [tmp_path / name for name in ("a.safetensors", "b.pt", "c.pth")]
    save_file({name: value.contiguous() for name, value in state.items()}, paths[0])
    torch.save(state, paths[1])
    torch.save({"state_dict": state, "epoch": 7}, paths[2])
    for path in paths:
        model = create_model("resnet_digits", "digits", seed=1)
        assert load_weights(model, str(path)) is model
        assert equal(model.state_dict(), state)
        assert model.net[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    loaded = load_model("resnet_digits", checkpoint=paths[0])
    assert equal(loaded.state_dict(), state) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_truncated_or_altered_safetensors_file(digits, tmp_path):
    model, state = digits
    before, path = state_of(model), tmp_path / "a.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], b"\xff" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint, match="a.safetensors cannot be read .*fetch it again"):
            load_weights(model, path)
    assert equal(model.state_dict(), before)


def test_a_truncated_state_dictionary(digits, tmp_path):
    model, state = digits
    path = tmp_path / "a.pt"
    torch.save(state, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint at all"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint, match="a.pt "):
            load_weights(model, path)


class Trap:
    """What an attacker would put into a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o, 2))])
def test_nothing_is_unpickled(digits, tmp_path, save):
    model, state = digits
    path, sprung = tmp_path / "a.pt", tmp_path / "sprung"
    for content in (Trap(sprung), state | {"more": Trap(sprung)}):
        save(content, path)
        with pytest.raises(CorruptCheckpoint, match="a.pt is not a plain state dictionary"):
            load_weights(model, path)
    assert not sprung.exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 5}, {1: torch.zeros(2)}, {"a": "b"}, 3], ids=repr)
def test_a_checkpoint_of_something_else(digits, tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CorruptCheckpoint, match="a.pt (cannot be read|does not fit resnet_digits)"):
        load_weights(digits[0], tmp_path / "a.pt")


def test_weights_of_another_shape_or_network(digits, tmp_path):
    model, state = digits
    path = tmp_path / "a.safetensors"
    name = next(iter(n for n in state if n.endswith("conv.weight")))
    for changed, what in (
        (state | {name: torch.zeros(2, 2)}, "size mismatch"),
        ({n: v for n, v in state.items() if n != name}, "Missing key"),
        (state | {"more": torch.zeros(1)}, "Unexpected key"),
    ):
        save_file({n: v.contiguous() for n, v in changed.items()}, path)
        with pytest.raises(CorruptCheckpoint, match=f"(?s)does not fit resnet_digits: .*{what}"):
            load_weights(model, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(digits, tmp_path, value):
    model, state = digits
    before, path = state_of(model), tmp_path / "a.safetensors"
    name = next(n for n in state if n.endswith("running_var"))
    state[name][0] = value
    save_file({n: v.contiguous() for n, v in state.items()}, path)
    with pytest.raises(CorruptCheckpoint, match=f"values that are not finite, in {name}"):
        load_weights(model, path)
    assert equal(model.state_dict(), before)


def test_a_file_that_is_not_there(digits, tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(CorruptCheckpoint, match="is not a file: name a .safetensors or a .pt file"):
            load_weights(digits[0], path)
    with pytest.raises(CorruptCheckpoint, match="nothing.pt is not a file"):
        load_model("resnet_digits", tmp_path / "nothing.pt")


def test_networks_of_one_structure_differ_by_their_weights_alone():
    one, other = (create_model("resnet_digits", "digits", seed=seed) for seed in (0, 1))
    assert structure(one) == structure(other) and hash(structure(one)) == hash(structure(other))
    assert structure(one) != structure(create_model("resnet_digits", "digits", classes="abc"))
    assert structure(one) != structure(create_model("vgg_digits", "digits"))
    other.net[1].residual = not other.net[1].residual  # shows in no name and in no shape
    assert structure(one) != structure(other)


def test_a_module_with_a_hook_is_like_itself_alone():
    one, other = (create_model("resnet_digits", "digits") for _ in range(2))
    for network in (one, other):
        network.net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert structure(one) == structure(one) != structure(other)


@pytest.mark.parametrize("value", [[1], ([1], 2), lambda x: x])
def test_an_attribute_that_cannot_be_compared_is_like_itself_alone(value):
    one, other = (create_model("resnet_digits", "digits") for _ in range(2))
    one.net[0].extra, other.net[0].extra = value, copy.deepcopy(value)
    assert hash(structure(one)) == hash(structure(one))
    assert structure(one) == structure(one)
    assert callable(value) or structure(one) != structure(other)


# ---- shipped networks ----------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The shipped weights of resnet_digits, in a folder that may be spoiled."""
    entry = shipped_models()["resnet_digits"]
    shutil.copy(registry.WEIGHTS / entry["file"], tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"resnet_digits": entry}))
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    return tmp_path / entry["file"]


def test_a_shipped_network_comes_frozen(weights):
    model = load_model("resnet_digits")
    assert model.name == "resnet_digits" and model.size == 8 and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_a_shipped_file_that_was_altered_or_is_gone(weights):
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match=r"is corrupt \(SHA-256 \w{12}.*expected \w{12}.*restore it"):
        load_model("resnet_digits")
    weights.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{weights.name} is missing: install the package again"):
        load_model("resnet_digits")


def test_a_network_that_is_not_shipped(weights):
    with pytest.raises(ValueError, match="cifar_resnet34 is not shipped .*train it.*resnet_digits"):
        load_model("cifar_resnet34")
