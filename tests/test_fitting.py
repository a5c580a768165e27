"""Signs and scales of one weight fitted to inputs: the kernel against its definition, and what fitting gains."""

import numpy as np
import pytest
from conftest import pair, tensor

import bitdelta
from bitdelta import _C, reference_calibrate
from bitdelta.array import aligned_empty, to_float32
from bitdelta.delta import extract
from bitdelta.fitting import Inputs, _Fit, fit, output_errors
from bitdelta.reference import unpack


def some_inputs(rng, k, tokens=400):
    """Inputs as a layer sees them: a few directions hold most, a few columns are large."""
    spectrum = 1 / np.arange(1, k + 1)
    x = rng.normal(size=(tokens, k)) * spectrum @ rng.normal(size=(k, k)) * np.exp(rng.normal(size=k) / 2)
    return x.astype(np.float32)


def hessian(x):
    return Inputs(x.T @ x)


def error(base, finetuned, delta, x):
    (wrong,), total = output_errors(to_float32(finetuned) - to_float32(base), [delta], x)
    return wrong / total


def run(d, factor, order, row, column=None):
    N, K = d.shape
    sign = aligned_empty((len(row), -(-N // 16), 8 * -(-K // 256), 16), np.uint32)
    sign[...] = 0xDEADBEEF
    _C.fit_signs(d, factor, order, row, column, sign)
    return sign


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 32), (35, 70), (40, 258)])
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("has_column", [False, True])
def test_kernel_gives_the_bits_of_the_definition(rng, isa, shape, planes, has_column):
    n, k = shape
    d = rng.normal(scale=0.01, size=shape).astype(np.float32)
    inputs = hessian(some_inputs(rng, k, 2 * k + 3))
    row = np.abs(rng.normal(scale=0.01, size=(planes, n))).astype(np.float32)
    column = np.exp(rng.normal(size=(planes, k))).astype(np.float32) if has_column else None
    expected = reference_calibrate.fit_signs(d, inputs.factor, inputs.order, row, column)
    assert np.array_equal(run(d, inputs.factor, inputs.order, row, column), expected)


@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (20, 258)])
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("has_column", [False, True])
@pytest.mark.parametrize("is_diagonal", [False, True])
def test_sweep_gives_the_bits_of_the_definition(rng, isa, shape, planes, has_column, is_diagonal):
    n, k = shape
    inputs = hessian(some_inputs(rng, k, 2 * k + 3))
    h = np.diagonal(inputs.damped).copy() if is_diagonal else inputs.damped
    pull = rng.normal(scale=0.01, size=shape).astype(np.float32) * np.diagonal(inputs.damped)
    row = np.abs(rng.normal(scale=0.01, size=(planes, n))).astype(np.float32)
    row[:, 0] = 0  # every level is the same: nothing moves
    column = np.exp(rng.normal(size=(planes, k))).astype(np.float32) if has_column else None
    sign = extract(pull, np.zeros(shape, np.float32), planes).sign
    before = sign.copy()
    expected = reference_calibrate.sweep(pull, h, row, column, sign)
    _C.sweep(pull, h, row, column, sign)
    assert np.array_equal(sign, expected[0]) and np.array_equal(pull, expected[1])
    assert n == 1 or (sign != before).any()


def test_eight_planes_without_feedback_are_the_nearest_levels(rng):
    d = rng.normal(size=(17, 20)).astype(np.float32)
    row = np.abs(rng.normal(size=(8, 17))).astype(np.float32)
    order = np.arange(20)
    expected = reference_calibrate.fit_signs(d, None, order, row, None)
    assert np.array_equal(run(d, None, order, row), expected)


def test_equal_levels_give_plus(rng):
    zero = np.zeros((3, 40), np.float32)
    sign = run(zero, None, np.arange(40), np.ones((1, 3), np.float32))
    assert np.array_equal(sign, extract(zero, zero).sign)


def test_threads_do_not_change_the_signs(rng):
    d = rng.normal(size=(100, 90)).astype(np.float32)
    inputs, row = hessian(some_inputs(rng, 90)), np.ones((2, 100), np.float32)
    results, pulls = [], []
    for n in (1, 3):
        bitdelta.set_num_threads(n)
        results.append(run(d, inputs.factor, inputs.order, row))
        pulls.append(inputs.weigh(d))
        _C.sweep(pulls[-1], inputs.damped, row, None, results[-1])
    assert np.array_equal(*results) and np.array_equal(*pulls)


def test_factor_is_of_the_damped_inputs(rng):
    inputs = hessian(some_inputs(rng, 50))
    upper = np.tril(inputs.factor.astype(np.float64), -1).T + np.eye(50)
    ordered = inputs.damped[np.ix_(inputs.order, inputs.order)].astype(np.float64)
    diagonal = np.linalg.inv(upper) @ ordered @ np.linalg.inv(upper).T
    assert np.allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-4 * np.abs(ordered).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fitted_signs_beat_fitted_scales_beat_mean(rng, dtype):
    base, finetuned = pair(rng, 48, 64, dtype)
    x = some_inputs(rng, 64)
    seen, unseen = x[:300], x[300:]
    plain = extract(base, finetuned)
    scales = fit(base, finetuned, hessian(seen), fit="scales")
    signs = fit(base, finetuned, hessian(seen))
    same = unpack(scales.sign[0], 48, 64) == unpack(plain.sign[0], 48, 64)
    assert (same.all(axis=1) | ~same.any(axis=1)).all()  # a row whose best scale is negative turns over
    errors = [error(base, finetuned, delta, unseen) for delta in (signs, scales, plain)]
    assert errors[0] < 0.7 * errors[1] and errors[1] < errors[2]


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
@pytest.mark.parametrize("planes", [1, 2])
def test_every_form_gains(rng, scale, planes):
    base, finetuned = pair(rng, 40, 72)
    x = some_inputs(rng, 72, 800)
    plain = extract(base, finetuned, planes, scale)
    for what in ("scales", "signs"):
        delta = fit(base, finetuned, hessian(x), planes, scale, fit=what)
        assert (delta.form, delta.planes, delta.shape) == (scale, planes, (40, 72))
        assert (delta.scale >= 0).all() and (delta.column is None or (delta.column >= 0).all())
        assert error(base, finetuned, delta, x) < error(base, finetuned, plain, x)
        if scale == "tensor":
            assert (delta.scale == delta.scale[:, :1]).all()


def test_planes_chosen_together_beat_one_after_the_other(rng):
    base, finetuned = pair(rng, 48, 96)
    x = some_inputs(rng, 96, 800)
    one = fit(base, finetuned, hessian(x), 1)
    rest = fit(one.expand(base), finetuned, hessian(x), 1)
    greedy = error(one.expand(base), finetuned, rest, x) * error(base, finetuned, one, x)
    assert error(base, finetuned, fit(base, finetuned, hessian(x), 2, rounds=8), x) < greedy


def test_padding_stays_zero_when_signs_turn_over(rng):
    base = np.zeros((3, 5), np.float32)
    finetuned = rng.normal(size=(3, 5)).astype(np.float32)
    x = rng.normal(size=(2, 5)).astype(np.float32)
    for scale in ("row", "rank1"):
        delta = fit(base, finetuned, hessian(x), 2, scale, rounds=4)
        words = delta.sign.copy()
        words[:, 0, 0, :3] &= ~np.uint32(31)
        assert not words.any()


def test_fewer_tokens_than_columns_and_dead_columns_are_fine(rng):
    base, finetuned = pair(rng, 20, 64)
    x = some_inputs(rng, 64, 10)
    x[:, 3] = 0
    delta = fit(base, finetuned, hessian(x))
    assert np.isfinite(delta.scale).all()
    assert error(base, finetuned, delta, x) < error(base, finetuned, extract(base, finetuned), x)


def test_inputs_of_zeros_and_equal_weights_are_fine(rng):
    base, finetuned = pair(rng, 20, 64)
    assert np.isfinite(fit(base, finetuned, hessian(np.zeros((5, 64), np.float32))).scale).all()
    same = fit(base, base, hessian(some_inputs(rng, 64)), 2, "rank1")
    assert not same.scale.any()


def test_a_diagonal_is_a_hessian(rng):
    base, finetuned = pair(rng, 20, 64)
    counts = rng.integers(0, 9, 64).astype(np.float32)
    a, b = fit(base, finetuned, Inputs(counts), 2), fit(base, finetuned, Inputs(np.diag(counts)), 2)
    assert np.array_equal(a.sign, b.sign) and np.allclose(a.scale, b.scale, rtol=1e-4)


def test_nan_in_inputs_is_refused():
    with pytest.raises(ValueError, match="inputs: NaN or Inf"):
        Inputs(np.full((3, 3), np.nan, np.float32))


def fit_arguments():
    return {
        "d": np.zeros((3, 5), np.float32),
        "factor": np.eye(5, dtype=np.float32),
        "order": np.arange(5),
        "row": np.ones((1, 3), np.float32),
        "column": None,
        "sign": aligned_empty((1, 1, 8, 16), np.uint32),
    }


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        ("d", np.zeros((3, 5)), TypeError, "d: expected float32"),
        ("d", np.zeros(5, np.float32), ValueError, "d: expected"),
        ("factor", np.zeros((4, 5), np.float32), ValueError, "factor: expected"),
        ("order", np.arange(5, dtype=np.int32), TypeError, "order: expected int64"),
        ("order", np.array([0, 1, 2, 3, 5]), ValueError, "order: expected columns 0 .. 4"),
        ("order", np.array([0, 1, 2, 3, -1]), ValueError, "order: expected columns"),
        ("row", np.ones((1, 4), np.float32), ValueError, "row: expected"),
        ("row", np.ones((9, 3), np.float32), ValueError, "row: expected 1 .. 8 planes"),
        ("column", np.ones((2, 5), np.float32), ValueError, "column: expected"),
        ("sign", aligned_empty((2, 1, 8, 16), np.uint32), ValueError, "sign: expected"),
        ("sign", aligned_empty((1, 1, 8, 16), np.int32), TypeError, "sign: expected uint32"),
    ],
)
def test_wrong_arguments_are_named(name, value, kind, text):
    with pytest.raises(kind, match=text):
        _C.fit_signs(*(fit_arguments() | {name: value}).values())


def sweep_arguments():
    return {
        "pull": np.zeros((3, 5), np.float32),
        "hessian": np.eye(5, dtype=np.float32),
        "row": np.ones((1, 3), np.float32),
        "column": None,
        "sign": aligned_empty((1, 1, 8, 16), np.uint32),
    }


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        ("pull", np.zeros((3, 5)), TypeError, "pull: expected float32"),
        ("pull", np.zeros(5, np.float32), ValueError, "pull: expected"),
        ("pull", np.zeros((5, 3), np.float32).T, BufferError, "pull"),
        ("hessian", np.zeros((4, 5), np.float32), ValueError, "hessian: expected"),
        ("hessian", np.zeros(4, np.float32), ValueError, "hessian: expected"),
        ("hessian", np.zeros(5), TypeError, "hessian: expected float32"),
        ("row", np.ones((1, 4), np.float32), ValueError, "row: expected"),
        ("column", np.ones((2, 5), np.float32), ValueError, "column: expected"),
        ("sign", aligned_empty((1, 1, 8, 16), np.int32), TypeError, "sign: expected uint32"),
    ],
)
def test_wrong_arguments_of_a_sweep_are_named(name, value, kind, text):
    with pytest.raises(kind, match=text):
        _C.sweep(*(sweep_arguments() | {name: value}).values())


def test_outputs_of_a_sweep_may_not_share_memory():
    h = np.zeros((5, 5), np.float32)
    with pytest.raises(BufferError, match="pull"):
        _C.sweep(*(sweep_arguments() | {"hessian": h, "pull": h[:3]}).values())


def test_inputs_may_not_share_memory_with_the_signs():
    sign = aligned_empty((1, 1, 8, 16), np.uint32)
    arguments = fit_arguments() | {"sign": sign, "row": sign.view(np.float32).reshape(-1)[:3].reshape(1, 3)}
    with pytest.raises(BufferError, match="sign"):
        _C.fit_signs(*arguments.values())


def test_torch_tensors_are_taken(rng):
    base, finetuned = pair(rng, 20, 40)
    x = some_inputs(rng, 40)
    expected = fit(base, finetuned, hessian(x))
    delta = fit(tensor(base, kind="torch"), tensor(finetuned, kind="torch"), hessian(x))
    assert np.array_equal(delta.sign, expected.sign)


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
@pytest.mark.parametrize("planes", [1, 2])
def test_a_weight_may_be_turned_around(rng, scale, planes):
    base, finetuned = pair(rng, 72, 40)  # [in, out]
    x = some_inputs(rng, 72, 800)
    d = finetuned - base
    plain = extract(base, finetuned, planes, scale)
    deltas = {}
    for what in ("scales", "signs"):
        delta = fit(base, finetuned, hessian(x), planes, scale, fit=what, is_turned=True)
        assert (delta.form, delta.planes, delta.shape) == (scale, planes, (72, 40))
        assert (delta.scale >= 0).all()
        deltas[what] = delta
    errors, total = output_errors(d, [deltas["signs"], deltas["scales"], plain], x, is_turned=True)
    assert errors == sorted(errors)
    assert np.allclose(total, output_errors(d.T, [], x)[1])


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_sweep_lowers_the_error(rng, scale, planes, is_turned):
    n, k = (24, 40) if is_turned else (40, 24)
    base, finetuned = pair(rng, n, k)
    d = finetuned - base
    state = _Fit(
        d.T.copy() if is_turned else d,
        hessian(some_inputs(rng, 24)),
        extract(base, finetuned, planes, scale),
        is_turned,
    )
    state.keep()
    before = state.least
    for _ in range(4):
        state.sweep()
        state.keep()
    assert state.least < 0.9 * before
    last = state.best.sign.copy()
    state.sweep()
    state.keep()
    assert np.mean(last == state.best.sign) > 0.7  # it comes to rest
