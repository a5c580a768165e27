"""A timed call against its definition, on the weights that are timed: some output rows of many.

Deltas alone must have every bit of `bitdelta.reference`. With a dense product beside them, whose sum has no fixed
order and whose result is rounded to bf16, the distance to the product in fp64 is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import reference
from ..array import aligned_copy, to_float32
from ..delta import Delta
from ..errors import Error

ROWS = 16  # of the first and of the last strip
COLUMNS = 256
TOLERANCE = 2.0**-6  # of the norm; bf16 keeps 8 bits, and a wrong sign or adapter is off by far more


def row_strips(N: int) -> tuple[slice, slice]:
    return slice(0, ROWS), slice(N - ROWS, N)


def rows_of(delta: Delta, rows: slice) -> Delta:
    """The delta of a strip of output rows; N is a multiple of 16."""
    sign = aligned_copy(delta.sign[:, rows.start // ROWS : rows.stop // ROWS])
    scale = np.ascontiguousarray(delta.scale[:, rows])
    return replace(delta, sign=sign, scale=scale, shape=(rows.stop - rows.start, delta.shape[1]))


def columns_of(delta: Delta) -> Delta:
    """The delta of the first COLUMNS columns."""
    column = None if delta.column is None else np.ascontiguousarray(delta.column[:, :COLUMNS])
    sign = aligned_copy(delta.sign[:, :, : COLUMNS // 32])
    return replace(delta, sign=sign, column=column, shape=(delta.shape[0], COLUMNS))


def exact(what: str, out: Any, x: Any, deltas: Sequence[Delta], ids: Any) -> None:
    """Raises bitdelta.Error unless `out` is the deltas' product, every bit of both strips."""
    for rows in row_strips(out.shape[1]):
        wanted = reference.linear(x, None, [rows_of(delta, rows) for delta in deltas], ids)
        same(what, out[:, rows], wanted)


def same(what: str, got: Any, wanted: Any) -> None:
    """Raises bitdelta.Error unless both have the same bytes."""
    if np.ascontiguousarray(got).tobytes() != np.ascontiguousarray(wanted).tobytes():
        raise Error(f"{what}: differs from bitdelta.reference")


def close(what: str, out: Any, x: Any, weights: Sequence[Any], deltas: Sequence[Delta], ids: Any) -> None:
    """Raises bitdelta.Error unless row m of `out` is near x[m] (W + D)^T.

    Args:
        what: named in the error.
        out: [M, N].
        x: [M, K].
        weights: W of each row of x, or one for all rows.
        deltas, ids: D of each row; -1: none.
    """
    for rows in row_strips(out.shape[1]):
        dense = [to_float32(weight[rows]).astype(np.float64) for weight in weights]
        changes = [reference.expand(None, rows_of(delta, rows)).astype(np.float64) for delta in deltas]
        wanted = [
            (dense[m % len(dense)] + (changes[ids[m]] if ids[m] >= 0 else 0)) @ row
            for m, row in enumerate(to_float32(x).astype(np.float64))
        ]
        near(what, to_float32(out[:, rows]), np.array(wanted))


def near(what: str, got: Any, wanted: Any) -> None:
    """Raises bitdelta.Error unless ||got - wanted|| <= TOLERANCE ||wanted||."""
    distance = np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)
    if not distance <= TOLERANCE:
        raise Error(
            f"{what}: {distance:.2g} of the norm away from the product in fp64, at most {TOLERANCE:.2g}"
        )
