"""The definition of fitted signs in plain NumPy; csrc/calibrate.c and csrc/sweep.c return the same bits.

levels     t = +-s_0, then +- s_p in order, s_p = fp32(row_p column_p)
choice     the level of least |r - t|; of equal ones + before -, the last plane first
fit_signs  columns in visiting order: r = d[k] + V[0, k] e[0] + V[1, k] e[1] + ... (j < k ascending, every step fp32);
           what is fed back is e[k] = fp32(d[k] - t)
sweep      columns 0 .. K - 1: r = q + G[k] / H[k, k], q the level as it is; where t is nearer to r than
           fp32(|r - q| 0.9999f), it becomes the level, and G -= fp32(fp32(t - q) H[k])
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from .array import aligned_copy
from .reference import F32, pack, unpack

Bools = NDArray[np.bool_]


def fit_signs(
    d: F32, factor: F32 | None, order: NDArray[np.int64], row: F32, column: F32 | None
) -> NDArray[np.uint32]:
    """d [N, K], factor [k, j] = V[j, k] in visiting order, row [P, N], column [P, K] -> sign [P, S, L, 16]."""
    (N, K), P = d.shape, len(row)
    e = np.zeros((K, N), np.float32)
    is_positive = np.zeros((P, N, K), np.bool_)
    for at, k in enumerate(order):
        r = d[:, k]
        for j in range(at if factor is not None else 0):
            assert factor is not None
            r = r + factor[at, j] * e[j]
        level, is_positive[:, :, k] = _nearest(_steps(row, column, k), r)
        e[at] = d[:, k] - level
    return _packed(is_positive)


def sweep(
    pull: F32, hessian: F32, row: F32, column: F32 | None, sign: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], F32]:
    """pull G = (d - Q) H [N, K], hessian H [K, K] or its diagonal [K], row [P, N], column [P, K], sign [P, S, L, 16]

    -> the new sign and G.
    """
    N, K = pull.shape
    is_positive = np.stack([unpack(plane, N, K) for plane in sign])
    pull = pull.copy()
    for k in range(K):
        steps = _steps(row, column, k)
        now = _level(steps, is_positive[:, :, k])
        diagonal = hessian[k] if hessian.ndim == 1 else hessian[k, k]
        want = now + pull[:, k] / diagonal
        level, new = _nearest(steps, want)
        moved = np.abs(want - level) < np.abs(want - now) * np.float32(0.9999)
        is_positive[:, moved, k] = new[:, moved]
        change = (level - now)[moved]
        if hessian.ndim == 1:
            pull[moved, k] -= change * diagonal
        else:
            pull[moved] -= change[:, None] * hessian[k]
    return _packed(is_positive), pull


def _steps(row: F32, column: F32 | None, k: int) -> F32:
    return row if column is None else row * column[:, k : k + 1]


def _level(steps: F32, is_positive: Bools) -> F32:
    """The level [N] that these signs [P, N] say."""
    terms = np.where(is_positive, steps, -steps)
    level: F32 = terms[0]
    for term in terms[1:]:
        level = level + term
    return level


def _nearest(steps: F32, r: F32) -> tuple[F32, Bools]:
    """The level [N] nearest to r [N], and its signs [P, N]."""
    P, N = steps.shape
    best = np.full(N, np.inf, np.float32)
    chosen, is_positive = np.zeros(N, np.float32), np.zeros((P, N), np.bool_)
    for signs in itertools.product((True, False), repeat=P):  # the last plane is the outermost
        signs_now = np.repeat(np.array(signs[::-1])[:, None], N, axis=1)
        level = _level(steps, signs_now)
        is_nearer = np.abs(r - level) < best
        best = np.where(is_nearer, np.abs(r - level), best)
        chosen = np.where(is_nearer, level, chosen)
        is_positive = np.where(is_nearer, signs_now, is_positive)
    return chosen, is_positive


def _packed(is_positive: Bools) -> NDArray[np.uint32]:
    planes = [pack(plane) for plane in is_positive]
    return aligned_copy(np.stack(planes))
