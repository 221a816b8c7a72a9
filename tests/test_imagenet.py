"""Notebook 07: names become labels, folders become classes, and networks out of reach are told."""

import pytest
import torch
from PIL import Image

from dinv import metrics
from dinv.experiments import imagenet
from dinv.experiments.profiles import load_profile
from dinv.models import WeightsUnavailable, load_model


@pytest.fixture
def profile(short_profile):
    return short_profile()


@pytest.fixture
def teacher(profile):
    return imagenet.network(profile, profile.imagenet.teacher)


def test_the_first_network_in_reach_is_taken(profile, monkeypatch):
    def out_of_reach(name):
        raise WeightsUnavailable(f"no way to {name}")

    monkeypatch.setattr("dinv.experiments.imagenet.load_model", out_of_reach)
    assert imagenet.network(profile, ["torchvision:resnet50", "resnet_digits"]).name == "resnet_digits"
    with pytest.raises(WeightsUnavailable, match="torchvision:resnet50: no way.*timm:x: no way"):
        imagenet.network(profile, ["torchvision:resnet50", "timm:x"])


def test_settings_go_with_the_teacher(tiny, capsys):
    gpu, cpu, network = load_profile("gpu"), load_profile("cpu"), tiny()
    assert imagenet.suited(gpu, network) is gpu.imagenet
    network.name = "efficientnet_lite0"
    assert imagenet.suited(cpu, network) is cpu.imagenet and not capsys.readouterr().out
    second = imagenet.suited(gpu, network)
    assert second.inversion == cpu.imagenet.inversion and second.distance == "kl"
    assert second.classes == gpu.imagenet.classes and second.images_per_class == gpu.imagenet.images_per_class
    assert "no torchvision:resnet50: the settings are those" in capsys.readouterr().out


def test_a_verifier_is_never_the_teacher(short_profile, profile, teacher):
    assert [verifier.name for verifier in imagenet.verifiers(profile, teacher)] == ["vgg_digits"]
    alone = short_profile({"imagenet.verifiers": ("resnet_digits",)})
    with pytest.raises(WeightsUnavailable, match="of resnet_digits no weights"):
        imagenet.verifiers(alone, teacher)


def test_classes_by_name_and_at_random(teacher):
    assert imagenet.labels(teacher, ["7", "1"], 2).tolist() == [7, 1, 7, 1]
    with pytest.raises(ValueError, match="the teacher knows no class '77': did you mean 7"):
        imagenet.labels(teacher, ["77"])
    names, again = (imagenet.sample_classes(teacher, 3, ("0", "1", "2"), seed=1) for _ in range(2))
    assert names == again and len(set(names)) == 3 and set(names) <= set("3456789")
    assert imagenet.sample_classes(teacher, 10, seed=1) != imagenet.sample_classes(teacher, 10, seed=2)
    assert sorted(imagenet.sample_classes(teacher, 9, apart_from=tuple("012345"))) == list("6789")


def test_every_profiles_classes_and_schedule_fit_its_teacher():
    teacher = load_model("package:efficientnet_lite0")
    for name in ("cpu", "gpu", "paper"):
        chosen = load_profile(name).imagenet
        assert len(imagenet.labels(teacher, chosen.classes, chosen.images_per_class)) >= 12
        assert chosen.inversion.plan(teacher.size)[-1][1] == teacher.size == 224


# ---- real images -----------------------------------------------------------------------------------
def names_of_folders(folder, names, model):
    """The class that each folder's image is said to be of; one image a folder, its red its number."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (20, 14), (20 * number, 0, 0)).save(folder / name / "x.png")
    data = imagenet.of_folder(str(folder), model, len(names))
    assert data.images.shape[1:] == (3, model.size, model.size) and data.images.dtype == torch.uint8
    said = {int(image[0, 0, 0]) // 20: label for image, label in zip(data.images, data.labels, strict=True)}
    return {name: model.classes[said[number]] for number, name in enumerate(names)}


@pytest.mark.parametrize("first, width", [(0, 0), (1, 4)])
def test_folders_that_are_numbers_are_classes_in_the_order_of_numbers(tmp_path, tiny, first, width):
    model = tiny(0, classes=12)
    names = [str(number).zfill(width) for number in range(first, first + 12)]
    assert names_of_folders(tmp_path, names, model) == dict(zip(names, model.classes, strict=True))


def test_folders_with_the_classes_own_names_or_wordnets_ids(tmp_path, tiny):
    model = tiny(0, classes=3)
    ids = ["n01440760", "n01440764", "n02000000"]
    assert list(names_of_folders(tmp_path / "ids", ids, model).values()) == list(model.classes)
    model.classes = ("zebra", "10", "2")
    assert names_of_folders(tmp_path / "own", ["10", "2", "zebra"], model) == {x: x for x in model.classes}


@pytest.mark.parametrize(
    "names", ["2 n01440764 n01443537", "cat dog horse", "0 1 3", "01 1 2", "0 1", "n01440764", ""]
)
def test_folders_that_are_no_classes_are_refused_before_an_image_is_read(tmp_path, tiny, monkeypatch, names):
    names = names.split()
    monkeypatch.setattr("torchvision.datasets.ImageFolder", None)
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ValueError) as error:
        imagenet.of_folder(str(tmp_path), tiny(0, classes=3), 1)
    problem, expected = str(error.value).split("; ")
    assert problem.endswith(f"has {len(names)} classes: {', '.join(names) or 'none'}")
    assert expected.startswith("expected names of the 3 classes of tiny (class0,")
    with pytest.raises(ValueError, match="is no folder"):
        imagenet.of_folder("/nowhere", tiny(0), 1)


def test_photographs_are_known(profile, teacher):
    images, names = imagenet.photographs(profile, teacher)
    assert names == list("0123456789") and images.shape == (10, 1, 8, 8)
    large = load_model("package:efficientnet_lite0")
    images, names = imagenet.photographs(profile, large)
    assert metrics.topk_accuracy(large, images, imagenet.labels(large, names), 1) == 100


def test_large_networks_are_tested_on_the_users_folder_or_not_at_all(profile, teacher, tmp_path, tiny):
    large = tiny(0, size=64)
    assert imagenet.test_set(profile, large) is None and len(imagenet.test_set(profile, teacher)) == 360
    names_of_folders(tmp_path / "photographs", [f"n0144076{number}" for number in range(5)], large)
    folder = load_profile("smoke", {"imagenet.folder": str(tmp_path / "photographs")})
    data = imagenet.test_set(folder, large, count=4)
    assert data.images.shape == (4, 3, 64, 64) and data.classes == large.classes
