"""Networks: one name space, one kind of object (`Classifier`)."""

from dinv.models.checkpoints import CorruptCheckpoint, load_weights
from dinv.models.classifier import (
    Classifier,
    Unfit,
    evaluating,
    inputs_of,
    parameter_count,
    places,
    resized,
    to_float,
)
from dinv.models.pretrained import WeightsUnavailable
from dinv.models.zoo import DOMAINS, NETWORKS, create_model, load_model, shipped_models

__all__ = [
    "DOMAINS", "NETWORKS", "Classifier", "CorruptCheckpoint", "Unfit", "WeightsUnavailable",
    "create_model", "evaluating", "inputs_of", "load_model", "load_weights", "parameter_count", "places",
    "resized", "shipped_models", "to_float",
]  # fmt: skip
