"""dinv: what a trained network remembers of its lost training set, and what to do with it.

from dinv import (
    CrossEntropy, FeatureStatistics, InversionSettings, TotalVariation, balanced_labels, invert, load_model,
)

teacher, labels = load_model("resnet_small"), balanced_labels(64, 10)
objective = CrossEntropy() + 2.5e-5 * TotalVariation() + 1.0 * FeatureStatistics()
images = invert(teacher, labels, objective, InversionSettings(steps=100, lr=0.1, schedule="cosine")).images
"""

from dinv.continual import ContinualSettings, extend, learn
from dinv.data import Dataset, load_dataset
from dinv.distillation import DistillationSettings, DistillStep, FixedImages, InversionSource, distill
from dinv.feature_statistics import NoBatchNorm, Statistics, batchnorm_statistics, measure_statistics
from dinv.generator import GeneratorSettings, GeneratorSource, generate
from dinv.inversion import Inversion, InversionSettings, Inverter, balanced_labels, invert
from dinv.models import Classifier, Unfit, create_model, load_model
from dinv.objectives import (
    Competition,
    CrossEntropy,
    FeatureStatistics,
    L2Norm,
    Objective,
    Term,
    TotalVariation,
)
from dinv.pool import Pool, synthesize
from dinv.pruning import PruningSettings, load_pruned, prune
from dinv.step import NotFinite
from dinv.training import TrainingSettings, train

__version__ = "0.1.0"

__all__ = [
    "Classifier", "Competition", "ContinualSettings", "CrossEntropy", "Dataset", "DistillStep",
    "DistillationSettings", "FeatureStatistics", "FixedImages", "GeneratorSettings", "GeneratorSource",
    "Inversion", "InversionSettings", "InversionSource", "Inverter", "L2Norm", "NoBatchNorm", "NotFinite",
    "Objective", "Pool", "PruningSettings", "Statistics", "Term", "TotalVariation", "TrainingSettings",
    "Unfit", "balanced_labels", "batchnorm_statistics", "create_model", "distill", "extend", "generate",
    "invert", "learn", "load_dataset", "load_model", "load_pruned", "measure_statistics", "prune",
    "synthesize", "train",
]  # fmt: skip
