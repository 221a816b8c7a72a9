"""What is refused early: misspelt names, settings out of range."""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any


def near(name: str, known: Iterable[str]) -> str:
    """The end of "unknown ...": ": did you mean X?" where one of `known` is close to `name`, else "."."""
    lower = {str(other).lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    return f": did you mean {lower[close[0]]}?" if close else "."


def check_settings(settings: Any, positive: Sequence[str] = (), **choices: Sequence[str]) -> None:
    """Refuse numbers that are infinite, negative or, of those named `positive`, zero; and unknown choices."""
    for name, value in vars(settings).items():
        if isinstance(value, int | float) and not (0 <= value < math.inf and (value or name not in positive)):
            bound = "positive" if name in positive else "at least 0"
            raise ValueError(f"{name}={value} must be {bound} and finite")
    for name, known in choices.items():
        if getattr(settings, name) not in known:
            raise ValueError(f"unknown {name} {getattr(settings, name)!r}: choose {', '.join(known)}")
