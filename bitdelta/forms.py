"""Pairs the tensors of a base and a fine-tune by name and decides in which form each travels.

    signs, of the scale form asked for   matrices [N, K] and stacks of matrices [E, N, K] of floats, where it is smaller
    signs, row scales                    embeddings and heads; added vocabulary rows whole
    whole                                norms, biases, small or odd tensors, what `whole` names, what the base lacks
    tied                                 one of several names of the same bytes
    refused by name                      renamed, reshaped and quantised tensors

Only names, shapes and dtypes are looked at. Which tensors are the same as the base's shows while compressing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .errors import BaseMismatchError, FormatError
from .packfile import keys_of, spec_bytes
from .tensor import DTYPES, FLOATS, Tensor

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

VOCABULARY = (  # embeddings and heads, as model families name them: one row per token
    "embed_tokens.weight",
    "lm_head.weight",
    "wte.weight",
    "embed_in.weight",
    "embed_out.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "shared.weight",
)


@dataclass(frozen=True)
class Plan:
    """One tensor of the fine-tune: what its entry in the packfile will say, and what it is made from."""

    name: str
    finetuned: Tensor
    base: Tensor | None  # None: the base does not have it
    entry: dict[str, Any]  # form, planes, shape, dtype, rows, tied_to
    about: dict[str, Any] = field(default_factory=dict)  # what else the entry will say

    @property
    def nbytes(self) -> int:
        """Bytes that the packfile needs for it, at most."""
        return sum(map(spec_bytes, keys_of(self.name, self.entry).values()))

    @property
    def read_bytes(self) -> int:
        """Bytes of both weights."""
        return self.finetuned.nbytes + (self.base.nbytes if self.base is not None else 0)


def plan_tensors(
    base: Checkpoint, finetuned: Checkpoint, planes: int, scale: str, whole: Sequence[str]
) -> tuple[list[Plan], list[str]]:
    """A plan per tensor of the fine-tune, in its file's order, tied ones last, and the names that only the base has.

    Raises:
        ValueError: a glob of `whole` that matches nothing.
        bitdelta.BaseMismatchError: a tensor that the base has under another name or in another shape.
        bitdelta.FormatError: a quantised checkpoint.
    """
    for pattern in whole:
        if not any(fnmatchcase(name, pattern) for name in finetuned):
            raise ValueError(f"whole: {pattern!r} matches no tensor of {finetuned.root}")
    for checkpoint in (base, finetuned):
        _refuse_quantised(checkpoint)
    absent = [name for name in base if name not in finetuned]
    _refuse_renamed(base, finetuned, absent, whole)
    sizes = (_vocabulary_sizes(base.config), _vocabulary_sizes(finetuned.config))
    plans, ties = [], _ties(base, finetuned)
    for name, tensor in finetuned.items():
        if name in ties:
            entry = _entry(tensor, form="tied", tied_to=ties[name])
        elif name not in base or any(fnmatchcase(name, pattern) for pattern in whole):
            entry = _entry(tensor, form="whole")
        else:
            entry = _pair(base[name], tensor, planes, scale, sizes)
        plans.append(Plan(name, tensor, base.get(name), entry))
    return sorted(plans, key=lambda plan: plan.entry["form"] == "tied"), absent


def with_form(plan: Plan, form: str, planes: int) -> Plan:
    """The plan of a tensor that is packed, in another form; 0 planes: as the base's, whatever has changed."""
    entry = {key: value for key, value in plan.entry.items() if key != "planes"}
    return replace(
        plan, entry={**entry, "form": form, "planes": planes} if planes else {**entry, "form": "same"}
    )


def without(plan: Plan) -> Plan | None:
    """The plan with the base's values; None where those are not of the fine-tune's shape and dtype."""
    base, finetuned = plan.base, plan.finetuned
    if base is None or (base.shape, base.dtype) != (finetuned.shape, finetuned.dtype):
        return None
    return with_form(plan, "same", 0)


def packed_bytes(plan: Plan) -> int:
    """Bytes of signs and scales; those of added rows are not counted."""
    keys = keys_of(plan.name, plan.entry)
    return sum(spec_bytes(spec) for key, spec in keys.items() if key != f"{plan.name}.rows")


def _pair(
    base: Tensor, finetuned: Tensor, planes: int, scale: str, sizes: tuple[set[int], set[int]]
) -> dict[str, Any]:
    name, whole = finetuned.name, _entry(finetuned, form="whole")
    for tensor, side in ((base, "base"), (finetuned, "fine-tune")):
        if not DTYPES[tensor.dtype][1] and len(tensor.shape) > 1:  # fp8, fp6, fp4
            raise FormatError(
                f"{name}: {tensor.dtype} in the {side}; there is no delta of quantised weights: take the checkpoint "
                f"before quantisation, or store the tensor whole: --whole '{name}'"
            )
    rows = 0
    if base.shape != finetuned.shape:
        rows = _added_rows(base, finetuned, sizes)
        if len(base.shape) == 1:
            return whole
    if base.dtype not in FLOATS or finetuned.dtype not in FLOATS or len(base.shape) not in (2, 3):
        return whole
    form = "row" if name.endswith(VOCABULARY) or rows else scale
    packed = _entry(finetuned, form=form, planes=planes)
    if rows > 0:
        packed["rows"] = rows
    size = sum(map(spec_bytes, keys_of(name, packed).values()))
    return packed if 0 < size < finetuned.nbytes else whole


def _added_rows(base: Tensor, finetuned: Tensor, sizes: tuple[set[int], set[int]]) -> int:
    """How many rows the fine-tune's vocabulary has more (or fewer, negative); other shapes are refused."""
    is_vocabulary = finetuned.name.endswith(VOCABULARY) or (
        base.shape[:1] and base.shape[0] in sizes[0] and finetuned.shape[0] in sizes[1]
    )
    same_rows = len(base.shape) == len(finetuned.shape) <= 2 and base.shape[1:] == finetuned.shape[1:]
    if not is_vocabulary or not same_rows or not base.shape:
        raise BaseMismatchError(
            f"{finetuned.name}: {list(finetuned.shape)} in the fine-tune, {list(base.shape)} in the base; there is "
            f"no delta of a reshaped tensor: is it the right base? To store it whole: --whole '{finetuned.name}'"
        )
    return finetuned.shape[0] - base.shape[0]


def _ties(base: Checkpoint, finetuned: Checkpoint) -> dict[str, str]:
    """Name -> the name of the same bytes that stands for it: one that the base has, if there is one.

    Names that the base keeps apart are no tie.
    """
    groups: dict[str, list[str]] = {}
    for name, first in finetuned.aliases.items():
        groups.setdefault(first, [first]).append(name)
    ties = {}
    for group in groups.values():
        known = [name for name in group if name in base]
        chosen = (known or group)[0]
        for name in group:
            apart = name in base and base.aliases.get(name, name) != base.aliases.get(chosen, chosen)
            if name != chosen and not apart:
                ties[name] = chosen
    return ties


def _refuse_renamed(base: Checkpoint, finetuned: Checkpoint, absent: list[str], whole: Sequence[str]) -> None:
    """A matrix that only the fine-tune has and one of its shape that only the base has are one tensor, renamed."""
    lost = [name for name in absent if name not in base.aliases and len(base[name].shape) > 1]
    for name, tensor in finetuned.items():
        if name in base or len(tensor.shape) < 2 or any(fnmatchcase(name, pattern) for pattern in whole):
            continue
        candidates = [other for other in lost if base[other].shape == tensor.shape]
        if candidates:
            likely = max(candidates, key=lambda other: _common_parts(name, other))
            raise BaseMismatchError(
                f"{name}: not in the base, which has {likely} of the same shape that the fine-tune lacks; rename it "
                f"in the fine-tune, or store it whole: --whole '{name}'"
            )
    if not any(name in base for name in finetuned):
        raise BaseMismatchError(
            f"{finetuned.root} and {base.root} have no tensor in common ({next(iter(finetuned))} against "
            f"{next(iter(base))}); is it the right base?"
        )


def _common_parts(a: str, b: str) -> int:
    """Length of the common end, in parts between dots."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    about = checkpoint.config.get("quantization_config")
    if about:
        method = about.get("quant_method") if isinstance(about, dict) else about
        raise FormatError(
            f"{checkpoint.root}: quantised ({method}, by quantization_config in config.json); there is no delta of "
            "quantised weights: take the checkpoint before quantisation"
        )


def _vocabulary_sizes(config: dict[str, Any]) -> set[int]:
    """Every vocab_size of the config, those of nested configs included."""
    found, parts = set(), [config]
    while parts:
        for key, value in parts.pop().items():
            if key == "vocab_size" and isinstance(value, int):
                found.add(value)
            elif isinstance(value, dict):
                parts.append(value)
    return found


def _entry(tensor: Tensor, **about: Any) -> dict[str, Any]:
    return {**about, "shape": list(tensor.shape), "dtype": tensor.dtype}


def packable(entry: Mapping[str, Any]) -> int:
    """Parameters that the budget counts: all but added rows."""
    return math.prod(entry["shape"]) - entry.get("rows", 0) * entry["shape"][-1]


def parameters(entry: dict[str, Any]) -> int:
    """How many parameters an entry stands for; those of a tied tensor are its partner's."""
    return 0 if entry["form"] == "tied" else math.prod(entry["shape"])


def stored_bytes(entry: dict[str, Any]) -> int:
    """Bytes of the fine-tune's tensor."""
    return parameters(entry) * DTYPES[entry["dtype"]][0] // 8
