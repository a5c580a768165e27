"""What the Python layer adds to the kernels: panels for many rows, merged weights, results' kinds, the Delta."""

import copy
import importlib
import pickle

import numpy as np
import pytest
from conftest import DTYPES, KINDS, TOLERANCE, bits, pair, tensor

import bitdelta
from bitdelta import _C, reference
from bitdelta.array import aligned_empty, dtype_name, empty_like, to_float32
from bitdelta.delta import extract_with_checksum

panels = importlib.import_module("bitdelta.linear")
F32 = np.float32
N, K = 50, 300
FEW, MANY = _C.STREAM_ROWS, _C.STREAM_ROWS + 5


class OnlyDLPack:
    """A tensor of which nothing is known but __dlpack__ and a shape."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture
def case(rng):
    """Base fp32 [N, K] and two deltas of it."""
    base, finetuned = pair(rng, N, K)
    return base, [bitdelta.extract(base, finetuned), bitdelta.extract(base, finetuned, 2, "rank1")]


def rows(rng, m, dtype="float32", kind="numpy"):
    return tensor(rng.normal(size=(m, K)), dtype, kind), rng.integers(-1, 2, m)


def close(y, expected, dtype):
    y, expected = to_float32(y), to_float32(expected)
    return np.abs(y - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("m", [1, FEW, MANY, 3 * FEW])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["fixed16", "merged"])
def test_any_number_of_rows_of_any_kind_gives_the_reference_s_product(rng, case, m, kind, dtype, precision):
    base, deltas = case
    weight, bias = tensor(base, dtype, kind), tensor(rng.normal(size=N), dtype, kind)
    x, ids = rows(rng, m, dtype, kind)
    y = bitdelta.linear(x, weight, deltas, ids, bias, precision)
    assert type(y) is type(x) and y.dtype == x.dtype and tuple(y.shape) == (m, N)
    assert close(y, reference.linear(x, weight, deltas, ids, bias, precision), dtype)


@pytest.mark.parametrize("m", [FEW, MANY])
def test_without_a_base_the_deltas_are_exact_for_any_number_of_rows(rng, case, m):
    _, deltas = case
    x, ids = rows(rng, m)
    assert np.array_equal(
        bits(bitdelta.linear(x, None, deltas, ids)), bits(reference.linear(x, None, deltas, ids))
    )


@pytest.mark.parametrize("precision", ["fixed16", "float32", "merged"])
@pytest.mark.parametrize("m", [FEW, MANY])
def test_rows_of_the_base_have_the_bits_of_a_call_of_the_base_alone(rng, case, m, precision):
    base, deltas = case
    x, ids = rows(rng, m)
    mixed = bitdelta.linear(x, base, deltas, ids, precision=precision)
    alone = bitdelta.linear(x, base, deltas, np.full(m, -1), precision=precision)
    assert (ids == -1).any() and np.array_equal(bits(mixed[ids == -1]), bits(alone[ids == -1]))


@pytest.mark.parametrize("precision", ["fixed16", "merged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_height_of_a_panel_changes_only_the_order_of_sums(rng, case, monkeypatch, dtype, precision):
    base, deltas = case
    weight = tensor(base, dtype)
    x, ids = rows(rng, MANY)
    whole = bitdelta.linear(x, weight, deltas, ids, precision=precision)
    monkeypatch.setattr(panels, "PANEL_BYTES", 1)  # 16 rows a panel: 50 = 16 + 16 + 16 + 2
    assert close(bitdelta.linear(x, weight, deltas, ids, precision=precision), whole, "float32")


def test_merged_rounds_the_merged_weight_to_the_dtype_of_the_base(rng):
    base, delta_weight = np.ones((1, K), F32), np.full((1, K), 1 + 2.0**-8, F32)
    weight = tensor(base, "bfloat16")
    d = bitdelta.extract(weight, delta_weight)  # 1 + 2^-8 is a tie in bf16, and goes to 1
    x = np.ones((MANY, K), F32)
    assert (bitdelta.linear(x, weight, [d], [0] * MANY, precision="merged") == K).all()
    assert (bitdelta.linear(x, weight, [d], [0] * MANY) == K + K * 2.0**-8).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [FEW, MANY])
@pytest.mark.parametrize("precision", ["fixed16", "merged"])
def test_rows_may_lie_apart(rng, case, dtype, m, precision):
    base, deltas = case
    x, ids = rows(rng, m, dtype)
    weight = tensor(base, dtype)
    wide_x, wide_weight = empty_like(x, (2 * m, K + 7)), empty_like(weight, (2 * N, K + 3))
    wide_x[::2, :K], wide_weight[1::2, :K] = x, weight
    out = empty_like(x, (m, N + 5))[:, :N]
    y = bitdelta.linear(wide_x[::2, :K], wide_weight[1::2, :K], deltas, ids, precision=precision, out=out)
    assert y is out and close(y, reference.linear(x, weight, deltas, ids, precision=precision), dtype)


@pytest.mark.parametrize("m", [FEW, MANY])
def test_out_may_be_of_another_kind_and_dtype(rng, case, m):
    import torch

    base, deltas = case
    x, ids = rows(rng, m)
    out = torch.empty((m, N), dtype=torch.bfloat16)
    assert bitdelta.linear(x, base, deltas, ids, out=out) is out
    assert close(out, reference.linear(x, base, deltas, ids), "bfloat16")


@pytest.mark.parametrize("precision", ["fixed16", "merged"])
@pytest.mark.parametrize("m", [FEW, MANY])
def test_a_weight_that_only_speaks_dlpack_is_enough(rng, case, m, precision):
    base, deltas = case
    x, ids = rows(rng, m)
    for dtype in ("float32", "float16"):
        weight = tensor(base, dtype)
        y = bitdelta.linear(x, OnlyDLPack(weight), deltas, ids, precision=precision)
        assert close(y, bitdelta.linear(x, weight, deltas, ids, precision=precision), "float32")


@pytest.mark.parametrize("precision", ["fixed16", "merged"])
def test_no_rows_give_no_rows(case, precision):
    base, deltas = case
    assert bitdelta.linear(np.zeros((0, K), F32), base, deltas, [], precision=precision).shape == (0, N)
    assert bitdelta.linear_transposed(np.zeros((0, N), F32), deltas, []).shape == (0, K)


@pytest.mark.parametrize("m", [FEW, MANY])
def test_a_row_of_nan_is_nan_and_no_other(rng, case, m):
    base, deltas = case
    x, _ = rows(rng, m)
    x[1, 7] = np.nan
    y = bitdelta.linear(x, base, deltas, [0] * m)
    assert (bits(y[1]) == 0x7FC00000).all() and np.isfinite(np.delete(y, 1, axis=0)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["fixed16", "merged"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_beyond_the_dtype_is_infinite_without_a_warning(case, dtype, precision):
    base, deltas = case
    x = np.full((MANY, K), 3e38, F32)
    y = bitdelta.linear(x, tensor(np.abs(base), dtype), deltas, [-1] * MANY, precision=precision)
    assert np.isposinf(y).all()


def test_transposed_and_added_are_of_the_kind_of_their_argument(rng, case):
    import torch

    _, deltas = case
    dy = torch.from_numpy(rng.normal(size=(3, N)).astype(F32)).to(torch.float16)
    g = bitdelta.linear_transposed(dy, deltas, [0, 1, -1])
    assert g.dtype == torch.float16 and g.shape == (3, K) and not g[2].any()
    assert np.array_equal(bits(g), bits(reference.linear_transposed(dy, deltas, [0, 1, -1])))
    out = np.empty((3, K), F32)
    assert bitdelta.linear_transposed(dy, deltas, [0, 1, -1], out=out) is out
    y, x = torch.zeros((2, N)), torch.ones((2, K))
    assert bitdelta.linear_add(y, x, deltas, torch.tensor([1, -1])) is y
    assert y[0].any() and not y[1].any()


# errors


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x": [[1.0] * K]}, TypeError, "x: expected a tensor"),
        ({"x": np.ones(K, F32)}, ValueError, r"x: expected a matrix \[M, K\], got \[300\]"),
        ({"x": np.ones((MANY, K + 1), F32)}, ValueError, r"weight: expected .*301"),
        ({"x": np.ones((MANY, K), np.float64)}, TypeError, "x: expected .*float64"),
        ({"weight": np.ones(K, F32)}, ValueError, "weight: expected"),
        ({"weight": "text"}, TypeError, "weight: expected"),
        ({"weight": None, "deltas": [], "precision": "fixed16"}, ValueError, "deltas: expected at least one"),
        ({"deltas": [None]}, TypeError, "deltas: expected a sequence of bitdelta.Delta, got NoneType"),
        ({"deltas": 3}, TypeError, "deltas: expected a sequence of bitdelta.Delta, got int"),
        ({"ids": [0] * (MANY - 1)}, ValueError, "tenant_ids: expected"),
        ({"ids": [0] * (MANY - 1) + [2]}, ValueError, "tenant_ids: expected -1 .. 1, got 2"),
        ({"ids": [0] * (MANY - 1) + [-2]}, ValueError, "tenant_ids: expected -1 .. 1, got -2"),
        ({"ids": np.zeros(MANY, F32)}, TypeError, "tenant_ids: expected"),
        ({"bias": np.ones(N + 1, F32)}, ValueError, "bias: expected"),
        ({"precision": "double"}, ValueError, "precision: expected"),
    ],
)
@pytest.mark.parametrize("precision", ["fixed16", "merged"])
def test_wrong_arguments_are_named(case, arguments, error, message, precision):
    base, deltas = case
    given = {"x": np.ones((MANY, K), F32), "weight": base, "deltas": deltas, "ids": [0] * MANY, "bias": None}
    given |= {"precision": precision, **arguments}
    ids = given.pop("ids")
    with pytest.raises(error, match=message):
        bitdelta.linear(tenant_ids=ids, **given)


def test_merged_needs_the_base(case):
    with pytest.raises(ValueError, match="weight: expected the base weight"):
        bitdelta.linear(np.ones((1, K), F32), None, case[1], [0], precision="merged")


@pytest.mark.parametrize("m", [1, MANY])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_torch_weight_that_asks_for_gradients_is_refused_by_name(rng, case, m, dtype):
    base, deltas = case
    weight = tensor(base, dtype, "torch").requires_grad_()
    with pytest.raises(BufferError, match="weight.*detach"):
        bitdelta.linear(rows(rng, m)[0], weight, deltas, [0] * m)


# the Delta


def test_a_delta_knows_its_size_and_copies_keep_its_bytes(case):
    d = case[1][1]
    assert d.planes == 2 and d.shape == (N, K)
    assert d.nbytes == 2 * (4 * 16 * 16 * 4 + 4 * N + 4 * K)
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert np.array_equal(other.sign, d.sign) and other.sign.ctypes.data % 64 == 0
        assert np.array_equal(other.scale, d.scale) and np.array_equal(other.column, d.column)
        assert other.form == "rank1" and np.array_equal(other.expand(None), d.expand(None))


def test_a_delta_is_frozen_and_keeps_its_arrays(case):
    d = case[1][0]
    with pytest.raises(AttributeError):
        d.scale = None
    again = bitdelta.Delta(d.sign, d.scale, d.column, [N, K])
    assert again.sign is d.sign and again.shape == (N, K)


def test_a_delta_that_does_not_fit_together_is_refused(case):
    d = case[1][0]
    unaligned = aligned_empty((d.sign.size + 1,), np.uint32)[1:].reshape(d.sign.shape)
    for error, message, arguments in (
        (ValueError, "form: expected", (d.sign, d.scale, None, (N, K), "rows")),
        (ValueError, "column: expected", (d.sign, d.scale, None, (N, K), "rank1")),
        (ValueError, "column: expected", (d.sign, d.scale, np.ones((1, K), F32), (N, K), "row")),
        (ValueError, "sign: expected", (d.sign, d.scale, None, (N, K + 256))),
        (ValueError, "scale: expected", (d.sign, d.scale[:, 1:].copy(), None, (N, K))),
        (TypeError, "scale: expected", (d.sign, d.scale.astype(np.float64), None, (N, K))),
        (TypeError, "sign: expected", (d.sign.astype(np.int64), d.scale, None, (N, K))),
        (BufferError, "sign: expected", (unaligned, d.scale, None, (N, K))),
    ):
        with pytest.raises(error, match=message):
            bitdelta.Delta(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_gives_the_base_s_kind_and_may_overwrite_it(rng, dtype, kind):
    base, finetuned = (tensor(weight, dtype, kind) for weight in pair(rng, N, K))
    d = bitdelta.extract(base, finetuned, 2)
    made = d.expand(base)
    assert type(made) is type(base) and dtype_name(made) == dtype
    assert np.array_equal(bits(made), bits(reference.expand(base, d)))
    assert d.expand(base, out=base) is base and np.array_equal(bits(base), bits(made))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"planes": 0}, ValueError, "planes: expected 1 to 8, got 0"),
        ({"planes": 9}, ValueError, "planes: expected 1 to 8, got 9"),
        ({"planes": 1.0}, TypeError, "planes: expected a whole number, got float"),
        ({"scale": "column"}, ValueError, "scale: expected 'tensor', 'row' or 'rank1', got 'column'"),
        (
            {"finetuned": np.ones((2, 4), F32)},
            ValueError,
            r"finetuned: expected \[2, 3\] as base, got \[2, 4\]",
        ),
        ({"finetuned": np.ones((2, 3))}, TypeError, "finetuned: expected .*float64"),
        ({"base": np.ones(3, F32)}, ValueError, r"base: expected a matrix \[N, K\], got \[3\]"),
        ({"base": [[1.0] * 3] * 2}, TypeError, "base: expected a tensor"),
        (
            {"finetuned": F32([[0, 0, 0], [0, np.inf, 0]])},
            ValueError,
            r"finetuned: .*NaN or Inf at \[1, 1\]",
        ),
    ],
)
def test_extract_names_what_is_wrong(arguments, error, message):
    given = {"base": np.ones((2, 3), F32), "finetuned": np.ones((2, 3), F32)} | arguments
    with pytest.raises(error, match=message):
        bitdelta.extract(**given)


def test_the_checksum_is_that_of_the_base_s_bytes(rng):
    base, finetuned = pair(rng, 5, 33)
    d, checksum = extract_with_checksum(base, finetuned, 1, "tensor")
    assert checksum == _C.crc32c(base) and d.form == "tensor"


def test_rank1_scales_beyond_fp32_are_an_error_and_not_infinite():
    base = np.zeros((2, 3000), F32)
    finetuned = base.copy()
    finetuned[0, 0] = finetuned[1, 0] = 3.4e38  # one column 3000 times the mean, times rows of the mean
    for planes in (1, 8):
        try:
            d = bitdelta.extract(base, finetuned, planes, "rank1")
        except ValueError as error:
            assert "within fp32" in str(error)
        else:
            assert np.isfinite(d.scale).all() and np.isfinite(d.column).all()
