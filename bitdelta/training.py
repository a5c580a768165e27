"""Small Llamas trained here, for what needs a base and fine-tunes of it: the demonstration and the studies.

    text that ships with Python -> tokenizer -> base -> fine-tune -> folders that transformers loads

Everything is seeded and kept in a cache under a hash of what decides it. Needs PyTorch and transformers, imported
inside.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import Error

HELD_OUT = 0.1  # share of each text, its end, that is never trained on
Log = Callable[[str], None]


def silent(message: str) -> None:
    """The log of who wants none."""


def libraries(what: str) -> tuple[Any, Any]:
    """torch and transformers, or an error that says what needs them."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Error(f"{what} needs PyTorch and transformers ({error}): pip install '.[torch]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def cache_folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/bitdelta/NAME`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitdelta" / name


def child_environment() -> dict[str, str]:
    """The environment of a Python process that is to import this package, wherever it lies."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def made_once(root: Path, name: str, about: Any, make: Callable[[Path], None]) -> Path:
    """ROOT/NAME-KEY, which `make` fills if it is not there; the key is a hash of `about` and of the versions.

    It appears whole or not at all; of two that make it at once, the first one's stays.
    """
    torch, transformers = libraries("training")
    everything = [about, sys.version_info[:3], torch.__version__, transformers.__version__, 1]
    key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:12]
    target = root / f"{name}-{key}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-{key}-", dir=root))
    try:
        make(scratch)
        try:
            scratch.rename(target)
        except OSError:  # another process finished first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def prose() -> str:
    """The documentation of the Python language, about 460 kB."""
    from .text import built_in

    return built_in()


def code() -> str:
    """Source code of Python's standard library, about 430 kB."""
    import argparse
    import ast
    import inspect
    from email import message
    from json import decoder

    modules = (argparse, ast, decoder, inspect, message, tempfile, shutil)
    return "\n".join(inspect.getsource(module) for module in modules)


def kept(text: str, held_out: float = HELD_OUT) -> str:
    """What may be trained on."""
    return text[: int(len(text) * (1 - held_out))]


def held_out(text: str, share: float = HELD_OUT) -> str:
    """The rest."""
    return text[int(len(text) * (1 - share)) :]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's generator seeded inside, and left as it was outside."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train_tokenizer(vocabulary: int, texts: list[str]) -> Any:
    """A byte-level BPE: any text can be written, a few hundred merges make the samples readable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def new_llama(
    tokenizer: Any,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    initial: float,
) -> Any:
    """A Llama with grouped queries and a tied head, normal at random with deviation `initial`; fp32."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=initial,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return transformers.LlamaForCausalLM(config)


def train(
    model: Any,
    tokenizer: Any,
    text: str,
    steps: int,
    rate: float,
    length: int,
    batch: int,
    name: str = "",
    log: Log = silent,
) -> None:
    """AdamW on random windows of the text; every parameter that asks for a gradient is trained."""
    import torch

    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = max(1, steps // 20)
    model.train()
    for step in range(steps):
        factor = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        starts = torch.randint(0, len(tokens) - length, (batch,))
        rows = torch.stack([tokens[start : start + length] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // 5) == 0:
            log(f"training {name}: step {step + 1} of {steps}, loss {loss.item():.3f}")


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """As bf16, with its tokenizer."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> Any:
    """In fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).to(torch.float32)


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
