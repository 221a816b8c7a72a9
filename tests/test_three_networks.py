"""Three networks that others wrote, from training to pictures: test -m slow -s tests/test_three_networks.py

A quarter of an hour on two cores with CIFAR-10 at hand. The pictures are in the folder that the test prints.
"""

import pytest
import torch
from torch import nn

from dinv import (
    Classifier,
    CrossEntropy,
    FeatureStatistics,
    InversionSettings,
    TotalVariation,
    TrainingSettings,
    balanced_labels,
    invert,
    load_dataset,
    prune,
    train,
)
from dinv.data import Dataset
from dinv.figures import image_grids
from dinv.metrics import accuracy, feature_distances, topk_accuracy
from dinv.models import load_model, resized

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


class LeNet(nn.Module):
    """As in a course: convolutions, pooling, `view`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 5), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 48, 5), nn.BatchNorm2d(48)
        self.fc1, self.fc2 = nn.Linear(48 * 5 * 5, 120), nn.Linear(120, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        x = nn.functional.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        return self.fc2(self.fc1(x.view(x.size(0), -1)).relu())


def regnet(classes):
    timm = pytest.importorskip("timm")
    net = timm.create_model("regnetx_002", num_classes=10)
    return Classifier.wrap(net, size=64, classes=classes)


def densenet(classes):
    from torchvision.models import DenseNet

    net = DenseNet(12, (4, 4, 4), 24, num_classes=10)
    return Classifier(net, MEAN, STD, 32, classes)


def lenet(classes):
    return Classifier(LeNet(), MEAN, STD, 32, classes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("make, tv, term", [
    (lenet, 0.03, 0.3 * FeatureStatistics()),  # "kl" of two layers leaves images flat
    (densenet, 0.01, FeatureStatistics("kl")), (regnet, 0.01, FeatureStatistics("kl")),
])  # fmt: skip
def test_three_networks(make, tv, term, tmp_path):
    real, verifier = load_dataset("cifar10", "train").take(slice(0, 10_000)), load_model("vgg_small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = make(real.classes)
    images, labels = resized(real.images, teacher.size), balanced_labels(40, 10)
    data = Dataset(real.name, real.split, images, real.labels, real.classes)
    train(teacher, data, TrainingSettings(epochs=8, batch_size=128, lr=0.05, pad=teacher.shape[1] // 8))
    teacher.freeze()
    descent = {"octaves": 5 if teacher.size == 64 else 4, "chroma_lr": 0.3, "betas": (0.5, 0.9)}
    settings = InversionSettings(steps=400, lr=0.2, schedule="cosine", **descent)
    prior, scores, made, far = CrossEntropy() + tv * TotalVariation(), {}, {}, {}
    for name, objective in {"without": prior, "with statistics": prior + term}.items():
        made[name] = invert(teacher, labels, objective, settings).images
        scores[name] = topk_accuracy(verifier, made[name], labels, k=1)
        far[name] = feature_distances(teacher, made[name], len(labels), "kl").sum()
        assert accuracy(teacher, made[name], labels) >= 90
    figure = image_grids({name: images[:20] for name, images in made.items()}, 5)
    figure.savefig(tmp_path / f"{make.__name__}.png", dpi=150)
    smaller = prune(teacher, made["with statistics"], filters=0.1).network
    learnt = accuracy(teacher, images[:2000], real.labels[:2000])
    print(f"\n{make.__name__} knows {learnt:.0f} % of its training images, a verifier {scores}: {tmp_path}")
    assert far["with statistics"] < 0.5 * far["without"]
    assert scores["with statistics"] >= 30  # chance is 10, and 40 images scatter by 8 points
    assert smaller(made["without"][:2]).shape == (2, 10)
