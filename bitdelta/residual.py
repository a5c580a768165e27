"""What a delta leaves of the difference that it stands for, and how large that is.

    relative error = ||d - approximation|| / ||d||,   d = fp32(finetuned) - fp32(base), before any rounding of weights

0 = exact, 1 = no better than the base alone; of several tensors with the sums over all of them. Sums are taken in
fp64, by `verify` over all rows, elsewhere over a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .array import aligned_copy, aligned_empty, to_float32
from .delta import Delta

STRIP_ROWS = 16
ELEMENTS = 1 << 20  # at a time: about 30 MB of scratch

Sums = tuple[float, float]  # ||d - approximation||^2, ||d||^2


def sampled_errors(base: np.ndarray, finetuned: np.ndarray, delta: Delta) -> Sums:
    """Over up to 16 rows, evenly spaced: the packfile's relative_error, as all rows would cost more than extracting."""
    n_rows, n_columns = delta.shape
    rows = _sampled_rows(n_rows)
    sign = aligned_empty((delta.planes, 1, delta.sign.shape[2], STRIP_ROWS), np.uint32)
    sign[...] = 0
    for i, row in enumerate(rows):
        sign[:, 0, :, i] = delta.sign[:, row // STRIP_ROWS, :, row % STRIP_ROWS]
    part = Delta(sign, delta.scale[:, rows].copy(), delta.column, (len(rows), n_columns), delta.form)
    return _sums(base[rows], finetuned[rows], part)


def sample(base: np.ndarray, finetuned: np.ndarray, value: Delta | Sequence[Delta] | None) -> Sums:
    """Estimates of the sums over all of a matrix, or of a stack of them, from rows of the first and the last one.

    Sums of several tensors add up to those of all. None: the fine-tune's values are left as the base's.
    """
    n = min(base.shape[-2], finetuned.shape[-2])
    before, after = base[..., :n, :], finetuned[..., :n, :]
    if before.ndim == 2:
        before, after = before[None], after[None]
    rows, ends, wrong, total = _sampled_rows(n), sorted({0, len(before) - 1}), 0.0, 0.0
    for i in ends:
        if value is None:
            d = to_float32(after[i][rows]) - to_float32(before[i][rows])
            power = float(np.square(d, dtype=np.float64).sum())
            sums = power, power
        else:
            sums = sampled_errors(before[i], after[i], value if isinstance(value, Delta) else value[i])
        wrong, total = wrong + sums[0], total + sums[1]
    share = len(before) * n / (len(ends) * len(rows))
    return share * wrong, share * total


def _sampled_rows(n_rows: int) -> np.ndarray:
    return np.arange(min(STRIP_ROWS, n_rows)) * n_rows // min(STRIP_ROWS, n_rows)


def squared_errors(base: np.ndarray, finetuned: np.ndarray, delta: Delta) -> Sums:
    """Over all rows, some strips of 16 at a time."""
    wrong = total = 0.0
    step = max(1, ELEMENTS // (STRIP_ROWS * delta.shape[1]))
    for begin in range(0, delta.sign.shape[1], step):
        rows = slice(STRIP_ROWS * begin, min(STRIP_ROWS * (begin + step), delta.shape[0]))
        sign = aligned_copy(delta.sign[:, begin : begin + step])
        scale = np.ascontiguousarray(delta.scale[:, rows])
        part = Delta(sign, scale, delta.column, (scale.shape[1], delta.shape[1]), delta.form)
        sums = _sums(base[rows], finetuned[rows], part)
        wrong, total = wrong + sums[0], total + sums[1]
    return wrong, total


def relative(sums: Sums) -> float | None:
    """The relative error from the sums; None where nothing changed and yet something is added."""
    wrong, total = sums
    return math.sqrt(wrong / total) if total else None if wrong else 0.0


def _sums(base: np.ndarray, finetuned: np.ndarray, delta: Delta) -> Sums:
    d = to_float32(finetuned) - to_float32(base)
    total = float(np.square(d, dtype=np.float64).sum())
    d -= delta.expand(None)
    return float(np.square(d, dtype=np.float64).sum()), total
