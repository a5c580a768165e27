"""Transposed products and the gradients of scales on the GPU, to the bit."""

import numpy as np
import pytest
from conftest import DTYPES, bits, tensor
from test_linear import QUIET_NAN, make_delta

from bitdelta import reference
from bitdelta.array import to_float32
from bitdelta.delta import Delta

F32 = np.float32


@pytest.fixture
def gpu(kernels):
    kernels.context.n_processors = 2
    return kernels


def fold_rows(products):
    """Exact products [rows, width] fp64 -> fp32 [width]: eights of rows folded 4, 2, 1, then added ascending."""
    total = np.zeros(products.shape[1])
    for first in range(0, len(products), 8):
        eight = np.zeros((8, products.shape[1]))
        part = products[first : first + 8]
        eight[: len(part)] = part
        for half in (4, 2, 1):
            eight = eight[:half] + eight[half : 2 * half]
        total = total + eight[0]
    return total.astype(F32)


def expected_gradient(dy, x, deltas, ids, of_rows):
    """drow or dcolumn [T, P, width] by the definition."""
    dy, x = to_float32(dy), to_float32(x)
    planes = max(delta.planes for delta in deltas)
    outer, width = (dy, dy.shape[1]) if of_rows else (x, x.shape[1])
    out = np.zeros((len(deltas), planes, width), F32)
    for t, delta in enumerate(deltas):
        rows = np.flatnonzero(ids == t)
        for p in range(delta.planes if of_rows or delta.column is not None else 0):
            ones = np.ones((1, delta.shape[0]), F32)
            column = None if delta.column is None else delta.column[p : p + 1]
            if of_rows:
                one = Delta(
                    delta.sign[p : p + 1], ones, column, delta.shape, "row" if column is None else "rank1"
                )
                z = reference.linear(x[rows], None, [one], np.zeros(len(rows), int))
            else:
                one = Delta(delta.sign[p : p + 1], delta.scale[p : p + 1], None, delta.shape, "row")
                z = reference.linear_transposed(dy[rows], [one], np.zeros(len(rows), int))
            out[t, p] = fold_rows(outer[rows].astype(np.float64) * z)
    return out


def case(rng, n, k, ids, planes, form, dtype):
    deltas = [make_delta(rng, n, k, planes if t else 1, form if t < 2 else "row") for t in range(3)]
    ids = np.asarray(ids)
    dy, x = (tensor(rng.normal(size=(len(ids), width)), dtype) for width in (n, k))
    return deltas, ids, dy, x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["row", "rank1"])
@pytest.mark.parametrize("planes", [1, 3])
def test_transposed_products_have_the_bits_of_the_reference(gpu, rng, dtype, form, planes):
    ids = [0, -1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, -1]
    deltas, ids, dy, x = case(rng, 75, 300, ids, planes, form, dtype)
    values = to_float32(dy)
    values[3, 74], values[4] = np.inf, 0
    dy = tensor(values, dtype)
    g = tensor(np.ones(x.shape), dtype)
    gpu.gradients("linear_transposed", dy, x, deltas, ids, g)
    assert np.array_equal(bits(g), bits(reference.linear_transposed(dy, deltas, ids)))


@pytest.mark.parametrize("n_processors", [1, 30])
def test_neither_grid_nor_split_changes_a_bit(gpu, rng, n_processors):
    gpu.context.n_processors = n_processors
    deltas, ids, dy, x = case(rng, 530, 40, [1, 0, 1], 2, "row", "float32")
    g = np.ones(x.shape, F32)
    gpu.gradients("linear_transposed", dy, x, deltas, ids, g)
    assert np.array_equal(bits(g), bits(reference.linear_transposed(dy, deltas, ids)))


def test_transposed_sums_beyond_32_bits(gpu, rng):
    n = 65800
    delta = make_delta(rng, n, 3)
    delta.sign[...] = reference.pack(np.zeros((n, 1)) < np.arange(3))
    delta.scale[...] = 1
    dy, g = (rng.normal(size=(1, n)) * 1e-3 - 1).astype(F32), np.zeros((1, 3), F32)
    gpu.gradients("linear_transposed", dy, g, [delta], [0], g)
    assert np.array_equal(bits(g), bits(reference.linear_transposed(dy, [delta], [0])))


def test_rows_of_unknown_tenants_and_empty_slots_are_nan(gpu, rng):
    deltas = [make_delta(rng, 20, 40), None, 0]
    ids = np.array([0, 5, 1, 2, -1, -7])
    dy = rng.normal(size=(6, 20)).astype(F32)
    g = np.ones((6, 40), F32)
    gpu.gradients("linear_transposed", dy, g.copy(), deltas, ids, g)
    assert (bits(g[[1, 2, 5]]) == QUIET_NAN["float32"]).all()
    assert not bits(g[[3, 4]]).any()
    assert np.array_equal(bits(g[:1]), bits(reference.linear_transposed(dy[:1], deltas[:1], [0])))


@pytest.mark.parametrize("form", ["row", "rank1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_scales_are_sums_in_fixed_order(gpu, rng, form, dtype):
    ids = rng.integers(-1, 2, 30)
    deltas, ids, dy, x = case(rng, 37, 290, ids, 2, form, dtype)
    drow, _ = gpu.gradients("row_gradient", dy, x, deltas, ids, drow=True)
    assert np.array_equal(bits(drow), bits(expected_gradient(dy, x, deltas, ids, of_rows=True)))
    g = tensor(np.ones(x.shape), dtype)
    _, dcolumn = gpu.gradients("linear_transposed", dy, x, deltas, ids, g, dcolumn=True)
    assert np.array_equal(bits(dcolumn), bits(expected_gradient(dy, x, deltas, ids, of_rows=False)))
    assert np.array_equal(bits(g), bits(reference.linear_transposed(dy, deltas, ids)))


def test_gradients_of_lost_rows_are_nan(gpu, rng):
    deltas, ids, dy, x = case(rng, 20, 50, [0, 1, 0], 1, "rank1", "float32")
    x[0, 3], dy[1, 4] = np.nan, np.inf
    drow, _ = gpu.gradients("row_gradient", dy, x, deltas, ids, drow=True)
    assert np.isnan(drow[0]).all()
    _, dcolumn = gpu.gradients("linear_transposed", dy, x, deltas, ids, dcolumn=True)
    assert np.isnan(dcolumn[1]).all()
    assert not drow[2].any()
