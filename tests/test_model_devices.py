"""DeltaModel where its modules are: on one GPU or several (fake ones), or off the GPU; and graphs of the operators."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from fake_gpus import fake_gpus
from models import llama_config, longer, make, merged, write_adapter
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import MixtralConfig, MixtralForCausalLM, StaticCache

from bitdelta import ops
from bitdelta.model import DeltaModel

NAMES = ["t0", None, "lora", "t1"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Tenant 1 has three tokens more; lora adapts queries, an up projection and the embeddings."""

    root = make(tmp_path_factory.mktemp("llama"), llama_config(), change=longer)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for path, n, k in (("layers.0.self_attn.q_proj", 32, 32), ("layers.1.mlp.up_proj", 64, 32)):
        tensors[f"base_model.model.model.{path}.lora_A.weight"] = torch.randn(4, k, generator=generator)
        tensors[f"base_model.model.model.{path}.lora_B.weight"] = torch.randn(n, 4, generator=generator)
    table = "base_model.model.model.embed_tokens.lora_embedding"
    tensors |= {f"{table}_A": torch.randn(4, 96), f"{table}_B": torch.randn(32, 4)}
    write_adapter(root / "lora", tensors)
    return root


def load(root, **options):
    model = DeltaModel.from_pretrained(root / "base", **{"dtype": torch.bfloat16} | options)
    for name, folder in (("t0", "delta-0"), ("t1", "delta-1"), ("lora", "lora")):
        model.load_delta(name, root / folder)
    return model


@pytest.fixture
def gpus(monkeypatch):
    with fake_gpus(monkeypatch) as found:
        yield found


def move(model, gpus, place):
    """Parameters and buffers to a fake GPU; tenants are read again, which is real, and brought there."""
    model._apply(lambda tensor: gpus.put(tensor, place))
    for name in model.deltas:
        model.prefetch(name)
    return model


def devices_of(tenant):
    """Parameter -> the devices of what it becomes."""
    found = {}
    for name, change in tenant.changes.items():
        seen = found.setdefault(name, set())
        change.moved(lambda tensor, seen=seen: (seen.add(str(tensor.device)), tensor)[1])
    return found


@torch.no_grad()
def test_everything_is_on_the_gpu_and_nothing_is_waited_for(llama, gpus):
    model = move(load(llama), gpus, "cuda:0")
    for tenant in model.pool.resident:
        assert set().union(*devices_of(tenant).values()) == {"cuda:0"}
    with gpus.mode, model.batch(NAMES, 4):
        ids = torch.randint(3, 96, (4, 5), device="cuda:0")
        cache = StaticCache(config=model.config, max_cache_len=16)
        for step in (ids, ids[:, :1], ids[:, :1]):
            logits = model.model(input_ids=step, past_key_values=cache, use_cache=True).logits
            assert logits.device == torch.device("cuda:0")
            assert logits.shape == (4, step.shape[1], 99) and logits.dtype == torch.bfloat16


@torch.no_grad()
def test_experts_are_not_waited_for_either(gpus, tmp_path):
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    make(tmp_path, config, MixtralForCausalLM)
    model = DeltaModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    for i in range(2):
        model.load_delta(f"t{i}", tmp_path / f"delta-{i}")
    move(model, gpus, "cuda:0")
    experts = model.model.model.layers[0].mlp.experts
    with gpus.mode, model.batch(["t0", None, "t1"], 3):
        x = torch.randn(3, 32, device="cuda:0", dtype=torch.bfloat16)
        y = experts(x, torch.randint(4, (3, 2), device="cuda:0"), torch.rand(3, 2, device="cuda:0"))
    assert y.device == x.device and y.shape == x.shape and y.dtype == x.dtype


@torch.no_grad()
def test_what_waits_for_a_gpu_or_mixes_devices_is_seen(llama, gpus, monkeypatch):
    with gpus.mode:
        x = torch.zeros(2, device="cuda:0")
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
    model = move(load(llama), gpus, "cuda:0")
    monkeypatch.setattr(ops, "on_device", lambda tensor, device: tensor)
    with gpus.mode, pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        model(torch.randint(3, 96, (4, 5), device="cuda:0"), delta_names=NAMES)


@torch.no_grad()
def test_modules_on_several_gpus_have_their_tenants_there(llama, gpus):
    model = load(llama)
    places = {
        "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1,
        "lm_head": 0,
    }  # fmt: skip
    for path, gpu in places.items():  # as accelerate's dispatch_model does, for real GPUs
        module = model.model.get_submodule(path)
        module._apply(lambda tensor, gpu=gpu: gpus.put(tensor, f"cuda:{gpu}"))
        for part in module.modules():
            if part is module or list(part.parameters(recurse=False)):
                with gpus.mode:
                    add_hook_to_module(part, AlignDevicesHook(execution_device=f"cuda:{gpu}"), append=True)
    model.pool.reset()
    for name in model.deltas:
        model.prefetch(name)
    (tenant,) = (tenant for tenant in model.pool.resident if tenant.name == "t0")
    for parameter, found in devices_of(tenant).items():
        (gpu,) = (gpu for path, gpu in places.items() if parameter.startswith(path))
        assert found == {f"cuda:{gpu}"}
    with gpus.mode:
        logits = model(torch.randint(3, 96, (4, 5), device="cuda:0"), delta_names=NAMES).logits
    assert logits.device == torch.device("cuda:0")


@torch.no_grad()
def test_layers_kept_on_the_disk_run_with_their_tenants(llama, tmp_path):
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm"], "cpu")
    model = load(
        llama,
        dtype=torch.float32,
        device_map={**places, "lm_head": "cpu", "model.layers.1": "disk"},
        offload_folder=tmp_path,
    )
    assert any(parameter.device.type == "meta" for parameter in model.model.parameters())
    ids = torch.randint(3, 96, (4, 5), generator=torch.Generator().manual_seed(0))
    logits = model(ids, delta_names=NAMES).logits
    for row, who in ((0, 0), (1, None), (3, 1)):
        wanted = merged(llama, who)(ids[row : row + 1]).logits[0]
        found = logits[row, :, : wanted.shape[-1]]
        assert (found - wanted).abs().max() <= 3e-4 * wanted.abs().max()


def parts_on(mode, device, n=40, k=300):
    with mode:
        sign = torch.zeros(1, 3, 16, 16, dtype=torch.int32, device=device)
        deltas = [ops.TorchDelta(sign, torch.ones(1, n, device=device), None, (n, k)) for _ in range(2)]
        return torch.randn(6, k, device=device), torch.randn(n, k, device=device), deltas


@pytest.mark.parametrize("gpu", [0, 1])
def test_operators_on_any_gpu_become_graphs(gpus, gpu):
    device = torch.device("cuda", gpu)
    x, weight, deltas = parts_on(gpus.mode, device)
    with gpus.mode:
        ids = torch.zeros(6, dtype=torch.int64, device=device)

        def products(x, weight, ids):
            y = ops.linear(x, weight, None, deltas, ids)
            first, second = ops.linear_parts(x, [(weight, None, deltas), (None, None, deltas)], ids)
            return ops.linear_transposed(ops.linear_add(y, x, deltas, ids) + first + second, deltas, ids)

        graph = make_fx(products)(x, weight, ids)
        called = [node.target for node in graph.graph.nodes if "bitdelta" in str(node.target)]
        assert len(called) == 5
        assert graph(x, weight, ids).device == device
        signs, rows = [delta.sign for delta in deltas], [delta.row for delta in deltas]
        dx, drows, dcolumns = torch.ops.bitdelta.linear_backward(
            x @ weight.T, x, weight, signs, rows, [], ids, True, True, False, True
        )
    assert dx.device == drows[0].device == device and not dcolumns
    assert dx.shape == x.shape and drows[1].shape == (1, 40)
