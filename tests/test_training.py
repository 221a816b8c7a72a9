"""Training: resumed at the next epoch to the same bytes; schedule, decay, accuracy as they should be."""

import math

import numpy as np
import pytest
import torch

from dinv import store, training
from dinv.datasets import Dataset, load_dataset
from dinv.models import create_model
from dinv.profiles import load_profile
from dinv.runs import Result, Run
from dinv.training import (
    TrainingSettings,
    accuracy,
    epoch_batches,
    learning_rate,
    optimizer_for,
    predict,
    train,
)

SETTINGS = TrainingSettings(epochs=4, batch=64, rate=0.1, pad=1, flip=False, small_epochs=1, smoothing=0.1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_data(n=256) -> Dataset:
    """Noise, brighter for higher labels."""
    labels = torch.randint(10, (n,), generator=generator())
    images = torch.rand(n, 1, 8, 8, generator=generator()) * 100 + 15 * labels.view(-1, 1, 1, 1)
    return Dataset("noise", "train", images.to(torch.uint8), labels, tuple("0123456789"))


@pytest.fixture(scope="module")
def data():
    return some_data()


def fresh(seed=1):
    return create_model("resnet_digits", "digits", seed=seed)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- training ------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_last_epoch_is_kept():
    model, data = fresh(), load_dataset("digits", "train")
    before = accuracy(model, data.images, data.labels)
    settings = TrainingSettings(epochs=3, batch=64, rate=0.1, pad=1, flip=False)
    history = train(model, data, settings, generator())
    assert [record["epoch"] for record in history] == [1, 2, 3]
    losses = [record["loss"] for record in history]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] < 2.5  # about log 10 at first
    assert not model.training
    assert accuracy(model, data.images, data.labels) > max(80, before + 40)
    assert history[2]["accuracy"] > history[0]["accuracy"]


def test_equal_seeds_equal_bytes(data):
    def trained(seed):
        model = fresh()
        return train(model, data, SETTINGS, generator(seed)), state_of(model)

    history, state = trained(3)
    torch.manual_seed(1)  # of no account
    again, same = trained(3)
    assert history == again and equal(state, same)
    assert not equal(state, trained(4)[1])


def test_recorded_loss_and_accuracy_are_means_over_the_epochs_images(data):
    """With a rate of next to nothing the network stays, and both can be reckoned directly."""
    settings = TrainingSettings(epochs=1, batch=64, rate=1e-12, pad=0, flip=False)
    model = fresh()
    with torch.no_grad():
        model.train()  # statistics of each batch
        draws = epoch_batches(data, settings, generator(), small=False)
        parts = [(model(images), labels) for images, labels in draws]
    model = fresh()
    (record,) = train(model, data, settings, generator())
    losses = [torch.nn.functional.cross_entropy(logits, labels).item() for logits, labels in parts]
    hits = sum((logits.argmax(1) == labels).sum().item() for logits, labels in parts)
    assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert record["accuracy"] == pytest.approx(100 * hits / 256)


def test_batches_of_an_epoch(data):
    batches = list(epoch_batches(data.take(range(200)), SETTINGS, generator(), small=False))
    assert [images.shape for images, _ in batches] == [(64, 1, 8, 8)] * 3  # the rest is left out
    for images, labels in batches:
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        assert labels.dtype == torch.int64
    small = next(iter(epoch_batches(data, SETTINGS, generator(), small=True)))[0]
    assert small.shape == (64, 1, 6, 6)
    plain = TrainingSettings(batch=256, pad=0, flip=False)
    ((images, labels),) = epoch_batches(data, plain, generator(), small=False)
    order = labels.argsort(stable=True)
    mine = sorted(map(tuple, images.mul(255).round().flatten(1).tolist()))
    assert mine == sorted(map(tuple, data.images.float().flatten(1).tolist()))  # each image once
    assert torch.equal(labels[order], data.labels.sort().values)
    assert not torch.equal(labels, data.labels)  # shuffled


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", [1, 3, 4])
def test_a_training_goes_on_at_its_next_epoch_to_the_same_bytes(data, memory, fail):
    whole = fresh()
    expected = train(whole, data, SETTINGS, generator(2))
    checkpoint = memory(fail)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), data, SETTINGS, generator(2), checkpoint)
    assert checkpoint.told == [(epoch, 4) for epoch in range(1, fail + 1)]
    checkpoint.told.clear()
    # the weights, and what the seed made of the generator, come from the checkpoint alone
    resumed = fresh(seed=99)
    history = train(resumed, data, SETTINGS, generator(98), checkpoint)
    assert checkpoint.told == [(epoch, 4) for epoch in range(fail + 1, 5)]
    assert history == expected
    assert equal(state_of(resumed), state_of(whole)) and not resumed.training


def stage() -> Result:
    """A training as a stage: four epochs of four batches."""

    def make(checkpoint):
        model = fresh()
        history = train(model, some_data(), SETTINGS, generator(2), checkpoint)
        return model.state_dict(), {"history": history}

    return Run("02_example", load_profile("smoke")).stage("network", "x", {}, make)


@pytest.mark.parametrize(
    "number, first", [(0, 2), (1, 2), (2, 5)], ids=["in an epoch", "in a write", "before the last write"]
)
def test_a_training_killed_by_sigkill_goes_on_to_the_same_bytes(
    killed, apart, monkeypatch, number, first
):
    whole = stage()
    monkeypatch.setenv("DINV_CACHE", str(killed["training"][number]))
    batches, original = [], training.augment

    def counted(*given, **options):
        batches.append(1)
        return original(*given, **options)

    monkeypatch.setattr(training, "augment", counted)
    resumed = stage()
    assert not resumed.cached and len(batches) == 4 * (5 - first)
    assert resumed.key == whole.key == store.sha256_file(resumed.path / "data.safetensors")
    assert resumed.meta == whole.meta and equal(resumed.tensors, whole.tensors)


# ---- optimiser -----------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    settings = TrainingSettings(rate=0.4, warmup=0.25)
    rates = [learning_rate(settings, step, 40) for step in range(41)]
    assert rates[:10] == pytest.approx([0.04 * step for step in range(1, 11)])
    assert rates[10:] == pytest.approx([0.4 * (40 - step) / 30 for step in range(10, 41)])
    assert max(rates) == pytest.approx(0.4) and rates[-1] == 0
    for warmup, steps in ((0.0, 7), (1.0, 7), (0.5, 1)):
        other = [learning_rate(TrainingSettings(rate=0.4, warmup=warmup), s, steps) for s in range(steps)]
        assert all(0 < rate <= 0.4 for rate in other)


def test_every_update_has_its_rate(data, monkeypatch):
    used, original = [], training.optimizer_for

    def watched(*given):
        optimizer = original(*given)
        optimizer.register_step_pre_hook(lambda o, *_: used.append([g["lr"] for g in o.param_groups]))
        return optimizer

    monkeypatch.setattr(training, "optimizer_for", watched)
    train(fresh(), data, SETTINGS, generator())
    assert used == [2 * [learning_rate(SETTINGS, step, 16)] for step in range(16)]


def test_weights_decay_and_biases_and_batchnorm_do_not(tiny):
    model = tiny()
    before = state_of(model)
    optimizer = optimizer_for(model, TrainingSettings(rate=0.5, decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"net.0.weight", "net.3.weight", "net.8.weight"}
    for name in changed:  # Nesterov: the decay counts with momentum, 1 + 0.9
        torch.testing.assert_close(model.state_dict()[name], before[name] * (1 - 0.5 * 0.1 * 1.9))


def test_every_parameter_is_trained_once(tiny):
    model = tiny()
    groups = optimizer_for(model, TrainingSettings()).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


# ---- bad input -----------------------------------------------------------------------------------


def test_a_batch_larger_than_the_dataset(data):
    with pytest.raises(ValueError, match="batch 512 is larger than the 256 images"):
        train(fresh(), data, TrainingSettings(batch=512), generator())


@pytest.mark.parametrize("given", [{"epochs": 0}, {"batch": 0}, {"rate": -0.1}, {"rate": math.nan}], ids=str)
def test_settings_that_are_none(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"{name}={value}.* must be positive"):
        TrainingSettings(**given)


def test_a_loss_that_is_not_finite(data, memory):
    model, checkpoint = fresh(), memory()
    settings = TrainingSettings(epochs=3, batch=64, rate=1e20, pad=1, flip=False)
    with pytest.raises(FloatingPointError, match=r"loss of epoch 1 is not finite: lower rate=1e\+20"):
        train(model, data, settings, generator(), checkpoint)
    assert checkpoint.saved is None


# ---- evaluation ----------------------------------------------------------------------------------


def byte_images(n=23):
    return torch.randint(256, (n, 3, 8, 8), generator=generator(), dtype=torch.uint8)


def test_predictions_are_the_networks_logits_in_eval_mode(tiny, portrait):
    model, images = tiny().train(), byte_images()
    model.net[4].eval()  # one layer frozen
    before = portrait(model)
    found = predict(model, images, batch=5)
    assert portrait(model) == before
    assert found.shape == (23, 5) and found.dtype == torch.float32 and not found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(found, tiny()(images.float() / 255))


def test_uint8_and_float_images_and_any_batch_agree(tiny):
    model, images = tiny(), byte_images()
    whole = predict(model, images)
    assert torch.equal(whole, predict(model, images.float() / 255))
    for batch in (1, 7, 23):
        torch.testing.assert_close(predict(model, images, batch), whole)


def test_the_networks_mode_comes_back_also_after_an_exception(tiny):
    model = tiny().train()
    model.net[0] = torch.nn.Conv2d(4, 4, 3)
    with pytest.raises(RuntimeError, match="channels"):
        predict(model, byte_images())
    assert all(module.training for module in model.modules())


def test_accuracy_by_hand(tiny):
    model, images = tiny(), byte_images(20)
    first = model(images.float() / 255).argmax(1)
    labels = first.clone()
    labels[:3] = (labels[:3] + 1) % 5
    assert accuracy(model, images, labels) == pytest.approx(85)
    assert accuracy(model, images.float() / 255, labels, batch=3) == pytest.approx(85)
    assert accuracy(model, images, first) == 100


def test_images_that_cannot_be_judged(tiny):
    model, wrong = tiny(), r"tiny takes images of shape \(N, 3, 8, 8\), got \(4, 3, 9, 9\)"
    for call in (lambda x: predict(model, x), lambda x: accuracy(model, x, torch.zeros(len(x)))):
        with pytest.raises(ValueError, match="empty batch: at least one image is needed"):
            call(byte_images(0))
        with pytest.raises(ValueError, match=wrong):
            call(torch.rand(4, 3, 9, 9))


def test_a_dataset_of_other_classes_is_no_hindrance(tiny):
    data = Dataset("x", "train", byte_images(8), torch.arange(8) % 5, tuple("abcde"))
    history = train(tiny(), data, TrainingSettings(epochs=1, batch=4, rate=0.01, pad=1), generator())
    assert len(history) == 1
