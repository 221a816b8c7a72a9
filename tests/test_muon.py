"""Muon: directions alike, a step of a share of the bank's length, resumed to the same bytes."""

import dataclasses

import pytest
import torch

from dinv import files, training
from dinv.data import Dataset
from dinv.muon import Muon, orthogonalized
from dinv.training import TrainingSettings

SETTINGS = TrainingSettings(epochs=3, batch_size=16, lr=0.1, pad=1, muon=0.05)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (5, 5), (1, 7)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrix = torch.randn(*shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -1, len(s))) @ v  # a tenth of the largest is the smallest
    found = u.T @ orthogonalized(matrix) @ v.T
    torch.testing.assert_close(found, torch.diag(found.diagonal()), atol=1e-4, rtol=0)
    assert found.diagonal().min() > 0.4 and found.diagonal().max() < 1.3


def moved(model, before):
    return {name: value - before[name] for name, value in model.state_dict().items()}


def one_update(model, scale=1.0, settings=SETTINGS):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = training.optimizer_for(model, settings)
    generator = torch.Generator().manual_seed(3)
    gradients = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gradients[name] = scale * (noise + 20)  # one direction is far stronger than all others
        parameter.grad = gradients[name].clone()
    optimizer.step()
    return gradients, before, moved(model, before)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_a_bank_moves_down_the_gradient_by_a_share_of_its_length_whatever_its_scale(tiny, scale):
    gradients, before, steps = one_update(tiny(), scale)
    for name in ("net.0.weight", "net.3.weight"):
        length = steps[name].norm() / before[name].norm()
        assert length.item() == pytest.approx(SETTINGS.muon, rel=1e-4)
        assert (steps[name] * gradients[name]).sum() < 0
        values = torch.linalg.svdvals(steps[name].flatten(1))
        assert values.max() < 3 * values.min()
        own = torch.linalg.svdvals(gradients[name].flatten(1))
        assert own.max() > 10 * own.min()


def test_all_other_parameters_move_as_with_sgd(tiny):
    _, _, with_muon = one_update(tiny())
    _, _, without = one_update(tiny(), settings=dataclasses.replace(SETTINGS, muon=0.0))
    same = {name for name in without if torch.equal(with_muon[name], without[name])}
    assert without.keys() - same == {"net.0.weight", "net.3.weight"}


def test_a_training_with_muon_resumes_to_the_same_bytes(tiny, memory):
    labels = torch.arange(48) % 5
    images = (torch.rand(48, 3, 8, 8) * 200).to(torch.uint8)
    data = Dataset("noise", "train", images, labels, tuple("abcde"))
    whole, resumed, stopped = tiny(1), tiny(2), memory(2)
    training.train(whole, data, SETTINGS, checkpoint=memory())
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny(1), data, SETTINGS, checkpoint=stopped)
    training.train(resumed, data, SETTINGS, checkpoint=stopped)
    states = [model.state_dict() for model in (whole, resumed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["net.0.weight"], tiny(1).state_dict()["net.0.weight"])


def test_at_zero_muon_is_no_part_of_a_digest(monkeypatch):
    seen = []
    monkeypatch.setattr(files, "sha256_text", lambda text: seen.append(text) or "")
    for share in (0.0, 0.05):
        files.digest(dataclasses.replace(SETTINGS, muon=share))
    assert ["muon" in text for text in seen] == [False, True] and "weight_decay" in seen[0]


def test_a_bank_does_not_grow_until_it_overflows(tiny):
    """A step that is orthogonal to a bank makes it longer, and BatchNorm does not mind."""
    model = tiny()
    bank, optimizer = model.get_parameter("net.0.weight"), training.optimizer_for(model, SETTINGS)
    with torch.no_grad():
        bank.mul_(Muon.longest / bank.norm())
    direction = bank.detach() / bank.norm()
    for _ in range(20):
        noise = torch.randn_like(bank)
        bank.grad = noise - (noise * direction).sum() * direction
        optimizer.step()
    assert bank.norm().item() == pytest.approx(Muon.longest, rel=1e-4)
    assert (bank.detach() / bank.norm() * direction).sum() < 0.999  # it has moved all the same
