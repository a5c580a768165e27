"""What this package is to reach at the bytes and with the text of the original recipe, on pairs of several seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import original
from .directions import directions
from .ladder import change
from .measure import Scores
from .table import COLUMNS as USUAL
from .table import Column, Goal
from .trial import BATCH, Trial

TITLE = "the same bytes and calibration tokens as the original recipe"
COLUMNS: tuple[Column, ...] = (
    *USUAL[:4],
    ("|d|/|base| %", "about", "change", 100.0),
    ("even %", "about", "even", 100.0),  # both of directions.py
    ("most %", "about", "most", 100.0),
    ("seconds", "about", "seconds", 1.0),
)
BEST, RECIPE = "original recipe, best learning rate", "original recipe, learning rate "
GRADIENTS, SIGNS = "sign(d), row, least squares, distilled", "fitted, row"
ROUNDS = 8  # of fitting
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
    about = {"change": change(trial), **directions(trial.pair)}
    yield "fine-tune", {**trial.measure.finetuned, "about": about}
    yield "sign(d), tensor", trial.score(trial.plain(1, "tensor"))
    recipes = {}
    for rate in original.RATES:
        label = f"{RECIPE}{rate:g}"
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
    yield f"{SIGNS}, 3 rounds", trial.score(trial.fitted())
    for scale in ("row", "rank1"):
        fitted = trial.fitted(1, scale, ROUNDS)
        yield f"fitted, {scale}", trial.score(fitted)
        yield f"fitted, {scale}, distilled", trial.score(trial.distilled(fitted))
    yield "fitted, row, 2 planes", trial.score(trial.fitted(2, rounds=ROUNDS))


def best(found: list[Scores]) -> Scores:
    """For each text the scores at the learning rate that is the best there, by held-out error: the strictest choice."""
    return {
        text: min((scores[text] for scores in found), key=lambda metrics: metrics["logit_mse"])
        for text in found[0]
    }


def judge(found: list[dict[str, Any]]) -> Iterator[str]:
    """The best learning rates, seed by seed; the reference is as good as it can be where none is at an end."""
    recipes = [row for row in found if row["label"].startswith(RECIPE)]
    ends = recipes[0]["label"], recipes[-1]["label"]
    for text in ("code", "prose"):
        errors = [row[text]["logit_mse"]["values"] for row in recipes]
        best = [recipes[errors_of.index(min(errors_of))]["label"] for errors_of in zip(*errors, strict=True)]
        told = ", ".join(label.removeprefix(RECIPE) for label in best)
        at_end = sum(label in ends for label in best)
        yield f"best learning rate on {text}: {told}" + (
            f"; AT AN END of those tried: {at_end}" if at_end else ""
        )
