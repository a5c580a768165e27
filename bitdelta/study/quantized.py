"""A delta over a quantised base (the paper's Table 6): the fine-tune itself quantised, against base + 1 bit.

The delta is taken between the fine-tune and what the quantised base computes with, so that it repairs the
quantisation's error too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import training
from .ladder import COLUMNS, steps
from .measure import Scores
from .quantize import MISSING, methods, quantize
from .trial import Trial

__all__ = ["COLUMNS", "TITLE", "judge", "rows"]
TITLE = "1 bit over a quantised base"


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    pair = trial.pair
    yield "base", trial.measure.base
    yield "fine-tune", trial.measure.finetuned
    yield from steps(trial, "base + 1 bit", trial.score)
    for method in methods():
        trial.log(f"seed {pair.seed}: {method}")
        folder = trial.folder / f"quantized-{method}"
        tuned = quantize(pair.finetuned, method, pair.calibration, folder / "finetuned")
        yield f"fine-tune in {method}", trial.measure.model(training.load(tuned))
        base = quantize(pair.base, method, pair.calibration, folder / "base")
        yield f"base in {method}", trial.measure.model(training.load(base))
        over = trial.over(base, folder)
        yield from steps(over, f"base in {method} + 1 bit", over.score)


def judge(found: list[dict[str, Any]]) -> Iterator[str]:
    if not any("GPTQ" in row["label"] for row in found):
        yield MISSING
