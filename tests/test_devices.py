"""DINV_DEVICE and the profile decide what is computed on; where CUDA is missing, the reason is told."""

import subprocess
from pathlib import Path

import pytest
import torch

from dinv import chapters, devices
from dinv.runs import machine


@pytest.fixture
def card(monkeypatch):
    """`card(there)`: torch finds a card called "H100", or none; nothing is wished."""

    def pretend(there: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)

    monkeypatch.delenv("DINV_DEVICE", raising=False)
    monkeypatch.delenv("DINV_PROFILE", raising=False)
    monkeypatch.setattr(devices, "_profile", "")
    pretend(True)
    return pretend


@pytest.mark.parametrize(
    "wish, profile, there, device",
    [
        ("", "gpu", True, "cuda"), ("", "smoke", True, "cuda"), ("", "smoke", False, "cpu"),
        ("auto", "cpu", True, "cpu"), ("cuda", "cpu", True, "cuda"),
        ("cpu", "gpu", True, "cpu"), ("cpu", "paper", False, "cpu"), ("cpu", "smoke", True, "cpu"),
    ],
)  # fmt: skip
def test_the_wish_and_the_profile_decide(card, monkeypatch, wish, profile, there, device):
    card(there)
    monkeypatch.setenv("DINV_DEVICE", wish)
    assert devices.pick(profile) == device


@pytest.mark.parametrize(
    "wish, profile, message",
    [
        ("gpu", "cpu", "DINV_DEVICE='gpu': expected one of auto, cpu, cuda"),
        ("cuda", "smoke", "DINV_DEVICE=cuda, but there is no CUDA device: torch .* is built"),
        ("", "gpu", "profile gpu needs a CUDA device, and there is none: .* DINV_DEVICE=cpu runs this"),
        ("auto", "paper", "profile paper needs a CUDA device"),
    ],
)
def test_what_cannot_be_is_refused(card, monkeypatch, wish, profile, message):
    card(False)
    monkeypatch.setenv("DINV_DEVICE", wish)
    with pytest.raises(ValueError, match=message):
        devices.pick(profile)


@pytest.mark.parametrize(
    "build, driver, message",
    [
        ("13.2", "535.129.03", "CUDA 13.2 and needs .* driver 580 or newer; .* 535.129.03: too old"),
        ("13.2", "580.65", "the driver here is 580.65, but it shows torch no card"),
        ("12.6", None, "needs NVIDIA's driver 525 or newer; no driver was found"),
        ("99.0", "999.1", "built for CUDA 99.0; the driver here is 999.1, but"),
        (None, "580.65", "is built without CUDA$"),
    ],
)
def test_why_there_is_no_cuda(monkeypatch, build, driver, message):
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(devices, "driver", lambda: driver)
    with pytest.raises(ValueError, match=message):
        raise ValueError(devices.reason())


def test_the_drivers_version(monkeypatch, tmp_path):
    told = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build"
    (tmp_path / "version").write_text(f"{told}\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "version")
    assert devices.driver() == "580.65.06"
    (tmp_path / "version").unlink()
    done = subprocess.CompletedProcess([], 0, "535.129.03\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert devices.driver() == "535.129.03"
    done.stdout = "NVIDIA-SMI has failed\n"
    assert devices.driver() is None
    monkeypatch.undo()
    if not Path("/proc/driver/nvidia").exists():
        monkeypatch.setenv("PATH", str(tmp_path))
        assert devices.driver() is None


def test_a_chapter_keeps_to_its_profile(card, apart, monkeypatch):
    assert chapters.device().type == "cuda" and machine.device_name() == "H100"
    chapters.start("x", "cpu")
    assert chapters.device().type == "cpu" and machine.device_name() == machine.processor()
    assert machine.describe()["peak_cuda_memory_mb"] is None
    chapters.start("x", "gpu")
    assert chapters.device().type == "cuda" and machine.describe()["peak_cuda_memory_mb"] == 1
    monkeypatch.setenv("DINV_DEVICE", "cpu")
    assert chapters.device().type == "cpu"


def test_auto_is_not_a_cards_profile_on_the_cpu(card, apart, monkeypatch):
    assert chapters.start("x").profile.name == "gpu"
    monkeypatch.setenv("DINV_DEVICE", "cpu")
    assert chapters.start("x").profile.name == "cpu"
    monkeypatch.setenv("DINV_PROFILE", "smoke")
    assert chapters.start("x").profile.name == "smoke"
    assert chapters.start("x", "gpu").profile.name == "gpu"
