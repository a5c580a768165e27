"""Any module: the batch is cut by tenant, each part runs with the tenant's parameters, the outputs are put together.

Norms are most of what goes this way, so they do it at once: a row's weight is picked from a table [T + 1, K].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .batch import Batch, current
from .change import Change
from .errors import Error
from .wrapped import Wrapped

KEPT_BYTES = 32 << 20  # of a module's expanded parameters, for a tenant of a batch


class SplitForward(Wrapped):
    """Runs each tenant's rows by themselves: with its parameters, or with a module of its own."""

    has_inner = False  # whether modules inside look at the batch

    def plan(self, batch: Batch) -> Any:
        targets: dict[int, Callable[..., Any]] = {}
        for i, (tenant, own) in enumerate(zip(batch.tenants, self.changes(batch), strict=True)):
            settings = tenant.settings.get(self.path, {})
            if self.path in tenant.modules:
                targets[i] = tenant.modules[self.path]
            elif own or settings:
                targets[i] = _Shell(self.module, own, settings)
        return targets if targets or self.has_inner and not batch.is_uniform else None

    def run(self, plan: dict[int, Callable[..., Any]], batch: Batch, *args: Any, **kwargs: Any) -> Any:
        if batch.is_uniform:
            return plan.get(batch.present[0], self.plain)(*args, **kwargs)
        found = []
        for tenant in batch.present:
            part = batch.part(tenant)
            chosen = _rows(args, batch, tenant, self.path), _rows(kwargs, batch, tenant, self.path)
            token = current.set(part)
            try:
                found.append(plan.get(tenant, self.plain)(*chosen[0], **chosen[1]))
            finally:
                current.reset(token)
        if isinstance(self.module, nn.Embedding) and found[0].ndim == 2 and _first(args, kwargs).ndim > 1:
            found = [part[None] for part in found]  # positions [L, K], the same for all rows of a tenant
        return _join(found, batch, self.path)


class SortedForward(SplitForward):
    """Of experts that are told no tokens of their rows, which come sorted by expert: no row says whose it is.

    So the block around them is cut by tenant, and they see one tenant at a time.
    """

    def run(self, plan: dict[int, Callable[..., Any]], batch: Batch, *args: Any, **kwargs: Any) -> Any:
        if not batch.is_uniform:
            raise Error(
                f"{self.path}: {type(self.module).__name__} takes its rows sorted by expert, so that it cannot run "
                "rows of several tenants here; run them in separate batches"
            )
        return super().run(plan, batch, *args, **kwargs)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


class _Shell:
    """The module with some parameters replaced; the module itself is not touched, so threads do not meet.

    Small parameters are expanded once a batch, others at every call.
    """

    def __init__(self, module: nn.Module, changes: dict[str, Change], settings: dict[str, float]) -> None:
        self.module, self.changes, self.settings = module, changes, settings
        self.kept: nn.Module | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kept is not None:
            return self.kept(*args, **kwargs)
        values = {}
        for name, change in self.changes.items():
            owner, _, leaf = name.rpartition(".")
            base = self.module.get_submodule(owner)
            values[name] = change.expand(getattr(base, leaf))
        own = replaced(self.module, values, self.settings)
        if sum(value.nbytes for value in values.values()) <= KEPT_BYTES:
            self.kept = own
        return own(*args, **kwargs)


def replaced(
    module: nn.Module, values: dict[str, torch.Tensor], settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """A copy that shares everything with the module except these parameters, buffers and attributes."""
    copy: Any = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(settings or {})
    copy.__dict__.pop("forward", None)
    copy._parameters, copy._buffers = dict(module._parameters), dict(module._buffers)
    inner: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in values.items():
        child, dot, leaf = name.partition(".")
        if dot:
            inner.setdefault(child, {})[leaf] = value
        else:
            (copy._parameters if name in copy._parameters else copy._buffers)[name] = value
    if inner:
        copy._modules = dict(module._modules)
        for child, own in inner.items():
            copy._modules[child] = replaced(module.get_submodule(child), own)
    return copy


def _rows(value: Any, batch: Batch, tenant: int, path: str) -> Any:
    """The tenant's part of an argument; what has no row per batch entry is passed whole."""
    if isinstance(value, torch.Tensor):
        if not value.ndim or len(value) % len(batch.ids):
            return value
        return value[batch.rows_of(len(value), path, value.device).of(tenant)]
    if isinstance(value, dict):
        return {key: _rows(item, batch, tenant, path) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_rows(item, batch, tenant, path) for item in value)
    return value


def _join(found: list[Any], batch: Batch, path: str) -> Any:
    """The parts' outputs as one, rows in the order of the batch."""
    first = found[0]
    if isinstance(first, torch.Tensor):
        return _join_tensors(found, batch, path)
    if isinstance(first, dict):
        joined = {key: _join([part[key] for part in found], batch, path) for key in first}
        return type(first)(**joined) if type(first) is not dict else joined
    if isinstance(first, tuple | list):
        return type(first)(_join(list(items), batch, path) for items in zip(*found, strict=True))
    return first


def _join_tensors(found: list[torch.Tensor], batch: Batch, path: str) -> torch.Tensor:
    counts = [int((batch.ids == tenant).sum()) for tenant in batch.present]
    factors = {len(part) / count if part.ndim else 0 for part, count in zip(found, counts, strict=True)}
    if len(factors) != 1 or not next(iter(factors)).is_integer() or factors == {0}:
        if any(not part.ndim or len(part) != 1 for part in found):
            raise Error(
                f"{path}: its output has no row per batch entry; it cannot run rows of several tenants"
            )
        factor = batch.rows // len(batch.ids)
        found = [
            part.expand(count * factor, *part.shape[1:]) for part, count in zip(found, counts, strict=True)
        ]
    n_rows = sum(len(part) for part in found)
    out = found[0].new_empty(n_rows, *found[0].shape[1:])
    for tenant, part in zip(batch.present, found, strict=True):
        out[batch.rows_of(n_rows, path, out.device).of(tenant)] = part
    return out


class NormForward(SplitForward):
    """A norm whose weight and bias multiply and add elementwise: for all tenants at once.

    `broadcasts` has tried that the class computes the same with a weight [rows, 1, K] as row by row, and so with an
    epsilon [rows, 1, 1] where tenants have their own.
    """

    def plan(self, batch: Batch) -> Any:
        changes = self.changes(batch)
        settings = [tenant.settings.get(self.path, {}) for tenant in batch.tenants]
        keys = {key for own in settings for key in own}
        if (
            not any(changes)
            and not keys
            or batch.is_uniform
            or any(self.path in tenant.modules for tenant in batch.tenants)
            or keys
            and not broadcasts(self.module, keys)
        ):
            return super().plan(batch)
        tables: dict[str, torch.Tensor] = {}
        for name, base in self.module.named_parameters(recurse=False):
            rows = [base.detach() if name not in own else own[name].expand(base) for own in changes]
            tables[name] = torch.stack([*rows, base.detach()])  # the last is the base's, -1
        device = self.module.weight.device
        for key in keys:
            value = getattr(self.module, key)
            epsilons = torch.tensor([[own.get(key, value)] for own in (*settings, {})])
            tables[key] = ops.on_device(epsilons, device)
        return tables

    def run(self, plan: dict[Any, Any], batch: Batch, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if batch.is_uniform or "weight" not in plan or len(x) % len(batch.ids):
            return super().run(plan, batch, *args, **kwargs)
        ids = batch.rows_of(len(x), self.path, x.device).placed
        lead = (len(x), *[1] * (x.ndim - 2))
        return apply_norm(
            self.module, x, {name: table[ids].reshape(*lead, -1) for name, table in plan.items()}
        )


def apply_norm(module: nn.Module, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The norm of x with weights, biases and epsilons that broadcast against it."""
    if type(module) is nn.LayerNorm:  # its kernel wants [K] and a number; inside it computes in fp32 as well
        eps = values.get("eps")
        if eps is None:
            y = F.layer_norm(x.float(), module.normalized_shape, None, None, module.eps)
        else:
            y = x.float() - x.float().mean(-1, keepdim=True)
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = y * values["weight"].float()
        return (y + values["bias"].float() if "bias" in values else y).to(x.dtype)
    parameters = {name: value for name, value in values.items() if name in ("weight", "bias")}
    settings = {name: value for name, value in values.items() if name not in parameters}
    found: torch.Tensor = replaced(module, parameters, settings)(x)
    return found


def broadcasts(module: nn.Module, keys: Iterable[str] = ()) -> bool:
    """Whether this is a norm that may be run for all tenants at once; `keys`: epsilons that differ too."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if "Norm" not in type(module).__name__ or weight is None or any(p.ndim != 1 for p in parameters.values()):
        return False
    if next(module.children(), None) is not None or not set(parameters) <= {"weight", "bias"}:
        return False
    x = torch.linspace(-1, 2, 6 * len(weight), dtype=weight.dtype, device=weight.device).reshape(2, 3, -1)
    rows = [{name: p.detach() + i for name, p in parameters.items()} for i in (1, 2)]
    settings = [dict.fromkeys(keys, 0.5 * i) for i in (1, 2)]
    with torch.no_grad():
        return _agrees(module, x, rows, settings)


def _agrees(
    module: nn.Module,
    x: torch.Tensor,
    rows: list[dict[str, torch.Tensor]],
    settings: list[dict[str, float]],
) -> bool:
    try:
        alone = torch.cat(
            [
                replaced(module, row, own)(x[i : i + 1])
                for i, (row, own) in enumerate(zip(rows, settings, strict=True))
            ]
        )
        table = {name: torch.stack([row[name] for row in rows])[:, None] for name in rows[0]}
        for key in settings[0]:
            table[key] = torch.tensor([own[key] for own in settings], device=x.device)[:, None, None]
        return torch.allclose(apply_norm(module, x, table), alone, rtol=1e-2, atol=1e-3)
    except (RuntimeError, TypeError):
        return False
