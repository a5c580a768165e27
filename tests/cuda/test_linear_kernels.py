"""Products on the GPU: the bits of the reference, for every mix of tenants, planes, scales and parts."""

import numpy as np
import pytest
from conftest import DTYPES, bits, tensor
from kernel_calls import PartOfCall
from test_linear import QUIET_NAN, make_delta

from bitdelta import reference
from bitdelta.array import to_float32

F32 = np.float32
B1, INT8 = 80, 100  # compute capabilities with one-bit products, and without


@pytest.fixture(params=[B1, INT8], ids=["b1", "int8"])
def gpu(kernels, request):
    if not kernels.has(request.param):
        pytest.skip("this GPU has no one-bit products")
    kernels.context.capability, kernels.context.n_processors = request.param, 2
    return kernels


@pytest.fixture(params=["ascending", "descending"])
def order(request, monkeypatch):
    monkeypatch.setenv("BITDELTA_EMULATION_ORDER", request.param)


def check(gpu, rng, x, parts, ids, known=None):
    """Every part's y has the reference's bits; rows whose tenants are not `known` are NaN."""
    ids = np.asarray(ids)
    known = (ids >= -1) & (ids < len(parts[0].deltas)) if known is None else known
    gpu.linear(x, parts, ids)
    for part in parts:
        n = part.y.shape[1]
        deltas = [delta if delta else make_delta(rng, n, x.shape[1]) for delta in part.deltas]
        has_delta = [t >= 0 and bool(part.deltas[t]) for t in np.where(known, ids, -1)]
        product = part.before if part.add else part.product
        in_fp32 = reference.linear(
            to_float32(x),
            None,
            deltas,
            np.where(has_delta, ids, -1),
            None if part.bias is None else to_float32(part.bias),
            product=np.zeros((len(ids), n), F32) if product is None else to_float32(product),
        )
        name = str(part.y.dtype) if type(part.y) is np.ndarray else "bfloat16"
        expected = bits(tensor(in_fp32, name))
        expected[~known] = QUIET_NAN[name]
        if part.add:
            rest = known & ~np.array(has_delta)
            expected[rest] = bits(part.before)[rest]
        assert np.array_equal(bits(part.y), expected)


def new_part(rng, m, n, deltas, dtype="bfloat16", has_product=True, bias_dtype="float32", add=False):
    before = tensor(rng.normal(size=(m, n)), dtype)
    part = PartOfCall(
        deltas,
        before.copy(),
        None if add or not has_product else rng.normal(size=(m, n)).astype(F32),
        None if add or bias_dtype is None else tensor(rng.normal(size=n), bias_dtype),
        add,
    )
    part.before = before
    return part


def inputs(rng, m, k, dtype="bfloat16"):
    return tensor(rng.normal(size=(m, k)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["row", "rank1"])
@pytest.mark.parametrize("planes", [1, 3])
def test_mixed_tenants_have_the_bits_of_the_reference(gpu, rng, dtype, form, planes):
    n, k, ids = 45, 275, [0, -1, 2, 2, 1, 1, 2, 1, -1, 1, 1, 2, 1]
    deltas = [make_delta(rng, n, k, planes if t else 1, form if t < 2 else "row") for t in range(3)]
    x = to_float32(inputs(rng, len(ids), k))
    x[3, 7], x[4, 274], x[6] = np.nan, -np.inf, 0
    x[9, 0], x[11] = 1e4, np.ldexp(x[11], -130)
    check(gpu, rng, tensor(x, dtype), [new_part(rng, len(ids), n, deltas, dtype)], ids)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33])
def test_one_tenant_with_many_or_few_rows(gpu, rng, n_rows):
    deltas = [make_delta(rng, 70, 520)]
    check(gpu, rng, inputs(rng, n_rows, 520), [new_part(rng, n_rows, 70, deltas)], [0] * n_rows)


@pytest.mark.parametrize("n_processors", [1, 2, 40])
def test_neither_grid_nor_order_of_threads_changes_a_bit(gpu, rng, n_processors, order):
    gpu.context.n_processors = n_processors
    ids = [1, 0, 1, 1, -1, 1, 1, 0]
    deltas = [make_delta(rng, 130, 2100), make_delta(rng, 130, 2100, 2)]
    check(gpu, rng, inputs(rng, 8, 2100), [new_part(rng, 8, 130, deltas)], ids)


@pytest.mark.parametrize("has_columns", [False, True])
def test_parts_share_x_in_one_call(gpu, rng, has_columns):
    k, ids = 300, [0, 1, -1, 1, 0, 1, 1, 1]
    form = "rank1" if has_columns else "row"
    parts = []
    for n, add in ((33, False), (16, True), (5, False)):
        deltas = [make_delta(rng, n, k, 2, form), make_delta(rng, n, k, 1, "row")]
        parts.append(new_part(rng, len(ids), n, deltas, add=add))
    check(gpu, rng, inputs(rng, len(ids), k), parts, ids)


@pytest.mark.parametrize("has_product, bias_dtype", [(False, None), (False, "float16"), (True, None)])
def test_what_is_left_out_is_zero(gpu, rng, has_product, bias_dtype):
    ids = [-1, 0, -1]
    part = new_part(rng, 3, 20, [make_delta(rng, 20, 64)], "float32", has_product, bias_dtype)
    check(gpu, rng, inputs(rng, 3, 64, "float32"), [part], ids)


def test_rows_of_unknown_tenants_and_empty_slots_are_nan(gpu, rng):
    ids = [3, 0, -2, 1, 2, -1, 2**40, -(2**40)]
    deltas = [make_delta(rng, 20, 64), None, 0]
    known = np.array([False, True, False, False, True, True, False, False])
    for add in (False, True):
        part = new_part(rng, len(ids), 20, deltas, add=add)
        check(gpu, rng, inputs(rng, len(ids), 64), [part], ids, known)


def test_slots_beyond_what_the_call_expects_are_nan(gpu, rng):
    deltas = [make_delta(rng, 20, 64), make_delta(rng, 20, 64, 2)]
    part = new_part(rng, 2, 20, deltas, "float32")
    gpu.linear(inputs(rng, 2, 64), [part], [0, 1], max_planes=1)
    assert np.isfinite(part.y[0]).all()
    assert np.isnan(part.y[1]).all()


@pytest.mark.parametrize("n_rows", [1, 5])
def test_sums_beyond_32_bits(gpu, rng, n_rows):
    k = 65800
    x = tensor(np.full((n_rows, k), -1.0) + rng.normal(size=(n_rows, k)) * 1e-3, "float32")
    deltas = [make_delta(rng, 3, k)]
    deltas[0].sign[...] = reference.pack(np.arange(3)[:, None] > np.zeros((1, k)))  # all -, then all +
    check(gpu, rng, x, [new_part(rng, n_rows, 3, deltas, "float32")], [0] * n_rows)


def test_rows_may_be_parts_of_longer_ones(gpu, rng):
    ids, wide = [0, -1, 0], rng.normal(size=(3, 90)).astype(F32)
    part = new_part(rng, 3, 21, [make_delta(rng, 21, 50)], "float32")
    part.y = np.zeros((3, 40), F32)[:, 1:22]
    part.product = wide[:, 60:81]
    check(gpu, rng, wide[:, 3:53], [part], ids)


def test_an_empty_batch(gpu, rng):
    part = new_part(rng, 0, 20, [make_delta(rng, 20, 64)])
    gpu.linear(inputs(rng, 0, 64), [part], [])


@pytest.mark.parametrize("n, k", [(0, 64), (20, 0)])
def test_weights_without_rows_or_columns(gpu, rng, n, k):
    part = new_part(rng, 6, n, [0], "float32", bias_dtype=None)
    gpu.linear(inputs(rng, 6, k, "float32"), [part], [0, -1, 0, 0, 0, 0])
    assert np.array_equal(bits(part.y), bits(part.product))


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_the_reference(kernels, rng, dtype, column):
    x = to_float32(inputs(rng, 6, 300))
    x[1, 5], x[2, 0], x[3], x[4] = np.nan, np.inf, 0, np.sign(x[4]) * F32(0.99999)
    x, c = tensor(x, dtype), rng.uniform(0.25, 4, 300).astype(F32) if column else None
    q, exponents = kernels.quantize(x, c)
    expected, e, is_finite = reference.quantize(to_float32(x) * (1 if c is None else c))
    assert np.array_equal(exponents, np.where(is_finite, e, 2**31 - 1))
    assert np.array_equal(q[:, :300], np.where(is_finite[:, None], expected, 0))
    assert not q[:, 300:].any()


@pytest.mark.parametrize("n_rows, n_tenants", [(1, 1), (700, 5), (300, 600)])
def test_a_plan_names_every_row_once_in_order(kernels, rng, n_rows, n_tenants, order):
    ids = rng.integers(-2, n_tenants + 1, n_rows)
    plan = kernels.plan(ids, n_tenants)
    n_starts = (n_tenants + 6) // 4 * 4
    starts = plan[4 : 4 + n_tenants + 3].astype(np.int64)
    rows = plan[4 + n_starts :][: 4 * n_rows].view(np.int32).reshape(n_rows, 4)
    slots = np.where((ids < -1) | (ids >= n_tenants), -2, ids)
    expected = np.argsort(slots, kind="stable")
    assert np.array_equal(rows[:, 0], expected)
    assert np.array_equal(rows[:, 1], slots[expected])
    assert np.array_equal(np.diff(starts), np.bincount(slots + 2, minlength=n_tenants + 2))
    assert len(np.unique(rows[:, 2])) == n_rows
    first = np.flatnonzero(np.diff(slots[expected], prepend=-3))
    assert not (rows[first, 2] % 8).any()
