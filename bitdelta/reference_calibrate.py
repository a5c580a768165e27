"""The definition of fitted signs in plain NumPy; csrc/calibrate.c returns the same bits.

column k in visiting order    r = d[k] + V[0, k] e[0] + V[1, k] e[1] + ... (j < k ascending, every step fp32)
levels                        t = +-s_0, then +- s_p in order, s_p = fp32(row_p column_p)
choice                        the least |r - t|; of equal ones + before -, the last plane first
what is fed back              e[k] = fp32(d[k] - t)
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from .array import aligned_empty
from .reference import F32, pack


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
        step = row if column is None else row * column[:, k : k + 1]
        best = np.full(N, np.inf, np.float32)
        for signs in itertools.product((True, False), repeat=P):  # the last plane is the outermost
            level = np.zeros(N, np.float32)
            for p, is_plus in enumerate(reversed(signs)):
                term = step[p] if is_plus else -step[p]
                level = term if p == 0 else level + term
            is_nearer = np.abs(r - level) < best
            best = np.where(is_nearer, np.abs(r - level), best)
            e[at] = np.where(is_nearer, d[:, k] - level, e[at])
            for p, is_plus in enumerate(reversed(signs)):
                is_positive[p, :, k] = np.where(is_nearer, is_plus, is_positive[p, :, k])
    planes = [pack(plane) for plane in is_positive]
    sign: NDArray[np.uint32] = aligned_empty((P, *planes[0].shape), np.uint32)
    sign[...] = np.stack(planes)
    return sign
