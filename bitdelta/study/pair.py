"""A base and a fine-tune of it, small enough to train here: a Llama trained on prose, then on code, every parameter.

    ROOT/base-KEY/        the base, bf16, with its tokenizer
    ROOT/NAME-KEY/        a fine-tune of it

A key is a hash of all that decides the folder, so that another run finds it, and changed settings make another one.
The texts come with Python: the documentation of the language and the source of its library. Their ends are never
trained on; they are what deltas are calibrated to and measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import training
from ..training import Log, silent

Tokens = NDArray[np.int64]  # [rows, length]
HELD_OUT = 0.2  # share of each text
BYTES = 257  # words of a vocabulary without merges: every byte, and the end of a text


@dataclass(frozen=True)
class Size:
    """What decides a pair besides its seed, and how many tokens the studies take."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    length: int  # tokens of a row, in training and after
    batch: int
    base_steps: int
    base_rate: float
    finetune_steps: int
    finetune_rate: float
    calibration_tokens: int
    measured_tokens: int  # of each text
    initial: float  # standard deviation of the random weights that the base begins with
    heads: int = 4
    key_value_heads: int = 2


# small begins as transformers' LlamaConfig does: the inputs of its linears then have most of their power in few
# directions (directions.py). wide is the same but for larger weights to begin with: its inputs have more directions,
# which leaves fitting less to gain. bytes is small without merged words, and learns less.
SIZES = {
    "small": Size(256, 768, 4, 1024, 128, 4, 400, 2e-3, 100, 1e-3, 16384, 4096, 0.02),
    "wide": Size(256, 768, 4, 1024, 128, 4, 400, 2e-3, 100, 1e-3, 16384, 4096, 256**-0.5),
    "bytes": Size(256, 768, 4, BYTES, 128, 4, 400, 2e-3, 100, 1e-3, 16384, 4096, 0.02),
    "tiny": Size(64, 128, 2, 512, 64, 8, 200, 4e-3, 60, 2e-3, 4096, 2048, 64**-0.5),  # for tests
}


@dataclass(frozen=True)
class Tune:
    """One way to fine-tune.

    Args:
        name: of the folder.
        settings: what else decides the result, for the key; JSON.
        run: takes the base as an fp32 model, its tokenizer, the size, the seed, a log, and the folder, for what it
            keeps beside the model; returns the model to save.
    """

    name: str
    settings: Any
    run: Callable[[Any, Any, Size, int, Log, Path], Any]


def _tune_fully(model: Any, tokenizer: Any, size: Size, seed: int, log: Log, folder: Path) -> Any:
    """Every parameter, on code."""
    text, steps = training.kept(training.code(), HELD_OUT), size.finetune_steps
    with training.seeded(seed + 1000):
        training.train(
            model, tokenizer, text, steps, size.finetune_rate, size.length, size.batch, "fine-tune", log
        )
    return model


FULL = Tune("full", "", _tune_fully)


@dataclass(frozen=True)
class Pair:
    """The folders of a base and a fine-tune, and the tokens to use with them."""

    base: Path
    finetuned: Path
    size: Size
    seed: int

    @cached_property
    def tokenizer(self) -> Any:
        return training.load_tokenizer(self.base)

    @cached_property
    def calibration(self) -> Tokens:
        """Prose that no model was trained on."""
        return self.rows(training.prose(), 0, self.size.calibration_tokens)

    @cached_property
    def measured(self) -> dict[str, Tokens]:
        """Code and prose that nothing was trained or calibrated on."""
        prose = self.rows(training.prose(), self.size.calibration_tokens, self.size.measured_tokens)
        return {"code": self.rows(training.code(), 0, self.size.measured_tokens), "prose": prose}

    def rows(self, text: str, first: int, count: int) -> Tokens:
        """`count` tokens of the text's held-out end, from token `first` on."""
        ids = self.tokenizer(training.held_out(text, HELD_OUT), verbose=False)["input_ids"]
        ids = ids[first : first + count]
        if len(ids) < count:
            raise ValueError(f"text: expected {first + count} held-out tokens, got {first + len(ids)}")
        return np.array(ids, np.int64)[: count // self.size.length * self.size.length].reshape(
            -1, self.size.length
        )


def default_folder() -> Path:
    return training.cache_folder("study")


def make_pair(size: Size, seed: int, root: Path | None = None, tune: Tune = FULL, log: Log = silent) -> Pair:
    """The pair of this size and seed, trained where it is not in the folder."""
    training.libraries("a study")
    root = default_folder() if root is None else root
    about = [asdict(size), seed]
    base = training.made_once(root, "base", about, lambda folder: _train_base(size, seed, folder, log))

    def finetune(folder: Path) -> None:
        model, tokenizer = training.load(base), training.load_tokenizer(base)
        training.save(tune.run(model, tokenizer, size, seed, log, folder), tokenizer, folder)

    finetuned = training.made_once(root, tune.name, [about, tune.name, tune.settings], finetune)
    return Pair(base, finetuned, size, seed)


def _train_base(size: Size, seed: int, folder: Path, log: Log) -> None:
    texts = [training.kept(text, HELD_OUT) for text in (training.prose(), training.code())]
    tokenizer = training.train_tokenizer(size.vocabulary, texts)
    shape = size.hidden, size.intermediate, size.layers, size.heads, size.key_value_heads, size.initial
    with training.seeded(seed):
        model = training.new_llama(tokenizer, *shape)
        training.train(
            model,
            tokenizer,
            texts[0],
            size.base_steps,
            size.base_rate,
            size.length,
            size.batch,
            "base",
            log,
        )
    training.save(model, tokenizer, folder)
