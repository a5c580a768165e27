"""torch.ops.bitdelta: values, gradients against float64 autograd of the dense product, compilers, handles."""

import copy
import gc
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from conftest import DTYPES

import bitdelta
from bitdelta import ops, reference, torch_delta

N, K = 40, 300
FORMS = {"row": ("row", 1), "tensor": ("tensor", 1), "rank1": ("rank1", 1), "planes": ("rank1", 3)}

# Of a gradient's norm. The sums with signs see x * column and dy * row in 16 bits a row: an error of at most
# 2^-16 of the row's largest value in each, so about 1e-4 / sqrt(3) of its root mean square; it averages out in sums.
FIXED16 = 1e-4
# bf16 and fp16 round y and dx once: half a unit is 2^-9 and 2^-12 of a value.
ROUNDED = {"float32": FIXED16, "float16": 5e-4, "bfloat16": 4e-3}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def make_deltas(forms=tuple(FORMS), trainable=True):
    """One delta a form over one base; their scales are leaves that may require gradients."""
    base = torch.randn(N, K)
    found = []
    for name in forms:
        form, planes = FORMS[name]
        made = ops.as_torch(bitdelta.extract(base, base + 0.3 * torch.randn(N, K), planes, form))
        column = None if made.column is None else torch.nn.Parameter(made.column.clone(), trainable)
        found.append(
            ops.TorchDelta(made.sign, torch.nn.Parameter(made.row.clone(), trainable), column, (N, K))
        )
    return base, found


def leaves_of(deltas):
    return [leaf for delta in deltas for leaf in (delta.row, delta.column) if leaf is not None]


def dense(delta):
    """sum_p scale_p S_p [N, K] in float64, and the leaves it is made of."""
    signs = [
        np.where(reference.unpack(plane, N, K), 1.0, -1.0) for plane in delta.sign.numpy().view(np.uint32)
    ]
    row = delta.row.detach().double().requires_grad_()
    column = None if delta.column is None else delta.column.detach().double().requires_grad_()
    scale = row[:, :, None] if column is None else row[:, :, None] * column[:, None, :]
    return (scale * torch.from_numpy(np.stack(signs))).sum(0), [row] if column is None else [row, column]


def expected(x, weight, bias, deltas, ids, dy):
    """y and the gradients of x, weight, bias and scales, from dense weights in float64."""
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in (x, weight, bias))
    made = [dense(delta) for delta in deltas]
    changes = torch.stack([torch.zeros(N, K, dtype=torch.float64), *(change for change, _ in made)])
    y = x @ weight.T + torch.einsum("mk,mnk->mn", x, changes[ids + 1]) + bias
    y.backward(dy.double())
    scales = [leaf.grad for _, leaves in made for leaf in leaves]
    return y, x.grad, weight.grad, bias.grad, scales


def error(found, wanted):
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, 40], ids=["streamed", "panels"])
def test_gradients_are_those_of_the_dense_product_in_float64(dtype, rows):
    base, deltas = make_deltas()
    kind = getattr(torch, dtype)
    x = torch.randn(rows, K).to(kind).requires_grad_()
    weight, bias = base.to(kind).requires_grad_(), torch.randn(N).to(kind).requires_grad_()
    ids, dy = torch.arange(rows) % 5 - 1, torch.randn(rows, N).to(kind)
    y = ops.linear(x, weight, bias, deltas, ids)
    y.backward(dy)
    want, dx, dweight, dbias, dscales = expected(x, weight, bias, deltas, ids, dy)
    assert y.dtype == x.grad.dtype == weight.grad.dtype == bias.grad.dtype == kind
    for found, wanted in ((y, want), (x.grad, dx), (weight.grad, dweight), (bias.grad, dbias)):
        assert error(found, wanted) < ROUNDED[dtype]
    for leaf, wanted in zip(leaves_of(deltas), dscales, strict=True):
        assert leaf.grad.dtype == torch.float32 and error(leaf.grad, wanted) < FIXED16


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_scale_has_its_gradient(form):
    base, (delta,) = make_deltas([form])
    x, dy, ids = (
        torch.randn(24, K, requires_grad=True),
        torch.randn(24, N),
        torch.zeros(24, dtype=torch.int64),
    )
    ops.linear(x, base, None, [delta], ids).backward(dy)
    _, dx, _, _, dscales = expected(x, base, torch.zeros(N), [delta], ids, dy)
    assert error(x.grad, dx) < FIXED16
    for leaf, wanted in zip(leaves_of([delta]), dscales, strict=True):
        assert error(leaf.grad, wanted) < FIXED16


def test_one_scale_a_plane_is_an_expanded_row():
    base, (made,) = make_deltas(["tensor"])
    scale = made.row.detach()[:, :1].clone().requires_grad_()
    delta = ops.TorchDelta(made.sign, scale.expand(1, N), None, (N, K))
    x, ids, dy = torch.randn(9, K), torch.zeros(9, dtype=torch.int64), torch.randn(9, N)
    y = ops.linear(x, base, None, [delta], ids)
    y.backward(dy)
    *_, (drow,) = expected(x, base, torch.zeros(N), [made], ids, dy)
    assert error(scale.grad, drow.sum(1, keepdim=True)) < FIXED16
    with torch.no_grad():
        scale *= 2  # a copy of the expanded row must not be kept
        assert torch.equal(
            ops.linear(x, None, None, [delta], ids), 2 * ops.linear(x, None, None, [made], ids)
        )


def test_a_step_along_the_gradient_changes_the_loss_by_it():
    base, deltas = make_deltas(["planes"])
    x, dy, ids = torch.randn(8, K), torch.randn(8, N), torch.zeros(8, dtype=torch.int64)

    def loss():
        return (ops.linear(x, base, None, deltas, ids).double() * dy).sum()

    loss().backward()
    for leaf in leaves_of(deltas):
        step = torch.randn_like(leaf) * 1e-2
        with torch.no_grad():
            leaf += step
            above = loss()
            leaf -= 2 * step
            below = loss()
            leaf += step
        predicted = float((leaf.grad.double() * step).sum())  # linear in each leaf
        scale = float(leaf.grad.norm() * step.norm())
        assert float(above - below) / 2 == pytest.approx(predicted, abs=1e-4 * scale)


def test_the_delta_can_be_left_out_of_dx():
    base, deltas = make_deltas()
    x, dy = torch.randn(20, K, requires_grad=True), torch.randn(20, N)
    ops.linear(x, base, None, deltas, torch.arange(20) % 4, delta_in_dx=False).backward(dy)
    assert error(x.grad, dy.double() @ base.double()) < 1e-5
    assert all(leaf.grad is not None for leaf in leaves_of(deltas))


def test_only_what_requires_a_gradient_gets_one():
    base, (first, second) = make_deltas(["rank1", "planes"])
    first.row.requires_grad_(False)
    second.column.requires_grad_(False)
    x, bias = torch.randn(6, K), torch.zeros(N, requires_grad=True)
    ops.linear(x, base, bias, [first, second], torch.arange(6) % 2).sum().backward()
    assert first.row.grad is None and second.column.grad is None and base.grad is None
    assert first.column.grad is not None and second.row.grad is not None and bias.grad is not None


def test_dx_has_the_same_bits_whatever_else_is_wanted():
    base, deltas = make_deltas()
    x, ids, dy = torch.randn(15, K, requires_grad=True), torch.arange(15) % 5 - 1, torch.randn(15, N)
    (with_scales, *_) = torch.autograd.grad(
        ops.linear(x, base, None, deltas, ids), [x, *leaves_of(deltas)], dy
    )
    for leaf in leaves_of(deltas):
        leaf.requires_grad_(False)
    (alone,) = torch.autograd.grad(ops.linear(x, base, None, deltas, ids), [x], dy)
    assert torch.equal(with_scales, alone)


def test_a_delta_that_no_row_uses_has_a_gradient_of_zero():
    base, deltas = make_deltas()
    ops.linear(torch.randn(3, K), base, None, deltas, torch.tensor([0, -1, 0])).sum().backward()
    assert all(not leaf.grad.any() for leaf in leaves_of(deltas[1:])) and deltas[0].row.grad.any()


def test_gradients_of_two_uses_add_up():
    base, deltas = make_deltas(["rank1"])
    x, ids = torch.randn(7, K, requires_grad=True), torch.zeros(7, dtype=torch.int64)
    y = ops.linear(x, base, None, deltas, ids)
    y.sum().backward()
    once = [leaf.grad.clone() for leaf in (x, *leaves_of(deltas))]
    (ops.linear(x, base, None, deltas, ids) + ops.linear(x, base, None, deltas, ids)).sum().backward()
    for leaf, gradient in zip((x, *leaves_of(deltas)), once, strict=True):
        assert torch.allclose(leaf.grad, 3 * gradient, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_refused():
    base, deltas = make_deltas(["row"])
    x = torch.randn(2, K, requires_grad=True)
    y = ops.linear(x, base, None, deltas, torch.tensor([0, 0]))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        dx.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_the_transposed_product_has_gradients(form):
    _, (delta,) = make_deltas([form])
    dy, dg = torch.randn(12, N, requires_grad=True), torch.randn(12, K)
    g = ops.linear_transposed(dy, [delta], torch.zeros(12, dtype=torch.int64))
    g.backward(dg)
    change, leaves = dense(delta)
    wide = dy.detach().double().requires_grad_()
    want = wide @ change
    want.backward(dg.double())
    assert error(g, want) < FIXED16 and error(dy.grad, wide.grad) < FIXED16
    for found, leaf in zip(leaves_of([delta]), leaves, strict=True):
        assert error(found.grad, leaf.grad) < FIXED16


def test_adding_has_the_gradients_of_a_sum():
    base, deltas = make_deltas()
    x, y0 = torch.randn(10, K, requires_grad=True), torch.randn(10, N, requires_grad=True)
    ids, dy = torch.arange(10) % 5 - 1, torch.randn(10, N)
    before = y0.detach().clone()
    y = ops.linear_add(y0, x, deltas, ids)
    y.backward(dy)
    want, dx, *_, dscales = expected(x, torch.zeros(N, K), torch.zeros(N), deltas, ids, dy)
    assert torch.equal(y0, before) and torch.equal(y0.grad, dy)
    assert error(y, want + before) < FIXED16 and error(x.grad, dx) < FIXED16
    for leaf, wanted in zip(leaves_of(deltas), dscales, strict=True):
        assert error(leaf.grad, wanted) < FIXED16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 16, 33])
def test_without_gradients_the_bits_are_those_of_bitdelta_linear(dtype, rows):
    base, deltas = make_deltas(trainable=False)
    kind = getattr(torch, dtype)
    x, bias = torch.randn(rows, K).to(kind), torch.randn(N).to(kind)
    ids = torch.arange(rows) % 5 - 1
    plain = [
        bitdelta.Delta(
            d.sign.view(torch.uint32),
            d.row.detach(),
            d.column,
            (N, K),
            "row" if d.column is None else "rank1",
        )
        for d in deltas
    ]
    with torch.no_grad():
        y = ops.linear(x, base.to(kind), bias, deltas, ids)
        want = bitdelta.linear(x, base.to(kind), plain, ids, bias=bias)
        if rows <= bitdelta.linear.__globals__["STREAM_ROWS"]:
            assert torch.equal(y, want)
        else:  # another BLAS, another order of the base's sum
            assert torch.allclose(y.float(), want.float(), rtol=ROUNDED[dtype] * 4, atol=1e-4)
        terms = bitdelta.linear(x, None, plain, ids)
        assert torch.equal(ops.linear(x, None, None, deltas, ids), terms)
        assert torch.equal(ops.linear(x, None, None, plain, ids.tolist()), terms)
        y0 = torch.randn(rows, N).to(kind)
        added = ops.linear_add(y0.clone(), x, deltas, ids)
        assert torch.equal(added, bitdelta.linear_add(y0.clone(), x, plain, ids))
        dy = torch.randn(rows, N).to(kind)
        assert torch.equal(ops.linear_transposed(dy, deltas, ids), bitdelta.linear_transposed(dy, plain, ids))


def test_both_ways_to_the_kernels_give_the_same_bits():
    base, deltas = make_deltas()
    x, ids = torch.randn(21, K), torch.arange(21) % 5 - 1
    parts = ops._parts(deltas, x)
    with torch.no_grad():
        direct = ops.linear(x, base, None, deltas, ids)
        assert torch.equal(torch.ops.bitdelta.linear(x, base, None, *parts, ids), direct)
    assert torch.equal(ops.linear(x, base, None, deltas, ids), direct)


def test_any_leading_shape_and_stride():
    base, deltas = make_deltas()
    ids = torch.arange(12) % 5 - 1
    x = torch.randn(K, 3, 4).permute(1, 2, 0)  # no column is contiguous
    want = ops.linear(x.reshape(12, K).contiguous(), base, None, deltas, ids)
    assert torch.equal(ops.linear(x, base, None, deltas, ids), want.view(3, 4, N))
    wide = torch.randn(12, K + 5)[:, :K]
    assert torch.equal(
        ops.linear(wide, base, None, deltas, ids), ops.linear(wide.contiguous(), base, None, deltas, ids)
    )
    y = torch.zeros(3, 4, N)
    with torch.no_grad():
        assert ops.linear_add(y, x, deltas, ids).shape == y.shape and y.any()
        assert ops.linear_transposed(y, deltas, ids).shape == (3, 4, K)
        same = ops.linear(torch.randn(1, K).expand(12, K), base, None, deltas[:1], [0] * 12)
        assert torch.equal(same, same[:1].expand(12, N))


def test_a_transposed_weight_is_read_as_it_lies():
    base, deltas = make_deltas(["row"])
    x, ids = torch.randn(4, K), [0] * 4
    turned = base.T.contiguous().T
    assert torch.allclose(
        ops.linear(x, turned, None, deltas, torch.tensor(ids)),
        ops.linear(x, base, None, deltas, torch.tensor(ids)),
        rtol=1e-5,
        atol=1e-4,
    )


def test_no_rows_and_their_gradients():
    base, deltas = make_deltas()
    x = torch.randn(0, K, requires_grad=True)
    y = ops.linear(x, base, None, deltas, torch.zeros(0, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, N) and x.grad.shape == (0, K)
    assert all(not leaf.grad.any() for leaf in leaves_of(deltas))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_lost_alone(number):
    base, deltas = make_deltas(["row"])
    x = torch.randn(3, K)
    x[1, 7] = number
    y = ops.linear(x, base, None, deltas, torch.tensor([0, 0, 0]))
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


# handles


def test_scales_changed_in_place_are_seen():
    base, deltas = make_deltas(["row", "rank1"])
    x, ids = torch.randn(4, K), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        before, handles = ops.linear(x, None, None, deltas, ids), [delta.handle for delta in deltas]
        for delta in deltas:
            delta.row.mul_(2)
        assert torch.equal(ops.linear(x, None, None, deltas, ids), 2 * before)
        assert [delta.handle for delta in deltas] == handles


def test_scales_in_other_memory_are_seen():
    _, (delta,) = make_deltas(["row"])
    x = torch.randn(4, K)
    with torch.no_grad():
        before = ops.linear(x, None, None, [delta], [0] * 4)
        delta.row.data = delta.row.data * 4
        assert torch.equal(ops.linear(x, None, None, [delta], [0] * 4), 4 * before)
        delta.row = torch.nn.Parameter(delta.row / 2)
        assert torch.equal(ops.linear(x, None, None, [delta], [0] * 4), 2 * before)


def test_handles_live_as_long_as_their_tensors():
    gc.collect()
    before = len(torch_delta._handles)
    base, deltas = make_deltas()
    x, ids = torch.randn(6, K), torch.arange(6) % 4
    for _ in range(3):
        ops.linear(x, base, None, deltas, ids).sum().backward()
        scaled = [
            ops.TorchDelta(d.sign, d.row * 2, d.column, d.shape) for d in deltas
        ]  # new memory every time
        ops.linear(x, base, None, scaled, ids).sum().backward()
    assert len(torch_delta._handles) <= before + 2 * len(deltas)
    del deltas, scaled
    gc.collect()
    assert len(torch_delta._handles) == before


def test_a_delta_is_converted_once_and_shares_memory():
    delta = bitdelta.extract(torch.zeros(N, K), torch.randn(N, K), scale="rank1")
    delta.sign.flags.writeable = False  # as of a memory map
    found = ops.as_torch(delta)
    assert ops.as_torch(delta) is found and ops.as_torch(found) is found
    assert found.sign.data_ptr() == delta.sign.ctypes.data and found.row.data_ptr() == delta.scale.ctypes.data


def test_a_copy_is_a_delta_of_its_own():
    _, (delta,) = make_deltas(["rank1"])
    twin = copy.deepcopy(delta)
    with torch.no_grad():
        twin.row.zero_()
        x = torch.randn(1, K)
        assert (
            ops.linear(x, None, None, [delta], [0]).any() and not ops.linear(x, None, None, [twin], [0]).any()
        )


def test_threads_share_handles():
    base, deltas = make_deltas()
    x, ids = torch.randn(8, K), torch.arange(8) % 5 - 1
    want = ops.linear(x, base, None, deltas, ids)

    def work(_):
        fresh = [ops.TorchDelta(d.sign, d.row, d.column, d.shape) for d in deltas]
        return all(torch.equal(ops.linear(x, base, None, fresh, ids), want) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_inference_mode_and_recomputed_activations():
    base, deltas = make_deltas()
    x, ids = torch.randn(6, K, requires_grad=True), torch.arange(6) % 5 - 1

    def run(x):
        return ops.linear(x, base, None, deltas, ids)

    run(x).sum().backward()
    leaves = [x, *leaves_of(deltas)]
    want = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(leaf.grad, wanted) for leaf, wanted in zip(leaves, want, strict=True))
    with torch.inference_mode():
        assert torch.equal(run(x + 0), run(x)) and ops.linear_add(run(x), x, deltas, ids).isfinite().all()


# registration and compilers


def test_the_operators_pass_opcheck():
    base, deltas = make_deltas()
    x, ids = torch.randn(5, K, requires_grad=True), torch.arange(5) % 5 - 1
    parts = ops._parts(deltas, x)
    bias = torch.randn(N, requires_grad=True)
    torch.library.opcheck(torch.ops.bitdelta.linear, (x, base, bias, *parts, ids))
    torch.library.opcheck(
        torch.ops.bitdelta.linear, (x, base.requires_grad_(), None, [], [], [], ids.clamp(max=-1))
    )
    y = torch.randn(5, N)
    torch.library.opcheck(torch.ops.bitdelta.linear_sum, (y.requires_grad_(), x, *parts, ids))
    torch.library.opcheck(torch.ops.bitdelta.linear_transposed, (y, *parts, ids, K))
    frozen = [[tensor.detach() for tensor in part] for part in parts]
    torch.library.opcheck(torch.ops.bitdelta.linear_add, (y.detach(), x.detach(), *frozen, ids))
    torch.library.opcheck(
        torch.ops.bitdelta.linear_backward, (y.detach(), x.detach(), base.detach(), *frozen, ids, *[True] * 4)
    )


def model(x, y, weight, bias, deltas, ids):
    h = torch.relu(ops.linear(x, weight, bias, deltas, ids))
    return ops.linear_add(y * 2, x, deltas, ids) + h, ops.linear_transposed(h, deltas, ids)


NEEDS_CXX = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler"
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NEEDS_CXX)])
def test_a_whole_graph_compiles_forwards_and_backwards(backend):
    base, deltas = make_deltas(["row", "planes"])
    bias, y, ids = torch.randn(N), torch.randn(2, 4, N), torch.arange(8) % 3 - 1
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for run in (model, compiled):
        x = torch.ones(2, 4, K, requires_grad=True)
        for leaf in leaves_of(deltas):
            leaf.grad = None
        out = run(x, y, base, bias, deltas, ids)
        (out[0].sum() + out[1].sum()).backward()
        results.append([*out, x.grad, *(leaf.grad for leaf in leaves_of(deltas))])
    for eager, found in zip(*results, strict=True):
        assert torch.allclose(eager, found, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for eager, found in zip(
            *(run(x, y, base, bias, deltas, ids) for run in (model, compiled)), strict=True
        ):
            assert torch.allclose(eager, found, rtol=1e-4, atol=1e-4)


# errors


@pytest.mark.parametrize("requires_grad", [False, True], ids=["direct", "dispatched"])
def test_wrong_arguments_are_named(requires_grad):
    base, deltas = make_deltas(trainable=False)
    x = torch.randn(4, K, requires_grad=requires_grad)
    ids = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="tenant_ids: expected .*1 .. 3, got 4 at row 2"):
        ops.linear(x, base, None, deltas, torch.tensor([0, 0, 4, 0]))
    with pytest.raises(ValueError, match=r"tenant_ids: expected \[M\] = \[4\], got \[3\]"):
        ops.linear(x, base, None, deltas, ids[:3])
    with pytest.raises(ValueError, match="weight"):
        ops.linear(x, base[:, 1:], None, deltas, ids)
    with pytest.raises(ValueError, match="bias"):
        ops.linear(x, base, torch.zeros(N + 1), deltas, ids)
    with pytest.raises(ValueError, match="precision"):
        ops.linear(x, base, None, deltas, ids, precision="int8")
    with pytest.raises(ValueError, match="deltas"):
        ops.linear(x, None, None, [], ids)
    with pytest.raises(TypeError, match="x: expected float32, float16"):
        ops.linear(x.double(), None, None, deltas, ids)
    with pytest.raises(ValueError, match="deltas: expected at least one"):
        ops.linear_transposed(x, [], ids)
    with pytest.raises(TypeError, match="x: expected a torch.Tensor, got ndarray"):
        ops.linear(x.detach().numpy(), base, None, deltas, ids)
    with pytest.raises(ValueError, match="x: expected rows .*, got a number"):
        ops.linear(x[0, 0], base, None, deltas, ids)
    with pytest.raises(TypeError, match="weight: expected a torch.Tensor or None, got ndarray"):
        ops.linear(x, base.numpy(), None, deltas, ids)
    with pytest.raises(ValueError, match=r"weight: expected a matrix \[N, K\], got \[300\]"):
        ops.linear(x, base[0], None, deltas, ids)
    for wrong, words in (
        (deltas[0], "a list, got TorchDelta"),
        ([None], "Delta or TorchDelta, got NoneType"),
    ):
        with pytest.raises(TypeError, match=f"deltas: expected {words}"):
            ops.linear(x, base, None, wrong, ids)
    for wrong in (torch.zeros(4), ["a"] * 4, [0.5] * 4):
        with pytest.raises(TypeError, match="tenant_ids: expected "):
            ops.linear(x, base, None, deltas, wrong)
    with pytest.raises(TypeError, match="delta: expected a Delta, got int"):
        ops.as_torch(5)
