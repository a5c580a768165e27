"""How a tenant's parameters run in the shared model: the share of each way, and what goes the slow one by name."""

from __future__ import annotations

import math
from typing import Any

from .experts_forward import ExpertsForward, RouterForward
from .linear_forward import LinearForward
from .modules import EmbeddingForward, kind_of
from .site import Site
from .split_forward import NormForward
from .tenant import Tenant
from .wrapped import Wrapped

WAYS = ("linear", "embedding", "norm", "split", "shared")


def coverage(site: Site, tenant: Tenant) -> dict[str, Any]:
    """Shares of the model's parameters, tied ones counted once, by what a batch of several tenants does with them.

    Returns:
        linear: their products are made for all tenants at once (signs, low-rank and whole weights).
        embedding: their rows are looked up.
        norm: a row's weight is picked from a table.
        split: the batch is cut by tenant for the module that holds them (routers, experts, ...).
        shared: the base's.
        parameters: how many there are.
        modules: the kinds of modules that are split -> their share.
    """
    count = dict.fromkeys(WAYS, 0)
    kinds: dict[str, int] = {}
    seen: set[int] = set()
    parameters = {**dict(site.model.named_parameters(remove_duplicate=False)), **site.mapping.implied}
    for name, parameter in parameters.items():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        size = math.prod(site.shape(name))
        changed = [alias for alias in site.aliases[name] if alias in tenant.changes]
        way = "shared"
        if changed:
            module = site.model.get_submodule(site.owner(changed[0])[0])
            kind = kind_of(module)
            way = _way(kind)
            if way == "split":
                kinds[type(module).__name__] = kinds.get(type(module).__name__, 0) + size
        count[way] += size
    total = sum(count.values())
    shares = {way: round(size / total, 6) for way, size in count.items()}
    return {
        **shares,
        "parameters": total,
        "modules": {kind: round(n / total, 6) for kind, n in kinds.items()},
    }


def _way(kind: type[Wrapped]) -> str:
    if issubclass(kind, LinearForward | ExpertsForward | RouterForward):
        return "linear"
    return "embedding" if kind is EmbeddingForward else "norm" if kind is NormForward else "split"
