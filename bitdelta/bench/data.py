"""More than 1 GB of random weights and as much of random signs, seen as matrices of any shape in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..array import BFloat16Array, aligned_empty, from_float32
from ..delta import Delta

FULL = 1_073_741_824  # bytes of each: no cache holds it
QUICK = 1 << 22
STEP = 1 << 22  # words made at a time


class Data:
    def __init__(self, n_bytes: int) -> None:
        self._rng = np.random.default_rng(0)
        self.words = self._random(n_bytes)
        # as bf16: size 2^-7 .. 2^-4 and either sign, so no NaN and no denormal slows anything
        self.words &= np.uint64(0x81FF81FF81FF81FF)
        self.words |= np.uint64(0x3C003C003C003C00)
        self._signs = self._random(n_bytes).view(np.uint32)

    def _random(self, n_bytes: int) -> Any:
        out = aligned_empty((n_bytes // 8,), np.uint64)
        for begin in range(0, len(out), STEP):
            part = out[begin : begin + STEP]
            part[...] = self._rng.integers(0, 1 << 64, len(part), np.uint64)
        return out

    def weights(self, N: int, K: int) -> list[Any]:
        """bf16 [N, K]."""
        flat = self.words.view(np.uint16)
        return [matrix.reshape(N, K).view(BFloat16Array) for matrix in _cut(flat, N * K)]

    def float_weights(self, N: int, K: int) -> list[Any]:
        """fp32 [N, K], for BLAS."""
        return [matrix.reshape(N, K) for matrix in _cut(self.floats, N * K)]

    @cached_property
    def floats(self) -> Any:
        """Every other bf16 number as fp32: as many bytes."""
        words = self.words.view(np.uint32)
        out = aligned_empty((len(words),), np.uint32)
        for begin in range(0, len(out), STEP):
            np.left_shift(words[begin : begin + STEP], np.uint32(16), out=out[begin : begin + STEP])
        return out.view(np.float32)

    def deltas(self, N: int, K: int) -> list[Delta]:
        """One plane, row scales. N is a multiple of 16, K of 256: random bits are then a valid delta."""
        scale = np.full((1, N), 0.01, np.float32)
        shape = (1, N // 16, K // 32, 16)
        return [Delta(words.reshape(shape), scale, None, (N, K)) for words in _cut(self._signs, N * K // 32)]

    def rows(self, M: int, K: int) -> Any:
        """bf16 [M, K], Gaussian."""
        return from_float32(self._rng.normal(size=(M, K)).astype(np.float32), "bfloat16")


def at(items: Sequence[Any], turn: int) -> Any:
    return items[turn % len(items)]


def _cut(flat: Any, size: int) -> list[Any]:
    return [flat[i : i + size] for i in range(0, len(flat) - size + 1, size)]
