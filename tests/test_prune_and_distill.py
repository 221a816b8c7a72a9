"""The cells of the pruning tables: what a cell holds, what cannot be reached, what is measured once."""

import dataclasses

import pytest
import torch

from dinv import latency, pruning
from dinv.experiments import table1
from dinv.experiments.pruning import PrunedCell, latency_table, prune_and_distill
from dinv.experiments.stages import network
from dinv.files import digest
from dinv.latency import LatencyTable
from dinv.pruning import Unreachable

SHORT = {
    **{"pruning.images": 30, "pruning.settings.step": 0.1},
    **{"pruning.distillation.updates": 2, "pruning.distillation.batch_size": 20},
}


@pytest.fixture
def cell(short_profile):
    """`cell(images, **options)`: prune the digits' teacher on some noise, and distil it."""
    profile = short_profile(SHORT)
    teacher, c = network(profile, "teacher"), profile.pruning
    noise = table1.noise(teacher, 80)

    def make(images=noise, **options):
        options.setdefault("settings", c.settings)
        return prune_and_distill(teacher, images, c.images, c.distillation, **options)

    make.teacher, make.settings = teacher, c.settings
    return make


def test_a_cell_is_found_again_and_differs_from_what_was_pruned(cell, monkeypatch):
    one = cell(filters=0.3)
    monkeypatch.setattr(pruning, "prune", None)  # it is not tried again
    again = cell(filters=0.3)
    assert isinstance(one, PrunedCell) and one.pruned.history[-1]["filters"] <= 0.7
    assert digest(one.network) == digest(again.network) != digest(one.pruned.network)
    assert one.seconds == again.seconds > 0 and one.pruned.removed == again.pruned.removed
    assert one.pruned.history == again.pruned.history
    assert not again.network.training and not any(p.requires_grad for p in again.network.parameters())


def test_a_cell_is_that_of_prune_by_hand(cell):
    images = table1.noise(cell.teacher, 80)
    chosen = torch.randperm(80, generator=torch.Generator().manual_seed(3))[:30]
    expected = pruning.prune(cell.teacher, images[chosen], filters=0.3, settings=cell.settings, seed=3)
    pruned = cell(images, filters=0.3, seed=3).pruned
    assert pruned.removed == expected.removed and digest(pruned.network) == digest(expected.network)


def test_labels_follow_their_images(cell):
    settings = dataclasses.replace(cell.settings, importance="cross-entropy")
    labels = torch.arange(80) % 10
    cells = [cell(filters=0.3, settings=settings, labels=part) for part in (labels, (labels + 1) % 10)]
    assert digest(cells[0].pruned.network) != digest(cells[1].pruned.network)
    with pytest.raises(ValueError, match="labels"):
        cell(filters=0.3, settings=settings)


def test_the_table_of_latencies_is_measured_once(cell):
    table = latency_table(cell.teacher)
    assert isinstance(table, LatencyTable) and table == latency_table(cell.teacher)


def test_a_share_that_cannot_be_reached_is_a_result_found_again_and_no_exception(cell, monkeypatch):
    table = latency_table(cell.teacher)
    same = ((1.0,) * len(latency.WIDTHS),) * len(latency.WIDTHS)
    layers = {name: dataclasses.replace(x, milliseconds=same) for name, x in table.layers.items()}
    flat = dataclasses.replace(table, layers=layers)
    failure = cell(table=flat, latency=0.4)
    assert isinstance(failure, Unreachable) and failure.most == 0
    assert "latency=0.4 cannot be removed from resnet_digits" in str(failure)
    monkeypatch.setattr(pruning, "prune", None)
    again = cell(table=flat, latency=0.4)
    assert str(again) == str(failure) and again.most == failure.most
