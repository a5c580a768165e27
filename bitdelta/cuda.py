"""The operations of `delta.py` and `linear.py` on tensors of a GPU, with the same bits.

A tensor is torch's, on a CUDA device; all of a call are on one, and it runs on torch's current stream there, which
the tensors tell through the DLPack exchange API. `Delta`s live in the host's memory: their arrays are copied to a
device at first use and stay there as long as the Delta does. So does the table of a list of deltas. Nothing waits for
the GPU but `extract`, which has to look for numbers that are not finite, and the copy of a Delta. While a stream is
captured into a CUDA graph nothing is brought to the GPU: run once before.

In a build with BITDELTA_CUDA=emulate the kernels run on the CPU, for tests: the functions here then take NumPy's
arrays and torch's CPU tensors, and with BITDELTA_DEVICE=emulated in the environment so do `bitdelta.linear` and
its like.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from . import _C, cublas, cuda_memory
from .array import Tensor, aligned_copy, dtype_name, is_torch, to_float32
from .delta import FORMS, Delta, extract_sizes, extracted, matrix_shape

MAX_PARTS = 4  # weights that share x in one launch, BD_CUDA_MAX_PARTS
PANEL_BYTES = 16 << 20  # of an expanded weight: it is read again from the L2 cache (60 MB on an H200)

# tables by what their deltas are, with the event of their copy; an entry goes when one of its deltas does
_tables: dict[Any, tuple[Any, Any, list[weakref.ref[Any]]]] = {}
Part: TypeAlias = tuple["Tensor | None", "Tensor | None", Any]  # weight, bias, deltas
_copies: weakref.WeakKeyDictionary[Delta, dict[Any, tuple[Any, Any, Any]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """The rows of a batch grouped by tenant, on the GPU: made once, used by every product of the batch."""

    memory: Tensor
    ids: Any  # int64 [M]
    n_rows: int  # M
    n_deltas: int  # T
    max_rows: int  # the most rows of a tenant; M where only the GPU knows


def plan(tenant_ids: Any, n_rows: int, n_deltas: int, like: Tensor) -> Plan:
    """Groups the rows of a batch.

    Args:
        tenant_ids: M integers, -1 to n_deltas - 1. On the host they are checked; on the GPU, int64, they are not
            looked at: rows with ids out of range become NaN.
        n_rows: M, at least 1.
        n_deltas: T, 1 to 4096.
        like: a tensor on the GPU that is to work.

    Raises:
        ValueError: M other than the number of ids, an id on the host out of range.
        DeviceError: no GPU, or another one.
    """
    cuda_memory.require()
    if isinstance(tenant_ids, Plan):
        if (tenant_ids.n_rows, tenant_ids.n_deltas) != (n_rows, n_deltas):
            raise ValueError(
                f"tenant_ids: expected a plan of {n_rows} rows and {n_deltas} deltas,"
                f" got one of {tenant_ids.n_rows} and {tenant_ids.n_deltas}"
            )
        return tenant_ids
    ids, max_rows = tenant_ids, n_rows
    if _is_host(tenant_ids):
        ids, max_rows = _checked_ids(tenant_ids, n_rows, n_deltas)
        if not cuda_memory.EMULATED:
            cuda_memory.refuse_capture("tenant_ids: expected int64 on the GPU")
            ids = cuda_memory.on_gpu_of(sys.modules["torch"].from_numpy(ids), like)
    elif tuple(ids.shape) != (n_rows,):
        raise ValueError(f"tenant_ids: expected [M] = [{n_rows}], got {list(ids.shape)}")
    memory = cuda_memory.scratch(like, _C.cuda_workspace_bytes("plan", n_rows, n_deltas))
    _C.cuda_plan(memory, ids, n_deltas)
    return Plan(memory, ids, n_rows, n_deltas, max_rows)


def _is_host(tenant_ids: Any) -> bool:
    """Emulated, only sequences are the host's: all memory is."""
    if cuda_memory.EMULATED:
        return not (isinstance(tenant_ids, np.ndarray) or is_torch(tenant_ids))
    return not (is_torch(tenant_ids) and tenant_ids.is_cuda)


def _checked_ids(tenant_ids: Any, n_rows: int, n_deltas: int) -> tuple[Any, int]:
    ids = np.asarray(tenant_ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"tenant_ids: expected integers, got {ids.dtype}")
    if ids.shape != (n_rows,):
        raise ValueError(f"tenant_ids: expected [M] = [{n_rows}], got {list(ids.shape)}")
    wrong = np.flatnonzero((ids < -1) | (ids >= n_deltas))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(f"tenant_ids: expected -1 .. {n_deltas - 1}, got {ids[row]} at row {row}")
    counts = np.bincount(ids[ids >= 0], minlength=1)
    return ids.astype(np.int64), int(counts.max())


def table(deltas: Sequence[Any], like: Tensor, shape: tuple[int, int] | None = None) -> _C.CudaDeltas:
    """Deltas of one shape as the kernels find them, made once for the same deltas.

    Args:
        deltas: T of `Delta` and `ops.TorchDelta`; None is an empty slot, whose rows become NaN.
        like: a tensor on the GPU that is to work.
        shape: (N, K), for where no slot tells.

    Raises:
        TypeError, ValueError: what is no delta, or of another shape.
        DeviceError: scales on another device than `like`.
    """
    cuda_memory.require()
    if isinstance(deltas, _C.CudaDeltas):
        return deltas
    slots = tuple(deltas) or (None,)
    for at, delta in enumerate(slots):
        found = getattr(delta, "shape", None)
        if delta is not None and (found is None or not hasattr(delta, "planes")):
            raise TypeError(f"deltas: expected a sequence of bitdelta.Delta, got {type(delta).__name__}")
        if shape is None:
            shape = found
        elif found is not None and tuple(found) != tuple(shape):
            raise ValueError(f"deltas: expected shape [N, K] = {list(shape)}, got {list(found)} at {at}")
    if shape is None:
        raise ValueError("deltas: expected at least one where weight is None, got none")
    key, owners = _identity(slots, like, shape)
    known = _tables.get(key)
    if known is not None:
        _follow(known[1], like)
        return known[0]
    cuda_memory.refuse_capture("deltas: expected those of a call before")
    parts = tuple(None if delta is None else _parts(delta, like) for delta in slots)
    made = _C.CudaDeltas(cuda_memory.empty(like, (len(slots), 4), "int64"), parts, shape)
    if owners is not None:

        def drop(_: Any) -> None:
            _tables.pop(key, None)

        _tables[key] = made, _mark(like), [weakref.ref(owner, drop) for owner in owners]
    return made


def _mark(like: Tensor) -> Any:
    """The current stream of a GPU and an event on it, for what was just enqueued; None in the host's memory."""
    if cuda_memory.EMULATED:
        return None
    stream = sys.modules["torch"].cuda.current_stream(like.device)
    return stream, stream.record_event()


def _follow(mark: Any, like: Tensor) -> None:
    """The current stream waits for the marked one where that is another; a captured one began after it."""
    if mark is not None:
        cuda = sys.modules["torch"].cuda
        stream = cuda.current_stream(like.device)
        if stream != mark[0] and not cuda.is_current_stream_capturing():
            stream.wait_event(mark[1])


def _identity(slots: tuple[Any, ...], like: Tensor, shape: Any) -> tuple[Any, list[Any] | None]:
    """A key, and what it stands for as long as it lives; None where that is a copy."""
    key: list[Any] = [str(getattr(like, "device", "")), *shape]
    owners: list[Any] | None = []
    for delta in slots:
        held: list[Any] = []
        if delta is None or isinstance(delta, Delta):
            key.append(id(delta))
            held += [] if delta is None else [delta]
        else:
            held += [each for each in (delta.sign, delta.row, delta.column) if each is not None]
            key.append(tuple((each.data_ptr(), each.shape[0]) for each in held))
            if not all(each.is_contiguous() for each in held):
                owners = None
        if owners is not None:
            owners += held
    return tuple(key), owners


def _parts(delta: Any, like: Tensor) -> tuple[Any, Any, Any]:
    """sign uint32, scale, column or None on the device of `like`."""
    if isinstance(delta, Delta):
        if cuda_memory.EMULATED:
            return delta.sign, delta.scale, delta.column
        torch, places = sys.modules["torch"], _copies.setdefault(delta, {})
        if like.device not in places:
            arrays: list[Any] = [delta.sign.view(np.int32), delta.scale, delta.column]
            moved: list[Any] = [
                None if each is None else torch.from_numpy(np.array(each)).to(like.device) for each in arrays
            ]
            places[like.device] = moved[0].view(torch.uint32), moved[1], moved[2]
        return places[like.device]
    column = None if delta.column is None else delta.column.detach().contiguous()
    torch = sys.modules["torch"]
    return delta.sign.detach().view(torch.uint32), delta.row.detach().contiguous(), column


# products


def linear(
    x: Tensor,
    weight: Tensor | None,
    deltas: Any,
    tenant_ids: Any,
    bias: Tensor | None = None,
    precision: str = "fixed16",
    out: Tensor | None = None,
) -> Tensor:
    """As `bitdelta.linear`, on the GPU of x.

    The delta's terms have the bits of the CPU. The base product is cuBLAS's in fp32 (`multiply`), before the one
    rounding.

    Args:
        deltas: a sequence of deltas, or what `table` made.
        tenant_ids: integers on the host or on the GPU, or what `plan` made.

    With "merged" panels of round(base + delta) are multiplied by cuBLAS, for tensors of torch and ids on the host;
    rows of -1 have the bits of the same call with all ids -1.

    Raises:
        TypeError, ValueError, BufferError: as `bitdelta.linear`.
        DeviceError: no GPU, a GPU that is not supported, or tensors on different devices.
    """
    if precision == "merged":
        return _merged(x, weight, deltas, tenant_ids, bias, out)
    if precision != "fixed16":
        raise ValueError(f"precision: expected 'fixed16' or 'merged' on a GPU, got {precision!r}")
    return linear_parts(x, [(weight, bias, deltas)], tenant_ids, [out])[0]


def linear_parts(
    x: Tensor, parts: Sequence[Part], tenant_ids: Any, outs: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """`linear` with several weights of the same x, whose rows are quantised and grouped once: q, k and v; gate and up.

    Args:
        parts: (weight, bias, deltas) of each; as many deltas in each.
        outs: what to write to, [M, N] of each part; None: new.

    Returns:
        [M, N] of each part, with the bits of calls of their own.
    """
    M, K = matrix_shape(x, "x", "[M, K]")
    found, given = [], [None] * len(parts) if outs is None else outs
    batch = tenant_ids
    for (weight, bias, deltas), out in zip(parts, given, strict=True):
        own = table(deltas, x, None if weight is None else (matrix_shape(weight, "weight")[0], K))
        out = cuda_memory.empty(x, (M, own.shape[0]), dtype_name(x, "x")) if out is None else out
        product = None if weight is None or not M else _base_product(x, weight)
        found.append((out, product, bias, own))
        batch = plan(batch, M, len(own), x) if M else batch
    for begin in range(0, len(found) if M else 0, MAX_PARTS):
        _run_linear(x, found[begin : begin + MAX_PARTS], batch, False)
    return [part[0] for part in found]


def _merged(
    x: Tensor, weight: Tensor | None, deltas: Any, tenant_ids: Any, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """The product with round(base + delta) of the row's tenant, by panels that stay in the L2 cache."""
    if weight is None:
        raise ValueError("weight: expected the base weight [N, K] where precision is 'merged', got None")
    if not is_torch(x):
        raise TypeError(f"x: expected a tensor of torch where precision is 'merged', got {type(x).__name__}")
    if not _is_host(tenant_ids) and not isinstance(tenant_ids, np.ndarray):
        raise TypeError("tenant_ids: expected integers on the host where precision is 'merged'")
    M, K = matrix_shape(x, "x", "[M, K]")
    N = matrix_shape(weight, "weight")[0]
    torch, (ids, _) = sys.modules["torch"], _checked_ids(tenant_ids, M, len(deltas))
    x, weight = x.detach(), weight.detach()
    present = np.unique(ids)
    if len(present) and present[0] == -1:
        out = linear(x, weight, [], np.full(M, -1).tolist(), bias, out=out)
    elif out is None:
        out = cuda_memory.empty(x, (M, N), dtype_name(x, "x"))
    step = max(16, PANEL_BYTES // (K * weight.element_size()) // 16 * 16)
    panel = torch.empty((min(step, N), K), dtype=weight.dtype, device=weight.device)
    for tenant in present[present >= 0]:
        rows = np.flatnonzero(ids == tenant)
        at = None if len(rows) == M else cuda_memory.on_gpu_of(torch.from_numpy(rows), x)
        own, y = (x, out) if at is None else (x[at], cuda_memory.empty(x, (len(rows), N), dtype_name(out)))
        parts = _parts(deltas[tenant], x)
        for begin in range(0, N, step):
            part = panel[: min(step, N - begin)]
            _C.cuda_expand(part, weight, *parts, N, begin)
            factors = own, (part if part.dtype == x.dtype else part.to(x.dtype)).T
            if bias is None:
                torch.mm(*factors, out=y[:, begin : begin + len(part)])
            else:
                shift = bias.detach()[begin : begin + len(part)].to(x.dtype)
                torch.addmm(shift, *factors, out=y[:, begin : begin + len(part)])
        if at is not None:
            out[at] = y
    return out


def linear_add(y: Tensor, x: Tensor, deltas: Any, tenant_ids: Any) -> Tensor:
    """As `bitdelta.linear_add`, on the GPU of x."""
    M, _ = matrix_shape(x, "x", "[M, K]")
    if M:
        _run_linear(x, [(y, None, None, table(deltas, x))], tenant_ids, True)
    return y


def _run_linear(x: Tensor, parts: list[Any], tenant_ids: Any, add: bool) -> None:
    M, K = x.shape
    tables = [part[3] for part in parts]
    planes, has_columns = max(each.planes for each in tables), any(each.has_columns for each in tables)
    batch = plan(tenant_ids, M, len(tables[0]), x)
    n_bytes = _C.cuda_workspace_bytes("linear", M, K, batch.n_deltas, len(parts), planes, int(has_columns))
    _C.cuda_linear(x, tuple(parts), batch.memory, batch.max_rows, add, cuda_memory.scratch(x, n_bytes))


def linear_transposed(dy: Tensor, deltas: Any, tenant_ids: Any, out: Tensor | None = None) -> Tensor:
    """As `bitdelta.linear_transposed`, on the GPU of dy."""
    M, _ = matrix_shape(dy, "dy", "[M, N]")
    found = table(deltas, dy)
    out = cuda_memory.empty(dy, (M, found.shape[1]), dtype_name(dy, "dy")) if out is None else out
    if M:
        batch, workspace = _for_gradient(dy, found, tenant_ids)
        _C.cuda_linear_transposed(dy, None, found, batch.memory, workspace, out, None)
    return out


def gradients(
    dy: Tensor, x: Tensor, deltas: Any, tenant_ids: Any, wants_g: bool, wants_rows: bool, wants_columns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g fp32 [M, K] of `linear_transposed`; drow fp32 [T, P, N]; dcolumn fp32 [T, P, K]; None where not wanted.

    P is the most planes of a delta. Of tenants without rows, or without a column, they are zero.
    """
    if not deltas or not (wants_g or wants_rows or wants_columns):
        return None, None, None
    dy, x = _compact(dy), _compact(x)
    found = table(deltas, x)
    (M, K), T, P, N = x.shape, len(found), found.planes, found.shape[0]
    g = cuda_memory.empty(x, (M, K), "float32") if wants_g else None
    drow = cuda_memory.empty(x, (T, P, N), "float32") if wants_rows else None
    dcolumn = cuda_memory.empty(x, (T, P, K), "float32") if wants_columns else None
    if not M:
        for sums in (drow, dcolumn):
            if sums is not None:
                sums[...] = 0
        return g, drow, dcolumn
    batch, workspace = _for_gradient(dy, found, tenant_ids)
    if wants_g or wants_columns:
        _C.cuda_linear_transposed(dy, x, found, batch.memory, workspace, g, dcolumn)
    if wants_rows:
        _C.cuda_row_gradient(dy, x, found, batch.memory, workspace, drow)
    return g, drow, dcolumn


def _for_gradient(dy: Tensor, found: _C.CudaDeltas, tenant_ids: Any) -> tuple[Plan, Tensor]:
    M, (N, K) = dy.shape[0], found.shape
    batch = plan(tenant_ids, M, len(found), dy)
    return batch, cuda_memory.scratch(
        dy, _C.cuda_workspace_bytes("gradient", M, N, K, len(found), found.planes)
    )


def _compact(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous() if is_torch(tensor) else tensor


def multiply(a: Tensor, b: Tensor, is_transposed: bool = False) -> Tensor:
    """a b, or a b^T, by cuBLAS: fp32 [M, N], products and sums in fp32.

    Args:
        a: [M, K] of fp32, fp16 or bf16.
        b: [K, N], or [N, K]; of another dtype than a, both are converted to fp32 first.

    Raises:
        DeviceError: no GPU, no cuBLAS, or a stream that is captured before the first product.
    """
    cuda_memory.require()
    cublas.open_first()
    if dtype_name(a, "a") != dtype_name(b, "b"):
        a, b = (each.detach().float() if is_torch(each) else to_float32(each) for each in (a, b))
    if is_torch(b) and b.stride(1) != 1 and b.stride(0) == 1:
        b, is_transposed = b.T, not is_transposed
    a, b = _rows(a), _rows(b)
    out = cuda_memory.empty(a, (a.shape[0], b.shape[0] if is_transposed else b.shape[1]), "float32")
    if a.shape[0]:
        _C.cuda_multiply(
            out, a, b, is_transposed, cuda_memory.scratch(a, _C.cuda_workspace_bytes("multiply"))
        )
    return out


def _rows(matrix: Tensor) -> Tensor:
    """As cuBLAS takes it: columns contiguous, rows apart."""
    if not is_torch(matrix):
        return matrix
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def _base_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, fp32 [M, N]."""
    if matrix_shape(weight, "weight")[1] != x.shape[1]:
        raise ValueError(f"weight: expected K = {x.shape[1]} of x, got {list(weight.shape)}")
    return multiply(x, weight, is_transposed=True)


# deltas


def extract(base: Tensor, finetuned: Tensor, planes: int = 1, scale: str = "row") -> Delta:
    """As `bitdelta.extract`, on the GPU of base; the Delta's arrays are in the host's memory."""
    cuda_memory.require()
    N, K, planes = extract_sizes(base, finetuned, planes, scale)
    form = FORMS.index(scale)
    sign = cuda_memory.empty(base, (planes, -(-N // 16), 8 * -(-K // 256), 16), "uint32")
    row = cuda_memory.empty(base, (planes,) if scale == "tensor" else (planes, N), "float32")
    column = cuda_memory.empty(base, (planes, K), "float32") if scale == "rank1" else None
    bad = cuda_memory.empty(base, (1,), "int64")
    workspace = cuda_memory.scratch(base, _C.cuda_workspace_bytes("extract", N, K, form))
    _C.cuda_extract(base, finetuned, planes, form, sign, row, column, bad, workspace)
    _raise_bad(int(bad[0]), K)
    signs = aligned_copy(cuda_memory.to_host(sign))
    columns = None if column is None else cuda_memory.to_host(column)
    return extracted(signs, cuda_memory.to_host(row), columns, (N, K), scale)


def _raise_bad(bad: int, K: int) -> None:
    if bad == -1:
        return
    row, column, in_base = _C.cuda_position(bad, K)
    said = {
        1: "base: expected finite weights, got NaN or Inf",
        0: "finetuned: expected finite weights, got NaN or Inf",
        -1: "finetuned - base: expected differences within fp32, got one beyond",
    }[in_base]
    raise ValueError(f"{said} at [{row}, {column}]")


def expand(delta: Any, base: Tensor | None, out: Tensor) -> Tensor:
    """round(base + the planes), as `Delta.expand`, on the GPU of out; out may be base itself."""
    cuda_memory.require()
    _C.cuda_expand(out, base, *_parts(delta, out), delta.shape[0], 0)
    return out
