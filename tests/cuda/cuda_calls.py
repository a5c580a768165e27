"""Right and wrong calls of the functions of bitdelta._C that run on a GPU, as border_calls.py has them of the others.

Of the emulated build, where memory is NumPy's. M = 3 rows, N = 20, K = 40, P = 2 planes, T = 2 slots.
"""

import numpy as np
from border_calls import ones, read_only
from dlpack_producer import CUDA, READ_ONLY, Producer, aligned

from bitdelta import _C, cublas
from bitdelta.array import aligned_empty
from bitdelta.errors import DeviceError

M, N, K, P, S, L, T = 3, 20, 40, 2, 2, 8, 2

ARGUMENTS = {
    "CudaDeltas": ("table", "deltas", "shape"),
    "cuda_workspace_bytes": ("operation", "M", "T"),
    "cuda_plan": ("plan", "tenant_ids", "T"),
    "cuda_linear": ("x", "parts", "plan", "max_rows", "add", "workspace"),
    "cuda_linear_transposed": ("dy", "x", "deltas", "plan", "workspace", "out", "dcolumn"),
    "cuda_row_gradient": ("dy", "x", "deltas", "plan", "workspace", "drow"),
    "cuda_extract": (
        "base", "finetuned", "planes", "form", "sign", "scale", "column", "bad", "workspace"
    ),
    "cuda_position": ("bad", "K"),
    "cuda_expand": ("out", "base", "sign", "scale", "column", "N", "row_begin"),
    "cuda_quantize": ("q", "exponents", "x", "column"),
    "cuda_open_blas": ("name", "is_loaded"),
    "cuda_multiply": ("out", "a", "b", "is_transposed", "workspace"),
    "cuda_fit_signs": ("d", "factor", "order", "row", "column", "sign", "workspace"),
    "cuda_sweep": ("pull", "hessian", "row", "column", "sign"),
}  # fmt: skip


def scratch(operation, *sizes):
    return aligned_empty((_C.cuda_workspace_bytes(operation, *sizes),), np.uint8, 256)


def slot(n=N, k=K, planes=P):
    sign = aligned((planes, -(-n // 16), 8 * -(-k // 256), 16), np.uint32)
    return sign, ones(planes, n), ones(planes, k)


def make_deltas(n=N, k=K):
    return _C.CudaDeltas(np.zeros((T, 4), np.int64), (slot(n, k), None), (n, k))


def make_plan(n_rows=M, n_slots=T):
    plan = scratch("plan", n_rows, n_slots)
    _C.cuda_plan(plan, np.arange(n_rows) % (n_slots + 1) - 1, n_slots)
    return plan


def make_part(**changes):
    part = {"out": ones(M, N), "product": ones(M, N), "bias": ones(N), "deltas": make_deltas()}
    return tuple((part | changes).values())


def right(function):
    """Fresh right arguments, by name."""
    return _RIGHT[function]()


def _gradient(**more):
    workspace = scratch("gradient", M, N, K, T, P)
    given = {"dy": ones(M, N), "x": ones(M, K), "deltas": make_deltas(), "plan": make_plan()}
    return {**given, "workspace": workspace, **more}


def _multiply():
    cublas.open_first()
    workspace = aligned_empty((512,), np.uint8, 256)
    return {
        "out": ones(M, N), "a": ones(M, K), "b": ones(N, K), "is_transposed": True, "workspace": workspace
    }  # fmt: skip


_RIGHT = {
    "CudaDeltas": lambda: {
        "table": np.zeros((T, 4), np.int64),
        "deltas": (slot(), None),
        "shape": (N, K),
    },
    "cuda_workspace_bytes": lambda: {"operation": "plan", "M": M, "T": T},
    "cuda_plan": lambda: {"plan": scratch("plan", M, T), "tenant_ids": np.array([0, 1, -1]), "T": T},
    "cuda_linear": lambda: {
        "x": ones(M, K),
        "parts": (make_part(), make_part(product=None, bias=None)),
        "plan": make_plan(),
        "max_rows": M,
        "add": False,
        "workspace": scratch("linear", M, K, T, 2, P, 1),
    },
    "cuda_linear_transposed": lambda: _gradient(out=ones(M, K), dcolumn=ones(T, P, K)),
    "cuda_row_gradient": lambda: _gradient(drow=ones(T, P, N)),
    "cuda_extract": lambda: {
        "base": ones(N, K),
        "finetuned": ones(N, K, dtype=np.float16),
        "planes": P,
        "form": 2,
        "sign": slot()[0],
        "scale": ones(P, N),
        "column": ones(P, K),
        "bad": np.zeros(1, np.int64),
        "workspace": scratch("extract", N, K, 2),
    },
    "cuda_position": lambda: {"bad": 5, "K": K},
    "cuda_expand": lambda: {
        "out": ones(N, K),
        "base": ones(N, K, dtype=np.float16),
        **dict(zip(("sign", "scale", "column"), slot(), strict=True)),
        "N": N,
        "row_begin": 0,
    },
    "cuda_quantize": lambda: {
        "q": aligned((M, 256), np.int16),
        "exponents": ones(M, dtype=np.int32),
        "x": ones(M, K),
        "column": ones(K),
    },
    "cuda_open_blas": lambda: {"name": "no such library", "is_loaded": True},
    "cuda_multiply": _multiply,
    "cuda_fit_signs": lambda: {
        "d": ones(N, K),
        "factor": ones(K, K),
        "order": np.arange(K),
        "row": ones(P, N),
        "column": ones(P, K),
        "sign": slot()[0],
        "workspace": scratch("fit", N, K),
    },
    "cuda_sweep": lambda: {
        "pull": ones(N, K),
        "hessian": ones(K, K),
        "row": ones(P, N),
        "column": ones(P, K),
        "sign": slot()[0],
    },
}


def call(function, **changes):
    arguments = right(function) | changes
    return getattr(_C, function)(*(arguments[name] for name in ARGUMENTS[function]))


def _wrong():
    """function, argument, value, exception, words that its text must have."""
    yield from _wrong_memory()
    yield from _wrong_products()
    yield from _wrong_deltas()
    yield from _wrong_fits()


def _wrong_memory():
    """What any tensor may be; cuda_quantize stands for all functions."""
    x = ones(M, K)
    odd = np.zeros(4 * M * K + 1, np.uint8)[1:].view(np.float32).reshape(M, K)
    huge = Producer(x, shape=(2**31, 2**31), strides=(2**31, 1))
    for value, exception, words in (
        (3, TypeError, ["x: expected a NumPy array or another tensor", "got int"]),
        (np.ndarray, TypeError, ["x: ", "got type"]),
        (x.astype(np.float64), TypeError, ["x: expected float32, float16 or bfloat16, got float64"]),
        (x.astype(">f4"), TypeError, ["x: expected this machine's byte order"]),
        (x[0], ValueError, ["x: expected [M, K] = [?, ?], got [40]"]),
        (ones(M, 0), ValueError, ["x: expected [M, K] of at least 1, got [3, 0]"]),
        (ones(M, 2 * K)[:, ::2], BufferError, ["x: expected rows of contiguous columns", "got [80, 2]"]),
        (x[::-1], BufferError, ["x: expected rows", "got [-40, 1]"]),
        (np.broadcast_to(x[:1], (M, K)), BufferError, ["x: expected rows", "got [0, 1]"]),
        (odd, BufferError, ["x: expected memory aligned to 4 bytes", "1 beyond"]),
        (Producer(x, device=CUDA), DeviceError, ["x: expected CPU memory, got CUDA memory"]),
        (Producer(x, lanes=4), TypeError, ["x: expected one number an element, got 4 lanes"]),
        (Producer(x, version=(2, 0)), BufferError, ["x: expected DLPack version 1, got 2.0"]),
        (Producer(x, dtype=(14, 8, 1)), TypeError, ["x: ", "got DLPack dtype 14 of 8 bits"]),
        (Producer(x, data=None), BufferError, ["x: expected memory, got a tensor without data"]),
        (Producer(x, ndim=9), ValueError, ["x: expected a shape of at most 8 dimensions, got 9"]),
        (Producer(x, ndim=-1), ValueError, ["x: expected a shape of at most 8 dimensions"]),
        (Producer(x, shape=(M, -K)), ValueError, ["x: a size of -40 in dimension 1 is out of range"]),
        (huge, ValueError, ["x: the size in bytes of [2147483648, 2147483648] overflows"]),
        (
            Producer(x, shape=(2**24 + 1, K)),
            ValueError,
            ["x: expected at most [16777216, 1048576], got [16777217, 40]"],
        ),
        (
            Producer(x, shape=(1, 2**31)),
            ValueError,
            ["x: expected at most [16777216, 1048576], got [1, 2147483648]"],
        ),
    ):
        yield "cuda_quantize", "x", value, exception, words
    q = aligned((M, 256), np.int16)
    yield "cuda_quantize", "q", read_only(q.copy()), BufferError, ["q: expected writable memory"]
    yield "cuda_quantize", "q", Producer(q, flags=READ_ONLY), BufferError, ["q: expected writable memory"]
    yield (
        "cuda_quantize",
        "q",
        aligned((M, 256), np.int16, 2),
        BufferError,
        ["q: expected memory aligned to 16"],
    )
    yield "cuda_quantize", "q", q.view(np.uint16), TypeError, ["q: expected int16, got uint16"]
    yield "cuda_quantize", "exponents", ones(M, dtype=np.int64), TypeError, ["exponents: expected int32"]
    elsewhere = Producer(ones(K), device_id=1)
    words = ["column: expected memory of GPU 0, as the tensors before it, got GPU 1"]
    yield "cuda_quantize", "column", elsewhere, DeviceError, words
    yield "cuda_quantize", "column", ones(K + 1), ValueError, ["column: expected [K] = [40], got [41]"]


def _wrong_products():
    plan = "plan: expected"
    for value, exception, words in (
        ("none", ValueError, ["operation: expected plan, linear", "got 'none'"]),
        (None, ValueError, ["operation: expected plan", "got None"]),
        ("linear", TypeError, ["cuda_workspace_bytes: expected 7 arguments, got 3"]),
    ):
        yield "cuda_workspace_bytes", "operation", value, exception, words
    yield "cuda_workspace_bytes", "M", 2**24 + 1, ValueError, ["M: expected 0 .. 16777216, got 16777217"]
    yield "cuda_workspace_bytes", "M", -1, ValueError, ["M: expected 0 .. 16777216, got -1"]
    yield "cuda_workspace_bytes", "T", 2**70, ValueError, ["T: expected 0 .. 4096, got"]
    yield "cuda_workspace_bytes", "T", 1.0, TypeError, ["T: expected an int, got float"]
    yield "cuda_plan", "T", 0, ValueError, ["T: expected 1 .. 4096, got 0"]
    yield "cuda_plan", "T", 4097, ValueError, ["T: expected 1 .. 4096, got 4097"]
    yield (
        "cuda_plan",
        "tenant_ids",
        np.zeros(M, np.int32),
        TypeError,
        ["tenant_ids: expected int64, got int32"],
    )
    yield "cuda_plan", "tenant_ids", [0, 1, 2], TypeError, ["tenant_ids: ", "got list"]
    yield "cuda_plan", "tenant_ids", np.zeros((M, 1), int), ValueError, ["tenant_ids: expected [M]"]
    many = Producer(np.zeros(M, int), shape=(2**31,))
    yield (
        "cuda_plan",
        "tenant_ids",
        many,
        ValueError,
        ["tenant_ids: expected at most 16777216 rows, got 2147483648"],
    )
    yield (
        "cuda_plan",
        "plan",
        aligned_empty((4096,), np.uint8, 256)[1:],
        BufferError,
        [plan, "aligned to 256"],
    )
    yield "cuda_plan", "plan", aligned_empty((16,), np.uint8, 256), ValueError, [plan, "bytes, got 16"]
    yield "cuda_plan", "plan", aligned_empty((1024,), np.int32, 256), TypeError, [plan, "uint8, got int32"]
    part, both = make_part(), ones(M, N)
    for value, exception, words in (
        ((), ValueError, ["parts: expected a tuple of 1 .. 4, got ()"]),
        (5 * (part,), ValueError, ["parts: expected a tuple of 1 .. 4"]),
        (part[:3], TypeError, ["parts: expected (out, product, bias, deltas), got numpy.ndarray"]),
        ((part[:3],), TypeError, ["parts: expected (out, product, bias, deltas), got tuple"]),
        ((make_part(deltas=None),), TypeError, ["deltas: expected bitdelta._C.CudaDeltas, got NoneType"]),
        ((make_part(deltas=make_deltas(k=41)),), ValueError, ["deltas: expected K = 40 of x, got 41"]),
        ((make_part(out=ones(M, N + 1)),), ValueError, ["out: expected [M, N] = [3, 20], got [3, 21]"]),
        ((make_part(out=read_only(ones(M, N))),), BufferError, ["out: expected writable memory"]),
        ((make_part(out=both, product=both),), BufferError, ["out: expected memory of its own", "product"]),
        ((make_part(product=ones(M, N, dtype=np.float16)),), TypeError, ["product: expected float32"]),
        ((make_part(product=ones(M, 2 * N)[:, ::2]),), BufferError, ["product: expected rows of contiguous"]),
        ((make_part(bias=ones(N + 1)),), ValueError, ["bias: expected [N] = [20], got [21]"]),
        ((make_part(bias=ones(2 * N)[::2]),), BufferError, ["bias: expected rows of contiguous columns"]),
    ):
        yield "cuda_linear", "parts", value, exception, words
    yield "cuda_linear", "x", ones(M, K + 1), ValueError, ["deltas: expected K = 41 of x, got 40"]
    yield "cuda_linear", "max_rows", -1, ValueError, ["max_rows: expected 0 .. "]
    yield "cuda_linear", "add", 1, TypeError, ["add: expected a bool, got int"]
    yield "cuda_linear", "plan", None, TypeError, ["plan: expected a NumPy array"]
    small = aligned_empty((256,), np.uint8, 256)
    for function in ("cuda_linear", "cuda_linear_transposed", "cuda_row_gradient", "cuda_extract"):
        yield function, "workspace", small, ValueError, ["workspace: expected at least", "got 256"]
    for function in ("cuda_linear_transposed", "cuda_row_gradient"):
        yield function, "dy", ones(M, N - 1), ValueError, ["dy: expected N = 20 of deltas, got 19"]
        wide = Producer(ones(M, N), shape=(2**24 + 1, N))
        yield function, "dy", wide, ValueError, ["dy: expected at most [16777216, 1048576]"]
        yield function, "x", ones(M + 1, K), ValueError, ["x: expected [M, K] = [3, 40], got [4, 40]"]
        yield function, "deltas", (), TypeError, ["deltas: expected bitdelta._C.CudaDeltas, got tuple"]
    yield "cuda_linear_transposed", "x", None, ValueError, ["x: expected [M, K] for dcolumn, got None"]
    yield "cuda_linear_transposed", "out", ones(M, N), ValueError, ["out: expected [M, K] = [3, 40]"]
    yield "cuda_linear_transposed", "dcolumn", ones(T, P, N), ValueError, ["dcolumn: expected [T, P, K]"]
    yield "cuda_row_gradient", "x", None, ValueError, ["x: expected [M, K] for drow, got None"]
    yield "cuda_row_gradient", "drow", ones(T, P, K), ValueError, ["drow: expected [T, P, N] = [2, 2, 20]"]
    yield "cuda_open_blas", "name", None, TypeError, ["name: expected str, got NoneType"]
    yield "cuda_open_blas", "name", "a\0b", ValueError, ["null"]
    yield "cuda_open_blas", "is_loaded", 0, TypeError, ["is_loaded: expected a bool, got int"]
    yield "cuda_multiply", "a", ones(M, K + 1), ValueError, ["b: expected [N, K] = [?, 41], got [20, 40]"]
    yield "cuda_multiply", "b", ones(N, K, dtype=np.float16), TypeError, ["b: expected the dtype of a"]
    yield (
        "cuda_multiply",
        "b",
        Producer(ones(N, K), device_id=1),
        DeviceError,
        ["b: expected memory of GPU 0"],
    )
    yield "cuda_multiply", "out", ones(M + 1, N), ValueError, ["out: expected [M, N] = [3, 20], got [4, 20]"]
    far = Producer(ones(1, K), shape=(N, K), strides=(2**31, 1))
    words = ["b: expected fewer than 2^31 rows and row strides below it, got 20 and 2147483648"]
    yield "cuda_multiply", "b", far, ValueError, words


def _wrong_deltas():
    for value, exception, words in (
        ((), ValueError, ["deltas: expected 1 .. 4096 slots, got 0"]),
        ((None,) * 4097, ValueError, ["deltas: expected 1 .. 4096 slots, got 4097"]),
        ([slot(), None], TypeError, ["tuple"]),
        ((slot()[:2], None), TypeError, ["deltas: expected (sign, scale, column) or None, got tuple"]),
        ((5, None), TypeError, ["deltas: expected (sign, scale, column) or None, got int"]),
        ((slot(n=40), None), ValueError, ["sign: expected [P, S, L, 16] = [?, 2, 8, 16], got [2, 3, 8, 16]"]),
        ((slot(planes=9), None), ValueError, ["sign: expected 1 .. 8 planes, got 9"]),
        (
            ((slot()[0], *slot(planes=1)[1:]), None),
            ValueError,
            ["scale: expected [P, N] = [2, 20], got [1, 20]"],
        ),
        (
            (None, (aligned((P, S, L, 16), np.uint32, 16), *slot()[1:])),
            BufferError,
            ["sign: expected memory aligned to 64"],
        ),
        (
            (None, (Producer(slot()[0], device_id=1), *slot()[1:])),
            DeviceError,
            ["sign: expected memory of GPU 0, as the table, got GPU 1"],
        ),
    ):
        yield "CudaDeltas", "deltas", value, exception, words
    yield "CudaDeltas", "table", np.zeros((T, 4), np.uint64), TypeError, ["table: expected int64, got uint64"]
    yield (
        "CudaDeltas",
        "table",
        np.zeros((T, 3), int),
        ValueError,
        ["table: expected [T, 4] = [2, 4], got [2, 3]"],
    )
    yield "CudaDeltas", "table", read_only(np.zeros((T, 4), int)), BufferError, ["table: expected writable"]
    yield "CudaDeltas", "shape", (0, K), ValueError, ["shape: expected 1 .. 1048576, got 0"]
    yield "CudaDeltas", "shape", (N, 2**31), ValueError, ["shape: expected 1 .. 1048576, got 2147483648"]
    yield "CudaDeltas", "shape", (N,), TypeError, ["CudaDeltas"]
    many = Producer(ones(N, K), shape=(2**31, 1))
    yield "cuda_extract", "base", many, ValueError, ["base: expected N and K below 2^31, got 2147483648"]
    yield "cuda_extract", "base", ones(N, K, dtype=int), TypeError, ["base: expected float32", "got int64"]
    yield "cuda_extract", "finetuned", ones(N, K + 1), ValueError, ["finetuned: expected [N, K] = [20, 40]"]
    yield "cuda_extract", "planes", 9, ValueError, ["planes: expected 1 .. 8, got 9"]
    yield "cuda_extract", "form", 3, ValueError, ["form: expected 0 .. 2, got 3"]
    yield "cuda_extract", "form", 1, ValueError, ["column: expected fp32 [P, K] in form rank1, else None"]
    yield "cuda_extract", "column", None, ValueError, ["column: expected fp32 [P, K] in form rank1"]
    yield "cuda_extract", "scale", ones(P), ValueError, ["scale: expected [P, N] = [2, 20], got [2]"]
    yield "cuda_extract", "bad", np.zeros(2, int), ValueError, ["bad: expected [1] = [1], got [2]"]
    yield "cuda_position", "K", 0, ValueError, ["K: expected 1 .. 2147483647, got 0"]
    yield "cuda_position", "bad", 2**63, ValueError, ["bad: expected"]
    yield "cuda_expand", "N", 2**31, ValueError, ["N: expected 1 .. 2147483647, got 2147483648"]
    yield "cuda_expand", "row_begin", N, ValueError, ["row_begin: expected 0 .. 19, got 20"]
    yield "cuda_expand", "row_begin", 1, ValueError, ["out: expected at most N - row_begin = 19 rows, got 20"]
    yield "cuda_expand", "base", ones(N - 1, K), ValueError, ["base: expected [N, K] = [20, 40]"]
    yield "cuda_expand", "sign", slot(planes=9)[0], ValueError, ["sign: expected 1 .. 8 planes, got 9"]


def _wrong_fits():
    many = Producer(ones(N, K), shape=(2**31, K))
    yield "cuda_fit_signs", "d", ones(N, K, dtype=np.float16), TypeError, ["d: expected float32, got float16"]
    yield "cuda_fit_signs", "factor", ones(K, K + 1), ValueError, ["factor: expected [K, K] = [40, 40]"]
    yield (
        "cuda_fit_signs",
        "factor",
        ones(K, 2 * K)[:, ::2],
        BufferError,
        ["factor: expected contiguous memory"],
    )
    yield (
        "cuda_fit_signs",
        "order",
        np.arange(K, dtype=np.int32),
        TypeError,
        ["order: expected int64, got int32"],
    )
    yield "cuda_fit_signs", "order", np.arange(K + 1), ValueError, ["order: expected [K] = [40], got [41]"]
    yield (
        "cuda_fit_signs",
        "workspace",
        aligned_empty((64,), np.uint8, 256),
        ValueError,
        ["workspace: expected at least"],
    )
    yield "cuda_fit_signs", "d", many, ValueError, ["d: expected N and K below 2^31, got 2147483648 and 40"]
    yield "cuda_sweep", "pull", many, ValueError, ["pull: expected N and K below 2^31, got 2147483648 and 40"]
    yield "cuda_sweep", "pull", ones(N, 2 * K)[:, ::2], BufferError, ["pull: expected contiguous memory"]
    yield "cuda_sweep", "pull", read_only(ones(N, K)), BufferError, ["pull: expected writable memory"]
    yield "cuda_sweep", "hessian", ones(K + 1), ValueError, ["hessian: expected [K] = [40], got [41]"]
    yield "cuda_sweep", "hessian", ones(K, K + 1), ValueError, ["hessian: expected [K, K] = [40, 40]"]
    yield "cuda_sweep", "hessian", ones(1, K, K), ValueError, ["hessian: expected [K, K] = [40, 40]"]
    for function in ("cuda_fit_signs", "cuda_sweep"):
        yield function, "row", ones(9, N), ValueError, ["row: expected 1 .. 8 planes, got 9"]
        yield function, "row", ones(P, N + 1), ValueError, ["row: expected [P, N] = [?, 20], got [2, 21]"]
        yield function, "column", ones(1, K), ValueError, ["column: expected [P, K] = [2, 40], got [1, 40]"]
        yield (
            function,
            "sign",
            slot(planes=1)[0],
            ValueError,
            ["sign: expected [P, S, L, 16] = [2, 2, 8, 16]"],
        )
        moved = aligned((P, S, L, 16), np.uint32, 32)
        yield function, "sign", moved, BufferError, ["sign: expected memory aligned to 64"]
        yield (
            function,
            "row",
            Producer(ones(P, N), device_id=1),
            DeviceError,
            ["row: expected memory of GPU 0"],
        )


WRONG = [
    (f"{function}-{argument}-{index}", function, argument, value, exception, words)
    for index, (function, argument, value, exception, words) in enumerate(_wrong())
]
