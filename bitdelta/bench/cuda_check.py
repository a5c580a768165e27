"""What is timed is checked first: the CPU's bits on slices of the outputs, for whatever is exact; else a small error.

Slices are strips of 16 outputs, the first and the last of every weight, of some rows of the batch: the delta's terms
of an output need no others.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

from .. import _C
from ..errors import Error
from ..torch_delta import new_handle
from .cuda_cases import DELTA
from .cuda_data import Batch, Part

T: TypeAlias = torch.Tensor
ROWS = 12  # of a batch: the first and the last ones
CLOSE = 1e-2  # of two results in bf16
FP32 = 1e-4  # of sums of thousands of products in fp32


def products(batch: Batch) -> None:
    """The batch's call against the CPU's core.

    Raises:
        bitdelta.Error: some bit differs, or the base product is off.
    """
    rows = some_rows(len(batch.out))
    x = batch.x[rows].cpu()
    ids = torch.tensor(batch.problem.ids())[rows.cpu()]
    product = None if batch.problem.kind == DELTA else batch.product()
    batch.out.fill_(float("nan"))
    batch.delta() if product is None else batch.add_delta(product)
    first = 0
    for at, part in enumerate(batch.parts):
        N = part.out.shape[1]
        strips = sorted({0, N // 16 - 1})
        columns = columns_of(strips)
        made = None
        if product is not None:
            made = product[rows][:, columns + first].cpu()
            weight = batch.weight[columns + first].cpu()
            close(made, x.double() @ weight.double().T, FP32, f"the base product of {batch.problem}")
        expected = torch.empty(len(rows), len(columns), dtype=torch.bfloat16)
        handles = [strip_handle(part, t, strips) for t in range(batch.problem.tenants)]
        _C.linear(expected, x, None, made, None, handles, ids, "fixed16")
        equal(part.out[rows][:, columns].cpu(), expected, f"part {at} of {batch.problem}")
        first += N


def some_rows(n_rows: int) -> T:
    """Indices of at most ROWS rows, from both ends."""
    half = min(n_rows, ROWS) // 2
    return torch.tensor(sorted({*range(min(n_rows, ROWS) - half), *range(n_rows - half, n_rows)}))


def columns_of(strips: list[int]) -> T:
    """The outputs of some strips."""
    return (torch.tensor(strips)[:, None] * 16 + torch.arange(16)).flatten()


def strip_handle(part: Part, t: int, strips: list[int]) -> Any:
    """Tenant t's delta of these strips alone, on the host."""
    signs = part.signs[t].view(torch.int32)[:, strips].cpu().contiguous()
    rows = part.rows[t][:, columns_of(strips)].cpu().contiguous()
    columns = None if part.columns is None else part.columns[t].cpu()
    return new_handle(signs, rows, columns, (16 * len(strips), 32 * signs.shape[2]))


def column_handle(part: Part, t: int, group: int) -> Any:
    """Tenant t's delta of 256 inputs alone, on the host."""
    signs = part.signs[t].view(torch.int32)[:, :, 8 * group : 8 * group + 8].cpu().contiguous()
    columns = None if part.columns is None else part.columns[t][:, 256 * group : 256 * group + 256].cpu()
    return new_handle(signs, part.rows[t].cpu(), columns, (part.rows.shape[2], 256))


def gradients(part: Part, x: T, dy: T, ids: T, g: T, drow: T) -> None:
    """g and drow of `cuda.gradients`, one plane a tenant, against the CPU's core and the definition of csrc/cuda.h."""
    rows, last = some_rows(len(x)), g.shape[1] // 256 - 1
    handles = range(len(part.signs))
    for group in {0, last}:
        expected = torch.empty(len(rows), 256)
        some = [column_handle(part, t, group) for t in handles]
        _C.linear_transposed(expected, dy[rows].cpu(), some, ids[rows])
        equal(g[rows][:, 256 * group : 256 * group + 256].cpu(), expected, "the gradient of x")
    strips = sorted({0, len(part.rows[0, 0]) // 16 - 1})
    columns = columns_of(strips)
    for t in handles:
        mine = (ids == t).nonzero().flatten()
        signs = part.signs[t].view(torch.int32)[:, strips].cpu().contiguous()
        before = None if part.columns is None else part.columns[t].cpu()
        one = new_handle(signs, torch.ones(1, len(columns)), before, (len(columns), x.shape[1]))
        sums = torch.empty(len(mine), len(columns))
        _C.linear(sums, x[mine].cpu(), None, None, None, [one], torch.zeros_like(mine), "fixed16")
        folded = fold_rows(dy[mine][:, columns].cpu().double() * sums.double())
        equal(drow[t, 0, columns].cpu(), folded.float(), "the gradient of row scales")


def fold_rows(products: T) -> T:
    """fp64 [rows, width] -> [width]: eights of rows folded 4, 2, 1, then added ascending (csrc/cuda.h)."""
    total = torch.zeros(products.shape[1], dtype=torch.float64)
    for first in range(0, len(products), 8):
        eight = torch.zeros(8, products.shape[1], dtype=torch.float64)
        part = products[first : first + 8]
        eight[: len(part)] = part
        for half in (4, 2, 1):
            eight = eight[:half] + eight[half : 2 * half]
        total = total + eight[0]
    return total


def extraction(base: T, finetuned: T, sign: T, scale: T) -> None:
    """Of the first and the last 16 rows, one plane with row scales."""
    N, K = base.shape
    for strip in {0, N // 16 - 1}:
        rows = slice(16 * strip, 16 * strip + 16)
        expected = torch.zeros(1, 1, 8 * -(-K // 256), 16, dtype=torch.int32)
        row = np.empty((1, 16), np.float32)
        pair = base[rows].cpu(), finetuned[rows].cpu()
        _C.extract(*pair, 1, "row", expected.view(torch.uint32), row, None, False)
        equal(sign.view(torch.int32)[:, strip : strip + 1].cpu(), expected, "the signs")
        equal(scale[:, rows].cpu(), torch.from_numpy(row), "the scales")


def equal(got: T, expected: T, what: str) -> None:
    if not torch.equal(_bits(got), _bits(expected)):
        wrong = int((_bits(got) != _bits(expected)).sum())
        raise Error(f"{what}: {wrong} of {expected.numel()} values differ from the CPU's bits")


def close(got: T, expected: T, tolerance: float, what: str) -> None:
    """By norms; NaN is never close."""
    off = float((got.double() - expected.double()).norm() / expected.double().norm())
    if not off <= tolerance:
        raise Error(f"{what}: an error of {off:.1e}, expected at most {tolerance:.0e}")


def _bits(tensor: T) -> T:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
