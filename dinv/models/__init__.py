"""Networks: one name space, one kind of object (`Classifier`)."""

from dinv.models.classifier import Classifier, autocast, evaluating, parameter_count
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
    "load_model", "load_weights", "parameter_count", "shipped_models",
]  # fmt: skip
