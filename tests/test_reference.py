"""The definition itself: against values worked out by hand, and against mathematics in fp64."""

import numpy as np
import pytest
from conftest import DTYPES, KINDS, TOLERANCE, bits, pair, tensor
from hypothesis import given
from hypothesis import strategies as st

import bitdelta
from bitdelta import reference
from bitdelta.array import aligned_empty, as_bfloat16, from_float32, to_float32
from bitdelta.delta import Delta

F32 = np.float32


def delta(signs, scale, column=None):
    """A Delta from signs +-1 [P, N, K], scales [P, N] and columns [P, K]."""
    signs = np.asarray(signs)
    planes = [reference.pack(plane > 0) for plane in signs]
    sign = aligned_empty((len(planes), *planes[0].shape), np.uint32)
    sign[...] = planes
    column = None if column is None else np.asarray(column, F32)
    form = "row" if column is None else "rank1"
    return Delta(sign, np.asarray(scale, F32), column, signs.shape[1:], form)


# bits


def test_bit_j_of_word_i_of_line_w_of_strip_s_is_row_16s_plus_i_and_column_32w_plus_j():
    signs = np.zeros((35, 300), bool)
    for row, column in ((0, 0), (17, 33), (34, 299), (15, 31)):
        signs[row, column] = True
    words = reference.pack(signs)
    assert words.shape == (3, 16, 16) and words.dtype == np.uint32
    expected = np.zeros_like(words)
    expected[0, 0, 0] = 1 << 0
    expected[1, 1, 1] = 1 << 1
    expected[2, 9, 2] = 1 << 11
    expected[0, 0, 15] = 1 << 31
    assert np.array_equal(words, expected)


def test_the_bytes_of_a_word_are_little_endian():
    signs = np.zeros((1, 9), bool)
    signs[0, 8] = True
    assert reference.pack(signs).tobytes()[:4] == bytes([0, 1, 0, 0])


@given(st.integers(0, 40), st.integers(0, 600), st.integers(0, 2**32))
def test_what_is_packed_comes_back_and_the_padding_is_zero(n, k, seed):
    signs = np.random.default_rng(seed).random((n, k)) < 0.5
    words = reference.pack(signs)
    assert words.shape == (-(-n // 16), 8 * -(-k // 256), 16)
    assert np.array_equal(reference.unpack(words, n, k), signs)
    assert np.unpackbits(words.view(np.uint8).reshape(-1)).sum() == signs.sum()


# extraction


def test_one_plane_is_the_signs_and_the_mean_of_each_row():
    finetuned = np.array([[3.0, -1.0, 0.0, -0.0], [-2.0, -2.0, 8.0, 0.0]], F32)
    d = reference.extract(np.zeros((2, 4), F32), finetuned)
    assert d.sign[0, 0, 0, :2].tolist() == [0b1101, 0b1100]  # +0 and -0 are 1
    assert d.scale.tolist() == [[1.0, 3.0]] and d.column is None and d.shape == (2, 4)


def test_one_scale_a_tensor_is_the_mean_of_all():
    d = reference.extract(np.zeros((2, 2), F32), np.array([[1, -2], [3, 2]], F32), scale="tensor")
    assert d.scale.tolist() == [[2.0, 2.0]] and d.form == "tensor"


def test_the_next_plane_takes_what_is_left():
    d = reference.extract(np.zeros((1, 4), F32), np.array([[4.0, -2.0, 1.0, 1.0]], F32), planes=3)
    # |d| has mean 2, leaving 2, 0, -1, -1; these have mean 1, leaving 1, -1, 0, 0
    assert d.scale.tolist() == [[2.0], [1.0], [0.5]]
    assert d.sign[:, 0, 0, 0].tolist() == [0b1101, 0b0011, 0b1101]


def test_rank1_finds_scales_that_are_an_outer_product():
    size = np.outer([1.0, 2.0], [1.0, 3.0, 2.0])
    d = reference.extract(np.zeros((2, 3), F32), F32(size * [[1, -1, 1], [-1, 1, 1]]), scale="rank1")
    assert d.column.tolist() == [[0.5, 1.5, 1.0]]
    assert d.scale.tolist() == [[2.0, 4.0]]


def test_rank1_is_the_leading_singular_pair_of_the_sizes(rng):
    base, finetuned = pair(rng, 40, 70)
    d = reference.extract(base, finetuned, scale="rank1")
    u, s, v = np.linalg.svd(np.abs((finetuned - base).astype(np.float64)))
    best = s[0] * np.outer(u[:, 0], v[0])
    np.testing.assert_allclose(np.outer(d.scale[0], d.column[0]), best, rtol=1e-6)
    assert abs(d.column.mean() - 1) < 1e-6


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
def test_no_change_gives_zero_scales(scale):
    weight = np.ones((3, 5), F32)
    d = reference.extract(weight, weight, planes=2, scale=scale)
    assert not d.scale.any() and np.array_equal(reference.expand(weight, d), weight)
    assert d.column is None or (d.column == 1).all()


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
def test_every_plane_lowers_the_error(rng, scale):
    base, finetuned = pair(rng, 33, 257)
    errors = []
    for planes in range(1, 9):
        d = reference.extract(base, finetuned, planes, scale)
        errors.append(np.linalg.norm(reference.expand(base, d) - finetuned))
    ratios = np.array(errors[1:]) / errors[:-1]
    assert ratios[0] < 0.7 and (ratios < 0.95).all()  # 0.6 for the second plane of a Gaussian difference


def test_the_scale_of_a_row_minimises_its_squared_error(rng):
    base, finetuned = pair(rng, 8, 300)
    d = reference.extract(base, finetuned)
    left = np.abs(finetuned - base) - d.scale[0][:, None]
    for other in (0.99, 1.01):
        worse = np.abs(finetuned - base) - other * d.scale[0][:, None]
        assert ((left**2).sum(axis=1) < (worse**2).sum(axis=1)).all()


def test_sums_have_16_lanes_folded_by_halves():
    values = np.zeros(17)
    values[0], values[8], values[16] = 1e16, -1e16, 1.0
    assert reference.fold(values) == 0.0  # 1 joins lane 0 first, and is lost there
    values = np.zeros(16)
    values[0], values[8], values[1] = 1e16, -1e16, 1.0
    assert reference.fold(values) == 1.0
    assert reference.fold(np.zeros((2, 0))).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "base, finetuned, message",
    [
        (0.0, np.nan, r"finetuned: expected finite weights, got NaN or Inf at \[1, 2\]"),
        (np.inf, 0.0, r"base: expected finite weights, got NaN or Inf at \[1, 2\]"),
        (-3e38, 3e38, r"finetuned - base: expected differences within fp32, got one beyond at \[1, 2\]"),
    ],
)
def test_what_is_not_finite_is_named(base, finetuned, message):
    one, two = np.zeros((2, 3), F32), np.zeros((2, 3), F32)
    one[1, 2], two[1, 2] = base, finetuned
    with pytest.raises(ValueError, match=message):
        reference.extract(one, two)


def test_the_first_weight_that_is_not_finite_is_named_whichever_it_is():
    base, finetuned = np.zeros((2, 3), F32), np.zeros((2, 3), F32)
    base[1, 0] = finetuned[0, 2] = np.nan
    for extract in (reference.extract, bitdelta.extract):
        with pytest.raises(ValueError, match=r"^finetuned: .* at \[0, 2\]"):
            extract(base, finetuned)


# expansion


def test_expand_sums_planes_in_order_and_rounds_once_to_even():
    base = as_bfloat16(np.array([[0x3F80, 0x3F81]], np.uint16))  # 1 and 1 + 2^-7
    tie = delta([[[1, 1]]], [[2.0**-8]])
    assert bits(reference.expand(base, tie)).tolist() == [[0x3F80, 0x3F82]]
    above = delta([[[1, 1]], [[1, 1]]], [[2.0**-8], [2.0**-20]])
    assert bits(reference.expand(base, above)).tolist() == [[0x3F81, 0x3F82]]


def test_expand_multiplies_row_and_column_scales():
    d = delta([[[1, -1], [-1, 1]]], [[2.0, 3.0]], [[0.5, 1.5]])
    assert reference.expand(None, d).tolist() == [[1.0, -3.0], [-1.5, 4.5]]


# products


def test_quantize_by_hand():
    u = np.array(
        [
            [1.0, -1.0, 0.25, 0.0],  # e = 1: units of 2^-14
            [0.99999, -0.99999, 0.0, 0.0],  # rounds to 2^15: clamped on one side
            [2.0**-15 * 1.5, 2.0**-15 * 2.5, 0.5, 0.0],  # ties to even, e = 0
            [2.0**-97, 2.0**-112, 2.0**-111 * 1.5, 0.0],  # the floor: e = -96
            [0.0, 0.0, 0.0, 0.0],
            [3e38, 1e30, -3e38, 0.0],
        ],
        F32,
    )
    q, e, is_finite = reference.quantize(u)
    assert e[:4].tolist() == [1, 0, 0, -96] and e[5] == 128 and is_finite.all()
    assert q[0].tolist() == [16384, -16384, 4096, 0]
    assert q[1].tolist() == [32767, -32768, 0, 0]
    assert q[2].tolist() == [2, 2, 16384, 0]
    assert q[3].tolist() == [16384, 0, 2, 0]
    assert q[4].tolist() == [0, 0, 0, 0]
    assert q[5].tolist() == [round(3e38 / 2.0**113), round(1e30 / 2.0**113), -round(3e38 / 2.0**113), 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_marks_rows_that_are_not_finite(bad):
    assert reference.quantize(np.array([[1.0, bad], [1.0, 2.0]], F32))[2].tolist() == [False, True]


def test_linear_by_hand():
    d = delta([[[1, -1], [-1, -1]], [[1, 1], [1, -1]]], [[2.0, 4.0], [0.5, 1.0]])
    x = np.array([[1.0, 3.0], [1.0, 3.0]], F32)
    weight = np.array([[1.0, 0.0], [0.0, 10.0]], F32)
    y = reference.linear(x, weight, [d], [0, -1], bias=np.array([0.25, -1.0], F32))
    # first plane -2 * 2 and -4 * 4, second 4 * 0.5 and -2 * 1, base 1 and 30, bias
    assert y.tolist() == [[-4 + 2 + 1 + 0.25, -16 - 2 + 30 - 1], [1.25, 29.0]]


def test_the_terms_come_first_then_the_product_then_the_bias():
    d = delta([[[1]], [[1]]], [[1.0], [2.0**-24]])
    x, product, bias = np.ones((1, 1), F32), np.full((1, 1), 2.0**24, F32), np.ones(1, F32)
    # 1 + 2^-24 -> 1 (even); 1 + 2^24 -> 2^24 (even); 2^24 + 1 -> 2^24
    assert reference.linear(x, None, [d], [0], bias, product=product).item() == 2.0**24


def test_the_column_scale_is_applied_before_quantising_and_the_row_scale_after():
    d = delta([[[1, -1]]], [[2.0]], [[4.0, 0.5]])
    assert reference.linear(np.array([[1.0, 2.0]], F32), None, [d], [0]).item() == (4.0 - 1.0) * 2.0


def test_linear_rounds_once_to_the_dtype_of_x():
    d = delta([[[1]]], [[2.0**-8]])
    x, weight = as_bfloat16(np.array([[0x3F80]], np.uint16)), np.ones((1, 1), F32)
    assert bits(reference.linear(x, weight, [d], [0])).item() == 0x3F80  # the tie 1 + 2^-8
    bias = np.array([2.0**-20], F32)
    assert bits(reference.linear(x, weight, [d], [0], bias)).item() == 0x3F81


@pytest.mark.parametrize("dtype, quiet", [("float32", 0x7FC00000), ("float16", 0x7E00), ("bfloat16", 0x7FC0)])
def test_a_row_with_nan_is_the_quiet_nan_and_its_neighbours_are_not(dtype, quiet):
    d = delta([[[1, -1]], [[1, 1]]], [[2.0], [1.0]], [[1.0, 1.0], [2.0, 1.0]])
    x = tensor([[np.nan, 1.0], [1.0, 1.0], [np.inf, 0.0], [1.0, 2.0]], dtype)
    y = reference.linear(x, np.ones((1, 2), F32), [d], [0, 0, 0, -1])
    assert bits(y)[[0, 2], 0].tolist() == [quiet, quiet] and np.isfinite(to_float32(y)[1])
    assert to_float32(y)[3] == 3.0
    assert bits(reference.linear_transposed(x[:, :1], [d], [0, 0, 0, -1]))[0].tolist() == [quiet, quiet]


def test_a_product_with_the_column_scale_beyond_fp32_gives_a_row_of_nan():
    d = delta([[[1, -1]], [[1, 1]]], [[2.0], [1.0]], [[1.0, 1.0], [1e30, 1.0]])
    assert bits(reference.linear(F32([[1e30, 0.0]]), None, [d], [0])).item() == 0x7FC00000
    assert np.isfinite(reference.linear(F32([[1.0, 0.0]]), None, [d], [0])).all()


def test_rows_of_the_base_keep_the_bits_of_a_call_of_their_own(rng):
    base, finetuned = pair(rng, 20, 100)
    d = reference.extract(base, finetuned)
    x = rng.normal(size=(5, 100)).astype(F32)
    mixed = reference.linear(x, base, [d], [0, -1, 0, -1, -1])
    alone = reference.linear(x, base, [d], [-1] * 5)
    assert np.array_equal(mixed[[1, 3, 4]], alone[[1, 3, 4]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
def test_linear_is_x_times_base_plus_delta(rng, dtype, kind, scale):
    base, finetuned = (tensor(weight, dtype, kind) for weight in pair(rng, 37, 300))
    deltas = [reference.extract(base, finetuned, planes, scale) for planes in (1, 3)]
    x = tensor(rng.normal(size=(4, 300)), dtype, kind)
    y = to_float32(reference.linear(x, base, deltas, [0, 1, -1, 1]))
    wide = [to_float32(base).astype(np.float64)] * 2 + [to_float32(base)]
    wide = [wide[t] + (reference.expand(None, deltas[t]) if t < 2 else 0) for t in (0, 1, 2, 1)]
    exact = np.stack(
        [weight @ row for weight, row in zip(wide, to_float32(x).astype(np.float64), strict=True)]
    )
    assert np.abs(y - exact).max() <= TOLERANCE[dtype] * np.abs(exact).max()


def test_quantising_gaussian_rows_costs_less_than_a_ten_thousandth(rng):
    signs = rng.choice([-1, 1], size=(1, 256, 4096))
    x = rng.normal(size=(4, 4096)).astype(F32)
    exact = x.astype(np.float64) @ signs[0].T
    z = reference.linear(x, None, [delta(signs, np.ones((1, 256)))], [0] * 4)
    error = np.linalg.norm(z - exact) / np.linalg.norm(exact)
    # q has units of 2^(e-15), 2^e being 4 or 8 sigma: 2^(e-15) / sqrt(12) = 3.5e-5 or 7e-5 of sigma
    assert 1e-5 < error < 8e-5


def test_outliers_of_a_thousand_stay_below_the_rounding_of_bf16(rng):
    signs = rng.choice([-1, 1], size=(1, 64, 4096))
    x = rng.normal(size=(1, 4096)).astype(F32)
    x[0, 7] *= 1000 / abs(x[0, 7])
    exact = x.astype(np.float64) @ signs[0].T
    z = reference.linear(x, None, [delta(signs, np.ones((1, 64)))], [0])
    assert np.linalg.norm(z - exact) / np.linalg.norm(exact) < 2.0**-9


def test_float32_and_fixed16_agree(rng):
    base, finetuned = pair(rng, 37, 300)
    d = reference.extract(base, finetuned, 2, "rank1")
    x = rng.normal(size=(4, 300)).astype(F32)
    one = reference.linear(x, None, [d], [0, 0, 0, -1])
    two = reference.linear(x, None, [d], [0, 0, 0, -1], precision="float32")
    assert np.abs(one - two).max() < 1e-4 * np.abs(one).max() and not one[3].any() and not two[3].any()


def test_merged_multiplies_with_the_rounded_weight():
    base = as_bfloat16(np.array([[0x3F80]], np.uint16))
    d = delta([[[1]]], [[2.0**-8]])  # 1 + 2^-8 rounds to 1 in the weight's dtype
    x = np.array([[2.0**10], [2.0**10]], F32)
    y = reference.linear(x, base, [d], [0, -1], bias=F32([0.5]), precision="merged")
    assert y.tolist() == [[1024.5], [1024.5]]
    assert reference.linear(x, base, [d], [0, -1])[0].item() == 1028.0


def test_linear_add_adds_to_what_is_there_and_leaves_rows_of_the_base(rng):
    d = delta([[[1, -1]]], [[2.0]])
    y = as_bfloat16(np.array([[0x3F80], [0x8000]], np.uint16))
    assert reference.linear_add(y, F32([[3, 1], [3, 1]]), [d], [0, -1]) is y
    assert bits(y).tolist() == [[0x40A0], [0x8000]]  # 5, and -0 as it was


def test_the_transpose_is_the_adjoint(rng):
    base, finetuned = pair(rng, 37, 300)
    d = reference.extract(base, finetuned, 3, "rank1")
    x, dy = rng.normal(size=(1, 300)).astype(F32), rng.normal(size=(1, 37)).astype(F32)
    forward = (reference.linear(x, None, [d], [0]).astype(np.float64) * dy).sum()
    backward = (reference.linear_transposed(dy, [d], [0]).astype(np.float64) * x).sum()
    assert abs(forward - backward) < 1e-4 * np.linalg.norm(x) * np.linalg.norm(dy) * d.scale.max()


def test_the_transpose_by_hand():
    d = delta([[[1, -1], [1, 1]], [[1, 1], [-1, 1]]], [[2.0, 1.0], [0.5, 0.25]], [[1.0, 3.0], [2.0, 1.0]])
    g = reference.linear_transposed(np.array([[1.0, 4.0], [1.0, 4.0]], F32), [d], [0, -1])
    # first plane u = 2, 4: sums 6 and 2, times 1 and 3; second u = 0.5, 1: -0.5 and 1.5, times 2 and 1
    assert g.tolist() == [[6.0 - 1.0, 6.0 + 1.5], [0.0, 0.0]]


def test_sums_beyond_int32_are_exact():
    k = 70000
    d = delta(np.ones((1, 1, k), np.int8), [[1.0]])
    x = np.full((1, k), from_float32(F32([0.999]), "float16")[0], np.float16).astype(F32)
    q = reference.quantize(x)[0][0, 0]
    assert q * k > 2**31
    assert reference.linear(x, None, [d], [0]).item() == F32(q * k) * F32(2.0**-15)
