"""Long continued training: on code, several times as long as a fine-tune and at the base's own learning rate.

So large a change is where sign(d) with one scale may be worse than no delta at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import training
from ..training import Log
from .ladder import COLUMNS, ladder
from .measure import Scores
from .pair import HELD_OUT, Size, Tune
from .trial import Trial

__all__ = ["COLUMNS", "TITLE", "TUNE", "judge", "rows"]
TITLE = "long continued training at 1 bit"
LONGER = 4  # times the steps of a fine-tune


def _continue(model: Any, tokenizer: Any, size: Size, seed: int, log: Log, folder: Path) -> Any:
    text, steps = training.kept(training.code(), HELD_OUT), LONGER * size.finetune_steps
    with training.seeded(seed + 1000):
        training.train(
            model, tokenizer, text, steps, size.base_rate, size.length, size.batch, "continued", log
        )
    return model


TUNE = Tune("continued", LONGER, _continue)


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    yield from ladder(trial)


def judge(found: list[dict[str, Any]]) -> Iterator[str]:
    """Which rows are worse than the base, on how many seeds."""
    loss = {row["label"]: row["code"]["recovered"]["values"] for row in found}
    error = {row["label"]: row["code"]["logit_mse"]["values"] for row in found}
    for label in list(loss)[2:]:
        counts = (
            sum(value < 0 for value in loss[label]),
            sum(value > base for value, base in zip(error[label], error["base"], strict=True)),
        )
        if any(counts):
            yield (
                f"{label}: worse than the base on {counts[0]} of {len(loss[label])} seeds by loss, on {counts[1]} by "
                "logit MSE"
            )
