"""The paper's numbers, each with how well it is known.

The marks: V, confirmed in a second public source; S, one secondary source only; M, recalled and not
confirmed. No number is shown without its mark.
"""

from __future__ import annotations

import pandas as pd

Known = tuple[float, str] | None  # a number and its mark; None where the paper has none

PAIRS = ("cifar_vgg11->cifar_vgg11", "cifar_vgg11->cifar_resnet18", "cifar_resnet34->cifar_resnet18")

# Table 1: CIFAR-10, a student's top-1 in percent, by pair of teacher and student in the order of `PAIRS`.
TABLE1: dict[str, tuple[Known, ...]] = {
    "teacher": ((92.34, "S"), (92.34, "S"), (95.42, "S")),
    "noise, optimised": ((13.55, "S"), (13.45, "S"), (13.61, "M")),  # by the cross-entropy alone [M]
    "DeepDream": ((36.59, "S"), (39.67, "S"), (29.98, "S")),
    "generator": (None, None, (92.22, "V")),  # DAFL, as the paper quotes it
    "DeepInversion": ((84.16, "S"), (83.82, "S"), (91.43, "S")),
    "ADI": ((90.78, "S"), (90.36, "S"), (93.26, "V")),
}

# Table 2: share of ResNet-50's images that another network takes for their class, percent.
TABLE2: dict[str, tuple[Known, ...]] = {
    "ResNet-18": ((28.0, "M"), (94.4, "M")),
    "Inception-v3": ((27.6, "M"), (92.7, "M")),
    "MobileNet-v2": ((13.9, "M"), (90.9, "M")),
    "VGG-11": ((6.7, "M"), (80.1, "M")),
}

# Table 4: ResNet-50, ImageNet top-1 in percent after the removal of a share of its filters.
TABLE4: dict[str, tuple[Known, ...]] = {
    "no fine-tuning": ((16.6, "M"), (1.9, "M")),
    "DeepInversion": (None, (55.9, "M")),
    "ADI": ((73.3, "M"), (60.7, "M")),
}

# Table 6: ImageNet top-1 in percent of a fresh ResNet-50 that was taught on 140,000 images.
TABLE6: dict[str, tuple[Known, ...]] = {
    "teacher": ((77.26, "V"),),
    "90 epochs": ((68.0, "V"),),
    "250 epochs": ((73.8, "M"),),
}

# Table 7: ResNet-18 of ImageNet extended by a second data set, mean of top-1 on old and new classes, percent.
TABLE7: dict[str, tuple[Known, ...]] = {
    "LwF.MC": ((47.64, "S+M"), None),
    "DeepInversion": ((67.61, "S+M"), (80.85, "S+M")),
}

TABLES: dict[str, tuple[tuple[str, ...], dict[str, tuple[Known, ...]]]] = {  # name -> columns, rows
    "table1": (("VGG-11 → VGG-11", "VGG-11 → ResNet-18", "ResNet-34 → ResNet-18"), TABLE1),
    "table2": (("DeepDream", "DeepInversion"), TABLE2),
    "table3": (("Inception Score",), {"DeepDream": ((6.2, "M"),), "DeepInversion": ((60.6, "M"),)}),
    "table4": (("ResNet-50, -20 % filters", "ResNet-50, -50 % filters"), TABLE4),
    "table6": (("ResNet-50",), TABLE6),
    "table7": (("ImageNet + CUB", "ImageNet + Flowers"), TABLE7),
    # 84 images of ResNet-50: 2,000 iterations at 112 pixels, then 1,000 at 224
    "fast": (("minutes on a V100", "% right by the verifier"), {"84 images": ((6.0, "V"), (91.6, "M"))}),
}


def table(name: str) -> pd.DataFrame:
    """One of `TABLES`, such as "table1", every number with its mark. KeyError for another name."""
    columns, rows = TABLES[name]
    cells = {row: [marked(*known) if known else "–" for known in entries] for row, entries in rows.items()}
    return pd.DataFrame.from_dict(cells, orient="index", columns=list(columns)).rename_axis("the paper")


def marked(value: float, marks: str) -> str:
    """ "93.26 [V]"; "67.61 [S]+[M]"."""
    return f"{value:g} " + "+".join(f"[{mark}]" for mark in marks.split("+"))
