"""Calls on a GPU through bitdelta._C: what they give, and what they refuse."""

import sys
from pathlib import Path

import numpy as np
import pytest

import bitdelta
from bitdelta import _C, reference

sys.path.insert(0, str(Path(__file__).parent.parent))
from dlpack_producer import CUDA, Producer

M, K = 3, 300
NOT_FINITE = 2**31 - 1


def arguments(**changes):
    given = {
        "q": np.zeros((M, 512), np.int16),
        "exponents": np.zeros(M, np.int32),
        "x": np.random.default_rng(0).standard_normal((M, K), dtype=np.float32),
        "column": None,
    }
    return {**given, **changes}


def test_without_a_gpu_every_call_says_what_is_missing():
    missing = _C.cuda_missing()
    if missing is None:
        pytest.skip("a GPU can be used here")
    with pytest.raises(bitdelta.DeviceError) as caught:
        _C.cuda_quantize(*arguments().values())
    assert str(caught.value) == missing
    build = _C.build_info()["cuda"]
    assert build in missing or "driver" in missing


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("with_column", [False, True])
def test_quantize_gives_the_integers_of_the_definition(device, dtype, with_column):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((M, K)).astype(dtype)
    column = rng.random(K, np.float32) if with_column else None
    u = x.astype(np.float32) if column is None else x.astype(np.float32) * column
    q, exponents = device.put(np.full((M, 512), 9, np.int16)), device.put(np.zeros(M, np.int32))
    _C.cuda_quantize(q, exponents, device.put(x), None if column is None else device.put(column))
    expected, e, _ = reference.quantize(u)
    assert np.array_equal(device.get(q)[:, :K], expected)
    assert np.all(device.get(q)[:, K:] == 0)
    assert np.array_equal(device.get(exponents), e.ravel())


def test_a_row_that_is_not_finite_is_marked(device):
    x = np.ones((M, K), np.float32)
    x[1, 7] = np.inf
    q, exponents = device.put(np.full((M, 512), 9, np.int16)), device.put(np.zeros(M, np.int32))
    _C.cuda_quantize(q, exponents, device.put(x), None)
    assert device.get(exponents).tolist() == [1, NOT_FINITE, 1]
    assert np.all(device.get(q)[1] == 0)


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"x": np.ones((M, K))}, TypeError, "x: expected float32, float16 or bfloat16, got float64"),
        ({"x": np.ones(K, np.float32)}, ValueError, "x: "),
        ({"x": np.ones((0, K), np.float32)}, ValueError, "x: "),
        ({"x": np.ones((M, 2 * K), np.float32)[:, ::2]}, BufferError, "x: expected rows of contiguous"),
        ({"q": np.zeros((M, 300), np.int16)}, ValueError, "q: "),
        ({"q": np.zeros((M, 512), np.uint16)}, TypeError, "q: "),
        ({"q": np.zeros((M, 513), np.int16)[:, 1:]}, BufferError, "q: "),
        ({"exponents": np.zeros(M + 1, np.int32)}, ValueError, "exponents: "),
        ({"column": np.ones(K - 1, np.float32)}, ValueError, "column: "),
        ({"column": np.ones(K, np.float64)}, TypeError, "column: "),
        ({"x": "rows"}, TypeError, "x: expected"),
    ],
)
def test_bad_arguments_are_named(device, changes, error, said):
    given = arguments(**changes)
    if not _C.cuda_is_emulated():
        given = {
            name: device.put(value) if isinstance(value, np.ndarray) and name not in changes else value
            for name, value in given.items()
        }
        if isinstance(changes.get("x"), np.ndarray):
            error, said = bitdelta.DeviceError, "expected memory of a GPU, got a numpy.ndarray"
    with pytest.raises(error) as caught:
        _C.cuda_quantize(*given.values())
    assert said in str(caught.value)


def test_memory_of_another_kind_is_refused(device):
    if not _C.cuda_is_emulated():
        pytest.skip("a CUDA producer that is not torch is another test's")
    with pytest.raises(bitdelta.DeviceError, match="x: expected CPU memory, got CUDA memory"):
        _C.cuda_quantize(*arguments(x=Producer(np.ones((M, K), np.float32), device=CUDA)).values())


# ---- expand ----


@pytest.fixture(scope="module")
def delta():
    rng = np.random.default_rng(3)
    base = rng.standard_normal((37, K), dtype=np.float32)
    tuned = base + rng.normal(scale=0.1, size=base.shape).astype(np.float32)
    return base, bitdelta.extract(base, tuned, planes=2, scale="rank1")


@pytest.mark.parametrize("begin, end", [(0, 37), (16, 18), (36, 37)])
@pytest.mark.parametrize("has_base", [True, False])
def test_expand_gives_rows_of_the_reference(device, delta, begin, end, has_base):
    base, delta = delta
    out = device.put(np.zeros((end - begin, K), np.float32))
    parts = [device.put(part) for part in (delta.sign, delta.scale, delta.column)]
    _C.cuda_expand(out, device.put(base) if has_base else None, *parts, 37, begin)
    expected = reference.expand(base if has_base else None, delta)[begin:end]
    assert np.array_equal(device.get(out), expected)


def test_expand_works_in_place(device, delta):
    base, delta = delta
    weight = device.put(base.copy())
    parts = [device.put(part) for part in (delta.sign, delta.scale, delta.column)]
    _C.cuda_expand(weight, weight, *parts, 37, 0)
    assert np.array_equal(device.get(weight), reference.expand(base, delta))


def test_an_output_that_overlaps_an_input_is_refused(device, delta):
    base, delta = delta
    weight = device.put(base.copy())
    parts = [device.put(part) for part in (delta.sign, delta.scale, delta.column)]
    with pytest.raises(BufferError, match="out"):
        _C.cuda_expand(weight[1:], weight, *parts, 37, 0)
    with pytest.raises(BufferError, match="q"):
        q = device.put(np.zeros((M, 256), np.int16))
        _C.cuda_quantize(q, device.put(np.zeros(M, np.int32)), q.view(device.float32)[:, :100], None)


@pytest.mark.parametrize(
    "place, value, error, said",
    [
        (5, 38, ValueError, "scale: expected [P, N] = [2, 38]"),
        (5, 0, ValueError, "N: expected 1"),
        (6, 37, ValueError, "row_begin: expected 0 .. 36, got 37"),
        (6, 1, ValueError, "out: expected at most N - row_begin = 36 rows, got 37"),
        (2, None, TypeError, "sign: expected"),
    ],
)
def test_bad_arguments_of_expand_are_named(device, delta, place, value, error, said):
    base, delta = delta
    parts = [device.put(part) for part in (delta.sign, delta.scale, delta.column)]
    given = [device.put(np.zeros((37, K), np.float32)), None, *parts, 37, 0]
    given[place] = value
    with pytest.raises(
        error if value is not None or _C.cuda_is_emulated() else bitdelta.DeviceError
    ) as caught:
        _C.cuda_expand(*given)
    assert said in str(caught.value)
