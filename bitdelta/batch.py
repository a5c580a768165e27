"""Whose rows run now: the tenants of the batch in progress, seen by every wrapped module of the model.

    ids       int64 [B]: row -> index in `tenants`, -1 = base
    rows      first dimension of the tensors inside the model: B, or B times beams and return sequences

Tensors are batch-major, so the row of a tensor with n B leading entries belongs to ids[row // n]. The batch is a
context variable: threads and tasks run batches of their own over the same model. What a batch needs on a GPU is
brought there once, at the first step of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import ops
from .errors import Error

if TYPE_CHECKING:
    from .tenant import Tenant

Ids = NDArray[np.int64]

current: ContextVar[Batch | None] = ContextVar("bitdelta_batch", default=None)


class Rows:
    """The tenants of the leading entries of a tensor: int64 [n], -1 the base; on the host, and where the tensor is."""

    def __init__(self, ids: Ids, device: torch.device) -> None:
        self.ids, self.device = ids, device
        self._placed: torch.Tensor | None = None
        self._indices: dict[int, torch.Tensor] = {}
        self._given: dict[tuple[Any, ...], Any] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def placed(self) -> torch.Tensor:
        """The ids on the device."""
        if self._placed is None:
            self._placed = ops.on_device(torch.from_numpy(self.ids), self.device)
        return self._placed

    def of(self, tenant: int) -> torch.Tensor:
        """Which entries are this tenant's, ascending, on the device."""
        if tenant not in self._indices:
            found = torch.from_numpy(np.flatnonzero(self.ids == tenant))
            self._indices[tenant] = ops.on_device(found, self.device)
        return self._indices[tenant]

    def within(self, index: Ids, n_deltas: int, x: torch.Tensor) -> Any:
        """`tenant_ids` of a product of x: the rows' places in a list of deltas, tenant t being at index[t]."""
        key = index.tobytes(), n_deltas, ops.is_plain(x)
        if key not in self._given:
            self._given[key] = ops.prepared_ids(index[self.ids], n_deltas, x)
        return self._given[key]


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
        self.shared: Any = None  # products made ahead (siblings.py)
        present = np.unique(ids)
        self.present = [int(i) for i in present]
        self._expanded: dict[int, Ids] = {}
        self._rows: dict[tuple[int, torch.device], Rows] = {}
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

    def rows_of(self, n_rows: int, name: str, device: torch.device) -> Rows:
        """The same for a tensor on this device."""
        key = n_rows, device
        if key not in self._rows:
            self._rows[key] = Rows(self.expand(n_rows, name), device)
        return self._rows[key]

    def part(self, tenant: int) -> Batch:
        """This tenant's rows as a batch of their own."""
        if tenant not in self._parts:
            own = self.ids[self.ids == tenant]
            tenants = () if tenant < 0 else (self.tenants[tenant],)
            self._parts[tenant] = Batch(tenants, np.minimum(own, 0), self.vocabulary, self.prefill)
        part = self._parts[tenant]
        part.rows = len(part.ids) * (self.rows // len(self.ids))
        return part
