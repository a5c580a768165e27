"""What a fine-tune's config and generation config mean for its rows in a shared model.

vocabulary, end and padding tokens   per row
rotary embeddings (base, scaling)    per row: the tenant gets rotary modules of its own
epsilon of norms                     per row
activation function                  per row: the tenant gets activation modules of its own
names, labels, dropout, dtype        no difference to the computation
anything else                        refused by name, while `bitdelta merge` accepts it
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import BaseMismatchError

ROTARY = {"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base"}
EPSILON = {"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"}
ACTIVATION = {"hidden_act", "hidden_activation", "activation_function", "activation", "feed_forward_proj"}
EPSILON_ATTRIBUTES = {"eps", "variance_epsilon"}  # of a norm
HARMLESS = {
    "_attn_implementation", "_name_or_path", "activation_dropout", "add_cross_attention", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "auto_map", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "decoder_start_token_id", "dropout",
    "dropout_rate", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task", "forced_decoder_ids",
    "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_factor",
    "initializer_range", "is_decoder", "label2id", "layerdrop", "max_position_embeddings", "model_max_length",
    "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "quantization_config", "resid_pdrop", "return_dict",
    "router_aux_loss_coef", "sep_token_id", "summary_first_dropout", "suppress_tokens", "task_specific_params",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    "vocab_size",
}  # fmt: skip


def difference(base: Any, finetuned: Any) -> dict[str, Any]:
    """Keys of two configs of transformers whose values differ; those of nested configs as `part.key`."""
    return dict(_walk(base.to_dict(), finetuned.to_dict(), ""))


def _walk(base: Mapping[str, Any], own: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key in {**base, **own}:
        before, after = base.get(key), own.get(key)
        if before == after:
            continue
        nested = key.endswith("config") and isinstance(before, dict) and isinstance(after, dict)
        found += _walk(before, after, f"{prefix}{key}.") if nested else [(prefix + key, after)]  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class Own:
    """What a tenant has of its own besides parameters."""

    modules: dict[str, Any] = field(default_factory=dict)  # by path
    settings: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # path of a norm -> attribute -> value


def own_parts(model: Any, finetuned: Any, changed: Mapping[str, Any], where: str) -> Own:
    """The rotary and activation modules and the epsilons of a fine-tune whose config changes them.

    Raises:
        bitdelta.BaseMismatchError: names the first key that cannot apply per row.
    """
    keys = {name: name.rpartition(".")[2] for name in changed}
    own = Own()
    for name, key in keys.items():
        if key in EPSILON | ACTIVATION:
            found = _altered(model, name, changed[name])
            if found is None:
                raise _refused(name, changed[name], where)
            own.modules.update(found.modules)
            own.settings.update(found.settings)
        elif key not in HARMLESS and key not in ROTARY:
            raise _refused(name, changed[name], where)
    own.modules.update(_rotary(model, finetuned, keys, where))
    return own


def _refused(name: str, value: Any, where: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"{name}: {where} changes it to {str(value)[:80]}, which cannot apply to some rows of a batch only; merge the "
        "delta instead: bitdelta merge"
    )


def _altered(model: Any, name: str, value: Any) -> Own | None:
    """What one setting changes in the model's modules; None where that is more than epsilons and activations.

    A model without memory is made of the base's config with this setting, and compared module by module.
    """
    config = deepcopy(model.config)
    set_key(config, name, value)
    with torch.device("meta"):
        others = dict(type(model)(config).named_modules())
    own = Own()
    for path, module in model.named_modules():
        other = others.get(path)
        if other is None:
            return None
        if type(other) is not type(module):
            if isinstance(other, torch.nn.Linear):  # the base is quantised
                continue
            if not _is_activation(model, path, module) or not _is_activation(model, path, other):
                return None
            own.modules[path] = other
            continue
        before, after = _scalars(module), _scalars(other)
        differing = {key: value for key, value in after.items() if before.get(key) != value}
        if differing and not set(differing) <= EPSILON_ATTRIBUTES:
            return None
        if differing:
            own.settings[path] = differing
    return (
        own if own.modules or own.settings else None
    )  # None: read elsewhere, as from the config while it runs


def _is_activation(model: Any, path: str, module: Any) -> bool:
    """A module without parameters or parts, outside of experts, where rows are not in the batch's order."""
    holders = [model.get_submodule(part) for part in _prefixes(path)]
    routed = any(hasattr(holder, "num_experts") and hasattr(holder, "has_gate") for holder in holders)
    parts = (*module.parameters(), *module.buffers(), *module.children())
    return not parts and not routed and "experts" not in path.split(".")


def _prefixes(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:i]) for i in range(1, len(names))]


def _scalars(module: Any) -> dict[str, Any]:
    found = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str)}
    return {key: value for key, value in found.items() if key != "training" and not key.startswith("_")}


def set_key(config: Any, key: str, value: Any) -> None:
    """Sets `part.key` of a nested config."""
    *parts, last = key.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, last, value)


def _rotary(model: Any, finetuned: Any, keys: Mapping[str, str], where: str) -> dict[str, Any]:
    # max_position_embeddings counts only where the scaling depends on it
    if not any(key in ROTARY or key == "max_position_embeddings" for key in keys.values()):
        return {}
    found = {
        path: module
        for path, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "config")
    }
    rotary = sorted(name for name, key in keys.items() if key in ROTARY)
    if rotary and not found:
        raise BaseMismatchError(
            f"{rotary[0]}: {where} changes it, and the model has no rotary module that could differ by row; merge the "
            "delta instead: bitdelta merge"
        )
    return {
        path: type(module)(_part(model, module, finetuned)).to(model.device) for path, module in found.items()
    }


def _part(model: Any, module: Any, finetuned: Any) -> Any:
    """The config, or nested config, that the module was made with, of the fine-tune."""
    for part in (
        finetuned,
        *(getattr(finetuned, name, None) for name in getattr(finetuned, "sub_configs", ())),
    ):
        if type(part) is type(module.config):
            own = deepcopy(part)
            own._attn_implementation = module.config._attn_implementation
            return own
    raise BaseMismatchError(
        f"{type(module).__name__}: the fine-tune's config has no {type(module.config).__name__}"
    )


def end_tokens(
    generation: Mapping[str, Any] | None, config: Mapping[str, Any], default: Any
) -> tuple[tuple[int, ...], int | None]:
    """EOS tokens and the padding token: of generation_config.json, else of config.json, else the base's."""
    found = generation or {}
    eos = found.get("eos_token_id", config.get("eos_token_id", getattr(default, "eos_token_id", None)))
    pad = found.get("pad_token_id", config.get("pad_token_id", getattr(default, "pad_token_id", None)))
    return tokens(eos), pad


def tokens(eos: Any) -> tuple[int, ...]:
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(int(token) for token in eos)
