"""Signs and scales of one weight, fitted to what its layer multiplies: min ||X (D - Q)^T||, D = finetuned - base.

    H = X^T X, damped            what the inputs X are to the error; once per input, shared by all weights that read it
    order, factor                columns by falling diagonal; H = V diag V^T in that order, V unit upper triangular
    signs    given the scales    column after column the nearest of 2^P levels, the error fed back (csrc/calibrate.c)
    rows     given the signs     least squares, P scales a row (or P for the whole matrix)
    columns  given the rest      least squares, K scales a plane
    again, `rounds` times; what was best is kept
    sweeps                       as many times: column after column the level that lowers the error most, the rest given

A weight that the layer multiplies from the other side, as GPT-2's Conv1D [in, out], is fitted turned around: its row
scales are then scales of columns. Error feedback is GPTQ's (arXiv 2210.17323), here on the difference of two weights
with levels that are fitted too. The rest is products of matrices, by NumPy on the CPU and
by PyTorch on a GPU (fitting_device.py); no gradients. A weight with row scales is
fitted some rows at a time (fitting_rows.py), where each row keeps its best; the other forms know one error, of the
whole weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .array import Tensor, aligned_copy, aligned_empty, to_float32
from .delta import Delta, extract
from .fitting_device import HOST, Bits, Host, Matrix
from .fitting_rows import Rows, expand_rows, solve
from .inputs import F32, Inputs, add_to_diagonal
from .reference import pack

COLUMN_DAMPING = 0.01  # of a step of the column scales
ROWS = 1024  # at a time, where a matrix of [N, K] would be needed for each of several things


def fit(
    base: Tensor,
    finetuned: Tensor,
    inputs: Inputs,
    planes: int = 1,
    scale: str = "row",
    rounds: int = 3,
    fit: str = "signs",
    is_turned: bool = False,
    sweeps: int | None = None,
) -> Delta:
    """The delta that comes closest to finetuned - base on these inputs.

    Args:
        base, finetuned, planes, scale: as of `bitdelta.extract`.
        inputs: of the layer that multiplies with the weight; the work is done where they are.
        rounds: of signs, then scales.
        fit: "signs" (and scales), or "scales": the signs stay those of `extract`, but for rows and columns whose
            best scale is negative: they turn over.
        is_turned: the layer's inputs meet the rows of the weight, not its columns.
        sweeps: after the rounds; None: as many.

    Raises:
        ValueError: NaN or Inf in a weight, shapes that differ.
    """
    sweeps = rounds if sweeps is None else sweeps
    start = extract(base, finetuned, planes, scale)
    if scale == "row" and not is_turned:
        return _fit_rows(base, finetuned, inputs, start, rounds, sweeps, fit)
    d = to_float32(finetuned) - to_float32(base)
    state = _Fit(np.ascontiguousarray(d.T) if is_turned else d, inputs, start, is_turned)
    state.fit_scales()
    state.keep()
    if fit == "signs" or state.has_rows and state.has_columns:
        for _ in range(rounds):
            if fit == "signs":
                state.fit_signs()
            state.fit_scales()
            state.keep()
    if fit == "signs":
        state.go_back()
        for _ in range(sweeps):
            state.sweep()
            state.fit_scales()
            state.keep()
    return state.best


def _fit_rows(
    base: Tensor, finetuned: Tensor, inputs: Inputs, start: Delta, rounds: int, sweeps: int, fit: str
) -> Delta:
    """Some strips of 16 rows at a time."""
    sign, scale = aligned_empty(start.sign.shape, np.uint32), start.scale.copy()
    N, step = start.shape[0], max(16, ROWS // start.planes // 16 * 16)
    for begin in range(0, N, step):
        rows, strips = slice(begin, min(begin + step, N)), slice(begin // 16, (begin + step) // 16)
        d = to_float32(finetuned[rows]) - to_float32(base[rows])
        part = Rows(d, inputs, start.sign[:, strips], np.ascontiguousarray(start.scale[:, rows]))
        part.fit(rounds, sweeps, fit)
        sign[:, strips], scale[:, rows] = part.best_sign, part.best_scale
    return Delta(sign, scale, None, start.shape, start.form)


class _Fit:
    """Signs and scales on their way, turned so that inputs meet columns; `best` is the delta of least error."""

    def __init__(self, d: F32, inputs: Inputs, start: Delta, is_turned: bool) -> None:
        self.inputs, self.on, self.form, self.is_turned = inputs, inputs.device, start.form, is_turned
        self.d, self.shape = self.on.put(d), d.shape
        self.sign, self.row, self.column = start.sign, start.scale, start.column
        self.has_rows = start.form != "row" or not is_turned
        self.has_columns = start.form == "rank1" or start.form == "row" and is_turned
        if is_turned:
            ones = np.ones((start.planes, d.shape[0]), np.float32)
            self.sign = turn(self.sign, (d.shape[1], d.shape[0]))
            if start.form == "tensor":
                self.row = ones * start.scale[:, :1]
            else:
                self.row = ones if start.column is None else start.column
                self.column = start.scale
        self.best, self.least = start, np.inf

    def keep(self) -> None:
        """Remembers the state where its error is the least so far."""
        wrong = 0.0
        for rows in self._parts():
            left = self._left(rows)
            wrong += float(self.on.dots(left, self.inputs.weigh(left)).sum())
        if wrong >= self.least:
            return
        self.least = wrong
        self._own_best = self.sign, self.row, self.column
        row, column, sign = self.row, self.column, self.sign
        shape = self.shape
        if self.is_turned:
            sign, shape = turn(sign, shape), shape[::-1]
            if self.form == "tensor":
                row = np.repeat(row[:, :1], shape[0], axis=1)
            else:
                assert column is not None
                row, column = column, row if self.form == "rank1" else None
        self.best = Delta(sign, row, column, shape, self.form)

    def go_back(self) -> None:
        """To where the error was the least."""
        self.sign, self.row, self.column = self._own_best

    def sweep(self) -> None:
        """Every column in turn moves to the level nearest to q + G / H[k, k], G = left H, which lowers the error."""
        sign = aligned_copy(self.sign)
        for rows in self._parts():
            strips = slice(rows.start // 16, -(-rows.stop // 16))
            part, pull = aligned_copy(sign[:, strips]), self.inputs.weigh(self._left(rows))
            row = np.ascontiguousarray(self.row[:, rows])
            self.on.sweep(pull, self.inputs.damped, row, self.column, part)
            sign[:, strips] = part
        self.sign = sign

    def fit_signs(self) -> None:
        inputs = self.inputs
        self.sign = self.on.fit_signs(self.d, inputs.factor, inputs.order, self.row, self.column)

    def fit_scales(self) -> None:
        if self.has_rows:
            self._fit_rows()
        if self.has_columns:
            for p in range(len(self.row)):
                self._fit_column(p)
            if self.has_rows:
                self._fit_rows()

    def _fit_rows(self) -> None:
        """For every row the P scales that minimise (d - sum_p a_p z_p) H (...)^T, z_p = s_p * column_p."""
        N, P = self.shape[0], len(self.row)
        left, right = np.empty((N, P, P)), np.empty((N, P))
        for rows in self._parts():
            z = [self._plane(p, rows) for p in range(P)]
            for p in range(P):
                weighted = self.inputs.weigh(z[p])
                right[rows, p] = self.on.dots(weighted, self.d[rows])
                for q in range(P):
                    left[rows, p, q] = self.on.dots(weighted, z[q])
        if self.form == "tensor":
            row = np.repeat(solve(left.sum(0)[None], right.sum(0)[None]), N, axis=0)
        else:
            row = solve(left, right)
        negative = row.T < 0
        for p in range(P):
            self._flip(p, negative[p], np.ones(self.shape[1], np.bool_))
        self.row = np.ascontiguousarray(np.abs(row.T), np.float32)

    def _fit_column(self, p: int) -> None:
        """The K column scales of plane p, the rest as it is: (H * Z^T Z) step = sum over rows of Z * (left H)."""
        assert self.column is not None
        N, K = self.shape
        square, right = self.on.zeros(K, K), np.zeros(K)
        for rows in self._parts():
            z = self._plane(p, rows, with_column=False) * self.on.put(self.row[p, rows, None])
            square += z.T @ z
            right += self.on.column_dots(z, self.inputs.weigh(self._left(rows)))
        square *= self.on.diagonal(self.inputs.damped) if self.inputs.is_diagonal else self.inputs.damped
        more = COLUMN_DAMPING * float(self.on.get(square.diagonal()).mean(dtype=np.float64))
        if not more > 0:  # a plane of zeros
            return
        add_to_diagonal(square, np.float32(more))
        column = self.column[p] + self.on.solve(square, right.astype(np.float32))
        mean = np.abs(column).mean() if self.has_rows else np.float32(1)
        if not (np.isfinite(column).all() and mean > 0):
            return
        self._flip(p, np.ones(N, np.bool_), column < 0)
        self.row, self.column = self.row.copy(), self.column.copy()
        self.column[p] = np.abs(column) / mean
        self.row[p] *= mean

    def _flip(self, p: int, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> None:
        """Scales are never negative: the signs of such rows and columns turn over instead."""
        if not (rows.any() and columns.any()):
            return
        sign = aligned_copy(self.sign)
        sign[p] ^= pack(rows[:, None] & columns)
        self.sign = sign

    def _parts(self) -> list[slice]:
        N = self.shape[0]
        return [slice(begin, min(begin + ROWS, N)) for begin in range(0, N, ROWS)]

    def _left(self, rows: slice) -> Matrix:
        return self.d[rows] - self.on.expand(self.sign, self.row, self.column, self.shape, rows)

    def _plane(self, p: int, rows: slice, with_column: bool = True) -> Matrix:
        """+-1, times the column scales: fp32 [rows, K]."""
        column = None if self.column is None or not with_column else self.column[p : p + 1]
        ones = np.ones((1, self.shape[0]), np.float32)
        return self.on.expand(self.sign[p : p + 1], ones, column, self.shape, rows)


def turn(sign: Bits, shape: tuple[int, int]) -> Bits:
    """The planes of [N, K] as those of [K, N]."""
    ones = np.ones((1, shape[0]), np.float32)
    planes = [
        pack(expand_rows(Delta(sign[p : p + 1], ones, None, shape), slice(0, shape[0])).T > 0)
        for p in range(len(sign))
    ]
    return aligned_copy(np.stack(planes))


def output_errors(
    d: F32, deltas: list[Delta], x: F32, is_turned: bool = False, on: Host = HOST
) -> tuple[list[float], float]:
    """||x (d - delta)^T||^2 of each delta and ||x d^T||^2, of inputs x fp32 [M, K], on a device; turned,
    ||x (d - delta)||^2 of x [M, N], and ||x d||^2."""
    wrong, total = [0.0] * len(deltas), 0.0
    placed = on.put(x)
    for begin in range(0, len(d), len(d) if is_turned else ROWS):
        rows = slice(begin, len(d) if is_turned else min(begin + ROWS, len(d)))
        part = on.put(d[rows])
        total += _power(placed, part, is_turned, on)
        for i, delta in enumerate(deltas):
            left = part - on.expand(delta.sign, delta.scale, delta.column, delta.shape, rows)
            wrong[i] += _power(placed, left, is_turned, on)
    return wrong, total


def _power(x: Matrix, weight: Matrix, is_turned: bool, on: Host) -> float:
    """The sum of the squares of what the layer makes of x."""
    y = x @ (weight if is_turned else weight.T)
    return float(on.dots(y, y).sum())
