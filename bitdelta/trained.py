"""Modules over frozen weights whose scales are trained: a linear, and an embedding that is the rows of one.

A scale is what it was before, times exp of its parameter. So it keeps its sign and can never cross zero, a scale of
zero (a row that the fine-tune left alone) stays, and the optimiser's step is a relative change: the original recipe's
absolute one moves a small scale by a fifth at once and a large one hardly.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import _C, ops
from .delta import Delta
from .torch_delta import signs_of

Tensor: TypeAlias = torch.Tensor


class DeltaLinear(nn.Module):  # type: ignore[misc] # torch is Any where it is not installed
    """y = x W^T + sum_p scale_p * (x S_p^T) + bias over a frozen base weight; without a delta, x W^T + bias.

    Args:
        weight: [N, K], or [K, N] where transposed (GPT-2's Conv1D).
        bias: [N] or None.
        delta: of weight; None for the fine-tune's own weight.
        rows: [A, K], weights of outputs below those of `weight` (new tokens of a head), or None.
        transposed: weight, and the delta of it, have the inputs first.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        delta: Delta | None,
        rows: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.rows = None if rows is None else nn.Parameter(rows, requires_grad=False)
        self.transposed = transposed
        self.source = delta
        if delta is not None:
            parts = ops.as_torch(delta)
            row = parts.row[:, :1].clone() if delta.form == "tensor" else parts.row
            self.register_buffer("sign", parts.sign, persistent=False)
            self.register_buffer("row", row, persistent=False)
            self.register_buffer("column", parts.column, persistent=False)
            self.row_log = nn.Parameter(torch.zeros_like(row))
            if parts.column is not None:
                self.column_log = nn.Parameter(torch.zeros_like(parts.column))

    def share(self, other: DeltaLinear) -> DeltaLinear:
        """This one, with the trained scales of another of the same weight."""
        self.row_log = other.row_log
        if self.column is not None:
            self.column_log = other.column_log
        return self

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """row [P, N] and column [P, K] or None."""
        assert self.source is not None
        row = (self.row * self.row_log.exp()).expand(-1, self.source.shape[0])
        return row, None if self.column is None else self.column * self.column_log.exp()

    def delta(self) -> Delta:
        """With the scales as they are now, the signs shared; the columns of rank1 have mean 1 again."""
        assert self.source is not None
        with torch.no_grad():
            row, column = self.scales()
            if column is not None:
                mean = column.abs().mean(1, keepdim=True)
                row, column = row * mean, column / mean
        flat = None if column is None else column.contiguous().cpu().numpy()
        return Delta(
            self.source.sign, row.contiguous().cpu().numpy(), flat, self.source.shape, self.source.form
        )

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            y = self._product(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[1])

    def _product(self, x: Tensor) -> Tensor:
        row, column = self.scales() if self.source is not None else (None, None)
        kind = x.device.type
        is_known = kind == "cpu" or kind == "cuda" and _C.cuda_missing() is None
        multiply = _multiply if is_known else _multiply_dense
        y = multiply(self, x, row, column)
        if self.rows is not None:
            y = torch.cat([y, nn.functional.linear(x, self.rows.to(x.dtype))], dim=1)
        return y


class DeltaEmbedding(nn.Module):  # type: ignore[misc]
    """y = W[token] + sum_p scale_p[token] * S_p[token]; a token beyond W has one of the added rows.

    Args:
        table: W [V, K] with its delta; a head that is tied to the embedding has its scales.
        factor: what the rows are multiplied by (Gemma's), or None.
    """

    def __init__(self, table: DeltaLinear, factor: Tensor | float | None = None) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("factor", None if factor is None else torch.as_tensor(factor), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        table, flat = self.table, tokens.reshape(-1)
        assert table.source is not None
        (n, k), (row, column) = table.source.shape, table.scales()
        known = flat.clamp(max=n - 1)
        signs = signs_of(table.sign, known, k)
        y = table.weight[known].float()
        for p in range(len(row)):
            term = row[p, known][:, None] * signs[:, p]
            y = y + (term if column is None else term * column[p])
        if table.rows is not None:
            added = table.rows[(flat - n).clamp(min=0)].float()
            y = torch.where((flat < n)[:, None], y, added)
        if self.factor is not None:
            y = y * self.factor
        return y.view(*tokens.shape, k)


def _multiply(linear: DeltaLinear, x: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """By bitdelta's operators."""
    none = torch.full((len(x),), -1, device=x.device)
    if row is None or linear.source is None:
        return ops.linear(x, linear.weight, linear.bias, [], none)
    deltas, ids = [ops.TorchDelta(linear.sign, row, column, linear.source.shape)], torch.zeros_like(none)
    if not linear.transposed:
        return ops.linear(x, linear.weight, linear.bias, deltas, ids)
    return ops.linear(x, linear.weight.T, linear.bias, [], none) + ops.linear_transposed(x, deltas, ids)


def _multiply_dense(linear: DeltaLinear, x: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """By PyTorch, on devices that the operators do not know; signs are unpacked for each use and not kept."""
    weight = linear.weight.T if linear.transposed else linear.weight
    y = nn.functional.linear(x, weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
    if row is None or linear.source is None:
        return y
    about = linear.sign, row, column, linear.source.shape, linear.transposed
    planes = checkpoint(_planes, x, *about, use_reentrant=False)
    return (y + planes).to(x.dtype)


def _planes(
    x: Tensor, sign: Tensor, row: Tensor, column: Tensor | None, shape: tuple[int, int], transposed: bool
) -> Tensor:
    """sum_p row_p * ((x * column_p) S_p^T), or where transposed sum_p column_p * ((x * row_p) S_p)."""
    N, K = shape
    total = torch.zeros((), device=x.device)
    for p in range(len(sign)):
        bits = sign[p, :, :, :, None] >> torch.arange(32, dtype=torch.int32, device=x.device) & 1
        S = bits.permute(0, 2, 1, 3).reshape(16 * sign.shape[1], -1)[:N, :K].to(x.dtype) * 2 - 1
        if transposed:
            term = (x * row[p]).to(x.dtype) @ S
            total = total + (term if column is None else term * column[p])
        else:
            u = x if column is None else (x * column[p]).to(x.dtype)
            total = total + (u @ S.T) * row[p]
    return total
