"""The public functions on GPU tensors: the bits of the CPU, and the errors of bad input."""

import numpy as np
import pytest
import torch
from conftest import bits, pair, tensor

import bitdelta
from bitdelta import _C, cuda, cuda_memory, ops

N, K = 40, 300


@pytest.fixture
def gpu(device):
    """Puts values on the GPU as torch tensors."""
    return lambda values: values if _C.cuda_is_emulated() else values.cuda()


@pytest.fixture
def routed(device, monkeypatch):
    monkeypatch.setenv("BITDELTA_DEVICE", "emulated")


def some_deltas(rng):
    weights = [pair(rng, N, K) for _ in range(3)]
    kinds = [(1, "row"), (2, "rank1"), (3, "tensor")]
    return [
        bitdelta.extract(*weight, planes=planes, scale=scale)
        for weight, (planes, scale) in zip(weights, kinds, strict=True)
    ]


def rows(rng, n, dtype="float32"):
    return tensor(rng.normal(size=(n, K)), dtype, "torch")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_delta_terms_and_bias_have_the_bits_of_the_cpu(gpu, rng, dtype):
    deltas, x = some_deltas(rng), rows(rng, 9, dtype)
    ids = [0, 2, -1, 1, 2, 2, 2, 2, 2]
    bias = tensor(rng.normal(size=N), dtype, "torch")
    expected = bitdelta.linear(x, None, deltas, ids, bias)
    given = gpu(torch.tensor(ids))
    for tenant_ids in (ids, given, cuda.plan(ids, 9, 3, gpu(x))):
        y = cuda.linear(gpu(x), None, deltas, tenant_ids, gpu(bias))
        assert np.array_equal(bits(y.cpu()), bits(expected))


def test_the_base_product_is_added_before_the_one_rounding(gpu, rng):
    deltas, x = some_deltas(rng), rows(rng, 5)
    weight, ids = tensor(rng.normal(size=(N, K)), "float32", "torch"), [0, 1, 2, -1, 1]
    y = cuda.linear(gpu(x), gpu(weight), deltas, ids).cpu()
    assert torch.allclose(y, bitdelta.linear(x, weight, deltas, ids), rtol=1e-5, atol=1e-4)
    assert torch.allclose(y[3], x[3] @ weight.T, rtol=1e-5, atol=1e-4)


def test_adding_to_a_product_leaves_base_rows_as_they_are(gpu, rng):
    deltas, x, y = some_deltas(rng), rows(rng, 4), torch.randn(4, N)
    expected = bitdelta.linear_add(y.clone(), x, deltas, [1, -1, 0, 2])
    got = cuda.linear_add(gpu(y.clone()), gpu(x), deltas, [1, -1, 0, 2]).cpu()
    assert torch.equal(got, expected)
    assert torch.equal(got[1], y[1])


def test_rows_of_ids_out_of_range_and_of_empty_slots_are_nan(gpu, rng):
    deltas, x = some_deltas(rng), rows(rng, 4)
    y = cuda.linear(gpu(x), None, [deltas[0], None], gpu(torch.tensor([0, 2, 1, -5]))).cpu()
    assert torch.equal(y[0], bitdelta.linear(x[:1], None, deltas, [0])[0])
    assert y[1:].isnan().all()


def test_ids_on_the_host_are_checked(gpu, rng):
    deltas, x = some_deltas(rng), rows(rng, 2)
    with pytest.raises(ValueError, match=r"tenant_ids: expected -1 .. 2, got 3 at row 1"):
        cuda.linear(gpu(x), None, deltas, [0, 3])
    with pytest.raises(ValueError, match=r"tenant_ids: expected \[M\] = \[2\], got \[3\]"):
        cuda.linear(gpu(x), None, deltas, [0, 1, 2])
    with pytest.raises(TypeError, match="tenant_ids: expected integers, got float64"):
        cuda.linear(gpu(x), None, deltas, [0.5, 1])


def test_a_table_is_made_once_and_goes_with_its_deltas(gpu, rng):
    deltas, x = some_deltas(rng), gpu(rows(rng, 1))
    before = len(cuda._tables)
    assert cuda.table(deltas, x) is cuda.table(list(deltas), x)
    assert cuda.table(deltas[:2], x) is not cuda.table(deltas, x)
    assert len(cuda._tables) == before + 2
    deltas.clear()
    assert len(cuda._tables) == before


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
@pytest.mark.parametrize("planes", [1, 2])
def test_extract_gives_the_delta_of_the_cpu(gpu, rng, scale, planes):
    base, finetuned = (torch.from_numpy(weight) for weight in pair(rng, N, K))
    got = cuda.extract(gpu(base), gpu(finetuned), planes, scale)
    expected = bitdelta.extract(base, finetuned, planes, scale)
    assert np.array_equal(got.sign, expected.sign)
    assert np.array_equal(got.scale, expected.scale)
    assert scale != "rank1" or np.array_equal(got.column, expected.column)
    out = cuda.expand(got, gpu(base), gpu(torch.empty(N, K))).cpu()
    assert torch.equal(out, expected.expand(base))


def test_extract_names_the_first_weight_that_is_not_finite(gpu, rng):
    base, finetuned = (torch.from_numpy(weight) for weight in pair(rng, N, K))
    finetuned[3, 7] = float("nan")
    with pytest.raises(ValueError, match=r"finetuned: expected finite weights.* at \[3, 7\]"):
        cuda.extract(gpu(base), gpu(finetuned))


def test_public_functions_go_to_the_gpu_of_their_tensors(gpu, routed, rng, monkeypatch):
    deltas, x = some_deltas(rng), rows(rng, 3)
    monkeypatch.delenv("BITDELTA_DEVICE")
    expected = bitdelta.linear(x, None, deltas, [0, 1, 2])
    base, finetuned = (torch.from_numpy(weight) for weight in pair(rng, N, K))
    packed = bitdelta.extract(base, finetuned)
    monkeypatch.setenv("BITDELTA_DEVICE", "emulated")
    calls = []
    for name in ("cuda_linear", "cuda_extract", "cuda_expand"):
        original = getattr(_C, name)
        monkeypatch.setattr(
            _C, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    assert torch.equal(bitdelta.linear(gpu(x), None, deltas, [0, 1, 2]).cpu(), expected)
    assert torch.equal(ops.linear(gpu(x), None, None, deltas, [0, 1, 2]).cpu(), expected)
    assert torch.equal(bitdelta.linear_add(gpu(torch.zeros(3, N)), gpu(x), deltas, [0, 1, 2]).cpu(), expected)
    assert np.array_equal(bitdelta.extract(gpu(base), gpu(finetuned)).sign, packed.sign)
    packed.expand(gpu(base))
    assert calls == ["cuda_linear"] * 3 + ["cuda_extract", "cuda_expand"]


def test_transposed_products_have_the_bits_of_the_cpu(gpu, rng):
    deltas = some_deltas(rng)
    dy = tensor(rng.normal(size=(6, N)), "bfloat16", "torch")
    ids = [2, 0, -1, 1, 2, 0]
    expected = bitdelta.linear_transposed(dy, deltas, ids)
    got = cuda.linear_transposed(gpu(dy), deltas, ids).cpu()
    assert np.array_equal(bits(got), bits(expected))
    assert not got[2].any()


def leaves(deltas, put):
    """Deltas whose scales are trained."""
    found = []
    for delta in deltas:
        sign, row = torch.from_numpy(delta.sign.view(np.int32)), torch.from_numpy(delta.scale.copy())
        column = None if delta.column is None else torch.from_numpy(delta.column.copy())
        column = None if column is None else put(column).requires_grad_()
        found.append(ops.TorchDelta(put(sign), put(row).requires_grad_(), column, delta.shape))
    return found


@pytest.mark.parametrize("with_weight", [False, True])
def test_gradients_are_those_of_the_cpu(gpu, rng, monkeypatch, with_weight):
    deltas, ids = some_deltas(rng), torch.tensor([1, 0, 1, -1, 2, 1, 2])
    x, dy = rows(rng, len(ids)), torch.from_numpy(rng.normal(size=(len(ids), N)).astype(np.float32))
    weight = tensor(rng.normal(size=(N, K)), "float32", "torch") if with_weight else None
    results = []
    for where, put in (("", lambda values: values), ("emulated", gpu)):
        monkeypatch.setenv("BITDELTA_DEVICE", where)
        trained = leaves(deltas, put)
        given = put(x.clone()).requires_grad_()
        y = ops.linear(given, None if weight is None else put(weight), None, trained, put(ids))
        y.backward(put(dy))
        scales = [each for delta in trained for each in (delta.row, delta.column) if each is not None]
        results.append([y.detach().cpu(), given.grad.cpu(), *(scale.grad.cpu() for scale in scales)])
    (y, dx, *scales), (got_y, got_dx, *got_scales) = results
    assert torch.allclose(got_y, y, rtol=1e-5, atol=1e-4)
    assert torch.allclose(got_dx, dx, rtol=1e-5, atol=1e-4)
    assert len(scales) == 4
    for got, expected in zip(got_scales, scales, strict=True):
        assert expected.abs().max() > 0
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_operators_take_parameters_and_any_strides(gpu, routed, rng):
    deltas, ids = some_deltas(rng), [0, 1, -1, 2]
    x, bias = gpu(rows(rng, 4)), gpu(torch.randn(N)).requires_grad_()
    weight = gpu(torch.randn(N, K)).requires_grad_()
    strided = x.T.contiguous().T
    with torch.no_grad():
        expected = ops.linear(x, weight, bias, deltas, ids)
        assert torch.equal(ops.linear(strided, weight, bias, deltas, ids), expected)
        y = gpu(torch.zeros(4, N))
        assert torch.equal(ops.linear_add(y, strided, deltas, ids), ops.linear(x, None, None, deltas, ids))
    assert torch.equal(ops.linear(strided, weight, bias, deltas, ids), expected)


def test_a_changed_scale_is_seen_by_the_table_that_was_made(gpu, rng):
    delta, x = leaves(some_deltas(rng)[:1], gpu)[0], gpu(rows(rng, 2))
    before = cuda.linear(x, None, [delta], [0, 0])
    with torch.no_grad():
        delta.row.mul_(2)
    assert torch.equal(cuda.linear(x, None, [delta], [0, 0]), 2 * before)
    delta.row = delta.row.detach() * 2
    assert torch.equal(cuda.linear(x, None, [delta], [0, 0]), 4 * before)


def test_bad_memory_is_named(gpu, rng):
    deltas, x = some_deltas(rng), gpu(rows(rng, 3))
    with pytest.raises(ValueError, match="precision: expected 'fixed16' or 'merged' on a GPU, got 'float32'"):
        cuda.linear(x, None, deltas, [0, 1, 2], precision="float32")
    with pytest.raises(BufferError, match="x: expected rows of contiguous columns"):
        cuda.linear(gpu(rows(rng, 6)).T.contiguous().T[:3], None, deltas, [0, 1, 2])
    with pytest.raises(BufferError, match="out: .*x"):
        cuda.linear(x, None, deltas, [0, 1, 2], out=x[:, :N])
    with pytest.raises(ValueError, match="deltas: expected K = 299 of x, got 300"):
        cuda.linear(gpu(torch.ones(3, 299)), None, deltas, [0, 1, 2])
    found = cuda.table(deltas, x)
    memory = cuda_memory.scratch(x, 4096)
    with pytest.raises(BufferError, match="plan: expected memory aligned to 256 bytes"):
        _C.cuda_plan(memory[1:], gpu(torch.tensor([0])), 3)
    with pytest.raises(ValueError, match="plan: expected at least .* bytes, got 16"):
        _C.cuda_plan(memory[:16], gpu(torch.tensor([0])), 3)
    with pytest.raises(TypeError, match="tenant_ids: expected int64, got int32"):
        _C.cuda_plan(memory, gpu(torch.tensor([0], dtype=torch.int32)), 3)
    with pytest.raises(ValueError, match=r"out: expected \[M, N\] = \[3, 40\], got \[3, 41\]"):
        cuda.linear(x, None, found, [0, 1, 2], out=gpu(torch.empty(3, 41)))


def test_without_a_gpu_the_functions_say_what_is_missing():
    if _C.cuda_missing() is None:
        pytest.skip("a GPU can be used here")
    x = np.zeros((1, 2), np.float32)
    for call in (
        lambda: cuda.linear(x, None, [], [0]),
        lambda: cuda.extract(x, x),
        lambda: cuda.plan([0], 1, 1, x),
    ):
        with pytest.raises(bitdelta.DeviceError) as caught:
            call()
        assert str(caught.value) == _C.cuda_missing()


def test_sizes_beyond_the_kernels_are_refused(gpu):
    size = (1 << 20) + 1
    x = gpu(torch.empty(1, 1).expand(1, size).contiguous())
    with pytest.raises(ValueError, match="shape: .*1048577"):
        cuda.linear(x, gpu(torch.empty(1, size)), [], [-1])
    with pytest.raises(ValueError, match="T: .*4097"):
        cuda.plan([-1], 1, 4097, x)


def test_while_a_stream_is_captured_nothing_is_brought_to_a_gpu(device, rng, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda_memory, "EMULATED", False)
    x, (delta, *_) = torch.zeros(2, K), some_deltas(rng)
    with pytest.raises(
        bitdelta.DeviceError, match="deltas: expected those of a call before while a stream is captured"
    ):
        cuda.table([delta], x)
    with pytest.raises(
        bitdelta.DeviceError, match="tenant_ids: expected int64 on the GPU while a stream is captured"
    ):
        cuda.plan([0, 0], 2, 1, x)
    with pytest.raises(bitdelta.DeviceError, match="rows of tenants: expected those of a call before"):
        ops.on_device(torch.zeros(2), torch.device("cuda"))
