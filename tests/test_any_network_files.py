"""Files as others write them, on the machines and in the sessions that others have."""

import argparse
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import nn

import dinv
from dinv import figures, latency
from dinv.experiments import imagenet
from dinv.files import digest, locked
from dinv.models import Classifier, CorruptCheckpoint, create_model, load_model, load_weights

NAME, TEN = "torchvision:mobilenet_v3_small", [f"class {k}" for k in range(10)]


@pytest.fixture(scope="module")
def trained():
    """Someone else's network of ten classes: its state dictionary, plain."""
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(5)
    state = mobilenet_v3_small(num_classes=10).state_dict()
    return {k: v + 0.5 if k.endswith("running_mean") else v for k, v in state.items()}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


SAVED = {
    "plain": lambda s: s,
    "module.": lambda s: {"state_dict": prefixed("module.", s), "epoch": 90},
    "_orig_mod.": lambda s: prefixed("_orig_mod.", s),
    "inside": lambda s: {k.replace("features.3.", "features.3._orig_mod.module."): v for k, v in s.items()},
    "net": lambda s: {"net": prefixed("module._orig_mod.", s), "optimizer": {"state": {0: {"exp": s}}}},
    "model": lambda s: {"model": {"state_dict": prefixed("backbone.model.", s)}},
    "lightning": lambda s: {"state_dict": prefixed("model.", s) | {"criterion.weight": torch.ones(10)}},
    "ema": lambda s: {
        "state_dict": {k: torch.zeros_like(v) for k, v in s.items()}, "state_dict_ema": prefixed("module.", s)
    },
    "ema.": lambda s: prefixed("ema.module.", s) | {"module." + k: torch.zeros_like(v) for k, v in s.items()},
    "own": lambda s: prefixed("net.", s) | {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)},
    "unnumbered": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}  # fmt: skip


@pytest.mark.parametrize("way", SAVED)
def test_a_checkpoint_as_the_world_writes_it(trained, tmp_path, way):
    torch.save(SAVED[way](trained), tmp_path / "a.pt")
    loaded = load_model(NAME, checkpoint=tmp_path / "a.pt", classes=TEN)
    assert loaded.classes == tuple(TEN) and not loaded.training
    for name, value in loaded.net.state_dict().items():
        assert torch.equal(value, trained[name]) or name.endswith("num_batches_tracked")
    assert loaded.mean.flatten().tolist() == pytest.approx(
        [0, 0, 0] if way == "own" else [0.485, 0.456, 0.406]
    )


def test_a_checkpoint_with_another_head_or_of_another_network(trained, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(trained, path)
    head = "its head has 10 outputs, not 1000: pass classes= with their names"
    with pytest.raises(CorruptCheckpoint, match=f"a.pt does not fit mobilenet_v3_small: {head}"):
        load_model(NAME, checkpoint=path)
    with pytest.raises(
        CorruptCheckpoint, match=r"it holds features.0.0.weight, .*; expected tensors such as 0\.weight"
    ):
        load_weights(create_model("cifar_vgg11"), path)
    gone = {k: v for k, v in trained.items() if "features.1." not in k} | {"more": torch.ones(1)}
    torch.save(gone | {"features.0.0.weight": torch.ones(16, 1, 3, 3)}, path)
    with pytest.raises(CorruptCheckpoint) as error:
        load_model(NAME, checkpoint=path, classes=TEN)
    missing, more, other = str(error.value).partition("mobilenet_v3_small: ")[2].split("; ")
    assert missing.startswith("14 tensors missing (features.1.block.0.0.weight, ") and missing.endswith(
        ", ...)"
    )
    assert more == "1 tensors unexpected (more)"
    assert other.endswith("(features.0.0.weight (16, 1, 3, 3) for (16, 3, 3, 3))")
    torch.save(prefixed("query.", trained) | prefixed("key.", trained), path)
    with pytest.raises(
        CorruptCheckpoint, match="more than one mobilenet_v3_small, at query., key.: save one"
    ):
        load_model(NAME, checkpoint=path, classes=TEN)


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"state_dict": {}, "args": argparse.Namespace(lr=0.1)}])
def test_python_objects_are_refused_in_two_lines(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CorruptCheckpoint) as error:
        load_model("resnet_digits", checkpoint=tmp_path / "a.pt")
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and lines[1].endswith('save it again with torch.save(net.state_dict(), "a.pt")')
    assert "\\x1b" not in repr(str(error.value)) and "weights_only" not in str(error.value)


def test_a_head_as_wide_as_the_classes():
    for name in (NAME, "timm:tinynet_e", "package:efficientnet_lite0", "torchvision:inception_v3"):
        model = create_model(name, classes="abc").eval()
        assert model.classes == ("a", "b", "c")
        assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    with pytest.raises(ValueError, match="classes of its own: classes= goes with checkpoint="):
        load_model("resnet_digits", classes="abc")


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_images_of_any_channels_and_sides_are_drawn(channels):
    images = torch.rand(2, channels, 5, 8)
    drawn = torch.as_tensor(figures.image_grids({"x": images}, 2).axes[0].get_images()[0].get_array().data)
    assert drawn.shape == (5, 17, 3)
    three = images[:, [0, 0, 0]] if channels == 1 else torch.cat([images, torch.zeros(2, 1, 5, 8)], 1)[:, :3]
    for image, left in zip(three, (0, 9), strict=True):
        torch.testing.assert_close(drawn[:, left : left + 8], image.permute(1, 2, 0))
    bytes_ = (255 * images[:, [channels - 1] * 3]).byte()  # chosen by the caller
    assert len(figures.png(figures.class_rows({"x": (bytes_, torch.tensor([0, 1]))}, "ab", each=1))) > 1000


def test_nothing_that_only_unix_has_is_needed_to_import(tmp_path):
    gone = "sys.modules |= dict.fromkeys(['fcntl', 'resource', 'pwd', 'grp', 'termios'])"
    program = f"import sys; {gone}; import dinv, dinv.figures, dinv.reproduce; "
    program += (
        "from dinv.experiments.results import provenance; from dinv.files import locked; import pathlib\n"
    )
    program += f"with locked(pathlib.Path({str(tmp_path)!r}), 'x'): print('held')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "held\n", run.stderr


def test_a_folder_that_is_read_only_or_locked_twice(tmp_path, monkeypatch):
    with locked(tmp_path, "x"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with locked(tmp_path, "x"):
        assert not list(tmp_path.iterdir())


IMAGENETTE = {  # WordNet's id: its number among ImageNet's thousand
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip


def of_thousand(names=None):
    """A network of a thousand classes that nobody asks for an answer."""
    return Classifier(nn.Flatten(), (0.5,) * 3, (0.5,) * 3, 8, names or [f"name {k}" for k in range(1000)])


def said_of(place, model, names):
    """What `of_folder` says of each name: image number k, at its place, is k * 20 red."""
    data = imagenet.of_folder(str(place), model, 2000)
    said = {
        round(image[0].float().mean().item() / 20): int(n)
        for image, n in zip(data.images, data.labels, strict=True)
    }
    return {name: said[number] for number, name in enumerate(names)}


def write(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 11), (20 * number, 0, 0)).save(path, "png")


def test_a_subset_of_the_thousand_by_wordnets_ids(tmp_path, monkeypatch):
    for number, name in enumerate(IMAGENETTE):
        write(tmp_path / "val" / name / "a.JPEG", number)
    assert said_of(tmp_path / "val", of_thousand(), IMAGENETTE) == IMAGENETTE
    with pytest.raises(
        ValueError, match=r"has 1 classes: val; expected .*ids such as n01440764\. Is it .*/val\?"
    ):
        imagenet.of_folder(str(tmp_path), of_thousand(), 5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"Which of the thousand some of them are, only timm knows: pip install"
    ):
        imagenet.of_folder(str(tmp_path / "val"), of_thousand(), 5)
    monkeypatch.undo()
    write(tmp_path / "val" / "n99999999" / "a.JPEG", 11)
    with pytest.raises(ValueError, match="has 11 classes: n01440764, n02102040"):
        imagenet.of_folder(str(tmp_path / "val"), of_thousand(), 5)


def test_a_subset_of_classes_by_their_names(tmp_path):
    for number, name in enumerate(["Great_White_Shark", "tench", "black swan"]):
        write(tmp_path / name / "a.png", number)
    names = ["tench", "goldfish", "great white shark", "black swan"]
    names += [str(number) for number in range(996)]
    said = said_of(tmp_path, of_thousand(names), ["Great_White_Shark", "tench", "black swan"])
    assert list(said.values()) == [2, 0, 3]
    write(tmp_path / "1000" / "a.png", 9)
    with pytest.raises(
        ValueError, match="has 4 classes: 1000, Great_White_Shark, .*expected names of the 1000"
    ):
        imagenet.of_folder(str(tmp_path), of_thousand(names), 5)


LISTS = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{n + 1:08},{name} 1 2 3 4 \n" for n, name in enumerate(IMAGENETTE)
    ),
    "val.txt": "".join(f"ILSVRC2012_val_{n + 1:08}.JPEG {7 * n % 1000}\n" for n in range(1000)),
}  # fmt: skip


@pytest.mark.parametrize("name, inside", [("LOC_val_solution.csv", False), ("val.txt", True)])
def test_the_flat_download_with_its_list(tmp_path, name, inside):
    folder, places = tmp_path / "flat", [f"ILSVRC2012_val_{number + 1:08}" for number in range(10)]
    for number, place in enumerate(places):
        write(folder / f"{place}.JPEG", number)
    with pytest.raises(
        ValueError, match=r"has 10 images \(ILSVRC2012_val_00000001.JPEG, .*LOC_val_solution.csv"
    ):
        imagenet.of_folder(str(folder), of_thousand(), 5)
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n361\n" * 5)
    ((folder if inside else tmp_path) / name).write_text(LISTS[name])
    said = said_of(folder, of_thousand(), places)
    expected = IMAGENETTE.values() if name.endswith("csv") else range(0, 70, 7)
    assert list(said.values()) == list(expected)
    lines = "".join(f"{place} {number + 1}\n" for number, place in enumerate(places))
    (folder / "a.txt").write_text(lines)
    with pytest.raises(ValueError, match="a.txt: numbers from 1 are the development kit's"):
        imagenet.of_folder(str(folder), of_thousand(), 5)


# ---- the user's own session ------------------------------------------------------------------------
def states():
    return pickle.dumps((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))


def actions(tiny):
    """Every public function that draws or makes a network, on next to nothing."""
    teacher, labels = tiny().freeze(), torch.arange(4)
    images, objective = torch.rand(8, 3, 8, 8), dinv.CrossEntropy() + dinv.FeatureStatistics()
    data = dinv.Dataset("x", "train", (255 * images).byte(), torch.arange(8) % 2, ("a", "b"))
    inversion = dinv.InversionSettings(steps=2, compile="never")
    yield "invert", lambda: dinv.invert(teacher, labels, objective, inversion)
    settings = dinv.GeneratorSettings(steps=1, width=8, latent_dim=4, compile="never")
    yield "generate", lambda: dinv.generate(teacher, labels, objective, settings)
    for kind in ("kl", "random"):
        pruning = dinv.PruningSettings(importance=kind)
        yield f"prune {kind}", lambda p=pruning: dinv.prune(teacher, images, filters=0.2, settings=p)
    short = dinv.DistillationSettings(rounds=1, updates=1, batch_size=8, compile="never")
    yield "distill", lambda: dinv.distill(teacher, tiny(1), images, short)
    new = dinv.Dataset("x", "train", data.images, 5 + data.labels, (*teacher.classes, "a", "b"))
    updates = dinv.ContinualSettings(updates=1, batch_size=8)
    larger = dinv.extend(teacher, ["a", "b"])
    yield "extend", lambda: dinv.extend(teacher, ["a", "b"])
    yield "learn", lambda: dinv.learn(teacher, larger, new, updates, images=images)
    yield "train", lambda: dinv.train(tiny(2, classes=2), data, dinv.TrainingSettings(epochs=1, batch_size=4))
    for name in ("resnet_digits", "package:efficientnet_lite0"):
        yield f"load_model {name}", lambda name=name: dinv.load_model(name)
    for name in ("cifar_vgg11", "torchvision:googlenet", "timm:tinynet_e"):
        yield f"create_model {name}", lambda name=name: dinv.create_model(name)
    yield "measure_statistics", lambda: dinv.measure_statistics(teacher, images)
    yield "latencies", lambda: latency.latencies([teacher], batch_size=2, repeats=1)
    yield "table", lambda: latency.LatencyTable.measure(teacher, batch_size=2, repeats=1)


def test_the_users_random_numbers_stay_as_they_are(tiny):
    for name, action in actions(tiny):
        before = states()
        action()
        assert states() == before, name


def made(teacher, tmp_path):
    """What pruning, networks by name, figures and folders give."""
    images = torch.arange(1536, dtype=torch.float32, device="cpu").view(8, 3, 8, 8) / 1536
    for kind in ("kl", "random", "magnitude"):
        settings = dinv.PruningSettings(importance=kind)
        pruned = dinv.prune(teacher, images, filters=0.3, settings=settings)
        yield pruned.network.state_dict()
        yield dinv.load_pruned(pruned.save(tmp_path / "x.safetensors"), teacher).network.state_dict()
    yield dinv.create_model("resnet_digits", "digits").state_dict()
    yield dinv.load_model("resnet_digits").state_dict()
    yield dinv.create_model("timm:tinynet_e", classes="ab").state_dict()
    labels = torch.zeros(8, dtype=torch.int64, device="cpu")
    yield figures.tile(images, 2), figures.class_rows({"x": (images, labels)}, ["a"]).axes[0].get_title()
    data = imagenet.of_folder(str(tmp_path), of_thousand(), 2)
    yield data.images, data.labels


@pytest.mark.parametrize("setting", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_a_default_type_or_device_of_the_users_changes_nothing(tiny, tmp_path, setting):
    for number, name in enumerate(IMAGENETTE):
        write(tmp_path / name / "a.JPEG", number)
    teacher = tiny().freeze()
    expected = digest(list(made(teacher, tmp_path)))
    try:
        torch.set_default_dtype(setting.get("dtype", torch.float32))
        torch.set_default_device(setting.get("device"))
        assert digest(list(made(teacher, tmp_path))) == expected
        assert torch.empty(0).dtype == setting.get("dtype", torch.float32)
        assert torch.empty(0).device.type == setting.get("device", "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_no_float64_on_a_device_that_has_none(tiny, monkeypatch):
    """As Apple's cards have it; pretended: only what was moved to the CPU becomes a double."""
    double, calls = torch.Tensor.double, []

    def cpu(x):
        x.moved = True
        return x

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", lambda x: calls.append(hasattr(x, "moved")) or double(x))
    dinv.prune(tiny().freeze(), torch.rand(4, 3, 8, 8), filters=0.2)
    assert calls and all(calls)
