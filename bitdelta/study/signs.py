"""Fitted signs: signs and scales chosen together for what each layer multiplies, without gradients."""

from __future__ import annotations

from collections.abc import Iterator

from .measure import Scores
from .trial import Trial

TITLE = "fitted signs, 1 bit, no gradients"
ROUNDS = (1, 3, 8)


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    yield "base", trial.measure.base
    yield "fine-tune", trial.measure.finetuned
    for scale in ("row", "rank1"):
        yield f"sign(d), {scale}, mean |d|", trial.score(trial.plain(1, scale))
        yield f"sign(d), {scale}, least squares", trial.score(trial.fitted(1, scale, fit="scales"))
        for rounds in ROUNDS:
            label = f"fitted, {scale}, {rounds} round{'s' * (rounds > 1)}"
            yield label, trial.score(trial.fitted(1, scale, rounds))
    yield "fitted, tensor, 3 rounds", trial.score(trial.fitted(1, "tensor"))
