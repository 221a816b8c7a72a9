"""What networks compute in: bfloat16 where the hardware multiplies it and the networks gain, else float32.

Weights, statistics, losses and softmax are float32 in either case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import field
from functools import wraps
from typing import Any

import torch
from torch import nn

CHOICES = ("auto", "float32", "bfloat16")


def setting() -> Any:
    """The field `precision` of a class of settings; at "auto" it is no part of a digest."""
    return field(default="auto", metadata={"silent": True})


def choose(choice: str, device: torch.device, *networks: nn.Module) -> str:
    """What these networks compute in on `device`: by capability and structure, never by a timing.

    Args:
        choice: "auto" is DINV_PRECISION where it is set, else bfloat16 where `supported`, but not on a CPU
            for networks with grouped convolutions: those move data more than they multiply.

    Raises:
        ValueError: neither `choice` nor DINV_PRECISION may be anything else.
    """
    choice = (os.environ.get("DINV_PRECISION") or "auto") if choice == "auto" else choice
    if choice not in CHOICES:
        raise ValueError(f"unknown precision {choice!r}: choose {', '.join(CHOICES)}")
    if choice != "auto":
        return choice
    modules = [module for network in networks for module in network.modules()]
    grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in modules)
    return "bfloat16" if supported(device) and (device.type == "cuda" or not grouped) else "float32"


def supported(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16: a card from Ampere on, a CPU with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """While open, layers compute in `precision`, "float32" or "bfloat16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def own_defaults(dtype: torch.dtype | None = None) -> Iterator[None]:
    """While open: gradients on, CPU and float32 (or float64) as defaults, whatever the caller has set."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
        stack.callback(torch.set_default_dtype, before)
        yield


def settled(function: Callable) -> Callable:
    """The function under `own_defaults`; a classifier in front, or its teacher, gives the type."""

    @wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        first = getattr(args[0], "teacher", args[0]) if args else None
        with own_defaults(getattr(first, "dtype", None) if isinstance(first, nn.Module) else None):
            return function(*args, **options)

    return wrapped
