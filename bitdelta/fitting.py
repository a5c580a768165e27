"""Signs and scales of one weight, fitted to what its layer multiplies: min ||X (D - Q)^T||, D = finetuned - base.

    H = X^T X, damped            what the inputs X are to the error; once per input, shared by all weights that read it
    order, factor                columns by falling diagonal; H = V diag V^T in that order, V unit upper triangular
    signs    given the scales    column after column the nearest of 2^P levels, the error fed back (csrc/calibrate.c)
    rows     given the signs     least squares, P scales a row (or P for the whole matrix)
    columns  (rank1)             least squares, K scales a plane
    again, `rounds` times; what was best is kept

Error feedback is GPTQ's (arXiv 2210.17323), here on the difference of two weights with levels that are fitted too.
NumPy and its LAPACK do the rest; no gradients, no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C, threads
from .array import Tensor, aligned_empty, to_float32
from .delta import Delta, extract

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
COLUMN_DAMPING = 0.01  # of a step of the column scales
ROWS = 1024  # at a time, where a matrix of [N, K] would be needed for each of several things


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the inputs of a layer are to its weights: H = X^T X, fp32 [K, K], or its diagonal [K]."""

    hessian: F32

    def __post_init__(self) -> None:
        if not np.isfinite(self.hessian).all():
            raise ValueError("inputs: NaN or Inf")

    @cached_property
    def damped(self) -> F32:
        """H with a share of its mean diagonal added; the identity where every input was zero."""
        damped = self.hessian if self.hessian.ndim == 2 else np.diag(self.hessian)
        mean = float(np.diagonal(damped).mean(dtype=np.float64))
        return damped + np.eye(len(damped), dtype=np.float32) * np.float32(DAMPING * mean if mean > 0 else 1)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        return np.argsort(-np.diagonal(self.damped), kind="stable").astype(np.int64)

    @cached_property
    def factor(self) -> F32:
        """[k, j] = V[j, k], from the Cholesky factor of H turned around: U U^T = H with U upper triangular."""
        turned = self.damped[np.ix_(self.order[::-1], self.order[::-1])]
        more = np.float32(0)
        for _ in range(8):
            try:
                lower = np.linalg.cholesky(turned)
                break
            except np.linalg.LinAlgError:  # fp32: the smallest eigenvalue is lost below the largest
                more = max(10 * more, np.float32(DAMPING * np.diagonal(turned).mean()))
                turned = turned + np.eye(len(turned), dtype=np.float32) * more
        upper = lower[::-1, ::-1]
        return np.ascontiguousarray((upper / np.diagonal(upper)).T)


def fit(
    base: Tensor,
    finetuned: Tensor,
    inputs: Inputs,
    planes: int = 1,
    scale: str = "row",
    rounds: int = 3,
    fit: str = "signs",
) -> Delta:
    """The delta that comes closest to finetuned - base on these inputs.

    Args:
        base, finetuned, planes, scale: as of `bitdelta.extract`.
        inputs: of the layer that multiplies with the weight.
        rounds: of signs, then scales.
        fit: "signs" (and scales), or "scales": the signs stay those of `extract`, but for rows and columns whose
            best scale is negative: they turn over.

    Raises:
        ValueError: NaN or Inf in a weight, shapes that differ.
    """
    start = extract(base, finetuned, planes, scale)
    d = to_float32(finetuned) - to_float32(base)
    state = _Fit(d, inputs, start)
    state.fit_rows()
    for _ in range(rounds if scale == "rank1" or fit == "signs" else 0):
        if fit == "signs":
            state.fit_signs()
            state.fit_rows()
        if scale == "rank1":
            for p in range(planes):
                state.fit_column(p)
            state.fit_rows()
    return state.best


class _Fit:
    """Signs and scales on their way; `best` is the Delta with the least error so far."""

    def __init__(self, d: F32, inputs: Inputs, start: Delta) -> None:
        self.d, self.inputs, self.form, self.shape = d, inputs, start.form, start.shape
        self.sign, self.row = start.sign, start.scale
        self.column = start.column
        self.best, self.gain = start, -np.inf

    def fit_signs(self) -> None:
        threads.sync()
        sign = aligned_empty(self.sign.shape, np.uint32)
        factor = None if self.inputs.hessian.ndim == 1 else self.inputs.factor
        _C.fit_signs(self.d, factor, self.inputs.order, self.row, self.column, sign)
        self.sign = sign

    def fit_rows(self) -> None:
        """For every row the P scales that minimise (d - sum_p a_p z_p) H (...)^T, z_p = s_p * column_p."""
        N, P = self.shape[0], len(self.row)
        left, right = np.empty((N, P, P)), np.empty((N, P))
        for begin in range(0, N, ROWS):
            rows = slice(begin, min(begin + ROWS, N))
            z = [self._plane(p, rows) for p in range(P)]
            for p in range(P):
                weighted = self._weigh(z[p])
                right[rows, p] = np.einsum("nk,nk->n", weighted, self.d[rows], dtype=np.float64)
                for q in range(P):
                    left[rows, p, q] = np.einsum("nk,nk->n", weighted, z[q], dtype=np.float64)
        if self.form == "tensor":
            row = np.repeat(_solve(left.sum(0)[None], right.sum(0)[None]), N, axis=0)
        else:
            row = _solve(left, right)
        gain = float((2 * row * right).sum() - np.einsum("np,npq,nq->", row, left, row))
        self._set_rows(row.T.astype(np.float32))
        if gain > self.gain:
            self.gain = gain
            column = None if self.column is None else self.column.copy()
            self.best = Delta(_copy(self.sign), self.row, column, self.shape, self.form)

    def fit_column(self, p: int) -> None:
        """The K column scales of plane p, the rest as it is: (H * Z^T Z) c = sum over rows of Z * (R H)."""
        assert self.column is not None
        N, K = self.shape
        square, right = np.zeros((K, K), np.float32), np.zeros(K)
        for begin in range(0, N, ROWS):
            rows = slice(begin, min(begin + ROWS, N))
            z = self._plane(p, rows, with_column=False) * self.row[p, rows, None]
            wrong = self.d[rows] - sum(
                self._plane(q, rows) * self.row[q, rows, None] for q in range(len(self.row))
            )
            square += z.T @ z
            right += np.einsum("nk,nk->k", z, self._weigh(wrong), dtype=np.float64)
        square *= self.inputs.damped
        square[np.diag_indices(K)] += np.float32(COLUMN_DAMPING) * np.diagonal(square).mean() + np.float32(
            1e-30
        )
        step = np.linalg.solve(square, right.astype(np.float32))
        column = self.column[p] + step
        mean = float(np.abs(column).mean(dtype=np.float64))
        if not np.isfinite(column).all() or mean == 0:
            return
        flip = column < 0
        if flip.any():
            self._flip(p, np.ones(N, np.bool_), flip)
        self.column = self.column.copy()
        self.column[p] = np.abs(column) / np.float32(mean)
        self.row = self.row.copy()
        self.row[p] *= np.float32(mean)

    def _set_rows(self, row: F32) -> None:
        """Scales are never negative: the signs of such a row turn over instead."""
        negative = row < 0
        for p in np.flatnonzero(negative.any(axis=1)):
            self._flip(int(p), negative[p], np.ones(self.shape[1], np.bool_))
        self.row = np.ascontiguousarray(np.abs(row))

    def _flip(self, p: int, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> None:
        sign = _copy(self.sign)
        padded = np.zeros(sign.shape[2] * 32, np.bool_)
        padded[: len(columns)] = columns
        words = np.packbits(padded, bitorder="little").view("<u4")  # [L]
        is_row = np.zeros(sign.shape[1] * 16, np.bool_)
        is_row[: len(rows)] = rows
        sign[p] ^= np.where(is_row.reshape(-1, 1, 16), words[None, :, None], np.uint32(0))
        self.sign = sign

    def _plane(self, p: int, rows: slice, with_column: bool = True) -> F32:
        """+-1, times the column scales: fp32 [rows, K]."""
        N, K = self.shape
        column = None if self.column is None or not with_column else self.column[p : p + 1]
        handle = _C.Delta(self.sign[p : p + 1], np.ones((1, N), np.float32), column, (N, K))
        out = np.empty((rows.stop - rows.start, K), np.float32)
        _C.expand(out, None, handle, rows.start, rows.stop)
        return out

    def _weigh(self, z: F32) -> F32:
        """z H."""
        return (
            z @ self.inputs.damped if self.inputs.hessian.ndim == 2 else z * np.diagonal(self.inputs.damped)
        )


def _solve(left: F64, right: F64) -> F64:
    """P equations for each row; planes that are the same share what they have."""
    P = left.shape[-1]
    trace = np.einsum("npp->n", left)
    left = left + (1e-9 * trace + 1e-300)[:, None, None] * np.eye(P)
    return np.asarray(np.linalg.solve(left, right[..., None])[..., 0])


def _copy(sign: NDArray[np.uint32]) -> NDArray[np.uint32]:
    out: NDArray[np.uint32] = aligned_empty(sign.shape, np.uint32)
    out[...] = sign
    return out


def output_error(d: F32, delta: Delta | None, x: Any) -> tuple[float, float]:
    """||x (d - delta)^T||^2 and ||x d^T||^2, of inputs x fp32 [M, K] that the fit has not seen."""
    total = wrong = 0.0
    for begin in range(0, len(d), ROWS):
        rows = slice(begin, min(begin + ROWS, len(d)))
        part = d[rows]
        total += float(np.square(x @ part.T, dtype=np.float64).sum())
        if delta is not None:
            out = np.empty(part.shape, np.float32)
            _C.expand(out, None, delta.handle, rows.start, rows.stop)
            wrong += float(np.square(x @ (part - out).T, dtype=np.float64).sum())
    return wrong, total
