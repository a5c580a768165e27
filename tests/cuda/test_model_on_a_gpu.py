"""DeltaModel on a GPU: a decode step in a CUDA graph, tenants that arrive while others run."""

import pytest
import torch
from conftest import require_kernels
from models import llama_config, make
from transformers import StaticCache

from bitdelta.errors import DeviceError
from bitdelta.model import DeltaModel

pytestmark = pytest.mark.gpu
NAMES = ["t0", None, "t1", "t0"]


@pytest.fixture(autouse=True)
def _gpu():
    require_kernels("cuda")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"), llama_config(), tenants=3)


def load(root, tenants=2, **options):
    model = DeltaModel.from_pretrained(root / "base", dtype=torch.bfloat16, device_map="cuda", **options)
    for i in range(tenants):
        model.load_delta(f"t{i}", root / f"delta-{i}")
    return model


def tokens(rows, length=5):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(0)).cuda()


@torch.no_grad()
def test_a_decode_step_replays_in_a_cuda_graph(llama):
    model, ids = load(llama), tokens(4)
    step = torch.empty((4, 1), dtype=torch.int64, device="cuda")
    eager, static = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))

    def decode(cache, token=None):
        if token is not None:
            step.fill_(token)
        return model.model(input_ids=step, past_key_values=cache, use_cache=True).logits

    with model.batch(NAMES, 4):
        for cache in (eager, static):
            model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        wanted = [decode(eager, token) for token in (7, 8, 9, 11)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for token in (7, 8):  # the second one knows which linears share their input
                decode(static, token)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = decode(static)
        for token, logits in zip((9, 11), wanted[2:], strict=True):
            step.fill_(token)
            graph.replay()
            assert torch.equal(captured, logits)


@torch.no_grad()
def test_a_batch_whose_tenants_are_not_known_is_refused_in_a_captured_stream(llama):
    model, ids = load(llama), tokens(4)
    model(ids, delta_names=[None] * 4)
    torch.cuda.synchronize()
    with pytest.raises((DeviceError, RuntimeError)), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(ids, delta_names=NAMES)
    torch.cuda.synchronize()
    assert model(ids, delta_names=NAMES).logits.isfinite().all()


@torch.no_grad()
def test_a_tenant_is_used_when_it_has_arrived_and_its_memory_when_it_was_used(llama):
    model, ids = load(llama, 3), tokens(3)
    wanted = [model(ids, delta_names=f"t{i}").logits for i in range(3)]
    model = load(llama, 3, max_resident=1, host_resident=None)
    for lane in model.lanes._lanes.values():
        with torch.cuda.stream(lane.stream):
            torch.cuda._sleep(50_000_000)  # what is copied from here on comes late
    found = []
    for i in (0, 1, 2, 0, 1, 2):  # every one is brought as it is needed, and evicts the one before
        torch.cuda._sleep(20_000_000)  # the use of what goes next comes late
        found.append((i, model(ids, delta_names=f"t{i}").logits))
    for i, logits in found:
        assert torch.equal(logits, wanted[i])
    assert model.pool.n_reads == 3
