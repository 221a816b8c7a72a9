"""Training: resumed at the next epoch to the same bytes; schedule, decay, accuracy as they should be."""

import math

import numpy as np
import pytest
import torch

from dinv import files, training
from dinv.data import Dataset, load_dataset
from dinv.experiments import stages
from dinv.models import create_model
from dinv.training import TrainingSettings, Updates, accuracy, epoch_batches, predict, scheduled_lr, train

SETTINGS = TrainingSettings(
    epochs=4, batch_size=64, lr=0.1, pad=1, flip=False, low_res_epochs=1, label_smoothing=0.1
)


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


def test_the_loss_falls_and_the_last_epoch_is_kept():
    model, data = fresh(), load_dataset("digits", "train")
    before = accuracy(model, data.images, data.labels)
    history = train(model, data, TrainingSettings(epochs=3, batch_size=64, lr=0.1, pad=1, flip=False))
    assert [record["epoch"] for record in history] == [1, 2, 3]
    losses = [record["loss"] for record in history]
    assert 2.5 > losses[0] > losses[1] > losses[2]  # about log 10 at first
    assert not model.training
    assert accuracy(model, data.images, data.labels) > max(80, before + 40)
    assert history[2]["accuracy"] > history[0]["accuracy"]


def test_equal_seeds_equal_bytes(data):
    def trained(seed):
        model = fresh()
        return train(model, data, SETTINGS, seed=seed), state_of(model)

    history, state = trained(3)
    torch.manual_seed(1)  # has no influence
    again, same = trained(3)
    assert history == again and equal(state, same)
    assert not equal(state, trained(4)[1])


def test_recorded_loss_and_accuracy_are_means_over_the_epochs_images(data):
    """With a rate of next to nothing the network stays, and both can be computed directly."""
    settings = TrainingSettings(epochs=1, batch_size=64, lr=1e-12, pad=0, flip=False)
    model = fresh()
    with torch.no_grad():
        model.train()  # statistics of each batch
        batches = epoch_batches(data, settings, generator(), low_res=False)
        parts = [(model(images), labels) for images, labels in batches]
    (record,) = train(fresh(), data, settings)
    losses = [torch.nn.functional.cross_entropy(logits, labels).item() for logits, labels in parts]
    hits = sum((logits.argmax(1) == labels).sum().item() for logits, labels in parts)
    assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert record["accuracy"] == pytest.approx(100 * hits / 256)


def test_batches_of_an_epoch(data):
    batches = list(epoch_batches(data.take(range(200)), SETTINGS, generator(), low_res=False))
    assert [images.shape for images, _ in batches] == [(64, 1, 8, 8)] * 3  # the rest is left out
    assert all(x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1 for x, _ in batches)
    small = next(iter(epoch_batches(data, SETTINGS, generator(), low_res=True)))[0]
    assert small.shape == (64, 1, 6, 6)
    plain = TrainingSettings(batch_size=256, pad=0, flip=False)
    ((images, labels),) = epoch_batches(data, plain, generator(), low_res=False)
    mine = sorted(map(tuple, images.mul(255).round().flatten(1).tolist()))
    assert mine == sorted(map(tuple, data.images.float().flatten(1).tolist()))  # each image once
    assert torch.equal(labels.sort().values, data.labels.sort().values)
    assert not torch.equal(labels, data.labels)  # shuffled


@pytest.mark.parametrize("fail", [1, 3, 4])
def test_a_training_goes_on_at_its_next_epoch_to_the_same_bytes(data, memory, fail):
    whole = fresh()
    expected = train(whole, data, SETTINGS, seed=2)
    checkpoint = memory(fail)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), data, SETTINGS, seed=2, checkpoint=checkpoint)
    assert checkpoint.told == [(epoch, 4) for epoch in range(1, fail + 1)]
    checkpoint.told.clear()
    # the weights, and the state of the random numbers, come from the checkpoint alone
    resumed = fresh(seed=99)
    history = train(resumed, data, SETTINGS, seed=98, checkpoint=checkpoint)
    assert checkpoint.told == [(epoch, 4) for epoch in range(fail + 1, 5)]
    assert history == expected
    assert equal(state_of(resumed), state_of(whole)) and not resumed.training


def stage() -> dict[str, torch.Tensor]:
    """A training as a stage, four epochs of four batches: the weights."""
    model = fresh()
    stages.train_network(model, some_data(), SETTINGS, seed=2)
    return state_of(model)


@pytest.mark.parametrize("number, first", [(0, 2), (1, 2), (2, 5)], ids=["in an epoch", "in a write", "last"])
def test_a_training_killed_by_sigkill_goes_on_to_the_same_bytes(killed, apart, monkeypatch, number, first):
    whole = stage()
    (one,) = files.cache_root().glob("network-*/data.safetensors")
    monkeypatch.setenv("DINV_CACHE", str(killed["training"][number]))
    batches, original = [], training.augment
    monkeypatch.setattr(training, "augment", lambda *a, **k: batches.append(1) or original(*a, **k))
    resumed = stage()
    (other,) = files.cache_root().glob("network-*/data.safetensors")
    assert len(batches) == 4 * (5 - first)
    assert equal(resumed, whole) and one != other
    assert equal(*(files.read_tensors(path)[0] for path in (one, other)))


def test_rounds_of_updates_the_last_one_shorter_and_resumed(tiny, memory):
    images = torch.rand(6, 3, 8, 8, generator=generator())

    def run(model, checkpoint):
        loop = Updates(model, SETTINGS, 7, 3, generator(5), checkpoint)
        for number in loop:
            assert model.training
            for step in range(3 * number, min(3 * number + 3, 7)):
                noise = torch.rand(6, 5, generator=loop.generator)
                loop.update((noise * model(images)).sum())
                rates = [group["lr"] for group in loop.optimizer.param_groups]
                assert rates == 2 * [scheduled_lr(SETTINGS, step, 7)]
            loop.record({"watched": math.nan}, round=number, loss=1.5)
        assert not model.training
        return loop.history

    whole, resumed, stopped = tiny(1), tiny(2), memory(2)
    run(whole, memory())
    with pytest.raises(KeyboardInterrupt):
        run(tiny(1), stopped)
    history = run(resumed, stopped)
    assert [(record["round"], record["loss"]) for record in history] == [(0, 1.5), (1, 1.5), (2, 1.5)]
    assert stopped.told == [(1, 3), (2, 3), (3, 3)]
    assert equal(state_of(whole), state_of(resumed))


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    settings = TrainingSettings(lr=0.4, warmup=0.25)
    rates = [scheduled_lr(settings, step, 40) for step in range(41)]
    assert rates[:10] == pytest.approx([0.04 * step for step in range(1, 11)])
    assert rates[10:] == pytest.approx([0.4 * (40 - step) / 30 for step in range(10, 41)])
    assert max(rates) == pytest.approx(0.4) and rates[-1] == 0
    for warmup, steps in ((0.0, 7), (1.0, 7), (0.5, 1)):
        other = [scheduled_lr(TrainingSettings(lr=0.4, warmup=warmup), s, steps) for s in range(steps)]
        assert all(0 < rate <= 0.4 for rate in other)
    falling = TrainingSettings(lr=0.4, schedule="steps")
    rates = [scheduled_lr(falling, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.4] * 4 + [0.04] * 4 + [0.004] * 2)


def test_weights_decay_and_biases_and_batchnorm_do_not(tiny):
    model = tiny()
    before = state_of(model)
    optimizer = training.optimizer_for(model, TrainingSettings(lr=0.5, weight_decay=0.1))
    optimized = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(optimized) == sorted(id(p) for p in model.parameters())  # each once
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"net.0.weight", "net.3.weight", "net.8.weight"}
    for name in changed:  # Nesterov: the decay counts with momentum, 1 + 0.9
        torch.testing.assert_close(model.state_dict()[name], before[name] * (1 - 0.5 * 0.1 * 1.9))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "epochs=0.* must be positive"),
        ({"batch_size": 0}, "batch_size=0.* must be positive"),
        ({"lr": -0.1}, "lr=-0.1 must be positive"),
        ({"lr": math.nan}, "lr=nan must be positive"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine': choose linear, steps"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**change)


def test_a_batch_larger_than_the_dataset_and_a_loss_that_is_not_finite(data, memory):
    with pytest.raises(ValueError, match="batch_size=512 is larger than the 256 images"):
        train(fresh(), data, TrainingSettings(batch_size=512))
    checkpoint = memory()
    settings = TrainingSettings(epochs=3, batch_size=64, lr=1e20, pad=1, flip=False)
    with pytest.raises(FloatingPointError, match=r"loss of epoch 1 is not finite: lower lr=1e\+20"):
        train(fresh(), data, settings, checkpoint=checkpoint)
    assert checkpoint.saved is None


def byte_images(n=23):
    return torch.randint(256, (n, 3, 8, 8), generator=generator(), dtype=torch.uint8)


def test_predictions_are_the_networks_logits_in_eval_mode(tiny, portrait):
    model, images = tiny().train(), byte_images()
    model.net[4].eval()  # one layer frozen
    before = portrait(model)
    logits = predict(model, images, batch_size=5)
    assert portrait(model) == before
    assert logits.shape == (23, 5) and logits.dtype == torch.float32 and not logits.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(logits, tiny()(images.float() / 255))
    assert torch.equal(logits, predict(tiny(), images.float() / 255, batch_size=5))
    for batch_size in (1, 7, 23):
        torch.testing.assert_close(predict(tiny(), images, batch_size), logits)


def test_the_networks_mode_comes_back_also_after_an_exception(tiny):
    model = tiny().train()
    model.net[0] = torch.nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError, match=r"tiny fails on images \(2, 3, 8, 8\), as size=8 .*channels"):
        predict(model, byte_images())
    assert all(module.training for module in model.modules())


def test_accuracy_by_hand(tiny):
    model, images = tiny(), byte_images(20)
    answers = model(images.float() / 255).argmax(1)
    labels = answers.clone()
    labels[:3] = (labels[:3] + 1) % 5
    assert accuracy(model, images, labels) == pytest.approx(85)
    assert accuracy(model, images.float() / 255, labels, batch_size=3) == pytest.approx(85)
    assert accuracy(model, images, answers) == 100


def test_images_that_cannot_be_classified(tiny):
    model, wrong = tiny(), r"tiny takes images of shape \(N, 3, 8, 8\), got \(4, 3, 9, 9\)"
    for call in (lambda x: predict(model, x), lambda x: accuracy(model, x, torch.zeros(len(x)))):
        with pytest.raises(ValueError, match="empty batch: at least one image is needed"):
            call(byte_images(0))
        with pytest.raises(ValueError, match=wrong):
            call(torch.rand(4, 3, 9, 9))
