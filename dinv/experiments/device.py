"""What a run computes on: the environment variable DINV_DEVICE, and what a profile means by "auto"."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from dinv.precision import choose

CHOICES = ("auto", "cpu", "cuda")
NEED_CUDA = ("gpu", "paper")  # profiles that would take a CPU weeks
DRIVERS = {"12": 525, "13": 580}  # major version of CUDA -> the oldest driver it runs with

_profile = ""  # of the chapter that began last


def pick(profile: str) -> str:
    """Where a profile computes, "cpu" or "cuda"; ValueError if that needs CUDA and there is none.

    "auto" is CUDA where it is; profile cpu means the CPU unless DINV_DEVICE=cuda.
    """
    choice = os.environ.get("DINV_DEVICE") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"DINV_DEVICE={choice!r}: expected one of {', '.join(CHOICES)}")
    if choice == "cpu" or (choice == "auto" and profile == "cpu"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if choice == "cuda":
        raise ValueError(f"DINV_DEVICE=cuda, but there is no CUDA device: {reason()}")
    if profile in NEED_CUDA:
        raise ValueError(
            f"profile {profile} needs a CUDA device, and there is none: {reason()}. Profile cpu is made "
            "for machines without one; DINV_DEVICE=cpu runs this one on the CPU all the same"
        )
    return "cpu"


def begin(profile: str) -> str:
    """As `pick`; `current` keeps to this profile. On a card equal calls give equal bytes from now on."""
    global _profile
    _profile, kind = profile, pick(profile)
    if kind == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the card is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32; networks learn in bfloat16
    return kind


def current() -> str:
    """Where the chapter that began last computes, "cpu" or "cuda"."""
    return pick(_profile)


def device() -> torch.device:
    """`current` as torch has it."""
    return torch.device(current())


def device_name() -> str:
    """The name of the card, or of the CPU as far as the system tells it."""
    if current() == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError):
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()


def precision() -> str:
    """What networks compute in there unless their structure or a setting says otherwise."""
    return choose("auto", device())


def reason() -> str:
    """Why torch finds no CUDA device, as far as the system tells it."""
    build = torch.version.cuda
    if not build:
        return f"torch {torch.__version__} is built without CUDA"
    text = f"torch {torch.__version__} is built for CUDA {build}"
    oldest, version = DRIVERS.get(build.partition(".")[0]), driver()
    if oldest:
        text += f" and needs NVIDIA's driver {oldest} or newer"
    if not version:
        return f"{text}; no driver was found"
    if oldest and int(version.partition(".")[0]) < oldest:
        return f"{text}; the driver here is {version}: too old"
    return f"{text}; the driver here is {version}, but it shows torch no card"


def driver() -> str | None:
    """The version of NVIDIA's driver, None where none is found."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    if not text:  # the only way in WSL
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.TimeoutExpired):
            text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return match.group() if match else None
