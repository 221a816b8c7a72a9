"""Pools: made in batches, resumed at the next batch to the same bytes, kept in one verified file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinv import pool, store
from dinv.inversion import InversionSettings, balanced_labels, invert
from dinv.models import create_model
from dinv.objectives import CrossEntropy, FeatureStatistics, TotalVariation
from dinv.pool import CorruptPool, Pool, batch_seed, synthesize, to_uint8
from dinv.profiles import load_profile
from dinv.runs import Result, Run

SETTINGS = InversionSettings(steps=6, rate=0.1, compile="never")
LABELS = balanced_labels(12, 5)


def objective():
    return CrossEntropy() + 0.1 * TotalVariation() + 10 * FeatureStatistics()


def made(teacher, **options) -> Pool:
    return synthesize(teacher, LABELS, objective(), SETTINGS, **{"batch": 4, "seed": 3} | options)


def same(one: Pool, other: Pool) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return one.meta() == other.meta() and all(torch.equal(a, b) for a, b in pairs)


# ---- making --------------------------------------------------------------------------------------


def test_a_pool_is_its_batches_each_with_a_seed_of_its_own(tiny):
    teacher = tiny()
    found = made(teacher, snapshots=(0, 6))
    assert found.images.shape == (12, 3, 8, 8) and found.images.dtype == torch.uint8 and len(found) == 12
    assert torch.equal(found.labels, LABELS)
    parts = [
        invert(teacher, labels, objective(), SETTINGS, seed=batch_seed(3, number), snapshots=(0, 6))
        for number, labels in enumerate(LABELS.split(4))
    ]
    assert torch.equal(found.images, torch.cat([to_uint8(part.images) for part in parts]))
    assert found.terms == ("cross-entropy", "total variation", "feature statistics", "objective")
    curves = [torch.tensor([part.losses[name] for name in found.terms]).T.double() for part in parts]
    torch.testing.assert_close(found.losses, sum(curves) / 3)
    assert found.snapshots.shape == (2, 4, 3, 8, 8) and found.snapshot_steps == (0, 6)
    for images, step in zip(found.snapshots, (0, 6), strict=True):
        assert torch.equal(images, to_uint8(parts[0].snapshots[step]))


def test_equal_seeds_equal_pools(tiny):
    teacher = tiny()
    assert same(made(teacher), made(teacher))
    assert not same(made(teacher), made(teacher, seed=4))


def test_batches_do_not_repeat_each_other(tiny):
    images = synthesize(tiny(), torch.zeros(6, dtype=torch.long), objective(), SETTINGS, batch=2).images
    assert len(images.flatten(1).unique(dim=0)) == 6


def test_batch_seeds_do_not_overlap():
    seeds = {batch_seed(seed, number) for seed in range(50) for number in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_to_uint8_rounds_to_the_nearest():
    levels = torch.arange(256)
    for offset in (-0.49, 0.0, 0.49):
        images = ((levels + offset) / 255).view(1, 1, 16, 16)
        assert torch.equal(to_uint8(images).flatten(), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-0.1, 1.1])).tolist() == [0, 255]


@pytest.mark.parametrize("batch", [5, 24, 0, -4])
def test_images_that_fill_no_whole_batches(tiny, batch):
    with pytest.raises(ValueError, match=f"12 images cannot be made in whole batches of {batch}"):
        made(tiny(), batch=batch)


def test_what_an_inversion_refuses_is_refused_before_the_first_batch(tiny):
    with pytest.raises(ValueError, match="label 9 is out of range"):
        synthesize(tiny(), torch.tensor([0, 0, 0, 9]), objective(), SETTINGS, batch=2)
    with pytest.raises(ValueError, match="labels are empty"):
        synthesize(tiny(), LABELS[:0], objective(), SETTINGS, batch=2)
    with pytest.raises(ValueError, match="must lie in 0 to 6"):
        made(tiny(), snapshots=(7,))


def test_whether_to_compile_is_decided_for_the_pool_as_a_whole(tiny, monkeypatch):
    """Else a resumed pool could take another path than an uninterrupted one."""
    modes = []
    original = pool.invert

    def spy(teacher, labels, objective, settings, **options):
        modes.append(settings.compile)
        return original(teacher, labels, objective, replace(settings, compile="never"), **options)

    monkeypatch.setattr(pool, "invert", spy)
    auto = replace(SETTINGS, compile="auto")
    synthesize(tiny(), LABELS, objective(), auto, batch=4)
    monkeypatch.setattr("dinv.step.WORTH_COMPILING", 1.0)
    synthesize(tiny(), LABELS, objective(), auto, batch=4)
    assert modes == ["never"] * 3 + ["always"] * 3


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", [1, 2, 3])
def test_a_pool_goes_on_at_its_next_batch_to_the_same_bytes(tiny, memory, fail):
    teacher = tiny()
    checkpoint = memory(fail)
    with pytest.raises(KeyboardInterrupt):
        made(teacher, checkpoint=checkpoint, snapshots=(0, 3))
    assert checkpoint.told == [(6 * n, 18) for n in range(1, fail + 1)]
    checkpoint.told.clear()
    resumed = made(teacher, checkpoint=checkpoint, snapshots=(0, 3))
    assert checkpoint.told == [(6 * n, 18) for n in range(fail + 1, 4)]
    assert same(resumed, made(teacher, snapshots=(0, 3)))


def stage() -> Result:
    """A pool as a stage, its teacher at random: four batches of eight."""
    teacher, labels = create_model("resnet_digits", "digits", seed=1).freeze(), balanced_labels(32, 10)

    def make(checkpoint):
        found = synthesize(
            teacher, labels, objective(), SETTINGS, batch=8, seed=5, snapshots=(0,), checkpoint=checkpoint
        )
        return found.tensors(), found.meta()

    return Run("02_example", load_profile("smoke")).stage("pool", "x", {}, make)


@pytest.mark.parametrize("number", range(3), ids=["in a batch", "in a write", "before the last write"])
def test_a_pool_killed_by_sigkill_goes_on_to_the_same_bytes(killed, apart, monkeypatch, number):
    whole = stage()
    monkeypatch.setenv("DINV_CACHE", str(killed["pool"][number]))
    inverted, original = [], pool.invert

    def counted(*given, **options):
        inverted.append(options["seed"])
        return original(*given, **options)

    monkeypatch.setattr(pool, "invert", counted)
    resumed = stage()
    assert not resumed.cached
    assert len(inverted) < 4 and inverted == [batch_seed(5, n) for n in range(4 - len(inverted), 4)]
    assert resumed.key == whole.key == store.sha256_file(resumed.path / "data.safetensors")
    assert same(Pool.of(resumed.tensors, resumed.meta), Pool.of(whole.tensors, whole.meta))


# ---- files ---------------------------------------------------------------------------------------


def test_a_pool_comes_back_from_its_file(tiny, tmp_path):
    found = made(tiny(), snapshots=(0, 6))
    path = found.save(tmp_path / "pool.safetensors")
    assert same(Pool.load(path), found)
    assert [p.name for p in tmp_path.iterdir()] == ["pool.safetensors"]
    bare = Pool(found.images, found.labels)
    assert same(Pool.load(bare.save(path)), bare)


def small_pool(path: Path) -> Path:
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 1, 3, 4)
    losses, snapshots = torch.ones(2, 1, dtype=torch.float64), images[None]
    return Pool(images, torch.tensor([1, 0]), losses, snapshots, ("a",), (1,)).save(path)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = small_pool(tmp_path / "pool.safetensors")
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CorruptPool, match="pool.safetensors"):
            Pool.load(path)
    path.write_bytes(whole)
    assert len(Pool.load(path)) == 2


def test_truncated_and_missing_files(tmp_path):
    path = small_pool(tmp_path / "pool.safetensors")
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptPool, match="pool.safetensors cannot be read .*synthesise it again"):
            Pool.load(path)
    with pytest.raises(CorruptPool, match="nothing.safetensors cannot be read"):
        Pool.load(tmp_path / "nothing.safetensors")
    with pytest.raises(CorruptPool, match="cannot be read"):
        Pool.load(tmp_path)


def test_a_flipped_byte_of_an_image_is_called_corrupt(tmp_path):
    path = small_pool(tmp_path / "pool.safetensors")
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 255
    path.write_bytes(whole)
    with pytest.raises(CorruptPool, match=r"is corrupt \(its checksum differs\): synthesise it again"):
        Pool.load(path)


def test_a_file_that_is_no_pool(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"images": torch.zeros(2, 3)}, path)
    with pytest.raises(CorruptPool, match="weights.safetensors is not a pool"):
        Pool.load(path)
