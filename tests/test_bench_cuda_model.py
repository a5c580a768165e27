"""The decoder of `bench cuda --model` against transformers' Llama."""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bitdelta.bench import cuda_model
from bitdelta.bench.cuda_model import TINY, Decoder, Dense, Weights


def test_a_step_gives_the_logits_of_transformers():
    weights = Weights(TINY, "cpu", 0, torch.float32)
    decoder = Decoder(TINY, Dense(weights), 3, weights.head, 1, 20)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=TINY.hidden,
            intermediate_size=TINY.inner,
            num_attention_heads=TINY.heads,
            num_hidden_layers=TINY.layers,
            vocab_size=TINY.vocabulary,
            rms_norm_eps=cuda_model.EPSILON,
            tie_word_embeddings=False,
        )
    ).eval()
    state = {"model.embed_tokens.weight": weights.embeddings, "lm_head.weight": weights.head}
    state["model.norm.weight"] = weights.norms[-1]
    for i, layer in enumerate(weights.linears):
        prefix = f"model.layers.{i}"
        state[f"{prefix}.input_layernorm.weight"] = weights.norms[2 * i]
        state[f"{prefix}.post_attention_layernorm.weight"] = weights.norms[2 * i + 1]
        for name, part in zip("qkv", layer["qkv"].chunk(3), strict=True):
            state[f"{prefix}.self_attn.{name}_proj.weight"] = part
        state[f"{prefix}.self_attn.o_proj.weight"] = layer["o"]
        for name, part in zip(("gate", "up"), layer["gate_up"].chunk(2), strict=True):
            state[f"{prefix}.mlp.{name}_proj.weight"] = part
        state[f"{prefix}.mlp.down_proj.weight"] = layer["down"]
    model.load_state_dict(state)
    cache = DynamicCache(config=model.config)
    for i, each in enumerate(decoder.cache):
        cache.update(each[0, :, :, :-1].clone(), each[1, :, :, :-1].clone(), i)
    with torch.no_grad():
        expected = model(decoder.tokens[:, None], past_key_values=cache, use_cache=True).logits[:, 0]
        assert torch.allclose(decoder.step(), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(decoder.step(), expected, rtol=1e-4, atol=1e-4)  # the cache is as it was


def test_a_model_of_llama_2_7b_has_its_size():
    shape = cuda_model.LLAMA
    layer = sum(sum(parts) * K for parts, K in shape.widths().values()) + 2 * shape.hidden
    assert shape.layers * layer + 2 * shape.vocabulary * shape.hidden + shape.hidden == 6_738_415_616
