"""What a run computes on: the environment variable DINV_DEVICE, and what a profile means by "auto".

Standard library only until CUDA is asked for: `reproduce/cli.py` reads it where nothing is installed yet.
"""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

CHOICES = ("auto", "cpu", "cuda")
NEED_CUDA = ("gpu", "paper")  # profiles that would take a CPU weeks
DRIVERS = {"12": 525, "13": 580}  # major version of CUDA -> the oldest driver it runs with

_profile = ""  # of the chapter that began last


def wanted() -> str:
    """DINV_DEVICE, "auto" where it is not set; ValueError if it is none of CHOICES."""
    choice = os.environ.get("DINV_DEVICE") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"DINV_DEVICE={choice!r}: expected one of {', '.join(CHOICES)}")
    return choice


def pick(profile: str) -> str:
    """Where a profile computes, "cpu" or "cuda".

    "auto" is CUDA where it is; profile cpu means the CPU unless DINV_DEVICE=cuda.

    Raises:
        ValueError: there is no CUDA, and DINV_DEVICE or the profile needs it; says why there is none.
    """
    choice = wanted()
    if choice == "cpu" or (choice == "auto" and profile == "cpu"):
        return "cpu"
    if cuda():
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
    """As `pick`; `current` keeps to this profile from now on."""
    global _profile
    _profile = profile
    return pick(profile)


def current() -> str:
    """Where the chapter that began last computes, "cpu" or "cuda"."""
    return pick(_profile)


def cuda() -> bool:
    """Whether torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()


def reason() -> str:
    """Why torch finds no CUDA device, as far as the system tells it."""
    import torch

    build = torch.version.cuda
    if not build:
        return f"torch {torch.__version__} is built without CUDA"
    text = f"torch {torch.__version__} is built for CUDA {build}"
    oldest, found = DRIVERS.get(build.partition(".")[0]), driver()
    if oldest:
        text += f" and needs NVIDIA's driver {oldest} or newer"
    if not found:
        return f"{text}; no driver was found"
    if oldest and int(found.partition(".")[0]) < oldest:
        return f"{text}; the driver here is {found}: too old"
    return f"{text}; the driver here is {found}, but it shows torch no card"


def driver() -> str | None:
    """The version of NVIDIA's driver, None where none is found."""
    with suppress(OSError):
        return _version(Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.TimeoutExpired):  # the only way in WSL
        return _version(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
    return None


def _version(text: str) -> str | None:
    """The first number such as 580.65.06 in a text."""
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return match.group() if match else None
