"""What the benchmarks share: sides that take turns, and the ratio of two of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from dinv.experiments.results import Run
from dinv.latency import interleaved


def seconds(calls: Sequence[Callable[[], object]], turns: int) -> list[list[float]]:
    """Seconds of every call, one of each a turn, a card's work included; a first call is not counted."""

    def whole(call: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return timed

    return interleaved([whole(call) for call in calls], turns).T.tolist()


def rates(sides: Mapping[str, Callable[[], object]], work: float, turns: int) -> dict[str, list[float]]:
    """`work`, of one call, over the seconds of every side."""
    times = seconds(list(sides.values()), turns)
    return {side: [work / time for time in column] for side, column in zip(sides, times, strict=True)}


def compare(
    run: Run, name: str, plain: list[float], fast: list[float], precision: str, least: Mapping[str, float]
) -> str:
    """Both median rates and their ratio, as text; a claim where `least` has a bound for this precision."""
    ratios = sorted(b / a for a, b in zip(plain, fast, strict=True))
    if precision in least:
        claim = f"{name}: {least[precision]:g} times as fast as a plain loop, {precision}"
        run.claim(claim, ratios, at_least=least[precision])
    medians = f"{statistics.median(plain):8.1f} {statistics.median(fast):8.1f}"
    return f"{medians}  {statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
