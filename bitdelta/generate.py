"""Tokens for a batch of rows of many tenants: transformers' own generate, with end tokens by row.

Where all rows end with the same tokens nothing is different. Otherwise a row is done when its own tenant's end
token comes, and is filled with its own padding token.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .batch import Batch
from .tenant_config import tokens

if TYPE_CHECKING:
    from .model import DeltaModel


class RowEnds(StoppingCriteria):  # type: ignore[misc]
    """A row is done at one of its own end tokens."""

    def __init__(self, ends: Sequence[tuple[int, ...]]) -> None:
        width = max(map(len, ends))
        self.ends = torch.tensor([[*own, *[-1] * (width - len(own))] for own in ends])  # [B, width]
        self.eos_token_id = self.ends.flatten().unique()  # generate pads rows that are done if this is here

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        last = input_ids[:, -1]
        ends = self.ends.repeat_interleave(len(last) // len(self.ends), 0)
        return (ends == last[:, None]).any(1)


def generate(model: DeltaModel, names: Any, *args: Any, **kwargs: Any) -> Any:
    from .model import _count_rows

    n_rows = _count_rows(args, kwargs)
    with model.batch(names, n_rows) as batch, torch.no_grad():
        config = kwargs.get("generation_config") or model.model.generation_config
        ends, pads = _ends(batch, config, kwargs)
        if len(set(ends)) == 1 and len(set(pads)) == 1:
            kwargs |= {"eos_token_id": list(ends[0]) or None, "pad_token_id": pads[0]}
            return model.model.generate(*args, **kwargs)
        config = deepcopy(config)
        config.eos_token_id, config.pad_token_id = None, next(pad for pad in pads if pad is not None)
        kwargs |= {"generation_config": config, "eos_token_id": None}
        kwargs["stopping_criteria"] = StoppingCriteriaList(
            [*kwargs.get("stopping_criteria", ()), RowEnds(ends)]
        )
        made = model.model.generate(*args, **kwargs)
        prompt = _prompt_length(model, args, kwargs)
        sequences = made if isinstance(made, torch.Tensor) else made.sequences
        _pad(sequences, prompt, ends, pads)
        return made


def _ends(
    batch: Batch, config: Any, kwargs: dict[str, Any]
) -> tuple[list[tuple[int, ...]], list[int | None]]:
    """Per row: end tokens and the padding token; what the caller gives is for all rows."""
    eos, pad = tokens(config.eos_token_id), config.pad_token_id
    ends, pads = [], []
    for i in batch.ids:
        tenant = batch.tenants[i] if i >= 0 else None
        own = (
            tokens(kwargs["eos_token_id"])
            if "eos_token_id" in kwargs
            else eos
            if tenant is None
            else tenant.eos
        )
        filler = kwargs["pad_token_id"] if "pad_token_id" in kwargs else pad if tenant is None else tenant.pad
        ends.append(own)
        pads.append(own[0] if filler is None and own else filler)
    return ends, pads


def _prompt_length(model: DeltaModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if model.model.config.is_encoder_decoder:
        return 1
    prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    return 0 if prompt is None else int(prompt.shape[1])


def _pad(sequences: torch.Tensor, prompt: int, ends: list[tuple[int, ...]], pads: list[int | None]) -> None:
    """After a row's end token comes its own padding; in place."""
    factor = len(sequences) // len(ends)
    for row, sequence in enumerate(sequences):
        own, pad = ends[row // factor], pads[row // factor]
        after = torch.isin(sequence[prompt:], torch.tensor(own, dtype=torch.long)).nonzero()
        if len(after) and pad is not None:
            sequence[prompt + int(after[0]) + 1 :] = pad
