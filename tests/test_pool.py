"""Pools: made in batches, resumed at the next batch to the same images, kept in one verified file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dinv.pool
from dinv import files
from dinv.experiments import stages
from dinv.files import Corrupt
from dinv.inversion import InversionSettings, Inverter, balanced_labels, invert
from dinv.models import create_model
from dinv.objectives import CrossEntropy, FeatureStatistics, TotalVariation
from dinv.pool import Pool, batch_seed, synthesize, to_uint8

SETTINGS = InversionSettings(steps=6, lr=0.1, compile="never")
LABELS = balanced_labels(12, 5)


def objective():
    return CrossEntropy() + 0.1 * TotalVariation() + 10 * FeatureStatistics()


def pool_of(teacher, labels=LABELS, **options) -> Pool:
    options = {"batch_size": 4, "seed": 3} | options
    return synthesize(Inverter(teacher, objective(), SETTINGS), labels, **options)


def same(*pools: Pool) -> bool:
    one, other = (replace(pool, seconds=0.0, compile_seconds=0.0) for pool in pools)
    return files.digest(one) == files.digest(other)


def test_a_pool_is_its_batches_each_with_a_seed_of_its_own(tiny):
    teacher = tiny()
    pool = pool_of(teacher, snapshots=(0, 6))
    assert pool.images.shape == (12, 3, 8, 8) and pool.images.dtype == torch.uint8 and len(pool) == 12
    assert torch.equal(pool.labels, LABELS) and pool.seconds > 0 and pool.compile_seconds == 0
    parts = [
        invert(teacher, labels, objective(), SETTINGS, seed=batch_seed(3, number), snapshots=(0, 6))
        for number, labels in enumerate(LABELS.split(4))
    ]
    assert torch.equal(pool.images, torch.cat([to_uint8(part.images) for part in parts]))
    assert pool.terms == ("cross-entropy", "total variation", "feature statistics", "objective")
    curves = [torch.tensor([part.losses[name] for name in pool.terms]).T.double() for part in parts]
    torch.testing.assert_close(pool.losses, sum(curves) / 3)
    assert pool.snapshots.shape == (2, 4, 3, 8, 8) and pool.snapshot_steps == (0, 6)
    for images, step in zip(pool.snapshots, (0, 6), strict=True):
        assert torch.equal(images, to_uint8(parts[0].snapshots[step]))


def test_equal_seeds_equal_pools_and_no_batch_twice(tiny):
    teacher = tiny()
    assert same(pool_of(teacher), pool_of(teacher))
    assert not same(pool_of(teacher), pool_of(teacher, seed=4))
    images = pool_of(teacher, torch.zeros(8, dtype=torch.long), batch_size=2).images
    assert len(images.flatten(1).unique(dim=0)) == 8
    seeds = {batch_seed(seed, number) for seed in range(50) for number in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)


def test_to_uint8_rounds_to_the_nearest():
    levels = torch.arange(256)
    for offset in (-0.49, 0.0, 0.49):
        assert torch.equal(to_uint8((levels + offset) / 255), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-0.1, 1.1])).tolist() == [0, 255]


def test_images_fill_whole_batches_or_make_one(tiny):
    for batch_size in (5, 0, -4):
        with pytest.raises(ValueError, match=f"12 images cannot be made in whole batches of {batch_size}"):
            pool_of(tiny(), batch_size=batch_size)
    assert same(pool_of(tiny(), batch_size=256), pool_of(tiny(), batch_size=12))


def test_what_an_inversion_refuses_is_refused_before_the_first_batch(tiny):
    with pytest.raises(ValueError, match="label 9 is out of range"):
        pool_of(tiny(), torch.tensor([0, 0, 0, 9]), batch_size=2)
    with pytest.raises(ValueError, match="labels are empty"):
        pool_of(tiny(), LABELS[:0])
    with pytest.raises(ValueError, match="must lie in 0 to 6"):
        pool_of(tiny(), snapshots=(7,))


def test_whether_to_compile_is_decided_for_the_pool_as_a_whole(tiny, monkeypatch):
    """Else a resumed pool could take another path than an uninterrupted one."""
    inverter, counts = Inverter(tiny(), objective(), SETTINGS), []
    monkeypatch.setattr(inverter, "prepare", lambda n: counts.append(n) or Inverter.prepare(inverter, n))
    synthesize(inverter, LABELS, batch_size=4)
    assert counts == [12, 4, 4, 4]


@pytest.mark.parametrize("fail", [1, 2, 3])
def test_a_pool_goes_on_at_its_next_batch_to_the_same_images(tiny, memory, fail):
    teacher, checkpoint = tiny(), memory(fail)
    with pytest.raises(KeyboardInterrupt):
        pool_of(teacher, checkpoint=checkpoint, snapshots=(0, 3))
    assert checkpoint.told == [(6 * n, 18) for n in range(1, fail + 1)]
    checkpoint.told.clear()
    resumed = pool_of(teacher, checkpoint=checkpoint, snapshots=(0, 3))
    assert checkpoint.told == [(6 * n, 18) for n in range(fail + 1, 4)]
    assert same(resumed, pool_of(teacher, snapshots=(0, 3)))


def stage() -> Pool:
    """A pool as a stage, its teacher at random: four batches of eight."""
    inverter = Inverter(create_model("resnet_digits", "digits", seed=1).freeze(), objective(), SETTINGS)
    return stages.synthesize(inverter, balanced_labels(32, 10), batch_size=8, seed=5, snapshots=(0,))


@pytest.mark.parametrize("number", range(3), ids=["in a batch", "in a write", "before the last write"])
def test_a_pool_killed_by_sigkill_goes_on_to_the_same_bytes(killed, apart, monkeypatch, number):
    whole, numbers = stage(), []
    (one,) = files.cache_root().glob("pool-*/data.safetensors")
    monkeypatch.setattr(dinv.pool, "batch_seed", lambda seed, n: numbers.append(n) or batch_seed(seed, n))
    monkeypatch.setenv("DINV_CACHE", str(killed["pool"][number]))
    resumed = stage()
    (other,) = files.cache_root().glob("pool-*/data.safetensors")
    assert len(numbers) < 4 and numbers == list(range(4))[4 - len(numbers) :]
    assert same(resumed, whole) and one != other


def test_a_pool_comes_back_from_its_file(tiny, tmp_path):
    pool = pool_of(tiny(), snapshots=(0, 6))
    path = pool.save(tmp_path / "pool.safetensors")
    assert same(Pool.load(path), pool) and Pool.load(path).seconds == pool.seconds
    assert [p.name for p in tmp_path.iterdir()] == ["pool.safetensors"]
    bare = Pool(pool.images, pool.labels)
    assert same(Pool.load(bare.save(path)), bare)


@pytest.fixture
def path(tmp_path) -> Path:
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 1, 3, 4)
    labels, losses = torch.tensor([1, 0]), torch.ones(2, 1, dtype=torch.float64)
    return Pool(images, labels, losses, images[None], ("a",), (1,)).save(tmp_path / "pool.safetensors")


def test_no_flipped_bit_goes_unnoticed(path):
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(Corrupt, match="pool.safetensors"):
            Pool.load(path)
    path.write_bytes(whole)
    assert len(Pool.load(path)) == 2


def test_truncated_missing_and_other_files(path):
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(Corrupt, match="pool.safetensors cannot be read"):
            Pool.load(path)
    for other in (path.with_name("nothing.safetensors"), path.parent):
        with pytest.raises(Corrupt, match=f"{other.name} cannot be read"):
            Pool.load(other)
    files.write_tensors(path, {"images": torch.zeros(2, 3)})
    with pytest.raises(Corrupt, match="pool.safetensors is not a pool"):
        Pool.load(path)
