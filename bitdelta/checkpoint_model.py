"""A checkpoint's model in transformers, and which of its tensors each parameter of the model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .errors import Error

if TYPE_CHECKING:
    from .mapping import Conversion


def read_config(path: Path) -> Any:
    """A config.json, or the one of a folder, as transformers reads it: old and new spellings of a setting are one.

    Raises:
        bitdelta.Error: it does not.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise Error(f"{path}: transformers cannot read it: {' '.join(str(error).split())[:200]}") from error


def build(checkpoint: Checkpoint, is_empty: bool) -> Any:
    """The checkpoint's model in transformers, in fp32; empty: without the values of its parameters."""
    import torch
    import transformers

    names = checkpoint.config.get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise Error(f"{checkpoint.root}: config.json names no architecture that transformers has: {names[0]}")
    if not is_empty:
        model = kind.from_pretrained(checkpoint.root, local_files_only=True, dtype=torch.float32)
    else:
        from accelerate import init_empty_weights
        from transformers.initialization import no_init_weights

        config = kind.config_class.from_pretrained(checkpoint.root, local_files_only=True)
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = kind._from_config(config, dtype=torch.float32)
    for module in model.modules():  # the loop over experts, whose products can be watched
        own: Any = getattr(module, "config", None)
        if hasattr(own, "_experts_implementation"):
            own._experts_implementation = "eager"
    return model.eval()


def checkpoint_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter of the model -> tensor of the checkpoint, for those that are found."""
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in checkpoint:
                found[name] = candidate
                break
    return found


FUSING = {"MergeModulelist", "Concatenate"}  # of experts [N, K] into a stack [E, N, K]


def fused_names(model: Any, checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, Conversion]:
    """Stacks of experts that transformers makes of several of the checkpoint's tensors; renamed ones join `names`."""
    head = model.get_output_embeddings()
    tied = getattr(head, "weight", None) if getattr(model.config, "tie_word_embeddings", False) else None
    if all(name in names or parameter is tied for name, parameter in model.named_parameters()):
        return {}  # without importing what fuses
    from .mapping import Mapping

    mapped = Mapping(model).map(checkpoint)
    for name, parameter in mapped.parameters.items():
        names.setdefault(parameter, name)
    return {
        conversion.first: conversion
        for conversion in mapped.conversions
        if {type(operation).__name__ for operation in conversion.converter.operations} <= FUSING
    }
