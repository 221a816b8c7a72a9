"""CIFAR-10, MNIST and scikit-learn's digits, and how they are augmented."""

from dinv.data.dataset import DATASETS, Dataset, augment, data_root, load_dataset, mixup, strong, to_rgb
from dinv.data.sources import SPLITS, DatasetUnavailable

__all__ = [
    "DATASETS", "SPLITS", "Dataset", "DatasetUnavailable", "augment", "data_root", "load_dataset", "mixup",
    "strong", "to_rgb",
]  # fmt: skip
