"""The paper's numbers, each with how well it is known.

The marks: V, confirmed in a second public source; S, one secondary source only; M, recalled and not
confirmed. No number is shown without its mark.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

Known = tuple[float, str] | None  # a number and its mark

PAIRS = ("cifar_vgg11->cifar_vgg11", "cifar_vgg11->cifar_resnet18", "cifar_resnet34->cifar_resnet18")

# Table 1: CIFAR-10 data-free distillation, top-1 in percent, one entry a pair.
TABLE1: dict[str, tuple[Known, ...]] = {
    "teacher": ((92.34, "S"), (92.34, "S"), (95.42, "S")),
    "noise, optimised": ((13.55, "S"), (13.45, "S"), (13.61, "M")),  # by the cross-entropy alone [M]
    "deepdream": ((36.59, "S"), (39.67, "S"), (29.98, "S")),
    "generator": (None, None, (92.22, "V")),  # DAFL, as the paper quotes it
    "deepinversion": ((84.16, "S"), (83.82, "S"), (91.43, "S")),
    "adi": ((90.78, "S"), (90.36, "S"), (93.26, "V")),
}

# Table 4: ResNet-50 on ImageNet, top-1 in percent after removing this share of the filters.
TABLE4: dict[tuple[str, float], tuple[float, str]] = {
    ("no fine-tuning", 0.2): (16.6, "M"), ("adi", 0.2): (73.3, "M"),
    ("no fine-tuning", 0.5): (1.9, "M"), ("deepinversion", 0.5): (55.9, "M"), ("adi", 0.5): (60.7, "M"),
}  # fmt: skip


# Table 2: images of ResNet-50 judged by others, top-1 in percent: DeepDream, DeepInversion.
TABLE2: dict[str, tuple[float, float, str]] = {
    "resnet18": (28.0, 94.4, "M"), "inception_v3": (27.6, 92.7, "M"),
    "mobilenet_v2": (13.9, 90.9, "M"), "vgg11": (6.7, 80.1, "M"),
}  # fmt: skip

# Table 3: Inception Score of ResNet-50's images.
TABLE3: dict[str, tuple[float, str]] = {"deepdream": (6.2, "M"), "deepinversion": (60.6, "M")}

# 84 images of ResNet-50 by the fast schedule, 2,000 iterations at 112 pixels and 1,000 at 224.
FAST: dict[str, tuple[float, str]] = {"minutes on a V100": (6.0, "V"), "% right by its judge": (91.6, "M")}

# Table 6: ImageNet top-1 of a fresh ResNet-50: its teacher, and taught on 140,000 images for so many epochs.
TABLE6: dict[str, tuple[float, str]] = {
    "teacher": (77.26, "V"), "90 epochs": (68.0, "V"), "250 epochs": (73.8, "M"),
}  # fmt: skip


# Table 7: mean top-1 of old and new classes, ResNet-18 of ImageNet extended by a second data set.
TABLE7: dict[str, tuple[Known, Known]] = {
    "lwf.mc": ((47.64, "S+M"), None), "deepinversion": ((67.61, "S+M"), (80.85, "S+M")),
}  # fmt: skip


def table(name: str) -> pd.DataFrame:
    """One of the paper's tables as it is known, every number with its mark; "table1", "2", "4" or "7"."""
    shares = tuple(dict.fromkeys(share for _, share in TABLE4))
    by_share = {row: tuple(TABLE4.get((row, share)) for share in shares) for row, _ in TABLE4}
    judged = {judge: ((dream, mark), (inverted, mark)) for judge, (dream, inverted, mark) in TABLE2.items()}
    extended = ("ImageNet + CUB", "ImageNet + Flowers")
    tables: dict[str, tuple[tuple[str, ...], Mapping[str, tuple[Known, ...]]]] = {
        "table1": (PAIRS, TABLE1),
        "table2": (("DeepDream", "DeepInversion"), judged),
        "table4": (tuple(f"ResNet-50, {-100 * share:.0f} % filters" for share in shares), by_share),
        "table7": (tuple(f"ResNet-18, {sets}" for sets in extended), TABLE7),
    }
    columns, rows = tables[name]
    cells = {row: [marked(entry) for entry in entries] for row, entries in rows.items()}
    frame = pd.DataFrame.from_dict(cells, orient="index", columns=list(columns))
    return frame.rename_axis("the paper, top-1 %")


def marked(entry: Known) -> str:
    """ "93.26 [V]", or a dash."""
    if entry is None:
        return "–"
    value, marks = entry
    return f"{value:g} " + "+".join(f"[{mark}]" for mark in marks.split("+"))


def table1(row: str, pair: str) -> dict[str, Any]:
    """The paper's number for `Run.record`: its arguments `paper` and `paper_mark`, or none of them."""
    entries = dict(zip(PAIRS, TABLE1.get(row, ()), strict=False))
    if entries.get(pair) is None:
        return {}
    paper, mark = entries[pair]
    return {"paper": paper, "paper_mark": mark}
