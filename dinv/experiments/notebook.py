"""What a notebook opens with, and how it shows settings, figures and source code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import Code, Image
from matplotlib.figure import Figure

from dinv import figures
from dinv.experiments import device
from dinv.experiments.profiles import load_profile, with_seeds
from dinv.experiments.results import Run
from dinv.experiments.settings import Profile


def start(
    chapter: str, profile: str = "auto", seeds: int = 0, overrides: Mapping[str, Any] | None = None
) -> Run:
    """Open a chapter and print its profile and device.

    Args:
        profile, seeds, overrides: the notebook's parameters cell; `seeds` 0 keeps the profile's numbers.
    """
    chosen = load_profile(profile, overrides)
    chosen = with_seeds(chosen, seeds) if seeds else chosen
    device.begin(chosen.name)
    print(f"profile {chosen.name} on {device.current()} ({device.device_name()}, {device.precision()})")
    return Run(chapter, chosen)


def settings_table(profile: Profile, *parts: str) -> pd.DataFrame:
    """The profile's settings, the paper's, and what `paper` has where the paper is silent.

    Args:
        parts: keep these settings and groups of settings, such as "inversion" or "distillation.settings".
    """
    prefixes = tuple(f"{part}." for part in parts) or ""
    rows = [row for row in profile.table() if f"{row[0]}.".startswith(prefixes)]
    columns = ["setting", f"{profile.name} profile", "the paper", "profile paper where the paper is silent"]
    pd.set_option("display.max_colwidth", None)  # a long setting is shown whole,
    pd.set_option("display.max_rows", None)  # and so is a long table
    return pd.DataFrame(rows, columns=columns).set_index("setting")


def show(run: Run, name: str, figure: Figure, alt: str = "") -> Image:
    """Keep a figure as `figures/<profile>/<name>.png` and return it for display, with a text in its place.

    What is displayed lies in the notebook: as JPEG where that is smaller, as it is for images of grain. The
    text is `alt`, if there is one, and what `figures.describe` reads off the figure.
    """
    text, data = figures.describe(figure, alt), figures.png(figure)
    (run.folder / f"{name}.png").write_bytes(data)
    return Image(data=figures.smaller(data)[0], alt=text)


def source(*objects: Any) -> Code:
    """The source code of functions and classes, coloured."""
    return Code("\n\n".join(inspect.getsource(item).rstrip() for item in objects), language="python")
