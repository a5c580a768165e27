"""A base checkpoint and packed deltas of random bits in the shapes of a named model: made in seconds, without training.

Every tenant has signs and norms of its own, so nothing that several tenants read is the same memory. What the tokens
say means nothing; sizes and times are those of the model with fewer layers and a smaller vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..array import aligned_empty
from ..checkpoint import Checkpoint
from ..delta import Delta
from ..packfile_writer import PackfileWriter

SHAPES = {  # hidden, inner, heads, key-value heads: the configs of the models on the Hub
    "llama-2-7b": (4096, 11008, 32, 32),
    "llama-2-13b": (5120, 13824, 40, 40),
    "llama-3-8b": (4096, 14336, 32, 8),
    "mistral-7b": (4096, 14336, 32, 8),
    "tiny": (256, 512, 4, 2),  # checks that it runs
}
VOCABULARY = 4096  # rows of the embeddings and of the head
SIZE = 0.02  # of a weight
SCALE = 0.002  # of a delta: a tenth of the weights


def config_of(shape: str, layers: int) -> Any:
    """The LlamaConfig of one of SHAPES."""
    import transformers

    hidden, inner, heads, pairs = SHAPES[shape]
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY if shape != "tiny" else 512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )


def write_base(root: Path, config: Any) -> None:
    """A checkpoint in bf16: uniform weights, norms of one."""
    import transformers
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim == 2:
            value.random_(-128, 129, generator=generator)  # 8 bits, which bf16 holds
            value *= SIZE / 74  # their standard deviation
        else:
            value.fill_(1)
        tensors[name] = value
    root.mkdir()
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(root)


def write_delta(out: Path, base: Checkpoint, seed: int) -> None:
    """A packed delta of random signs with row scales; norms are whole."""
    rng = np.random.default_rng(seed)
    with PackfileWriter(out, base, finetuned={"name": f"random {seed}"}) as writer:
        for name, tensor in base.items():
            if len(tensor.shape) == 2:
                writer.add(name, random_delta(rng, tensor.shape))
            else:
                value = rng.normal(1, 0.1, tensor.shape).astype(np.float32)
                writer.add(name, (value.view(np.uint32) >> 16).astype(np.uint16), dtype="BF16")


def random_delta(rng: np.random.Generator, shape: tuple[int, ...]) -> Delta:
    """One plane; N is a multiple of 16, K of 256: random bits are then a valid delta."""
    N, K = shape
    sign = aligned_empty((1, N // 16, K // 32, 16), np.uint32)
    sign.view(np.uint64).reshape(-1)[:] = rng.integers(0, 1 << 64, sign.size // 2, np.uint64)
    scale = rng.uniform(0.5, 1.5, (1, N)).astype(np.float32) * np.float32(SCALE)
    return Delta(sign=sign, scale=scale, column=None, shape=(N, K), form="row")
