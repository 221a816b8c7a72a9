"""Forty architectures that others wrote: each is inverted, pruned and extended, or refused in a sentence.

The whole table: pytest -m slow -s tests/test_forty_architectures.py
"""

import traceback
from pathlib import Path

import pytest
import torch

import dinv
from dinv.inversion import InversionSettings
from dinv.models import Classifier
from dinv.pruning import PruningSettings

PACKAGE, SIZE = Path(dinv.__file__).parent, 64
TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5
squeezenet1_1 swin_t vgg11_bn vit_b_32
"""
TIMM = """
cspresnet50 convnextv2_atto deit_tiny_distilled_patch16_224 dla34 dpn48b ghostnet_050 hrnet_w18_small
levit_128s mixer_s32_224 mobileone_s0 mobilevit_xxs nf_resnet26 poolformer_s12 regnetz_005 repvgg_a0
res2net50_14w_8s skresnet18 tinynet_e xcit_nano_12_p16_224 resnest14d
"""
SIZES = {"torchvision:inception_v3": 96, "torchvision:maxvit_t": 224}  # the smallest that they take
NAMES = [f"torchvision:{name}" for name in TORCHVISION.split()] + [f"timm:{name}" for name in TIMM.split()]
FEW = ["torchvision:" + name for name in ("mobilenet_v3_small", "regnet_x_400mf", "squeezenet1_1")]
FEW += ["timm:" + name for name in ("tinynet_e", "ghostnet_050", "mixer_s32_224")]


def network(name: str) -> Classifier:
    """Ten classes, random weights, 64 px where the network can do with so few."""
    source, _, bare = name.partition(":")
    size = SIZES.get(name, SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if source == "timm":
            timm = pytest.importorskip("timm")
            try:
                net = timm.create_model(bare, num_classes=10, img_size=size)
            except TypeError:  # a network of any size
                net = timm.create_model(bare, num_classes=10)
        else:
            from torchvision import models

            options = {"image_size": size} if bare.startswith("vit") else {}
            if bare in ("googlenet", "inception_v3"):
                options = {"init_weights": False, "aux_logits": True}
            net = models.get_model(bare, num_classes=10, **options)
    return Classifier(net, (0.5,) * 3, (0.25,) * 3, size, [str(k) for k in range(10)], name).freeze()


def inverted(model: Classifier, images: torch.Tensor) -> str:
    try:
        statistics = dinv.batchnorm_statistics(model)
    except dinv.NoBatchNorm:
        statistics = dinv.measure_statistics(model, images)
    objective = dinv.CrossEntropy() + 0.01 * dinv.FeatureStatistics("kl", statistics=statistics)
    settings = InversionSettings(steps=1, compile="never")
    result = dinv.invert(model, torch.tensor([1, 2]), objective, settings)
    assert result.images.shape == images.shape and result.images.isfinite().all()
    return f"{len(statistics.layers)} layers"


def pruned(model: Classifier, images: torch.Tensor) -> str:
    result = dinv.prune(model, images, filters=0.1, settings=PruningSettings(step=0.1))
    assert 0.85 < result.history[-1]["filters"] <= 0.9 and result.network(images).shape == (2, 10)
    return f"{100 * result.history[-1]['filters']:.1f} %"


def extended(model: Classifier, images: torch.Tensor) -> str:
    larger = dinv.extend(model, ["new"]).eval()
    torch.testing.assert_close(larger(images)[:, :10], model(images), atol=1e-4, rtol=1e-4)
    return f"{larger(images).shape[1]} classes"


def outcome(action, name: str) -> str:
    """What came of it: "11 classes" or "refused: ..."; "FAILED: ..." if the error is not this package's."""
    model, images = network(name), torch.rand(2, 3, SIZES.get(name, SIZE), SIZES.get(name, SIZE))
    try:
        return action(model, images)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        own = isinstance(error, ValueError) and PACKAGE in Path(last.filename).parents
        return f"{'refused' if own else 'FAILED'}: {type(error).__name__}: {' '.join(str(error).split())}"


def table(names) -> dict[str, dict[str, str]]:
    """Network -> what came of each action; printed line by line."""
    rows = {}
    for name in names:
        rows[name] = {act.__name__: outcome(act, name) for act in (inverted, pruned, extended)}
        print(f"{name:38}", *(f"{text:.60}" for text in rows[name].values()), sep=" | ", flush=True)
    return rows


def failures(rows) -> list[str]:
    return [f"{name}: {text}" for name, row in rows.items() for text in row.values() if text[:6] == "FAILED"]


def test_six_architectures():
    rows = table(FEW)
    assert not failures(rows)
    assert [name for name, row in rows.items() if row["pruned"].startswith("refused")] == FEW[-1:]


@pytest.mark.slow
def test_forty_architectures():
    assert len(NAMES) == 40
    rows = table(NAMES)
    refused = {name: row["pruned"] for name, row in rows.items() if row["pruned"].startswith("refused")}
    assert not failures(rows)
    assert all("cannot be pruned: " in text for text in refused.values()) and len(refused) <= 16
