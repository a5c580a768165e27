"""What this GPU can do, measured before anything else: bytes read, bytes copied, operations of dense products.

Shares and rooflines of the bench are of these figures, not of a data sheet's.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from .cuda_data import Data
from .cuda_timing import Call, each, replayed

READ_BYTES = 1 << 30  # of one pass; far beyond an L2
SQUARE = 8192
WARM_SECONDS = 1.0
SECONDS = 1.0  # of one measurement


def measure(data: Data, seconds: float = SECONDS) -> dict[str, Any]:
    """`read`, `copy` (bytes read and written) in bytes/s, `rate` in operations/s, and who read fastest."""
    _warm(data)
    halves = [data.weights.cut(i * READ_BYTES, (READ_BYTES // 2,), torch.bfloat16) for i in range(2)]
    reads = {name: _rate(calls, seconds) for name, calls in _readers(halves).items()}
    copies: list[Call] = [lambda: halves[1].copy_(halves[0])]
    square = (SQUARE, SQUARE)
    a, b = (data.weights.cut(i * 2 * SQUARE**2, square, torch.bfloat16) for i in range(2))
    out = torch.empty(square, dtype=torch.bfloat16, device=data.device)
    product = replayed([lambda: torch.mm(a, b.T, out=out)], seconds)
    best = max(reads, key=lambda name: reads[name] or 0)
    return {
        "read": reads[best],
        "reader": best,
        "readers": reads,
        "copy": 2 * READ_BYTES / replayed(copies, seconds).median,
        "rate": 2 * SQUARE**3 / product.median,
    }


def _warm(data: Data) -> None:
    """Dense products for WARM_SECONDS, so that nothing below is of an idle GPU's clocks."""
    a = data.weights.cut(0, (SQUARE, SQUARE), torch.bfloat16)
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_SECONDS:
        float(torch.mm(a, a)[0, 0])


def _rate(calls: list[Call], seconds: float) -> float | None:
    """Bytes/s; None of a reader that does not work here, as Triton's may not."""
    try:
        return READ_BYTES / replayed(calls, seconds).median
    except Exception:  # noqa: BLE001 - of whatever kind a compiler's is
        return None


def _readers(halves: list[Any]) -> dict[str, list[Call]]:
    """Sums over a block, in turn with another one."""
    floats = [half.view(torch.float32) for half in halves]
    found: dict[str, list[Call]] = {
        "torch.sum": each(torch.sum, floats),
        "torch.amax": each(torch.amax, floats),
    }
    try:
        from .cuda_triton import summed
    except ImportError:  # Triton is not part of every PyTorch
        return found
    parts = torch.empty(1 << 16, dtype=torch.float32, device=halves[0].device)
    return found | {"Triton sum": each(partial(summed, parts=parts), floats)}
