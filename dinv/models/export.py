"""Networks as ONNX files, for other programs to run."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import torch

from dinv.models.classifier import Classifier


def export_onnx(network: Classifier, path: str | Path) -> Path:
    """Write `network` as an ONNX file, normalisation included; returns its path.

    Its input "images" is float32 (N, C, H, W) in [0, 1], its output "logits" (N, K); N is free.

    Raises:
        ModuleNotFoundError: the packages of the extra "onnx" are not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("exporting wants onnx and onnxscript: pip install 'dinv[onnx]'") from error
    plain = copy.deepcopy(network).cpu().freeze().to(memory_format=torch.contiguous_format)
    example = torch.zeros(2, network.channels, network.size, network.size)
    path, log = Path(path), logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of every step
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plain, (example,), str(path), dynamo=True, external_data=False, verbose=False,
                input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("images", min=1)},),
            )  # fmt: skip
    finally:
        log.setLevel(level)
    return path
