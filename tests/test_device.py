"""DINV_DEVICE and the profile decide what is computed on; where CUDA is missing, the reason is told."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from dinv.experiments import device
from dinv.experiments.notebook import start


@pytest.fixture
def card(apart, monkeypatch):
    """`card(there)`: torch finds a card called "H100", or none; nothing is wished."""

    def pretend(there: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: there)

    pretend(True)
    return pretend


@pytest.mark.parametrize(
    "wish, profile, there, kind",
    [
        ("", "gpu", True, "cuda"), ("", "smoke", True, "cuda"), ("", "smoke", False, "cpu"),
        ("auto", "cpu", True, "cpu"), ("cuda", "cpu", True, "cuda"),
        ("cpu", "gpu", True, "cpu"), ("cpu", "paper", False, "cpu"), ("cpu", "smoke", True, "cpu"),
    ],
)  # fmt: skip
def test_the_wish_and_the_profile_decide(card, monkeypatch, wish, profile, there, kind):
    card(there)
    monkeypatch.setenv("DINV_DEVICE", wish)
    assert device.pick(profile) == kind


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
        device.pick(profile)


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
    monkeypatch.setattr(device, "driver", lambda: driver)
    assert re.search(message, device.reason())


@pytest.mark.parametrize(
    "file, told, version",
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\nGCC 12.3.0\n", "", "580.65.06"),
        (None, "535.129.03\n", "535.129.03"), (None, "NVIDIA-SMI has failed\n", None),
    ],
)  # fmt: skip
def test_the_drivers_version(monkeypatch, tmp_path, file, told, version):
    if file:
        (tmp_path / "version").write_text(file)
    monkeypatch.setattr(device, "Path", lambda _: Path(tmp_path / "version"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, told))
    assert device.driver() == version


def test_a_chapter_keeps_to_its_profile(card, monkeypatch, capsys):
    monkeypatch.delenv("DINV_PRECISION", raising=False)
    monkeypatch.setattr("dinv.precision.supported", lambda place: place.type == "cuda")
    assert (device.device().type, device.device_name(), device.precision()) == ("cuda", "H100", "bfloat16")
    start("x", "cpu")
    assert (device.device().type, device.precision()) == ("cpu", "float32") and device.device_name() != "H100"
    start("x", "gpu")
    assert device.current() == "cuda"
    monkeypatch.setenv("DINV_DEVICE", "cpu")
    assert device.current() == "cpu"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("profile cpu on cpu (") and lines[1] == "profile gpu on cuda (H100, bfloat16)"
