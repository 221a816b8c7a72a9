"""What a run ran on: versions, commit, device, memory."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time
from importlib import metadata

import numpy
import torch

from dinv import devices
from dinv.store import repository_root


def versions() -> dict[str, str]:
    """Versions of what decides a result's bytes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": numpy.__version__,
    }


def describe() -> dict:
    """Date, commit, versions, device and peak memory, for `provenance.json`."""
    commit, dirty = commit_of_package()
    cuda = devices.current() == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "dirty": dirty,
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "peak_memory_mb": peak_memory(),
        "peak_cuda_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None,
    }


def peak_memory() -> int:
    """The most memory this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))  # bytes there, KiB here


def device_name() -> str:
    """The name of what is computed on: the card's or the CPU's."""
    return named(devices.current())


def named(device: str) -> str:
    """The name of the card for "cuda", of the CPU for "cpu"."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def described(device: str) -> str:
    """"cpu: AMD EPYC, 2 threads", "cuda: NVIDIA H100"."""
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{device}: {named(device)}{threads}"


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "CPU"
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next(line for line in file if line.startswith("model name"))
        return line.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "CPU"


def commit_of_package() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether `dinv/` differs from it; None, None outside a checkout."""
    root = repository_root()

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if git("rev-parse", "--show-prefix"):
            return None, None  # the checkout around it is somebody else's
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "dinv"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
