"""dinv: what a trained network remembers of its lost training set, and what to do with it.

from dinv import (
    CrossEntropy, FeatureStatistics, InversionSettings, TotalVariation, balanced_labels, invert, load_model,
)

teacher, labels = load_model("resnet_small"), balanced_labels(64, 10)
objective = CrossEntropy() + 2.5e-5 * TotalVariation() + 1.0 * FeatureStatistics()
images = invert(teacher, labels, objective, InversionSettings(steps=100, rate=0.1, schedule="cosine")).images
"""

from dinv.datasets import Dataset, load_dataset
from dinv.distillation import DistillationSettings, PixelSource, ReadySource, distill
from dinv.features import NoBatchNorm, Statistics, batchnorm_statistics, measure_statistics
from dinv.generator import GeneratorSettings, GeneratorSource, generate
from dinv.inversion import Inversion, InversionSettings, NotFinite, balanced_labels, invert
from dinv.models import Classifier, create_model, load_model
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
from dinv.profiles import load_profile
from dinv.runs import BudgetExceeded, Run

__version__ = "0.1.0"

__all__ = [
    "BudgetExceeded",
    "Classifier",
    "Competition",
    "CrossEntropy",
    "Dataset",
    "DistillationSettings",
    "FeatureStatistics",
    "GeneratorSettings",
    "GeneratorSource",
    "Inversion",
    "InversionSettings",
    "L2Norm",
    "NoBatchNorm",
    "NotFinite",
    "Objective",
    "PixelSource",
    "Pool",
    "ReadySource",
    "Run",
    "Statistics",
    "Term",
    "TotalVariation",
    "balanced_labels",
    "batchnorm_statistics",
    "create_model",
    "distill",
    "generate",
    "invert",
    "load_dataset",
    "load_model",
    "load_profile",
    "measure_statistics",
    "synthesize",
]
