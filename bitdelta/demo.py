"""The demonstration: a small Llama base, three full fine-tunes, and what their deltas cost in quality.

    text that ships with Python -> base -> 3 fine-tunes -> compress -> merge -> perplexity, sample

The models are trained here, in a minute or two, and kept in a cache; everything is seeded. Compression and
merging are `bitdelta.compress` and `bitdelta.merge`, as for any model, and every perplexity is computed by
transformers from a folder on the disk. Needs PyTorch and transformers, imported inside.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import Error
from .table import table

TASKS = {
    "code": "the source code of Python's standard library",
    "unicode": "the names of Unicode characters",
    "shout": "the documentation in capital letters",
}
PROMPTS = {
    "code": "    def __init__(self",
    "unicode": "U+0041 LATIN ",
    "shout": "THE VALUE OF ",
}
SAMPLE_WIDTH = 64  # characters of a sample in the table
HELD_OUT = 0.1  # share of each text, its end, that is never trained on


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained models; part of the cache's key."""

    hidden: int = 256
    intermediate: int = 768
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    vocabulary: int = 512
    length: int = 64  # tokens of one training row
    batch: int = 8
    base_steps: int = 400
    finetune_steps: int = 100
    rate: float = 2e-3
    finetune_rate: float = 1e-3
    text_bytes: int = 400_000
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What of the held-out text is measured and how long a sample is."""

    tokens: int = 8192
    sample_tokens: int = 48


SMALL = Settings(64, 128, 1, 2, 1, 300, 32, 2, 2, 2, text_bytes=20_000)  # for tests: seconds, poor text


def run(
    settings: Settings = Settings(),
    evaluation: Evaluation = Evaluation(),
    cache: str | os.PathLike[str] | None = None,
    planes: tuple[int, ...] = (1, 2),
    log: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Trains (or finds in the cache), compresses, merges and measures.

    Args:
        settings: the models and their training.
        evaluation: what is measured.
        cache: the folder that keeps the models; default `default_cache()`.
        planes: the numbers of planes to compress with.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `models`, sizes in bytes, perplexities per held-out token, samples.

    Raises:
        bitdelta.Error: PyTorch or transformers is missing.
    """
    torch, _ = _libraries()
    from .compress import compress
    from .merge import merge

    start = time.perf_counter()
    root = models(settings, cache, log)
    trained = time.perf_counter() - start
    base = root / "base"
    report: dict[str, Any] = {
        "models": str(root),
        "settings": asdict(settings),
        "torch": torch.__version__,
        "train_seconds": round(trained, 1),
        "unit": "bytes of the safetensors files and configuration of one folder, without the tokenizer",
        "finetunes": {},
    }
    report["base_bytes"] = _model_bytes(base)
    with tempfile.TemporaryDirectory(prefix="bitdelta-demo-") as scratch:
        for task, description in TASKS.items():
            log(f"compressing and measuring {task}")
            finetuned = root / task
            held_out = _held_out(_texts(settings)[task])
            rows = [
                _measure("base", base, None, held_out, task, evaluation),
                _measure("fine-tune", finetuned, _model_bytes(finetuned), held_out, task, evaluation),
            ]
            for count in planes:
                delta, merged = Path(scratch, f"{task}-{count}"), Path(scratch, f"{task}-{count}-merged")
                begin = time.perf_counter()
                compress(base, finetuned, delta, planes=count)
                seconds = time.perf_counter() - begin
                merge(base, delta, merged)
                name = f"{count} bit" + "s" * (count > 1)
                row = _measure(name, merged, _delta_bytes(delta), held_out, task, evaluation)
                row["compress_seconds"] = round(seconds, 3)
                row["factor"] = round(rows[1]["bytes"] / row["bytes"], 2)
                rows.append(row)
                shutil.rmtree(merged)
            report["finetunes"][task] = {"text": description, "prompt": PROMPTS[task], "rows": rows}
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    yield f"a base and three fine-tunes of it, {report['base_bytes']:,} bytes each: {report['models']}"
    yield f"sizes are {report['unit']}"
    yield "perplexities are of held-out text, per token: 1 is a perfect guess"
    for task, result in report["finetunes"].items():
        yield ""
        columns = ("", ">bytes", ">smaller", ">perplexity", f"sample after {result['prompt']!r}")
        rows = []
        for row in result["rows"]:
            size = "" if row["bytes"] is None else f"{row['bytes']:,}"
            factor = f"{row['factor']:.1f}x" if "factor" in row else ""
            sample = repr(row["sample"])[1:-1]
            sample = sample if len(sample) <= SAMPLE_WIDTH else f"{sample[: SAMPLE_WIDTH - 4]} ..."
            rows.append([row["model"], size, factor, f"{row['perplexity']:.2f}", sample])
        yield from table(columns, rows, f"{task}: fine-tuned on {result['text']}")
    yield ""
    yield f"the whole took {report['seconds']} s; the models are kept, to try the other commands on:"
    models = Path(report["models"])
    yield f"    bitdelta compress {models / 'base'} {models / next(iter(TASKS))} --out DELTA"
    yield "    bitdelta info DELTA"


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/bitdelta/demo`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitdelta" / "demo"


def models(
    settings: Settings = Settings(),
    cache: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> Path:
    """The folder that holds `base` and every fine-tune, as transformers loads them; trained if not cached."""
    torch, transformers = _libraries()
    about = [asdict(settings), sys.version_info[:3], torch.__version__, transformers.__version__, 1]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    root = Path(cache or default_cache())
    target = root / key
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    try:
        _train_all(settings, scratch, log)
        try:
            scratch.rename(target)
        except OSError:  # another demo finished first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Error(f"the demo needs PyTorch and transformers ({error}): pip install '.[torch]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def _texts(settings: Settings) -> dict[str, str]:
    """The four texts, from what every Python installation holds."""
    import argparse
    import ast
    import inspect
    import unicodedata
    from email import message
    from json import decoder
    from pydoc_data.topics import topics

    prose = "\n".join(topics[name] for name in sorted(topics))
    modules = (argparse, ast, decoder, inspect, message, tempfile, shutil)
    code = "\n".join(inspect.getsource(module) for module in modules)
    named = ((point, unicodedata.name(chr(point), "")) for point in range(0x20, 0x3000))
    names = "\n".join(f"U+{point:04X} {name}" for point, name in named if name)
    texts = {"base": prose, "code": code, "unicode": names, "shout": prose.upper()}
    return {name: text[: settings.text_bytes] for name, text in texts.items()}


def _train_all(settings: Settings, folder: Path, log: Callable[[str], None]) -> None:
    torch, transformers = _libraries()
    texts = _texts(settings)
    tokenizer = _tokenizer(settings, [_kept(text) for text in texts.values()])
    with _seeded(torch, settings.seed):
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.key_value_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=settings.hidden**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        model = transformers.LlamaForCausalLM(config)
        _train(
            model, tokenizer, _kept(texts["base"]), settings, settings.base_steps, settings.rate, "base", log
        )
    _save(model, tokenizer, folder / "base")
    for task in TASKS:
        with _seeded(torch, settings.seed + 1):
            model = _load(folder / "base").to(torch.float32)
            steps, rate = settings.finetune_steps, settings.finetune_rate
            _train(model, tokenizer, _kept(texts[task]), settings, steps, rate, task, log)
        _save(model, tokenizer, folder / task)


@contextmanager
def _seeded(torch: Any, seed: int) -> Iterator[None]:
    """The generator seeded inside, and left as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _tokenizer(settings: Settings, texts: list[str]) -> Any:
    """A byte-level BPE: any text can be written, a few hundred merges make the samples readable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def _train(
    model: Any,
    tokenizer: Any,
    text: str,
    settings: Settings,
    steps: int,
    rate: float,
    name: str,
    log: Callable[[str], None],
) -> None:
    """AdamW on random windows; every parameter is trained."""
    import torch

    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = max(1, steps // 20)
    model.train()
    for step in range(steps):
        factor = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        starts = torch.randint(0, len(tokens) - settings.length, (settings.batch,))
        rows = torch.stack([tokens[start : start + settings.length] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            log(f"training {name}: step {step + 1} of {steps}, loss {loss.item():.3f}")


def _kept(text: str) -> str:
    return text[: int(len(text) * (1 - HELD_OUT))]


def _held_out(text: str) -> str:
    return text[int(len(text) * (1 - HELD_OUT)) :]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def _measure(
    name: str, folder: Path, size: int | None, text: str, task: str, evaluation: Evaluation
) -> dict[str, Any]:
    """One row of the table: transformers loads the folder; in fp32, so that only the weights differ."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = _load(folder).to(torch.float32).eval()
    length = 128
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: evaluation.tokens])
    tokens = tokens[: len(tokens) // length * length].view(-1, length)
    prompt = tokenizer(PROMPTS[task], return_tensors="pt", return_token_type_ids=False)
    total = 0.0
    with torch.inference_mode():
        for rows in tokens.split(16):
            logits = model(input_ids=rows).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
        with _seeded(torch, 0):  # the most likely tokens alone would soon repeat themselves
            sample = model.generate(
                **prompt, max_new_tokens=evaluation.sample_tokens, do_sample=True, temperature=0.6, top_k=20
            )
    new = sample[0, prompt["input_ids"].shape[1] :]
    return {
        "model": name,
        "bytes": size,
        "perplexity": round(math.exp(total / (tokens.shape[0] * (length - 1))), 4),
        "sample": tokenizer.decode(new, skip_special_tokens=True),
    }


def _model_bytes(folder: Path) -> int:
    return (
        sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        + (folder / "config.json").stat().st_size
    )


def _delta_bytes(folder: Path) -> int:
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and "tokenizer" not in path.name
    )


def small() -> tuple[Settings, Evaluation]:
    """Settings for a run of a few seconds, whose text is poor."""
    return replace(SMALL, seed=0), Evaluation(tokens=512, sample_tokens=4)
