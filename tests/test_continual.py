"""Continual learning: the head, the three terms, the loop, resumption, and what is refused."""

import numpy as np
import pytest
import torch

from dinv import continual
from dinv.continual import ContinualSettings, extend, learn, loss_on_new, loss_on_old
from dinv.data import Dataset
from dinv.models import Classifier

SETTINGS = ContinualSettings(updates=50, batch_size=12, lr=0.05, pad=1)
NEW = ("class5", "class6", "class7")


def some_images(count=30, seed=0):
    return torch.randint(
        256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def new_data(count=30):
    return Dataset("new", "train", some_images(count, 7), 5 + torch.arange(count) % 3, NEW)


def extended(tiny):
    old = tiny().freeze()
    return old, extend(old, NEW, seed=1)


def test_the_old_outputs_are_what_they_were(tiny, portrait):
    old = tiny().freeze()
    before = portrait(old)
    network = extend(old, NEW)
    images = some_images() / 255
    logits = network(images)
    assert logits.shape == (30, 8) and network.classes == (*old.classes, *NEW)
    torch.testing.assert_close(logits[:, :5], old(images))
    assert portrait(old) == before and old.classes == tuple(f"class{i}" for i in range(5))
    rows = continual.classifier_head(network)[1].weight
    assert 0.3 < (rows[5:].std() / rows[:5].std()).item() < 3
    assert torch.equal(extend(old, NEW)(images), logits)
    assert not torch.equal(extend(old, NEW, seed=2)(images), logits)


def test_the_old_part_of_an_extension_is_the_old_network(tiny):
    old, network = extended(tiny)
    part, images = continual.old_part(network, 5), some_images() / 255
    assert part.classes == old.classes and not part.training
    torch.testing.assert_close(part(images), old(images))


def test_what_cannot_be_extended(tiny):
    with pytest.raises(ValueError, match="new classes must be new, and at least one: got class2"):
        extend(tiny(), ["class2"])
    with pytest.raises(ValueError, match="got none"):
        extend(tiny(), [])
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    flat = Classifier(pooled, (0.5,) * 3, (0.5,) * 3, 8, "abc", "flat")
    with pytest.raises(ValueError, match="flat cannot be extended: no linear layer or 1x1 .* gives its 3"):
        extend(flat, ["d"])


def test_labels_follow_the_names(tiny):
    _, network = extended(tiny)
    data = Dataset("x", "test", some_images(3), torch.tensor([0, 1, 1]), ("class7", "class2"))
    assert continual.renumbered(data, network).labels.tolist() == [7, 2, 2]
    strange = Dataset("x", "test", some_images(1), torch.tensor([0]), ("horse",))
    with pytest.raises(ValueError, match="no output for class horse: extend it first"):
        continual.renumbered(strange, network)


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def test_the_terms_against_numpy():
    logits, old_logits = torch.randn(6, 8), torch.randn(6, 5)
    labels = torch.tensor([5, 6, 7, 7, 6, 5])
    p, q, q_old, q_new = (
        softmax(x.double().numpy()) for x in (old_logits, logits, logits[:, :5], logits[:, 5:])
    )
    old = (p * np.log(p / q[:, :5])).sum(1).mean()  # the old network has no probability for the new
    keep = (p * np.log(p / q_old)).sum(1).mean()
    rows = np.arange(6)
    assert loss_on_old(logits, old_logits).item() == pytest.approx(old, rel=1e-5)
    assert continual.distillation_on_new(logits, old_logits).item() == pytest.approx(keep, rel=1e-5)
    assert loss_on_new(logits, labels, 5).item() == pytest.approx(-np.log(q[rows, labels]).mean(), rel=1e-5)
    local = -np.log(q_new[rows, labels.numpy() - 5]).mean()
    assert loss_on_new(logits, labels, 5, local=True).item() == pytest.approx(local, rel=1e-5)


def test_keeping_is_free_and_the_old_images_are_not_before_anything_is_learnt(tiny):
    old, network = extended(tiny)
    images = some_images() / 255
    assert continual.distillation_on_new(network(images), old(images)).item() == pytest.approx(0, abs=1e-6)
    logits = network(images)
    on_new = logits.softmax(1)[:, 5:].sum(1)  # what went to the new classes is missing from the old
    expected = -(1 - on_new).log().mean().item()
    assert loss_on_old(logits, old(images)).item() == pytest.approx(expected, rel=1e-4)


def test_a_local_cross_entropy_leaves_the_old_outputs_alone():
    logits = torch.randn(4, 8, requires_grad=True)
    loss_on_new(logits, torch.tensor([5, 6, 7, 5]), 5, local=True).backward()
    assert not logits.grad[:, :5].any() and logits.grad[:, 5:].any()


def test_new_classes_are_learnt_and_the_old_network_stays(tiny, portrait):
    old, network = extended(tiny)
    before = portrait(old)
    history = learn(old, network, new_data(), SETTINGS, images=some_images())
    assert [record["update"] for record in history] == [20, 40, 50]
    assert set(history[0]) == {"update", "old", "new", "keep"}
    assert history[-1]["new"] < history[0]["new"] and not network.training
    assert portrait(old) == before
    again = extended(tiny)[1]
    assert learn(old, again, new_data(), SETTINGS, images=some_images() / 255) == history  # floats as well


@pytest.mark.parametrize(
    "options, changes, names",
    [
        ({}, {"alpha_new": 0.0}, {"new"}),  # fine-tuning
        ({}, {}, {"new", "keep"}),  # LwF.MC
        ({"images": some_images()}, {"alpha_features": 1.0}, {"old", "new", "keep", "features"}),
        ({"images": some_images()}, {"local": True}, {"old", "new", "keep", "head"}),
        ({"images": some_images(), "labels": torch.arange(30) % 5}, {"alpha_new": 0.0}, {"new"}),
    ],
)
def test_every_row_is_the_same_loop_with_other_terms(tiny, options, changes, names):
    old, network = extended(tiny)
    settings = ContinualSettings(**{"updates": 3, "batch_size": 12, "pad": 1, **changes})
    (record,) = learn(old, network, new_data(), settings, **options)
    assert set(record) == {"update", *names} and all(value > 0 for value in record.values())


def test_every_class_has_the_same_share_of_a_batch(tiny, monkeypatch):
    old, network = extended(tiny)
    counts = []

    def counted(logits, old_logits):
        counts.append(len(logits))
        return loss_on_old(logits, old_logits)

    monkeypatch.setattr(continual, "loss_on_old", counted)
    settings = ContinualSettings(updates=2, batch_size=16, pad=1)
    learn(old, network, new_data(), settings, images=some_images())
    assert counts == [10, 10]  # 16 images, 5 old classes of 8


@pytest.mark.parametrize("fail", [1, 2])
def test_an_interrupted_run_ends_in_the_same_bytes(tiny, memory, fail):
    def run(checkpoint):
        old, network = extended(tiny)
        history = learn(old, network, new_data(), SETTINGS, images=some_images(), checkpoint=checkpoint)
        return network.state_dict(), history

    whole, expected = run(memory())
    stopped = memory(fail=fail)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    stopped.fail = None
    resumed, history = run(stopped)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and history == expected
    assert stopped.saves == 3  # it went on, and did not begin again


def test_what_is_refused(tiny):
    old, network = extended(tiny)
    data, images = new_data(), some_images()

    def attempt(message, *networks, new=data, **options):
        with pytest.raises(ValueError, match=message):
            learn(*(networks or (old, network)), new, SETTINGS, **options)

    attempt("does not extend tiny: see extend", old, tiny())
    wrong = Dataset("new", "train", some_images(2), torch.tensor([0, 5]), NEW)
    attempt("labels of new images must lie in 5 to 7", new=wrong)
    attempt("one for each", images=images, labels=torch.zeros(3))
    attempt("one for each", labels=torch.zeros(3))
    with pytest.raises(FloatingPointError, match="is not finite: lower lr"):
        hot = ContinualSettings(updates=40, batch_size=12, lr=1e30, pad=1)
        learn(old, network, data, hot, images=images)


def test_bad_settings():
    with pytest.raises(ValueError, match="updates=0 must be positive"):
        ContinualSettings(updates=0)
    with pytest.raises(ValueError, match="alpha_new=-1.0 must be at least 0"):
        ContinualSettings(alpha_new=-1.0)
    with pytest.raises(ValueError, match="unknown schedule 'wild'"):
        ContinualSettings(schedule="wild")


def test_joint_accuracy_counts_images_taken_for_the_other_set(tiny):
    _, network = extended(tiny)
    images = some_images(40)
    predictions = network(images / 255).argmax(1)
    old = Dataset("old", "test", images, predictions.clamp(max=4), network.classes)
    new = Dataset("new", "test", images, torch.full((40,), 6), network.classes)
    result = continual.joint_accuracy(network, old, new, 5)
    as_new = 100 * (predictions >= 5).float().mean().item()
    assert result.old == pytest.approx(100 - as_new) and result.old_as_new == pytest.approx(as_new)
    assert result.new == pytest.approx(100 * (predictions == 6).float().mean().item())
    assert result.new_as_old == pytest.approx(100 - as_new)
    assert result.mean == pytest.approx((result.old + result.new) / 2)
