"""The small models of the demonstration: a Llama base and three full fine-tunes of it, trained once, kept in a cache.

text that ships with Python -> tokenizer -> base -> one fine-tune per task
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from . import training
from .training import Log, kept, load, save, seeded, silent, train

TASKS = {
    "code": "the source code of Python's standard library",
    "unicode": "the names of Unicode characters",
    "shout": "the documentation in capital letters",
}


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


FULL = Settings()
SMALL = Settings(64, 128, 1, 2, 1, 300, 32, 2, 2, 2, text_bytes=20_000)  # for tests: seconds, poor text


def default_cache() -> Path:
    return training.cache_folder("demo")


def models(settings: Settings = FULL, cache: str | os.PathLike[str] | None = None, log: Log = silent) -> Path:
    """The folder that holds `base` and every fine-tune, as transformers loads them; trained if not cached."""
    training.libraries("the demo")
    root = Path(cache or default_cache())
    return training.made_once(
        root, "models", asdict(settings), lambda folder: _train_all(settings, folder, log)
    )


def texts_of(settings: Settings) -> dict[str, str]:
    """The four texts, from what every Python installation holds."""
    import unicodedata

    named = ((point, unicodedata.name(chr(point), "")) for point in range(0x20, 0x3000))
    names = "\n".join(f"U+{point:04X} {name}" for point, name in named if name)
    prose = training.prose()
    texts = {"base": prose, "code": training.code(), "unicode": names, "shout": prose.upper()}
    return {name: text[: settings.text_bytes] for name, text in texts.items()}


def _train_all(settings: Settings, folder: Path, log: Log) -> None:
    texts = texts_of(settings)
    tokenizer = training.train_tokenizer(settings.vocabulary, [kept(text) for text in texts.values()])
    shape = (
        settings.hidden,
        settings.intermediate,
        settings.layers,
        settings.heads,
        settings.key_value_heads,
        settings.hidden**-0.5,
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
