"""Rounding to the three dtypes, for every pattern, and the array of bf16 bits in plain NumPy."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from conftest import DTYPES, KINDS, bits, tensor

import bitdelta
from bitdelta.array import (
    BFloat16Array,
    aligned_empty,
    as_bfloat16,
    dtype_name,
    empty_like,
    from_float32,
    to_float32,
)

ALL = np.arange(1 << 16, dtype=np.uint16)


def test_every_bf16_pattern_widens_as_ml_dtypes_says():
    assert np.array_equal(
        bits(to_float32(as_bfloat16(ALL))), bits(ALL.view(ml_dtypes.bfloat16).astype(np.float32))
    )


def test_every_fp16_pattern_widens_as_numpy_says():
    assert np.array_equal(
        bits(to_float32(ALL.view(np.float16))), bits(ALL.view(np.float16).astype(np.float32))
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_pattern_comes_back(dtype):
    narrow = ALL.view(np.float16) if dtype == "float16" else as_bfloat16(ALL)
    back = from_float32(to_float32(narrow), dtype)
    is_nan = np.isnan(to_float32(narrow))
    assert np.array_equal(bits(back)[~is_nan], ALL[~is_nan])
    assert np.isnan(to_float32(back)[is_nan]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_tie_goes_to_the_even_neighbour_and_its_neighbours_to_theirs(dtype):
    """Between each finite value and the next: the middle, and the fp32 values just below and above it."""
    positive = ALL[: 0x7C00 if dtype == "float16" else 0x7F80]
    low = to_float32(positive.view(np.float16) if dtype == "float16" else as_bfloat16(positive)).astype(
        np.float64
    )
    high = np.append(low[1:], 65536.0 if dtype == "float16" else 2.0**128)  # where infinity would be
    middle = ((low + high) / 2).astype(np.float32)  # exact: one bit more than the dtype has
    even = positive + (positive & 1)
    for sign in (0, 0x8000):
        factor = np.float32(-1 if sign else 1)
        assert np.array_equal(bits(from_float32(factor * middle, dtype)), even | sign)
        below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))
        assert np.array_equal(bits(from_float32(factor * below, dtype)), positive | sign)
        assert np.array_equal(bits(from_float32(factor * above, dtype)), (positive + 1) | sign)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_agrees_with_ml_dtypes_and_numpy_on_random_words(rng, dtype):
    words = rng.integers(0, 1 << 32, 1 << 20, np.uint32).view(np.float32)
    words = words[~np.isnan(words)]
    with np.errstate(all="ignore"):
        expected = words.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    assert np.array_equal(bits(from_float32(words, dtype)), expected.view(np.uint16))


def test_fp32_is_not_copied():
    values = np.ones(3, np.float32)
    assert from_float32(values, "float32") is values and to_float32(values) is values


def test_rounding_to_another_dtype_is_refused():
    with pytest.raises(TypeError, match="got float64"):
        from_float32(np.ones(1, np.float32), "float64")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_has_a_name_and_fp32_values(kind, dtype):
    made = tensor([[1.0, -0.0, 2.5, 65504.0]], dtype, kind)
    assert dtype_name(made) == dtype
    assert np.array_equal(
        bits(to_float32(made)), bits(to_float32(tensor([[1.0, -0.0, 2.5, 65504.0]], dtype)))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_is_of_the_kind_of_the_argument(kind, dtype):
    like = tensor(np.ones((2, 3)), dtype, kind)
    made = empty_like(like, (4, 5))
    assert type(made) is type(like) and made.dtype == like.dtype and tuple(made.shape) == (4, 5)


@pytest.mark.parametrize("wrong", [np.ones(2), np.ones(2, np.int32), "text", [1.0]], ids=str)
def test_other_dtypes_are_refused_by_name(wrong):
    with pytest.raises(TypeError, match="weight: expected"):
        dtype_name(wrong, "weight")


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1,), ()])
def test_aligned_memory_starts_at_a_line(shape):
    made = aligned_empty(shape, np.uint32)
    address = made.__array_interface__["data"][0]
    assert made.shape == shape and made.dtype == np.uint32 and address % 64 == 0
    made[...] = 7  # writable


# BFloat16Array


@pytest.fixture
def halves():
    return as_bfloat16(np.array([[0x3F80, 0xC000], [0x4049, 0x7F80]], np.uint16))


def test_the_memory_is_shared(halves):
    halves.bits[0, 0] = 0
    assert halves[0, 0] == 0.0 and np.shares_memory(halves.bits, halves)


def test_one_element_is_its_float(halves):
    assert halves[0, 1] == -2.0 and isinstance(halves[0, 1], np.float32)
    assert halves.tolist() == [[1.0, -2.0], [3.140625, np.inf]] and halves.item(2) == 3.140625
    assert repr(halves) == "BFloat16Array([[ 1.      , -2.      ],\n               [ 3.140625,       inf]])"


def test_slices_and_copies_stay_bf16(halves):
    for moved in (
        halves[1:],
        halves.T,
        halves.reshape(-1),
        halves.copy(),
        np.concatenate([halves, halves]),
        np.copy(halves, subok=True),
        copy.deepcopy(halves),
        pickle.loads(pickle.dumps(halves)),
    ):
        assert isinstance(moved, BFloat16Array) and dtype_name(moved) == "bfloat16"


def test_a_view_of_the_bits_is_a_plain_array(halves):
    assert type(halves.view(np.uint16)) is np.ndarray and type(halves.view(np.uint8)) is np.ndarray
    assert type(halves.view()) is BFloat16Array


def test_values_of_another_dtype_do_not_mix_with_the_bits(halves):
    with pytest.raises(TypeError, match="concatenate with float32"):
        np.concatenate([halves, np.ones((2, 2), np.float32)])


@pytest.mark.parametrize(
    "compute",
    [
        lambda a: a + a,
        lambda a: a @ a,
        lambda a: a == 1,
        lambda a: -a,
        lambda a: a.sum(),
        lambda a: a.max(),
        lambda a: a.dot(a),
        lambda a: a.sort(),
        lambda a: np.dot(a, a),
        lambda a: np.einsum("ij,ij", a, a),
        lambda a: np.mean(a),
        lambda a: np.exp(a),
        lambda a: np.ones((2, 2), np.float32) * a,
        lambda a: np.add.reduce(a),
    ],
    ids=lambda f: "",
)
def test_arithmetic_on_the_bits_is_refused(halves, compute):
    with pytest.raises(TypeError, match="to_float32"):
        compute(halves)


def test_astype_converts_the_values(halves):
    assert halves.astype(np.float32).tolist() == halves.tolist()
    assert halves.astype(np.float64).dtype == np.float64


@pytest.mark.parametrize("wrong", [np.ones(2, np.float16), np.ones(2, np.int16), [1], 3], ids=str)
def test_only_uint16_is_named_bf16(wrong):
    with pytest.raises(TypeError, match="uint16_array: expected"):
        bitdelta.as_bfloat16(wrong)
