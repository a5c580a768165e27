"""Twenty-three architectures, tiny and random: every row of a mixed batch equals the merged model of its tenant."""

import pytest
import torch
import transformers as tf
from models import llama_config, make, merged

from bitdelta.errors import Error
from bitdelta.model import DeltaModel

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
MOE = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# name -> (config, class)
ARCHITECTURES = {
    "llama": (lambda: llama_config(), "LlamaForCausalLM"),
    "mistral": (lambda: tf.MistralConfig(**GROUPED, sliding_window=None), "MistralForCausalLM"),
    "qwen2": (lambda: tf.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True), "Qwen2ForCausalLM"),
    "gemma2": (lambda: tf.Gemma2Config(**GROUPED, sliding_window=16), "Gemma2ForCausalLM"),
    "phi": (lambda: tf.PhiConfig(**SMALL), "PhiForCausalLM"),
    "phi3": (lambda: tf.Phi3Config(**GROUPED), "Phi3ForCausalLM"),
    "gpt2": (
        lambda: tf.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, **ENDS),
        "GPT2LMHeadModel",
    ),
    "gpt-neox": (lambda: tf.GPTNeoXConfig(**SMALL), "GPTNeoXForCausalLM"),
    "mpt": (
        lambda: tf.MptConfig(
            d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64, vocab_size=96, **ENDS
        ),
        "MptForCausalLM",
    ),
    "opt": (
        lambda: tf.OPTConfig(**SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
        "OPTForCausalLM",
    ),
    "falcon": (lambda: tf.FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True), "FalconForCausalLM"),
    "bloom": (lambda: tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, **ENDS), "BloomForCausalLM"),
    "mixtral": (
        lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "MixtralForCausalLM",
    ),
    "qwen2-moe": (
        lambda: tf.Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=48, decoder_sparse_step=1),
        "Qwen2MoeForCausalLM",
    ),
    "phimoe": (
        lambda: tf.PhimoeConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
        "PhimoeForCausalLM",
    ),
    "deepseek-v3": (
        lambda: tf.DeepseekV3Config(
            **SMALL | {"num_hidden_layers": 1}, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2,
            moe_intermediate_size=48, n_group=2, topk_group=1, first_k_dense_replace=0, q_lora_rank=16,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1,
        ),
        "DeepseekV3ForCausalLM",
    ),
    "llama4": (
        lambda: tf.Llama4TextConfig(
            **GROUPED, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1
        ),
        "Llama4ForCausalLM",
    ),
    "switch": (
        lambda: tf.SwitchTransformersConfig(
            vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0, eos_token_id=2, pad_token_id=0,
            decoder_start_token_id=0, expert_capacity=64,
        ),
        "SwitchTransformersForConditionalGeneration",
    ),
    "nllb-moe": (
        lambda: tf.NllbMoeConfig(
            vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, num_experts=4, encoder_sparse_step=2,
            decoder_sparse_step=2, expert_capacity=64, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
            activation_dropout=0.0, decoder_start_token_id=2,
        ),
        "NllbMoeForConditionalGeneration",
    ),
    "t5": (
        lambda: tf.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, eos_token_id=2,
            pad_token_id=0, decoder_start_token_id=0,
        ),
        "T5ForConditionalGeneration",
    ),
    "bert": (lambda: tf.BertConfig(**SMALL, num_labels=3), "BertForSequenceClassification"),
    "vit": (
        lambda: tf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16,
            patch_size=8, num_labels=5,
        ),
        "ViTForImageClassification",
    ),
    "whisper": (
        lambda: tf.WhisperConfig(
            vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20,
            max_target_positions=32, eos_token_id=2, pad_token_id=0, bos_token_id=1, decoder_start_token_id=1,
        ),
        "WhisperForConditionalGeneration",
    ),
}  # fmt: skip
# what holds parameters that nothing but cutting the batch can give to some rows only
SPLIT = {
    "llama4": {"Llama4TextExperts"},
    "opt": {"OPTLearnedPositionalEmbedding"},
    "vit": {"Conv2d", "ViTEmbeddings"},
    "whisper": {"Conv1d", "WhisperPositionalEmbedding"},
}
WHO = [0, None, 1, 0]
NAMES = ["t0", None, "t1", "t0"]


def inputs(name, rows):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 96, (rows, 6), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    if name == "whisper":
        return {
            "input_features": torch.randn(rows, 8, 40, generator=generator),
            "decoder_input_ids": ids,
        }
    if name in ("t5", "switch", "nllb-moe"):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def load(name, folder):
    """A DeltaModel of the architecture with two tenants, t0 and t1, and its class."""
    config, cls = ARCHITECTURES[name]
    cls = getattr(tf, cls)
    make(folder, config(), cls)
    model = DeltaModel.from_pretrained(folder / "base", dtype=torch.float32)
    for i in range(2):
        model.load_delta(f"t{i}", folder / f"delta-{i}")
    return model, cls


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_several_tenants_equal_their_merged_models(name, tmp_path):
    model, cls = load(name, tmp_path)
    batch = inputs(name, len(WHO))
    plain = {i: merged(tmp_path, i, cls) for i in (None, 0, 1)}
    with torch.no_grad():
        logits = model(**batch, delta_names=NAMES).logits
        for row, who in enumerate(WHO):
            wanted = plain[who](**{key: value[row : row + 1] for key, value in batch.items()}).logits[0]
            assert (logits[row] - wanted).abs().max() <= 1e-3 * wanted.abs().max()
            other = plain[1 if who == 0 else 0](
                **{key: value[row : row + 1] for key, value in batch.items()}
            ).logits[0]
            assert (logits[row] - other).abs().max() > 1e-2 * wanted.abs().max()
    report = model.coverage("t0")
    assert sum(report[way] for way in ("linear", "embedding", "norm", "split")) == pytest.approx(1, abs=1e-4)
    assert set(report["modules"]) == SPLIT.get(name, set())
    if hasattr(model, "generate") and "input_ids" in batch and name != "bert":
        options = {"max_new_tokens": 6, "do_sample": False}
        found = model.generate(batch["input_ids"], delta_names=NAMES, **options)
        for row, who in enumerate(WHO):
            wanted = plain[who].generate(batch["input_ids"][row : row + 1], **options)[0]
            assert found[row, : len(wanted)].tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "name", ["opt", "llama4", "t5", "whisper"]
)  # each cut, or run in two parts, in its own way
def test_several_beams_of_padded_rows_are_those_of_each_row_alone(name, tmp_path):
    model, cls = load(name, tmp_path)
    batch = {key: value for key, value in inputs(name, len(WHO)).items() if not key.startswith("decoder")}
    if name != "whisper":
        padding = torch.arange(6) < torch.arange(len(WHO))[:, None]
        batch = {"input_ids": batch["input_ids"].masked_fill(padding, 0), "attention_mask": (~padding).long()}
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    found = model.generate(**batch, delta_names=NAMES, **options)
    for row, who in enumerate(WHO):
        skipped = row if name in ("opt", "llama4") else 0  # of a decoder's prompt
        alone = {key: value[row : row + 1, skipped:] for key, value in batch.items()}
        wanted = merged(tmp_path, who, cls).generate(**alone, **options)
        for own, other in zip(found[2 * row : 2 * row + 2], wanted, strict=True):
            assert own[skipped:][: len(other)].tolist() == other.tolist()


REFUSED = {
    "mamba": (
        lambda: tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=8, **ENDS),
        "MambaForCausalLM",
        "mixer: MambaMixer holds changed parameters itself",
    ),
    "jetmoe": (  # attention that maps and reduces by experts, not by its forward
        lambda: tf.JetMoeConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=1,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        ),
        "JetMoeForCausalLM",
        "self_attention.experts.input_linear: JetMoeParallelExperts takes its rows sorted by expert, and not from",
    ),
    "lfm2": (  # reads the weight of its convolution itself when there is a cache
        lambda: tf.Lfm2Config(**SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
        "Lfm2ForCausalLM",
        "conv: Lfm2ShortConv holds changed parameters itself",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_cannot_be_cut_by_tenant_is_refused_by_name(name, tmp_path):
    config, cls, words = REFUSED[name]
    make(tmp_path, config(), getattr(tf, cls), tenants=1)
    model = DeltaModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with pytest.raises(Error, match=words):
        model.load_delta("t0", tmp_path / "delta-0")
    ids = inputs(name, 2)
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, merged(tmp_path, None, getattr(tf, cls))(**ids).logits)
