"""A linear of the base with every row's own delta.

    y[m] = base(x[m]) + the delta term of the row's tenant + what changed of the bias

The base's product is made together with the deltas, and rounded once, where the weight is a plain matrix on the CPU
in a half type, or the rows are few. Else the module makes it, whatever it is (quantised, a subclass), and the deltas
are added to that: a second rounding. Output rows that only some tenants have (new tokens) are -inf for the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .batch import Batch
from .change import Change, LowRank, Packed
from .delta import Delta
from .linear import STREAM_ROWS
from .wrapped import Wrapped

Shape = tuple[int, int]


class LinearPlan:
    """What a linear does with a batch, sorted by how it is computed.

    kernels   shape of the deltas -> (deltas, look-up tenant -> index in them)
    rest      (tenant, change): low-rank, whole or converted weights
    rows      (tenant, N, rows added below)
    sizes     (tenant, output rows) where not all have the same
    """

    def __init__(self, changes: list[dict[str, Change]], width: int, n: int) -> None:
        self.width, self.is_ragged = width, width != n
        self.kernels: dict[Shape, tuple[list[Delta], Any]] = {}
        self.rest: list[tuple[int, Change]] = []
        self.rows: list[tuple[int, int, torch.Tensor]] = []
        self.sizes: list[tuple[int, int]] = []
        self.biases: list[tuple[int, Change]] = []
        self._ids: dict[tuple[Shape, int], Any] = {}
        for tenant, own in enumerate(changes):
            if (bias := own.get("bias")) is not None:
                self.biases.append((tenant, bias))
            change = own.get("weight")
            if change is not None and self.is_ragged:
                self.sizes.append((tenant, change.shape[0]))
            if isinstance(change, Packed):
                self._add(tenant, change, len(changes))
            elif change is not None:
                self.rest.append((tenant, change))

    def _add(self, tenant: int, change: Packed, n_tenants: int) -> None:
        new: tuple[list[Delta], Any] = (
            [],
            np.full(n_tenants + 1, -1, np.int64),
        )  # the last is the base's, -1
        deltas, index = self.kernels.setdefault(change.delta.shape, new)
        index[tenant] = len(deltas)
        deltas.append(change.delta)
        if change.rows is not None:
            self.rows.append((tenant, change.delta.shape[0], change.rows))

    def ids(self, shape: Shape, tenants: Any) -> Any:
        """Per row the index of its delta of this shape."""
        key = (shape, len(tenants))
        if key not in self._ids:
            self._ids[key] = self.kernels[shape][1][tenants]
        return self._ids[key]


class LinearForward(Wrapped):
    """See the module."""

    is_transposed = False
    is_head = False  # its output rows are the vocabulary

    def plan(self, batch: Batch) -> LinearPlan | None:
        changes, n = self.changes(batch), self.n_out
        width = max(batch.vocabulary or 0, n) if self.is_head else n
        for own in changes:
            if (change := own.get("weight")) is not None and not self.is_transposed:
                width = max(width, change.shape[0])
        return LinearPlan(changes, width, n) if any(changes) or width != n else None

    @property
    def n_out(self) -> int:
        module: Any = self.module
        return int(module.nf if self.is_transposed else module.out_features)

    def run(self, plan: LinearPlan, batch: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        flat = x.reshape(-1, x.shape[-1])
        tenants = batch.expand(len(flat), self.path)
        shape = next(iter(plan.kernels), None)
        if shape is not None and self._is_fused(shape, flat):
            module: Any = self.module
            out = ops.linear(
                flat, module.weight, module.bias, plan.kernels[shape][0], plan.ids(shape, tenants)
            )
        else:
            shape, y = None, self.plain(*args, **kwargs)
            out = y.reshape(-1, y.shape[-1])
        if plan.is_ragged:
            out = self._widen(plan, batch, flat, out)
        for tenant, change in plan.rest:
            rows = batch.indices(tenant, len(flat), self.path)
            if len(rows):
                self._rest(change, flat, out, rows)
        for other, (deltas, _) in plan.kernels.items():
            if other != shape:
                out = self._add(out, flat, other, deltas, plan.ids(other, tenants))
        if plan.biases:
            self._biases(plan, batch, out)
        return out.reshape(*x.shape[:-1], plan.width)

    def _is_fused(self, shape: Shape, x: torch.Tensor) -> bool:
        """Whether our own kernels make the base's product too: measured faster than PyTorch's on the CPU."""
        module: Any = self.module
        weight = module.weight
        return (
            type(module).forward is nn.Linear.forward
            and type(weight) is nn.Parameter
            and weight.device.type == "cpu"
            and tuple(weight.shape) == shape
            and weight.dtype == x.dtype
            and (weight.dtype != torch.float32 or len(x) <= STREAM_ROWS)
        )

    def _add(
        self, out: torch.Tensor, x: torch.Tensor, shape: Shape, deltas: list[Delta], ids: Any
    ) -> torch.Tensor:
        if self.is_transposed:
            return out.add_(ops.linear_transposed(x.float(), deltas, ids))
        if shape[0] == out.shape[1]:
            return ops.linear_add(out, x, deltas, ids)
        narrow = out[:, : shape[0]]
        added = ops.linear_add(narrow, x, deltas, ids)
        if added.data_ptr() != narrow.data_ptr():  # new where gradients are needed
            return torch.cat([added, out[:, shape[0] :]], 1)
        return out

    def _rest(self, change: Change, x: torch.Tensor, out: torch.Tensor, rows: torch.Tensor) -> None:
        if isinstance(change, LowRank):
            n = len(change.b)
            out[rows, :n] = (out[rows, :n] + change.product(x[rows])).to(out.dtype)
            return
        weight = change.expand(x)  # whole and converted weights only ask for a dtype
        weight = weight.T if self.is_transposed else weight
        product = F.linear(x[rows], weight).to(out.dtype)
        bias: Any = getattr(self.module, "bias", None)
        if bias is not None:
            common = min(len(bias), len(weight))
            product[:, :common] += bias.detach()[:common].to(out.dtype)
        out[rows, : len(weight)] = product

    def _widen(self, plan: LinearPlan, batch: Batch, x: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
        out = narrow.new_full((len(x), plan.width), -torch.inf)
        out[:, : narrow.shape[1]] = narrow
        for tenant, size in plan.sizes:
            out[batch.indices(tenant, len(x), self.path), size:] = -torch.inf
        for tenant, n, added in plan.rows:
            rows = batch.indices(tenant, len(x), self.path)
            out[rows, n : n + len(added)] = F.linear(x[rows], added.to(x.dtype)).to(out.dtype)
        return out

    def _biases(self, plan: LinearPlan, batch: Batch, out: torch.Tensor) -> None:
        base: Any = getattr(self.module, "bias", None)
        for tenant, change in plan.biases:
            own = change.expand(base).to(out.dtype).clone()
            common = min(len(own), len(base))
            own[:common] -= base.detach()[:common].to(out.dtype)
            rows = batch.indices(tenant, len(out), self.path)
            out[rows, : len(own)] += own


class Conv1DForward(LinearForward):
    """transformers' Conv1D keeps its weight as [in, out], so its delta's product is the transposed one."""

    is_transposed = True

    def _is_fused(self, shape: Shape, x: torch.Tensor) -> bool:
        return False
