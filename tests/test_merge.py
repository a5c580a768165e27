"""merge: the checkpoint that the delta means, bit for bit by the reference, as transformers loads it."""

import json

import numpy as np
import pytest
import torch
import transformers
from folders import changed, read_all, same_bits, weights, write_checkpoint
from models import llama_config, shift

from bitdelta import reference
from bitdelta.array import from_float32, to_float32
from bitdelta.compress import compress
from bitdelta.errors import BaseMismatchError, FormatError
from bitdelta.header import read_safetensors
from bitdelta.merge import merge
from bitdelta.packfile import load


@pytest.fixture
def folders(tmp_path, rng):
    before = {
        "embed_tokens.weight": weights(rng, (50, 300)),
        "q_proj.weight": weights(rng, (40, 300)),
        "up_proj.weight": weights(rng, (33, 270), "float32"),
        "norm.weight": weights(rng, (300,)),
        "frozen.weight": weights(rng, (20, 300), "float16"),
        "ids": np.arange(5),
    }
    after = {
        "embed_tokens.weight": np.concatenate(
            [changed(rng, before["embed_tokens.weight"]), weights(rng, (2, 300))]
        ),
        "q_proj.weight": changed(rng, before["q_proj.weight"], "float32"),
        "up_proj.weight": changed(rng, before["up_proj.weight"], "float16"),
        "norm.weight": weights(rng, (300,)),
        "frozen.weight": before["frozen.weight"],
        "ids": np.arange(5) + 1,
        "flag": np.array([True]),
    }
    base = write_checkpoint(tmp_path / "base", before, {"a": 1}, files={"tokenizer.json": "t"})
    finetuned = write_checkpoint(tmp_path / "finetuned", after, {"a": 2}, files={"tokenizer.json": "t"})
    compress(base, finetuned, tmp_path / "delta", planes=2)
    return tmp_path, before, after


def expected(before, after, packfile):
    """The reference's merged tensors."""
    found = {}
    for name, weight in after.items():
        value = packfile[name]
        if value is None:
            found[name] = before[name]
        elif isinstance(value, np.ndarray):
            found[name] = weight
        else:
            total = to_float32(before[name][: value.shape[0]]) + reference.expand(None, value)
            rounded = from_float32(total, getattr(weight, "__bitdelta_dtype__", weight.dtype.name))
            rows = packfile.rows(name)
            found[name] = rounded if rows is None else np.concatenate([rounded, rows])
    return found


def test_every_tensor_has_the_bits_of_the_reference_in_the_fine_tunes_dtype(folders):
    root, before, after = folders
    report = merge(root / "base", root / "delta", root / "merged")
    merged, reference_bits = read_all(root / "merged"), expected(before, after, load(root / "delta"))
    assert set(merged) == set(after) and report["tensors"] == len(after)
    for name, value in reference_bits.items():
        assert merged[name].dtype == after[name].dtype and same_bits(merged[name], value), name
    assert json.loads((root / "merged" / "config.json").read_text()) == {"a": 2}
    assert (root / "merged" / "tokenizer.json").read_text() == "t"


def test_the_merged_file_is_aligned_and_the_safetensors_library_reads_it(folders):
    from safetensors.torch import load_file

    root, _, after = folders
    merge(root / "base", root / "delta", root / "merged")
    tensors, metadata = read_safetensors(root / "merged" / "model.safetensors")
    assert metadata == {"format": "pt"}
    for tensor in tensors.values():
        assert tensor.offset % tensor.array().itemsize == 0
    assert set(load_file(root / "merged" / "model.safetensors")) == set(after)


def test_a_large_checkpoint_is_split_with_an_index(folders):
    root, before, after = folders
    report = merge(root / "base", root / "delta", root / "merged", max_shard_bytes=40_000)
    assert report["shards"] == len(list((root / "merged").glob("model-*.safetensors"))) > 1
    index = json.loads((root / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in after.values())
    merged = read_all(root / "merged")
    for name, value in expected(before, after, load(root / "delta")).items():
        assert same_bits(merged[name], value), name


def test_another_base_is_refused_and_nothing_is_written(folders):
    root, before, _ = folders
    other = {**before, "q_proj.weight": before["up_proj.weight"]}
    write_checkpoint(root / "other", other)
    with pytest.raises(BaseMismatchError, match="q_proj.weight"):
        merge(root / "other", root / "delta", root / "merged")
    (root / "base" / "tokenizer.json").write_text("changed since")
    with pytest.raises(BaseMismatchError, match="tokenizer.json"):
        merge(root / "base", root / "delta", root / "merged")
    assert sorted(path.name for path in root.iterdir()) == ["base", "delta", "finetuned", "other"]


def test_the_target_may_neither_exist_nor_lie_in_an_input(folders):
    root, *_ = folders
    for out in (root / "base" / "x", root / "delta" / "x"):
        with pytest.raises(ValueError, match="lies inside"):
            merge(root / "base", root / "delta", out)
    (root / "merged").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        merge(root / "base", root / "delta", root / "merged")
    with pytest.raises(FormatError, match="not a packed delta"):
        merge(root / "base", root / "base", root / "new")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A tiny Llama with tied embeddings and a fine-tune of it with added tokens, as transformers saves them."""
    root = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    config = llama_config(hidden_size=64, intermediate_size=160, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(root / "base")
    model.resize_token_embeddings(99)
    shift(model, 1, 0.01).save_pretrained(root / "finetuned", max_shard_size="60KB")
    return root


def load_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
def test_transformers_loads_it_and_its_logits_are_those_of_base_plus_delta(llamas, scale):
    delta, merged = llamas / f"delta-{scale}", llamas / f"merged-{scale}"
    report = compress(llamas / "base", llamas / "finetuned", delta, scale=scale, planes=2)
    merge(llamas / "base", delta, merged)
    model, wanted = load_model(merged), load_model(llamas / "finetuned")
    packfile, before = load(delta), read_all(llamas / "base")
    finetuned = read_all(llamas / "finetuned")
    assert report["extra"] == report["absent"] == [] and set(packfile) == set(finetuned)
    with torch.no_grad():
        for name, value in expected(before, finetuned, packfile).items():
            wanted.get_parameter(name).copy_(torch.from_numpy(np.array(to_float32(value))))
        tokens = torch.arange(99)[None, :50]
        assert model.config.vocab_size == 99 and model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model(tokens).logits, wanted(tokens).logits)


def test_two_planes_are_nearer_to_the_fine_tune_than_one_and_one_than_the_base(llamas, tmp_path):
    tokens = torch.arange(96)[None, :50]

    def logits(folder):
        with torch.no_grad():
            return load_model(folder)(tokens).logits[..., :96]

    target = logits(llamas / "finetuned")
    errors = [(logits(llamas / "base") - target).square().mean()]
    for planes in (1, 2, 4):
        compress(llamas / "base", llamas / "finetuned", tmp_path / f"d{planes}", planes=planes)
        merge(llamas / "base", tmp_path / f"d{planes}", tmp_path / f"m{planes}")
        errors.append((logits(tmp_path / f"m{planes}") - target).square().mean())
    assert errors == sorted(errors, reverse=True)


def tiny(kind):
    """gpt-oss stores its experts as stacks of matrices; GPT-2 its weights transposed, its head tied."""
    if kind == "gpt-oss":
        config = transformers.GptOssConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            head_dim=16,
        )
        return transformers.GptOssForCausalLM(config)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("kind", ["gpt-oss", "gpt2"])
def test_other_architectures_come_back_complete(tmp_path, kind):
    torch.manual_seed(0)
    model = tiny(kind).bfloat16()
    model.save_pretrained(tmp_path / "base")
    shift(model, 1, 0.01).save_pretrained(tmp_path / "finetuned")
    report = compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta", planes=3)
    stacks = [e for e in load(tmp_path / "delta").entries.values() if "planes" in e and len(e["shape"]) == 3]
    assert len(stacks) == (2 if kind == "gpt-oss" else 0) and report["forms"]["row"]["share"] > 0.9
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged, loading = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    for (name, found), wanted in zip(merged.named_parameters(), model.parameters(), strict=True):
        assert (found.float() - wanted.float()).norm() < 0.005 * wanted.numel() ** 0.5, name


def test_a_dry_run_refuses_as_a_merge_does_and_writes_nothing(folders):
    root, _, after = folders
    before = sorted(root.iterdir())
    report = merge(root / "base", root / "delta", root / "merged", dry_run=True)
    assert report["dry_run"] is True and report["tensors"] == len(after)
    with pytest.raises(BaseMismatchError):
        merge(root / "finetuned", root / "delta", root / "merged", dry_run=True)
    with pytest.raises(ValueError, match="inside"):
        merge(root / "base", root / "delta", root / "base" / "merged", dry_run=True)
    assert sorted(root.iterdir()) == before
