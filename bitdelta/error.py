"""How far a delta is from the difference that it stands for.

    relative error = ||d - approximation|| / ||d||,   d = fp32(finetuned) - fp32(base), before any rounding of weights

0 = exact, 1 = no better than the base alone. Sums are taken in fp64, 16 rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from .array import aligned_empty, to_float32
from .delta import Delta

STRIP_ROWS = 16


def sample(shape: tuple[int, int]) -> list[int]:
    """The strips that stand for a matrix in the packfile's relative_error: the middle one, as all would cost more
    than the extraction itself."""
    return [-(-shape[0] // STRIP_ROWS) // 2]


def squared_errors(
    base: np.ndarray, finetuned: np.ndarray, delta: Delta, strips: Iterable[int]
) -> tuple[float, float]:
    """(||d - approximation||^2, ||d||^2) over the rows of these strips."""
    wrong = total = 0.0
    for strip in strips:
        rows = slice(STRIP_ROWS * strip, min(STRIP_ROWS * (strip + 1), delta.shape[0]))
        d = to_float32(finetuned[rows]) - to_float32(base[rows])
        left = d - rows_of(delta, strip, rows).expand(None)
        wrong += float(np.square(left, dtype=np.float64).sum())
        total += float(np.square(d, dtype=np.float64).sum())
    return wrong, total


def relative(wrong: float, total: float) -> float:
    """The relative error from the two sums; 0 where nothing changed and nothing is added."""
    return math.sqrt(wrong / total) if total else math.inf if wrong else 0.0


def rows_of(delta: Delta, strip: int, rows: slice) -> Delta:
    """The delta of the rows of one strip."""
    planes, _, lines, _ = delta.sign.shape
    sign = aligned_empty((planes, 1, lines, STRIP_ROWS), np.uint32)
    sign[:, 0] = delta.sign[:, strip]
    scale = np.ascontiguousarray(delta.scale[:, rows])
    return Delta(sign, scale, delta.column, (scale.shape[1], delta.shape[1]), delta.form)
