"""A linear of the base with every row's own delta.

    y[m] = base(x[m]) + the delta term of the row's tenant + what changed of the bias

The base's product is made together with the deltas, and rounded once, where the weight is a plain matrix on the CPU
in a half type, or the rows are few; few rows of a half type without deltas run the same way, so that a base row does
not depend on its neighbours. Else the module makes it, whatever it is (quantised, a subclass), and the deltas are
added to that: a second rounding. Output rows that only some tenants have (new tokens) are -inf for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .batch import Batch, Ids
from .change import Change, LowRank, Packed
from .delta import Delta
from .linear import STREAM_ROWS, linear
from .wrapped import Wrapped

T: TypeAlias = torch.Tensor
Shape = tuple[int, int]

MERGED_ROWS = (
    128  # of one tenant, from which expanding its weight by panels pays: at 64 it does not, at 256 it does
)


class LinearPlan:
    """What a linear does with a batch, sorted by how it is computed.

    kernels   shape of the deltas -> (deltas, look-up tenant -> index in them)
    rest      (tenant, change): low-rank, whole or converted weights
    rows      (tenant, N, rows added below)
    sizes     (tenant, output rows) where not all have the same
    biases    (tenant, bias)
    """

    def __init__(self, changes: Sequence[Mapping[str, Change]], width: int, n: int) -> None:
        self.width, self.is_ragged = width, width != n
        self.kernels: dict[Shape, tuple[list[Delta], Any]] = {}
        self.rest: list[tuple[int, Change]] = []
        self.rows: list[tuple[int, int, T]] = []
        self.sizes: list[tuple[int, int]] = []
        self.biases: list[tuple[int, Change]] = []
        for tenant, own in enumerate(changes):
            if (bias := own.get("bias")) is not None:
                self.biases.append((tenant, bias))
            change = own.get("weight")
            if change is not None and self.is_ragged:
                self.sizes.append((tenant, change.shape[0]))
            if isinstance(change, Packed):
                self._add_kernel(tenant, change, len(changes))
            elif change is not None:
                self.rest.append((tenant, change))

    def _add_kernel(self, tenant: int, change: Packed, n_tenants: int) -> None:
        # the last place of the look-up is the base's, -1
        new: tuple[list[Delta], Any] = [], np.full(n_tenants + 1, -1, np.int64)
        deltas, index = self.kernels.setdefault(change.delta.shape, new)
        index[tenant] = len(deltas)
        deltas.append(change.delta)
        if change.rows is not None:
            self.rows.append((tenant, change.delta.shape[0], change.rows))

    def of(self, shape: Shape, tenants: Ids) -> tuple[list[Delta], Any]:
        """The deltas of this shape, and per row the index of its own."""
        if shape not in self.kernels:  # the base's own
            return [], np.full(len(tenants), -1)
        deltas, index = self.kernels[shape]
        return deltas, index[tenants]

    def product(self, x: T, weight: T, bias: T | None, tenants: Ids) -> T:
        """x [M, K] times a plain weight [N, K] of the base, with every row's own changes."""
        shape = self.fused(x, weight)
        if shape is None:
            weight = weight.detach().to(x.dtype)
            out = F.linear(x, weight, None if bias is None else bias.detach().to(x.dtype))
        else:
            out = ops.linear(x, weight, bias, *self.of(shape, tenants))
        return self.add(out, x, tenants, shape, bias)

    def fused(self, x: T, weight: Any) -> Shape | None:
        """The deltas that our own kernels take along with the base's product, where they make it.

        Measured faster than PyTorch's on the CPU for any rows in a half type with deltas, and for few rows: 16 rows of
        bf16 take PyTorch four times as long where the processor has no such instructions.
        """
        if type(weight) not in (nn.Parameter, T) or weight.device.type != "cpu" or weight.dtype != x.dtype:
            return None
        own = weight.shape[0], weight.shape[1]
        is_few, is_half = len(x) <= STREAM_ROWS, weight.dtype in (torch.bfloat16, torch.float16)
        if self.kernels:
            shape = next(iter(self.kernels))
            return shape if shape == own and (is_few or is_half) else None
        return own if is_few and is_half else None

    def add(
        self,
        out: T,
        x: T,
        tenants: Ids,
        done: Shape | None,
        bias: T | None = None,
        is_transposed: bool = False,
    ) -> T:
        """Adds to the base's product, or replaces, what the rows' tenants change; deltas of shape `done` are in it."""
        for tenant, change in self.rest:
            rows = rows_of(tenant, tenants)
            if len(rows):
                _rest(change, x, out, rows, bias, is_transposed)
        for shape in self.kernels:
            if shape != done:
                out = _add(out, x, shape, *self.of(shape, tenants), is_transposed)
        for tenant, change in self.biases:
            assert bias is not None
            own = change.expand(bias).to(out.dtype).clone()
            common = min(len(own), len(bias))
            own[:common] -= bias.detach()[:common].to(out.dtype)
            out[rows_of(tenant, tenants), : len(own)] += own
        return out


def rows_of(tenant: int, tenants: Ids) -> T:
    return torch.from_numpy(np.flatnonzero(tenants == tenant))


def _add(out: T, x: T, shape: Shape, deltas: list[Delta], ids: Any, is_transposed: bool) -> T:
    if is_transposed:
        return out.add_(ops.linear_transposed(x.float(), deltas, ids))
    if shape[0] == out.shape[1]:
        return ops.linear_add(out, x, deltas, ids)
    narrow = out[:, : shape[0]]
    added = ops.linear_add(narrow, x, deltas, ids)
    if added.data_ptr() != narrow.data_ptr():  # new where gradients are needed
        return torch.cat([added, out[:, shape[0] :]], 1)
    return out


def _rest(change: Change, x: T, out: T, rows: T, bias: T | None, is_transposed: bool) -> None:
    if isinstance(change, LowRank):
        n = len(change.b)
        out[rows, :n] = (out[rows, :n] + change.product(x[rows])).to(out.dtype)
        return
    weight = change.expand(x)  # whole and converted weights only ask for a dtype
    weight = weight.T if is_transposed else weight
    product = F.linear(x[rows], weight).to(out.dtype)
    if bias is not None:
        common = min(len(bias), len(weight))
        product[:, :common] += bias.detach()[:common].to(out.dtype)
    out[rows, : len(weight)] = product


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
        return LinearPlan(changes, width, n) if any(changes) or width != n or self._is_half else None

    @property
    def _is_half(self) -> bool:
        """Whether our kernels make the base's product for few rows, also where no tenant changed it."""
        weight: Any = getattr(self.module, "weight", None)
        return type(weight) is nn.Parameter and weight.dtype in (torch.bfloat16, torch.float16)

    @property
    def n_out(self) -> int:
        module: Any = self.module
        return int(module.nf if self.is_transposed else module.out_features)

    def run(self, plan: LinearPlan, batch: Batch, *args: Any, **kwargs: Any) -> T:
        module: Any = self.module
        x = args[0] if args else next(iter(kwargs.values()))
        flat = x.reshape(-1, x.shape[-1])
        tenants = batch.expand(len(flat), self.path)
        shape = None
        if type(module).forward is nn.Linear.forward and type(module.weight) is nn.Parameter:
            shape = plan.fused(flat, module.weight)
        if shape is None:
            y = self.plain(*args, **kwargs)
            out = y.reshape(-1, y.shape[-1])
        else:
            deltas, ids = plan.of(shape, tenants)
            if batch.prefill == "merged" and _is_long(flat, ids):
                out = linear(flat, module.weight, deltas, ids, module.bias, precision="merged")
            else:
                out = ops.linear(flat, module.weight, module.bias, deltas, ids)
        if plan.is_ragged:
            out = _widen(plan, tenants, flat, out)
        out = plan.add(out, flat, tenants, shape, getattr(module, "bias", None), self.is_transposed)
        return out.reshape(*x.shape[:-1], plan.width)


def _is_long(x: T, ids: Ids) -> bool:
    """Whether every tenant has rows enough, and no gradient is wanted."""
    if len(x) < MERGED_ROWS or torch.is_grad_enabled() and x.requires_grad:
        return False
    return bool(np.unique(ids, return_counts=True)[1].min() >= MERGED_ROWS)


def _widen(plan: LinearPlan, tenants: Ids, x: T, narrow: T) -> T:
    """Room for outputs that only some tenants have."""
    out = narrow.new_full((len(x), plan.width), -torch.inf)
    out[:, : narrow.shape[1]] = narrow
    for tenant, size in plan.sizes:
        out[rows_of(tenant, tenants), size:] = -torch.inf
    for tenant, n, added in plan.rows:
        rows = rows_of(tenant, tenants)
        out[rows, n : n + len(added)] = F.linear(x[rows], added.to(x.dtype)).to(out.dtype)
    return out


class Conv1DForward(LinearForward):
    """transformers' Conv1D keeps its weight as [in, out], so its delta's product is the transposed one."""

    is_transposed = True
