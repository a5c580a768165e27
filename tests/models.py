"""Tiny random models of transformers and fine-tunes of them, for tests."""

import json

import safetensors.torch
import torch
import transformers

from bitdelta import compress, merge


def llama_config(**about):
    settings = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaConfig(**settings | about)


def shift(model, seed, size=0.03):
    """Changes every parameter and floating buffer that is saved, a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer += size * torch.rand(buffer.shape, generator=generator).to(buffer.dtype)
    return model


def make(root, config, cls=None, tenants=2, size=0.03, change=None, planes=1, seed=0, keep_base=False):
    """Folders base, fine-I, delta-I, merged-I under `root`; `change(model, i)` may alter a fine-tune further."""
    cls = cls or transformers.LlamaForCausalLM
    torch.manual_seed(seed)
    if not keep_base:
        cls(config).save_pretrained(root / "base")
    for i in range(tenants):
        model = shift(cls.from_pretrained(root / "base"), i + 1, size)
        model = (change(model, i) if change else None) or model
        model.save_pretrained(root / f"fine-{i}")
        compress(root / "base", root / f"fine-{i}", root / f"delta-{i}", planes=planes)
        merge(root / "base", root / f"delta-{i}", root / f"merged-{i}")
    return root


def longer(model, i):
    """A `change` of `make`: tenant 1 has three tokens more."""
    if i == 1:
        with torch.random.fork_rng():
            torch.manual_seed(i)
            model.resize_token_embeddings(99, mean_resizing=False)
    return model


def write_adapter(folder, tensors, **about):
    """A LoRA folder of rank 4 as PEFT writes it."""
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **about}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merged(root, i, cls=transformers.AutoModelForCausalLM):
    """The model that tenant i's rows must equal; None: the base."""
    return cls.from_pretrained(root / ("base" if i is None else f"merged-{i}"), dtype=torch.float32).eval()
