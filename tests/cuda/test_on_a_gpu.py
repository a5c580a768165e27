"""What only a GPU can show: streams, graphs, devices, memory that runs out, compilers, sizes beyond 32 bits."""

import kernel_calls
import numpy as np
import pytest
import torch
from conftest import bits, pair, require_kernels, tensor

import bitdelta
from bitdelta import cuda, ops

pytestmark = pytest.mark.gpu
N, K, ROWS = 528, 768, 7


@pytest.fixture(autouse=True)
def _gpu():
    require_kernels("cuda")


@pytest.fixture(scope="module")
def deltas():
    rng = np.random.default_rng(1)
    kinds = [(1, "row"), (2, "rank1"), (3, "tensor")]
    return [bitdelta.extract(*pair(rng, N, K), planes=planes, scale=scale) for planes, scale in kinds]


def rows(seed, n=ROWS):
    return tensor(np.random.default_rng(seed).normal(size=(n, K)), "bfloat16", "torch")


def expected(x, deltas, ids):
    return bits(bitdelta.linear(x, None, deltas, ids))


IDS = [[0, 2, -1, 1, 2, 2, 0], [1] * ROWS, [-1, -1, 2, 2, 2, 2, 2]]


def test_calls_run_on_the_current_stream(deltas):
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [rows(seed) for seed in range(12)]
    results = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(2_000_000)  # what is enqueued on another stream would come too early
            there = x.cuda(non_blocking=True)
            results.append(cuda.linear(there, None, deltas, IDS[i % 3]))
    torch.cuda.synchronize()
    for i, (x, y) in enumerate(zip(inputs, results, strict=True)):
        assert np.array_equal(bits(y.cpu()), expected(x, deltas, IDS[i % 3]))


def test_a_graph_is_replayed_with_other_ids_and_rows(deltas):
    x, ids = rows(0).cuda(), torch.tensor(IDS[0]).cuda()
    weight = torch.randn(N, K, dtype=torch.bfloat16).cuda()
    cuda.linear(x, weight, deltas, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, with_base = cuda.linear(x, None, deltas, ids), cuda.linear(x, weight, deltas, ids)
    for seed, tenant_ids in enumerate(IDS):
        x.copy_(rows(seed))
        ids.copy_(torch.tensor(tenant_ids))
        graph.replay()
        assert np.array_equal(bits(y.cpu()), expected(rows(seed), deltas, tenant_ids))
        assert torch.equal(with_base, cuda.linear(x, weight, deltas, ids))


def test_ids_out_of_range_in_a_replay_give_nan_rows(deltas):
    x, ids = rows(0).cuda(), torch.tensor(IDS[0]).cuda()
    cuda.linear(x, None, deltas, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.linear(x, None, deltas, ids)
    ids[2:4] = torch.tensor([3, -2])
    graph.replay()
    assert y[2:4].isnan().all()
    assert np.array_equal(bits(y[:2].cpu()), expected(rows(0), deltas, IDS[0])[:2])


def test_what_must_be_created_is_refused_while_a_graph_is_captured():
    fresh = bitdelta.extract(*pair(np.random.default_rng(9), N, K))
    x, ids = rows(0).cuda(), torch.zeros(ROWS, dtype=torch.int64).cuda()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises((bitdelta.DeviceError, RuntimeError)), torch.cuda.graph(graph):
        cuda.linear(x, None, [fresh], ids)
    torch.cuda.synchronize()
    assert np.array_equal(
        bits(cuda.linear(x, None, [fresh], ids).cpu()), expected(rows(0), [fresh], [0] * ROWS)
    )


def test_results_are_the_same_again_and_in_any_batch(deltas):
    x = rows(3, 40)
    ids = [i % 3 for i in range(40)]
    y = cuda.linear(x.cuda(), None, deltas, ids)
    for _ in range(20):
        assert torch.equal(cuda.linear(x.cuda(), None, deltas, ids), y)
    for first in range(0, 40, 7):
        part = slice(first, first + 7)
        assert torch.equal(cuda.linear(x[part].cuda(), None, deltas, ids[part]), y[part])


def test_base_rows_are_those_of_a_batch_without_deltas(deltas):
    x, weight = rows(4).cuda(), torch.randn(N, K, dtype=torch.bfloat16).cuda()
    mixed = cuda.linear(x, weight, deltas, IDS[0])
    alone = cuda.linear(x, weight, deltas, [-1] * ROWS)
    assert torch.equal(mixed[2], alone[2])


def test_memory_that_runs_out_leaves_nothing_broken(deltas):
    M = 8192
    x, ids = rows(5, M).cuda(), torch.zeros(M, dtype=torch.int64).cuda()
    y = cuda.linear(x, None, deltas, ids)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    try:
        for _ in range(3):
            with pytest.raises(torch.cuda.OutOfMemoryError):
                cuda.linear(x, None, deltas, ids)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(cuda.linear(x, None, deltas, ids), y)
    assert np.array_equal(bits(y[:3].cpu()), expected(rows(5, M)[:3], deltas, [0] * 3))


def torch_deltas(deltas):
    from bitdelta.torch_cuda import as_torch_on

    like = torch.empty(0, device="cuda")
    return [as_torch_on(delta, like) for delta in deltas]


def test_compiled_calls_have_no_graph_break(deltas):
    there, weight = torch_deltas(deltas), torch.randn(N, K, dtype=torch.bfloat16).cuda()

    def layer(x, ids):
        return ops.linear(torch.nn.functional.silu(x), weight, None, there, ids) * 2

    x, ids = rows(6).cuda(), torch.tensor(IDS[0]).cuda()
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.allclose(compiled(x, ids).float(), layer(x, ids).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("trained", [False, True])
def test_operators_pass_pytorchs_own_checks(deltas, trained):
    there = torch_deltas(deltas)
    x = rows(7).cuda().requires_grad_(trained)
    signs, scales = (
        [each.sign for each in there],
        [each.row.detach().requires_grad_(trained) for each in there],
    )
    columns = [x.new_empty(0, dtype=torch.float32) if each.column is None else each.column for each in there]
    arguments = x, None, None, signs, scales, columns, torch.tensor(IDS[0]).cuda()
    torch.library.opcheck(torch.ops.bitdelta.linear.default, arguments)


def test_gradients_are_those_of_the_cpu(deltas):
    dy, x = tensor(np.random.default_rng(8).normal(size=(ROWS, N)), "float32", "torch"), rows(8).float()
    got = cuda.gradients(dy.cuda(), x.cuda(), deltas, IDS[0], True, True, True)
    assert np.array_equal(bits(got[0].cpu()), bits(bitdelta.linear_transposed(dy, deltas, IDS[0])))
    again = cuda.gradients(dy.cuda(), x.cuda(), deltas, IDS[0], True, True, True)
    assert all(map(torch.equal, got, again))


def test_results_beyond_2_to_the_31_elements():
    M, wide, narrow = 66_000, 33_024, 256
    delta = bitdelta.extract(*pair(np.random.default_rng(2), wide, narrow))
    assert M * wide > 2**31
    x = torch.randn(M, narrow, dtype=torch.bfloat16)
    y = cuda.linear(x.cuda(), None, [delta], torch.zeros(M, dtype=torch.int64).cuda())
    for row in (0, M // 2, M - 1):
        got = y[row : row + 1].cpu()
        assert np.array_equal(bits(got), bits(bitdelta.linear(x[row : row + 1], None, [delta], [0])))


def test_a_gpu_without_code_in_the_build_is_named(tmp_path):
    other = "80" if torch.cuda.get_device_capability()[0] != 8 else "90"
    kernels = kernel_calls.OnGpu(kernel_calls.build_for_gpu(tmp_path, (other,), ("plan.cu", "device.cu")))
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        kernels.plan([0, 1], 2)


# ---- devices ----


@pytest.fixture
def two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


def test_memory_of_the_host_is_refused(deltas):
    x, found = rows(0), cuda.table(deltas, rows(0).cuda())
    with pytest.raises(bitdelta.DeviceError, match="expected memory of a GPU"):
        cuda.linear(x, None, found, torch.tensor(IDS[0]).cuda(), out=torch.empty(ROWS, N))


def test_every_device_gives_the_same_bits(two_devices, deltas):
    for device in range(torch.cuda.device_count()):
        y = cuda.linear(rows(1).to(f"cuda:{device}"), None, deltas, IDS[0])
        assert y.device.index == device
        assert np.array_equal(bits(y.cpu()), expected(rows(1), deltas, IDS[0]))


def test_the_current_device_may_be_another(two_devices, deltas):
    with torch.cuda.device(1):
        y = cuda.linear(rows(1).to("cuda:0"), None, deltas, IDS[0])
        assert torch.cuda.current_device() == 1
    assert np.array_equal(bits(y.cpu()), expected(rows(1), deltas, IDS[0]))


def test_tensors_on_different_devices_are_refused(two_devices, deltas):
    with pytest.raises(bitdelta.DeviceError, match="cuda:1|device"):
        cuda.linear(rows(1).to("cuda:0"), None, deltas, torch.tensor(IDS[0]).to("cuda:1"))
