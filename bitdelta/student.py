"""The two models of a distillation: the fine-tune, and the base with a delta whose scales are trained.

Both compute in fp32 over weights as the checkpoints store them: transformers builds the model around memory-mapped
tensors, linears keep their bf16 weight and everything else becomes fp32. So a model takes the memory of its
embeddings, norms and activations; the operating system keeps as much of the rest as it has room for.

    linear with planes    scales trained                            DeltaLinear
    any other with planes (embeddings, tied heads, fused experts)   expanded once, as the packfile has it
    whole tensors         the fine-tune's
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .array import to_float32
from .checkpoint import Checkpoint
from .delta import Delta
from .errors import Error
from .packfile import Packfile

Tensor: TypeAlias = torch.Tensor


class DeltaLinear(nn.Module):  # type: ignore[misc] # torch is Any where it is not installed
    """y = x W^T + sum_p scale_p * (x S_p^T) + bias over a frozen base weight; without a delta, x W^T + bias.

    A scale is what it was before, times exp of its parameter. So it keeps its sign and can never cross zero, a scale
    of zero (a row that the fine-tune left alone) stays, and the optimiser's step is a relative change: the original
    recipe's absolute one moves a small scale by a fifth at once and a large one hardly.

    Args:
        weight: [N, K], or [K, N] where transposed (GPT-2's Conv1D).
        bias: [N] or None.
        delta: of weight; None for the fine-tune's own weight.
        rows: [A, K], weights of outputs below those of `weight` (new tokens of a head), or None.
        transposed: weight, and the delta of it, have the inputs first.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        delta: Delta | None,
        rows: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.rows = None if rows is None else nn.Parameter(rows, requires_grad=False)
        self.transposed = transposed
        self.source = delta
        if delta is not None:
            parts = ops.as_torch(delta)
            row = parts.row[:, :1].clone() if delta.form == "tensor" else parts.row
            self.register_buffer("sign", parts.sign, persistent=False)
            self.register_buffer("row", row, persistent=False)
            self.register_buffer("column", parts.column, persistent=False)
            self.row_log = nn.Parameter(torch.zeros_like(row))
            if parts.column is not None:
                self.column_log = nn.Parameter(torch.zeros_like(parts.column))

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """row [P, N] and column [P, K] or None."""
        assert self.source is not None
        row = (self.row * self.row_log.exp()).expand(-1, self.source.shape[0])
        return row, None if self.column is None else self.column * self.column_log.exp()

    def delta(self) -> Delta:
        """With the scales as they are now, the signs shared; the columns of rank1 have mean 1 again."""
        assert self.source is not None
        with torch.no_grad():
            row, column = self.scales()
            if column is not None:
                mean = column.abs().mean(1, keepdim=True)
                row, column = row * mean, column / mean
        flat = None if column is None else column.contiguous().cpu().numpy()
        return Delta(
            self.source.sign, row.contiguous().cpu().numpy(), flat, self.source.shape, self.source.form
        )

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            y = self._product(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[1])

    def _product(self, x: Tensor) -> Tensor:
        row, column = self.scales() if self.source is not None else (None, None)
        multiply = _multiply if x.device.type == "cpu" else _multiply_dense
        y = multiply(self, x, row, column)
        if self.rows is not None:
            y = torch.cat([y, nn.functional.linear(x, self.rows.to(x.dtype))], dim=1)
        return y


def _multiply(linear: DeltaLinear, x: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """By bitdelta's operators."""
    none = torch.full((len(x),), -1)
    if row is None or linear.source is None:
        return ops.linear(x, linear.weight, linear.bias, [], none)
    deltas, ids = [ops.TorchDelta(linear.sign, row, column, linear.source.shape)], torch.zeros_like(none)
    if not linear.transposed:
        return ops.linear(x, linear.weight, linear.bias, deltas, ids)
    return ops.linear(x, linear.weight.T, linear.bias, [], none) + ops.linear_transposed(x, deltas, ids)


def _multiply_dense(linear: DeltaLinear, x: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """By PyTorch, on devices that the operators do not know; signs are unpacked for each use and not kept."""
    weight = linear.weight.T if linear.transposed else linear.weight
    y = nn.functional.linear(x, weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
    if row is None or linear.source is None:
        return y
    about = linear.sign, row, column, linear.source.shape, linear.transposed
    planes = checkpoint(_planes, x, *about, use_reentrant=False)
    return (y + planes).to(x.dtype)


def _planes(
    x: Tensor, sign: Tensor, row: Tensor, column: Tensor | None, shape: tuple[int, int], transposed: bool
) -> Tensor:
    """sum_p row_p * ((x * column_p) S_p^T), or where transposed sum_p column_p * ((x * row_p) S_p)."""
    N, K = shape
    total = torch.zeros((), device=x.device)
    for p in range(len(sign)):
        bits = sign[p, :, :, :, None] >> torch.arange(32, dtype=torch.int32, device=x.device) & 1
        S = bits.permute(0, 2, 1, 3).reshape(16 * sign.shape[1], -1)[:N, :K].to(x.dtype) * 2 - 1
        if transposed:
            term = (x * row[p]).to(x.dtype) @ S
            total = total + (term if column is None else term * column[p])
        else:
            u = x if column is None else (x * column[p]).to(x.dtype)
            total = total + (u @ S.T) * row[p]
    return total


@dataclass(frozen=True)
class Student:
    """A model and, by checkpoint name, those of its linears whose scales are trained."""

    model: Any
    linears: dict[str, DeltaLinear]
    frozen: list[str]  # tensors with planes whose scales stay: embeddings and what is not a linear

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: NAME.row and, of form rank1, NAME.column; logarithms of factors."""
        found = {}
        for name, linear in self.linears.items():
            found[f"{name}.row"] = linear.row_log
            if linear.column is not None:
                found[f"{name}.column"] = linear.column_log
        return found


def load_student(base: Checkpoint, packfile: Packfile) -> Student:
    """The base with the packfile's delta, ready to train the scales."""
    model_class, config = model_kind(packfile.files().get("config.json") or base.root / "config.json")
    places = _linears(model_class, config)
    chosen = {name: places[name] for name in packfile if name in places and isinstance(packfile[name], Delta)}
    state = {name: _value(name, base, packfile, name in chosen) for name in packfile}
    model = _build(model_class, config, state)
    linears = {}
    for name, place in chosen.items():
        module, delta, rows = model.get_submodule(place), packfile[name], packfile.rows(name)
        if packfile.entries[name]["form"] == "tied" or module.weight is _embedding(model):
            continue
        assert isinstance(delta, Delta)
        linears[name] = DeltaLinear(
            shared(base[name].array()[: delta.shape[0]]),
            None if module.bias is None else module.bias.data.float(),
            delta,
            None if rows is None else shared(rows),
            not isinstance(module, nn.Linear),
        )
        model.set_submodule(place, linears[name])
    frozen = [name for name, entry in packfile.entries.items() if "planes" in entry and name not in linears]
    return Student(_prepared(model), linears, frozen)


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
    config = transformers.AutoConfig.from_pretrained(path.parent, local_files_only=True)
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


def _linears(model_class: Any, config: Any) -> dict[str, str]:
    """Checkpoint name of a weight -> the linear module that has it, under all names that checkpoints use."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = model_class(config)
    prefix = f"{model_class.base_model_prefix}." if model_class.base_model_prefix else ""
    found: dict[str, str] = {}
    for place, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D):
            others = place.removeprefix(prefix), prefix + place  # saved with or without the head
            for name in (place, *others):
                found.setdefault(f"{name}.weight", place)
    return found


def _value(name: str, base: Checkpoint, packfile: Packfile, is_linear: bool) -> Tensor:
    """The fine-tune's tensor; of a linear that gets its delta later, the base's with room for added rows."""
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
    if is_linear and rows is None:
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


def _embedding(model: Any) -> Any:
    return getattr(model.get_input_embeddings(), "weight", None)


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
