"""Products of many rows with a base weight [N, K], in fp32 through PyTorch's BLAS.

A weight of 16 bits is widened panel by panel, as `linear.py` does with NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch

from .linear import PANEL_BYTES

T: TypeAlias = torch.Tensor


def times(x: T, weight: T) -> T:
    """x W^T in fp32 [M, N], by panels of W."""
    product = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    wide = x.float()
    for begin, end, panel in _panels(weight):
        torch.mm(wide, panel.T, out=product[:, begin:end])
    return product


def times_transposed(dy: T, weight: T) -> T:
    """dy W in fp32 [M, K], by panels of W."""
    product = torch.zeros((dy.shape[0], weight.shape[1]), dtype=torch.float32)
    wide = dy.float()
    for begin, end, panel in _panels(weight):
        product.addmm_(wide[:, begin:end], panel)
    return product


def _panels(weight: T) -> Iterator[tuple[int, int, T]]:
    """(begin, end, rows begin .. end of W in fp32): W itself where it is fp32, else one panel after another."""
    N, K = weight.shape
    if weight.dtype == torch.float32:
        yield 0, N, weight
        return
    step = max(16, PANEL_BYTES // (4 * max(1, K)))
    panel = torch.empty((min(step, N), K), dtype=torch.float32)
    for begin in range(0, N, step):
        end = min(begin + step, N)
        yield begin, end, panel[: end - begin].copy_(weight[begin:end])
