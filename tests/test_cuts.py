"""The cells of the pruning tables: their images, what a cell holds, and that it needs no data."""

import dataclasses

import pytest
import torch

from dinv import chapters, cuts, latency, load_dataset, pruning, rows
from dinv.latency import LatencyTable
from dinv.metrics import accuracy
from dinv.profiles import load_profile
from dinv.step import forward_flops

SHORT = {
    "distillation.stages": ((3, 8),), "inversion.batch": 20, "distillation.first": 40,
    "distillation.rounds": 3,
    "distillation.updates": 2, "distillation.batch": 20, "pruning.images": 30, "pruning.step": 0.1,
    "pruning.updates": 2, "pruning.batch": 20, "imagenet.stages": ((2, 8),),
}  # fmt: skip


@pytest.fixture
def run(short_run):
    return short_run("05_pruning", SHORT)


@pytest.mark.parametrize("row", cuts.DATA_FREE)
def test_a_data_free_cell_needs_no_training_image(run, monkeypatch, row):
    def only_tests(name, split, *more, original=cuts.load_dataset):
        assert split == "test", "a data-free row asked for training images"
        return original(name, split, *more)

    for module in ("cuts", "rows", "chapters"):
        monkeypatch.setattr(f"dinv.{module}.load_dataset", only_tests)
    teacher = chapters.network(run, "teacher")
    images = cuts.images_of(run, row, teacher, 0)
    assert images.shape == (80, 1, 8, 8) and images.dtype == torch.uint8
    cell = cuts.cut(run, row, teacher, images, filters=0.3)
    assert cell.pruned.history[-1]["filters"] <= 0.7
    assert 0 <= cell.before <= 100 and 0 <= cell.accuracy <= 100 and cell.seconds > 0


def test_the_images_of_adi_begin_with_those_of_deepinversion(run):
    teacher = chapters.network(run, "teacher")
    plain, adaptive = (cuts.images_of(run, row, teacher, 0) for row in ("deepinversion", "adi"))
    assert torch.equal(plain[:40], adaptive[:40]) and not torch.equal(plain, adaptive)


def test_labels_run_on_from_the_first_images_to_those_made_on_the_way(run):
    # batches of 16 are no multiple of the ten classes
    odd = {"inversion": {"batch": 16}, "distillation": {"first": 32}}
    parts = {name: dataclasses.replace(getattr(run.profile, name), **new) for name, new in odd.items()}
    run.profile = dataclasses.replace(run.profile, **parts)
    teacher = chapters.network(run, "teacher")
    pool, _ = rows.pool(run, "deepinversion", teacher, 0)
    _, source, _ = rows.images_of(run, "adi", teacher, 0)
    on_the_way = [source.source.labels(number) for number in range(2)]
    assert torch.equal(torch.cat([pool.labels[:32], *on_the_way]), pool.labels)
    assert len(cuts.images_of(run, "adi", teacher, 0)) == len(pool.labels) == 64


def test_the_ceilings_have_their_share_of_every_class(run):
    teacher = chapters.network(run, "teacher")
    counts = [len(cuts.images_of(run, row, teacher, 0)) for row in cuts.CEILINGS]
    assert counts[0] == 10 and counts[1] % 10 == 0 and counts[1] < counts[2] // 9
    assert counts[2] > 1000


def test_a_cell_is_found_again_and_differs_from_what_was_cut(run):
    teacher = chapters.network(run, "teacher")
    images = cuts.images_of(run, "noise", teacher, 0)
    one, again = (cuts.cut(run, "x", teacher, images, filters=0.3) for _ in range(2))
    assert chapters.digest(one.network) == chapters.digest(again.network)
    assert chapters.digest(one.network) != chapters.digest(one.pruned.network)
    assert one.seconds == again.seconds and one.pruned.removed == again.pruned.removed
    bare = cuts.cut(run, "x", teacher, images, filters=0.3, updates=0)
    assert chapters.digest(bare.network) == chapters.digest(bare.pruned.network)
    assert bare.accuracy == bare.before == one.before


def test_the_table_of_latencies_is_measured_once(run):
    teacher = chapters.network(run, "teacher")
    assert cuts.table_of(run, teacher) == cuts.table_of(run, teacher)


def test_a_share_that_cannot_be_reached_is_a_marker_found_again_and_no_exception(run, monkeypatch):
    teacher = chapters.network(run, "teacher")
    images = cuts.images_of(run, "noise", teacher, 0)
    table = cuts.table_of(run, teacher)
    same = ((1.0,) * len(latency.WIDTHS),) * len(latency.WIDTHS)
    flat = LatencyTable(
        {name: dataclasses.replace(x, milliseconds=same) for name, x in table.layers.items()}
    )
    given = {"table": flat, "latency": 0.4}
    missed = cuts.reached(run, "flat", teacher, images, **given)
    assert isinstance(missed, pruning.Unreachable) and missed.most == 0
    assert isinstance(cuts.reached(run, "reached", teacher, images, filters=0.3), cuts.Cut)
    monkeypatch.setattr(pruning, "prune", None)  # it is not tried again
    again = cuts.reached(run, "flat", teacher, images, **given)
    assert str(again) == str(missed) and again.most == missed.most
    with pytest.raises(pruning.Unreachable, match="latency=0.4 cannot be removed from resnet_digits"):
        cuts.cut(run, "flat", teacher, images, **given)


def test_the_paper_removes_a_fifth_and_a_half():
    assert load_profile("paper").pruning.ratios == (0.2, 0.5)


@pytest.mark.parametrize("row", ["noise", "deepinversion"])
def test_a_row_of_imagenet_is_made_as_in_notebook_07_and_judged_on_what_is_given(run, row):
    teacher = chapters.network(run, "teacher")
    images = cuts.of_imagenet(run, row, teacher)
    assert images.shape == (30, 1, 8, 8) and images.dtype == torch.uint8
    few = load_dataset("digits", "test").take(slice(0, 7))
    cell = cuts.cut(run, row, teacher, images, filters=0.3, test=few)
    assert cell.accuracy == pytest.approx(accuracy(cell.network, few.images, few.labels))


def test_what_a_row_of_imagenet_costs_follows_its_settings(run):
    teacher = chapters.network(run, "teacher")
    synthesis, healing = cuts.hours_of_imagenet(run, teacher, 1e9)
    p = run.profile.pruning
    assert synthesis == pytest.approx(p.images * 2 * forward_flops(teacher) * 2 / 3.6e12)  # two steps at 8 px
    assert healing == pytest.approx(p.updates * p.batch * 4 * forward_flops(teacher) / 3.6e12)
