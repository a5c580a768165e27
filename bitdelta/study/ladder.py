"""The rows that the studies of fine-tunes share: 1 bit, from sign(d) and mean |d| to fitted and distilled.

    tensor, initial       what the paper calls BitDelta-Initial: one scale a matrix, mean |d|
    tensor, distilled     its BitDelta: that scale distilled, here by `bitdelta.distill`
    row, initial          one scale a row, mean |d|
    row, fitted           signs and scales fitted to activations, without gradients
    row, fitted, distilled

The row of the fine-tune says how large the change is: ||d|| / ||base|| over the linears, in `about`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..array import to_float32
from ..checkpoint import open_checkpoint
from ..packfile import load
from .measure import Scores
from .table import COLUMNS as USUAL
from .table import Column
from .trial import Trial

COLUMNS: tuple[Column, ...] = (
    *USUAL[:4],
    ("|d|/|base| %", "about", "change", 100.0),
    ("kB", "about", "bytes", 1e-3),
    ("seconds", "about", "seconds", 1.0),
)
Score = Callable[[Path], Scores]


def ladder(trial: Trial, score: Score | None = None) -> Iterator[tuple[str, Scores]]:
    """Label and scores of every row; `score` measures a delta, by default as the trial does."""
    score = score or trial.score
    yield "base", trial.measure.base
    yield "fine-tune", {**trial.measure.finetuned, "about": {"change": change(trial)}}
    plain = trial.plain(1, "tensor")
    yield "tensor, initial", score(plain)
    yield "tensor, distilled", score(trial.distilled(plain))
    yield from steps(trial, "row", score)


def steps(trial: Trial, label: str, score: Score) -> Iterator[tuple[str, Scores]]:
    """Row scales: initial, fitted, fitted and distilled."""
    yield f"{label}, initial", score(trial.plain())
    yield f"{label}, fitted", score(trial.fitted())
    yield f"{label}, fitted, distilled", score(trial.distilled(trial.fitted()))


def change(trial: Trial) -> float:
    """||finetuned - base|| / ||base|| over the weights that the deltas pack."""
    source, target = open_checkpoint(trial.pair.base), open_checkpoint(trial.pair.finetuned)
    squares = np.zeros(2)
    for name, entry in load(trial.plain()).entries.items():
        if "planes" in entry:
            before, after = (to_float32(one[name].array()).astype(np.float64) for one in (source, target))
            squares += np.square(after - before).sum(), np.square(before).sum()
    return math.sqrt(squares[0] / squares[1])
