"""Rows of a study over several seeds: mean and spread, as JSON and as a table in the form of the paper's.

    row    {"label": ..., "code": {"logit_mse": {"mean": m, "spread": s, "values": [one per seed]}, ...}, "prose": ...}

The spread is the standard deviation over the seeds (n - 1), 0 for one seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..table import table
from .measure import Scores

COLUMNS = (  # title, where it is in the row, factor
    ("logit MSE code", "code", "logit_mse", 1.0),
    ("logit MSE prose", "prose", "logit_mse", 1.0),
    ("perplexity code", "code", "perplexity", 1.0),
    ("recovered %", "code", "recovered", 100.0),
    ("top-1 code %", "code", "top1", 100.0),
    ("top-1 prose %", "prose", "top1", 100.0),
)
Column = tuple[str, str, str, float]


@dataclass(frozen=True)
class Goal:
    """A row's mean ratio to another row, seed by seed, is at most `limit`, for each of these values."""

    label: str
    against: str
    limit: float
    values: tuple[tuple[str, str], ...] = (("code", "logit_mse"), ("prose", "logit_mse"))


def rows_of(per_seed: Sequence[dict[str, Scores]]) -> list[dict[str, Any]]:
    """The rows of label -> scores, one such dict a seed."""
    rows = []
    for label, first in per_seed[0].items():
        row: dict[str, Any] = {"label": label}
        for group, metrics in first.items():
            row[group] = {name: _summary([one[label][group][name] for one in per_seed]) for name in metrics}
        rows.append(row)
    return rows


def _summary(values: list[float]) -> dict[str, Any]:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"scores: expected finite numbers, got {values}")
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "spread": spread, "values": values}


def lines(rows: Sequence[dict[str, Any]], title: str, columns: Sequence[Column] = COLUMNS) -> Iterator[str]:
    """The rows as text, mean +- spread; a row that lacks a column leaves it empty."""
    cells = [
        [row["label"], *(_cell(row.get(group, {}).get(name), factor) for _, group, name, factor in columns)]
        for row in rows
    ]
    yield from table(("", *(f">{column[0]}" for column in columns)), cells, title)


def _cell(value: dict[str, Any] | None, factor: float) -> str:
    if value is None:
        return ""
    mean, spread = value["mean"] * factor, value["spread"] * factor
    return f"{_number(mean)} +- {_number(spread, 2)}" if len(value["values"]) > 1 else _number(mean)


def _number(value: float, digits: int = 3) -> str:
    """Three digits without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 8)}f}"


def judge(rows: Sequence[dict[str, Any]], goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """For every goal its ratios and whether they meet it; JSON."""
    by_label, judged = {row["label"]: row for row in rows}, []
    for goal in goals:
        mine, other = by_label[goal.label], by_label[goal.against]
        ratios = {}
        for group, name in goal.values:
            pairs = zip(mine[group][name]["values"], other[group][name]["values"], strict=True)
            ratios[name if group == "about" else group] = _summary([a / b for a, b in pairs])
        is_met = all(ratio["mean"] <= goal.limit for ratio in ratios.values())
        judged.append(
            {"row": goal.label, "against": goal.against, "limit": goal.limit, "ratios": ratios, "met": is_met}
        )
    return judged


def verdicts(judged: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The goals as text."""
    cells = []
    for goal in judged:
        ratios = ", ".join(f"{_cell(ratio, 1.0)} {name}" for name, ratio in goal["ratios"].items())
        verdict = "met" if goal["met"] else "missed"
        cells.append([goal["row"], goal["against"], f"{goal['limit']:g}x", ratios, verdict])
    yield from table(("row", "against", ">goal", "ratio", ""), cells, "goals")
