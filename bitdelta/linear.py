"""The product of a batch whose rows belong to many fine-tunes of one base.

    y[m] = x[m] W^T + sum_p scale_p(t) * (x[m] S_p(t)^T) + bias,   t = tenant_ids[m], -1 = base only

Few rows stream the base's own dtype through the extension. For more, the base product is made in fp32 panels
through NumPy's BLAS, and the extension adds the deltas, the bias and the one rounding. The delta terms are exact in
the integers of `reference.quantize`, so a row's bits depend neither on the batch around it nor on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C, cuda
from .array import BFloat16Array, Tensor, dtype_name, empty_like, is_torch
from .cuda_memory import is_on_gpu
from .delta import Delta, matrix_shape
from .threads import sync

STREAM_ROWS = _C.STREAM_ROWS
PANEL_BYTES = (
    4 << 20
)  # of fp32: about an L2 and its share of the L3; a panel is written, read once by BLAS, reused

F32 = NDArray[np.float32]


def linear(
    x: Tensor,
    weight: Tensor | None,
    deltas: Sequence[Delta],
    tenant_ids: Any,
    bias: Tensor | None = None,
    precision: str = "fixed16",
    out: Tensor | None = None,
) -> Tensor:
    """y[m] = x[m] W^T + sum_p scale_p(t) (x[m] S_p(t)^T) + bias, with t = tenant_ids[m].

    The planes' terms in order, then the base product, then the bias are summed in fp32; one rounding to out's dtype
    follows. A row of x with NaN or Inf (times its column scale) gives a row of NaN; rows of tenant -1 propagate.

    Args:
        x: [M, K] of fp32, fp16 or bf16; rows contiguous, any row stride.
        weight: the base weight [N, K] of any of these dtypes, or None: the delta terms alone.
        deltas: T deltas of shape (N, K), of any planes and forms.
        tenant_ids: M integers: the row's index in `deltas`, or -1 for the base alone.
        bias: [N], or None.
        precision: "fixed16" (x in 16 bits with one exponent a row: relative error some 5e-5 on Gaussian rows,
            the same bits everywhere); "float32" (sums of fp32 by scalar code, slow); "merged" (W' = round(base +
            delta) in weight's dtype, then BLAS: fast for hundreds of rows of one tenant, rounded once more).
        out: [M, N] to write to; it overlaps no input. Default: new, of x's kind and dtype.

    Returns:
        out.

    Raises:
        TypeError, ValueError, BufferError: the text names the argument, what it is and what it should be.

    Source: BitDelta, arXiv 2402.10193, section 3 (the forward pass of many tenants).

    >>> import bitdelta, numpy as np
    >>> base = np.eye(2, dtype=np.float32)
    >>> d = bitdelta.extract(base, base + np.float32([[1, 1], [-2, -2]]))
    >>> bitdelta.linear(np.float32([[1, 2], [1, 2]]), base, [d], [0, -1])
    array([[ 4., -4.],
           [ 1.,  2.]], dtype=float32)
    """
    if is_on_gpu(x):
        return cuda.linear(x, weight, deltas, tenant_ids, bias, precision, out)
    sync()
    handles = _handles(deltas)
    try:
        n_rows, _ = x.shape
    except (AttributeError, ValueError, TypeError):
        n_rows, _ = matrix_shape(x, "x", "[M, K]")
    if out is None:
        out = empty_like(x, (n_rows, _width(weight, handles)))
    product = None
    if precision == "merged":
        product = _merged_product(x, weight, handles, tenant_ids)
        handles, tenant_ids, weight, precision = [], np.full(n_rows, -1, np.int64), None, "fixed16"
    elif n_rows > STREAM_ROWS and weight is not None:
        product = _base_product(_as_float32(x, "x"), weight)
        weight = None
    _C.linear(out, x, weight, product, bias, handles, tenant_ids, precision)
    return out


def linear_add(y: Tensor, x: Tensor, deltas: Sequence[Delta], tenant_ids: Any) -> Tensor:
    """y[m] = round(sum_p scale_p(t) (x[m] S_p(t)^T) + y[m]) in place, for a product that someone else made.

    y was rounded when it was made, so this is a second rounding; `linear` has one. Rows of tenant -1 keep their bits.

    Args:
        y: [M, N] of fp32, fp16 or bf16, writable.
        x: [M, K].
        deltas: T deltas of shape (N, K).
        tenant_ids: M integers, -1 to T - 1.

    Returns:
        y.

    >>> import bitdelta, numpy as np
    >>> d = bitdelta.extract(np.zeros((1, 2), np.float32), np.float32([[3, -3]]))
    >>> bitdelta.linear_add(np.float32([[10]]), np.float32([[2, 1]]), [d], [0])
    array([[13.]], dtype=float32)
    """
    if is_on_gpu(x):
        return cuda.linear_add(y, x, deltas, tenant_ids)
    sync()
    _C.linear_add(y, x, _handles(deltas), tenant_ids)
    return y


def linear_transposed(
    dy: Tensor, deltas: Sequence[Delta], tenant_ids: Any, out: Tensor | None = None
) -> Tensor:
    """g[m] = sum_p ((dy[m] * row_p) S_p) * column_p: the delta's part of the gradient of x.

    The sum over n is exact in 16-bit integers, as in `linear`. Rows of tenant -1 are zero.

    Args:
        dy: [M, N] of fp32, fp16 or bf16.
        deltas: T deltas of shape (N, K), at least one.
        tenant_ids: M integers, -1 to T - 1.
        out: [M, K] to write to. Default: new, of dy's kind and dtype.

    Returns:
        out.

    >>> import bitdelta, numpy as np
    >>> d = bitdelta.extract(np.zeros((2, 2), np.float32), np.float32([[1, -1], [2, 2]]))
    >>> bitdelta.linear_transposed(np.float32([[1, 1]]), [d], [0])
    array([[3., 1.]], dtype=float32)
    """
    if is_on_gpu(dy):
        return cuda.linear_transposed(dy, deltas, tenant_ids, out)
    sync()
    handles = _handles(deltas)
    n_rows, _ = matrix_shape(dy, "dy", "[M, N]")
    if out is None:
        if not handles:
            raise ValueError("deltas: expected at least one, got none")
        out = empty_like(dy, (n_rows, handles[0].shape[1]))
    _C.linear_transposed(out, dy, handles, tenant_ids)
    return out


def _handles(deltas: Sequence[Delta]) -> list[_C.Delta]:
    """What the extension takes for each delta."""
    try:
        return [delta.handle for delta in deltas]
    except (AttributeError, TypeError):
        items = deltas if isinstance(deltas, Sequence) else [deltas]
        names = sorted({type(item).__name__ for item in items})
        raise TypeError(f"deltas: expected a sequence of bitdelta.Delta, got {', '.join(names)}") from None


def _width(weight: Tensor | None, handles: list[_C.Delta]) -> int:
    """N."""
    if weight is not None:
        try:
            return int(weight.shape[0])
        except (AttributeError, IndexError):
            return matrix_shape(weight, "weight")[0]
    if not handles:
        raise ValueError("deltas: expected at least one where weight is None, got none")
    return handles[0].shape[0]


def _as_float32(matrix: Tensor, name: str) -> F32:
    """The matrix as NumPy fp32; without a copy where it is that already."""
    if isinstance(matrix, np.ndarray) and matrix.dtype == np.float32:
        return matrix
    if (
        is_torch(matrix)
        and dtype_name(matrix) == "float32"
        and not matrix.requires_grad
        and matrix.device.type == "cpu"
    ):
        shared: F32 = matrix.numpy()
        return shared
    wide = np.empty(tuple(matrix.shape), np.float32)
    _C.to_float32(wide, matrix, name)
    return wide


def _base_product(x: F32, weight: Tensor) -> F32:
    """x W^T in fp32 [M, N], the weight converted panel by panel."""
    n_rows, n_columns = _checked_shape(x, weight)
    product = np.empty((x.shape[0], n_rows), np.float32)
    can_slice = isinstance(weight, np.ndarray) or is_torch(weight)
    if not can_slice or dtype_name(weight, "weight") == "float32":
        _multiply(x, _as_float32(weight, "weight"), product)
        return product
    step = _panel_rows(n_columns)
    panel = np.empty((min(step, n_rows), n_columns), np.float32)
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        wide = panel[: end - begin]
        _C.to_float32(wide, weight[begin:end], "weight")
        _multiply(x, wide, product[:, begin:end])
    return product


def _merged_product(x: Tensor, weight: Tensor | None, handles: list[_C.Delta], tenant_ids: Any) -> F32:
    """x[m] W'^T in fp32 [M, N], W' = round(base + delta) of the row's tenant.

    Rows of tenant -1 are taken from the product of all rows with the base, so that their bits are those of a call
    whose ids are all -1.
    """
    if weight is None:
        raise ValueError("weight: expected the base weight [N, K] where precision is 'merged', got None")
    wide = _as_float32(x, "x")
    n_rows, _ = _checked_shape(wide, weight)
    ids = _checked_ids(tenant_ids, len(wide), len(handles))
    tenants = np.unique(ids)
    if len(tenants) and tenants[0] == -1:
        product = _base_product(wide, weight)
    else:
        product = np.empty((len(wide), n_rows), np.float32)
    for tenant in tenants[tenants >= 0]:
        rows = np.flatnonzero(ids == tenant)
        if len(rows) == len(ids):
            _merged_panels(wide, weight, handles[tenant], product)
        else:
            part = np.empty((len(rows), n_rows), np.float32)
            _merged_panels(wide[rows], weight, handles[tenant], part)
            product[rows] = part
    return product


def _merged_panels(x: F32, weight: Tensor, handle: _C.Delta, product: F32) -> None:
    n_rows, n_columns = handle.shape
    name = dtype_name(weight, "weight")
    step = _panel_rows(n_columns)
    panel = np.empty((min(step, n_rows), n_columns), np.float32)
    narrow: Any = panel
    if name != "float32":
        kind = np.uint16 if name == "bfloat16" else np.float16
        narrow = np.empty(panel.shape, kind)
        narrow = narrow.view(BFloat16Array) if name == "bfloat16" else narrow
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        wide = panel[: end - begin]
        _C.expand(narrow[: end - begin], weight, handle, begin, end)
        if narrow is not panel:
            _C.to_float32(wide, narrow[: end - begin])
        _multiply(x, wide, product[:, begin:end])


def _multiply(x: F32, panel: F32, out: F32) -> None:
    """out = x panel^T by BLAS; NaN and Inf are results as in the kernels, not warnings."""
    with np.errstate(all="ignore"):
        np.matmul(x, panel.T, out=out)


def _panel_rows(n_columns: int) -> int:
    """Rows of a panel: a multiple of 16, about PANEL_BYTES in fp32."""
    return max(16, PANEL_BYTES // (4 * max(1, n_columns)) // 16 * 16)


def _checked_shape(x: F32, weight: Tensor) -> tuple[int, int]:
    n_rows, n_columns = matrix_shape(weight, "weight")
    if x.shape[1] != n_columns:
        raise ValueError(f"weight: expected [N, K] with K = {x.shape[1]} as in x, got {[n_rows, n_columns]}")
    return n_rows, n_columns


def _checked_ids(tenant_ids: Any, n_rows: int, n_deltas: int) -> NDArray[np.int64]:
    ids = np.asarray(tenant_ids)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"tenant_ids: expected integers, got {ids.dtype}")
    if ids.shape != (n_rows,):
        raise ValueError(f"tenant_ids: expected [M] = [{n_rows}], got {list(ids.shape)}")
    bad = np.flatnonzero((ids < -1) | (ids >= n_deltas))
    if len(bad):
        raise ValueError(f"tenant_ids: expected -1 .. {n_deltas - 1}, got {ids[bad[0]]} at row {bad[0]}")
    return ids.astype(np.int64, copy=False)
