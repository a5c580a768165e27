"""A PEFT LoRA adapter as a tenant: adapter_config.json and adapter_model.safetensors, computed as PEFT does.

    y += scale * B (A x),    scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

Linears, Conv1D and embeddings; modules_to_save and trained biases are whole. Other kinds of adapters (DoRA, ...) are
refused by name: merge them into the base with PEFT and compress the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from .change import Change, LowRank, Whole, as_torch
from .errors import BaseMismatchError, Error, FormatError
from .header import read_json, read_safetensors
from .layout import contained
from .linear_forward import Conv1DForward, LinearForward
from .modules import EmbeddingForward, kind_of
from .site import Site
from .tenant import Tenant
from .tenant_config import tokens

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
PARTS = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?"
)
SAVED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?|original_module)(?=\.)")
REFUSED = ("use_dora", "target_parameters", "trainable_token_indices", "lora_bias", "alora_invocation_tokens")


def lora_tenant(name: str, root: Path, site: Site) -> Tenant:
    """Reads the folder of an adapter.

    Raises:
        bitdelta.BaseMismatchError: a module that the model does not have, or of another shape.
        bitdelta.Error: a kind of adapter that does not run here.
    """
    config = read_json(contained(root, CONFIG))
    _check_config(config, root)
    pairs, whole = _read(root)
    changes: dict[str, Change] = {}
    for path, pair in pairs.items():
        changes[f"{path}.weight"] = _pair(path, pair, config, site, root)
    for parameter, tensor in whole.items():
        if parameter not in site.parameters:
            raise BaseMismatchError(f"{parameter}: {root} has it, the model has no such parameter")
        adapted = changes.get(parameter)  # PEFT saves embeddings and heads that it adapts with their adapter
        changes[parameter] = Whole(tensor if adapted is None else adapted.expand(tensor))
        site.check(parameter, changes[parameter], str(root))
    head = changes.get(f"{site.head}.weight")
    generation = getattr(site.model, "generation_config", None)
    return Tenant(
        name=name,
        kind="lora",
        changes=changes,
        vocabulary=site.vocabulary if head is None else int(head.shape[0]),
        eos=tokens(getattr(generation, "eos_token_id", None)),
        pad=getattr(generation, "pad_token_id", None),
        by_module=site.by_module(changes),
    )


def _check_config(config: dict[str, Any], root: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Error(f"{root / CONFIG}: peft_type {kind}: expected LORA; {_advice()}")
    for option in REFUSED:
        if config.get(option):
            raise Error(f"{root / CONFIG}: {option} is not supported; {_advice()}")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise FormatError(f"{root / CONFIG}: lora_alpha: expected a number, got {config.get('lora_alpha')!r}")


def _advice() -> str:
    return "merge it with PEFT (merge_and_unload) and compress the result"


def _read(root: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The low-rank pairs by module, and the whole tensors by parameter."""
    if not (root / MODEL).is_file():
        raise FormatError(
            f"{root}: no {MODEL} in it; PEFT writes it with save_pretrained(..., safe_serialization=True)"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in read_safetensors(contained(root, MODEL))[0].items():
        value = as_torch(tensor.array())
        if match := PARTS.fullmatch(key):
            pairs.setdefault(match[1], {})[match[2]] = value.float()
        elif "lora_" in key:
            raise Error(f"{root / MODEL}: {key}: this kind of adapter is not supported; {_advice()}")
        else:
            whole[SAVED.sub("", key.removeprefix("base_model.model."))] = value
    return pairs, whole


def _pair(path: str, pair: dict[str, Tensor], config: dict[str, Any], site: Site, root: Path) -> LowRank:
    try:
        module = site.model.get_submodule(path)
    except AttributeError:
        raise BaseMismatchError(f"{path}: {root} adapts it, the model has no such module") from None
    kind = kind_of(module)
    embedding = "lora_embedding_A" in pair
    a, b = (pair.get(f"lora_{'embedding_' if embedding else ''}{letter}") for letter in "AB")
    if a is None or b is None:
        raise FormatError(f"{root / MODEL}: {path}: one of lora_A and lora_B is missing")
    if embedding and kind is not EmbeddingForward or not embedding and not issubclass(kind, LinearForward):
        raise Error(f"{path}: an adapter of a {type(module).__name__} is not supported; {_advice()}")
    change = LowRank(a, b, _scale(path, len(a), config), embedding or kind is Conv1DForward)
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a):
        raise BaseMismatchError(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit together"
        )
    expected = site.shape(f"{path}.weight")
    if change.shape != expected:
        raise BaseMismatchError(
            f"{path}: expected a LoRA of {list(expected)} as in the model, {root} has {list(change.shape)}"
        )
    return change


def _scale(path: str, rank: int, config: dict[str, Any]) -> float:
    alpha = _by_pattern(path, config.get("alpha_pattern") or {}, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(path: str, patterns: dict[str, Any], default: Any) -> Any:
    """The value of the first pattern that the path ends with, as PEFT matches them."""
    keys: Iterable[str] = (key for key in patterns if re.match(rf"(.*\.)?({key})$", path))
    return patterns.get(next(iter(keys), ""), default)
