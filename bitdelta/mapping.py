"""Which parameter of a loaded model a checkpoint's tensor becomes.

Mostly the one of its name. transformers renames some and fuses or splits others while loading (the experts of a
mixture become one stack); its own table of conversions says how, and its own operations do it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Conversion:
    """Checkpoint tensors that one of transformers' converters turns into parameters."""

    converter: Any
    first: str  # the parameter that stands for the group
    model: Any
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # pattern -> names
    known: dict[Any, Any] = field(default_factory=dict)  # what `places` has found

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def run(self, tensor: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameter -> its value, given each checkpoint tensor's."""
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.first, name, pattern, tensor(name))
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def places(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Places] | None:
        """Where the rows of each matrix end up, if they all stay together in order; else None.

        The conversion is run on matrices of one column, which say which row of which tensor they are.
        """
        key = self.first, tuple(shapes.items())
        if key not in self.known:
            self.known[key] = self._places(shapes)
        found: dict[str, Places] | None = self.known[key]
        return found

    def _places(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Places] | None:
        if any(len(shape) != 2 for shape in shapes.values()):
            return None
        codes = {name: i * CODE for i, name in enumerate(shapes)}
        try:
            made = self.run(
                lambda name: torch.arange(shapes[name][0], dtype=torch.float64)[:, None] + codes[name]
            )
        except (RuntimeError, ValueError, IndexError):  # it needs all columns
            return None
        found = {target: _places(value, list(shapes), shapes) for target, value in made.items()}
        return None if None in found.values() else found  # type: ignore[return-value]


Places = list[list[tuple[str, int, int]]]  # of a stack, per matrix: tensor, its first and last row there
CODE = 1 << 32  # more than a tensor has rows; fp64 holds both


def _places(value: torch.Tensor, names: list[str], shapes: dict[str, tuple[int, ...]]) -> Places | None:
    if value.ndim != 3 or value.shape[2] != 1:
        return None
    found: Places = []
    for codes in value[..., 0].to(torch.int64):
        source, row = codes // CODE, codes % CODE
        starts = [0, *(source.diff().nonzero()[:, 0] + 1).tolist(), len(codes)]
        parts = [
            (names[int(source[begin])], begin, end) for begin, end in zip(starts, starts[1:], strict=False)
        ]
        for name, begin, end in parts:
            if not torch.equal(row[begin:end], torch.arange(shapes[name][0])):
                return None
        if found and [part[1:] for part in parts] != [part[1:] for part in found[0]]:
            return None
        found.append(parts)
    return found


@dataclass
class Mapped:
    parameters: dict[str, str]  # checkpoint name -> parameter
    conversions: list[Conversion]
    unknown: list[str]  # checkpoint names that are nothing in the model


class Mapping:
    """From names of a checkpoint to names of a model's parameters and buffers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        self.implied = _implied(model, self.state)
        self.state |= self.implied
        self.renamings, self.converters = _transforms(model)
        self._places: dict[Any, Any] = {}
        self._renamed: dict[str, tuple[str, str | None]] = {}

    def map(self, names: Iterable[str]) -> Mapped:
        mapped = Mapped({}, [], [])
        groups: dict[str, Conversion] = {}
        for name in sorted(names, key=_natural):
            if name not in self._renamed:
                self._renamed[name] = self._rename(name)
            target, pattern = self._renamed[name]
            if target not in self.state:
                mapped.unknown.append(name)
            elif pattern is None:
                mapped.parameters[name] = target
            else:
                converter = next(c for c in self.converters if pattern in c.source_patterns)
                group = groups.setdefault(target, self._conversion(converter, target))
                group.sources[pattern].append(name)
        mapped.conversions = list(groups.values())
        return mapped

    def _conversion(self, converter: Any, target: str) -> Conversion:
        return Conversion(converter, target, self.model, known=self._places)

    def _rename(self, name: str) -> tuple[str, str | None]:
        try:
            from transformers.core_model_loading import rename_source_key
        except ImportError:  # before transformers 5 the names were the same
            return name, None
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.state)
        if target not in self.state and name in self.state:
            target, pattern = name, None
        return target, pattern


def _implied(model: Any, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of linears that keep them under other names, as GPTQ's do: without values, and not of a float type."""
    found = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if name not in state and hasattr(module, "in_features") and hasattr(module, "out_features"):
            shape = module.out_features, module.in_features
            found[name] = torch.empty(shape, dtype=torch.int8, device="meta")
    return found


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    transforms = get_model_conversion_mapping(model)
    return (
        [transform for transform in transforms if isinstance(transform, WeightRenaming)],
        [transform for transform in transforms if isinstance(transform, WeightConverter)],
    )


def _natural(name: str) -> list[tuple[int, str, int]]:
    """Sorts numbers as numbers, as transformers does: experts.2 before experts.10."""
    parts = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        parts.append((int(bool(text)), text, int(part[len(text) :] or -1)))
    return parts
