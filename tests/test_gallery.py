"""Notebook 07's stages: names become images, judges of other sizes look at them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinv import chapters, gallery, metrics
from dinv.datasets import load_dataset
from dinv.models import WeightsUnavailable, load_model, resized
from dinv.objectives import FeatureStatistics
from dinv.profiles import load_profile
from dinv.reproduce import cli
from dinv.step import forward_flops

SHORT = {"imagenet.stages": ((2, 4), (3, 8)), "imagenet.compare": ((2, 8),)}


@pytest.fixture
def run(short_run):
    return short_run("07_imagenet", SHORT)


def test_the_first_network_in_reach_is_taken(run, monkeypatch):
    def out_of_reach(name):
        raise WeightsUnavailable(f"no way to {name}")

    monkeypatch.setattr("dinv.gallery.load_model", out_of_reach)
    assert gallery.network(run, ["torchvision:resnet50", "resnet_digits"]).name == "resnet_digits"
    with pytest.raises(WeightsUnavailable, match="torchvision:resnet50: no way.*timm:x: no way"):
        gallery.network(run, ["torchvision:resnet50", "timm:x"])


def test_a_judge_is_never_the_teacher(run, monkeypatch):
    teacher = gallery.network(run, run.profile.imagenet.teacher)
    assert [judge.name for judge in gallery.judges(run, teacher)] == ["vgg_digits"]
    own = dataclasses.replace(run.profile.imagenet, judges=run.profile.imagenet.teacher)
    run.profile = dataclasses.replace(run.profile, imagenet=own)
    with pytest.raises(WeightsUnavailable, match="of resnet_digits no weights"):
        gallery.judges(run, teacher)


def test_classes_by_name(run):
    teacher = gallery.network(run, ["resnet_digits"])
    assert gallery.labels(teacher, ["7", "1"], 2).tolist() == [7, 1, 7, 1]
    with pytest.raises(ValueError, match="resnet_digits knows no class '77': did you mean 7"):
        gallery.labels(teacher, ["77"])


def test_classes_at_random_and_apart_from_others(run):
    teacher = gallery.network(run, ["resnet_digits"])
    drawn = gallery.drawn(teacher, 3, apart_from=("0", "1", "2"), seed=1)
    assert drawn == gallery.drawn(teacher, 3, apart_from=("0", "1", "2"), seed=1)
    assert len(set(drawn)) == 3 and set(drawn) <= set("3456789")
    assert gallery.drawn(teacher, 10, seed=1) != gallery.drawn(teacher, 10, seed=2)
    assert sorted(gallery.drawn(teacher, 9, apart_from=tuple("012345"))) == list("6789")  # all there are


def test_rows_share_the_prior_and_differ_by_the_statistics():
    profile = load_profile("cpu")
    rows = ("deepdream", "deepinversion", "deepinversion, l2")
    names = {row: gallery.objective(profile, row) for row in rows}
    assert names["deepinversion"].names == (*names["deepdream"].names, FeatureStatistics.name)
    distances = [names[row].config()[-1] for row in ("deepinversion", "deepinversion, l2")]
    assert distances[0] != distances[1] and "kl" in str(distances[0]) and "l2" in str(distances[1])


def test_a_gallery_is_a_stage_of_the_wanted_classes_at_the_teachers_size(run):
    teacher = gallery.network(run, ["resnet_digits"])
    wanted = gallery.labels(teacher, ["3", "5", "8"], 2)
    pool, result = gallery.made(run, "deepinversion", teacher, wanted, snapshots=(0, 1, 4, 5))
    again, cached = gallery.made(run, "deepinversion", teacher, wanted, snapshots=(0, 1, 4, 5))
    assert pool.images.shape == (6, 1, 8, 8) and pool.labels.tolist() == [3, 5, 8, 3, 5, 8]
    assert pool.snapshots.shape == (4, 6, 1, 8, 8)  # the coarse ones enlarged
    assert not result.cached and cached.cached and torch.equal(pool.images, again.images)
    assert torch.equal(pool.snapshots[-1], pool.images) and not torch.equal(*pool.snapshots[:2])
    terms = gallery.objective(run.profile, "deepinversion")
    assert gallery.made(run, "jack-o'-lantern, ((2, 4),)", teacher, wanted, terms)[1].kind == "pool"
    student = gallery.network(run, ["vgg_digits"])
    rival, _ = gallery.made(run, "deepinversion", teacher, wanted, student=student)
    assert not torch.equal(rival.images, pool.images)


def test_every_profiles_classes_and_schedule_fit_its_teacher():
    teacher = load_model("package:efficientnet_lite0")
    for name in ("cpu", "gpu", "paper"):
        profile = load_profile(name)
        assert len(gallery.labels(teacher, profile.imagenet.classes, profile.imagenet.each)) >= 12
        assert gallery.settings(profile).plan(teacher.size)[-1][1] == 224


# ---- what judges say -------------------------------------------------------------------------------


def test_resizing_keeps_bytes_kind_and_range():
    images = torch.randint(256, (3, 1, 8, 8)).to(torch.uint8)
    assert resized(images, 8) is images
    large, floats = resized(images, 12), resized(images / 255, 12)
    assert large.shape == (3, 1, 12, 12) and large.dtype == torch.uint8 and floats.dtype == torch.float32
    assert (large.float() / 255 - floats).abs().max() <= 0.5 / 255 + 1e-6
    flat = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    assert resized(flat, 4).eq(77).all()


def test_top_k_by_hand(tiny):
    model, images = tiny(0).freeze(), torch.rand(20, 3, 8, 8)
    labels = torch.arange(20) % 5
    order = metrics.predict(model, images).argsort(1, descending=True)
    for k in (1, 2, 5):
        expected = np.mean([labels[i].item() in order[i, :k].tolist() for i in range(20)])
        assert metrics.top(model, images, labels, k, batch=7) == pytest.approx(100 * expected)
    assert metrics.top(model, F.interpolate(images, (16, 16)), labels, 5) == 100  # resized to what it takes


def test_inception_score_by_hand(tiny):
    model, images = tiny(0).freeze(), torch.randint(256, (40, 3, 8, 8)).to(torch.uint8)
    answers = metrics.predict(model, images).softmax(1).double().numpy()
    divergence = (answers * (np.log(answers) - np.log(answers.mean(0)))).sum(1).mean()
    assert metrics.inception_score(model, images, batch=9) == pytest.approx(np.exp(divergence), rel=1e-4)
    assert metrics.inception_score(model, images[:1].expand(8, -1, -1, -1)) == pytest.approx(1, abs=1e-4)


def test_diversity_is_zero_for_copies_and_asks_for_pairs(tiny):
    model, images = tiny(0).freeze(), torch.rand(4, 3, 8, 8)
    copies = images[:1].expand(4, -1, -1, -1)
    assert metrics.diversity(model, copies, torch.zeros(4)) == pytest.approx(0, abs=1e-6)
    assert metrics.diversity(model, images, torch.zeros(4)) > 0
    with pytest.raises(ValueError, match="no class has two images"):
        metrics.diversity(model, images, torch.arange(4))


def test_images_of_a_coarse_size_can_be_judged_as_they_are(run):
    teacher = gallery.network(run, ["resnet_digits"])
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        answers = teacher(images / 255).argmax(1)
    assert metrics.top(teacher, images, answers, 1, resize=False) == 100
    assert metrics.top(teacher, images, (answers + 1) % 10, 1, resize=False) == 0


def test_images_of_a_folder(tmp_path, tiny):
    for number in range(5):
        folder = tmp_path / f"n0144076{number}"
        folder.mkdir()
        for index in range(2):
            Image.new("RGB", (20, 14), (number, 10 * index, 0)).save(folder / f"{index}.png")
    model = tiny(0)
    data = gallery.of_folder(str(tmp_path), model, 6)
    assert data.images.shape == (6, 3, 8, 8) and data.images.dtype == torch.uint8
    assert data.classes == model.classes and torch.equal(data.labels, data.images[:, 0, 0, 0].long())
    with pytest.raises(ValueError, match="is no folder"):
        gallery.of_folder("/nowhere", model, 1)


def names_of_folders(folder, names, model):
    """The class that each folder's image is said to be of; one image a folder, its red its number."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / name / "x.png")
    data = gallery.of_folder(str(folder), model, len(names))
    said = {int(image[0, 0, 0]) // 20: label for image, label in zip(data.images, data.labels, strict=True)}
    return {name: model.classes[said[number]] for number, name in enumerate(names)}


@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_folders_that_are_numbers_are_classes_in_the_order_of_numbers(tmp_path, tiny, width, first):
    model = tiny(0, classes=12)
    names = [str(number).zfill(width) for number in range(first, first + 12)]
    found = names_of_folders(tmp_path, names, model)
    assert found == dict(zip(names, model.classes, strict=True))


def test_folders_with_the_classes_own_names_are_those_classes(tmp_path, tiny):
    model = tiny(0, classes=3)
    model.classes = ("zebra", "10", "2")
    assert names_of_folders(tmp_path, ["10", "2", "zebra"], model) == {x: x for x in model.classes}


@pytest.mark.parametrize(
    "names", ["2 n01440764 n01443537", "cat dog horse", "0 1 3", "01 1 2", "0 1", "n01440764", ""]
)
def test_folders_that_are_no_classes_are_refused_before_an_image_is_read(tmp_path, tiny, monkeypatch, names):
    names = names.split()
    monkeypatch.setattr("torchvision.datasets.ImageFolder", None)
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ValueError) as told:
        gallery.of_folder(str(tmp_path), tiny(0, classes=3), 1)
    found, expected = str(told.value).split("; ")
    assert found.endswith(f"has {len(names)} folders: {', '.join(names) or 'none'}")
    assert expected.startswith("expected one folder for each of the 3 classes of tiny: their names (class0,")


def test_photographs_are_known(run):
    teacher = gallery.network(run, ["resnet_digits"])
    images, names = gallery.photographs(run, teacher)
    assert names == list("0123456789") and images.shape == (10, 1, 8, 8)
    large = load_model("package:efficientnet_lite0")
    images, names = gallery.photographs(run, large)
    assert metrics.top(large, images, torch.tensor([large.classes.index(name) for name in names]), 1) == 100


def test_labels_that_are_given_are_part_of_a_pools_key(run):
    teacher = gallery.network(run, ["resnet_digits"])
    terms = gallery.objective(run.profile, "deepdream")
    options = {"images": 20, "batch": 20, "settings": gallery.settings(run.profile)}
    ones = torch.ones(20, dtype=torch.int64)
    asked = (None, ones, ones)
    made = [chapters.pool(run, "x", teacher, terms, labels=wanted, **options) for wanted in asked]
    assert [result.cached for _, result in made] == [False, False, True]
    assert made[0][0].labels.unique().numel() == 10 and made[2][0].labels.eq(1).all()


def test_a_folder_of_imagenet_is_a_setting_and_nothing_else(tmp_path, capsys):
    assert "imagenet.folder" not in cli.parse([]).set
    given = cli.parse(["--imagenet", str(tmp_path)]).set
    assert given == {"imagenet.folder": str(tmp_path)}
    assert load_profile("cpu", given).imagenet.folder == str(tmp_path)
    with pytest.raises(SystemExit):
        cli.parse(["--imagenet", str(tmp_path / "nowhere")])
    assert "is no folder" in capsys.readouterr().err


def test_a_fresh_network_is_taught_on_inverted_images_and_tested_on_real_ones(run):
    teacher = gallery.network(run, ["resnet_digits"])
    pool, _ = gallery.many(run, "deepinversion", teacher, 24)
    assert torch.equal(pool.labels, torch.arange(24) % 10)
    fresh, result = gallery.transferred(run, teacher, pool.images)
    assert fresh.name == teacher.name and len(result.meta["history"]) == run.profile.imagenet.epochs
    assert gallery.transferred(run, teacher, pool.images)[1].cached
    assert chapters.digest(fresh) != chapters.digest(teacher)
    assert len(gallery.test_set(run, teacher)) == len(load_dataset("digits", "test"))


def test_large_networks_are_tested_on_the_users_folder_or_not_at_all(run, tmp_path, tiny, monkeypatch):
    large = tiny(0, size=64)
    assert gallery.test_set(run, large) is None
    for number in range(5):
        folder = tmp_path / "photographs" / f"n0144076{number}"
        folder.mkdir(parents=True)
        Image.new("RGB", (70, 70), (number, 0, 0)).save(folder / "0.png")
    monkeypatch.setattr(run, "profile", load_profile("smoke", {"imagenet.folder": str(folder.parent)}))
    found = gallery.test_set(run, large, count=4)
    assert found.images.shape == (4, 3, 64, 64) and found.classes == large.classes


def test_what_table_6_costs_follows_the_papers_numbers(run):
    teacher, paper = gallery.network(run, ["resnet_digits"]), load_profile("paper")
    synthesis, distillation = gallery.work_of_transfer(paper, teacher)
    area = 2000 * (112 / 8) ** 2 + 1000 * (224 / 8) ** 2
    assert synthesis == pytest.approx(140_000 * 2 * forward_flops(teacher) * area)
    assert distillation == pytest.approx(140_000 * 90 * 4 * forward_flops(teacher))
