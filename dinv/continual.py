"""Data-free continual learning: new classes join a network whose old training images are gone.

    network = extend(old, ["0", "1", ...])
    learn(old, network, new_images, images=pool.images)

Images inverted from the old network keep the old classes alive. Nothing here can reach a data set: the real
images of the new classes, and those of the old ones for an oracle, are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinv.checks import check_settings
from dinv.data import Dataset, augment
from dinv.data.dataset import sent
from dinv.files import NO_CHECKPOINT, NoCheckpoint
from dinv.models import Classifier, Unfit, inputs_of, to_float
from dinv.models.classifier import duplicate
from dinv.precision import autocast, choose, settled
from dinv.preflight import preflight, private
from dinv.training import GradientStep, Updates, UpdateSettings, predict, require_trainable

RECORD_EVERY = 20  # updates


@dataclass(frozen=True)
class ContinualSettings(UpdateSettings):
    """How new classes are learnt: with images of the old ones, each class has the same share of a batch.

    Attributes:
        alpha_new: weight of `distillation_on_new`, the third term; 0 leaves it out.
        local: what lies below the head learns from a cross-entropy among the new classes alone, so that it is
            not taught to tell photographs from synthesised images; only the head learns from that over all
            classes (Smith et al., Always Be Dreaming, ICCV 2021).
        alpha_features: weight of the squared distance between the features of old images in both networks,
            relative to the size of the old features; 0 leaves it out.
    """

    updates: int = 400
    batch_size: int = 128
    lr: float = 0.02
    alpha_new: float = 1.0
    local: bool = False
    alpha_features: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, ("updates",))


def classifier_head(network: Classifier) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the layer that gives the logits, linear or a 1x1 convolution; else a ValueError."""
    name = preflight(network).head
    if not name:
        reason = f"no linear layer or 1x1 convolution gives its {len(network.classes)} classes"
        raise ValueError(f"{network.name} cannot be extended: {reason}")
    return name, network.get_submodule(name)


@settled
def extend(network: Classifier, classes: Sequence[str], *, seed: int = 0) -> Classifier:
    """A copy of `network` with outputs for `classes` after its own; the old outputs are what they were.

    The new rows of the head are drawn as widely as the old ones are spread, their biases are zero.

    Raises:
        ValueError: classes that are there already; logits that do not come from one layer alone.
    """
    head, classes = classifier_head(network)[1], [classes] if isinstance(classes, str) else classes
    if not classes or len({*network.classes, *classes}) < len(network.classes) + len(classes):
        raise ValueError(f"new classes must be new, and at least one: got {', '.join(classes) or 'none'}")
    shape, generator = (len(classes), *head.weight.shape[1:]), torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator, dtype=torch.float32)
    weight = torch.cat([head.weight, head.weight.std() * rows.to(head.weight)])
    bias = None if head.bias is None else torch.cat([head.bias, head.bias.new_zeros(len(classes))])
    return _with_head(network, weight, bias, network.classes + tuple(classes))


def old_part(network: Classifier, count: int) -> Classifier:
    """A frozen copy of `network` with its first `count` outputs alone: its answers about the old classes."""
    head = classifier_head(network)[1]
    bias = None if head.bias is None else head.bias[:count]
    return _with_head(network, head.weight[:count], bias, network.classes[:count]).freeze()


def _with_head(model: Classifier, weight: Tensor, bias: Tensor | None, classes: Sequence[str]) -> Classifier:
    name, changed = classifier_head(model)[0], duplicate(model)
    head = changed.get_submodule(name)
    head.weight = nn.Parameter(weight.detach().clone(), head.weight.requires_grad)
    if bias is not None:
        head.bias = nn.Parameter(bias.detach().clone(), head.bias.requires_grad)
    width = "out_features" if isinstance(head, nn.Linear) else "out_channels"
    setattr(head, width, len(classes))
    changed.classes = tuple(classes)
    try:
        same = _same_answers(model, changed)
    except Unfit as error:
        same, reason = False, str(error)
    else:
        reason = "its outputs are more than those of that layer"
    if not same:
        raise ValueError(f"{model.name} cannot be extended by its layer {name}: {reason}")
    return changed


@torch.no_grad()
def _same_answers(one: Classifier, other: Classifier) -> bool:
    """Whether two networks with another number of outputs agree on those that both have."""
    images = torch.rand(2, *one.shape, generator=torch.Generator().manual_seed(0)).to(one.mean.device)
    count = min(len(one.classes), len(other.classes))
    pair = [predict(network, images)[:, :count].log_softmax(1) for network in (one, other)]
    return not bool(((pair[0] - pair[1]).abs() > 1e-3).any())


def renumbered(data: Dataset, network: Classifier) -> Dataset:
    """The same images with labels among the outputs of `network`, by the names of the classes."""
    missing = [name for name in data.classes if name not in network.classes]
    if missing:
        raise ValueError(f"{network.name} has no output for class {missing[0]}: extend it first")
    places = torch.tensor([network.classes.index(name) for name in data.classes], device=data.device)
    return Dataset(data.name, data.split, data.images, places[data.labels], network.classes)


def loss_on_old(logits: Tensor, old_logits: Tensor) -> Tensor:
    """KL( p_o || p_k ) on images of old classes, logits (N, K) and (N, K_o): to p_o, none of them is new."""
    log_p, log_q = old_logits.float().log_softmax(1), logits.float().log_softmax(1)
    return F.kl_div(log_q[:, : log_p.shape[1]], log_p, reduction="batchmean", log_target=True)


def loss_on_new(logits: Tensor, labels: Tensor, old_classes: int, local: bool = False) -> Tensor:
    """Cross-entropy of images of the new classes: over all outputs, or with `local` over the new alone."""
    if local:
        return F.cross_entropy(logits.float()[:, old_classes:], labels - old_classes)
    return F.cross_entropy(logits.float(), labels)


def distillation_on_new(logits: Tensor, old_logits: Tensor) -> Tensor:
    """KL( p_o || p_k restricted to the old classes ) on images of the new ones: old outputs stay."""
    log_p, log_q = old_logits.float().log_softmax(1), logits.float()[:, : old_logits.shape[1]].log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@settled
def learn(
    old: Classifier,
    network: Classifier,
    new: Dataset,
    settings: ContinualSettings | None = None,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    checkpoint: NoCheckpoint = NO_CHECKPOINT,
) -> list[dict[str, float]]:
    """Teach `network`, an extension of `old`, its new classes in place; returns a record every 20 updates.

    The loss is `loss_on_old` + `loss_on_new` + `alpha_new` * `distillation_on_new` (paper, section 4.5). The
    last update's weights are the result; at the end the network is in eval mode.

    Args:
        new: real images of the new classes, labels among the network's outputs (see `renumbered`).
        images: uint8 or float32 in [0, 1], of the old classes; without them the first term is left out
            (LwF.MC, and with `alpha_new=0` plain fine-tuning).
        labels: of `images`; with them one cross-entropy teaches old and new classes together: an oracle.

    Raises:
        ValueError: a network that does not extend `old`; labels of old classes among the new.
        FloatingPointError: the loss is not finite.
    """
    settings = settings or ContinualSettings()
    _require_fitting(old, network, new, images, labels)
    require_trainable(network)
    old, (_, head) = private(old).freeze(), classifier_head(network)
    old_head = classifier_head(old)[1]
    if settings.local and not isinstance(head, nn.Linear):
        raise ValueError(f"local=True needs logits of a linear layer, which {network.name} has not")
    network.requires_grad_(True)
    generator, device = torch.Generator().manual_seed(seed), network.mean.device
    precision = choose(settings.precision, device, network)
    share = round(settings.batch_size * len(old.classes) / len(network.classes))
    share = min(max(1, share), settings.batch_size - 1) if images is not None else 0  # one of either at least

    def draw(data: Tensor, targets: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
        chosen = sent(torch.randint(len(data), (count,), generator=generator), device)
        batch = to_float(augment(data[chosen], generator, pad=settings.pad, flip=settings.flip), device)
        return batch, targets[chosen] if targets is not None else None

    def weighted_terms(batch: Tensor, new_labels: Tensor, *old_labels: Tensor) -> dict[str, Tensor]:
        terms = {}
        with autocast(device, precision):
            with torch.no_grad(), inputs_of(old_head) as old_features:
                old_logits = old(batch)
            with inputs_of(head) as features:
                logits = network(batch)
        if old_labels:
            terms["new"] = F.cross_entropy(logits.float(), torch.cat([*old_labels, new_labels]))
        else:
            if share:
                terms["old"] = loss_on_old(logits[:share], old_logits[:share])
            terms["new"] = loss_on_new(logits[share:], new_labels, len(old.classes), settings.local)
        if settings.local:
            head_logits = head(features[0][share:].detach().float())
            terms["head"] = loss_on_new(head_logits, new_labels, len(old.classes))
        if settings.alpha_new:
            terms["keep"] = settings.alpha_new * distillation_on_new(logits[share:], old_logits[share:])
        if settings.alpha_features and share:
            one, other = (inputs[0].float()[:share] for inputs in (old_features, features))
            terms["features"] = settings.alpha_features * (one - other).square().mean() / one.square().mean()
        return terms

    names: list[str] = []  # of the terms: the same in every update

    def forward(*batch: Tensor) -> tuple[Tensor, ...]:
        terms = weighted_terms(*batch)
        names[:] = terms
        return sum(terms.values()), *terms.values()

    new = new.to(device)
    images, labels = (x if x is None else x.to(device) for x in (images, labels))
    step = GradientStep(forward, network)
    loop = Updates(network, settings, settings.updates, RECORD_EVERY, generator, checkpoint)
    for number in loop:
        last, values = min((number + 1) * RECORD_EVERY, settings.updates), []
        for _ in range(number * RECORD_EVERY, last):
            batch, new_labels = draw(new.images, new.labels, settings.batch_size - share)
            targets = [new_labels]
            if share:  # images of old classes come first
                old_batch, old_labels = draw(images, labels, share)
                batch = torch.cat([old_batch, batch])
                targets += [] if old_labels is None else [old_labels]
            _, *terms = step(batch.contiguous(memory_format=torch.channels_last), *targets)
            values.append(torch.stack(terms))
            loop.update()
        loop.record(update=last, **dict(zip(names, torch.stack(values).mean(0).tolist(), strict=True)))
    return loop.history


def _require_fitting(
    old: Classifier, network: Classifier, new: Dataset, images: Tensor | None, labels: Tensor | None
) -> None:
    preflight(old), preflight(network)
    count = len(old.classes)
    if network.classes[:count] != old.classes or len(network.classes) <= count:
        raise ValueError(f"{network.name} does not extend {old.name}: see extend()")
    if len(new) == 0 or int(new.labels.min()) < count or int(new.labels.max()) >= len(network.classes):
        outputs = f"{count} to {len(network.classes) - 1}, the new outputs"
        raise ValueError(f"labels of new images must lie in {outputs}: see renumbered()")
    old.check(new.images)
    if images is not None:
        old.check(images)
    if labels is not None and (images is None or len(labels) != len(images)):
        raise ValueError("labels are those of the images of the old classes, one for each")


@dataclass(frozen=True)
class JointAccuracy:
    """Percent right over all classes together, for images of the old classes and of the new ones.

    `old_as_new` and `new_as_old` are the images of one set that are taken for a class of the other.
    """

    old: float
    new: float
    old_as_new: float
    new_as_old: float

    @property
    def mean(self) -> float:
        """Over the two sets, as in the paper's Table 7."""
        return (self.old + self.new) / 2


def joint_accuracy(network: Classifier, old: Dataset, new: Dataset, boundary: int) -> JointAccuracy:
    """Test an extended network; labels of both sets are among its outputs, new from `boundary` up."""
    on_old, on_new = (predict(network, data.images).argmax(1).cpu() for data in (old, new))
    hits = (on_old == old.labels.cpu(), on_new == new.labels.cpu(), on_old >= boundary, on_new < boundary)
    return JointAccuracy(*(100 * hit.float().mean().item() for hit in hits))
