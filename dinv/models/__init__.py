"""Networks: one name space, one kind of object (`Classifier`)."""

from dinv.models.classifier import (
    Classifier,
    autocast,
    evaluating,
    inputs_of,
    parameter_count,
    to_float,
)
from dinv.models.registry import (
    DOMAINS,
    NETWORKS,
    CorruptCheckpoint,
    create_model,
    load_model,
    load_weights,
    shipped_models,
)

__all__ = [
    "DOMAINS", "NETWORKS", "Classifier", "CorruptCheckpoint", "autocast", "create_model", "evaluating",
    "inputs_of", "load_model", "load_weights", "parameter_count", "shipped_models", "to_float",
]  # fmt: skip
