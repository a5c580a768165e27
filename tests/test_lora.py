"""PEFT's LoRA adapters as tenants, against PEFT itself, alone and beside packed deltas of one and two planes."""

import json

import peft
import pytest
import torch
import transformers
from models import llama_config, make, merged

from bitdelta import compress
from bitdelta.errors import BaseMismatchError, Error, FormatError
from bitdelta.model import DeltaModel

LINEARS = ["q_proj", "v_proj", "down_proj"]


def adapter(root, out, cls=transformers.AutoModelForCausalLM, seed=1, **options):
    """A LoRA adapter with random values, as PEFT saves it; returns the PEFT model."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, **{"target_modules": LINEARS} | options)
    model = peft.get_peft_model(cls.from_pretrained(root / "base", dtype=torch.float32), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(out)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("lora"), llama_config(), tenants=1)


def tokens(rows, length=7, seed=0):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_near(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 3e-4 * wanted.abs().max()


OPTIONS = {
    "linears": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
    "embeddings": {"target_modules": ["embed_tokens", "o_proj", "lm_head"]},
    "saved-whole": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_rows_of_an_adapter_equal_peft(llama, tmp_path, name):
    wanted = adapter(llama, tmp_path / "adapter", **OPTIONS[name])
    model = DeltaModel.from_pretrained(llama / "base", dtype=torch.float32)
    model.load_delta("lora", tmp_path / "adapter")
    ids = tokens(3)
    logits = model(ids, delta_names=["lora", None, "lora"]).logits
    assert_near(logits[[0, 2]], wanted(ids[[0, 2]]).logits)
    with wanted.disable_adapter():
        assert_near(logits[1], wanted(ids[1:2]).logits[0])
    assert (logits[1] - wanted(ids[1:2]).logits[0]).abs().max() > 1e-2
    found = model.generate(ids, delta_names="lora", max_new_tokens=8, do_sample=False)
    assert found.tolist() == wanted.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    assert_near(model.merge_and_unload("lora")(ids).logits, wanted(ids).logits)


@torch.no_grad()
def test_an_adapter_of_conv1d_and_of_a_classifier_equals_peft(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0
    )
    cls = transformers.GPT2ForSequenceClassification
    make(tmp_path, config, cls, tenants=0)
    wanted = adapter(
        tmp_path, tmp_path / "adapter", cls, target_modules=["c_attn", "c_proj"], task_type="SEQ_CLS"
    )
    model = DeltaModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.load_delta("lora", tmp_path / "adapter")
    ids = tokens(3)
    assert_near(model(ids, delta_names="lora").logits, wanted(ids).logits)
    mixed = model(ids, delta_names=["lora", None, None]).logits
    assert_near(mixed[:1], wanted(ids[:1]).logits)


@torch.no_grad()
def test_one_batch_mixes_base_one_bit_two_bit_and_lora_rows(llama, tmp_path):
    wanted = adapter(llama, tmp_path / "adapter")
    compress(llama / "base", llama / "fine-0", tmp_path / "two", planes=2, scale="rank1")
    model = DeltaModel.from_pretrained(llama / "base", dtype=torch.float32)
    model.load_delta("one", llama / "delta-0")
    model.load_delta("two", tmp_path / "two")
    model.load_delta("lora", tmp_path / "adapter")
    names = ["two", "lora", None, "one", "lora", "two"]
    ids = tokens(6)
    logits = model(ids, delta_names=names).logits
    found = model.generate(ids, delta_names=names, max_new_tokens=8, do_sample=False)
    for row, name in enumerate(names):
        alone = model(ids[row : row + 1], delta_names=[name]).logits[0]
        assert_near(logits[row], alone)
        own = model.generate(ids[row : row + 1], delta_names=[name], max_new_tokens=8, do_sample=False)[0]
        assert found[row, : len(own)].tolist() == own.tolist()
    assert_near(logits[1], wanted(ids[1:2]).logits[0])
    assert_near(logits[2], merged(llama, None)(ids[2:3]).logits[0])
    assert_near(logits[3], merged(llama, 0)(ids[3:4]).logits[0])


def test_adapters_that_cannot_run_are_refused_by_name(llama, tmp_path):
    model = DeltaModel.from_pretrained(llama / "base", dtype=torch.float32)
    other = make(tmp_path / "wide", llama_config(hidden_size=48), tenants=0)
    adapter(other, tmp_path / "reshaped")
    with pytest.raises(
        BaseMismatchError, match=r"down_proj: expected a LoRA of \[32, 64\] .* has \[48, 64\]"
    ):
        model.load_delta("reshaped", tmp_path / "reshaped")
    deep = make(tmp_path / "deep", llama_config(num_hidden_layers=3), tenants=0)
    adapter(deep, tmp_path / "deeper")
    with pytest.raises(BaseMismatchError, match=r"layers.2.*the model has no such module"):
        model.load_delta("deeper", tmp_path / "deeper")
    adapter(llama, tmp_path / "dora", use_dora=True)
    with pytest.raises(Error, match="use_dora is not supported; merge it with PEFT"):
        model.load_delta("dora", tmp_path / "dora")
    folder = tmp_path / "adapter"
    adapter(llama, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(Error, match="peft_type IA3: expected LORA"):
        model.load_delta("ia3", folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match="no adapter_model.safetensors"):
        model.load_delta("empty", folder)
    assert model.deltas == []
    assert torch.equal(model(tokens(2)).logits, merged(llama, None)(tokens(2)).logits)
