"""Files that are whole or absent, and digests that tell every two values apart."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinv import files
from dinv.checks import near
from dinv.files import Corrupt, digest, locked, to_cpu
from dinv.models import create_model


@dataclass
class Settings:
    steps: int = 1
    callback: object = None
    note: str = field(default="", compare=False)


class Parts:
    def __init__(self, value):
        self.value = value

    def digest_parts(self):
        return vars(self)


VALUES = [
    None, True, False, 1, 1.0, "1", "", [], {}, [1], [[1]], [1, 2], {"a": 1}, {"b": 1}, {"a": [1]}, 0.0, -0.0,
    torch.zeros(0), torch.zeros(2, 0), torch.tensor(1), torch.ones(2), torch.ones(1, 2), torch.ones(2).half(),
    torch.tensor([True]), Settings(), Settings(2), Settings(1, "x"), Parts(1), Parts(2), Parts(Parts(1)),
    nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()),
]  # fmt: skip


def test_values_that_differ_have_digests_that_differ():
    assert len({digest(value) for value in VALUES}) == len(VALUES)
    networks = [create_model("vgg_digits", "digits", seed=seed) for seed in (0, 0, 1)]
    one, same, other = map(digest, networks)
    assert one == same != other
    networks[1].name = "another"
    assert digest(networks[1]) != one


def test_equal_values_have_equal_digests():
    x = torch.randn(2, 3, 4, 4)
    equal = [
        ([1, (2,)], (1, [2])),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (Settings(note="of no account"), Settings()),
        (x, x.to(memory_format=torch.channels_last)),
        (x, nn.Parameter(x)),
        (x[:, ::2], x[:, ::2].clone()),
    ]
    for one, other in equal:
        assert digest(one) == digest(other)


def test_a_digest_is_the_same_in_another_process():
    program = "import torch, dinv.files as f; print(f.digest({'x': [1.5, torch.arange(3)], 'a': {}}))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(files.__file__).parent.parent)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == digest({"a": {}, "x": (1.5, torch.arange(3))}), run.stderr


@pytest.mark.parametrize(
    "value, message",
    [
        (len, "the value is a builtin_function"),
        ({"settings": Settings(callback=len)}, r"settings\.callback is a builtin_function"),
        ({"loss": {"weights": [1, float("nan")]}}, r"loss\.weights\[1\] is a float \(nan\), .* finite"),
        (Parts(Parts({1})), r"value\.value is a set"),
        ({1: 2}, r"is a dict .*keys: str"),
        (Settings, "is a type"),
        ([torch.float32], r"\[0\] is a dtype"),
        (Path("x"), "is a PosixPath"),
    ],
)
def test_what_has_no_digest_is_named_with_its_place(value, message):
    with pytest.raises(TypeError, match=message):
        digest(value)


def test_near():
    assert near("resnet_smal", ["vgg_small", "resnet_small"]) == ": did you mean resnet_small?"
    assert near("CIFAR-10", {"cifar10": 1}) == ": did you mean cifar10?"
    assert near("svhn", ["cifar10"]) == "."


# ---- tensors and records ---------------------------------------------------------------------------
def test_tensors_come_back_as_they_were(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "transposed": shared.t(), "shared": shared, "again": shared, "half": torch.ones(3).bfloat16(),
        "scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "flags": torch.tensor([True, False]),
        "weight": nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    files.write_tensors(tmp_path / "x.safetensors", tensors, {"note": "ä", "numbers": [1, 2.5]})
    result, meta = files.read_tensors(tmp_path / "x.safetensors")
    assert result.keys() == tensors.keys() and meta == {"note": "ä", "numbers": [1, 2.5]}
    for name, tensor in tensors.items():
        assert torch.equal(result[name], tensor) and result[name].dtype == tensor.dtype
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match="'x' is a list, expected a tensor"):
        to_cpu({"x": [1]})
    for value, message in (
        (float("nan"), r"meta\.loss is a float \(nan\)"),
        (torch.ones(1), "Tensor is not JSON"),
    ):
        with pytest.raises(TypeError, match=message):
            files.write_tensors(tmp_path / "y.safetensors", {}, {"loss": value})


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "cannot be read"), (lambda _: b"", "cannot be read"), (lambda _: b"not ours", "cannot be read"),
        (flipped, "is corrupt"), (lambda content: content.replace(b"1.5", b"1.6"), "is corrupt"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, damage, message):
    path = tmp_path / "x.safetensors"
    files.write_tensors(path, {"x": torch.ones(9)}, {"seconds": 1.5})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Corrupt, match=f"{path.name} {message}"):
        files.read_tensors(path)
    save_file({"x": torch.ones(9)}, path)
    with pytest.raises(Corrupt, match="or of another origin"):
        files.read_tensors(path)


@dataclass
class Record:
    state: torch.Tensor
    sizes: tuple[tuple[str, list[int]], ...] = ()
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    note: str = ""


@pytest.mark.parametrize(
    "record",
    [
        Record(torch.ones(2), (("a", [1, 2]),), {"b": torch.zeros(1), "c": torch.ones(3)}, "x"),
        Record(torch.ones(0)),
    ],
)
def test_a_dataclass_comes_back_from_its_file(tmp_path, record):
    files.write_tensors(tmp_path / "x.safetensors", *files.packed(record))
    again = files.unpacked(Record, *files.read_tensors(tmp_path / "x.safetensors"))
    assert digest(again) == digest(record) and again.sizes == record.sizes


# ---- the disk --------------------------------------------------------------------------------------
def test_no_space_leaves_the_old_file_and_says_what_is_needed(monkeypatch, tmp_path):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.safetensors"
    path.write_text("before")
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors: No space left.* 1 MB.*DINV_CACHE"):
        files.write_tensors(path, {"x": torch.zeros(250_000)})
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "before"


def test_the_error_of_the_writer_itself_is_explained(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*x\.safetensors: .*File too large.* 0.04 MB"):
            files.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(9999)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_folders(tmp_path, monkeypatch):
    assert (files.repository_root() / "dinv" / "files.py").is_file()
    monkeypatch.setenv("DINV_CACHE", str(tmp_path / "runs"))
    assert files.cache_root() == tmp_path / "runs"
    assert files.make_folder(tmp_path / "a" / "b", "DINV_CACHE").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        message = f"{tmp_path / 'file'} is a file, but a folder should be there: .*DINV_FIGURES"
        with pytest.raises(NotADirectoryError, match=message):
            files.make_folder(path, "DINV_FIGURES")


def test_a_lock_makes_others_wait_and_is_freed_by_an_error(tmp_path, capsys):
    order = []

    def second():
        with locked(tmp_path, "the teacher"):
            order.append("second")

    thread = threading.Thread(target=second)
    with pytest.raises(KeyError), locked(tmp_path, "the teacher"):
        thread.start()
        time.sleep(0.2)
        order.append("first")
        raise KeyError
    thread.join(10)
    assert order == ["first", "second"]
    assert "another process is busy with the teacher; waiting for it" in capsys.readouterr().err
