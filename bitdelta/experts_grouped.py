"""All experts of a mixture at once, on a GPU that is not waited for.

    y[r] = x[r] W[e]^T + the delta term of expert e and tenant t of row r

The base's part is one grouped product. For the deltas every pair of an expert and a tenant is a slot of one table, and
the GPU looks up which slot a row has, so that one launch is for all. y is rounded by the grouped product and again
with the deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from . import ops
from .change import Change, Packed, Stack
from .cuda_memory import is_on_gpu

T: TypeAlias = torch.Tensor

MAX_SLOTS = 4096  # of a table, BD_CUDA_MAX_TENANTS


class Grouped:
    """One stack [E, N, K] of the base, and the deltas of a batch's tenants, all of whose changes are packed.

    Args:
        parameter: the stack.
        changes: of each tenant.
        bounds: rows of a matrix that change on their own, as in `Stack`.
    """

    def __init__(
        self, parameter: T, changes: Sequence[Change | None], bounds: Sequence[tuple[int, int]]
    ) -> None:
        self.parameter = parameter
        self.parts = []  # first and last row, deltas, slot of (expert, tenant), -1 none; the last tenant is the base
        for i, (begin, end) in enumerate(bounds):
            deltas: list[Any] = []
            slots = torch.full((len(parameter), len(changes) + 1), -1)
            for tenant, change in enumerate(changes):
                for expert, own in enumerate(change.parts if isinstance(change, Stack) else ()):
                    part = own[i]
                    if isinstance(part, Packed):
                        slots[expert, tenant] = len(deltas)
                        deltas.append(part.delta)
            if deltas:
                shape = end - begin, parameter.shape[2]
                self.parts.append((begin, end, deltas, shape, ops.on_device(slots, parameter.device)))
        self._tables: dict[int, Any] = {}

    @staticmethod
    def can(parameter: T, changes: Sequence[Change | None]) -> bool:
        """Whether a batch's changes of a stack can run so."""
        packed = all(
            change is None
            or isinstance(change, Stack)
            and all(part is None or isinstance(part, Packed) for parts in change.parts for part in parts)
            for change in changes
        )
        # what PyTorch multiplies in groups: bf16 on a GPU, rows of 16 bytes
        known = not parameter.is_cuda or parameter.dtype == torch.bfloat16
        sizes = parameter.shape[1] % 8 == parameter.shape[2] % 8 == 0
        return (
            packed
            and known
            and sizes
            and is_on_gpu(parameter)
            and hasattr(F, "grouped_mm")
            and len(parameter) * len(changes) <= MAX_SLOTS
        )

    def product(self, x: T, chosen: T, ends: T, tenants: T) -> T:
        """[R, N] of rows x [R, K] sorted by expert, on the GPU.

        Args:
            chosen: int64 [R], ascending: the row's expert.
            ends: int32 [E]: the first row after each expert's.
            tenants: int64 [R]: the row's tenant, -1 the base.
        """
        y = F.grouped_mm(x, self.parameter.transpose(-2, -1), offs=ends)
        for begin, end, deltas, shape, slots in self.parts:
            if begin not in self._tables:
                self._tables[begin] = ops.prepared_deltas(deltas, shape, x)
            ids = slots[chosen, tenants]
            ops.linear_add(y[:, begin:end], x, self._tables[begin], ids)
        return y
