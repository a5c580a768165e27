"""A quantised model repaired: a 1-bit delta from what it computes with to its own original.

The paper does it to Llama-2-7B Chat under GPTQ (last row of its Table 6). `repaired` is the share of the quantised
model's logit MSE that the delta takes away.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import training
from .ladder import COLUMNS as USUAL
from .ladder import steps
from .measure import Scores
from .quantize import MISSING, methods, quantize
from .table import Column
from .trial import Trial

TITLE = "a quantised fine-tune repaired by 1 bit"
COLUMNS: tuple[Column, ...] = (
    *USUAL[:4],
    ("repaired % code", "repaired", "code", 100.0),
    ("repaired % prose", "repaired", "prose", 100.0),
    ("kB", "about", "bytes", 1e-3),
)


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    pair = trial.pair
    yield "fine-tune", trial.measure.finetuned
    for method in methods():
        trial.log(f"seed {pair.seed}: {method}")
        folder = trial.folder / f"repair-{method}"
        quantized = quantize(pair.finetuned, method, pair.calibration, folder / "finetuned")
        broken = trial.measure.model(training.load(quantized))
        yield method, broken
        over = trial.over(quantized, folder)

        def score(delta: Path, over: Trial = over, broken: Scores = broken) -> Scores:
            found = over.score(delta)
            errors = {text: found[text]["logit_mse"] / broken[text]["logit_mse"] for text in broken}
            return {**found, "repaired": {text: 1 - error for text, error in errors.items()}}

        yield from steps(over, f"{method} + 1 bit", score)


def judge(found: list[dict[str, Any]]) -> Iterator[str]:
    if not any("GPTQ" in row["label"] for row in found):
        yield MISSING
