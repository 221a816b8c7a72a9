"""Data-free continual learning: new classes join a network whose old training images are gone.

    network = extend(old, ["0", "1", ...], generator)
    learn(old, network, new_images, settings, generator, images=pool.images)

Old classes are kept alive by images inverted from the old network. Nothing here can reach a data set: the
real images of the new classes, and those of the old ones where a row is an oracle, are handed in.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinv.datasets import Dataset, augment
from dinv.models import Classifier, autocast, inputs_of, to_float
from dinv.store import Sparingly
from dinv.training import SCHEDULES, learning_rate, optimizer_for, predict, restore, snapshot

VERSION = 1  # part of an extended network's key: raise it when the same settings give other weights
EVERY = 20  # updates between two records


@dataclass(frozen=True)
class ContinualSettings:
    """How new classes are learnt.

    Attributes:
        updates: of SGD with Nesterov momentum 0.9.
        batch: images an update; where there are old images, each class has the same share of it.
        rate, warmup, schedule, decay: as in `training.TrainingSettings`.
        keep: weight of the agreement on the old outputs for the new images (third term; 0 leaves it out).
        local: what lies below the head learns from a cross-entropy among the new classes alone, so that it is
            not taught to tell photographs from synthesised images; only the head learns from that over all
            classes (Smith et al., Always Be Dreaming, ICCV 2021).
        features: weight of the squared distance between the features of old images in both networks,
            relative to the old features' own size; 0 leaves it out.
        pad, flip: random crops and mirror images.
    """

    updates: int = 400
    batch: int = 128
    rate: float = 0.02
    warmup: float = 0.15
    schedule: str = "linear"
    decay: float = 5e-4
    keep: float = 1.0
    local: bool = False
    features: float = 0.0
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} of a continual learning must be positive")
        for name in ("keep", "features"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: choose {', '.join(SCHEDULES)}")


# ---- the network -----------------------------------------------------------------------------------


def head_of(network: Classifier) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer that gives the logits.

    Raises:
        ValueError: the network does not end in one.
    """
    linear = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear or linear[-1][1].out_features != len(network.classes):
        raise ValueError(
            f"{network.name} cannot be extended: its last linear layer must give its "
            f"{len(network.classes)} classes"
        )
    return linear[-1]


def extend(network: Classifier, classes: Sequence[str], generator: torch.Generator) -> Classifier:
    """A copy of `network` with outputs for `classes` after its own; the old outputs are what they were.

    The new rows of the head are drawn as widely as the old ones are spread, their biases are zero.

    Raises:
        ValueError: no class, one that is there already, or a network without a linear head.
    """
    twice = set(network.classes) & set(classes)
    if not classes or twice or len(set(classes)) < len(classes):
        raise ValueError(f"new classes must be new, and at least one: got {', '.join(classes) or 'none'}")
    _, old = head_of(network)
    drawn = torch.randn(len(classes), old.in_features, generator=generator).to(old.weight.device)
    with torch.no_grad():
        weight = torch.cat([old.weight, old.weight.std() * drawn])
        bias = torch.cat([old.bias, old.bias.new_zeros(len(classes))]) if old.bias is not None else None
    return _with_head(network, weight, bias, network.classes + tuple(classes))


def old_part(network: Classifier, count: int) -> Classifier:
    """A frozen copy of `network` with its first `count` outputs: what it still says of the old classes."""
    _, head = head_of(network)
    bias = head.bias[:count] if head.bias is not None else None
    return _with_head(network, head.weight[:count], bias, network.classes[:count]).freeze()


def _with_head(
    network: Classifier, weight: Tensor, bias: Tensor | None, classes: tuple[str, ...]
) -> Classifier:
    changed = copy.deepcopy(network)
    name, old = head_of(changed)
    head = nn.Linear(old.in_features, len(classes), bias=bias is not None, device=weight.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    parent, _, last = name.rpartition(".")
    setattr(changed.get_submodule(parent), last, head)
    changed.classes = classes
    return changed


def renumbered(data: Dataset, network: Classifier) -> Dataset:
    """The same images with labels among the outputs of `network`, by the names of the classes.

    Raises:
        ValueError: a class that the network does not have.
    """
    missing = [name for name in data.classes if name not in network.classes]
    if missing:
        raise ValueError(f"{network.name} has no output for class {missing[0]}: extend it first")
    places = torch.tensor([network.classes.index(name) for name in data.classes], device=data.device)
    return Dataset(data.name, data.split, data.images, places[data.labels], network.classes)


# ---- the loss --------------------------------------------------------------------------------------


def loss_on_old(network: Tensor, old: Tensor) -> Tensor:
    """KL( p_o || p_k ) on images of the old classes; p_o says that none of them is new.

    Args:
        network: logits (N, K) of the extended network, the old classes first.
        old: logits (N, K_o) of the old one.
    """
    log_p, log_q = old.float().log_softmax(1), network.float().log_softmax(1)[:, : old.shape[1]]
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def loss_on_new(network: Tensor, labels: Tensor, old_classes: int, local: bool = False) -> Tensor:
    """Cross-entropy of images of the new classes: over all outputs, or with `local` over the new alone."""
    if local:
        return F.cross_entropy(network.float()[:, old_classes:], labels - old_classes)
    return F.cross_entropy(network.float(), labels)


def loss_of_keeping(network: Tensor, old: Tensor) -> Tensor:
    """KL( p_o || p_k given an old class ) on images of the new classes: their old outputs stay."""
    log_p, log_q = old.float().log_softmax(1), network.float()[:, : old.shape[1]].log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


# ---- learning --------------------------------------------------------------------------------------


def learn(
    old: Classifier,
    network: Classifier,
    new: Dataset,
    settings: ContinualSettings,
    generator: torch.Generator,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    checkpoint: Any = None,
) -> list[dict[str, float]]:
    """Teach `network`, an extension of `old`, its new classes in place; returns one record every 20 updates.

    The sum of `loss_on_old`, `loss_on_new` and `keep` times `loss_of_keeping` (paper, section 4.5). The last
    update's weights are the result; at the end the network is in eval mode.

    Args:
        new: real images of the new classes, labels among the network's outputs (see `renumbered`).
        images: uint8, of the old classes; without them that term is left out (LwF.MC, and with `keep=0`
            plain fine-tuning).
        labels: of `images`; with them the old classes are learnt together with the new ones by one
            cross-entropy: an oracle.
        checkpoint: a `runs.Checkpoint`; with it, a killed run goes on to the same bytes.

    Raises:
        ValueError: a network that does not extend `old`; labels of old classes among the new.
        FloatingPointError: the loss is not finite.
    """
    _require_fitting(old, network, new, images, labels)
    old = copy.deepcopy(old).freeze().to(memory_format=torch.channels_last)
    network.requires_grad_(True).train().to(memory_format=torch.channels_last)
    optimizer, history, save = optimizer_for(network, settings), [], Sparingly(checkpoint)
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        tensors, meta = saved
        restore(network, optimizer, generator, tensors)
        history = meta["history"]
    device, share = network.mean.device, 0
    if images is not None:
        share = round(settings.batch * len(old.classes) / len(network.classes))
    for first in range(len(history) * EVERY, settings.updates, EVERY):
        last, seen = min(first + EVERY, settings.updates), []
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, settings.updates)
            picked = torch.randint(len(new), (settings.batch - share,), generator=generator).to(new.device)
            batch, answers = [_prepared(new.images[picked], settings, generator, device)], None
            if share:
                chosen = torch.randint(len(images), (share,), generator=generator).to(images.device)
                batch.insert(0, _prepared(images[chosen], settings, generator, device))
                answers = labels[chosen.to(labels.device)].to(device) if labels is not None else None
            batch = torch.cat(batch).contiguous(memory_format=torch.channels_last)
            terms = _terms(old, network, batch, share, answers, new.labels[picked].to(device), settings)
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            optimizer.step()
            seen.append({name: term.detach() for name, term in terms.items()})
        record = {name: torch.stack([terms[name] for terms in seen]).mean().item() for name in seen[0]}
        if not sum(record.values()) < float("inf"):
            raise FloatingPointError(
                f"the loss before update {last} is not finite: lower rate={settings.rate}"
            )
        history.append({"update": last} | record)
        if checkpoint is not None:
            checkpoint.progress(last, settings.updates, **record)
        save(lambda: (snapshot(network, optimizer, generator), {"history": history}))
    network.eval()
    return history


def _terms(
    old: Classifier,
    network: Classifier,
    batch: Tensor,
    share: int,
    old_answers: Tensor | None,
    answers: Tensor,
    settings: ContinualSettings,
) -> dict[str, Tensor]:
    """The weighted terms of the loss on one batch, whose first `share` images are of old classes."""
    compare = settings.features > 0 and share > 0
    heads = [head_of(model)[1] for model in (old, network)]
    with autocast(batch.device):
        with torch.no_grad(), inputs_of(heads[0]) as before:
            wanted = old(batch)
        with inputs_of(heads[1]) as after:
            given = network(batch)
    terms = {}
    if old_answers is not None:
        terms["new"] = F.cross_entropy(given.float(), torch.cat([old_answers, answers]))
    else:
        if share:
            terms["old"] = loss_on_old(given[:share], wanted[:share])
        terms["new"] = loss_on_new(given[share:], answers, len(old.classes), settings.local)
    if settings.local:
        said = heads[1](after[0][share:].detach().float())
        terms["head"] = loss_on_new(said, answers, len(old.classes))
    if settings.keep:
        terms["keep"] = settings.keep * loss_of_keeping(given[share:], wanted[share:])
    if compare:
        one, other = (seen[0].float()[:share] for seen in (before, after))
        terms["features"] = settings.features * (one - other).square().mean() / one.square().mean()
    return terms


def _prepared(
    images: Tensor, settings: ContinualSettings, generator: torch.Generator, device: torch.device
) -> Tensor:
    return to_float(augment(images.to(device), generator, pad=settings.pad, flip=settings.flip), device)


def _require_fitting(
    old: Classifier, network: Classifier, new: Dataset, images: Tensor | None, labels: Tensor | None
) -> None:
    count = len(old.classes)
    if network.classes[:count] != old.classes or len(network.classes) <= count:
        raise ValueError(f"{network.name} does not extend {old.name}: see extend()")
    if len(new) == 0 or int(new.labels.min()) < count or int(new.labels.max()) >= len(network.classes):
        raise ValueError(
            f"labels of new images must lie in {count} to {len(network.classes) - 1}, the new outputs: "
            "see renumbered()"
        )
    old.check(new.images)
    if images is not None:
        old.check(images)
        if images.dtype != torch.uint8:
            raise ValueError(f"images of the old classes must be uint8, got {images.dtype}")
    if labels is not None and (images is None or len(labels) != len(images)):
        raise ValueError("labels are those of the images of the old classes, one for each")


# ---- how well it went ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Accuracies over all classes together, in percent, on the images of the old and of the new ones.

    Attributes:
        old, new: accuracy on either set; no image is told which set it is from.
        old_as_new, new_as_old: images of one set that are taken for a class of the other.
    """

    old: float
    new: float
    old_as_new: float
    new_as_old: float

    @property
    def mean(self) -> float:
        """Over the two sets, as in the paper's Table 7."""
        return (self.old + self.new) / 2


def mixture(network: Classifier, old: Dataset, new: Dataset, boundary: int) -> Mixture:
    """How an extended network does; labels of both sets are among its outputs, new from `boundary` up."""
    answers = [predict(network, data.images).argmax(1).cpu() for data in (old, new)]
    right = [
        100 * (answer == data.labels.cpu()).float().mean().item()
        for answer, data in zip(answers, (old, new), strict=True)
    ]
    strayed = [100 * share.float().mean().item() for share in (answers[0] >= boundary, answers[1] < boundary)]
    return Mixture(*right, *strayed)
