"""Tokens for a batch of rows of many tenants: transformers' own generate, with end tokens and sampling by row.

    end and padding tokens   a row is done when its own tenant's end token comes, then filled with its padding token
    sampling                 do_sample, temperature, top_k, top_p, min_p, typical_p, repetition_penalty of the tenant's
                             generation_config.json, so that a row is drawn as its fine-tune alone would draw it

What the caller gives, as an argument or in a generation_config, is for all rows. Where all rows agree, transformers
does everything itself. Lengths, beams (and how they are drawn) and everything else are the caller's or the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .batch import Batch
from .errors import Error
from .tenant_config import tokens

if TYPE_CHECKING:
    from .model import DeltaModel

# the value that does nothing, or None; for generate itself where rows differ
SAMPLING: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0,
    "repetition_penalty": 1.0,
}  # fmt: skip
TOP_K = 50  # transformers' default where a config says nothing

Settings: TypeAlias = tuple[tuple[str, Any], ...]  # of SAMPLING, all of them


class RowEnds(StoppingCriteria):  # type: ignore[misc]
    """A row is done at one of its own end tokens."""

    def __init__(self, ends: Sequence[tuple[int, ...]]) -> None:
        width = max(map(len, ends))
        self.ends = torch.tensor([[*own, *[-1] * (width - len(own))] for own in ends])  # [B, width]
        self.eos_token_id = self.ends.flatten().unique()  # generate pads rows that are done if this is here

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        last = input_ids[:, -1]
        self.ends = self.ends.to(last.device)
        ends = self.ends.repeat_interleave(len(last) // len(self.ends), 0)
        return (ends == last[:, None]).any(1)


class RowSampling(LogitsProcessor):  # type: ignore[misc]
    """Every row's scores as its own settings want them; of a greedy row among sampled ones only the best is left."""

    def __init__(self, settings: Sequence[Settings]) -> None:
        self.n_rows = len(settings)
        self.groups = []
        for own in dict.fromkeys(settings):
            rows = torch.tensor([i for i, other in enumerate(settings) if other == own])
            self.groups.append((rows, _processors(dict(own)), dict(own)["do_sample"]))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        factor, out = len(scores) // self.n_rows, scores.clone()
        for rows, processors, is_sampled in self.groups:
            rows = (rows[:, None] * factor + torch.arange(factor)).flatten().to(scores.device)
            own = processors(input_ids[rows], scores[rows])
            if not is_sampled:
                best = own.argmax(-1, keepdim=True)
                own = torch.full_like(own, -torch.inf).scatter(-1, best, own.gather(-1, best))
            out[rows] = own
        return out


class RefuseNaN(LogitsProcessor):  # type: ignore[misc]
    """Rows whose logits are not numbers have no next token: an error that names the first."""

    def __init__(self, batch: Batch) -> None:
        self.ids = batch.ids
        self.names = [tenant.name for tenant in batch.tenants]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wrong = scores.isnan().any(-1).nonzero()
        if len(wrong):
            row = int(wrong[0]) // (len(scores) // len(self.ids))
            tenant = self.ids[row]
            name = "the base" if tenant < 0 else self.names[tenant]
            raise Error(f"row {row} ({name}): NaN in its logits at token {input_ids.shape[1]}")
        return scores


def _processors(own: Mapping[str, Any]) -> LogitsProcessorList:
    """In transformers' order."""
    made = LogitsProcessorList()
    if own["repetition_penalty"] != 1:
        made.append(RepetitionPenaltyLogitsProcessor(own["repetition_penalty"]))
    if not own["do_sample"]:
        return made
    for key, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
        ("typical_p", TypicalLogitsWarper),
    ):
        if own[key] is not None and own[key] != SAMPLING[key]:
            made.append(warper(own[key]))
    return made


def generate(model: DeltaModel, names: Any, *args: Any, **kwargs: Any) -> Any:
    from .model import _count_rows

    n_rows = _count_rows(args, kwargs)
    with model.batch(names, n_rows) as batch, torch.no_grad():
        given = kwargs.get("generation_config")
        config = given or model.model.generation_config
        kwargs |= _sampling(batch, config, kwargs, is_given=given is not None)
        config = kwargs.get("generation_config") or config
        kwargs["logits_processor"] = LogitsProcessorList(
            [RefuseNaN(batch), *kwargs.get("logits_processor", ())]
        )
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


def _sampling(batch: Batch, config: Any, kwargs: dict[str, Any], is_given: bool) -> dict[str, Any]:
    """Arguments of generate that give every row its own settings."""
    if is_given:
        return {}
    settings = [_settings(batch, i, config, kwargs) for i in batch.ids]
    if (kwargs.get("num_beams", config.num_beams) or 1) > 1:
        return {}
    if len(set(settings)) == 1:
        return dict(set(settings[0]) - set(_settings(batch, -1, config, kwargs)))
    neutral = deepcopy(config)
    for key, value in SAMPLING.items():
        setattr(neutral, key, value)
    processors = LogitsProcessorList([*kwargs.get("logits_processor", ()), RowSampling(settings)])
    is_sampled = any(dict(own)["do_sample"] for own in settings)
    return SAMPLING | {
        "generation_config": neutral,
        "do_sample": is_sampled,
        "logits_processor": processors,
    }


def _settings(batch: Batch, i: int, config: Any, kwargs: dict[str, Any]) -> Settings:
    """A row's own: the caller's arguments, else its tenant's, else the base's."""
    own = batch.tenants[i].generation if i >= 0 else None
    found = {}
    for key, neutral in SAMPLING.items():
        value = getattr(config, key, None) if own is None else own.get(key)
        if value is None:
            value = TOP_K if key == "top_k" else neutral
        found[key] = kwargs.get(key, value)
    return tuple(found.items())


def _ends(
    batch: Batch, config: Any, kwargs: dict[str, Any]
) -> tuple[list[tuple[int, ...]], list[int | None]]:
    """Per row: end tokens and the padding token; what the caller gives is for all rows."""
    eos, pad = tokens(config.eos_token_id), config.pad_token_id
    ends, pads = [], []
    for i in batch.ids:
        tenant = batch.tenants[i] if i >= 0 else None
        own = eos if tenant is None else tenant.eos
        if "eos_token_id" in kwargs:
            own = tokens(kwargs["eos_token_id"])
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
        ends_here = torch.tensor(own, dtype=torch.long, device=sequence.device)
        after = torch.isin(sequence[prompt:], ends_here).nonzero()
        if len(after) and pad is not None:
            sequence[prompt + int(after[0]) + 1 :] = pad
