"""The definition of correct: every numeric function in plain NumPy, slow and obvious.

N output rows, K input columns, P planes, M activation rows, T tenants; S = ceil(N/16) strips, L = 8 ceil(K/256).
C and CUDA kernels are tested against this file; what it leaves to no one is the order of operations:

    fold(v)   fp64: lane[k mod 16] += v[k], k ascending; then lane[j] += lane[j + 8], + 4, + 2, + 1; no fused products
    plane     s = not (r < 0), a = fp64(|r|); r is first d = fp32(finetuned) - fp32(base), then fp32(r - s * scale)
    row       row[n] = fp32(fold(a[n]) / K)
    tensor    scale = fp32((fold(a[0]) + fold(a[1]) + ...) / (N K))
    rank1     c = 1; 20 times: row[n] = fold(a[n] c) / fold(c c); c[k] = (a[0, k] row[0] + a[1, k] row[1] + ...) /
              (row[0] row[0] + row[1] row[1] + ...); a zero denominator gives row = 0, c = 1. Then mean = fold(c) / K,
              row = fp32(row mean), column = fp32(c / mean), scale = fp32(row column)
    expand    t = s_0 scale_0, then + s_p scale_p in order, each sum in fp32; round(fp32(base + t))
    fixed16   see `quantize`; term_p = (fp32(z) 2^(e-15)) row_p, each product rounded to fp32
    linear    y = term_0 + term_1 ... + base product + bias, each sum rounded to fp32; then to x's dtype. Some u of a
              row not finite: the whole row is the quiet NaN 0x7fc00000 (rounded), as is every other NaN

The tensors may be of any kind; results are NumPy (BFloat16Array for bf16). Source of the method: BitDelta, arXiv
2402.10193, section 3.1 (one plane, one scale per matrix); the rest is this package's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .array import Tensor, aligned_copy, aligned_empty, dtype_name, from_float32, to_float32
from .delta import Delta

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LANES = 16
SWEEPS = 20
MIN_EXPONENT = -96
NAN = np.array(0x7FC00000, np.uint32).view(np.float32)


# bits


def pack(signs: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """bool [N, K], True = + -> uint32 [S, L, 16]: bit j of word i of line w of strip s is [16 s + i, 32 w + j].

    >>> import numpy as np
    >>> pack(np.array([[True, False, True]])).shape
    (1, 8, 16)
    >>> int(pack(np.array([[True, False, True]]))[0, 0, 0])
    5
    """
    n_rows, n_columns = signs.shape
    padded = np.zeros((-(-n_rows // 16) * 16, -(-n_columns // 256) * 256), np.bool_)
    padded[:n_rows, :n_columns] = signs
    words = np.packbits(padded, axis=1, bitorder="little").view("<u4")  # [16 S, L]
    strips = words.reshape(padded.shape[0] // 16, 16, padded.shape[1] // 32)
    return aligned_copy(strips.transpose(0, 2, 1))


def unpack(sign_plane: NDArray[np.uint32], N: int, K: int) -> NDArray[np.bool_]:
    """uint32 [S, L, 16] -> bool [N, K]; the padding is dropped."""
    words = np.ascontiguousarray(sign_plane.transpose(0, 2, 1)).astype("<u4", copy=False)  # [S, 16, L]
    bits = np.unpackbits(words.view(np.uint8), axis=2, bitorder="little")
    n_strips, _, n_columns = bits.shape
    return bits.reshape(16 * n_strips, n_columns)[:N, :K].astype(np.bool_)


# extraction and expansion


def fold(values: F64) -> F64:
    """Sums of the last axis in 16 lanes: [..., K] fp64 -> [...] fp64."""
    n = values.shape[-1]
    lanes = np.zeros((*values.shape[:-1], LANES))
    for k in range(0, n, LANES):
        width = min(LANES, n - k)
        lanes[..., :width] += values[..., k : k + width]
    for half in (8, 4, 2, 1):
        lanes[..., :half] += lanes[..., half : 2 * half]
    total: F64 = lanes[..., 0]
    return total


def extract(base: Tensor, finetuned: Tensor, planes: int = 1, scale: str = "row") -> Delta:
    """finetuned - base -> sign planes and scales. [N, K] each, fp32, fp16 or bf16 in any mix."""
    with np.errstate(over="ignore", invalid="ignore"):
        residual = to_float32(finetuned) - to_float32(base)
    _check_finite(to_float32(base), to_float32(finetuned), residual)
    N, K = residual.shape
    sign = aligned_empty((planes, -(-N // 16), 8 * -(-K // 256), 16), np.uint32)
    rows = np.zeros((planes, N), np.float32)
    columns = np.ones((planes, K), np.float32)
    for p in range(planes):
        is_positive = ~(residual < 0)
        sign[p] = pack(is_positive)
        rows[p], columns[p] = _scales(np.abs(residual).astype(np.float64), scale)
        with np.errstate(over="ignore", invalid="ignore"):
            step = rows[p][:, None] * columns[p]
            residual = residual - np.where(is_positive, step, -step)
    return Delta(sign, rows, columns if scale == "rank1" else None, (N, K), form=scale)


def _check_finite(base: F32, finetuned: F32, d: F32) -> None:
    """Names the first difference, row by row, that is not finite, and the weight that makes it so."""
    for place in np.argwhere(~np.isfinite(d))[:1].tolist():
        what = "finetuned - base: expected differences within fp32, got one beyond"
        for name, weight in (("base", base), ("finetuned", finetuned)):
            if not np.isfinite(weight[tuple(place)]):
                what = f"{name}: expected finite weights, got NaN or Inf"
                break
        raise ValueError(f"{what} at {place}")


def _scales(a: F64, form: str) -> tuple[Any, Any]:
    """a = |r| [N, K] fp64 -> row fp32 [N] (or one number) and column fp32 [K] (or 1)."""
    N, K = a.shape
    if a.size == 0:
        return 0, 1
    if form == "row":
        return (fold(a) / K).astype(np.float32), 1
    if form == "tensor":
        return np.float32(_ascending(fold(a)) / (N * K)), 1
    if form != "rank1":
        raise ValueError(f"scale: expected 'tensor', 'row' or 'rank1', got {form!r}")
    column = np.ones(K)
    for _ in range(SWEEPS):
        below = fold(column * column)
        row = fold(a * column) / below if below else np.zeros(N)
        below = _ascending(row * row)
        column = _ascending(a * row[:, None]) / below if below else np.ones(K)
    mean = fold(column) / K
    return (row * mean).astype(np.float32), (column / mean).astype(np.float32)


def _ascending(values: F64) -> Any:
    """Sum over the first axis, one addition after the other."""
    total = np.zeros(values.shape[1:])
    for value in values:
        total = total + value
    return total


def expand(base: Tensor | None, delta: Delta) -> NDArray[Any]:
    """round(base + delta) in base's dtype [N, K]; fp32 of the delta alone where base is None."""
    t = _planes(delta)
    if base is None:
        return np.float32(0) + t
    with np.errstate(over="ignore"):
        return from_float32(to_float32(base) + t, dtype_name(base, "base"))


def _planes(delta: Delta) -> F32:
    """The planes' sum [N, K] fp32, in order."""
    N, K = delta.shape
    total: F32 | None = None
    with np.errstate(over="ignore", invalid="ignore"):
        for p in range(delta.planes):
            scale = np.broadcast_to(delta.scale[p][:, None], (N, K))
            if delta.column is not None:
                scale = scale * delta.column[p]
            term = np.where(unpack(delta.sign[p], N, K), scale, -scale)
            total = term if total is None else total + term
    assert total is not None
    return total


# products


def quantize(u: F32) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """fixed16 of the rows of u, fp32 [M, K]: q [M, K] in -32768 .. 32767, exponent e [M], is_finite [M].

        e = max(frexp exponent of max |u|, -96)
        q = clamp(round to nearest even(u 2^(15-e)), -32768, 32767);   u ~ q 2^(e-15)

    >>> quantize(np.array([[1.0, -0.5, 0.25]], np.float32))[:2]
    (array([[16384, -8192,  4096]]), array([1]))
    """
    is_finite = np.asarray(np.isfinite(u).all(axis=1))
    clean = np.where(is_finite[:, None], u, np.float32(0))
    largest = np.abs(clean).max(axis=1, initial=0)
    e = np.maximum(np.frexp(largest)[1].astype(np.int64), MIN_EXPONENT)
    scaled = np.ldexp(clean.astype(np.float64), (15 - e)[:, None])
    return np.clip(np.rint(scaled), -32768, 32767).astype(np.int64), e, is_finite


def linear(
    x: Tensor,
    weight: Tensor | None,
    deltas: Sequence[Delta],
    tenant_ids: Any,
    bias: Tensor | None = None,
    precision: str = "fixed16",
    product: Tensor | None = None,
) -> NDArray[Any]:
    """y[m] = sum_p term_p(t) + x[m] W^T + bias, t = tenant_ids[m], -1 = base only; [M, N] in x's dtype.

    product: fp32 [M, N], the base product where the caller has it (kernels differ in the order of its sum); else
    it is summed in fp64 and rounded to fp32.
    """
    u, ids = to_float32(x), np.asarray(tenant_ids)
    if precision == "merged":
        assert weight is not None
        return _merged(x, weight, deltas, ids, bias)
    base = _product(u, weight) if weight is not None else None if product is None else to_float32(product)
    N = _n_rows(weight, base, deltas)
    terms, is_lost = _terms(u, deltas, ids, precision, N, transposed=False)
    return from_float32(_sum(terms, is_lost, base, bias, ids), dtype_name(x, "x"))


def linear_add(y: NDArray[Any], x: Tensor, deltas: Sequence[Delta], tenant_ids: Any) -> NDArray[Any]:
    """y[m] = round(sum_p term_p + y[m]), in place; rows of tenant -1 stay as they are."""
    ids = np.asarray(tenant_ids)
    terms, is_lost = _terms(to_float32(x), deltas, ids, "fixed16", y.shape[1], transposed=False)
    new = from_float32(_sum(terms, is_lost, to_float32(y), None, ids), dtype_name(y, "y"))
    for m in np.flatnonzero(ids >= 0):
        y[m] = new[m]
    return y


def linear_transposed(dy: Tensor, deltas: Sequence[Delta], tenant_ids: Any) -> NDArray[Any]:
    """g[m] = sum_p (sum_n fp32(dy[m, n] row_p[n]) S_p[n]) column_p; [M, K] in dy's dtype; rows of tenant -1 are 0."""
    ids = np.asarray(tenant_ids)
    K = deltas[0].shape[1]
    terms, is_lost = _terms(to_float32(dy), deltas, ids, "fixed16", K, transposed=True)
    return from_float32(_sum(terms, is_lost, None, None, ids), dtype_name(dy, "dy"))


def _product(u: F32, weight: Tensor) -> F32:
    with np.errstate(over="ignore", invalid="ignore"):
        return (u.astype(np.float64) @ to_float32(weight).astype(np.float64).T).astype(np.float32)


def _n_rows(weight: Tensor | None, product: F32 | None, deltas: Sequence[Delta]) -> int:
    if weight is not None:
        return int(weight.shape[0])
    return product.shape[1] if product is not None else deltas[0].shape[0]


def _terms(
    x: F32, deltas: Sequence[Delta], ids: NDArray[Any], precision: str, width: int, transposed: bool
) -> tuple[F32, NDArray[np.bool_]]:
    """The planes' terms of every row summed in order [M, width], 0 for tenant -1; and which rows are lost to NaN."""
    y = np.zeros((len(ids), width), np.float32)
    is_lost = np.zeros(len(ids), np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        for m, t in enumerate(ids):
            for p in range(deltas[t].planes if t >= 0 else 0):
                term = _term(x[m], deltas[t], p, precision, transposed)
                if term is None:
                    is_lost[m] = True
                else:
                    y[m] = term if p == 0 else y[m] + term
    return y, is_lost


def _term(x: F32, delta: Delta, p: int, precision: str, transposed: bool) -> F32 | None:
    """One plane of one row: fp32 [N], or [K] transposed; None where some u is not finite."""
    s = np.where(unpack(delta.sign[p], *delta.shape), 1, -1)
    row = delta.scale[p]
    column = None if delta.column is None else delta.column[p]
    before, after, s = (row, column, s.T) if transposed else (column, row, s)
    u = x if before is None else x * before
    if not np.isfinite(u).all():
        return None
    if precision == "float32":
        z = (s * u).sum(axis=1, dtype=np.float32)
    else:
        q, e, _ = quantize(u[None])
        z = (s @ q[0]).astype(np.float32) * np.ldexp(np.float32(1), int(e[0]) - 15)
    term: F32 = z if after is None else z * after
    return term


def _sum(
    terms: F32, is_lost: NDArray[np.bool_], product: F32 | None, bias: Tensor | None, ids: NDArray[Any]
) -> F32:
    """terms + product + bias; a row of tenant -1 has no terms; a lost row and any NaN are the quiet NaN."""
    y = terms
    with np.errstate(over="ignore", invalid="ignore"):
        if product is not None:
            y = np.where((ids < 0)[:, None], product, y + product)
        if bias is not None:
            y = y + to_float32(bias)
    return np.where(is_lost[:, None] | np.isnan(y), NAN, y)


def _merged(
    x: Tensor, weight: Tensor, deltas: Sequence[Delta], ids: NDArray[Any], bias: Tensor | None
) -> NDArray[Any]:
    """y[m] = round(x[m] W'^T + bias), W' = round(base + delta) in the weight's dtype."""
    u = to_float32(x)
    y = np.empty((len(ids), weight.shape[0]), np.float32)
    for t in np.unique(ids):
        rows = ids == t
        y[rows] = _product(u[rows], weight if t < 0 else expand(weight, deltas[t]))
    if bias is not None:
        y = y + to_float32(bias)
    return from_float32(np.where(np.isnan(y), NAN, y), dtype_name(x, "x"))
