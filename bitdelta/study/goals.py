"""What this package is to reach at the bytes and with the text of the original recipe, on pairs of several seeds."""

from __future__ import annotations

from collections.abc import Iterator

from . import original
from .measure import Scores
from .table import Goal
from .trial import BATCH, Trial

TITLE = "the same bytes and calibration tokens as the original recipe"
BEST = "original recipe, best learning rate"
GRADIENTS, SIGNS = "sign(d), row, least squares, distilled", "fitted, row"
GOALS = (
    Goal(GRADIENTS, BEST, 0.55),
    Goal(SIGNS, BEST, 0.2),
    Goal("fitted, row, distilled", BEST, 0.12),
    Goal("fitted, rank1, distilled", BEST, 0.08),
    Goal("fitted, row, 2 planes", SIGNS, 0.3),
    Goal(SIGNS, "sign(d), row, distilled", 1.5, (("about", "seconds"),)),
)


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    yield "base", trial.measure.base
    yield "fine-tune", trial.measure.finetuned
    yield "sign(d), tensor", trial.score(trial.plain(1, "tensor"))
    recipes = {}
    for rate in original.RATES:
        label = f"original recipe, learning rate {rate:g}"
        model = original.distilled(trial.pair, trial.teacher, rate, trial.steps, BATCH)
        recipes[label] = trial.measure.model(model)
        trial.log(f"seed {trial.pair.seed}: {label}")
    yield from recipes.items()
    yield BEST, best(list(recipes.values()))
    yield "sign(d), row", trial.score(trial.plain())
    yield "sign(d), row, distilled", trial.score(trial.distilled(trial.plain()))
    squares = trial.fitted(fit="scales")
    yield "sign(d), row, least squares", trial.score(squares)
    yield GRADIENTS, trial.score(trial.distilled(squares))
    yield SIGNS, trial.score(trial.fitted())
    yield "fitted, row, distilled", trial.score(trial.distilled(trial.fitted()))
    yield "fitted, rank1", trial.score(trial.fitted(1, "rank1"))
    yield "fitted, rank1, distilled", trial.score(trial.distilled(trial.fitted(1, "rank1")))
    yield "fitted, row, 2 planes", trial.score(trial.fitted(2))


def best(found: list[Scores]) -> Scores:
    """For each text the scores at the learning rate that is the best there, by held-out error: the strictest choice."""
    return {
        text: min((scores[text] for scores in found), key=lambda metrics: metrics["logit_mse"])
        for text in found[0]
    }
