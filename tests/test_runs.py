"""Stages: made once, found again, resumed after a kill, made again when corrupt."""

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dinv import runs, store
from dinv.profiles import load_profile
from dinv.runs import BudgetExceeded, Run, stage_name

STEPS = 12


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Cache and figures in a temporary folder; no deadline, no force, no progress file."""
    for name in ("DEADLINE", "FORCE", "FORCE_SINCE", "PROGRESS", "PROFILE"):
        monkeypatch.delenv(f"DINV_{name}", raising=False)
    monkeypatch.setenv("DINV_CACHE", str(tmp_path / "runs"))
    monkeypatch.setenv("DINV_FIGURES", str(tmp_path / "figures"))
    return tmp_path


def new_run() -> Run:
    return Run("02_example", load_profile("smoke"))


def walk(checkpoint):
    """A long stage in small: a random walk that saves after every step."""
    generator = torch.Generator().manual_seed(7)
    state, first = torch.zeros(2000), 0
    if found := checkpoint.load():
        tensors, meta = found
        state, first = tensors["state"], meta["step"]
        generator.set_state(tensors["generator"])
    for step in range(first, STEPS):
        state = (state + torch.randn(state.shape, generator=generator)).sin()
        checkpoint.save({"state": state, "generator": generator.get_state()}, {"step": step + 1})
        checkpoint.progress(step + 1, STEPS, mean=state.mean())
    return {"state": state}, {"resumed_at": first}


def do_walk(make=walk, **more):
    return new_run().stage("walk", "seed7", {"steps": STEPS}, make, **more)


def must_not_run(checkpoint):
    raise AssertionError("this stage is stored and must not be made again")


# ---- caching -------------------------------------------------------------------------------------


def test_a_stage_is_made_once_and_found_again():
    made, found = do_walk(), do_walk(must_not_run)
    assert (made.cached, found.cached) == (False, True)
    assert torch.equal(made.tensors["state"], found.tensors["state"])
    assert made.key == found.key == store.sha256_file(made.path / "data.safetensors")
    assert made.meta == found.meta == {"resumed_at": 0}
    assert found.seconds == made.seconds > 0
    assert repr(made) == repr(found) == "<walk seed7: state>"
    assert sorted(p.name for p in made.path.iterdir()) == ["data.safetensors", "meta.json"]


def test_what_the_key_depends_on():
    def folder(kind="a", name="b", config=None, inputs=(), version=1):
        stage = new_run().stage(kind, name, config or {}, lambda _: ({}, {}), inputs, version)
        return stage.path

    same = folder(config={"x": 1, "y": [1, 2]})
    assert same == folder(config={"y": (1, 2), "x": 1})
    others = {
        folder(),
        folder(kind="c"),
        folder(name="c"),
        folder(config={"x": 2}),
        folder(inputs=["12ab"]),
        folder(version=2),
    }
    assert len(others | {same}) == 7


def test_tensors_come_back_as_they_were():
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "transposed": shared.t(),
        "shared": shared,
        "again": shared,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "weight": torch.nn.Parameter(torch.ones(2)),
    }

    def make(checkpoint):
        checkpoint.save(tensors, {"note": "ä"})
        loaded, meta = checkpoint.load()
        assert meta == {"note": "ä"}
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
        return tensors, {}

    do_walk(make)
    found = do_walk(must_not_run).tensors
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    "config, message",
    [
        ({"loss": {"weight": math.nan}}, r"config\.loss\.weight is nan; only finite"),
        ({"sizes": [1, math.inf]}, r"config\.sizes\[1\] is inf; only finite"),
        ({"device": torch.device("cpu")}, r"config\.device is a device .* convert it"),
        ({1: 2}, r"config has the key 1; JSON keys are strings"),
    ],
)
def test_a_configuration_that_json_cannot_hold(config, message):
    with pytest.raises(ValueError, match=message):
        new_run().stage("walk", "x", config, must_not_run)


def test_a_name_that_is_no_folder():
    with pytest.raises(ValueError, match="a stage cannot be called '../x'"):
        new_run().stage("walk", "../x", {}, must_not_run)


@pytest.mark.parametrize(
    "text, name",
    [
        ("1 % real-resnet_small->resnet_tiny", "1-percent-real-resnet_small-resnet_tiny"),
        ("jack-o'-lantern, ((2, 4),)", "jack-o-lantern-2-4-"),
        ("tv=1e-4+l2", "tv=1e-4+l2"),
    ],
)
def test_any_text_can_name_a_stage(text, name):
    assert stage_name(text) == name
    assert new_run().stage("walk", name, {}, lambda _: ({}, {})).name == name


def test_a_result_that_is_no_tensor_or_not_finite():
    with pytest.raises(ValueError, match="'x' is a list, expected a tensor"):
        do_walk(lambda _: ({"x": [1]}, {}))
    with pytest.raises(ValueError, match=r"meta\.losses\[1\] is nan"):
        do_walk(lambda _: ({}, {"losses": [0.1, math.nan]}))


def test_force_makes_again_once(monkeypatch):
    first = do_walk()
    monkeypatch.setenv("DINV_FORCE", "teacher,wal*")
    monkeypatch.setenv("DINV_FORCE_SINCE", str(time.time() + 0.05))
    time.sleep(0.1)
    again = do_walk()
    assert not again.cached and again.key == first.key
    assert do_walk(must_not_run).cached
    monkeypatch.setenv("DINV_FORCE", "walk-seed8")
    monkeypatch.setenv("DINV_FORCE_SINCE", str(time.time() + 10))
    assert do_walk(must_not_run).cached


# ---- kills and resumes ---------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_runs
from dinv import store
moment, die = sys.argv[1], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "between two steps":
    sin, calls = test_runs.torch.Tensor.sin, iter(range(99))
    test_runs.torch.Tensor.sin = lambda tensor: sin(tensor) if next(calls) < 5 else die()
elif moment == "in the middle of a write":
    save, calls = store.save_file, iter(range(99))
    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        if next(calls) == 7:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    store.save_file = half
elif moment == "between tensors and meta.json":
    test_runs.runs.write_record = die
test_runs.do_walk()
"""


@pytest.mark.parametrize(
    "moment, resumed_at",
    [
        ("between two steps", 5),
        ("in the middle of a write", 7),
        ("between tensors and meta.json", STEPS),
    ],
)
def test_sigkill_and_resume_give_the_same_bytes(tmp_path, monkeypatch, moment, resumed_at):
    monkeypatch.setenv("DINV_CACHE", str(tmp_path / "whole"))
    whole = do_walk()
    monkeypatch.setenv("DINV_CACHE", str(tmp_path / "killed"))
    script = KILLED.format(tests=str(Path(__file__).parent))
    killed = subprocess.run([sys.executable, "-c", script, moment], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "killed" / whole.path.name
    assert (folder / "partial.safetensors").exists() and not (folder / "meta.json").exists()
    resumed = do_walk()
    assert resumed.meta == {"resumed_at": resumed_at}
    assert resumed.key == whole.key
    assert sorted(p.name for p in folder.iterdir()) == ["data.safetensors", "meta.json"]


def test_seconds_add_up_over_resumed_parts():
    def interrupted(checkpoint):
        time.sleep(0.3)
        checkpoint.save({}, {})
        raise KeyboardInterrupt

    def rest(checkpoint):
        assert checkpoint.load() == ({}, {})
        return {}, {}

    with pytest.raises(KeyboardInterrupt):
        do_walk(interrupted)
    assert 0.3 <= do_walk(rest).seconds < 0.6


def test_two_runs_at_once_make_a_stage_once(capsys):
    def slow(checkpoint):
        time.sleep(0.5)
        return walk(checkpoint)

    with ThreadPoolExecutor(2) as pool:  # the lock holds between threads as between processes
        results = list(pool.map(do_walk, [slow, slow]))
    assert sorted(result.cached for result in results) == [False, True]
    assert "another process is busy with walk seed7; waiting" in capsys.readouterr().err


# ---- corruption ----------------------------------------------------------------------------------


def flip_last_byte(path: Path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def scribble(path: Path):
    path.write_bytes(b"not a file of ours")


@pytest.mark.parametrize("damage", [flip_last_byte, cut, scribble, Path.unlink])
def test_corrupt_tensors_are_named_and_made_again(damage, capsys):
    made = do_walk()
    damage(made.path / "data.safetensors")
    again = do_walk()
    assert not again.cached and again.key == made.key
    message = capsys.readouterr().err
    assert f"{made.path / 'data.safetensors'} is corrupt or missing" in message
    assert "walk seed7 is made again" in message
    assert do_walk(must_not_run).cached


@pytest.mark.parametrize("damage", [cut, scribble])
def test_a_corrupt_meta_is_named_and_the_stage_made_again(damage, capsys):
    made = do_walk()
    damage(made.path / "meta.json")
    assert do_walk().key == made.key
    assert f"{made.path / 'meta.json'} cannot be read" in capsys.readouterr().err


def test_a_changed_number_in_meta_is_found(capsys):
    made = do_walk()
    meta = made.path / "meta.json"
    meta.write_text(meta.read_text().replace('"resumed_at": 0', '"resumed_at": 1'))
    assert do_walk().meta == {"resumed_at": 0}
    assert f"{meta} is corrupt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip_last_byte, cut, scribble])
def test_a_corrupt_partial_is_named_and_the_stage_starts_anew(damage, capsys):
    def interrupted(checkpoint):
        checkpoint.save({"state": torch.ones(100)}, {"step": 3})
        raise KeyboardInterrupt

    whole = do_walk()
    (whole.path / "meta.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        do_walk(interrupted)
    damage(whole.path / "partial.safetensors")
    again = do_walk()
    assert again.meta == {"resumed_at": 0} and again.key == whole.key
    message = capsys.readouterr().err
    assert str(whole.path / "partial.safetensors") in message and "starts anew" in message


# ---- the disk ------------------------------------------------------------------------------------


def test_no_space_leaves_no_half_file_and_says_what_is_needed(monkeypatch, tmp_path):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*data\.safetensors: No space left") as caught:
        do_walk(lambda _: ({"x": torch.zeros(250_000)}, {}))
    assert "needs 1 MB" in str(caught.value) and "DINV_CACHE" in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("data.safetensors"))


def test_the_error_of_the_writer_itself_is_explained(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    message = r"cannot write .*x\.safetensors: .*File too large"
    try:
        with pytest.raises(OSError, match=message) as caught:
            store.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(9999)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "needs 0.04 MB" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["DINV_CACHE", "DINV_FIGURES"])
def test_a_file_where_a_folder_should_be(tmp_path, monkeypatch, variable):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    message = f"{tmp_path / 'file'} is a file, but a folder should be there: .*{variable}"
    with pytest.raises(NotADirectoryError, match=message):
        new_run()


# ---- budget and progress -------------------------------------------------------------------------


def test_a_deadline_stops_after_saving_and_the_next_run_goes_on(monkeypatch):
    monkeypatch.setenv("DINV_DEADLINE", str(time.time() - 1))
    with pytest.raises(BudgetExceeded, match="same command goes on"):
        do_walk(must_not_run)

    def until_late(checkpoint):
        monkeypatch.setenv("DINV_DEADLINE", str(time.time() - 1))
        return walk(checkpoint)

    monkeypatch.setenv("DINV_DEADLINE", str(time.time() + 100))
    with pytest.raises(BudgetExceeded):
        do_walk(until_late)
    monkeypatch.delenv("DINV_DEADLINE")
    assert do_walk().meta == {"resumed_at": 1}
    monkeypatch.setenv("DINV_DEADLINE", str(time.time() - 1))
    assert do_walk(must_not_run).cached


def test_progress_goes_to_the_file_and_nowhere_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("DINV_PROGRESS", str(tmp_path / "progress.jsonl"))
    do_walk()
    do_walk(must_not_run)
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").open()]
    assert [line["state"] for line in lines][0] == "start"
    assert [line["state"] for line in lines][-2:] == ["done", "cached"]
    last = [line for line in lines if line["state"] == "run"][-1]
    assert (last["chapter"], last["stage"]) == ("02_example", "walk seed7")
    assert (last["done"], last["total"]) == (STEPS, STEPS)
    assert last["numbers"].keys() == {"mean"} and last["elapsed"] > 0
    assert capfd.readouterr() == ("", "")


def test_a_progress_file_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DINV_PROGRESS", str(tmp_path / "gone" / "progress.jsonl"))
    assert not do_walk().cached


def test_a_notebook_or_terminal_sees_a_bar_on_stderr(monkeypatch, capfd):
    monkeypatch.setattr("dinv.runs.progress.interactive", lambda: True)
    do_walk()
    out, err = capfd.readouterr()
    assert out == "" and "walk seed7" in err and f"/{STEPS}" in err


def test_the_repository_root_is_this_checkout():
    assert (runs.repository_root() / "dinv" / "runs" / "__init__.py").is_file()
