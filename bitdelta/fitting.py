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
with levels that are fitted too. NumPy and its LAPACK do the rest; no gradients, no PyTorch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C, threads
from .array import Tensor, aligned_empty, to_float32
from .delta import Delta, extract
from .reference import pack, unpack

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bits = NDArray[np.uint32]

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
COLUMN_DAMPING = 0.01  # of a step of the column scales
COLUMNS = 64  # of a sweep, between two updates of what the other columns see
ROWS = 1024  # at a time, where a matrix of [N, K] would be needed for each of several things


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the inputs of a layer are to its weights: H = X^T X, fp32 [K, K], or its diagonal [K]."""

    hessian: F32

    def __post_init__(self) -> None:
        if not np.isfinite(self.hessian).all():
            raise ValueError("inputs: NaN or Inf")

    @property
    def is_diagonal(self) -> bool:
        return self.hessian.ndim == 1

    @cached_property
    def damped(self) -> F32:
        """H with a share of its mean diagonal added, as ones where every input was zero."""
        diagonal = self.hessian if self.is_diagonal else np.diagonal(self.hessian)
        mean = float(diagonal.mean(dtype=np.float64))
        more = np.float32(DAMPING * mean if mean > 0 else 1)
        if self.is_diagonal:
            return self.hessian + more
        damped = self.hessian.copy()
        damped[np.diag_indices(len(damped))] += more
        return damped

    @cached_property
    def order(self) -> NDArray[np.int64]:
        diagonal = self.damped if self.is_diagonal else np.diagonal(self.damped)
        return np.argsort(-diagonal, kind="stable").astype(np.int64)

    @cached_property
    def factor(self) -> F32 | None:
        """[k, j] = V[j, k], from the Cholesky factor of H turned around: U U^T = H with U upper triangular."""
        if self.is_diagonal:
            return None
        backwards = self.order[::-1]
        turned = self.damped[backwards][:, backwards]
        more = np.float32(DAMPING * np.diagonal(turned).mean())
        while True:
            try:
                lower = np.linalg.cholesky(turned)
                break
            except np.linalg.LinAlgError:  # fp32: the smallest eigenvalue is lost below the largest
                turned[np.diag_indices(len(turned))] += more
                more *= np.float32(10)
        upper = lower[::-1, ::-1]
        return np.ascontiguousarray((upper / np.diagonal(upper)).T)

    def weigh(self, z: F32) -> F32:
        """z H."""
        return z * self.damped if self.is_diagonal else z @ self.damped


def fit(
    base: Tensor,
    finetuned: Tensor,
    inputs: Inputs,
    planes: int = 1,
    scale: str = "row",
    rounds: int = 3,
    fit: str = "signs",
    is_turned: bool = False,
) -> Delta:
    """The delta that comes closest to finetuned - base on these inputs.

    Args:
        base, finetuned, planes, scale: as of `bitdelta.extract`.
        inputs: of the layer that multiplies with the weight.
        rounds: of signs, then scales.
        fit: "signs" (and scales), or "scales": the signs stay those of `extract`, but for rows and columns whose
            best scale is negative: they turn over.
        is_turned: the layer's inputs meet the rows of the weight, not its columns.

    Raises:
        ValueError: NaN or Inf in a weight, shapes that differ.
    """
    start = extract(base, finetuned, planes, scale)
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
        for _ in range(rounds):
            state.sweep()
            state.fit_scales()
            state.keep()
    return state.best


class _Fit:
    """Signs and scales on their way, turned so that inputs meet columns; `best` is the delta of least error."""

    def __init__(self, d: F32, inputs: Inputs, start: Delta, is_turned: bool) -> None:
        self.d, self.inputs, self.form, self.is_turned = d, inputs, start.form, is_turned
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
            wrong += float(np.einsum("nk,nk->", left, self.inputs.weigh(left), dtype=np.float64))
        if wrong >= self.least:
            return
        self.least = wrong
        self._own_best = self.sign, self.row, self.column
        row, column, sign = self.row, self.column, self.sign
        shape = self.d.shape
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
        """Every column in turn moves to the level nearest to q + G / H[k, k], G = left H, which lowers the error.

        Some columns at a time, so that all of G is updated by one product.
        """
        N, K = self.d.shape
        damped = self.inputs.damped
        bits = np.stack([unpack(plane, N, K) for plane in self.sign])
        for rows in self._parts():
            pull = self.inputs.weigh(self._left(rows))
            for begin in range(0, K, COLUMNS):
                columns = self.inputs.order[begin : begin + COLUMNS]
                near = np.diag(damped[columns]) if self.inputs.is_diagonal else damped[columns][:, columns]
                change = self._sweep_columns(rows, columns, pull[:, columns], near, bits)
                if not self.inputs.is_diagonal:
                    pull -= change @ damped[columns]
        self.sign = _copy(np.stack([pack(plane) for plane in bits]))

    def _sweep_columns(
        self, rows: slice, columns: NDArray[np.int64], pull: F32, near: F32, bits: NDArray[np.bool_]
    ) -> F32:
        """Sweeps a few columns, pull [rows, columns] their G, near [columns, columns] their H; how levels changed."""
        change, own = np.zeros_like(pull), bits[:, rows][:, :, columns].transpose(0, 2, 1).copy()
        for i, k in enumerate(columns):
            step = self.row[:, rows] if self.column is None else self.row[:, rows] * self.column[:, k, None]
            now = np.where(own[:, i], step, -step).sum(axis=0)
            want = now + pull[:, i] / near[i, i]
            new, level = _nearest(step, want)
            moved = np.flatnonzero(np.abs(want - level) < np.abs(want - now) * np.float32(0.9999))
            own[:, i, moved] = new[:, moved]
            change[moved, i] = (level - now)[moved]
            pull[moved] -= change[moved, i, None] * near[i]
        bits[:, rows, columns] = own.transpose(0, 2, 1)
        return change

    def fit_signs(self) -> None:
        threads.sync()
        sign = aligned_empty(self.sign.shape, np.uint32)
        _C.fit_signs(self.d, self.inputs.factor, self.inputs.order, self.row, self.column, sign)
        self.sign = sign

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
        N, P = self.d.shape[0], len(self.row)
        left, right = np.empty((N, P, P)), np.empty((N, P))
        for rows in self._parts():
            z = [self._plane(p, rows) for p in range(P)]
            for p in range(P):
                weighted = self.inputs.weigh(z[p])
                right[rows, p] = np.einsum("nk,nk->n", weighted, self.d[rows], dtype=np.float64)
                for q in range(P):
                    left[rows, p, q] = np.einsum("nk,nk->n", weighted, z[q], dtype=np.float64)
        if self.form == "tensor":
            row = np.repeat(_solve(left.sum(0)[None], right.sum(0)[None]), N, axis=0)
        else:
            row = _solve(left, right)
        negative = row.T < 0
        for p in range(P):
            self._flip(p, negative[p], np.ones(self.d.shape[1], np.bool_))
        self.row = np.ascontiguousarray(np.abs(row.T), np.float32)

    def _fit_column(self, p: int) -> None:
        """The K column scales of plane p, the rest as it is: (H * Z^T Z) step = sum over rows of Z * (left H)."""
        assert self.column is not None
        N, K = self.d.shape
        square, right = np.zeros((K, K), np.float32), np.zeros(K)
        for rows in self._parts():
            z = self._plane(p, rows, with_column=False) * self.row[p, rows, None]
            square += z.T @ z
            right += np.einsum("nk,nk->k", z, self.inputs.weigh(self._left(rows)), dtype=np.float64)
        if self.inputs.is_diagonal:
            square *= np.diag(self.inputs.damped)
        else:
            square *= self.inputs.damped
        more = COLUMN_DAMPING * float(np.diagonal(square).mean(dtype=np.float64))
        if not more > 0:  # a plane of zeros
            return
        square[np.diag_indices(K)] += np.float32(more)
        column = self.column[p] + np.linalg.solve(square, right.astype(np.float32))
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
        N, K = self.d.shape
        sign = _copy(self.sign)
        sign[p] ^= pack(rows[:, None] & columns)
        self.sign = sign

    def _parts(self) -> list[slice]:
        N = self.d.shape[0]
        return [slice(begin, min(begin + ROWS, N)) for begin in range(0, N, ROWS)]

    def _left(self, rows: slice) -> F32:
        return self.d[rows] - expand_rows(
            Delta(self.sign, self.row, self.column, self.d.shape, self._own), rows
        )

    @property
    def _own(self) -> str:
        return "row" if self.column is None else "rank1"

    def _plane(self, p: int, rows: slice, with_column: bool = True) -> F32:
        """+-1, times the column scales: fp32 [rows, K]."""
        column = None if self.column is None or not with_column else self.column[p : p + 1]
        ones = np.ones((1, self.d.shape[0]), np.float32)
        form = "row" if column is None else "rank1"
        return expand_rows(Delta(self.sign[p : p + 1], ones, column, self.d.shape, form), rows)


def _nearest(step: F32, want: F32) -> tuple[NDArray[np.bool_], F32]:
    """The signs [P, N] of the level of +-step[0] +-step[1] ... nearest to `want`, and the level [N]."""
    choices = np.array(list(itertools.product((True, False), repeat=len(step))))  # [2^P, P]
    levels = np.where(choices[..., None], step, -step).sum(axis=1)
    best = np.abs(levels - want).argmin(axis=0)
    return choices[best].T, levels[best, np.arange(len(want))]


def expand_rows(delta: Delta, rows: slice) -> F32:
    """The delta alone, fp32 [rows, K]."""
    threads.sync()
    out = np.empty((rows.stop - rows.start, delta.shape[1]), np.float32)
    _C.expand(out, None, delta.handle, rows.start, rows.stop)
    return out


def turn(sign: Bits, shape: tuple[int, int]) -> Bits:
    """The planes of [N, K] as those of [K, N]."""
    ones = np.ones((1, shape[0]), np.float32)
    planes = [
        pack(expand_rows(Delta(sign[p : p + 1], ones, None, shape), slice(0, shape[0])).T > 0)
        for p in range(len(sign))
    ]
    return _copy(np.stack(planes))


def output_error(d: F32, delta: Delta | None, x: Any, is_turned: bool = False) -> tuple[float, float]:
    """||x (d - delta)^T||^2 and ||x d^T||^2, of inputs x fp32 [M, K]; turned, ||x (d - delta)||^2 of x [M, N]."""
    total = wrong = 0.0
    if is_turned:
        left = None if delta is None else d - expand_rows(delta, slice(0, len(d)))
        return (0.0 if left is None else _power(x @ left)), _power(x @ d)
    for begin in range(0, len(d), ROWS):
        rows = slice(begin, min(begin + ROWS, len(d)))
        total += _power(x @ d[rows].T)
        if delta is not None:
            wrong += _power(x @ (d[rows] - expand_rows(delta, rows)).T)
    return wrong, total


def _power(y: F32) -> float:
    return float(np.square(y, dtype=np.float64).sum())


def _solve(left: F64, right: F64) -> F64:
    """P equations for each row; planes that are the same share what they have."""
    P = left.shape[-1]
    trace = np.einsum("npp->n", left)
    left = left + (1e-9 * trace + 1e-300)[:, None, None] * np.eye(P)
    return np.asarray(np.linalg.solve(left, right[..., None])[..., 0])


def _copy(sign: Bits) -> Bits:
    out: Bits = aligned_empty(sign.shape, np.uint32)
    out[...] = sign
    return out
