"""Tenants on their way to a device, by a lane whose copies land as late as they may: when someone waits for them."""

import pytest
import torch
from models import llama_config, make, merged

from bitdelta import transfer
from bitdelta.errors import Error
from bitdelta.model import DeltaModel

POISON = 0xFF  # NaN as fp32, bf16 and fp16


class LateLane:
    """A Lane of which a piece lands when it is waited for, and those before it, as copies of one stream do."""

    def __init__(self, device):
        self.device = device
        self.landed, self.copies = 0, []  # of all pieces in the order of the copies
        self.n_blocks = 0

    def pinned(self, n_bytes):
        return torch.empty(n_bytes, dtype=torch.uint8)

    def copy(self, host, bounds):
        block = torch.full((len(host),), POISON, dtype=torch.uint8)
        self.n_blocks += 1
        events = []
        for begin, end in zip(bounds, bounds[1:], strict=False):
            events.append(len(self.copies))
            self.copies.append((block[begin:end], host[begin:end].clone()))
        return block, events

    def use(self, block, event):
        assert self.copies[event][0].untyped_storage().data_ptr() == block.data_ptr()  # its own
        self.finish(event)

    def is_done(self, event):
        return event < self.landed

    def finish(self, event):
        for part, values in self.copies[self.landed : event + 1]:
            part.copy_(values)
        self.landed = max(self.landed, event + 1)


@pytest.fixture
def lanes(monkeypatch):
    """The lanes that models make, all of whose pieces are small."""
    made = []

    def new_lane(device):
        made.append(LateLane(device))
        return made[-1]

    monkeypatch.setattr(transfer, "new_lane", new_lane)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"), llama_config(), tenants=3)


def load(root, n=3, **options):
    model = DeltaModel.from_pretrained(root / "base", dtype=torch.float32, **options)
    for i in range(n):
        model.load_delta(f"t{i}", root / f"delta-{i}")
    return model


def tokens(rows, length=7):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(0))


def names_of(model):
    return [tenant.name for tenant in model.pool.resident]


@torch.no_grad()
def check(model, root, names):
    ids = tokens(len(names))
    logits = model(ids, delta_names=names).logits
    for row, name in enumerate(names):
        wanted = merged(root, None if name is None else int(name[1]))(ids[row : row + 1]).logits[0]
        assert (logits[row] - wanted).abs().max() <= 3e-4 * wanted.abs().max()


def test_nothing_is_used_before_it_has_arrived(llama, lanes):
    model = load(llama)
    (lane,) = lanes
    assert lane.landed == 0 and len(lane.copies) > 3 * 4
    check(model, llama, ["t0", None, "t2", "t1"])
    assert lane.landed == len(lane.copies)


@torch.no_grad()
def test_a_module_waits_for_its_own_piece_and_no_later_one(llama, lanes):
    model = load(llama, 1)
    (lane,) = lanes
    seen = []
    model.model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(lane.landed))
    model(tokens(1), delta_names="t0")
    assert 0 < seen[0] < lane.landed == len(lane.copies)


def test_an_evicted_tenant_comes_back_from_the_hosts_memory(llama, lanes):
    model = load(llama, max_resident=1, host_resident=2)
    assert names_of(model) == ["t2"] and model.pool.n_reads == 3
    check(model, llama, ["t1", "t1"])
    assert model.pool.n_reads == 3 and lanes[0].n_blocks == 4
    check(model, llama, ["t0", None])  # two more recent ones were kept
    assert model.pool.n_reads == 4
    check(model, llama, ["t1", None])
    assert model.pool.n_reads == 4 and names_of(model) == ["t1"]


@pytest.mark.parametrize(("kept", "reads"), [(0, 4), (None, 3)])
def test_the_cpu_keeps_as_many_as_a_gpu_would(llama, kept, reads):
    model = load(llama, max_resident=1, host_resident=kept)
    model.prefetch("t0")
    assert names_of(model) == ["t0"] and (model.pool.n_reads, model.pool.n_loads) == (reads, 4)
    check(model, llama, ["t0", None])


def test_a_prefetched_tenant_is_on_its_way_while_another_runs(llama, lanes):
    model = load(llama, 2, max_resident=2, host_resident=None)
    (lane,) = lanes
    model.load_delta("t2", llama / "delta-2")  # evicts t0, when it has arrived
    check(model, llama, ["t1", "t2"])
    assert lane.landed == len(lane.copies)
    model.prefetch("t0")
    started = len(lane.copies)
    assert names_of(model) == ["t2", "t0"] and lane.landed < started
    check(model, llama, ["t2", None])
    assert lane.landed < started
    check(model, llama, ["t2", "t0"])
    assert lane.landed == started == len(lane.copies) and model.pool.n_reads == 3


def test_a_tenant_on_its_way_is_not_evicted_for_one_that_may_be_needed(llama, lanes):
    model = load(llama, 3, max_resident=1, host_resident=None)
    (lane,) = lanes
    before = lane.landed
    with pytest.raises(Error, match="t1: no room: max_resident is 1, and these are .* on their way: t2"):
        model.prefetch("t1")
    assert names_of(model) == ["t2"] and lane.landed == before
    check(model, llama, ["t1", None])  # needed now: t2 goes, but only when it is there
    assert names_of(model) == ["t1"] and lane.landed == len(lane.copies)
    model.prefetch("t0")
    assert names_of(model) == ["t0"]


def test_tied_parameters_travel_once(tmp_path, lanes):
    root = make(tmp_path, llama_config(tie_word_embeddings=True), tenants=1)
    model = load(root, 1)
    (lane,) = lanes
    (tenant,) = model.pool.resident
    assert tenant.changes["lm_head.weight"] is tenant.changes["model.embed_tokens.weight"]
    assert sum(len(part) for part, _ in lane.copies) <= tenant.nbytes + 256 * 3 * len(tenant.changes)
    check(model, root, ["t0", None])


def test_a_model_that_moves_takes_its_tenants_along(llama, lanes, monkeypatch):
    model = load(llama, 2)
    blocks = lanes[0].n_blocks
    monkeypatch.setattr(
        type(model.site), "devices", property(lambda site, seen=[]: seen.append(0) or len(seen))
    )
    model.to(torch.float32)
    assert not model.pool.resident
    with model.batch(["t0"], 1), pytest.raises(Error, match="t0: a batch is running with it"):
        model.to(torch.float32)
    check(model, llama, ["t0", "t1"])
    assert lanes[0].n_blocks == blocks + 2


@torch.no_grad()
def test_a_tenant_is_merged_when_all_of_it_has_arrived(llama, lanes):
    model, ids = load(llama, 1), tokens(2)
    wanted = merged(llama, 0)(ids).logits
    assert (model.merge_and_unload("t0")(ids).logits - wanted).abs().max() <= 3e-4 * wanted.abs().max()


@pytest.mark.parametrize("number", [-1, 1.5, True])
def test_host_resident_is_a_number_from_zero(llama, number):
    with pytest.raises(ValueError, match="host_resident: expected a number from 0"):
        DeltaModel.from_pretrained(llama / "base", host_resident=number)
