"""Signs and row scales of some rows fitted together: rows know nothing of each other, so each keeps its own best.

    target     d H
    product    z_p H of plane p, z_p = +-1
    pull       (d - q) H = target - sum_p scale_p product_p: what sweeps start from, and the error is (d - q) pull

Products with H are what takes the time. Planes cost one each after their signs are fitted anew; a sweep brings the
pull up to date itself, and with one plane the product follows from it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .array import aligned_copy
from .delta import Delta
from .fitting_device import F32, F64, HOST, Bits, Matrix
from .inputs import Inputs
from .reference import pack


class Rows:
    """d fp32 [N, K], sign [P, S, L, 16], scale fp32 [P, N] where it begins; `best_*` is what it came to."""

    def __init__(self, d: F32, inputs: Inputs, sign: Bits, scale: F32) -> None:
        self.inputs, self.on = inputs, inputs.device
        self.d = self.on.put(d)
        self.shape = d.shape
        self.sign, self.scale = aligned_copy(sign), scale
        self.target = inputs.weigh(self.d)
        self.products: list[Matrix] | None = None
        self.pull = self.target
        self.least = np.full(len(d), np.inf)
        self.best_sign, self.best_scale = aligned_copy(sign), scale.copy()
        self.best_pull = self.on.zeros(*d.shape)

    def fit(self, rounds: int, sweeps: int, fit: str) -> None:
        self.fit_scales()
        self.keep()
        if fit != "signs":
            return
        for _ in range(rounds):
            self.fit_signs()
            self.fit_scales()
            self.keep()
        self.go_back()
        for _ in range(sweeps):
            if not self.sweep():
                break
            self.fit_scales()
            self.keep()

    def fit_signs(self) -> None:
        self.sign = self.on.fit_signs(self.d, self.inputs.factor, self.inputs.order, self.scale, None)
        self.products = None

    def sweep(self) -> bool:
        """Every column in turn moves to the level that lowers the error most; whether any did."""
        before = aligned_copy(self.sign)
        self.on.sweep(self.pull, self.inputs.damped, self.scale, None, self.sign)
        self.products = self._from_pull()
        return not np.array_equal(before, self.sign)

    def go_back(self) -> None:
        """To where each row's error was the least."""
        self.sign, self.scale = aligned_copy(self.best_sign), self.best_scale.copy()
        self.pull = self.on.copy(self.best_pull)
        self.products = self._from_pull()

    def fit_scales(self) -> None:
        """For every row the P scales that minimise (d - sum_p a_p z_p) H (...)^T; negative ones turn their signs."""
        N, P = self.shape[0], len(self.sign)
        z = [self._plane(p) for p in range(P)]
        products = self.products or [self.inputs.weigh(plane) for plane in z]
        left, right = np.empty((N, P, P)), np.empty((N, P))
        for p in range(P):
            right[:, p] = self.on.dots(products[p], self.d)
            for q in range(P):
                left[:, p, q] = self.on.dots(products[p], z[q])
        scale = solve(left, right)
        pull = self.on.copy(self.target)
        for p in range(P):
            pull -= products[p] * self.on.put(scale[:, p, None].astype(np.float32))
            self._turn_over(p, scale[:, p] < 0)
        self.scale = np.ascontiguousarray(np.abs(scale.T), np.float32)
        self.pull, self.products = pull, None

    def keep(self) -> None:
        """Remembers each row's state where its error is the least so far."""
        wrong = self.on.dots(self.d - self._expanded(self.sign, self.scale), self.pull)
        better = wrong < self.least
        self.least[better] = wrong[better]
        self.best_scale[:, better] = self.scale[:, better]
        self.on.take_rows(self.best_pull, self.pull, better)
        mask = _by_strip(better, self.sign)
        np.copyto(self.best_sign, self.sign, where=mask[None, :, None, :])

    def _from_pull(self) -> list[Matrix] | None:
        """The product of one plane; rows without a scale never move, so that theirs does not matter."""
        if len(self.sign) > 1:
            return None
        scale: F32 = np.where(self.scale[0] > 0, self.scale[0], np.float32(1))
        return [(self.target - self.pull) / self.on.put(scale[:, None])]

    def _plane(self, p: int) -> Matrix:
        """+-1, fp32 [N, K]."""
        return self._expanded(self.sign[p : p + 1], np.ones((1, self.shape[0]), np.float32))

    def _expanded(self, sign: Bits, scale: F32) -> Matrix:
        return self.on.expand(sign, scale, None, self.shape, slice(0, self.shape[0]))

    def _turn_over(self, p: int, rows: NDArray[np.bool_]) -> None:
        if rows.any():
            used = pack(np.ones((1, self.shape[1]), np.bool_))[
                0, :, 0
            ]  # the bits of a row that are no padding
            mask = _by_strip(rows, self.sign)
            self.sign[p] ^= np.where(mask[:, None, :], used[None, :, None], np.uint32(0))


def _by_strip(rows: NDArray[np.bool_], sign: Bits) -> NDArray[np.bool_]:
    """Rows [N] as [S, 16]."""
    n_strips, width = sign.shape[1], sign.shape[3]
    return np.pad(rows, (0, n_strips * width - len(rows))).reshape(n_strips, width)


def solve(left: F64, right: F64) -> F64:
    """P equations for each row; planes that are the same share what they have."""
    P = left.shape[-1]
    trace = np.einsum("npp->n", left)
    left = left + (1e-9 * trace + 1e-300)[:, None, None] * np.eye(P)
    return np.asarray(np.linalg.solve(left, right[..., None])[..., 0])


def expand_rows(delta: Delta, rows: slice) -> F32:
    """The delta alone, fp32 [rows, K]."""
    out: F32 = HOST.expand(delta.sign, delta.scale, delta.column, delta.shape, rows)
    return out
