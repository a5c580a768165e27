"""The products of `linear.py` on torch tensors of any leading shape, with gradients, and where models compile.

The operators behind them are `torch.ops.bitdelta.*` (operators.py). Where neither gradients nor a compiler ask for
those, the functions call the extension at once, which saves the dispatcher's time: some 30 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import cuda, cuda_memory
from .cuda_memory import is_on_gpu
from .delta import Delta
from .operators import Ids, T, as_rows, run_linear, run_linear_add, run_linear_transposed
from .torch_cuda import as_torch_on
from .torch_delta import TorchDelta, as_torch

__all__ = ["TorchDelta", "as_torch", "linear", "linear_add", "linear_parts", "linear_transposed"]

_NONE = torch.empty(0)  # a delta's column where it has none


def linear(
    x: T,
    weight: T | None,
    bias: T | None,
    deltas: Sequence[Delta | TorchDelta],
    tenant_ids: Ids,
    precision: str = "fixed16",
    delta_in_dx: bool = True,
) -> T:
    """y[m] = x[m] W^T + sum_p scale_p(t) (x[m] S_p(t)^T) + bias, t = tenant_ids[m], -1 = base only.

    Args:
        x: [..., K] of fp32, fp16 or bf16; M rows in all, in order.
        weight: [N, K] of any of these dtypes, or None: the delta terms alone.
        bias: [N], or None.
        deltas: T deltas of shape (N, K); where it compiles, of `as_torch`.
        tenant_ids: M integers, -1 to T - 1; where it compiles, a tensor.
        precision: "fixed16", or "float32" (slow, for comparison).
        delta_in_dx: False leaves the delta's part out of dx, as the original repository does.

    Returns:
        [..., N] in x's dtype, with gradients for x, weight, bias, rows and columns where they are required.

    Raises:
        TypeError, ValueError, BufferError: the text names the argument, what it is and what it should be.

    >>> import bitdelta, bitdelta.ops, torch
    >>> d = bitdelta.extract(torch.zeros(1, 2), torch.tensor([[3.0, -3.0]]))
    >>> bitdelta.ops.linear(torch.tensor([[2.0, 1.0]]), None, None, [d], [0])
    tensor([[3.]])
    """
    flat = _rows(x, "x")
    _check(flat, deltas, weight=weight, bias=bias)
    if is_plain(flat) and not _needs_gradient(flat, weight, bias, deltas):
        if is_on_gpu(flat):
            plain_bias = None if bias is None else bias.detach()
            y = cuda.linear(as_rows(flat), weight, deltas, tenant_ids, plain_bias, precision)
        else:
            handles = [delta.handle for delta in deltas]
            y = run_linear(flat, weight, bias, handles, tenant_ids, precision)
    else:
        y = torch.ops.bitdelta.linear(
            flat, weight, bias, *_parts(deltas, flat), _as_ids(tenant_ids), precision, delta_in_dx
        )
    return y if flat is x else y.view(*x.shape[:-1], y.shape[1])


def linear_parts(
    x: T,
    parts: Sequence[tuple[T | None, T | None, Sequence[Delta | TorchDelta]]],
    tenant_ids: Ids,
) -> list[T]:
    """`linear` with several weights of the same x: queries, keys and values, or gate and up.

    On a GPU x is quantised and its rows are grouped once for all of them, and one launch makes their delta terms.

    Args:
        x: [..., K].
        parts: (weight, bias, deltas) of each, as in `linear`; as many deltas in each.
        tenant_ids: as in `linear`.

    Returns:
        [..., N] of each part, with the bits of calls of their own.

    >>> import bitdelta, bitdelta.ops, torch
    >>> d = [bitdelta.extract(torch.zeros(1, 2), torch.tensor([[3.0, s]])) for s in (-3.0, 3.0)]
    >>> bitdelta.ops.linear_parts(torch.tensor([[2.0, 1.0]]), [(None, None, d[:1]), (None, None, d[1:])], [0])
    [tensor([[3.]]), tensor([[9.]])]
    """
    flat = x.reshape(-1, x.shape[-1])
    if (
        not is_plain(flat)
        or not is_on_gpu(flat)
        or any(_needs_gradient(flat, weight, bias, deltas) for weight, bias, deltas in parts)
    ):
        return [linear(x, weight, bias, deltas, tenant_ids) for weight, bias, deltas in parts]
    plain = [(weight, None if bias is None else bias.detach(), deltas) for weight, bias, deltas in parts]
    found: list[T] = cuda.linear_parts(as_rows(flat), plain, tenant_ids)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in found]


def linear_add(
    y: T, x: T, deltas: Sequence[Delta | TorchDelta], tenant_ids: Ids, delta_in_dx: bool = True
) -> T:
    """y[m] += sum_p scale_p(t) (x[m] S_p(t)^T), for a product that someone else made.

    In place where no gradient is needed; else into a new tensor. Use what is returned. y was rounded before: this
    is a second rounding, which `linear` does not have.

    Args:
        y: [..., N] of fp32, fp16 or bf16.
        x: [..., K].
        deltas, tenant_ids, delta_in_dx: as in `linear`.

    Returns:
        [..., N] in y's dtype.
    """
    flat_x, flat_y = _rows(x, "x"), _rows(y, "y")
    _check(flat_x, deltas)
    if _needs_gradient(flat_x, flat_y, None, deltas):
        new = torch.ops.bitdelta.linear_sum(
            flat_y, flat_x, *_parts(deltas, flat_x), _as_ids(tenant_ids), delta_in_dx
        )
        return new.view(y.shape)
    if is_plain(flat_x):
        if is_on_gpu(flat_x):
            cuda.linear_add(flat_y.detach(), as_rows(flat_x), deltas, tenant_ids)
        else:
            run_linear_add(flat_y, flat_x, [delta.handle for delta in deltas], tenant_ids)
    else:
        torch.ops.bitdelta.linear_add(flat_y, flat_x, *_parts(deltas, flat_x), _as_ids(tenant_ids))
    return flat_y.view(y.shape)


def linear_transposed(dy: T, deltas: Sequence[Delta | TorchDelta], tenant_ids: Ids) -> T:
    """g[m] = sum_p ((dy[m] * row_p) S_p) * column_p: weights kept as [inputs, outputs], and gradients of `linear`.

    Args:
        dy: [..., N] of fp32, fp16 or bf16.
        deltas: T deltas of shape (N, K), at least one.
        tenant_ids: M integers, -1 to T - 1.

    Returns:
        [..., K] in dy's dtype; rows of tenant -1 are zero.
    """
    if not deltas:
        raise ValueError("deltas: expected at least one, got none")
    flat, K = _rows(dy, "dy"), deltas[0].shape[1]
    _check(flat, deltas)
    if is_plain(flat) and not _needs_gradient(flat, None, None, deltas):
        if is_on_gpu(flat):
            g = cuda.linear_transposed(as_rows(flat), deltas, tenant_ids)
        else:
            g = run_linear_transposed(flat, [delta.handle for delta in deltas], tenant_ids, K)
    else:
        g = torch.ops.bitdelta.linear_transposed(flat, *_parts(deltas, flat), _as_ids(tenant_ids), K)
    return g.view(*dy.shape[:-1], K)


def _rows(x: T, name: str) -> T:
    """As a matrix."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 2:
        return x
    if x.dim() == 0:
        raise ValueError(f"{name}: expected rows [..., columns], got a number")
    return x.reshape(-1, x.shape[-1])


def _check(x: T, deltas: Sequence[Any], **tensors: T | None) -> None:
    """The kinds of arguments; shapes and dtypes, and tables of deltas on a GPU, are the operators' to check."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(tensor).__name__}")
    if is_on_gpu(x):
        return
    if not isinstance(deltas, list | tuple):
        raise TypeError(f"deltas: expected a list, got {type(deltas).__name__}")
    for delta in deltas:
        if not isinstance(delta, Delta | TorchDelta):
            raise TypeError(f"deltas: expected Delta or TorchDelta, got {type(delta).__name__}")


def is_plain(x: T) -> bool:
    """Whether the extension may be called at once: nothing compiles, traces or fakes tensors."""
    return not torch.compiler.is_compiling() and type(x) in (torch.Tensor, torch.nn.Parameter)


def on_device(tensor: T, device: torch.device) -> T:
    """A tensor of the host on a device; a GPU copies it from pinned memory, so that nothing waits."""
    if device.type != "cuda":
        return tensor.to(device)
    cuda_memory.refuse_capture("rows of tenants: expected those of a call before")
    return tensor.pin_memory().to(device, non_blocking=True)


def prepared_ids(ids: Any, n_deltas: int, x: T) -> Ids:
    """`tenant_ids` for every product of a batch: int64 [M] of the host, on a GPU brought there and grouped once."""
    if is_on_gpu(x) and is_plain(x) and len(ids):
        return cuda.plan(ids.tolist(), len(ids), max(1, n_deltas), x)
    return ids if x.device.type == "cpu" else on_device(torch.from_numpy(ids), x.device)


def prepared_deltas(deltas: Sequence[Any], shape: tuple[int, int], x: T) -> Any:
    """`deltas` for every product of a batch without gradients: on a GPU the table that the kernels read."""
    if is_on_gpu(x) and is_plain(x) and not torch.is_grad_enabled():
        return cuda.table(deltas, x, shape)
    return deltas


def _needs_gradient(x: T, weight: T | None, bias: T | None, deltas: Sequence[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if (
        x.requires_grad
        or weight is not None
        and weight.requires_grad
        or bias is not None
        and bias.requires_grad
    ):
        return True
    for delta in deltas:
        if type(delta) is TorchDelta and (
            delta.row.requires_grad or delta.column is not None and delta.column.requires_grad
        ):
            return True
    return False


def _parts(deltas: Sequence[Delta | TorchDelta], like: T) -> tuple[list[T], list[T], list[T]]:
    """signs, rows, columns of the operators."""
    found = [as_torch_on(delta, like) for delta in deltas]
    columns: list[T] = []
    if any(delta.column is not None for delta in found):
        columns = [_NONE if delta.column is None else delta.column for delta in found]
    return [delta.sign for delta in found], [delta.row for delta in found], columns


def _as_ids(tenant_ids: Ids) -> T:
    given = tenant_ids.ids if isinstance(tenant_ids, cuda.Plan) else tenant_ids
    if isinstance(given, torch.Tensor):
        if given.dtype.is_floating_point:  # which a conversion would round without a word
            raise TypeError(f"tenant_ids: expected int64, got {str(given.dtype).removeprefix('torch.')}")
        return given.to(torch.int64)
    ids = np.asarray(given)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"tenant_ids: expected whole numbers, got {str(given)[:80]!r}")
    return torch.as_tensor(ids.astype(np.int64))
