"""The two models of a distillation: the fine-tune, and the base with a delta whose scales are trained.

Both compute in fp32 over weights as the checkpoints store them: transformers builds the model around memory-mapped
tensors, linears keep their bf16 weight and everything else becomes fp32. So a model takes the memory of its
embeddings, norms and activations; the operating system keeps as much of the rest as it has room for.

    linears and embeddings with planes   scales trained, once where they are tied: DeltaLinear, DeltaEmbedding
    any other with planes (experts)      expanded once, as the packfile has it
    whole tensors                        the fine-tune's
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from .array import to_float32
from .checkpoint import Checkpoint
from .checkpoint_model import read_config
from .delta import Delta
from .errors import Error
from .packfile import Packfile
from .trained import DeltaEmbedding, DeltaLinear

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Student:
    """A model and, by checkpoint name, what of it is trained: one of the modules that have these scales."""

    model: Any
    trained: dict[str, DeltaLinear]
    frozen: list[str]  # tensors with planes whose scales stay: neither linears nor embeddings

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: NAME.row and, of form rank1, NAME.column; logarithms of factors."""
        found = {}
        for name, linear in self.trained.items():
            found[f"{name}.row"] = linear.row_log
            if linear.column is not None:
                found[f"{name}.column"] = linear.column_log
        return found


def load_student(base: Checkpoint, packfile: Packfile) -> Student:
    """The base with the packfile's delta, ready to train the scales."""
    model_class, config = model_kind(packfile.files().get("config.json") or base.root / "config.json")
    places = _places(model_class, config)
    chosen = {name: places[name] for name in packfile if name in places and isinstance(packfile[name], Delta)}
    state = {name: _value(name, base, packfile, name in chosen) for name in packfile}
    model = _build(model_class, config, state)
    users = _users(model)
    wanted = {name: users[id(model.get_submodule(place).weight)] for name, place in chosen.items()}
    trained: dict[str, DeltaLinear] = {}
    for name, paths in wanted.items():
        first = packfile.entries[name].get("tied_to", name)
        for path in paths:
            module = model.get_submodule(path)
            if isinstance(module, (DeltaLinear, DeltaEmbedding)):
                continue  # the tensor that it is tied to was here
            linear = _linear(module, base[first], packfile, first)
            linear = linear.share(trained.setdefault(first, linear))
            factor = getattr(module, "embed_scale", None)
            is_table = isinstance(module, nn.Embedding)
            model.set_submodule(path, DeltaEmbedding(linear, factor) if is_table else linear)
    left = [name for name, entry in packfile.entries.items() if "planes" in entry and name not in trained]
    return Student(_prepared(model), trained, left)


def _linear(module: Any, base: Any, packfile: Packfile, name: str) -> DeltaLinear:
    delta, rows = packfile[name], packfile.rows(name)
    assert isinstance(delta, Delta)
    bias = getattr(module, "bias", None)
    return DeltaLinear(
        shared(base.array()[: delta.shape[0]]),
        None if bias is None else bias.data.float(),
        delta,
        None if rows is None else shared(rows),
        not isinstance(module, (nn.Linear, nn.Embedding)),
    )


def load_teacher(finetuned: Checkpoint) -> Any:
    """The fine-tune, its linears over memory-mapped weights."""
    model_class, config = model_kind(finetuned.root / "config.json")
    state = {name: shared(tensor.array()) for name, tensor in finetuned.items()}
    return _prepared(_build(model_class, config, state))


def model_kind(path: Path) -> tuple[Any, Any]:
    """The class and configuration of transformers that a config.json names."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = read_config(path)
    names = config.architectures or []
    if not names:
        return transformers.AutoModel._model_mapping[type(config)], config
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise Error(f"{path}: transformers {transformers.__version__} has no {names[0]}")
    return model_class, config


def shared(array: np.ndarray) -> Tensor:
    """An array of a checkpoint as a tensor of the same memory, which nothing here writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        is_bfloat16 = getattr(array, "__bitdelta_dtype__", None) == "bfloat16"
        tensor = torch.from_numpy(array.view(np.ndarray))
        return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def _places(model_class: Any, config: Any) -> dict[str, str]:
    """Checkpoint name of a weight -> a linear or embedding that has it, under all names that checkpoints use."""
    with torch.device("meta"):
        model = model_class(config)
    prefix = f"{model_class.base_model_prefix}." if model_class.base_model_prefix else ""
    found: dict[str, str] = {}
    for place, module in model.named_modules():
        if _has_scales(module):
            others = place.removeprefix(prefix), prefix + place  # saved with or without the head
            for name in (place, *others):
                found.setdefault(f"{name}.weight", place)
    return found


def _has_scales(module: Any) -> bool:
    """Whether a module is one of those that `trained.py` stands in for."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):
        is_plain = (
            type(module).forward is nn.Embedding.forward or "ScaledWordEmbedding" in type(module).__name__
        )
        return is_plain and module.max_norm is None
    return type(module) in (nn.Linear, Conv1D)


def _users(model: Any) -> dict[int, list[str]]:
    """The id of a weight -> every place of a module that has it, tied ones too."""
    found: dict[int, list[str]] = defaultdict(list)
    for place, module in model.named_modules(remove_duplicate=False):
        if _has_scales(module):
            found[id(module.weight)].append(place)
    return found


def _value(name: str, base: Checkpoint, packfile: Packfile, is_trained: bool) -> Tensor:
    """The fine-tune's tensor; of a module that gets its delta later, the base's with room for added rows."""
    value, rows = packfile[name], packfile.rows(name)
    if value is None:
        return shared(base[packfile.entries[name].get("tied_to", name)].array())
    if isinstance(value, np.ndarray):
        return shared(value)
    name = packfile.entries[name].get("tied_to", name)
    weight = base[name].array()
    if isinstance(value, tuple):
        return torch.from_numpy(
            np.stack([delta.expand(np.array(to_float32(weight[i]))) for i, delta in enumerate(value)])
        )
    weight = weight[: value.shape[0]]
    if is_trained and rows is None:
        return shared(weight)
    expanded = value.expand(np.array(to_float32(weight)))
    if rows is not None:
        expanded = np.concatenate([expanded, to_float32(rows)])
    return torch.from_numpy(expanded)


def _build(model_class: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    """transformers' model of these tensors, by its own mapping of names; tensors of its dtype are not copied."""
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    narrow = kinds - {torch.float32}
    dtype = narrow.pop() if len(narrow) == 1 else torch.float32
    exact = {name: tensor for name, tensor in state.items() if tensor.dtype == torch.float32}
    model = model_class.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype).eval()
    if dtype != torch.float32:  # what loading has rounded
        for name, parameter in model.named_parameters():
            if name in exact and parameter.shape == exact[name].shape:
                parameter.data = exact[name]
    return model


def _prepared(model: Any) -> Any:
    """Linears in their checkpoint's dtype, everything else in fp32, nothing trained but scales."""
    for place, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias.data.float()
            model.set_submodule(place, DeltaLinear(module.weight.data, bias, None))
    for module in model.modules():
        if not isinstance(module, DeltaLinear):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
                parameter.data = parameter.data.float()
    return model.eval()
