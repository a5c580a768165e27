"""A module of the base whose `forward` looks at the batch in progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .batch import Batch, current
from .change import Change

NOTHING = object()  # the plan of a module that no tenant of the batch changed


class Wrapped:
    """A module with another forward.

    Args:
        module: the base's.
        path: its name in the model.
        method: what is replaced.
    """

    def __init__(self, module: nn.Module, path: str, method: str = "forward") -> None:
        self.module = module
        self.path = path
        self.plain: Callable[..., Any] = getattr(module, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = current.get()
        if batch is None:
            return self.plain(*args, **kwargs)
        hook = vars(self.module).get("_hf_hook")  # accelerate's, around `plain`
        if hook is None:
            plan = self.planned(batch)
            return self.plain(*args, **kwargs) if plan is None else self.run(plan, batch, *args, **kwargs)
        args, kwargs = hook.pre_forward(self.module, *args, **kwargs)
        plan = self.planned(batch)
        if plan is None:
            return self.plain(*args, **kwargs)
        return hook.post_forward(self.module, self.run(plan, batch, *args, **kwargs))

    def planned(self, batch: Batch) -> Any:
        """`plan`, made once a batch; on a GPU the tenants' parameters of this module are there from here on."""
        plan = batch.plans.get(id(self))
        if plan is None:
            for tenant in batch.tenants:
                tenant.wait(self.path)
            plan = self.plan(batch)
            batch.plans[id(self)] = NOTHING if plan is None else plan
        return None if plan is NOTHING else plan

    def plan(self, batch: Batch) -> Any:
        """What is the same for every call of a batch, or None where there is nothing to do."""
        raise NotImplementedError

    def run(self, plan: Any, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def changes(self, batch: Batch) -> list[dict[str, Change]]:
        """Of each tenant: parameter within the module -> what it becomes."""
        return [tenant.of(self.path) for tenant in batch.tenants]
