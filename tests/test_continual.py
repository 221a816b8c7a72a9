"""Continual learning: the head, the three terms, the loop, resumption, and what is refused."""

import numpy as np
import pytest
import torch

from dinv.continual import (
    ContinualSettings,
    extend,
    head_of,
    learn,
    loss_of_keeping,
    loss_on_new,
    loss_on_old,
    mixture,
    old_part,
    renumbered,
)
from dinv.datasets import Dataset
from dinv.models import Classifier

SETTINGS = ContinualSettings(updates=50, batch=12, rate=0.05, pad=1)
NEW = ("class5", "class6", "class7")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=30, seed=0):
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator(seed))


def new_data(count=30):
    return Dataset("new", "train", some_images(count, 7), 5 + torch.arange(count) % 3, NEW)


def extended(tiny):
    old = tiny().freeze()
    return old, extend(old, NEW, generator(1))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- the network ---------------------------------------------------------------------------------


def test_the_old_outputs_are_what_they_were(tiny, portrait):
    old = tiny().freeze()
    before = portrait(old)
    network = extend(old, NEW, generator())
    images = some_images() / 255
    logits = network(images)
    assert logits.shape == (30, 8) and network.classes == (*old.classes, *NEW)
    torch.testing.assert_close(logits[:, :5], old(images))
    assert portrait(old) == before and old.classes == tuple(f"class{i}" for i in range(5))
    rows = head_of(network)[1].weight
    assert 0.3 < (rows[5:].std() / rows[:5].std()).item() < 3
    assert torch.equal(extend(old, NEW, generator())(images), logits)


def test_the_old_part_of_an_extension_is_the_old_network(tiny):
    old, network = extended(tiny)
    part, images = old_part(network, 5), some_images() / 255
    assert part.classes == old.classes
    torch.testing.assert_close(part(images), old(images))


def test_what_cannot_be_extended(tiny):
    with pytest.raises(ValueError, match="new classes must be new, and at least one: got class2"):
        extend(tiny(), ["class2"], generator())
    with pytest.raises(ValueError, match="got none"):
        extend(tiny(), [], generator())
    flat = Classifier(torch.nn.Flatten(), (0.5,) * 3, (0.5,) * 3, 8, ["a", "b"], "flat")
    with pytest.raises(ValueError, match="flat cannot be extended: its last linear layer must give its 2"):
        extend(flat, ["c"], generator())


def test_labels_follow_the_names(tiny):
    _, network = extended(tiny)
    data = Dataset("x", "test", some_images(3), torch.tensor([0, 1, 1]), ("class7", "class2"))
    assert renumbered(data, network).labels.tolist() == [7, 2, 2]
    strange = Dataset("x", "test", some_images(1), torch.tensor([0]), ("horse",))
    with pytest.raises(ValueError, match="no output for class horse: extend it first"):
        renumbered(strange, network)


# ---- the terms -----------------------------------------------------------------------------------


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def test_the_terms_against_numpy():
    given, wanted = torch.randn(6, 8, generator=generator(1)), torch.randn(6, 5, generator=generator(2))
    labels = torch.tensor([5, 6, 7, 7, 6, 5])
    p, q, q_old, q_new = (
        softmax(x.double().numpy()) for x in (wanted, given, given[:, :5], given[:, 5:])
    )
    old = (p * np.log(p / q[:, :5])).sum(1).mean()  # the old network has no probability for the new
    keep = (p * np.log(p / q_old)).sum(1).mean()
    rows = np.arange(6)
    assert loss_on_old(given, wanted).item() == pytest.approx(old, rel=1e-5)
    assert loss_of_keeping(given, wanted).item() == pytest.approx(keep, rel=1e-5)
    assert loss_on_new(given, labels, 5).item() == pytest.approx(-np.log(q[rows, labels]).mean(), rel=1e-5)
    local = -np.log(q_new[rows, labels.numpy() - 5]).mean()
    assert loss_on_new(given, labels, 5, local=True).item() == pytest.approx(local, rel=1e-5)


def test_keeping_is_free_and_the_old_images_are_not_before_anything_is_learnt(tiny):
    old, network = extended(tiny)
    images = some_images() / 255
    assert loss_of_keeping(network(images), old(images)).item() == pytest.approx(0, abs=1e-6)
    given = network(images)
    new_share = given.softmax(1)[:, 5:].sum(1)  # what went to the new classes is missing from the old
    wanted = -(1 - new_share).log().mean()
    assert loss_on_old(given, old(images)).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_local_cross_entropy_leaves_the_old_outputs_alone():
    given = torch.randn(4, 8, requires_grad=True)
    loss_on_new(given, torch.tensor([5, 6, 7, 5]), 5, local=True).backward()
    assert not given.grad[:, :5].any() and given.grad[:, 5:].any()


# ---- learning ------------------------------------------------------------------------------------


def test_new_classes_are_learnt_and_the_old_network_stays(tiny, portrait):
    old, network = extended(tiny)
    before = portrait(old)
    history = learn(old, network, new_data(), SETTINGS, generator(), images=some_images())
    assert [record["update"] for record in history] == [20, 40, 50]
    assert set(history[0]) == {"update", "old", "new", "keep"}
    assert history[-1]["new"] < history[0]["new"] and not network.training
    assert portrait(old) == before


@pytest.mark.parametrize(
    "options, changes, names",
    [
        ({}, {"keep": 0.0}, {"new"}),  # fine-tuning
        ({}, {}, {"new", "keep"}),  # LwF.MC
        ({"images": some_images()}, {"features": 1.0}, {"old", "new", "keep", "features"}),
        ({"images": some_images()}, {"local": True}, {"old", "new", "keep", "head"}),
        ({"images": some_images(), "labels": torch.arange(30) % 5}, {"keep": 0.0}, {"new"}),
    ],
)
def test_every_row_is_the_same_loop_with_other_terms(tiny, options, changes, names):
    old, network = extended(tiny)
    settings = ContinualSettings(**{"updates": 3, "batch": 12, "pad": 1, **changes})
    (record,) = learn(old, network, new_data(), settings, generator(), **options)
    assert set(record) == {"update", *names} and all(value > 0 for value in record.values())


def test_every_class_has_the_same_share_of_a_batch(tiny, monkeypatch):
    old, network = extended(tiny)
    seen = []
    original = loss_on_old

    def counted(given, wanted):
        seen.append(len(given))
        return original(given, wanted)

    monkeypatch.setattr("dinv.continual.loss_on_old", counted)
    settings = ContinualSettings(updates=2, batch=16, pad=1)
    learn(old, network, new_data(), settings, generator(), images=some_images())
    assert seen == [10, 10]  # 16 images, 5 old classes of 8


@pytest.mark.parametrize("fail", [1, 2])
def test_an_interrupted_run_ends_in_the_same_bytes(tiny, memory, monkeypatch, fail):
    monkeypatch.setattr("dinv.store.Sparingly.share", float("inf"))

    def run(checkpoint):
        old, network = extended(tiny)
        history = learn(
            old, network, new_data(), SETTINGS, generator(), images=some_images(), checkpoint=checkpoint
        )
        return state(network), history

    whole, expected = run(memory())
    stopped = memory(fail=fail)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    stopped.fail = None
    found, history = run(stopped)
    assert equal(whole, found) and history == expected
    assert stopped.saves == 3  # it went on, and did not begin again


def test_what_is_refused(tiny):
    old, network = extended(tiny)
    data, images = new_data(), some_images()

    def attempt(message, *networks, new=data, **options):
        with pytest.raises(ValueError, match=message):
            learn(*(networks or (old, network)), new, SETTINGS, generator(), **options)

    attempt("does not extend tiny: see extend", old, tiny())
    wrong = Dataset("new", "train", some_images(2), torch.tensor([0, 5]), NEW)
    attempt("labels of new images must lie in 5 to 7", new=wrong)
    attempt("must be uint8, got torch.float32", images=images / 255)
    attempt("one for each", images=images, labels=torch.zeros(3))
    attempt("one for each", labels=torch.zeros(3))
    with pytest.raises(FloatingPointError, match="is not finite: lower rate"):
        hot = ContinualSettings(updates=40, batch=12, rate=1e30, pad=1)
        learn(old, network, data, hot, generator(), images=images)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"updates": 0}, "updates=0 of a continual learning must be positive"),
        ({"keep": -1.0}, "keep=-1.0 must be finite and not negative"),
        ({"schedule": "wild"}, "unknown schedule 'wild'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        ContinualSettings(**change)


def test_the_mixture_counts_what_strays(tiny):
    _, network = extended(tiny)
    images = some_images(40)
    answers = network(images / 255).argmax(1)
    old = Dataset("old", "test", images, answers.clamp(max=4), network.classes)
    new = Dataset("new", "test", images, torch.full((40,), 6), network.classes)
    found = mixture(network, old, new, 5)
    strayed = 100 * (answers >= 5).float().mean().item()
    assert found.old == pytest.approx(100 - strayed) and found.old_as_new == pytest.approx(strayed)
    assert found.new == pytest.approx(100 * (answers == 6).float().mean().item())
    assert found.new_as_old == pytest.approx(100 - strayed)
    assert found.mean == pytest.approx((found.old + found.new) / 2)
