"""The demonstration: a small Llama base, three full fine-tunes, and what their deltas cost in quality.

    text that ships with Python -> base -> 3 fine-tunes -> compress -> merge -> perplexity, sample

The models are trained here, in a minute or two, and kept in a cache; everything is seeded. Compression and
merging are `bitdelta.compress` and `bitdelta.merge`, as for any model, and every perplexity is computed by
transformers from a folder on the disk. Needs PyTorch and transformers, imported inside.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import training
from .table import table
from .training import Log, held_out, kept, load, save, seeded, silent, train

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
    log: Log = silent,
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
    torch, _ = training.libraries("the demo")
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
            text = held_out(_texts(settings)[task])
            rows = [
                _measure("base", base, None, text, task, evaluation),
                _measure("fine-tune", finetuned, _model_bytes(finetuned), text, task, evaluation),
            ]
            for count in planes:
                delta, merged = Path(scratch, f"{task}-{count}"), Path(scratch, f"{task}-{count}-merged")
                begin = time.perf_counter()
                compress(base, finetuned, delta, planes=count)
                seconds = time.perf_counter() - begin
                merge(base, delta, merged)
                name = f"{count} bit" + "s" * (count > 1)
                row = _measure(name, merged, _delta_bytes(delta), text, task, evaluation)
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
    return training.cache_folder("demo")


def models(
    settings: Settings = Settings(), cache: str | os.PathLike[str] | None = None, log: Log = silent
) -> Path:
    """The folder that holds `base` and every fine-tune, as transformers loads them; trained if not cached."""
    training.libraries("the demo")
    root = Path(cache or default_cache())
    return training.made_once(
        root, "models", asdict(settings), lambda folder: _train_all(settings, folder, log)
    )


def _texts(settings: Settings) -> dict[str, str]:
    """The four texts, from what every Python installation holds."""
    import unicodedata

    named = ((point, unicodedata.name(chr(point), "")) for point in range(0x20, 0x3000))
    names = "\n".join(f"U+{point:04X} {name}" for point, name in named if name)
    prose = training.prose()
    texts = {"base": prose, "code": training.code(), "unicode": names, "shout": prose.upper()}
    return {name: text[: settings.text_bytes] for name, text in texts.items()}


def _train_all(settings: Settings, folder: Path, log: Log) -> None:
    texts = _texts(settings)
    tokenizer = training.train_tokenizer(settings.vocabulary, [kept(text) for text in texts.values()])
    shape = (
        settings.hidden,
        settings.intermediate,
        settings.layers,
        settings.heads,
        settings.key_value_heads,
    )
    rows = settings.length, settings.batch
    with seeded(settings.seed):
        model = training.new_llama(tokenizer, *shape)
        train(model, tokenizer, kept(texts["base"]), settings.base_steps, settings.rate, *rows, "base", log)
    save(model, tokenizer, folder / "base")
    for task in TASKS:
        with seeded(settings.seed + 1):
            model = load(folder / "base")
            steps, rate = settings.finetune_steps, settings.finetune_rate
            train(model, tokenizer, kept(texts[task]), steps, rate, *rows, task, log)
        save(model, tokenizer, folder / task)


def _measure(
    name: str, folder: Path, size: int | None, text: str, task: str, evaluation: Evaluation
) -> dict[str, Any]:
    """One row of the table: transformers loads the folder; in fp32, so that only the weights differ."""
    import torch

    tokenizer = training.load_tokenizer(folder)
    model = load(folder).eval()
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
        with seeded(0):  # the most likely tokens alone would soon repeat themselves
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
