"""Every instruction set, the emulated ones too, against `bitdelta.reference`: the bits must be equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import _C, reference, reference_calibrate
from ..array import Tensor, aligned_empty, empty_like, from_float32
from ..delta import Delta
from ..errors import Error
from ..inputs import Inputs

ROWS = (1, 3, 4, 16, 20, 64, 100)  # of one tenant: each way to make products is used
SHAPES = ((48, 512), (37, 300))  # whole strips and lines, and neither


Case = Iterator[tuple[str, Any, Callable[[], Any]]]


@contextmanager
def isa(name: str) -> Iterator[None]:
    """The instruction set inside; the previous one after."""
    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


def fitting(log: Callable[[str], None]) -> int:
    """The same of fitted signs."""
    return _equal(log, (_fitted(),))


def kernels(log: Callable[[str], None]) -> int:
    """Returns the number of results compared; bitdelta.Error names the first that differs."""
    return _equal(log, (_extraction(), _expansion(), _products(), _transposed(), _fitted()))


def _equal(log: Callable[[str], None], cases: tuple[Case, ...]) -> int:
    n_equal = 0
    for case in cases:
        for what, expected, compute in case:
            for name in _C.isas():
                with isa(name):
                    if not _same_bits(compute(), expected):
                        raise Error(f"{name}: {what} differs from bitdelta.reference")
                n_equal += 1
    log(f"checked {n_equal} results of {', '.join(_C.isas())} against the reference: every bit equal")
    return n_equal


def _extraction() -> Case:
    for N, K in SHAPES:
        for dtype in ("bfloat16", "float16", "float32"):
            base, finetuned = _matrix(N, K, 1, dtype), _matrix(N, K, 2, dtype)
            for planes, form in ((1, "row"), (2, "rank1"), (3, "tensor")):
                expected = reference.extract(base, finetuned, planes, form)

                def compute(base: Tensor = base, finetuned: Tensor = finetuned, d: Delta = expected) -> Any:
                    return _extract(base, finetuned, d)

                what = f"extract {N}x{K} {dtype} {planes} planes {form}"
                yield what, (expected.sign, expected.scale, expected.column), compute


def _extract(base: Tensor, finetuned: Tensor, like: Delta) -> tuple[Any, ...]:
    sign = aligned_empty(like.sign.shape, np.uint32)
    is_tensor = like.form == "tensor"
    scale = np.zeros(like.planes if is_tensor else like.scale.shape, np.float32)
    column = None if like.column is None else np.zeros_like(like.column)
    _C.extract(base, finetuned, like.planes, like.form, sign, scale, column, False)
    if is_tensor:
        scale = np.repeat(scale[:, None], like.shape[0], axis=1)
    return sign, scale, column


def _expansion() -> Case:
    for N, K in SHAPES:
        for dtype in ("bfloat16", "float16", "float32"):
            base = _matrix(N, K, 1, dtype)
            for delta in _deltas(N, K):

                def compute(base: Tensor = base, delta: Delta = delta) -> Any:
                    out = empty_like(base, base.shape)
                    _C.expand(out, base, delta.handle, 0, delta.shape[0])
                    return out

                yield f"expand {N}x{K} {dtype}", reference.expand(base, delta), compute


def _products() -> Case:
    for N, K in SHAPES:
        deltas = _deltas(N, K)
        for rows in ROWS:
            for dtype in ("bfloat16", "float32"):
                x, ids = _matrix(rows, K, rows, dtype), np.arange(rows) // 16 % len(deltas)
                expected = reference.linear(x, None, deltas, ids)
                yield f"linear {N}x{K} {rows} rows {dtype}", expected, _linear(x, deltas, ids)
        mixed = np.arange(7) % (len(deltas) + 1) - 1
        x = _matrix(7, K, 7, "float32")
        x[1, 5] = np.nan
        expected = reference.linear(x, None, deltas, mixed)
        yield f"linear {N}x{K} mixed tenants", expected, _linear(x, deltas, mixed)


def _linear(x: Tensor, deltas: list[Delta], ids: Any) -> Callable[[], Any]:
    def compute() -> Any:
        out = empty_like(x, (len(ids), deltas[0].shape[0]))
        _C.linear(out, x, None, None, None, [delta.handle for delta in deltas], ids, "fixed16")
        return out

    return compute


def _transposed() -> Case:
    for N, K in SHAPES:
        deltas = _deltas(N, K)
        dy, ids = _matrix(5, N, 5, "float32"), np.array([0, 1, -1, 1, 0])

        def compute(dy: Tensor = dy, deltas: list[Delta] = deltas, ids: Any = ids, K: int = K) -> Any:
            out = np.empty((5, K), np.float32)
            _C.linear_transposed(out, dy, [delta.handle for delta in deltas], ids)
            return out

        yield f"linear_transposed {N}x{K}", reference.linear_transposed(dy, deltas, ids), compute


def _fitted() -> Case:
    for N, K in SHAPES:
        for delta in _deltas(N, K):
            inputs, d = Inputs(_hessian(K)), _matrix(N, K, 8, "float32")
            arguments: Any = (d, inputs.factor, inputs.order, delta.scale, delta.column)

            def signs(arguments: Any = arguments, delta: Delta = delta) -> Any:
                out = aligned_empty(delta.sign.shape, np.uint32)
                _C.fit_signs(*(*arguments, out))
                return out

            yield f"fit_signs {N}x{K}", reference_calibrate.fit_signs(*arguments), signs
            moving: Any = (inputs.weigh(d), inputs.damped, delta.scale, delta.column, delta.sign)

            def moved(moving: Any = moving) -> Any:
                sign = aligned_empty(moving[-1].shape, np.uint32)
                sign[...], pull = moving[-1], moving[0].copy()
                _C.sweep(*(pull, *moving[1:-1], sign))
                return sign, pull

            yield f"sweep {N}x{K}", reference_calibrate.sweep(*moving), moved


def _hessian(K: int) -> Any:
    x = _matrix(K, K, 9, "float32")
    return x.T @ x


def _matrix(n_rows: int, n_columns: int, seed: int, dtype: str) -> Any:
    values = np.random.default_rng(seed).normal(size=(n_rows, n_columns)).astype(np.float32)
    return from_float32(values, dtype)


def _deltas(N: int, K: int) -> list[Delta]:
    """One plane with row scales; two planes with row and column scales."""
    base = _matrix(N, K, 1, "float32")
    return [
        reference.extract(base, _matrix(N, K, 3 + planes, "float32"), planes, form)
        for planes, form in ((1, "row"), (2, "rank1"))
    ]


def _same_bits(got: Any, expected: Any) -> bool:
    if expected is None or got is None:
        return got is expected
    if isinstance(expected, tuple):
        return all(map(_same_bits, got, expected))
    left, right = np.ascontiguousarray(got), np.ascontiguousarray(expected)
    return left.shape == right.shape and left.tobytes() == right.tobytes()
