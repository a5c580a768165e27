"""Where tenants go: the base model as they see it. Its parameters by name, ties, vocabulary, config."""

from __future__ import annotations

import re
from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch

from .change import Change, Converted, Packed
from .errors import BaseMismatchError
from .linear_forward import LinearForward
from .mapping import Mapping
from .modules import EmbeddingForward, kind_of, owner


class Site:
    """A loaded base model.

    Args:
        model: of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.mapping = Mapping(model)
        self.parameters: dict[str, Any] = self.mapping.state
        groups = defaultdict(list)
        for name, parameter in self.parameters.items():
            groups[id(parameter)].append(name)
        self.aliases = {name: group for group in groups.values() for name in group}
        self._owners: dict[str, tuple[str, str]] = {}
        self.head = self._path(_embeddings(model, "output"))
        self.table = self._path(_embeddings(model, "input"))
        self.vocabulary = None if self.head is None else int(self._rows(self.head))

    def share(self, changes: dict[str, Change], own: set[str]) -> None:
        """Gives a change of a tied parameter to the names that the fine-tune has no tensor for."""
        for name in list(changes):
            for alias in self.aliases[name]:
                if alias not in own:
                    changes.setdefault(alias, changes[name])

    def tie_head(self, changes: dict[str, Change]) -> None:
        """The head of a fine-tune that ties it to its embeddings, over a base that keeps them apart."""
        head, table = f"{self.head}.weight", f"{self.table}.weight"
        if self.head is None or self.table is None or table in self.aliases[head] or head in changes:
            return
        change, base = changes.get(table), self.parameters[table]
        make = (lambda: base.detach()) if change is None else (lambda: change.expand(base))
        shape = tuple(base.shape) if change is None else change.shape
        changes[head] = Converted(make, shape)

    def is_tied(self, name: str) -> bool:
        return len(self.aliases[name]) > 1

    def ignores(self, name: str) -> bool:
        """Whether transformers expects this checkpoint tensor to be nothing in the model."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def owner(self, parameter: str) -> tuple[str, str]:
        """The module that uses a parameter, and the parameter's name within it."""
        found = self._owners.get(parameter)
        if found is None:
            path = owner(self.model, parameter)
            found = self._owners[parameter] = path, parameter[len(path) :].lstrip(".")
        return found

    def by_module(self, changes: dict[str, Change]) -> dict[str, dict[str, Change]]:
        found: dict[str, dict[str, Change]] = defaultdict(dict)
        for parameter, change in changes.items():
            path, local = self.owner(parameter)
            found[path][local] = change
        return dict(found)

    def check(self, parameter: str, change: Change, where: str) -> None:
        """Raises BaseMismatchError where the change has a shape that the module cannot have."""
        base, own = self.shape(parameter), change.shape
        if base == own:
            return
        path, local = self.owner(parameter)
        module = self.model.get_submodule(path)
        rows_may_differ = issubclass(kind_of(module), LinearForward | EmbeddingForward) or local == "bias"
        if base[1:] != own[1:] or len(base) != len(own) or not rows_may_differ:
            raise BaseMismatchError(
                f"{parameter}: expected {list(base)} as in the model, {where} has {list(own)}"
            )
        if isinstance(change, Packed) and change.delta.shape[0] > base[0]:
            raise BaseMismatchError(
                f"{parameter}: a delta of {change.delta.shape[0]} rows, the model has {base[0]}"
            )

    def shape(self, parameter: str) -> tuple[int, ...]:
        """A parameter's shape; of a weight that is quantised, what it stands for."""
        path, _, leaf = parameter.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf == "weight" and hasattr(module, "in_features"):
            return module.out_features, module.in_features
        return tuple(self.parameters[parameter].shape)

    def device(self, parameter: str) -> torch.device:
        """Where a parameter is used: its own device, or where accelerate brings it for the product."""
        path, _, leaf = parameter.rpartition(".")
        return device_of(self.model.get_submodule(path), leaf)

    @property
    def devices(self) -> list[torch.device]:
        """Of every parameter, in order."""
        return [parameter.device for parameter in self.model.parameters()]

    def placed(self, modules: dict[str, Any]) -> dict[str, Any]:
        """A tenant's own modules, by path, where the model has its own."""
        found = {}
        for path, module in modules.items():
            buffer = next(self.model.get_submodule(path).buffers(), None)
            found[path] = module if buffer is None else deepcopy(module).to(buffer.device)
        return found

    def _path(self, module: Any) -> str | None:
        return next((name for name, found in self.model.named_modules() if found is module), None)

    def _rows(self, path: str) -> int:
        module = self.model.get_submodule(path)
        return getattr(module, "out_features", 0) or len(module.weight)


def device_of(module: Any, leaf: str) -> torch.device:
    """Where a module's parameter is when the module runs."""
    hook = vars(module).get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    if device is None:
        parameter = getattr(module, leaf, None)
        if parameter is None:  # of a quantised module that keeps its weight under other names
            parameter = next(iter((*module.parameters(), *module.buffers())))
        return parameter.device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _embeddings(model: Any, which: str) -> Any:
    try:
        found = getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None
    return found if hasattr(found, "weight") else object()
