"""Stages: made once, found again, resumed after a kill, made again when corrupt."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinv import files
from dinv.experiments import cache
from dinv.experiments.cache import stage
from dinv.files import NO_CHECKPOINT, cache_root

STEPS = 12
pytestmark = pytest.mark.usefixtures("apart")


@dataclass
class Walk:
    state: Tensor
    resumed_at: int
    sizes: tuple[tuple[int, int], ...] = ()
    parts: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


@stage("walk")
def walk(steps: int = STEPS, *, name: str = "", seed: int = 7, checkpoint=NO_CHECKPOINT) -> Walk:
    """A long stage in small: a random walk that may be saved after every step."""
    generator = torch.Generator().manual_seed(seed)
    state, first = torch.zeros(2000), 0
    if saved := checkpoint.load():
        tensors, meta = saved
        state, first = tensors["state"], meta["step"]
        generator.set_state(tensors["generator"])
    for step in range(first, steps):
        state = (state + torch.randn(state.shape, generator=generator)).sin()
        tensors = {"state": state, "generator": generator.get_state()}
        checkpoint.save(lambda tensors=tensors, step=step: (tensors, {"step": step + 1}))
        checkpoint.progress(step + 1, steps, mean=state.mean())
    return Walk(state, first, ((steps, 1),), {"last": state[-1:]})


def folders() -> list[Path]:
    return sorted(path for path in cache_root().iterdir() if path.is_dir())


def data() -> str:
    """Digest of the result's tensors, bytes and all."""
    (folder,) = folders()
    return files.digest(files.read_tensors(folder / "data.safetensors")[0])


# ---- the key -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change",
    [{"eval_every": 2}, {"images": torch.ones(3)}, {"settings": (0.1, 2.0)}, {"added": "yes"}, {"seed": 1.0}],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_is_in_the_key_so_that_nothing_goes_stale(ledger, change):
    """`eval_every` once was in no key, and Figure 4 was drawn from old points; `added` is a new argument."""

    @stage("x")
    def made(images, settings, eval_every=1, seed=1, added="no") -> Walk:
        return Walk(torch.zeros(1), eval_every)

    given = {"images": torch.zeros(3), "settings": (0.1, 1.0)}
    made(**given), made(**given, eval_every=1, added="no"), made(**given | change)
    assert [entry["cached"] for entry in ledger] == [False, True, False]


def test_kind_version_device_and_precision_are_in_the_key_and_the_checkpoint_is_not(ledger, monkeypatch):
    def made(kind="x", version=1, **given):
        stage(kind, version)(walk.__wrapped__)(2, **given)

    made(), made(kind="y"), made(version=2), made(checkpoint=object())
    monkeypatch.setattr("dinv.experiments.device.precision", lambda: "bfloat16")
    made()
    monkeypatch.setattr("dinv.experiments.device.current", lambda: "cuda")
    made()
    assert [entry["cached"] for entry in ledger] == [False, False, False, True, False, False]
    assert len({entry["key"] for entry in ledger}) == 5


def test_what_has_no_digest_or_cannot_be_kept_is_refused_by_name():
    @stage("x")
    def made(value) -> Walk:
        return Walk(torch.zeros(1), float("nan"))

    with pytest.raises(TypeError, match=r"made\.value is a object"):
        made(object())
    with pytest.raises(TypeError, match=r"values\.resumed_at is a float \(nan\)"):
        made(1)


# ---- made and found ------------------------------------------------------------------------------
def test_a_stage_is_made_once_and_found_again_as_it_was(ledger):
    made, again = walk(name="left"), walk(name="left")
    assert torch.equal(made.state, again.state) and torch.equal(made.parts["last"], again.parts["last"])
    assert made.sizes == again.sizes == ((STEPS, 1),) and made.seconds == again.seconds > 0
    first, second = ledger
    assert (first["cached"], second["cached"]) == (False, True) and first["label"] == "walk, left, seed 7"
    (folder,) = folders()
    assert folder.name == first["folder"] == f"walk-{first['key'][:12]}"
    assert sorted(p.name for p in folder.iterdir()) == ["data.safetensors"]
    log = (cache_root() / "log").read_text().splitlines()
    assert [line.split()[2] for line in log] == ["start", "done"] and log[1].endswith("walk, left, seed 7")


def test_a_checkpoint_gives_back_what_was_saved():
    @stage("tensors")
    def made(checkpoint=NO_CHECKPOINT) -> Walk:
        checkpoint.save(lambda: ({"flags": torch.tensor([True, False])}, {"note": "ä"}))
        loaded, meta = checkpoint.load()
        assert meta == {"note": "ä"} and loaded["flags"].tolist() == [True, False]
        return Walk(torch.zeros(1), 0)

    made()


def test_two_runs_at_once_make_a_stage_once(ledger, monkeypatch):
    sin = torch.Tensor.sin
    monkeypatch.setattr(torch.Tensor, "sin", lambda tensor: (time.sleep(0.02), sin(tensor))[1])
    with ThreadPoolExecutor(2) as pool:  # the lock holds between threads as between processes
        list(pool.map(walk, [STEPS, STEPS]))
    assert sorted(entry["cached"] for entry in ledger) == [False, True]


# ---- kills and resumes ---------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_cache
from dinv import files
moment, die = sys.argv[1], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
calls = iter(range(99))
test_cache.cache.Checkpoint.share = float("inf")  # every save is made
if moment == "between two steps":
    sin = test_cache.torch.Tensor.sin
    test_cache.torch.Tensor.sin = lambda tensor: sin(tensor) if next(calls) < 5 else die()
elif moment == "in the middle of a write":
    save = files.save_file
    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        if next(calls) == 7:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    files.save_file = half
else:
    write = files.write_tensors
    last = lambda path: path.name == "data.safetensors"
    files.write_tensors = lambda path, *given: die() if last(path) else write(path, *given)
test_cache.walk()
"""


@pytest.mark.parametrize(
    "moment, resumed_at",
    [("between two steps", 5), ("in the middle of a write", 7), ("before the last write", STEPS)],
)
def test_sigkill_and_resume_give_the_same_bytes(apart, monkeypatch, moment, resumed_at):
    walk()
    whole = data()
    monkeypatch.setenv("DINV_CACHE", str(apart / "killed"))
    script = KILLED.format(tests=str(Path(__file__).parent))
    killed = subprocess.run([sys.executable, "-c", script, moment], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = folders()
    assert (folder / "partial.safetensors").exists() and not (folder / "data.safetensors").exists()
    assert walk().resumed_at == resumed_at
    assert data() == whole
    assert sorted(p.name for p in folder.iterdir()) == ["data.safetensors"]


def test_seconds_add_up_over_parts_and_saving_takes_a_tenth_of_the_time(monkeypatch):
    saves = []

    @stage("slow")
    def slow(checkpoint=NO_CHECKPOINT) -> Walk:
        if checkpoint.load() is None:
            for _ in range(50):
                checkpoint.save(lambda: (time.sleep(0.03), saves.append(1), ({}, {}))[2])
                time.sleep(0.01)
            raise KeyboardInterrupt
        return Walk(torch.zeros(1), 0)

    with pytest.raises(KeyboardInterrupt):
        slow()
    assert len(saves) < 6 and slow().seconds > 0.03
    states = [line.split()[2] for line in (cache_root() / "log").open()]
    assert states == ["start", "stopped", "start", "done"]


# ---- corruption and the disk ---------------------------------------------------------------------
def flip_last_byte(path: Path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def cut(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def scribble(path: Path):
    path.write_bytes(b"not a file of ours")


def change_a_number(path: Path):
    path.write_bytes(path.read_bytes().replace(b'resumed_at\\": 0', b'resumed_at\\": 1'))


@pytest.mark.parametrize(
    "damage, message",
    [
        (flip_last_byte, "is corrupt"), (cut, "cannot be read"), (scribble, "cannot be read"),
        (change_a_number, "is corrupt"),
    ],
)  # fmt: skip
def test_what_is_corrupt_is_named_and_made_again(ledger, capsys, damage, message):
    walk()
    (folder,), whole = folders(), data()
    before = (folder / "data.safetensors").read_bytes()
    damage(folder / "data.safetensors")
    assert (folder / "data.safetensors").read_bytes() != before
    assert walk().resumed_at == 0 and data() == whole
    error = capsys.readouterr().err
    assert f"{folder / 'data.safetensors'} {message}" in error and "walk, seed 7 is made again" in error
    walk()
    assert [entry["cached"] for entry in ledger] == [False, False, True]


def test_the_result_of_another_key_is_not_taken_for_this_one(ledger, capsys):
    """The folder's name holds no more than the beginning of the key."""
    walk()
    path, whole = folders()[0] / "data.safetensors", data()
    tensors, record = files.read_tensors(path)
    files.write_tensors(path, {**tensors, "state": tensors["state"] + 1}, record | {"key": "another"})
    assert walk().resumed_at == 0 and data() == whole
    assert "is of another key: walk, seed 7 is made again" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip_last_byte, cut, scribble])
def test_a_corrupt_checkpoint_is_named_and_the_stage_starts_anew(capsys, damage):
    walk()
    (folder,), whole = folders(), data()
    (folder / "data.safetensors").rename(folder / "partial.safetensors")
    damage(folder / "partial.safetensors")
    assert walk().resumed_at == 0 and data() == whole
    error = capsys.readouterr().err
    assert str(folder / "partial.safetensors") in error and "starts anew" in error


def test_no_space_leaves_no_half_file_and_says_what_is_needed(monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_file", full)
    message = r"cannot write .*data\.safetensors: No space left.* needs 0.008 MB.*DINV_CACHE"
    with pytest.raises(OSError, match=message):
        walk(steps=0)
    assert not list(cache_root().rglob("*.tmp")) and not list(cache_root().rglob("data.safetensors"))


def test_a_terminal_sees_a_bar_on_stderr_unless_dinv_quiet(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "ipykernel", cache)
    walk()
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("DINV_QUIET")
    walk(name="loud")
    out, err = capfd.readouterr()
    assert out == "" and "walk, loud" in err and f"/{STEPS}" in err
