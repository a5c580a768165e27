"""Texts in, texts out: prompts of several tenants answered in one batch, each with its tenant's own tokenizer."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .devices import torch_device
from .errors import Error, whole_number
from .merged_model import quiet
from .model import BASE, DeltaModel
from .packfile import CONFIG, load
from .tenant import unknown
from .tokenizer import load_tokenizer

DEFAULT_TOKENS = 64
BASES = (None, "", BASE)  # names of the base


def answer(
    base: str | os.PathLike[str],
    deltas: Mapping[str, str | os.PathLike[str]],
    prompts: Sequence[tuple[str | None, str]],
    max_new_tokens: int = DEFAULT_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    device: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Answers all prompts in one batch.

    Args:
        base: the base's checkpoint, a folder or Hub id.
        deltas: name -> packed delta or LoRA adapter.
        prompts: (name or None for the base, text).
        max_new_tokens: of every answer, at most.
        temperature: 0: the likeliest token; else sampled.
        seed: of the sampling.
        device: where the model runs, as "cuda"; None: the CPU, or what `device_map` says.
        options: for `DeltaModel.from_pretrained`.

    Returns:
        A dict that JSON can hold: rows (delta, prompt, text, tokens), tokens, seconds, tokens_per_second.

    Raises:
        bitdelta.Error: a prompt for a name that is not in `deltas`; a model without a tokenizer.
        TypeError, ValueError: prompts that are none, a number out of range.
        ValueError, bitdelta.DeviceError: a device that is none, or not there.
    """
    place = torch_device(device)
    _check(deltas, prompts, max_new_tokens, temperature, seed)
    with quiet():
        model = DeltaModel.from_pretrained(base, **options)
    if device is not None:
        model.to(place)
    for name, path in deltas.items():
        model.load_delta(name, path)
    names = [None if name in BASES else name for name, _ in prompts]
    tokenizers = {name: _tokenizer(model, name) for name in dict.fromkeys(names)}
    rows = [tokenizers[name](text)["input_ids"] for name, (_, text) in zip(names, prompts, strict=True)]
    length = max(1, *map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :], mask[i, -len(row) :] = torch.tensor(row), 1
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    start = time.perf_counter()
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    made = model.generate(**inputs, delta_names=names, max_new_tokens=max_new_tokens, **sampling).cpu()
    seconds = time.perf_counter() - start
    answers = [
        _text(model, name, tokenizers[name], row[length:]) for name, row in zip(names, made, strict=True)
    ]
    count = sum(n for _, n in answers)
    return {
        "rows": [
            {"delta": name or BASE, "prompt": text, "text": found, "tokens": n}
            for name, (_, text), (found, n) in zip(names, prompts, answers, strict=True)
        ],
        "tokens": count,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(count / seconds, 2),
    }


def _check(deltas: Any, prompts: Any, max_new_tokens: Any, temperature: Any, seed: Any) -> None:
    """Before anything is loaded."""
    if not isinstance(deltas, Mapping):
        raise TypeError(f"deltas: expected name -> folder, got {type(deltas).__name__}")
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    for prompt in prompts:
        if not isinstance(prompt, tuple | list) or len(prompt) != 2 or not isinstance(prompt[1], str):
            raise ValueError(f"prompts: expected (name or None, text), got {str(prompt)[:80]!r}")
        if prompt[0] not in BASES and prompt[0] not in deltas:
            raise unknown(prompt[0], deltas)
    whole_number(max_new_tokens, "max_new_tokens", 1, 1 << 31)
    whole_number(seed, "seed", -(1 << 63), (1 << 63) - 1)
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a number from 0, got {temperature!r}")


def _text(model: DeltaModel, name: str | None, tokenizer: Any, tokens: Any) -> tuple[str, int]:
    """The answer, and how many tokens it has with its end token."""
    with model.batch(name, 1) as batch:
        ends = batch.tenants[0].eos if batch.tenants else _ends(model)
    found = torch.isin(tokens, torch.tensor(ends, dtype=torch.long)).nonzero()
    n = int(found[0]) + 1 if len(found) else len(tokens)
    return tokenizer.decode(tokens[:n], skip_special_tokens=True), n


def _ends(model: DeltaModel) -> tuple[int, ...]:
    from .tenant_config import tokens

    return tokens(model.model.generation_config.eos_token_id)


def _tokenizer(model: DeltaModel, name: str | None) -> Any:
    """The tenant's: the base's files with those that it has of its own."""
    files = dict(model.base.files)
    if name is not None:
        root = model.folders[name]
        if (root / CONFIG).is_file():
            files |= load(root).files()
        elif (own := load_tokenizer(root)) is not None:  # an adapter's
            return own
    with tempfile.TemporaryDirectory() as folder:
        for file, path in files.items():
            target = Path(folder) / file
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path.resolve())
        found = load_tokenizer(Path(folder), model.base.root)
    if found is None:
        raise Error(f"{model.base.root}: no tokenizer in it")
    return found


def describe(report: Mapping[str, Any]) -> list[str]:
    """The answers as text."""
    lines = []
    for row in report["rows"]:
        lines += [f"[{row['delta']}] {row['prompt']}{row['text']}", ""]
    return [
        *lines,
        f"{report['tokens']} tokens in {report['seconds']} s: {report['tokens_per_second']} a second",
    ]
