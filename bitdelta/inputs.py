"""What the inputs X of a layer are to its weights: H = X^T X, and its Cholesky factor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .fitting_device import F32 as F32
from .fitting_device import HOST, Host, Matrix

DAMPING = 0.01  # of the mean diagonal, added to the diagonal


@dataclass(frozen=True, eq=False)
class Inputs:
    """H = X^T X, fp32 [K, K], or its diagonal [K], in the memory of `device`."""

    hessian: Matrix
    device: Host = HOST

    def __post_init__(self) -> None:
        if not self.device.is_finite(self.hessian):
            raise ValueError("inputs: NaN or Inf")

    @property
    def is_diagonal(self) -> bool:
        return self.hessian.ndim == 1

    @cached_property
    def damped(self) -> Matrix:
        """H with a share of its mean diagonal added, as ones where every input was zero."""
        mean = float(self._diagonal(self.hessian).mean(dtype=np.float64))
        more = np.float32(DAMPING * mean if mean > 0 else 1)
        damped = self.device.copy(self.hessian)
        if self.is_diagonal:
            damped += more
        else:
            add_to_diagonal(damped, more)
        return damped

    def _diagonal(self, hessian: Matrix) -> F32:
        return self.device.get(hessian if self.is_diagonal else hessian.diagonal())

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Columns by falling diagonal."""
        return np.argsort(-self._diagonal(self.damped), kind="stable").astype(np.int64)

    @cached_property
    def factor(self) -> Matrix | None:
        """[k, j], j < k: V[j, k] of the damped H = V diag V^T in `order`, V unit upper triangular."""
        if self.is_diagonal:
            return None
        more = np.float32(DAMPING * self._diagonal(self.damped).mean(dtype=np.float64))
        added = np.float32(0)
        while True:
            matrix = self.device.permuted(self.damped, self.order)
            add_to_diagonal(matrix, added)
            try:
                self.device.factorise(matrix)
                return matrix
            except np.linalg.LinAlgError:  # fp32: the smallest eigenvalue is lost below the largest
                added += more
                more *= np.float32(10)

    def weigh(self, z: Matrix) -> Matrix:
        """z H."""
        return z * self.damped if self.is_diagonal else z @ self.damped


def add_to_diagonal(square: Matrix, more: np.float32) -> None:
    square.reshape(-1)[:: len(square) + 1] += float(more)
