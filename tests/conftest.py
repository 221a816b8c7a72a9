"""Tiny networks on which everything shows within milliseconds; what a network is inside; interruptions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinv.experiments.profiles import load_profile
from dinv.models import Classifier

# Equations are compared to many digits, on every machine; test_precision asks for bfloat16 itself.
os.environ.setdefault("DINV_PRECISION", "float32")


def _tiny(
    seed: int = 0,
    channels: int = 3,
    size: int = 8,
    classes: int = 5,
    norm: bool = True,
    activation: type[nn.Module] = nn.ReLU,
) -> Classifier:
    """Two convolutions and a linear layer with random weights; BatchNorm has seen smooth images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            activation(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=not norm),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            activation(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, classes),
        )
        for layer in net:
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # running statistics are plain averages
                nn.init.uniform_(layer.weight, 0.5, 2)
                nn.init.normal_(layer.bias)
        smooth = F.interpolate(2 * torch.randn(64, channels, 2, 2), size=(size, size), mode="bilinear")
        with torch.no_grad():
            features = net[:8](smooth)
            net[8].weight *= 8  # every class is within reach
            net[8].bias -= net[8](features).mean(0)
    mean, std = (0.3, 0.45, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return Classifier(net, mean, std, size, [f"class{i}" for i in range(classes)], "tiny").eval()


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def _portrait(model: nn.Module) -> dict:
    """All of a network that a careless inversion could change, bytes and flags."""
    state = model.state_dict(keep_vars=True)
    flat = {k: v.detach().contiguous().reshape(-1) for k, v in state.items()}
    return {
        "bytes": {k: v.view(torch.uint8).tolist() for k, v in flat.items()},
        "strides": {k: v.stride() for k, v in state.items()},
        "writes": {k: v._version for k, v in state.items()},
        "needs gradient": {k: v.requires_grad for k, v in state.items()},
        "gradients": [k for k, v in state.items() if v.grad is not None],
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": _hooks(model),
    }


@pytest.fixture(autouse=True)
def _seeded():
    """Weights and images that a test draws without a generator are the same at every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny():
    """`tiny(seed=0, channels=3, size=8, classes=5, norm=True)`: a new small random classifier."""
    return _tiny


@pytest.fixture(scope="session")
def hooks():
    """`hooks(model)`: how many hooks its modules carry."""
    return _hooks


@pytest.fixture(scope="session")
def portrait():
    """`portrait(model)`: bytes, flags and hooks of a network, to compare before and after."""
    return _portrait


# ---- stages ----------------------------------------------------------------------------------------
@pytest.fixture
def apart(tmp_path, monkeypatch) -> Path:
    """Cache and results in a folder of the test's own; no wish of the caller's, no bar."""
    for name in ("DEVICE", "PROFILE", "DATA"):
        monkeypatch.delenv(f"DINV_{name}", raising=False)
    monkeypatch.setenv("DINV_CACHE", str(tmp_path / "runs"))
    monkeypatch.setenv("DINV_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("DINV_QUIET", "1")
    monkeypatch.setattr("dinv.experiments.device._profile", "")
    return tmp_path


@pytest.fixture
def ledger(apart, monkeypatch) -> list[dict]:
    """What the stages of this test have written into `cache.ledger`, which is empty at first."""
    entries: list[dict] = []
    monkeypatch.setattr("dinv.experiments.cache.ledger", entries)
    return entries


@pytest.fixture
def short_profile(apart):
    """`short_profile(overrides)`: the smoke profile with the shipped networks and these numbers."""

    def load(overrides: dict | None = None):
        return load_profile("smoke", {"retrain": False} | (overrides or {}))

    return load


# ---- interruptions -------------------------------------------------------------------------------
class _Memory:
    """A checkpoint in memory; its `fail`-th save is made, and then ends the run."""

    def __init__(self, fail: int | None = None):
        self.saved, self.fail, self.saves, self.told = None, fail, 0, []

    def load(self):
        return self.saved

    def save(self, make):
        tensors, meta = make()
        self.saved = {name: tensor.clone() for name, tensor in tensors.items()}, dict(meta)
        self.saves += 1
        if self.saves == self.fail:
            raise KeyboardInterrupt

    def progress(self, done, total, **numbers):
        self.told.append((done, total))


@pytest.fixture(scope="session")
def memory():
    """`memory(fail=None)`: stands in for `cache.Checkpoint`; interrupts after its `fail`-th save."""
    return _Memory


# One process that forks for every moment: importing torch takes longer than what is killed. Each of the
# test modules has a function `stage` that makes one short stage in DINV_CACHE.
_KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch._dynamo  # every optimiser wants it
import test_distillation, test_pool, test_training
from dinv import distillation, files, inversion, training
from dinv.experiments import cache
cache.Checkpoint.share = float("inf")  # every save is made
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
def dying(function, left):
    left = iter(range(left))
    return lambda *given, **options: die() if next(left, None) is None else function(*given, **options)
def half(tensors, path, metadata=None, save=files.save_file, left=iter(range(1))):
    save(tensors, path, metadata)
    if next(left, None) is None:
        os.truncate(path, os.path.getsize(path) // 2)
        die()
for number in range(9):
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (number, status)
        continue
    os.environ["DINV_CACHE"] = {cache!r} + str(number)
    if number % 3 == 0:
        inversion.jittered = dying(inversion.jittered, 15)  # of 6 steps a batch
        training.augment = dying(training.augment, 6)  # of 4 an epoch
        distillation.augment = dying(distillation.augment, 13)  # of 5 a round
    if number % 3 == 1:
        files.save_file = half
    if number % 3 == 2:
        write = files.write_tensors
        last = lambda path: path.name == "data.safetensors"
        files.write_tensors = lambda path, *given: die() if last(path) else write(path, *given)
    (test_pool, test_training, test_distillation)[number // 3].stage()
    os._exit(0)
print("killed nine times")
"""


@pytest.fixture(scope="session")
def killed(tmp_path_factory) -> dict[str, list[Path]]:
    """Cache folders of the stages of test_pool, test_training and test_distillation, killed by SIGKILL.

    Three each: in the middle of a batch, epoch or round, in the middle of the second write, before the last.
    """
    folder, here = tmp_path_factory.mktemp("killed"), Path(__file__).parent
    script = _KILLED.format(path=[str(here), str(here.parent)], cache=str(folder / "cache"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DINV_") or k == "DINV_PRECISION"}
    clean["DINV_FIGURES"] = str(folder / "figures")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean)
    assert "killed nine times" in run.stdout, run.stderr
    caches = [folder / f"cache{number}" for number in range(9)]
    return {"pool": caches[:3], "training": caches[3:6], "distillation": caches[6:]}
