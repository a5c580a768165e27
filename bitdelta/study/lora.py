"""A LoRA fine-tune as a delta: the adapter merged into the base, and what that changed at 1 bit, against the adapter.

adapter    y = W x + scale B (A x), as PEFT runs it; its bytes are those of A and B in bf16
fine-tune  the same, merged and rounded to bf16: what the deltas are of
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import training
from ..header import read_safetensors
from ..lora import MODEL
from ..training import Log
from .ladder import COLUMNS, ladder
from .measure import Scores
from .pair import HELD_OUT, Size, Tune
from .trial import Trial

__all__ = ["COLUMNS", "TITLE", "TUNE", "rows"]
TITLE = "LoRA fine-tune, merged, at 1 bit"
RANK, ALPHA = 8, 16
FASTER = 4  # times the rate of a full fine-tune: B begins at zero
ADAPTER = "adapter"


def _adapt(model: Any, tokenizer: Any, size: Size, seed: int, log: Log, folder: Path) -> Any:
    """Every linear but the head; the adapter is kept beside the merged model."""
    from peft import LoraConfig, get_peft_model

    text, rate = training.kept(training.code(), HELD_OUT), FASTER * size.finetune_rate
    with training.seeded(seed + 1000):
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        training.train(
            adapted, tokenizer, text, size.finetune_steps, rate, size.length, size.batch, "LoRA", log
        )
    adapted.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
    return adapted.merge_and_unload()


TUNE = Tune("lora", [RANK, ALPHA, FASTER], _adapt)


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    found = ladder(trial)
    yield next(found)
    yield next(found)
    yield f"adapter of rank {RANK}", _adapter(trial)
    yield from found


def _adapter(trial: Trial) -> Scores:
    from peft import PeftModel

    folder = trial.pair.finetuned / ADAPTER
    model = PeftModel.from_pretrained(training.load(trial.pair.base), folder)
    numbers = sum(tensor.array().size for tensor in read_safetensors(folder / MODEL)[0].values())
    return {**trial.measure.model(model), "about": {"bytes": 2.0 * numbers}}
