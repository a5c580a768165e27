"""A model run one layer at a time on rows of tokens, with what its weights multiply collected on the way.

    embeddings                  the model's own forward, stopped at its first layer
    layer 0, 1, ...             each loaded from the checkpoint, run on all rows, and dropped again
    head                        the model's own forward from the last layer on, stopped before the head multiplies

The model is built without weights; those of one layer are in memory, in fp32, besides the rows' hidden states. What
else a layer needs (masks, positions) is what the model gives it. Decoders of transformers run like this; others are
loaded whole (`Whole`). On a GPU the layers run there, or the whole model; embeddings and head stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .array import to_float32
from .checkpoint import Checkpoint
from .checkpoint_model import build, checkpoint_names, fused_names
from .collected import Collector, Stop, Weight, is_multiplied
from .errors import Error
from .fitting_device import HOST, Host
from .inputs import F32
from .text import refuse_unknown

if TYPE_CHECKING:
    from .mapping import Conversion

BATCH_TOKENS = 2048
I64 = NDArray[np.int64]


def watch_stacks(
    collector: Collector,
    parameters: Iterable[tuple[str, Any]],
    names: dict[str, str],
    fused: dict[str, Conversion],
    wanted: Mapping[str, Any],
) -> None:
    """Watches those of the parameters that are stacks of experts with wanted tensors."""
    for name, parameter in parameters:
        if parameter.ndim != 3:
            continue
        if name in fused:
            sources = fused[name].sources.values()
            if all(len(own) == len(parameter) for own in sources):
                experts = [list(own) for own in zip(*sources, strict=True)]
                if any(own in wanted for expert in experts for own in expert):
                    collector.watch_stack(parameter, experts, wanted)
        elif names.get(name) in wanted:
            collector.watch_stack(parameter, names[name], wanted)


class Streamed:
    """A decoder without weights, whose layers are run one after the other.

    Args:
        checkpoint: the fine-tune's.
        tokens: [rows, length]; the last `n_held_out` rows are held out.
        on: where layers run and H is summed.

    Raises:
        bitdelta.Error: the model is not one that runs like this; the text says why.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: I64, n_held_out: int, on: Host = HOST) -> None:
        self.checkpoint, self.on = checkpoint, on
        self.model = build(checkpoint, is_empty=True)
        self.names = checkpoint_names(self.model, checkpoint)
        self.fused = fused_names(self.model, checkpoint, self.names)
        self.prefix, self.layers = self._find_layers()
        self._check_names()
        refuse_unknown(tokens, self.model)
        self.batches = _batches(tokens, n_held_out)
        self.hidden: list[F32] = []
        self._calls: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._is_tuple = self._returns_tuple()

    def embed(self) -> None:
        """Runs the embeddings, and notes what every layer is called with."""
        import torch

        with torch.inference_mode(), self._outside(), self._recording(lambda i, hidden: hidden):
            for rows, _ in self.batches:
                try:
                    self.model(input_ids=torch.from_numpy(rows), use_cache=False)
                except Stop:
                    pass

    def weights(self, i: int) -> list[str]:
        """Names of the checkpoint's tensors in layer i."""
        own = self._parameters(i).values()
        found = [[self.names[name]] if name in self.names else self.fused[name].names for name in own]
        return [name for names in found for name in names]

    def run(
        self, i: int, wanted: Mapping[str, Any], values: Callable[[str], F32], keep: bool
    ) -> list[Weight]:
        """Runs layer i on all rows.

        Args:
            wanted: names of the weights whose inputs to collect.
            values: name of a tensor -> its values.
            keep: whether the outputs become the next layer's inputs.
        """
        import torch

        layer = self.layers[i]
        for path, name in self._parameters(i).items():
            _set(layer, path, self.value(name, values))
        layer.to(self.on.device)
        collector = Collector(on=self.on)
        for path, module in layer.named_modules():
            name = self.names.get(f"{self.prefix}.{i}.{path}.weight", "")
            if name in wanted and is_multiplied(module) is not None:
                collector.watch(module, name)
        parameters = ((f"{self.prefix}.{i}.{path}", value) for path, value in layer.named_parameters())
        watch_stacks(collector, parameters, self.names, self.fused, wanted)
        with torch.inference_mode(), collector.watching():
            for at, (rows, is_held_out) in enumerate(self.batches):
                args, kwargs = self._placed(self._calls[i, len(rows)])
                collector.is_held_out = is_held_out
                out = layer(torch.from_numpy(self.hidden[at]).to(self.on.device), *args, **kwargs)
                self._is_tuple = isinstance(out, tuple)
                if keep:
                    self.hidden[at] = (out[0] if isinstance(out, tuple) else out).float().cpu().numpy()
        collector.close()
        for path in self._parameters(i):
            _set(layer, path, None)
        return collector.weights

    def _placed(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """What a layer is called with, where it runs."""
        import torch
        from torch.utils._pytree import tree_map

        device = self.on.device
        return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, call)

    def value(self, name: str, values: Callable[[str], F32]) -> Any:
        """A parameter of the model, from the checkpoint's tensors."""
        import torch

        if name in self.names:
            return torch.from_numpy(values(self.names[name]))
        return self.fused[name].run(lambda source: torch.from_numpy(values(source)))[name]

    def head(self, wanted: Mapping[str, Any]) -> list[Weight]:
        """Collects the inputs of the head, where it is a linear layer whose weight is wanted."""
        import torch

        module, name = self.model.get_output_embeddings(), self.head_name()
        if module is None or name not in wanted or is_multiplied(module) is None:
            return []
        collector = Collector(stop=True, on=self.on)
        collector.watch(module, name)
        with torch.inference_mode(), self._outside():
            for (rows, is_held_out), hidden in zip(self.batches, self.hidden, strict=True):
                collector.is_held_out = is_held_out
                last = torch.from_numpy(hidden)
                with self._recording(partial(_always, last), note=False):
                    try:
                        self.model(input_ids=torch.from_numpy(rows), use_cache=False)
                    except Stop:
                        pass
        collector.close()
        return collector.weights

    def head_name(self) -> str:
        """The tensor of the head, or of the embeddings where they are tied; empty: there is none."""
        name = self._name_of(self.model.get_output_embeddings())
        if name or not getattr(self.model.config, "tie_word_embeddings", False):
            return name
        return self._name_of(self.model.get_input_embeddings())

    def _name_of(self, module: Any) -> str:
        found = (
            self.names.get(f"{path}.weight", "") for path, m in self.model.named_modules() if m is module
        )
        return next(found, "")

    def _find_layers(self) -> tuple[str, Any]:
        import torch

        lists = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, torch.nn.ModuleList)
            and len(module)
            and len({type(child) for child in module}) == 1
        ]
        if (
            not self.model.can_generate()
            or getattr(self.model.config, "is_encoder_decoder", False)
            or not lists
        ):
            raise Error(f"{type(self.model).__name__} is not a decoder of equal layers")
        return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))

    def _check_names(self) -> None:
        head = self.model.get_output_embeddings()
        tied = {id(head.weight)} if head is not None and hasattr(head, "weight") else set()
        for name, parameter in self.model.named_parameters():
            if name not in self.names and name not in self.fused and id(parameter) not in tied:
                raise Error(f"{name} of {type(self.model).__name__} is no tensor of the checkpoint")

    def _parameters(self, i: int) -> dict[str, str]:
        """Path in layer i -> name in the model."""
        return {path: f"{self.prefix}.{i}.{path}" for path, _ in self.layers[i].named_parameters()}

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """With the weights around the layers: embeddings memory-mapped, the head without."""
        import torch

        head, placed, hooks = self.model.get_output_embeddings(), [], []
        for path, module in self.model.named_modules():
            if path.startswith(f"{self.prefix}.") or module is head:
                continue
            for own in [own for own, _ in module.named_parameters(recurse=False)]:
                name = self.names[f"{path}.{own}" if path else own]
                tensor = self.checkpoint[name]
                is_table = isinstance(module, torch.nn.Embedding)
                value = _view(tensor.array()) if is_table else torch.from_numpy(_copy(tensor.array()))
                _set(module, own, value)
                placed.append((module, own))
                if is_table:
                    hooks.append(module.register_forward_hook(lambda module, x, out: out.float()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, own in placed:
                _set(module, own, None)

    @contextmanager
    def _recording(self, replace: Callable[[int, Any], Any], note: bool = True) -> Iterator[None]:
        """The layers do nothing but note what they are called with (and stop after the last), or `replace` it."""
        last = len(self.layers) - 1

        def forward(i: int) -> Callable[..., Any]:
            def call(hidden: Any, *args: Any, **kwargs: Any) -> Any:
                if isinstance(hidden, tuple):  # the layers' annotation is wrong
                    self._is_tuple, hidden = False, hidden[0]
                if note:
                    if i == 0:
                        self.hidden.append(hidden.float().numpy())
                    self._calls.setdefault((i, len(hidden)), (args, kwargs))
                    if i == last:
                        raise Stop
                out = replace(i, hidden)
                return (out,) if self._is_tuple else out

            return call

        for i, layer in enumerate(self.layers):
            layer.forward = forward(i)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _returns_tuple(self) -> bool:
        """What the layers' own forward says that it returns, until one has run."""
        import inspect

        said = str(inspect.signature(type(self.layers[0]).forward).return_annotation)
        return "tuple" in said.lower()


class Whole:
    """A model of any kind, loaded whole; `collect` runs it once for as many weights as fit `most` bytes of H."""

    def __init__(self, checkpoint: Checkpoint, tokens: I64, n_held_out: int, on: Host = HOST) -> None:
        self.on = on
        self.model = build(checkpoint, is_empty=False).to(on.device)
        self.names = checkpoint_names(self.model, checkpoint)
        self.fused = fused_names(self.model, checkpoint, self.names)
        refuse_unknown(tokens, self.model)
        self.batches = _batches(tokens, n_held_out)

    def collect(self, wanted: Mapping[str, Any], most: int = 1 << 30) -> Iterator[list[Weight]]:
        modules = []
        for path, module in self.model.named_modules():
            name = self.names.get(f"{path}.weight", "")
            if name in wanted and is_multiplied(module) is not None:
                modules.append((name, module))
        stacks = [(name, value) for name, value in self.model.named_parameters() if value.ndim == 3]
        for name, value in stacks:  # each by itself: E times the H of a module
            yield self._run([], [(name, value)], wanted)
        while modules:
            size = 0
            part: list[tuple[str, Any]] = []
            while modules and (not part or size < most):
                name, module = modules.pop(0)
                size += 4 * module.weight.shape[0 if is_multiplied(module) else 1] ** 2
                part.append((name, module))
            yield self._run(part, [], wanted)

    def _run(
        self, part: list[tuple[str, Any]], stacks: list[tuple[str, Any]], wanted: Mapping[str, Any]
    ) -> list[Weight]:
        import torch

        collector = Collector(on=self.on)
        for name, module in part:
            collector.watch(module, name)
        watch_stacks(collector, stacks, self.names, self.fused, wanted)
        if stacks and not collector.weights:
            return []
        with torch.inference_mode(), collector.watching():
            for rows, is_held_out in self.batches:
                collector.is_held_out = is_held_out
                self.model(input_ids=torch.from_numpy(rows).to(self.on.device))
        collector.close()
        return collector.weights


def _always(value: Any, i: int, hidden: Any) -> Any:
    return value


def _batches(tokens: I64, n_held_out: int) -> list[tuple[I64, bool]]:
    """Some rows at a time, those held out apart."""
    size = max(1, BATCH_TOKENS // tokens.shape[1])
    n_fitted = len(tokens) - n_held_out
    fitted = [(tokens[at : min(at + size, n_fitted)], False) for at in range(0, n_fitted, size)]
    return fitted + [(tokens[at : at + size], True) for at in range(n_fitted, len(tokens), size)]


def _set(module: Any, path: str, value: Any) -> None:
    """Replaces a parameter; None: by one without values."""
    import torch

    *parents, own = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    old = module._parameters[own]
    if value is None:
        value = torch.empty(old.shape, dtype=old.dtype, device="meta")
    module._parameters[own] = torch.nn.Parameter(value, requires_grad=False)


def _view(array: np.ndarray) -> Any:
    """A memory-mapped tensor of the checkpoint as torch's; nothing is read or copied."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it cannot be written to, and is not
        if getattr(array, "__bitdelta_dtype__", "") == "bfloat16":
            return torch.from_numpy(array.view(np.ndarray).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array.view(np.ndarray))


def _copy(array: np.ndarray) -> F32:
    return np.array(to_float32(array))
