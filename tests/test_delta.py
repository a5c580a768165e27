"""Extraction, expansion and checksums in C: bit for bit what reference.py defines, on every instruction set."""

import re
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from conftest import DTYPES, KINDS, bits, pair, tensor
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bitdelta
from bitdelta import _C, reference
from bitdelta.array import as_bfloat16, dtype_name, from_float32, to_float32
from bitdelta.delta import extract_with_checksum

FORMS = ("tensor", "row", "rank1")
ISAS = _C.isas()
F32 = np.float32
FEW = settings(max_examples=60, deadline=None)  # each example runs on every instruction set


@contextmanager
def running_on(isa, n_threads=1):
    before = _C.isa()
    _C.set_isa(isa)
    bitdelta.set_num_threads(n_threads)
    try:
        yield
    finally:
        _C.set_isa(before)
        bitdelta.set_num_threads(None)


def everywhere(thread_counts=(1, 2, 3)):
    for isa in ISAS:
        for n_threads in thread_counts:
            with running_on(isa, n_threads):
                yield f"{isa}, {n_threads} threads"


def strided(array, padding):
    """The same values in rows that are further apart; the padding is NaN."""
    if padding == 0:
        return array
    wide = np.full(
        (array.shape[0], array.shape[1] + padding), 0x7FFF, np.uint16 if array.itemsize == 2 else "u4"
    )
    wide = wide.view(np.float16 if dtype_name(array) == "float16" else array.dtype)
    wide = as_bfloat16(wide) if dtype_name(array) == "bfloat16" else wide
    wide[:, : array.shape[1]] = array
    return wide[:, : array.shape[1]]


def hard_pair(seed, n, k, base_dtype, finetuned_dtype, size):
    """Weights with equal elements, zeros of both signs and denormals among them."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, k)).astype(F32)
    finetuned = base + (rng.normal(size=(n, k)) * size).astype(F32)
    kind = rng.integers(0, 40, size=(n, k))
    for values, zeros in ((base, (0, 1)), (finetuned, (0, 2))):
        values[kind == zeros[0]] = 0.0
        values[kind == zeros[1]] = -0.0
        values[kind == 3] = rng.normal() * 1e-40
        values[kind == 4] = 6e-8
    finetuned[kind == 5] = base[kind == 5]
    return tensor(base, base_dtype), tensor(finetuned, finetuned_dtype)


def assert_same(a, b, where):
    assert a.shape == b.shape and a.form == b.form
    for name in ("sign", "scale", "column"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), (name, where)
        assert x is None or np.array_equal(bits(x), bits(y)), (name, where)


cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 40),
        "k": st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 300, 511, 545])),
        "base_dtype": st.sampled_from(DTYPES),
        "finetuned_dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 2**32),
        "size": st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    }
)


# extraction


@FEW
@given(cases, st.integers(1, 8), st.sampled_from(FORMS), st.sampled_from([0, 1, 24]))
def test_extraction_has_the_bits_of_the_reference(case, planes, form, padding):
    base, finetuned = hard_pair(**case)
    expected = reference.extract(base, finetuned, planes, form)
    for where in everywhere():
        got = bitdelta.extract(strided(base, padding), strided(finetuned, padding), planes, form)
        assert_same(got, expected, where)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(301, 1000), (50, 5001), (2, 40000)], ids=str)
def test_sums_of_many_tasks_depend_on_neither_threads_nor_instruction_set(rng, form, shape):
    base, finetuned = pair(rng, *shape, "bfloat16")
    expected = reference.extract(base, finetuned, 2, form)
    for where in everywhere():
        assert_same(bitdelta.extract(base, finetuned, 2, form), expected, where)


@pytest.mark.parametrize("kind", KINDS)
def test_extraction_takes_every_kind_of_tensor(rng, kind):
    base, finetuned = (to_float32(w) for w in pair(rng, 20, 70, "bfloat16"))
    expected = reference.extract(tensor(base, "bfloat16"), tensor(finetuned, "float16"))
    got = bitdelta.extract(tensor(base, "bfloat16", kind), tensor(finetuned, "float16", kind))
    assert_same(got, expected, kind)


def test_no_change_and_zeros_of_either_sign_pack_as_ones():
    base = np.array([[0.0, -0.0, 0.0, -0.0, 1.0]], F32)
    finetuned = np.array([[0.0, 0.0, -0.0, -0.0, 1.0]], F32)
    for where in everywhere((1,)):
        d = bitdelta.extract(base, finetuned, planes=3)
        assert d.sign[:, 0, 0, 0].tolist() == [0b11111] * 3, where
        assert not d.scale.any() and np.count_nonzero(d.sign) == 3, where


def test_further_planes_leave_less_of_the_change(rng):
    base, finetuned = (to_float32(w) for w in pair(rng, 48, 300))
    for form in FORMS:
        errors = [
            np.square(finetuned - bitdelta.extract(base, finetuned, planes, form).expand(base)).sum()
            for planes in range(1, 5)
        ]
        assert all(later < 0.9 * earlier for earlier, later in pairwise(errors)), form


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 69), st.integers(0, 2099), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.sampled_from(FORMS),
    st.sampled_from(DTYPES),
)
@example([(0, 0, True), (0, 0, False)], np.nan, "row", "bfloat16")
@example([(69, 2099, False), (69, 2098, True)], np.inf, "tensor", "float32")
def test_the_first_number_that_is_not_finite_is_named(places, value, form, dtype):
    weights = [np.ones((70, 2100), F32), np.ones((70, 2100), F32)]  # base, finetuned: three tasks
    for row, column, in_finetuned in places:
        weights[in_finetuned][row, column] = value
    row, column, in_finetuned = min(places)
    text = rf"^{'finetuned' if in_finetuned else 'base'}: .*NaN or Inf at \[{row}, {column}\]$"
    base, finetuned = (tensor(w, dtype) for w in weights)
    for where in everywhere((1, 3)):
        with pytest.raises(ValueError) as error:
            bitdelta.extract(base, finetuned, 2, form)
        assert re.match(text, str(error.value)), where


def test_a_difference_beyond_fp32_is_named():
    base, finetuned = np.full((3, 40), 3e38, F32), np.full((3, 40), 3e38, F32)
    finetuned[1, 39] = finetuned[2, 0] = -3e38
    for _ in everywhere():
        with pytest.raises(ValueError, match=r"^finetuned - base: .*beyond at \[1, 39\]$"):
            bitdelta.extract(base, finetuned)


def test_rank1_scales_whose_product_is_beyond_fp32_are_refused_by_the_next_plane():
    base, finetuned = np.zeros((2, 2), F32), np.array([[3e38, 0], [3e38, 3e38]], F32)
    for _ in everywhere((1,)):
        with pytest.raises(ValueError, match=r"^finetuned - base: .*beyond at \[1, 0\]$"):
            bitdelta.extract(base, finetuned, 2, "rank1")


def test_the_callers_flush_to_zero_changes_nothing_and_stays():
    import torch

    base, finetuned = hard_pair(5, 33, 300, "float32", "float32", 1e-39)
    expected = [reference.extract(base, finetuned, 2, form) for form in FORMS]
    grown = [reference.expand(base, d) for d in expected]
    tiny = torch.tensor([1e-40, 1e-40])
    assert torch.set_flush_denormal(True)
    try:
        for where in everywhere((1, 2)):
            for form, delta, weight in zip(FORMS, expected, grown, strict=True):
                got = bitdelta.extract(base, finetuned, 2, form)
                assert_same(got, delta, where)
                assert np.array_equal(bits(got.expand(base)), bits(weight)), where
        assert not (tiny * 1.0).view(torch.int32).any()  # still flushed
    finally:
        torch.set_flush_denormal(False)
    assert (tiny * 1.0).view(torch.int32).all()


# expansion


@FEW
@given(
    cases,
    st.integers(1, 8),
    st.sampled_from(FORMS),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 5]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_rows_of_an_expansion_have_the_bits_of_the_reference(case, planes, form, dtype, padding, share):
    base, finetuned = hard_pair(**case)
    delta = reference.extract(base, finetuned, planes, form)
    begin, end = sorted(round(part * case["n"]) for part in share)
    for weight in (base, None):
        with np.errstate(over="ignore"):
            exact = reference.expand(None if weight is None else to_float32(weight), delta)
            expected = from_float32(exact, dtype)[begin:end]
        for where in everywhere((1, 2)):
            out = strided(tensor(np.full((end - begin, case["k"]), 7.0), dtype), padding)
            _C.expand(out, None if weight is None else strided(weight, padding), delta.handle, begin, end)
            assert np.array_equal(bits(out), bits(expected)), where


@FEW
@given(cases, st.integers(1, 3), st.sampled_from(FORMS), st.sampled_from([0, 3]))
def test_an_expansion_in_place_is_the_same_and_leaves_the_gaps_between_rows(case, planes, form, padding):
    base, finetuned = hard_pair(**case)
    delta = reference.extract(base, finetuned, planes, form)
    with np.errstate(over="ignore"):
        expected = reference.expand(base, delta)
    for where in everywhere((1, 3)):
        weight = strided(base.copy(), padding)
        before = None if padding == 0 else bits(weight.base).copy()
        delta.expand(weight, out=weight)
        assert np.array_equal(bits(weight), bits(expected)), where
        if before is not None:
            assert np.array_equal(bits(weight.base)[:, case["k"] :], before[:, case["k"] :]), where


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_expansions_that_bypass_the_caches_are_the_same(rng, dtype):
    n, k = (2050 if dtype == "float32" else 4100), 4104  # above 32 MB; a tail in every row
    base = tensor(rng.normal(size=(n, k)).astype(F32), dtype)
    delta = bitdelta.extract(base, tensor(rng.normal(size=(n, k)).astype(F32), dtype))
    expected = base.copy()
    for begin in range(0, n, 500):  # pieces that stay in the caches
        end = min(begin + 500, n)
        _C.expand(expected[begin:end], base, delta.handle, begin, end)
    for where in everywhere((2,)):
        assert np.array_equal(bits(delta.expand(base)), bits(expected)), where


def test_expansion_rounds_once_ties_to_even_and_keeps_nan_and_infinity(isa):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, size=(64, 512), dtype=np.uint32)
    words[::2] &= np.uint32(0xFFFFF000)  # ties and near ties of both halves
    words[::4] |= np.uint32(0x00008000)
    values = words.view(F32)
    delta = reference.extract(np.zeros((64, 512), F32), np.zeros((64, 512), F32))  # adds +0
    for dtype in DTYPES:
        out = tensor(np.empty((64, 512), F32), dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = to_float32(from_float32(values + F32(0), dtype))
        got = to_float32(delta.expand(values, out=out))
        is_nan = np.isnan(values)
        assert np.array_equal(np.isnan(got), is_nan)
        assert np.array_equal(bits(got)[~is_nan], bits(expected)[~is_nan])


# conversion


def test_every_half_becomes_the_same_fp32(isa):
    halves = np.arange(65536, dtype=np.uint16).reshape(16, 4096)
    for array in (halves.view(np.float16), as_bfloat16(halves)):
        for view in (array, array[:, :77], array[:1]):
            out = np.empty(view.shape, F32)
            _C.to_float32(out, view)
            expected = to_float32(view)
            is_nan = np.isnan(expected)
            assert np.array_equal(np.isnan(out), is_nan)
            assert np.array_equal(bits(out)[~is_nan], bits(expected)[~is_nan])


def test_long_and_many_rows_become_fp32_in_pieces(rng, isa):
    for shape in ((3, 200_000), (5000, 37), (1, 65536)):
        array = tensor(rng.normal(size=shape).astype(F32), "bfloat16")
        out = np.empty(shape, F32)
        _C.to_float32(out, array)
        assert np.array_equal(out, to_float32(array))


# checksums


def slow_crc32c(data, crc=0):
    """RFC 3720 B.4, bit by bit."""
    crc ^= 0xFFFFFFFF
    for byte in bytes(data):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_crc32c_has_the_values_of_the_rfc():
    assert _C.crc32c(b"123456789") == 0xE3069283
    assert _C.crc32c(bytes(32)) == 0x8A9136AA
    assert _C.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _C.crc32c(bytes(range(32))) == 0x46DD794E
    assert _C.crc32c(b"") == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 9), st.floats(0, 1), st.integers(0, 2**32))
def test_crc32c_of_any_length_place_and_split(n, offset, share, seed):
    data = np.random.default_rng(seed).integers(0, 256, size=n + offset, dtype=np.uint8)[offset:]
    cut = round(share * n)
    whole, first, second = (_C.crc32c(part) for part in (data, data[:cut], data[cut:]))
    assert whole == slow_crc32c(data)
    assert _C.crc32c(data[cut:], first) == whole
    assert _C.crc32c_combine(first, second, n - cut) == whole


@FEW
@given(cases, st.integers(1, 2), st.sampled_from(FORMS), st.sampled_from([0, 7]))
def test_extraction_sums_the_bases_elements(case, planes, form, padding):
    base, finetuned = hard_pair(**case)
    expected = _C.crc32c(base.tobytes())
    for where in everywhere():
        assert extract_with_checksum(strided(base, padding), finetuned, planes, form)[1] == expected, where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(301, 1000), (17, 5001), (2, 40001)], ids=str)
def test_checksums_of_many_tasks_are_joined(rng, dtype, shape):
    base, finetuned = pair(rng, *shape, dtype)
    expected = _C.crc32c(base.tobytes())
    for where in everywhere():
        assert extract_with_checksum(base, finetuned, 1, "row")[1] == expected, where
