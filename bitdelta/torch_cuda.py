"""The operators of `operators.py` where their tensors are on a GPU: lists of tensors to tables, and the backward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from . import cuda
from .delta import Delta
from .torch_delta import TorchDelta, as_torch

T: TypeAlias = torch.Tensor

_moved: weakref.WeakKeyDictionary[Delta, dict[torch.device, TorchDelta]] = weakref.WeakKeyDictionary()


def as_torch_on(delta: Delta | TorchDelta, like: T) -> TorchDelta:
    """`as_torch`, in the memory of the device of `like`: the same object at every call."""
    if isinstance(delta, TorchDelta) or not like.is_cuda:
        return as_torch(delta)
    places = _moved.setdefault(delta, {})
    if like.device not in places:
        host = as_torch(delta)
        parts: list[Any] = [
            None if each is None else each.to(like.device) for each in (host.sign, host.row, host.column)
        ]
        places[like.device] = TorchDelta(parts[0], parts[1], parts[2], delta.shape)
    return places[like.device]


def deltas_of(signs: Sequence[T], rows: Sequence[T], columns: Sequence[T | None], K: int) -> list[TorchDelta]:
    """The operators' lists as deltas."""
    parts = zip(signs, rows, columns, strict=True)
    return [TorchDelta(sign, row, column, (row.shape[-1], K)) for sign, row, column in parts]


def linear_backward(
    dy: T,
    x: T,
    weight: T | None,
    deltas: list[TorchDelta],
    tenant_ids: T,
    wants_dx: bool,
    wants_rows: bool,
    wants_columns: bool,
    delta_in_dx: bool,
) -> tuple[T, list[T], list[T]]:
    """As the operator: dx, the gradients of rows, those of columns; what is not wanted has no elements.

    The delta's part of dx and dcolumn come of one pass, as do all tenants; sums over rows are fp64.
    """
    none = x.new_empty(0, dtype=torch.float32)
    with_delta = wants_dx and delta_in_dx and bool(deltas)
    g, drow, dcolumn = cuda.gradients(dy, x, deltas, tenant_ids, with_delta, wants_rows, wants_columns)
    drows, dcolumns = [], []
    for t, delta in enumerate(deltas):
        drows.append(none if drow is None else drow[t, : delta.planes].clone())
        if delta.column is None:
            dcolumns.append(none)
        else:
            dcolumns.append(none if dcolumn is None else dcolumn[t, : delta.planes].clone())
    if not wants_dx:
        return x.new_empty(0), drows, dcolumns
    dx = x.new_zeros(x.shape, dtype=torch.float32) if weight is None else cuda.multiply(dy, weight.detach())
    if g is not None:
        dx += g
    return dx.to(x.dtype), drows, dcolumns
