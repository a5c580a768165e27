"""Scale distillation (BitDelta, arXiv 2402.10193, section 3.1): sign(d) with each form of scales, before and after."""

from __future__ import annotations

from collections.abc import Iterator

from .measure import Scores
from .trial import Trial

TITLE = "scale distillation, 1 bit"


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    yield "base", trial.measure.base
    yield "fine-tune", trial.measure.finetuned
    for scale in ("tensor", "row", "rank1"):
        plain = trial.plain(1, scale)
        yield f"{scale}, initial", trial.score(plain)
        yield f"{scale}, distilled", trial.score(trial.distilled(plain))
