"""What the inputs X of a layer are to its weights: H = X^T X, and its Cholesky factor, in NumPy's BLAS."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
BLOCK = 256  # rows of the factor made at a time: the rest of the work is one product


@dataclass(frozen=True, eq=False)
class Inputs:
    """H = X^T X, fp32 [K, K], or its diagonal [K]."""

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
        """Columns by falling diagonal."""
        diagonal = self.damped if self.is_diagonal else np.diagonal(self.damped)
        return np.argsort(-diagonal, kind="stable").astype(np.int64)

    @cached_property
    def factor(self) -> F32 | None:
        """[k, j], j < k: V[j, k] of the damped H = V diag V^T in `order`, V unit upper triangular."""
        if self.is_diagonal:
            return None
        more = np.float32(DAMPING * np.diagonal(self.damped).mean(dtype=np.float64))
        added = np.float32(0)
        while True:
            matrix = self.damped[np.ix_(self.order, self.order)]
            matrix[np.diag_indices(len(matrix))] += added
            try:
                _factorise(matrix)
                return matrix
            except np.linalg.LinAlgError:  # fp32: the smallest eigenvalue is lost below the largest
                added += more
                more *= np.float32(10)

    def weigh(self, z: F32) -> F32:
        """z H."""
        return z * self.damped if self.is_diagonal else z @ self.damped


def _factorise(matrix: F32) -> None:
    """H [K, K] becomes, below its diagonal, U^T with U U^T = H, U upper triangular, each row over its diagonal.

    From the last rows to the first; above the diagonal something of H stays.
    """
    K = len(matrix)
    for end in range(K, 0, -BLOCK):
        begin = max(0, end - BLOCK)
        rows = matrix[begin:end, :end]
        if end < K:
            rows -= matrix[end:, begin:end].T @ matrix[end:, :end]
        lower = np.linalg.cholesky(rows[::-1, begin:][:, ::-1].astype(np.float64))
        upper = lower[::-1, ::-1]
        rows[:, begin:] = upper.T
        rows[:, :begin] = np.linalg.inv(upper).astype(np.float32) @ rows[:, :begin]
    matrix /= np.diagonal(matrix).copy()[:, None]
