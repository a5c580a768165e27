"""Products against the reference: the same bits from every instruction set, thread count and batch."""

import ctypes
import dataclasses
import platform

import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE, bits, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import bitdelta
from bitdelta import _C, reference
from bitdelta.array import aligned_empty, to_float32
from bitdelta.delta import Delta

F32 = np.float32
QUIET_NAN = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}


def make_delta(rng, n, k, planes=1, form="row"):
    """Random signs and scales of both signs; the padding of the signs is zero."""
    packed = [reference.pack(rng.random((n, k)) < 0.5) for _ in range(planes)]
    sign = aligned_empty((planes, *packed[0].shape), np.uint32)
    sign[...] = packed
    scale = rng.normal(size=(planes, n)).astype(F32)
    if form == "tensor":
        scale[...] = scale[:, :1]
    column = rng.uniform(0.25, 4, (planes, k)).astype(F32) if form == "rank1" else None
    return Delta(sign, scale, column, (n, k), form)


def assert_same_bits(got, expected):
    """Bits, but for NaN that no definition fixes: a NaN is a NaN."""
    expected_values, got_values = to_float32(expected), to_float32(got)
    is_nan = np.isnan(expected_values)
    assert np.array_equal(np.isnan(got_values), is_nan)
    assert np.array_equal(bits(got)[~is_nan], bits(expected)[~is_nan])


def on_every_isa(function):
    """function() for every instruction set and for one and three threads."""
    before = _C.isa()
    try:
        for name in _C.isas():
            _C.set_isa(name)
            for n_threads in (1, 3):
                bitdelta.set_num_threads(n_threads)
                function()
    finally:
        _C.set_isa(before)
        bitdelta.set_num_threads(None)


@dataclasses.dataclass
class Case:
    """A batch of many tenants."""

    rng: np.random.Generator
    n: int
    k: int
    deltas: list[Delta]
    ids: np.ndarray
    x: np.ndarray  # fp32; rounded by `tensor`


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 600))
    deltas = [
        make_delta(rng, n, k, draw(st.integers(1, 3)), draw(st.sampled_from(("tensor", "row", "rank1"))))
        for _ in range(draw(st.integers(1, 3)))
    ]
    m = draw(st.integers(1, 20))
    ids = rng.integers(-1, len(deltas), m)
    x = rng.normal(size=(m, k)).astype(F32)
    row = rng.integers(m)
    match draw(st.sampled_from(("plain", "zeros", "outlier", "tiny", "huge", "even", "nan", "inf"))):
        case "zeros":
            x[row] = 0
        case "outlier":
            x[row, rng.integers(k)] = 1000
        case "tiny":
            x[row] = np.ldexp(x[row], -130)
        case "huge":
            x[row] = x[row] * (2.0**127 / np.abs(x[row]).max().astype(float))
        case "even":
            x[row] = np.sign(x[row]) * F32(0.99999)
        case "nan":
            x[row, rng.integers(k)] = np.nan
        case "inf":
            x[row, rng.integers(k)] = -np.inf
    return Case(rng, n, k, deltas, ids, x)


dtypes = st.sampled_from(DTYPES)

# the delta terms


@settings(max_examples=50, deadline=None)
@given(cases(), dtypes, dtypes, st.sampled_from((None, *DTYPES)))
def test_terms_product_and_bias_have_the_bits_of_the_reference(case, dtype, out_dtype, bias_dtype):
    x = tensor(case.x, dtype)
    product = case.rng.normal(size=(len(case.ids), case.n)).astype(F32)
    bias = None if bias_dtype is None else tensor(case.rng.normal(size=case.n), bias_dtype)
    in_fp32 = reference.linear(
        to_float32(x),
        None,
        case.deltas,
        case.ids,
        None if bias is None else to_float32(bias),
        product=product,
    )
    expected = tensor(in_fp32, out_dtype)

    def check():
        out = tensor(np.zeros((len(case.ids), case.n)), out_dtype)
        _C.linear(out, x, None, product, bias, [d.handle for d in case.deltas], case.ids, "fixed16")
        assert_same_bits(out, expected)

    on_every_isa(check)


@settings(max_examples=50, deadline=None)
@given(cases(), dtypes, dtypes)
def test_integer_weights_give_the_bits_of_the_reference(case, dtype, weight_dtype):
    # Sums of small integers are exact in fp32, whatever their order.
    x = tensor(case.rng.integers(-8, 9, case.x.shape), dtype)
    weight = tensor(case.rng.integers(-8, 9, (case.n, case.k)), weight_dtype)
    expected = reference.linear(x, weight, case.deltas, case.ids)
    on_every_isa(lambda: assert_same_bits(bitdelta.linear(x, weight, case.deltas, case.ids), expected))


@settings(max_examples=30, deadline=None)
@given(cases(), dtypes)
def test_without_a_base_the_terms_stand_alone(case, dtype):
    x = tensor(case.x, dtype)
    expected = reference.linear(x, None, case.deltas, case.ids)
    on_every_isa(lambda: assert_same_bits(bitdelta.linear(x, None, case.deltas, case.ids), expected))


@settings(max_examples=30, deadline=None)
@given(cases(), dtypes, dtypes)
def test_linear_add_sums_in_place_and_leaves_rows_without_a_tenant(case, dtype, x_dtype):
    x = tensor(case.x, x_dtype)
    before = tensor(case.rng.normal(size=(len(case.ids), case.n)), dtype)
    expected = reference.linear_add(before.copy(), x, case.deltas, case.ids)

    def check():
        y = before.copy()
        assert bitdelta.linear_add(y, x, case.deltas, case.ids) is y
        assert_same_bits(y, expected)
        base_only = case.ids < 0
        assert np.array_equal(bits(y)[base_only], bits(before)[base_only])

    on_every_isa(check)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_x_that_is_not_finite_gives_the_quiet_nan(isa, rng, dtype):
    d = make_delta(rng, 20, 40)
    for value in (np.nan, np.inf, -np.inf):
        x = rng.normal(size=(3, 40))
        x[1, 39] = value
        y = bitdelta.linear(tensor(x, dtype), None, [d], [0, 0, 0])
        assert (bits(y)[1] == QUIET_NAN[dtype]).all()
        assert np.isfinite(to_float32(y)[[0, 2]]).all()


def test_a_column_scale_that_overflows_gives_the_quiet_nan(isa, rng):
    d = make_delta(rng, 20, 40, 2, "rank1")
    d.column[1, 7] = 3e38
    x = rng.normal(size=(2, 40)).astype(F32)
    x[0, 7] = 100
    x[1, 7] = 0
    y = bitdelta.linear(x, None, [d], [0, 0])
    assert (bits(y)[0] == QUIET_NAN["float32"]).all() and np.isfinite(y[1]).all()


@pytest.mark.parametrize("value", (-1.0, 1.0, 0.9999999, -0.9999999), ids=str)
def test_the_largest_sums_are_exact(isa, value):
    # All |q| are the largest there are, and rows of signs agree with them everywhere or nowhere.
    k = 1100
    signs = np.zeros((3, k), bool)
    signs[0] = True
    signs[2, ::2] = True
    sign = aligned_empty((1, 1, 40, 16), np.uint32)
    sign[0] = reference.pack(signs)
    d = Delta(sign, np.ones((1, 3), F32), None, (3, k))
    x = np.full((5, k), value, F32)
    x[1:, ::3] *= -1
    assert_same_bits(bitdelta.linear(x, None, [d], [0] * 5), reference.linear(x, None, [d], [0] * 5))


@pytest.mark.parametrize("k", (65280, 65281, 65535, 70001))
def test_sums_over_more_columns_than_32_bits_hold_are_exact(rng, k):
    d = make_delta(rng, 17, k)
    d.sign[0, :, :, 0] = 0xFFFFFFFF  # row 0: all +
    d.sign[0, 0, :, 0] &= np.packbits(np.arange(d.sign.shape[2] * 32) < k, bitorder="little").view(np.uint32)
    d.sign[0, 1, :, 0] = d.sign[0, 0, :, 0]
    x = np.full((2, k), F32(-0.99999))
    x[1] = rng.normal(size=k)
    expected = reference.linear(x, None, [d], [0, 0])
    on_every_isa(lambda: assert_same_bits(bitdelta.linear(x, None, [d], [0, 0]), expected))


# what a row does not depend on


@pytest.mark.parametrize("n_rows", (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64, 65, 130, 300))
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa, rng, n_rows):
    if isa.endswith("emulated") and n_rows > 17:
        n_rows = 17 + n_rows % 4
    n, k = 37, 290
    deltas = [make_delta(rng, n, k, 1 + t % 2) for t in range(3)]
    weight, bias = tensor(rng.normal(size=(n, k)), "bfloat16"), rng.normal(size=n).astype(F32)
    x = tensor(rng.normal(size=(n_rows, k)), "bfloat16")
    ids = rng.integers(-1, 3, n_rows) if n_rows % 2 else np.zeros(n_rows, int)
    product = rng.normal(size=(n_rows, n)).astype(F32)
    handles = [d.handle for d in deltas]
    for base in ("weight", "product"):
        if base == "weight" and n_rows > bitdelta._C.STREAM_ROWS:
            continue

        def run(rows, base=base):
            out = np.zeros((len(rows), n), F32)
            w, p = (weight, None) if base == "weight" else (None, product[rows])
            _C.linear(out, x[rows], w, p, bias, handles, ids[rows], "fixed16")
            return out

        batch = run(np.arange(n_rows))
        for m in {0, n_rows // 2, n_rows - 1}:
            assert np.array_equal(bits(run(np.array([m])))[0], bits(batch)[m])


def test_a_row_without_a_tenant_has_the_bits_of_a_batch_without_tenants(isa, rng):
    n, k = 40, 300
    d = make_delta(rng, n, k, 2)
    x, weight = rng.normal(size=(8, k)).astype(F32), tensor(rng.normal(size=(n, k)), "float16")
    x[2, 3] = np.inf  # base product: inf
    mixed = bitdelta.linear(x, weight, [d], [0, -1, -1, 0, -1, 0, 0, -1])
    alone = bitdelta.linear(x, weight, [d], [-1] * 8)
    rows = [1, 2, 4, 7]
    assert np.array_equal(bits(mixed)[rows], bits(alone)[rows])
    assert not np.isfinite(alone[2]).any()


@pytest.mark.parametrize("n_threads", (1, 2, 3, 8))
def test_any_number_of_threads_gives_the_same_bits(rng, n_threads):
    n, k, m = 1100, 520, 12
    deltas = [make_delta(rng, n, k, 2) for _ in range(3)]
    x, weight = tensor(rng.normal(size=(m, k)), "bfloat16"), tensor(rng.normal(size=(n, k)), "bfloat16")
    ids = rng.integers(-1, 3, m)
    bitdelta.set_num_threads(1)
    one = bitdelta.linear(x, weight, deltas, ids)
    bitdelta.set_num_threads(n_threads)
    for _ in range(5):
        assert np.array_equal(bits(bitdelta.linear(x, weight, deltas, ids)), bits(one))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="sets MXCSR of x86")
def test_the_callers_floating_point_state_changes_nothing_and_is_kept(isa, rng):
    """FTZ, DAZ and rounding upwards, by libm's fesetenv on a state with another MXCSR."""
    libm = ctypes.CDLL("libm.so.6")
    state = (ctypes.c_uint32 * 8)()  # fenv_t: 28 bytes of x87 state, then MXCSR
    assert libm.fegetenv(state) == 0
    d = make_delta(rng, 33, 280, 2, "rank1")
    x = np.ldexp(rng.normal(size=(3, 280)), -128).astype(F32)  # denormals among them
    weight = tensor(rng.normal(size=(33, 280)), "bfloat16")
    dy = np.ldexp(rng.normal(size=(3, 33)), -128).astype(F32)

    def run():
        return (
            bitdelta.linear(x, weight, [d], [0, -1, 0]),
            bitdelta.linear_transposed(dy, [d], [0, -1, 0]),
        )

    expected = run()
    hostile = (ctypes.c_uint32 * 8)(*state)
    hostile[7] = 0x1F80 | 0x8000 | 0x0040 | 0x4000
    try:
        libm.fesetenv(hostile)
        got = run()
        libm.fegetenv(hostile)
    finally:
        libm.fesetenv(state)
    assert hostile[7] & 0xFFC0 == 0x1F80 | 0x8000 | 0x0040 | 0x4000
    for a, b in zip(got, expected, strict=True):
        assert np.array_equal(bits(a), bits(b))


# base products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_base_products_are_near_fp64(isa, rng, dtype, weight_dtype):
    n, k, m = 50, 333, 5
    d = make_delta(rng, n, k)
    x, weight = tensor(rng.normal(size=(m, k)), dtype), tensor(rng.normal(size=(n, k)), weight_dtype)
    bias = tensor(rng.normal(size=n), weight_dtype)
    got = to_float32(bitdelta.linear(x, weight, [d], [0, -1, 0, 0, -1], bias=bias))
    expected = to_float32(reference.linear(x, weight, [d], [0, -1, 0, 0, -1], bias))
    largest = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(got - expected) <= TOLERANCE[dtype] * largest).all()


@pytest.mark.parametrize("n_rows", range(1, 17))
def test_every_number_of_streamed_rows_is_exact_on_integers(isa, rng, n_rows):
    n, k = 27, 107
    x, weight = rng.integers(-8, 9, (n_rows, k)), rng.integers(-8, 9, (n, k))
    for dtype in DTYPES:
        y = bitdelta.linear(x.astype(F32), tensor(weight, dtype), [], [-1] * n_rows)
        assert np.array_equal(y, x @ weight.T)


def test_rows_with_gaps_between_them_are_read_and_written_in_place(isa, rng):
    n, k, m = 33, 70, 4
    d = make_delta(rng, n, k)
    x = rng.integers(-4, 5, (m, k + 9)).astype(F32)[:, :k]
    weight = tensor(rng.integers(-4, 5, (n, k + 3)), "bfloat16")[:, :k]
    out = np.full((m, n + 5), 7, F32)
    bitdelta.linear(x, weight, [d], [0, -1, 0, 0], out=out[:, :n])
    assert np.array_equal(out[:, :n], reference.linear(x, weight, [d], [0, -1, 0, 0]))
    assert (out[:, n:] == 7).all()


def test_an_empty_batch_gives_an_empty_product(isa, rng):
    d = make_delta(rng, 5, 7)
    x, weight = np.ones((0, 7), F32), np.ones((5, 7), F32)
    assert bitdelta.linear(x, weight, [d], []).shape == (0, 5)
    assert bitdelta.linear_transposed(np.ones((0, 5), F32), [d], []).shape == (0, 7)


# precision="float32"


@settings(max_examples=30, deadline=None)
@given(cases(), dtypes)
def test_float32_is_near_fp64(case, dtype):
    x = tensor(np.nan_to_num(case.x, nan=1, posinf=1, neginf=1), "float32")
    x = np.clip(x, -1e30, 1e30)
    got = bitdelta.linear(x, None, case.deltas, case.ids, precision="float32")
    for m, t in enumerate(case.ids):
        total, size = np.zeros(case.n), np.zeros(case.n)
        for p in range(case.deltas[t].planes if t >= 0 else 0):
            d = case.deltas[t]
            u = x[m].astype(np.float64) * (1 if d.column is None else d.column[p].astype(np.float64))
            s = np.where(reference.unpack(d.sign[p], case.n, case.k), 1.0, -1.0)
            total += (s @ u) * d.scale[p]
            size += np.abs(u).sum() * np.abs(d.scale[p])
        assert (np.abs(got[m] - total) <= 1e-5 * size + 1e-44).all()


def test_float32_keeps_what_fixed16_rounds_away(rng):
    d = make_delta(rng, 16, 64)
    x = np.full((1, 64), F32(1e-6))
    x[0, 0] = 1
    exact = np.where(reference.unpack(d.sign[0], 16, 64), 1.0, -1.0) @ x[0].astype(float) * d.scale[0]
    near = bitdelta.linear(x, None, [d], [0], precision="float32")
    coarse = bitdelta.linear(x, None, [d], [0])
    assert np.abs(near - exact).max() < np.abs(coarse - exact).max() / 10


# transposed


@settings(max_examples=50, deadline=None)
@given(cases(), dtypes)
def test_transposed_products_have_the_bits_of_the_reference(case, dtype):
    dy = np.resize(case.x, (len(case.ids), case.n))
    dy = tensor(dy, dtype)
    expected = reference.linear_transposed(dy, case.deltas, case.ids)
    on_every_isa(lambda: assert_same_bits(bitdelta.linear_transposed(dy, case.deltas, case.ids), expected))


@pytest.mark.parametrize("shape", ((37, 290), (290, 37), (16, 256), (513, 31)), ids=str)
def test_a_transposed_row_has_the_same_bits_alone_and_in_any_batch(isa, rng, shape):
    n, k = shape
    deltas = [make_delta(rng, n, k, 2, "rank1"), make_delta(rng, n, k)]
    dy = tensor(rng.normal(size=(24, n)), "bfloat16")
    ids = np.array([-1, 0, 1, 1, 0, 0, 1, 0] * 3)
    batch = bitdelta.linear_transposed(dy, deltas, ids)  # signs transposed: many rows share them
    for m in (0, 1, 2, 23):
        alone = bitdelta.linear_transposed(dy[m : m + 1], deltas, ids[m : m + 1])
        assert np.array_equal(bits(alone)[0], bits(batch)[m])


def test_transposed_products_are_the_gradient(isa, rng):
    n, k, m = 90, 700, 6
    deltas = [make_delta(rng, n, k, 2, "rank1"), make_delta(rng, n, k)]
    ids = np.array([0, 1, -1, 1, 0, 0])
    dy = rng.normal(size=(m, n)).astype(F32)
    got = bitdelta.linear_transposed(dy, deltas, ids)
    for i, t in enumerate(ids):
        expected = np.zeros(k)
        for p in range(deltas[t].planes if t >= 0 else 0):
            s = np.where(reference.unpack(deltas[t].sign[p], n, k), 1.0, -1.0)
            column = 1 if deltas[t].column is None else deltas[t].column[p]
            expected += (dy[i] * deltas[t].scale[p].astype(float)) @ s * column
        assert np.abs(got[i] - expected).max() <= 2e-4 * max(1, np.abs(expected).max())


def test_transposed_sums_over_more_rows_than_32_bits_hold_are_exact(rng):
    n, k = 65600, 40
    d = make_delta(rng, n, k)
    d.scale[...] = 1
    d.sign[0, : n // 16, :, :] |= 1  # column 0: all +
    dy = np.full((1, n), F32(-0.99999))
    expected = reference.linear_transposed(dy, [d], [0])
    on_every_isa(lambda: assert_same_bits(bitdelta.linear_transposed(dy, [d], [0]), expected))
