"""A linear of the base with every row's own delta.

    y[m] = base(x[m]) + the delta term of the row's tenant + what changed of the bias

The base's product is made together with the deltas, and rounded once, where the weight is a plain matrix on a GPU,
or on the CPU in a half type, or the rows are few; few rows of a half type without deltas run the same way, so that a
base row does not depend on its neighbours. Else the module makes it, whatever it is (quantised, a subclass), and the
deltas are added to that: a second rounding. On a GPU linears with the same input run as one (siblings.py). Output rows
that only some tenants have (new tokens) are -inf for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import ops, siblings
from .batch import Batch, Ids, Rows
from .change import Change, LowRank, Packed
from .cuda_memory import is_on_gpu
from .linear import STREAM_ROWS, linear
from .wrapped import Wrapped

T: TypeAlias = torch.Tensor
Shape = tuple[int, int]

PLAIN = (nn.Parameter, torch.Tensor)  # weights that are what they look like: not quantised

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
        self.kernels: dict[Shape, tuple[list[Any], Ids]] = {}
        self.none = np.full(len(changes) + 1, -1, np.int64)  # the look-up of a shape without deltas
        self._prepared: dict[tuple[Any, ...], Any] = {}
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
        new: tuple[list[Any], Ids] = [], np.full(n_tenants + 1, -1, np.int64)
        deltas, index = self.kernels.setdefault(change.delta.shape, new)
        index[tenant] = len(deltas)
        deltas.append(change.delta)
        if change.rows is not None:
            self.rows.append((tenant, change.delta.shape[0], change.rows))

    def of(self, shape: Shape, rows: Rows, x: T) -> tuple[Any, Any]:
        """The deltas of this shape, and per row of x the index of its own, as the operators take them."""
        deltas, index = self.kernels.get(shape, ([], self.none))
        key = shape, x.device, torch.is_grad_enabled()
        if key not in self._prepared:
            self._prepared[key] = ops.prepared_deltas(deltas, shape, x)
        return self._prepared[key], rows.within(index, len(deltas), x)

    def product(self, x: T, weight: T, bias: T | None, rows: Rows) -> T:
        """x [M, K] times a plain weight [N, K] of the base, with every row's own changes."""
        shape = self.fused(x, weight)
        if shape is None:
            weight = weight.detach().to(x.dtype)
            out = F.linear(x, weight, None if bias is None else bias.detach().to(x.dtype))
        else:
            out = ops.linear(x, weight, bias, *self.of(shape, rows, x))
        return self.add(out, x, rows, shape, bias)

    def fused(self, x: T, weight: Any) -> Shape | None:
        """The deltas that our own kernels take along with the base's product, where they make it.

        Measured faster than PyTorch's on the CPU for any rows in a half type with deltas, and for few rows: 16 rows of
        bf16 take PyTorch four times as long where the processor has no such instructions.
        """
        on_gpu = is_on_gpu(weight)
        if (
            type(weight) not in PLAIN
            or not (on_gpu or weight.device.type == "cpu")
            or weight.dtype != x.dtype
        ):
            return None
        own = weight.shape[0], weight.shape[1]
        is_few, is_half = len(x) <= STREAM_ROWS, weight.dtype in (torch.bfloat16, torch.float16)
        if self.kernels:
            shape = next(iter(self.kernels))
            return shape if shape == own and (is_few or is_half or on_gpu) else None
        return own if is_few and is_half else None

    def add(
        self,
        out: T,
        x: T,
        rows: Rows,
        done: Shape | None,
        bias: T | None = None,
        is_transposed: bool = False,
    ) -> T:
        """Adds to the base's product, or replaces, what the rows' tenants change; deltas of shape `done` are in it."""
        for tenant, change in self.rest:
            own = rows.of(tenant)
            if len(own):
                _rest(change, x, out, own, bias, is_transposed)
        for shape in self.kernels:
            if shape != done:
                out = _add(out, x, shape, *self.of(shape, rows, x), is_transposed)
        for tenant, change in self.biases:
            assert bias is not None
            own = change.expand(bias).to(out.dtype).clone()
            common = min(len(own), len(bias))
            own[:common] -= bias.detach()[:common].to(out.dtype)
            out[rows.of(tenant), : len(own)] += own
        return out


def _add(out: T, x: T, shape: Shape, deltas: Any, ids: Any, is_transposed: bool) -> T:
    if is_transposed:
        return out.add_(ops.linear_transposed(x.float(), deltas, ids))
    if shape[0] == out.shape[1]:
        return ops.linear_add(out, x, deltas, ids)
    narrow = out[:, : shape[0]]
    added = ops.linear_add(narrow, x, deltas, ids)
    if added.requires_grad:  # new, else in place
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
    followers: tuple[LinearForward, ...] = ()  # those given the same input after it (siblings.py)
    is_alone = False  # found to have none

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
        return type(weight) in PLAIN and weight.dtype in (torch.bfloat16, torch.float16)

    @property
    def n_out(self) -> int:
        module: Any = self.module
        return int(module.nf if self.is_transposed else module.out_features)

    def run(self, plan: LinearPlan, batch: Batch, *args: Any, **kwargs: Any) -> T:
        module: Any = self.module
        x = args[0] if args else next(iter(kwargs.values()))
        flat = x.reshape(-1, x.shape[-1])
        rows = batch.rows_of(len(flat), self.path, flat.device)
        shape = self.fused(plan, flat)
        if shape is None:
            y = self.plain(*args, **kwargs)
            out = y.reshape(-1, y.shape[-1])
        else:
            deltas, index = plan.kernels.get(shape, ([], plan.none))
            if batch.prefill == "merged" and _is_long(flat, index[rows.ids]):
                ids = index[rows.ids]
                out = linear(flat, module.weight, deltas, ids, module.bias, precision="merged")
            elif is_on_gpu(flat):
                out = siblings.product(self, plan, batch, x, shape)
            else:
                out = ops.linear(flat, module.weight, module.bias, *plan.of(shape, rows, flat))
        if plan.is_ragged:
            out = _widen(plan, rows, flat, out)
        out = plan.add(out, flat, rows, shape, getattr(module, "bias", None), self.is_transposed)
        return out.reshape(*x.shape[:-1], plan.width)

    def fused(self, plan: LinearPlan, x: T) -> Shape | None:
        """`LinearPlan.fused`, of a module that is a plain linear."""
        module: Any = self.module
        if type(module).forward is not nn.Linear.forward or type(module.weight) not in PLAIN:
            return None
        return plan.fused(x, module.weight)


def _is_long(x: T, ids: Ids) -> bool:
    """Whether every tenant has rows enough, and no gradient is wanted."""
    if len(x) < MERGED_ROWS or torch.is_grad_enabled() and x.requires_grad:
        return False
    return bool(np.unique(ids, return_counts=True)[1].min() >= MERGED_ROWS)


def _widen(plan: LinearPlan, rows: Rows, x: T, narrow: T) -> T:
    """Room for outputs that only some tenants have."""
    out = narrow.new_full((len(x), plan.width), -torch.inf)
    out[:, : narrow.shape[1]] = narrow
    for tenant, size in plan.sizes:
        out[rows.of(tenant), size:] = -torch.inf
    for tenant, n, added in plan.rows:
        own = rows.of(tenant)
        out[own, n : n + len(added)] = F.linear(x[own], added.to(x.dtype)).to(out.dtype)
    return out


class Conv1DForward(LinearForward):
    """transformers' Conv1D keeps its weight as [in, out], so its delta's product is the transposed one."""

    is_transposed = True
