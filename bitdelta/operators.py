"""torch.ops.bitdelta: the products of `linear.py` as PyTorch operators, with shapes for compilers and gradients.

    y[m] = x[m] W^T + sum_p row_p (u_p[m] S_p^T) + bias,   u_p = x[m] * column_p,   of tenant t = tenant_ids[m]

    dx[m]        = dy[m] W + sum_p ((dy[m] * row_p) S_p) * column_p
    drow_p[n]    = sum over the tenant's m of dy[m, n] (u_p[m] S_p^T)[n]
    dcolumn_p[k] = sum over the tenant's m of x[m, k] ((dy[m] * row_p) S_p)[k]

M rows, T deltas of P planes each, N outputs, K inputs. T deltas are three lists, signs, rows and columns, of tensors
as in `torch_delta.py`; a column of no elements, or an empty list, stands for none. Signs have no gradient.

The sums with signs quantise u (or dy * row_p) to 16 bits a row, forward and backward, as `reference.quantize` says:
an error of some 5e-5 of the row's size. With more than STREAM_ROWS rows, and backward, the base's part is fp32
through PyTorch's own BLAS. Parts are added in fp32 and rounded once, to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from . import _C, cuda, cuda_memory, threads, torch_cuda
from .linear import STREAM_ROWS
from .torch_delta import handle_of, new_handle
from .torch_panels import times, times_transposed

T: TypeAlias = torch.Tensor
Saved: TypeAlias = tuple[T, T | None, T, list[T], list[T], list[T]]  # x, weight, ids, signs, rows, columns
Ids: TypeAlias = Any  # int64 [M] tensor, or a sequence of M integers: index of the row's delta, -1 none

_library = torch.library.Library("bitdelta", "DEF")
_library.define(
    "linear(Tensor x, Tensor? weight, Tensor? bias, Tensor[] signs, Tensor[] rows, Tensor[] columns,"
    " Tensor tenant_ids, str precision='fixed16', bool delta_in_dx=True) -> Tensor"
)
_library.define(
    "linear_sum(Tensor y, Tensor x, Tensor[] signs, Tensor[] rows, Tensor[] columns, Tensor tenant_ids,"
    " bool delta_in_dx=True) -> Tensor"
)
_library.define(
    "linear_add(Tensor(a!) y, Tensor x, Tensor[] signs, Tensor[] rows, Tensor[] columns, Tensor tenant_ids)"
    " -> ()"
)
_library.define(
    "linear_transposed(Tensor dy, Tensor[] signs, Tensor[] rows, Tensor[] columns, Tensor tenant_ids,"
    " int n_columns) -> Tensor"
)
_library.define(  # the gradients of x and of the scales; those not wanted come without elements
    "linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor[] signs, Tensor[] rows, Tensor[] columns,"
    " Tensor tenant_ids, bool wants_dx, bool wants_rows, bool wants_columns, bool delta_in_dx)"
    " -> (Tensor, Tensor[], Tensor[])"
)


def _all_handles(signs: Sequence[T], rows: Sequence[T], columns: Sequence[T], K: int) -> list[_C.Delta]:
    parts = zip(signs, rows, _columns(columns, signs), strict=True)
    return [handle_of(sign, row, column, (row.shape[-1], K)) for sign, row, column in parts]


def _columns(columns: Sequence[T], signs: Sequence[T]) -> list[T | None]:
    """One for every delta; a tensor without elements, and an empty list, stand for none."""
    if not columns:
        return [None] * len(signs)
    return [column if column.numel() else None for column in columns]


# the operators; those on a GPU go to cuda.py; tensors here may require gradients, and the extension wants them detached


def _linear(
    x: T,
    weight: T | None,
    bias: T | None,
    signs: list[T],
    rows: list[T],
    columns: list[T],
    tenant_ids: T,
    precision: str = "fixed16",
    delta_in_dx: bool = True,
) -> T:
    if cuda_memory.is_on_gpu(x):
        found = torch_cuda.deltas_of(signs, rows, _columns(columns, signs), x.shape[1])
        plain = None if weight is None else _plain(weight), None if bias is None else _plain(bias)
        return cuda.linear(as_rows(x), plain[0], found, tenant_ids, plain[1], precision)
    handles = _all_handles(signs, rows, columns, x.shape[1])
    return run_linear(x, weight, bias, handles, tenant_ids, precision)


def run_linear(
    x: T, weight: T | None, bias: T | None, handles: list[_C.Delta], tenant_ids: Ids, precision: str
) -> T:
    threads.sync()
    x = as_rows(x)
    if weight is not None and weight.dim() != 2:
        raise ValueError(f"weight: expected a matrix [N, K], got {list(weight.shape)}")
    N = weight.shape[0] if weight is not None else _n_outputs(handles)
    out = x.new_empty(x.shape[0], N)
    product = None
    if weight is not None:
        weight = _plain(weight)
        if x.shape[0] > STREAM_ROWS or weight.stride(1) != 1:
            product, weight = times(x, weight), None
    bias = None if bias is None else _plain(bias)
    _C.linear(out, x, weight, product, bias, handles, tenant_ids, precision)
    return out


def _n_outputs(handles: list[_C.Delta]) -> int:
    if not handles:
        raise ValueError("deltas: expected at least one where weight is None, got none")
    return handles[0].shape[0]


def as_rows(x: T) -> T:
    """x [M, K] as the extension takes it: without gradient, columns contiguous, rows apart."""
    if x.dim() != 2:
        raise ValueError(f"x: expected a matrix [M, K], got {list(x.shape)}")
    x = _plain(x)
    return x if x.is_contiguous() or x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _plain(tensor: T) -> T:
    """Without gradient, as the extension wants it."""
    return tensor.detach() if tensor.requires_grad else tensor


def _linear_sum(
    y: T, x: T, signs: list[T], rows: list[T], columns: list[T], tenant_ids: T, delta_in_dx: bool = True
) -> T:
    out = y.detach().clone(memory_format=torch.contiguous_format)
    _linear_add(out, x, signs, rows, columns, tenant_ids)
    return out


def _linear_add(y: T, x: T, signs: list[T], rows: list[T], columns: list[T], tenant_ids: T) -> None:
    if cuda_memory.is_on_gpu(x):
        found = torch_cuda.deltas_of(signs, rows, _columns(columns, signs), x.shape[1])
        cuda.linear_add(_plain(y), as_rows(x), found, tenant_ids)
        return
    run_linear_add(y, x, _all_handles(signs, rows, columns, x.shape[1]), tenant_ids)


def run_linear_add(y: T, x: T, handles: list[_C.Delta], tenant_ids: Ids) -> None:
    threads.sync()
    _C.linear_add(_plain(y), as_rows(x), handles, tenant_ids)


def _linear_transposed(
    dy: T, signs: list[T], rows: list[T], columns: list[T], tenant_ids: T, n_columns: int
) -> T:
    if cuda_memory.is_on_gpu(dy):
        found = torch_cuda.deltas_of(signs, rows, _columns(columns, signs), n_columns)
        return cuda.linear_transposed(as_rows(dy), found, tenant_ids)
    return run_linear_transposed(dy, _all_handles(signs, rows, columns, n_columns), tenant_ids, n_columns)


def run_linear_transposed(dy: T, handles: list[_C.Delta], tenant_ids: Ids, n_columns: int) -> T:
    threads.sync()
    dy = as_rows(dy)
    out = dy.new_empty(dy.shape[0], n_columns)
    _C.linear_transposed(out, dy, handles, tenant_ids)
    return out


def _linear_backward(
    dy: T,
    x: T,
    weight: T | None,
    signs: list[T],
    rows: list[T],
    columns: list[T],
    tenant_ids: T,
    wants_dx: bool,
    wants_rows: bool,
    wants_columns: bool,
    delta_in_dx: bool,
) -> tuple[T, list[T], list[T]]:
    some = _columns(columns, signs)
    if cuda_memory.is_on_gpu(x):
        found = torch_cuda.deltas_of(signs, rows, some, x.shape[1])
        wants = wants_dx, wants_rows, wants_columns
        dx, drows, dcolumns = torch_cuda.linear_backward(
            dy, x, weight, found, tenant_ids, *wants, delta_in_dx
        )
        return dx, drows, dcolumns[: len(columns)]
    threads.sync()
    dy, x = as_rows(dy), as_rows(x)
    drows = [torch.zeros_like(row) if wants_rows else torch.empty(0) for row in rows]
    dcolumns = [torch.zeros_like(column) if wants_columns else torch.empty(0) for column in columns]
    delta_dx, left = None, tenant_ids
    if wants_dx and delta_in_dx and signs:
        delta_dx = torch.empty(x.shape)
        if wants_columns:  # the gradients of columns make the same sums
            has_column = torch.tensor([column is not None for column in some] + [False])
            left = torch.where(has_column[tenant_ids], -1, tenant_ids)
        _C.linear_transposed(delta_dx, dy, _all_handles(signs, rows, columns, x.shape[1]), left)
    for t, (sign, row, column) in enumerate(zip(signs, rows, some, strict=True)):
        is_trained = wants_columns and column is not None
        at = (tenant_ids == t).nonzero().squeeze(1) if wants_rows or is_trained else tenant_ids[:0]
        if len(at):
            mine = (dy, x) if len(at) == len(x) else (dy[at], x[at])
            if wants_rows:
                drows[t].copy_(_row_gradient(*mine, sign, row, column))
            if is_trained and column is not None:
                dcolumn, part = _column_gradient(*mine, sign, row, column)
                dcolumns[t].copy_(dcolumn)
                if delta_dx is not None:
                    delta_dx[at] = part
    if not wants_dx:
        return torch.empty(0, dtype=x.dtype), drows, dcolumns
    dx = torch.zeros(x.shape) if weight is None else times_transposed(dy, _plain(weight))
    if delta_dx is not None:
        dx += delta_dx
    return dx.to(x.dtype), drows, dcolumns


def _row_gradient(dy: T, x: T, sign: T, row: T, column: T | None) -> T:
    """One tenant's, fp32 [P, N]. A plane alone, with a scale of 1, is a sum of signs."""
    shape = row.shape[1], x.shape[1]
    ids, ones = torch.zeros(len(x), dtype=torch.int64), torch.ones((1, shape[0]))
    gradients = []
    for p in range(len(sign)):
        before = None if column is None else column[p : p + 1].contiguous()
        z = torch.empty((len(x), shape[0]))
        _C.linear(z, x, None, None, None, [new_handle(sign[p : p + 1], ones, before, shape)], ids, "fixed16")
        gradients.append(z.mul_(dy).sum(0))
    return torch.stack(gradients)


def _column_gradient(dy: T, x: T, sign: T, row: T, column: T) -> tuple[T, T]:
    """One tenant's, fp32 [P, K], and the delta's part of dx, which is made of the same sums."""
    shape = row.shape[1], x.shape[1]
    ids = torch.zeros(len(x), dtype=torch.int64)
    gradients, dx = [], torch.empty(0)
    for p in range(len(sign)):
        z = torch.empty((len(x), shape[1]))
        after = row[p : p + 1].contiguous()
        _C.linear_transposed(z, dy, [new_handle(sign[p : p + 1], after, None, shape)], ids)
        dx = z * column[p].detach() if p == 0 else dx + z * column[p].detach()
        gradients.append(z.mul_(x).sum(0))
    return torch.stack(gradients), dx


# shapes


def _fake_linear(
    x: T,
    weight: T | None,
    bias: T | None,
    signs: list[T],
    rows: list[T],
    columns: list[T],
    tenant_ids: T,
    precision: str = "fixed16",
    delta_in_dx: bool = True,
) -> T:
    return x.new_empty((x.shape[0], rows[0].shape[1] if weight is None else weight.shape[0]))


def _fake_backward(
    dy: T, x: T, weight: T | None, signs: list[T], rows: list[T], columns: list[T], ids: T, *wants: bool
) -> tuple[T, list[T], list[T]]:
    dx, drows, dcolumns, _ = wants
    none = rows[0].new_empty(0) if rows else x.new_empty(0, dtype=torch.float32)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if dx else x.new_empty(0),
        [torch.empty_like(row) if drows else torch.empty_like(none) for row in rows],
        [torch.empty_like(column) if dcolumns else torch.empty_like(none) for column in columns],
    )


# gradients


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: T) -> None:
    x, weight, bias, signs, rows, columns, tenant_ids, _, delta_in_dx = inputs
    _save(ctx, x, weight, signs, rows, columns, tenant_ids, delta_in_dx)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: T) -> None:
    _, x, signs, rows, columns, tenant_ids, delta_in_dx = inputs
    _save(ctx, x, None, signs, rows, columns, tenant_ids, delta_in_dx)


def _setup_transposed(ctx: Any, inputs: tuple[Any, ...], output: T) -> None:
    dy, signs, rows, columns, tenant_ids, _ = inputs
    _save(ctx, dy, None, signs, rows, columns, tenant_ids, True)


def _save(
    ctx: Any, x: T, weight: T | None, signs: list[T], rows: list[T], columns: list[T], ids: T, flag: bool
) -> None:
    ctx.save_for_backward(x, weight, ids, *signs, *rows, *columns)
    ctx.n_deltas, ctx.delta_in_dx = len(signs), flag


def _saved(ctx: Any) -> Saved:
    """Once a backward: recomputed activations are given once."""
    x, weight, ids, *parts = ctx.saved_tensors
    n = ctx.n_deltas
    return x, weight, ids, parts[:n], parts[n : 2 * n], parts[2 * n :]


def _backward_of_product(
    ctx: Any, saved: Saved, dy: T, needs_dx: bool, needs_rows: list[bool], needs_columns: list[bool]
) -> tuple[T | None, list[T | None], list[T | None]]:
    x, weight, ids, signs, rows, columns = saved
    wants = needs_dx, any(needs_rows), any(needs_columns)
    if not any(wants):
        return None, [None] * len(rows), [None] * len(columns)
    dx, drows, dcolumns = torch.ops.bitdelta.linear_backward(
        dy, x, weight, signs, rows, columns, ids, *wants, ctx.delta_in_dx
    )
    return dx if needs_dx else None, _wanted(drows, needs_rows), _wanted(dcolumns, needs_columns)


def _as_given(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    """With None for the arguments that follow: PyTorch leaves out those that equal their defaults."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def _wanted(gradients: list[T], needs: list[bool]) -> list[T | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _backward_linear(ctx: Any, dy: T) -> tuple[Any, ...]:
    needs_dx, needs_weight, needs_bias, _, needs_rows, needs_columns, *_ = ctx.needs_input_grad
    saved = x, weight, *_ = _saved(ctx)
    dx, drows, dcolumns = _backward_of_product(ctx, saved, dy, needs_dx, needs_rows, needs_columns)
    dweight = dbias = None
    if needs_weight and weight is not None:
        dweight = (dy.float().T @ x.float()).to(weight.dtype)
    if needs_bias and ctx.bias_dtype is not None:
        dbias = dy.float().sum(0).to(ctx.bias_dtype)
    return _as_given(ctx, dx, dweight, dbias, [None] * ctx.n_deltas, drows, dcolumns)


def _backward_sum(ctx: Any, dy: T) -> tuple[Any, ...]:
    needs_dy, needs_dx, _, needs_rows, needs_columns, *_ = ctx.needs_input_grad
    dx, drows, dcolumns = _backward_of_product(ctx, _saved(ctx), dy, needs_dx, needs_rows, needs_columns)
    return _as_given(ctx, dy if needs_dy else None, dx, [None] * ctx.n_deltas, drows, dcolumns)


def _backward_transposed(ctx: Any, dg: T) -> tuple[Any, ...]:
    """linear and linear_transposed are each other's adjoint: dg stands where x stood, and dy where it did."""
    dy, _, ids, signs, rows, columns = _saved(ctx)
    needs_dy, _, needs_rows, needs_columns, *_ = ctx.needs_input_grad
    ddy = None
    if needs_dy:
        ddy = torch.ops.bitdelta.linear(dg, None, None, signs, rows, columns, ids).to(dy.dtype)
    wants = any(needs_rows), any(needs_columns)
    if not any(wants):
        return _as_given(ctx, ddy, [None] * len(signs), [None] * len(rows), [None] * len(columns))
    _, drows, dcolumns = torch.ops.bitdelta.linear_backward(
        dy, dg, None, signs, rows, columns, ids, False, *wants, False
    )
    drows = _wanted(drows, needs_rows)
    return _as_given(ctx, ddy, [None] * len(signs), drows, _wanted(dcolumns, needs_columns))


def _refuse_second(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError("bitdelta: gradients of gradients are not implemented")


def _register() -> None:
    kernels = {
        "linear": (_linear, _fake_linear),
        "linear_sum": (_linear_sum, lambda y, *_: torch.empty_like(y, memory_format=torch.contiguous_format)),
        "linear_add": (_linear_add, lambda *_: None),
        "linear_transposed": (
            _linear_transposed,
            lambda dy, signs, rows, columns, tenant_ids, n_columns: dy.new_empty((dy.shape[0], n_columns)),
        ),
        "linear_backward": (_linear_backward, _fake_backward),
    }
    for name, (kernel, fake) in kernels.items():
        _library.impl(name, kernel, "CPU")
        _library.impl(name, kernel, "CUDA")
        torch.library.register_fake(f"bitdelta::{name}", fake, lib=_library)
    for name, backward, setup in (
        ("linear", _backward_linear, _setup_linear),
        ("linear_sum", _backward_sum, _setup_sum),
        ("linear_transposed", _backward_transposed, _setup_transposed),
        ("linear_backward", _refuse_second, None),
    ):
        torch.library.register_autograd(f"bitdelta::{name}", backward, setup_context=setup, lib=_library)


_register()
