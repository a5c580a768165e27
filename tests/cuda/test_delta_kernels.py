"""Extraction and expansion on the GPU: the bits of the scalar core."""

import numpy as np
import pytest
from conftest import DTYPES, bits, pair, tensor

import bitdelta
from bitdelta import reference
from bitdelta.array import to_float32

F32 = np.float32
FORMS = ["tensor", "row", "rank1"]


def assert_same_delta(got, expected):
    assert np.array_equal(got.sign, expected.sign)
    assert np.array_equal(bits(got.scale), bits(expected.scale))
    if expected.column is not None:
        assert np.array_equal(bits(got.column), bits(expected.column))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extraction_has_the_bits_of_the_core(kernels, rng, form, planes, dtype):
    if form == "rank1" and planes == 3 and dtype != "bfloat16":
        planes = 2  # each plane has twenty sweeps
    base, finetuned = pair(rng, 37, 140, dtype)
    got = kernels.extract(base, finetuned, planes, form)
    assert_same_delta(got, bitdelta.extract(base, finetuned, planes=planes, scale=form))


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extraction_of_mixed_dtypes_and_shapes(kernels, rng, base_dtype, dtype):
    for n, k in ((1, 1), (16, 256), (17, 300)):
        base = tensor(rng.normal(size=(n, k)), base_dtype)
        finetuned = tensor(rng.normal(size=(n, k)), dtype)
        got = kernels.extract(base, finetuned, 2)
        assert_same_delta(got, bitdelta.extract(base, finetuned, planes=2))


def test_extraction_of_zeros_and_equal_rows(kernels, rng):
    base, finetuned = pair(rng, 20, 70)
    for same in (slice(0, 20), slice(3, 18)):
        finetuned[same] = base[same]
        for form in FORMS:
            got = kernels.extract(base, finetuned, 2, form)
            assert_same_delta(got, bitdelta.extract(base, finetuned, planes=2, scale=form))


@pytest.mark.parametrize("form", FORMS)
def test_extraction_names_the_first_value_that_is_not_finite(kernels, rng, form):
    base, finetuned = pair(rng, 40, 100)
    base[33, 2], base[21, 70], finetuned[21, 69] = np.nan, np.inf, np.nan
    assert kernels.extract(base, finetuned, 1, form) == (21, 69, 0)
    base[20, 99] = -np.inf
    assert kernels.extract(base, finetuned, 2, form) == (20, 99, 1)
    base[2, 1], finetuned[2, 1] = -3e38, 3e38
    assert kernels.extract(base, finetuned, 1, form) == (2, 1, -1)


def test_rank_1_scales_beyond_fp32_are_named(kernels):
    base, finetuned = np.zeros((2, 2), F32), np.array([[3e38, 0], [3e38, 3e38]], F32)
    assert kernels.extract(base, finetuned, 2, "rank1") == (1, 0, -1)


def test_extraction_of_unaligned_rows(kernels, rng):
    base, finetuned = pair(rng, 18, 90, "float16")
    got = kernels.extract(base[:, 1:80], finetuned[:, 8:87], 1)
    assert_same_delta(got, bitdelta.extract(base[:, 1:80].copy(), finetuned[:, 8:87].copy()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("form", ["row", "rank1"])
def test_expansion_has_the_bits_of_the_core(kernels, rng, dtype, out_dtype, form):
    base, finetuned = pair(rng, 21, 300, dtype)
    delta = bitdelta.extract(base, finetuned, planes=2, scale=form)
    out = tensor(np.zeros((21, 300)), out_dtype)
    kernels.expand(base, delta, out)
    assert np.array_equal(bits(out), bits(tensor(reference.expand(to_float32(base), delta), out_dtype)))
    part = tensor(np.zeros((7, 300)), out_dtype)
    kernels.expand(None, delta, part, rows=(11, 18))
    assert np.array_equal(bits(part), bits(tensor(reference.expand(None, delta)[11:18], out_dtype)))
    if dtype == out_dtype:
        kernels.expand(base, delta, base)
        assert np.array_equal(bits(base), bits(out))
