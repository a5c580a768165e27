"""DeltaModel on a GPU: the rows of the CPU's, one launch for linears of the same input, tenants as LoRA and whole."""

import numpy as np
import pytest
import torch
import transformers
from conftest import pair
from models import llama_config, longer, make, merged, write_adapter
from torch import nn

import bitdelta
from bitdelta import _C, cuda, ops
from bitdelta.batch import Batch, current
from bitdelta.change import LowRank, Packed, Whole
from bitdelta.experts_grouped import Grouped
from bitdelta.model import DeltaModel
from bitdelta.modules import install
from bitdelta.tenant import Tenant

# The base product is summed in another order; where that moves x across a step of its 16 bits, so does the delta term.
NEAR = 1e-4
NAMES = ["t0", None, "lora", "t1", "t0"]
WHERE = "cpu" if _C.cuda_is_emulated() else "cuda"


def adapter(folder):
    """A LoRA folder as PEFT writes it, for some modules of the small Llama."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer, part, n, k in ((0, "self_attn.q_proj", 32, 32), (0, "mlp.down_proj", 32, 64)):
        path = f"base_model.model.model.layers.{layer}.{part}"
        tensors[f"{path}.lora_A.weight"] = torch.randn(4, k, generator=generator)
        tensors[f"{path}.lora_B.weight"] = 0.1 * torch.randn(n, 4, generator=generator)
    write_adapter(folder, tensors, target_modules=["q_proj", "down_proj"])
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """One layer; tenant 1 has two planes, and three tokens more."""

    root = make(tmp_path_factory.mktemp("llama"), llama_config(num_hidden_layers=1), change=longer)
    bitdelta.compress(root / "base", root / "fine-1", root / "two", planes=2, scale="rank1")
    adapter(root / "lora")
    return root


def load(root, **options):
    model = DeltaModel.from_pretrained(root / "base", **options)
    model.load_delta("t0", root / "delta-0")
    model.load_delta("t1", root / "two")
    model.load_delta("lora", root / "lora")
    return model


@pytest.fixture
def on_gpu(device, monkeypatch):
    """Moves a model; from then on the emulated GPU is the CPU."""

    def move(model):
        monkeypatch.setenv("BITDELTA_DEVICE", "emulated")
        return model.to(WHERE)

    return move


@pytest.fixture
def launches(monkeypatch):
    """How many weights each launch of the product kernels was for."""
    found, original = [], _C.cuda_linear
    monkeypatch.setattr(
        _C, "cuda_linear", lambda x, parts, *rest: (found.append(len(parts)), original(x, parts, *rest))[1]
    )
    return found


def tokens(rows, length=4):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_of_base_deltas_and_lora_are_those_of_the_cpu(llama, on_gpu, launches, dtype):
    model, ids = load(llama, dtype=dtype), tokens(5)
    ids[3, 1] = 98  # one of tenant 1's own tokens
    expected = model(ids, delta_names=NAMES).logits
    assert not launches
    on_gpu(model)
    found = model(ids.to(WHERE), delta_names=NAMES).logits.cpu()
    assert len(launches) > 4 and found.shape[-1] == 99
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite())
    error = (found - expected)[finite].abs().max() / expected[finite].abs().max()
    assert error <= (NEAR if dtype == torch.float32 else 0.02)


@torch.no_grad()
def test_linears_of_one_input_are_launched_together_with_the_same_bits(llama, on_gpu, launches):
    model, ids = on_gpu(load(llama, dtype=torch.float32)), tokens(5).to(WHERE)
    first = model(ids, delta_names=NAMES).logits
    assert launches == [1] * 8  # q, k, v, o, gate, up, down, head: nothing is known yet
    launches.clear()
    again = model(ids, delta_names=NAMES).logits
    assert launches == [3, 1, 2, 1, 1]
    assert torch.equal(again, first)
    launches.clear()
    step = model(ids[:, :1], delta_names=NAMES).logits
    assert launches == [3, 1, 2, 1, 1]
    assert (step[:, 0] - first[:, 0])[:, :96].abs().max() <= NEAR * first[:, :, :96].abs().max()


@torch.no_grad()
def test_generated_tokens_are_those_of_the_cpu(llama, on_gpu):
    model, ids = load(llama, dtype=torch.float32), tokens(5)
    options = {"delta_names": NAMES, "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(on_gpu(model).generate(ids.to(WHERE), **options).cpu(), expected)


@torch.no_grad()
def test_long_prompts_may_be_multiplied_with_expanded_weights(llama, on_gpu, monkeypatch):
    monkeypatch.setattr("bitdelta.linear_forward.MERGED_ROWS", 4)
    monkeypatch.setattr(cuda, "PANEL_BYTES", 32 * 32 * 4)
    expansions, original = [], _C.cuda_expand
    monkeypatch.setattr(_C, "cuda_expand", lambda *a: (expansions.append(a[6]), original(*a))[1])
    model = on_gpu(load(llama, dtype=torch.float32, prefill="merged"))
    ids = tokens(3)
    found = model(ids.to(WHERE), delta_names=["t0", None, "t1"]).logits.cpu()
    assert 0 in expansions and 32 in expansions  # several panels
    exact = DeltaModel.from_pretrained(llama / "base", dtype=torch.float32)
    wanted = merged(llama, 0)(ids[:1]).logits[0]
    assert (found[0, :, :96] - wanted).abs().max() <= NEAR * wanted.abs().max()
    wanted = exact(ids[1:2]).logits[0]
    assert (found[1, :, :96] - wanted).abs().max() <= NEAR * wanted.abs().max()


@torch.no_grad()
def test_merged_products_of_base_rows_have_the_bits_of_base_rows_alone(device, on_gpu, rng, monkeypatch):
    on_gpu(nn.Linear(1, 1))
    weights = [pair(rng, 40, 300) for _ in range(2)]
    deltas = [bitdelta.extract(*weight) for weight in weights]
    x, weight, bias = (torch.randn(n).to(WHERE) for n in ((6, 300), (40, 300), (40,)))
    ids = [1, -1, 0, 1, -1, 0]
    monkeypatch.setattr(cuda, "PANEL_BYTES", 16 * 300 * 4)  # panels of 16, 16 and 8 rows
    found = cuda.linear(x, weight, deltas, ids, bias, precision="merged")
    alone = cuda.linear(x, weight, deltas, [-1] * 6, bias, precision="merged")
    assert torch.equal(found[[1, 4]], alone[[1, 4]])
    for m, t in enumerate(ids):
        if t >= 0:
            wide = weight + torch.from_numpy(deltas[t].expand(None)).to(WHERE)
            assert torch.allclose(found[m], x[m] @ wide.T + bias, rtol=1e-5, atol=1e-4)
    uniform = cuda.linear(x, weight, deltas, [0] * 6, bias, precision="merged")
    assert torch.allclose(uniform[[2, 5]], found[[2, 5]], rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="weight: expected the base weight"):
        cuda.linear(x, None, deltas, ids, precision="merged")
    with pytest.raises(ValueError, match="expected -1 .. 1, got 2 at row 0"):
        cuda.linear(x, weight, deltas, [2] * 6, precision="merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_parts_of_one_call_have_the_bits_of_calls_of_their_own(on_gpu, rng, launches, dtype):
    on_gpu(nn.Linear(1, 1))
    x, ids = torch.randn(2, 3, 300).to(WHERE, dtype), [0, 1, -1, 1, 0, 0]
    parts = []
    for n in (40, 16, 24, 8, 32):  # five: more than one launch takes
        deltas = [bitdelta.extract(*pair(rng, n, 300), planes=p) for p in (1, 2)]
        weight = torch.randn(n, 300).to(WHERE, dtype) if n != 16 else None
        bias = torch.randn(n).to(WHERE, dtype) if n == 24 else None
        parts.append((weight, bias, deltas))
    found = ops.linear_parts(x, parts, ids)
    assert launches == [4, 1]
    for y, (weight, bias, deltas) in zip(found, parts, strict=True):
        assert torch.equal(y, ops.linear(x, weight, bias, deltas, ids))
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        y = ops.linear_parts(given, parts, torch.tensor(ids).to(WHERE))
        assert all(each.requires_grad for each in y)


def with_tenant(model, rng, changed):
    """A tenant that changes these linears of a model."""
    by_module = {}
    for path in changed:
        n, k = model.get_submodule(path).weight.shape
        by_module[path] = {"weight": Packed(bitdelta.extract(*pair(rng, n, k)))}
        list(install(model, path))
    return Tenant("t", "delta", {}, None, by_module=by_module)


def run(model, tenants, ids, *args):
    token = current.set(Batch(tenants, np.array(ids)))
    try:
        with torch.no_grad():
            return [model(*each) for each in args]
    finally:
        current.reset(token)


class Changing(nn.Module):
    """Gives its linears the same tensor only in its first forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.calls = 0

    def forward(self, x, how):
        y = self.first(x)
        if how == "written":
            x += 1
        if how != "left out":
            y = y + self.second(x.clone() if how == "another" else x)
        return y


@pytest.mark.parametrize("how", ["another", "written", "left out"])
def test_a_product_made_ahead_is_used_for_its_own_input_only(on_gpu, rng, launches, how):
    torch.manual_seed(0)
    model = Changing()
    tenant = with_tenant(model, rng, ["first", "second"])
    on_gpu(model)
    x = torch.randn(2, 16).to(WHERE)
    hows = ["same", "same", how, "same", "same"]
    found = run(model, [tenant], [0, -1], *((x.clone(), each) for each in hows))
    assert launches == [1, 1, 2, *([2, 1] if how != "left out" else [2]), 1, 1, 1, 1]  # not tried again
    for each, y in zip(hows, found, strict=True):
        assert torch.equal(y, run(model, [tenant], [0, -1], (x.clone(), each))[0])


@torch.no_grad()
def test_low_rank_embeddings_and_heads_of_a_tenant_run_on_the_gpu(on_gpu):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 12))
    own = {
        "0": {"weight": LowRank(torch.randn(2, 12), torch.randn(16, 2), 0.5, True)},
        "1": {"weight": LowRank(torch.randn(2, 16), torch.randn(12, 2), 0.5)},
    }
    for path in own:
        list(install(model, path))
    ids = torch.tensor([[3, 4], [5, 6], [7, 0]])
    tenant = Tenant("t", "lora", {}, None, by_module=own)
    expected = run(model, [tenant], [0, -1, 0], (ids,))[0]
    if WHERE != "cpu":
        moved = {
            path: {name: change.moved(lambda x: x.to(WHERE)) for name, change in changes.items()}
            for path, changes in own.items()
        }
        tenant = Tenant("t", "lora", {}, None, by_module=moved)
    found = run(on_gpu(model), [tenant], [0, -1, 0], (ids.to(WHERE),))[0].cpu()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Four experts, two a token; the packed stacks of gate and up projections change on their own."""
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return make(tmp_path_factory.mktemp("mixture"), config, transformers.MixtralForCausalLM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_all_experts_are_launched_together_and_the_host_asks_for_nothing(
    mixture, on_gpu, launches, monkeypatch, dtype
):
    model = DeltaModel.from_pretrained(mixture / "base", dtype=dtype)
    for i in range(2):
        model.load_delta(f"t{i}", mixture / f"delta-{i}")
    ids, names = tokens(3), ["t0", None, "t1"]
    expected = model(ids, delta_names=names).logits
    on_gpu(model)
    monkeypatch.setattr("bitdelta.experts_forward._by_expert", None)
    found = model(ids.to(WHERE), delta_names=names).logits.cpu()
    # attention, gate, up and down of all experts, head; the router, which is whole, where its base is bf16
    assert len(launches) == 4 + 3 + 1 + (dtype == torch.bfloat16)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= (NEAR if dtype == torch.float32 else 0.03)
    (wrapped,) = (each for each in model.wrapped if each.path.endswith("experts"))
    with model.batch(names, 3) as batch:
        model.model(ids.to(WHERE))
        stack = batch.plans[id(wrapped)]["gate_up_proj"]
    assert [part[:2] for part in stack.grouped.parts] == [(0, 48), (48, 96)]
    whole = [None, None]
    assert Grouped.can(stack.parameter, stack.changes) and Grouped.can(stack.parameter, whole)
    assert not Grouped.can(stack.parameter, [Whole(stack.parameter)])
    assert not Grouped.can(stack.parameter, [None] * 1025)  # more slots than a table has
