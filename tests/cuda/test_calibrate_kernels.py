"""Signs fitted on the GPU, and swept: the bits of the scalar core."""

import numpy as np
import pytest
from conftest import bits

from bitdelta import _C, reference
from bitdelta.array import aligned_empty

F32 = np.float32


def fit_on_both(kernels, d, factor, order, row, column):
    n, k = d.shape
    signs = [aligned_empty((len(row), -(-n // 16), 8 * -(-k // 256), 16), np.uint32) for _ in range(2)]
    for sign in signs:
        sign[...] = 0xA5A5A5A5
    kernels.fit_signs(d, factor, order, row, column, signs[0])
    _C.fit_signs(d, factor, order, row, column, signs[1])
    assert np.array_equal(*signs)


def arguments(rng, n, k, planes, has_column=False):
    row = rng.normal(scale=0.02, size=(planes, n)).astype(F32)
    column = rng.uniform(0.25, 4, (planes, k)).astype(F32) if has_column else None
    return rng.normal(scale=0.03, size=(n, k)).astype(F32), rng.permutation(k), row, column


@pytest.mark.parametrize("has_column", [False, True])
@pytest.mark.parametrize("planes", [1, 2, 5, 8])
def test_fitted_signs_are_those_of_the_core(kernels, rng, planes, has_column):
    n, k = 20, 150
    d, order, row, column = arguments(rng, n, k, planes, has_column)
    factor = (0.3 * rng.normal(size=(k, k))).astype(F32)
    fit_on_both(kernels, d, factor, order, row, column)


@pytest.mark.parametrize("n, k", [(1, 1), (16, 64), (33, 260), (3, 65)])
def test_shapes_around_strips_and_panels(kernels, rng, n, k):
    d, order, row, column = arguments(rng, n, k, 2)
    fit_on_both(kernels, d, (0.3 * rng.normal(size=(k, k))).astype(F32), order, row, column)
    fit_on_both(kernels, d, None, order, row, column)


def test_of_equal_distances_the_highest_level_is_taken(kernels):
    d = np.zeros((4, 70), F32)
    row = np.array([[1.0, 0.0, -1.0, 2.0]] * 3, F32)
    fit_on_both(kernels, d, None, np.arange(70), row, None)


def test_errors_that_overflow_take_the_levels_of_the_core(kernels, rng):
    d, order, row, column = arguments(rng, 16, 80, 2)
    factor = np.full((80, 80), 3e38, F32) * rng.choice([-1, 1], (80, 80)).astype(F32)
    fit_on_both(kernels, d, factor, order, row, column)


def test_columns_that_do_not_exist_are_left_out(kernels, rng):
    d, order, row, _ = arguments(rng, 16, 40, 1)
    order[3], order[5] = -1, 40
    sign = aligned_empty((1, 1, 8, 16), np.uint32)
    kernels.fit_signs(d, None, order, row, None, sign)
    assert not sign[0, 0, 2:].any()


@pytest.mark.parametrize("has_column", [False, True])
@pytest.mark.parametrize("planes", [1, 2, 6])
@pytest.mark.parametrize("is_diagonal", [False, True])
def test_a_sweep_has_the_bits_of_the_core(kernels, rng, planes, has_column, is_diagonal):
    n, k = 19, 150
    d, _, row, column = arguments(rng, n, k, planes, has_column)
    x = rng.normal(size=(2 * k, k)).astype(F32)
    hessian = np.ascontiguousarray(np.diag(x.T @ x)) if is_diagonal else x.T @ x
    sign = aligned_empty((planes, 2, 8, 16), np.uint32)
    sign[...] = [reference.pack(rng.random((n, k)) < 0.5) for _ in range(planes)]
    pull = d * hessian if is_diagonal else d @ hessian
    mine, before = (pull.copy(), aligned_copy(sign)), sign.copy()
    for _ in range(2):
        _C.sweep(pull, hessian, row, column, sign)
        kernels.sweep(mine[0], hessian, row, column, mine[1])
        assert np.array_equal(mine[1], sign)
        assert np.array_equal(bits(mine[0]), bits(pull))
    assert not np.array_equal(sign, before)


def aligned_copy(sign):
    copy = aligned_empty(sign.shape, np.uint32)
    copy[...] = sign
    return copy


# ---- through the module ----


def on_device(device, arrays):
    return [None if each is None else device.put(each) for each in arrays]


def scratch(device, n, k):
    memory = device.put(aligned_empty((_C.cuda_workspace_bytes("fit", n, k) + 256,), np.uint8, 256))
    address = memory.ctypes.data if isinstance(memory, np.ndarray) else memory.data_ptr()
    return memory[-address % 256 :]


@pytest.mark.parametrize("has_column", [False, True])
def test_the_module_fits_and_sweeps_with_the_bits_of_the_core(device, rng, has_column):
    n, k, planes = 19, 70, 2
    d, order, row, column = arguments(rng, n, k, planes, has_column)
    factor = (0.3 * rng.normal(size=(k, k))).astype(F32)
    expected = aligned_empty((planes, 2, 8, 16), np.uint32)
    sign = device.put(aligned_copy(expected))
    _C.fit_signs(d, factor, order, row, column, expected)
    _C.cuda_fit_signs(*on_device(device, [d, factor, order, row, column]), sign, scratch(device, n, k))
    assert np.array_equal(device.get(sign), expected)
    x = rng.normal(size=(2 * k, k)).astype(F32)
    for hessian in (x.T @ x, np.ascontiguousarray(np.diag(x.T @ x))):
        pull = (d @ hessian if hessian.ndim == 2 else d * hessian).astype(F32)
        mine = device.put(pull.copy())
        before = expected.copy()
        _C.sweep(pull, hessian, row, column, expected)
        _C.cuda_sweep(mine, *on_device(device, [hessian, row, column]), sign)
        assert np.array_equal(device.get(sign), expected)
        assert np.array_equal(bits(device.get(mine)), bits(pull))
        assert not np.array_equal(before, expected)
