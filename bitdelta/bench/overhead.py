"""What `bitdelta.ops.linear` adds to the extension's own call: checks, the output's memory, handles, threads.

One row of a small matrix, so that the product takes next to nothing; without gradients, which is how models decode.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _C
from ..array import aligned_empty
from ..delta import extract
from ..errors import Error
from .timing import Case, interleaved

N, K = 64, 256
CALLS = 200  # in one timed call


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row of kind "overhead", or none where PyTorch is not installed."""
    try:
        import torch

        from .. import ops
    except ImportError:
        return []
    rng = np.random.default_rng(0)
    base = aligned_empty((N, K), np.float32)
    base[...] = rng.normal(size=(N, K))
    delta = extract(base, base + rng.normal(scale=0.01, size=(N, K)).astype(np.float32))
    x, weight, out = torch.randn(1, K), torch.from_numpy(base), torch.empty(1, N)
    ids, handles = torch.zeros(1, dtype=torch.int64), [delta.handle]

    def extension(turn: int) -> None:
        for _ in range(CALLS):
            _C.linear(out, x, weight, None, None, handles, ids, "fixed16")

    def operator(turn: int) -> None:
        for _ in range(CALLS):
            ops.linear(x, weight, None, [delta], ids)

    extension(0)
    with torch.no_grad():
        if not torch.equal(ops.linear(x, weight, None, [delta], ids), out):
            raise Error("bitdelta.ops.linear differs from the extension's product")
    cases = {name: Case(call, 0, _C.isa()) for name, call in (("own", extension), ("ops", operator))}
    with torch.no_grad():
        samples = interleaved(cases, 0.05 if quick else 1.0, 3 if quick else 20)
    added = (samples["ops"].median - samples["own"].median) / CALLS
    return [{"kind": "overhead", "microseconds": added * 1e6, "calls": samples["ops"].calls * CALLS}]
