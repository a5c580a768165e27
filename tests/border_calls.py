"""Right and wrong calls of every function of bitdelta._C, shared by the tests of the border and of its leaks.

M = 3 rows, N = 20, K = 40 (so S = 2 strips, L = 8 lines), P = 2 planes, T = 2 deltas.
"""

import numpy as np
from dlpack_producer import CUDA, READ_ONLY, Producer, aligned

from bitdelta import _C, as_bfloat16
from bitdelta.errors import DeviceError

M, N, K, P, S, L = 3, 20, 40, 2, 2, 8

ARGUMENTS = {
    "Delta": ("sign", "scale", "column", "shape"),
    "extract": ("base", "finetuned", "planes", "form", "sign", "scale", "column", "checksum"),
    "expand": ("out", "base", "delta", "row_begin", "row_end"),
    "linear": ("out", "x", "weight", "product", "bias", "deltas", "tenant_ids", "precision"),
    "linear_add": ("y", "x", "deltas", "tenant_ids"),
    "linear_transposed": ("out", "dy", "deltas", "tenant_ids"),
    "to_float32": ("out", "matrix"),
    "crc32c": ("buffer", "value"),
    "crc32c_combine": ("a", "b", "n_bytes_b"),
    "read": ("buffer",),
    "set_num_threads": ("n",),
    "set_isa": ("name",),
}


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def make_delta(n=N, k=K, planes=P, column=True):
    return _C.Delta(
        aligned((planes, -(-n // 16), 8 * -(-k // 256), 16), np.uint32),
        ones(planes, n),
        ones(planes, k) if column else None,
        (n, k),
    )


def right(function):
    """Fresh right arguments, by name."""
    sign = aligned((P, S, L, 16), np.uint32)
    deltas = [make_delta(), make_delta()]
    return {
        "Delta": {"sign": sign, "scale": ones(P, N), "column": ones(P, K), "shape": (N, K)},
        "extract": {
            "base": ones(N, K),
            "finetuned": ones(N, K, dtype=np.float16),
            "planes": P,
            "form": "rank1",
            "sign": sign,
            "scale": ones(P, N),
            "column": ones(P, K),
            "checksum": True,
        },
        "expand": {
            "out": ones(N, K),
            "base": ones(N, K, dtype=np.float16),
            "delta": deltas[0],
            "row_begin": 0,
            "row_end": N,
        },
        "linear": {
            "out": ones(M, N),
            "x": ones(M, K),
            "weight": ones(N, K),
            "product": None,
            "bias": ones(N),
            "deltas": deltas,
            "tenant_ids": np.array([0, 1, -1]),
            "precision": "fixed16",
        },
        "linear_add": {"y": ones(M, N), "x": ones(M, K), "deltas": deltas, "tenant_ids": [0, 1, -1]},
        "linear_transposed": {
            "out": ones(M, K),
            "dy": ones(M, N),
            "deltas": tuple(deltas),
            "tenant_ids": np.array([0, 1, -1], np.int32),
        },
        "to_float32": {"out": ones(M, K), "matrix": ones(M, K, dtype=np.float16)},
        "crc32c": {"buffer": b"123456789", "value": 0},
        "crc32c_combine": {"a": 1, "b": 2, "n_bytes_b": 3},
        "read": {"buffer": ones(100)},
        "set_num_threads": {"n": 2},
        "set_isa": {"name": "generic"},
    }[function]


def call(function, **changes):
    arguments = right(function) | changes
    return getattr(_C, function)(*(arguments[name] for name in ARGUMENTS[function]))


def read_only(array):
    array.flags.writeable = False
    return array


def _wrong():
    """function, argument, value, exception, words that its text must have."""
    x = ones(M, K)
    wide = ones(M, 2 * K)
    yield "linear", "x", 3, TypeError, ["x: expected a NumPy array or another tensor", "got int"]
    yield "linear", "x", "text", TypeError, ["x: ", "got str"]
    yield "linear", "x", np.ndarray, TypeError, ["x: ", "got type"]
    yield "linear", "x", [[1.0] * K] * M, TypeError, ["x: ", "got list"]
    yield (
        "linear",
        "x",
        x.astype(np.float64),
        TypeError,
        ["x: expected float32, float16 or bfloat16, got float64"],
    )
    yield "linear", "x", x.astype(np.int16), TypeError, ["x: ", "got int16"]
    yield "linear", "x", x.astype(np.complex64), TypeError, ["x: ", "got complex64"]
    yield "linear", "x", x > 0, TypeError, ["x: ", "got bool"]
    yield "linear", "x", x.astype(np.uint16), TypeError, ["got uint16", "bitdelta.as_bfloat16"]
    yield "linear", "x", x.astype(">f4"), TypeError, ["x: expected this machine's byte order", ">f4"]
    yield "linear", "x", x.astype(object), TypeError, ["x: expected a tensor of plain numbers", "'O'"]
    yield "linear", "x", x[0], ValueError, ["x: expected [M, K] = [?, ?], got [40]"]
    yield "linear", "x", x[None], ValueError, ["x: expected [M, K] = [?, ?], got [1, 3, 40]"]
    yield (
        "linear",
        "x",
        np.ones((1,) * 20, np.float32),
        ValueError,
        ["x: expected at most 8 dimensions, got 20"],
    )
    yield "linear", "x", np.float32(1), ValueError, ["x: expected [M, K] = [?, ?], got []"]
    yield "linear", "x", ones(M, 0), ValueError, ["x: expected N and K of at least 1, got 20 and 0"]
    yield "linear", "x", ones(M + 1, K), ValueError, ["out: expected [M, N] = [4, ?], got [3, 20]"]
    yield "linear", "x", wide[:, ::2], BufferError, ["x: expected rows of contiguous columns", "got [80, 2]"]
    yield "linear", "x", x[:, ::-1], BufferError, ["x: expected rows of contiguous columns", "got [40, -1]"]
    yield "linear", "x", x[::-1], BufferError, ["x: expected rows", "got [-40, 1]"]
    yield "linear", "x", np.broadcast_to(x[:1], (M, K)), BufferError, ["x: expected rows", "got [0, 1]"]
    yield "linear", "x", np.ones((K, M), np.float32).T, BufferError, ["x: expected rows", "got [1, 3]"]
    odd = np.zeros(M * K * 4 + 1, np.uint8)[1:].view(np.float32).reshape(M, K)
    yield "linear", "x", odd, BufferError, ["x: expected memory aligned to 4 bytes", "1 beyond"]
    packed = np.zeros((M, K), np.dtype([("a", "f4"), ("b", "u1")]))["a"]
    yield "linear", "x", packed, BufferError, ["x: expected strides that are multiples of 4 bytes, got 5"]
    yield "linear", "x", b"bytes", TypeError, ["x: expected float32, float16 or bfloat16, got uint8"]
    yield "linear", "x", Producer(x, device=CUDA), DeviceError, ["x: expected CPU memory, got CUDA memory"]
    yield "linear", "x", Producer(x, lanes=4), TypeError, ["x: expected one number an element, got 4 lanes"]
    yield "linear", "x", Producer(x, version=(2, 0)), BufferError, ["x: expected DLPack version 1, got 2.0"]
    yield "linear", "x", Producer(x, dtype=(14, 8, 1)), TypeError, ["x: ", "got DLPack dtype 14 of 8 bits"]
    yield (
        "linear",
        "x",
        Producer(x, data=None),
        BufferError,
        ["x: expected memory, got a tensor without data"],
    )
    yield (
        "linear",
        "x",
        Producer(x, ndim=9),
        ValueError,
        ["x: expected a shape of at most 8 dimensions, got 9"],
    )
    yield "linear", "x", Producer(x, ndim=-1), ValueError, ["x: expected a shape of at most 8 dimensions"]
    yield (
        "linear",
        "x",
        Producer(x, shape=(M, -K)),
        ValueError,
        ["x: a size of -40 in dimension 1 is out of range"],
    )
    yield (
        "linear",
        "x",
        Producer(x, shape=(2**40, 2**40)),
        ValueError,
        ["x: a size of 1099511627776", "out of range"],
    )
    huge = Producer(x, shape=(2**31, 2**31), strides=(2**31, 1))
    yield "linear", "x", huge, ValueError, ["x: the size in bytes of [2147483648, 2147483648] overflows"]
    yield "linear", "weight", ones(N, K + 1), ValueError, ["weight: expected [N, K] = [20, 40], got [20, 41]"]
    yield "linear", "weight", x.T, ValueError, ["weight: expected [N, K] = [20, 40], got [40, 3]"]
    yield "linear", "product", ones(M, N), ValueError, ["product: expected None beside a weight"]
    yield "linear", "bias", ones(N, 1), ValueError, ["bias: expected [N] = [20], got [20, 1]"]
    yield "linear", "bias", ones(2 * N)[::2], BufferError, ["bias: expected rows of contiguous columns"]
    yield "linear", "bias", ones(N, dtype=np.int32), TypeError, ["bias: ", "got int32"]
    yield "linear", "out", read_only(ones(M, N)), BufferError, ["out: expected writable memory"]
    yield "linear", "out", bytes(M * N), BufferError, ["out: expected writable memory", "bytes"]
    yield (
        "linear",
        "out",
        Producer(ones(M, N), flags=READ_ONLY),
        BufferError,
        ["out: expected writable memory"],
    )
    yield "linear", "out", ones(M, 0), ValueError, ["out: expected N and K of at least 1"]
    yield (
        "linear",
        "out",
        ones(M, N + 1),
        ValueError,
        ["deltas: expected shape [N, K] = [21, 40], got [20, 40] at 0"],
    )
    yield (
        "linear",
        "deltas",
        make_delta(),
        TypeError,
        ["deltas: expected a sequence of bitdelta._C.Delta, got"],
    )
    yield "linear", "deltas", [1, 2], TypeError, ["deltas: expected bitdelta._C.Delta, got int"]
    yield "linear", "deltas", "ab", TypeError, ["deltas: expected a sequence", "got str"]
    yield (
        "linear",
        "deltas",
        [make_delta(), make_delta(k=41)],
        ValueError,
        ["deltas: expected shape [N, K] = [20, 40], got [20, 41] at 1"],
    )
    yield "linear", "tenant_ids", [0, 2, 0], ValueError, ["tenant_ids: expected -1 .. 1, got 2 at row 1"]
    yield (
        "linear",
        "tenant_ids",
        np.array([0, 0, -2]),
        ValueError,
        ["tenant_ids: expected -1 .. 1, got -2 at row 2"],
    )
    yield "linear", "tenant_ids", [0, 1], ValueError, ["tenant_ids: expected [M] = [3], got [2]"]
    yield "linear", "tenant_ids", np.zeros(4, int), ValueError, ["tenant_ids: expected [M] = [3], got [4]"]
    yield "linear", "tenant_ids", np.zeros(M), TypeError, ["tenant_ids: expected int64, got float64"]
    yield (
        "linear",
        "tenant_ids",
        np.zeros(M, np.uint64),
        TypeError,
        ["tenant_ids: expected int64, got uint64"],
    )
    yield "linear", "tenant_ids", [0, 1.0, 0], TypeError, ["tenant_ids: expected an int, got float"]
    yield "linear", "tenant_ids", [0, 2**70, 0], ValueError, ["tenant_ids: expected", str(2**70)]
    yield "linear", "tenant_ids", None, TypeError, ["tenant_ids: expected", "got NoneType"]
    yield (
        "linear",
        "precision",
        "float16",
        ValueError,
        ["precision: expected 'fixed16' or 'float32', got 'float16'"],
    )
    yield "linear", "precision", 16, TypeError, ["precision: expected str, got int"]
    yield "linear_add", "y", ones(M, N)[:, ::2], BufferError, ["y: expected rows of contiguous columns"]
    yield "linear_add", "y", read_only(ones(M, N)), BufferError, ["y: expected writable memory"]
    yield "linear_transposed", "dy", ones(M, N - 1), ValueError, ["deltas: expected shape [N, K] = [19, 40]"]
    yield "linear_transposed", "dy", ones(M, 0), ValueError, ["dy: expected N and K of at least 1"]
    yield (
        "linear_transposed",
        "out",
        ones(M + 1, K),
        ValueError,
        ["out: expected [M, K] = [3, ?], got [4, 40]"],
    )

    sign = aligned((P, S, L, 16), np.uint32)
    for function in ("Delta", "extract"):
        need = "?" if function == "Delta" else "2"
        text = f"sign: expected [P, S, L, 16] = [{need}, 2, 8, 16], got [2, 2, 8, 15]"
        yield function, "sign", aligned((P, S, L, 15), np.uint32), ValueError, [text]
        yield function, "sign", sign.view(np.int32), TypeError, ["sign: expected uint32, got int32"]
        yield (
            function,
            "sign",
            aligned((P, S, L, 16), np.uint32, 16),
            BufferError,
            ["sign: expected memory aligned to 64"],
        )
        apart = aligned((P, S, 2 * L, 16), np.uint32)[:, :, :L]
        yield (
            function,
            "sign",
            apart,
            BufferError,
            ["sign: expected contiguous memory, strides [256, 128, 16, 1]"],
        )
        yield function, "scale", ones(P, N + 1), ValueError, ["scale: expected [P, N] = [2, 20], got [2, 21]"]
        yield (
            function,
            "scale",
            ones(P, N, dtype=np.float16),
            TypeError,
            ["scale: expected float32, got float16"],
        )
        yield function, "scale", ones(P, 2 * N)[:, ::2], BufferError, ["scale: expected contiguous memory"]
        yield function, "column", ones(P, N), ValueError, ["column: expected [P, K] = [2, 40], got [2, 20]"]
    nine = aligned((9, S, L, 16), np.uint32)
    yield "Delta", "sign", nine, ValueError, ["sign: expected 1 .. 8 planes, got 9"]
    yield "Delta", "sign", nine[:0], ValueError, ["sign: expected 1 .. 8 planes, got 0"]
    yield "Delta", "shape", (0, K), ValueError, ["shape: expected 1 .. "]
    yield (
        "Delta",
        "shape",
        (N, 2**62),
        ValueError,
        ["shape: the size in bytes of (20, 4611686018427387904) overflows"],
    )
    yield "Delta", "shape", (2**63 - 1, K), ValueError, ["shape: the size in bytes of"]
    yield (
        "Delta",
        "shape",
        (N, 2**64),
        ValueError,
        ["shape: expected 1 .. 9223372036854775807, got 18446744073709551616"],
    )
    yield "Delta", "shape", (N, K, 1), TypeError, ["Delta"]
    yield "Delta", "shape", (N, 40.0), TypeError, ["shape: expected an int, got float"]
    yield "extract", "column", None, TypeError, ["column: expected a NumPy array", "got NoneType"]
    yield "extract", "form", "row", ValueError, ["column: expected None unless form is 'rank1'"]
    yield "extract", "form", "column", ValueError, ["form: expected 'tensor', 'row' or 'rank1', got 'column'"]
    yield "extract", "form", None, TypeError, ["form: expected str, got NoneType"]
    yield "extract", "checksum", np.ones(2), TypeError, ["checksum: expected a bool, got numpy.ndarray"]
    yield "extract", "checksum", 1, TypeError, ["checksum: expected a bool, got int"]
    yield "extract", "planes", 0, ValueError, ["planes: expected 1 .. 8, got 0"]
    yield "extract", "planes", 9, ValueError, ["planes: expected 1 .. 8, got 9"]
    yield "extract", "planes", 1.0, TypeError, ["planes: expected an int, got float"]
    yield "extract", "planes", True, TypeError, ["planes: expected an int, got bool"]
    yield "extract", "base", ones(0, K), ValueError, ["base: expected [N, K] of at least 1, got [0, 40]"]
    yield "extract", "base", ones(N, 0), ValueError, ["base: expected [N, K] of at least 1, got [20, 0]"]
    yield (
        "extract",
        "finetuned",
        ones(N, K + 1),
        ValueError,
        ["finetuned: expected [N, K] = [20, 40], got [20, 41]"],
    )
    yield (
        "extract",
        "sign",
        read_only(aligned((P, S, L, 16), np.uint32)),
        BufferError,
        ["sign: expected writable"],
    )
    bad = ones(N, K)
    bad[3, 17] = np.nan
    yield "extract", "base", bad, ValueError, ["base: expected finite weights, got NaN or Inf at [3, 17]"]
    yield (
        "extract",
        "finetuned",
        bad,
        ValueError,
        ["finetuned: expected finite weights, got NaN or Inf at [3, 17]"],
    )
    yield "expand", "delta", None, TypeError, ["delta: expected bitdelta._C.Delta, got NoneType"]
    yield "expand", "row_begin", -1, ValueError, ["row_begin: expected 0 .. 20, got -1"]
    yield "expand", "row_end", N + 1, ValueError, ["row_end: expected 0 .. 20, got 21"]
    yield "expand", "row_end", "1", TypeError, ["row_end: expected an int, got str"]
    yield (
        "expand",
        "row_begin",
        1,
        ValueError,
        ["out: expected [row_end - row_begin, K] = [19, 40], got [20, 40]"],
    )
    yield "expand", "base", ones(N - 1, K), ValueError, ["base: expected [N, K] = [20, 40], got [19, 40]"]
    yield "expand", "out", ones(N, K, dtype=np.float64), TypeError, ["out: ", "got float64"]
    yield "to_float32", "out", ones(M, K, dtype=np.float16), TypeError, ["out: expected float32, got float16"]
    yield (
        "to_float32",
        "out",
        ones(M, K + 1),
        ValueError,
        ["out: expected matrix.shape = [3, 40], got [3, 41]"],
    )
    yield "to_float32", "out", ones(M, 2 * K)[:, :K], BufferError, ["out: expected contiguous memory"]
    yield "to_float32", "matrix", ones(M, K, dtype=int), TypeError, ["matrix: ", "got int64"]
    yield "crc32c", "buffer", ones(4, 4)[:, ::2], BufferError, ["buffer: expected contiguous memory"]
    yield "crc32c", "buffer", 1, TypeError, ["buffer: expected a NumPy array"]
    yield "crc32c", "value", -1, ValueError, ["value: expected 0 .. 4294967295, got -1"]
    yield "crc32c", "value", 2**32, ValueError, ["value: expected 0 .. 4294967295, got 4294967296"]
    yield "crc32c", "value", "0", TypeError, ["value: expected an int, got str"]
    yield "crc32c_combine", "a", 2**32, ValueError, ["a: expected 0 .. 4294967295"]
    yield "crc32c_combine", "n_bytes_b", -1, ValueError, ["n_bytes_b: expected 0 .. "]
    yield "read", "buffer", None, TypeError, ["buffer: expected a NumPy array"]
    yield "set_num_threads", "n", 0, ValueError, ["n: expected 1 .. 1024, got 0"]
    yield "set_num_threads", "n", 2**80, ValueError, ["n: expected 1 .. 1024"]
    yield "set_num_threads", "n", 1.5, TypeError, ["n: expected an int, got float"]
    yield "set_isa", "name", "sse9", ValueError, ["isa: expected one of ", "generic", "got 'sse9'"]
    yield "set_isa", "name", 5, TypeError, ["name: expected str, got int"]
    yield "expand", "base", as_bfloat16(np.zeros((N, K, 1), np.uint16)), ValueError, ["base: expected [N, K]"]


WRONG = [
    (f"{function}-{argument}-{index}", function, argument, value, exception, words)
    for index, (function, argument, value, exception, words) in enumerate(_wrong())
]
