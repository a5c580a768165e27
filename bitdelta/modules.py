"""How a module of the base runs a batch whose rows belong to many tenants.

    linear      the base's own product, whatever module makes it, + every row's delta; Conv1D likewise
    embedding   the base's rows, those of tenants replaced
    experts     stacks of matrices: linears over the rows that the router sends; routers likewise
    split       anything else: the batch is cut by tenant, each part runs with the tenant's parameters; for experts
                that take their rows sorted, and those in lists, around the block that sorts

`install` gives a module's instance another `forward`; names, parameters and hooks of the model stay. Without a
batch, or where no tenant of the batch changed the module, the base's own `forward` runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .batch import Batch, Rows
from .errors import Error
from .experts_forward import ExpertsForward, RouterForward, has_stacks, is_router
from .linear_forward import Conv1DForward, LinearForward
from .split_forward import NormForward, SortedForward, SplitForward, broadcasts
from .wrapped import Wrapped

CACHES = {"past_key_values", "past_key_value", "layer_past", "cache_params", "cache"}
ABOUT = "dtype|device|shape|size|ndim|dim|numel"  # of a parameter, not its values
EXPERTS = re.compile(r"(.+)\.experts\.[^.]*\d(?:\..+)?")  # experts see the tokens that the router sends them


class EmbeddingForward(Wrapped):
    """table[token], from the table of the row's own tenant.

    A token that is not in its vocabulary is an error on the CPU. On a GPU, which is not waited for, it becomes NaN.
    """

    def plan(self, batch: Batch) -> Any:
        found = [own.get("weight") for own in self.changes(batch)]
        if not any(change is not None for change in found):
            return None
        base: Any = self.module.weight
        limits = [len(base) if change is None else change.shape[0] for change in found]
        sizes = torch.tensor([*limits, len(base)])  # of vocabularies
        return [(i, change) for i, change in enumerate(found) if change], ops.on_device(sizes, base.device)

    def run(self, plan: Any, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        changes, sizes = plan
        table: Any = self.module.weight
        if not batch.is_uniform and _are_positions(tokens, batch.rows):
            tokens = tokens.expand(batch.rows, tokens.shape[-1])
        flat = tokens.reshape(-1)
        rows = batch.rows_of(len(flat), self.path, flat.device)
        size = sizes[rows.placed]
        wrong = (flat < 0) | (flat >= size)
        if flat.device.type == "cpu":
            self._check(batch, flat, rows, size, wrong)
        flat = flat.clamp(min=0).minimum(size - 1)
        out = F.embedding(flat.clamp(max=len(table) - 1), table.detach())
        for tenant, change in changes:
            own = rows.of(tenant)
            out[own] = change.gather(flat[own], out[own]).to(out.dtype)
        if flat.device.type != "cpu":
            out = out.masked_fill(wrong[:, None], torch.nan)
        scale: Any = getattr(self.module, "embed_scale", None)
        if scale is not None:
            out = out * (scale.to(out.dtype) if isinstance(scale, torch.Tensor) else scale)
        return out.reshape(*tokens.shape, out.shape[-1])

    def _check(
        self, batch: Batch, tokens: torch.Tensor, rows: Rows, size: torch.Tensor, wrong: torch.Tensor
    ) -> None:
        if wrong.any():
            first = int(wrong.nonzero()[0])
            tenant = rows.ids[first]
            name = "the base" if tenant < 0 else batch.tenants[tenant].name
            raise IndexError(
                f"{self.path}: token {int(tokens[first])} is not in the vocabulary of {name}, which has "
                f"{int(size[first])} tokens"
            )


def _are_positions(tokens: torch.Tensor, rows: int) -> bool:
    """Whether these are the same for every row: [1, L], or [L] that count up."""
    if tokens.ndim == 1:
        return len(tokens) != rows or bool((tokens.diff() == 1).all())
    return tokens.ndim == 2 and len(tokens) == 1 and rows > 1


def owner(model: nn.Module, parameter: str) -> str:
    """The path of the module that uses a parameter in its forward: the one that holds it, or a reader around it."""
    path, _, leaf = parameter.rpartition(".")
    parent_path, _, child = path.rpartition(".")
    if not path:
        return path
    parent: Any = type(model.get_submodule(parent_path))
    is_linear = hasattr(model.get_submodule(path), "in_features")
    if issubclass(parent, nn.MultiheadAttention) or _reads(parent, child, leaf, is_linear):
        return parent_path
    return path


@cache
def _reads(module: Any, child: str, leaf: str, is_linear: bool) -> bool:
    """Whether a class uses the values of `self.child.leaf` itself, as its source says.

    Of a linear that it calls elsewhere, what it reads is for special cases (BLOOM's pretraining_tp).
    """
    read = re.compile(rf"\bself\.{re.escape(child)}\.{re.escape(leaf)}\b(?!\.(?:{ABOUT})\b)")
    sources = []
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith(("__", "_init", "reset_")) and not function.__module__.startswith("torch."):
            try:
                sources.append(inspect.getsource(function))
            except OSError:  # made while the program runs
                continue
    if is_linear and any(f"self.{child}(" in source for source in sources):
        return False
    return any(read.search(source) for source in sources)


def install(model: nn.Module, path: str) -> Iterator[Wrapped]:
    """Wraps the module that a tenant changes, and those around it that must know.

    Raises:
        bitdelta.Error: a module that cannot run rows of several tenants.
    """
    module, parent_path = model.get_submodule(path), path.rpartition(".")[0]
    own = _wrapped(module)
    if own is None:
        kind = kind_of(module)
        if kind is SplitForward:
            _refuse_cache(module, path)
        own = _put(kind(module, path))
        yield own
    match = EXPERTS.fullmatch(path)
    block_path = match[1] if match else parent_path if isinstance(own, SortedForward) else None
    if block_path is not None:
        block = model.get_submodule(block_path)
        if isinstance(own, SortedForward):
            _refuse_other_calls(block, block_path, module, path.rpartition(".")[2])
        around = _wrapped(block)
        if isinstance(around, SplitForward):
            around.has_inner = True
        else:
            _refuse_cache(block, block_path)
            yield _around(SplitForward(block, block_path), "forward")
    parent = model.get_submodule(parent_path)
    if hasattr(parent, "compute_bias") and not isinstance(parent.__dict__.get("compute_bias"), Wrapped):
        yield _around(SplitForward(parent, parent_path, "compute_bias"), "compute_bias")


def _wrapped(module: nn.Module) -> Wrapped | None:
    """Its other forward, also where accelerate has put a hook around that since."""
    found = (vars(module).get(name) for name in ("forward", "_old_forward"))
    return next((own for own in found if isinstance(own, Wrapped)), None)


def _put(wrapped: Wrapped, method: str = "forward") -> Wrapped:
    object.__setattr__(wrapped.module, method, wrapped)
    return wrapped


def _around(wrapped: SplitForward, method: str) -> Wrapped:
    wrapped.has_inner = True
    return _put(wrapped, method)


def kind_of(module: nn.Module) -> type[Wrapped]:
    name = type(module).__name__
    if name == "Conv1D" and hasattr(module, "nf"):
        return Conv1DForward
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        is_own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        return RouterForward if is_own and is_router(module) else LinearForward
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        if type(module).forward is nn.Embedding.forward or "ScaledWordEmbedding" in name:
            return EmbeddingForward
    if has_stacks(module):
        return ExpertsForward
    if broadcasts(module):
        return NormForward
    if is_router(module):
        return RouterForward
    return SortedForward if "Expert" in name else SplitForward


def _refuse_other_calls(block: nn.Module, block_path: str, module: nn.Module, child: str) -> None:
    """Where a block's forward does not call its experts, cutting it by tenant does not cut their rows."""
    try:
        source = inspect.getsource(type(block).forward)
    except OSError:  # made while the program runs; SortedForward looks again
        return
    if f"self.{child}(" not in source:
        raise Error(
            f"{block_path}.{child}: {type(module).__name__} takes its rows sorted by expert, and not from the forward "
            f"of {type(block).__name__}, so it cannot run rows of several tenants; merge the delta instead (bitdelta "
            "merge)"
        )


def _refuse_cache(module: nn.Module, path: str) -> None:
    held = CACHES.intersection(inspect.signature(type(module).forward).parameters)
    if held:
        raise Error(
            f"{path}: {type(module).__name__} holds changed parameters itself and takes {held.pop()}, so it cannot run "
            "rows of several tenants; merge the delta instead (bitdelta merge)"
        )
