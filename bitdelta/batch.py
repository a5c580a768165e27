"""Whose rows run now: the tenants of the batch in progress, seen by every wrapped module of the model.

    ids       int64 [B]: row -> index in `tenants`, -1 = base
    rows      first dimension of the tensors inside the model: B, or B times beams and return sequences

Tensors are batch-major, so the row of a tensor with n B leading entries belongs to ids[row // n]. The batch is a
context variable: threads and tasks run batches of their own over the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import Error

if TYPE_CHECKING:
    from .tenant import Tenant

Ids = NDArray[np.int64]

current: ContextVar[Batch | None] = ContextVar("bitdelta_batch", default=None)


class Batch:
    """The rows of one call of the model.

    Args:
        tenants: the distinct tenants.
        ids: int64 [B], index in `tenants` or -1.
        vocabulary: how many logits every row has, or None: as many as its tenant's model.
        prefill: "exact", or "merged": long prompts by expanded weights.
    """

    def __init__(
        self, tenants: Sequence[Tenant], ids: Ids, vocabulary: int | None = None, prefill: str = "exact"
    ) -> None:
        self.tenants = tuple(tenants)
        self.ids = ids
        self.vocabulary = vocabulary
        self.prefill = prefill
        self.rows = len(ids)
        self.plans: dict[int, Any] = {}  # id of a wrapper -> what it does with this batch
        present = np.unique(ids)
        self.present = [int(i) for i in present]
        self._expanded: dict[int, Ids] = {}
        self._indices: dict[tuple[int, int], Any] = {}
        self._parts: dict[int, Batch] = {}

    @property
    def is_uniform(self) -> bool:
        """Whether all rows belong to one tenant; then their order does not matter."""
        return len(self.present) == 1

    def expand(self, n_rows: int, name: str) -> Ids:
        """The tenant of each of `n_rows` leading entries of a tensor."""
        ids = self._expanded.get(n_rows)
        if ids is None:
            count = len(self.ids)
            if self.is_uniform:
                ids = np.full(n_rows, self.ids[0])
            elif n_rows % count:
                raise Error(
                    f"{name}: {n_rows} rows inside a batch of {count}; which tenant a row belongs to is not known, so "
                    "this module cannot run rows of several tenants; run them in separate batches"
                )
            else:
                ids = np.repeat(self.ids, n_rows // count)
            self._expanded[n_rows] = ids
        return ids

    def indices(self, tenant: int, n_rows: int, name: str) -> Any:
        """A tensor: which of `n_rows` leading entries are this tenant's."""
        import torch

        key = (tenant, n_rows)
        if key not in self._indices:
            self._indices[key] = torch.from_numpy(np.flatnonzero(self.expand(n_rows, name) == tenant))
        return self._indices[key]

    def part(self, tenant: int) -> Batch:
        """This tenant's rows as a batch of their own."""
        if tenant not in self._parts:
            own = self.ids[self.ids == tenant]
            tenants = () if tenant < 0 else (self.tenants[tenant],)
            self._parts[tenant] = Batch(tenants, np.minimum(own, 0), self.vocabulary, self.prefill)
        part = self._parts[tenant]
        part.rows = len(part.ids) * (self.rows // len(self.ids))
        return part
