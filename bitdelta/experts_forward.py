"""The experts and the router of a mixture: rows of many tenants at once, without expanding weights.

    experts   stacks gate_up_proj (or up_proj) and down_proj [E, N, K], as transformers fuses them: every expert's
              product with the base over the rows routed to it, + each row's own delta; on a GPU all experts at
              once where they can (experts_grouped.py)
    router    a module that uses its matrix `weight` in F.linear and nothing else

Others are cut by tenant (split_forward.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from .batch import Batch, Rows
from .change import Change, Stack, Whole
from .experts_grouped import Grouped
from .linear_forward import LinearPlan
from .split_forward import SplitForward, replaced

T: TypeAlias = torch.Tensor


def has_stacks(module: nn.Module) -> bool:
    """Whether these are experts as transformers describes them to its own implementations, rows first."""
    about: Any = module
    described = all(
        hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts")
    )
    if (
        not described
        or about.has_bias
        or about.is_transposed
        or getattr(about, "has_post_expert_norm", False)
    ):
        return False
    parameters = dict(module.named_parameters(recurse=False))
    names = {"gate_up_proj" if about.has_gate else "up_proj", "down_proj"}
    return set(parameters) == names and all(parameter.ndim == 3 for parameter in parameters.values())


class ExpertsForward(SplitForward):
    """Of a module that `has_stacks`."""

    def plan(self, batch: Batch) -> Any:
        changes = self.changes(batch)
        if not any(changes) or getattr(self.module, "_is_expert_parallel", False):
            return super().plan(batch)
        stacks = {}
        for name in dict(self.module.named_parameters(recurse=False)):
            own = [change.get(name) for change in changes]
            bounds = {change.bounds for change in own if isinstance(change, Stack)}
            if len(bounds) > 1 or not all(
                change is None or isinstance(change, Stack | Whole) for change in own
            ):
                return super().plan(batch)
            stacks[name] = _Matrices(getattr(self.module, name), own, next(iter(bounds), None))
        return stacks

    def run(self, plan: dict[Any, Any], batch: Batch, *args: Any, **kwargs: Any) -> Any:
        if "down_proj" not in plan:
            return super().run(plan, batch, *args, **kwargs)
        return self._experts(plan, batch, *args, **kwargs)

    def _experts(
        self, plan: dict[str, _Matrices], batch: Batch, hidden_states: T, top_k_index: T, top_k_weights: T
    ) -> T:
        module: Any = self.module
        first = plan["gate_up_proj" if module.has_gate else "up_proj"]
        activate = module._apply_gate if module.has_gate else module.act_fn
        n_choices = top_k_index.shape[-1]
        tenants = batch.rows_of(len(hidden_states), self.path, hidden_states.device)
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        rows = order // n_choices
        grouped = first.grouped, plan["down_proj"].grouped
        if grouped[0] and grouped[1] and not torch.is_grad_enabled():
            numbers = torch.arange(1, module.num_experts + 1, device=chosen.device)
            ends = torch.searchsorted(chosen, numbers, out_int32=True)
            whose = tenants.placed[rows]
            inner = activate(grouped[0].product(hidden_states[rows], chosen, ends, whose))
            found = grouped[1].product(inner, chosen, ends, whose)
        else:
            found = torch.cat(
                [
                    plan["down_proj"].product(expert, activate(first.product(expert, x, whose)), whose)
                    for expert, x, whose in _by_expert(hidden_states, chosen, rows, tenants)
                ]
            )
        weighted = found * top_k_weights.reshape(-1)[order, None]
        in_order = weighted[order.argsort()].view(len(hidden_states), n_choices, -1)
        return in_order.sum(1).to(hidden_states.dtype)


def _by_expert(hidden_states: T, chosen: T, rows: T, tenants: Rows) -> Iterator[tuple[int, T, Rows]]:
    """Every expert that has rows, these and their tenants; a GPU is waited for, as it knows how many there are."""
    places, begin = rows.cpu().numpy(), 0
    for expert, count in enumerate(chosen.bincount().tolist()):
        if count:
            part = slice(begin, begin + count)
            yield expert, hidden_states[rows[part]], Rows(tenants.ids[places[part]], hidden_states.device)
            begin += count


class _Matrices:
    """One stack of the base and what the tenants of a batch make of it; plans are made for experts that have rows."""

    def __init__(
        self, parameter: T, changes: list[Change | None], bounds: tuple[tuple[int, int], ...] | None
    ) -> None:
        self.parameter, self.changes = parameter.detach(), changes
        self.bounds = bounds or ((0, parameter.shape[1]),)
        self.plans: dict[int, list[LinearPlan]] = {}
        can = Grouped.can(self.parameter, changes)
        self.grouped = Grouped(self.parameter, changes, self.bounds) if can else None

    def product(self, expert: int, x: T, rows: Rows) -> T:
        weight = self.parameter[expert]
        if expert not in self.plans:
            self.plans[expert] = [self._plan(expert, i) for i in range(len(self.bounds))]
        parts = [
            plan.product(x, weight[begin:end], None, rows)
            for (begin, end), plan in zip(self.bounds, self.plans[expert], strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _plan(self, expert: int, i: int) -> LinearPlan:
        begin, end = self.bounds[i]
        changes = []
        for change in self.changes:
            if isinstance(change, Stack):
                part: Change | None = change.parts[expert][i]
            else:
                part = Whole(change.tensor[expert, begin:end]) if isinstance(change, Whole) else None
            changes.append({} if part is None else {"weight": part})
        return LinearPlan(changes, end - begin, end - begin)


class RowWeight(torch.Tensor):  # type: ignore[misc]
    """A matrix that F.linear multiplies by `rows_product(x, bias)`; nothing else may use its values."""

    rows_product: Callable[[T, T | None], T]

    @staticmethod
    def of(weight: T, rows_product: Callable[[T, T | None], T]) -> RowWeight:
        made: RowWeight = torch.Tensor._make_subclass(RowWeight, weight.detach())
        made.rows_product = rows_product
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in CASTS:
                plain = func(args[0].as_subclass(torch.Tensor), *args[1:], **kwargs)
                return RowWeight.of(plain, args[0].rows_product)
            if func.__name__ == "__get__":  # shape, dtype, device
                return func(*args, **kwargs)
        raise TypeError(f"{func.__name__} of a weight that differs by row")


CASTS = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type, torch.Tensor.type_as)


def _linear(input: T, weight: RowWeight, bias: T | None = None) -> T:
    if not isinstance(weight, RowWeight):
        raise TypeError("a weight that differs by row in the place of the input")
    return weight.rows_product(input, bias)


class RouterForward(SplitForward):
    """Of a module that `is_router`."""

    def plan(self, batch: Batch) -> Any:
        changes = self.changes(batch)
        if not any(changes) or not all(set(own) <= {"weight", "bias"} for own in changes):
            return super().plan(batch)
        n = self.module.weight.shape[0]
        return LinearPlan(changes, n, n)

    def run(self, plan: Any, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(plan, LinearPlan):
            return super().run(plan, batch, *args, **kwargs)
        weight = self.module.weight

        def product(x: T, bias: T | None) -> T:
            flat = x.reshape(-1, x.shape[-1])
            y = plan.product(flat, weight, bias, batch.rows_of(len(flat), self.path, flat.device))
            return y.reshape(*x.shape[:-1], -1)

        return replaced(self.module, {"weight": RowWeight.of(weight, product)})(*args, **kwargs)


def is_router(module: nn.Module) -> bool:
    """Whether the module's matrix `weight` is used in F.linear only, which a run shows."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if weight is None or weight.ndim != 2 or not set(parameters) <= {"weight", "bias"}:
        return False
    if next(module.children(), None) is not None or type(weight) is not nn.Parameter:
        return False
    calls: list[int] = []

    def product(x: T, bias: T | None) -> T:
        calls.append(1)
        return F.linear(x, weight.detach().to(x.dtype), bias)

    copy = replaced(module, {"weight": RowWeight.of(weight, product)})
    x = torch.linspace(-1, 1, 4 * weight.shape[1], dtype=weight.dtype, device=weight.device)
    x = x.reshape(1, 4, -1)
    for rows in (x, x[0]):
        try:
            with torch.no_grad():
                copy(rows)
        except Exception:  # noqa: BLE001 - whatever a module says to input that is not its own
            continue
        return calls == [1]
    return False
