"""How much an error in the output of each layer changes the logits, measured by going backwards from them.

    v                    a random sign for every logit of some rows of text
    g = d(v . logits)    / d(output y [T, N] of a linear layer or table)
    weight [N]           mean over the tokens of g^2

An error e [T, N] of the output changes the logits by (v . change)^2 = (sum over t, n of g e)^2 on average over v; with
errors that have nothing to do with each other, T times the sum over n of weight_n mean_t(e^2). Decoders are run and
gone back through one layer at a time, the hidden states between layers lie in files; other models are loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .activations import Streamed, Whole, _always, _set
from .array import to_float32
from .collected import Stop, is_multiplied
from .inputs import F32

ROWS = 4096  # of the head at a time

F64 = NDArray[np.float64]
OUTPUT, TABLE = "output:", "table:"


class Sensitivity:
    """What is known of each tensor, apart for the outputs of a linear layer and those of a table.

    Attributes:
        n_logits: of one position.
    """

    def __init__(self) -> None:
        self.n_logits = 1
        self._sums: dict[str, F64] = {}  # [N] of g^2
        self._counts: dict[str, F64] = {}  # [1] of tokens; of a table, [rows] how often each is looked up

    def add(self, key: str, gradient: Any) -> None:
        g = gradient.detach().reshape(-1, gradient.shape[-1]).double()
        self._sums[key] = self._sums.get(key, 0.0) + g.square().sum(0).numpy()
        if key.startswith(OUTPUT):
            self._counts[key] = self._counts.get(key, np.zeros(1)) + len(g)

    def look_up(self, key: str, rows: Any, n_rows: int) -> None:
        self._counts[key] = self._counts.get(key, np.zeros(n_rows)) + np.bincount(
            rows.reshape(-1).numpy(), minlength=n_rows
        )

    def weight(self, name: str, is_table: bool) -> F64 | None:
        """[N]: the sum over n of weight_n mean(e^2) is the mean squared change of a logit; None: not seen."""
        key = (TABLE if is_table else OUTPUT) + name
        if key not in self._sums:
            return None
        return self._sums[key] / max(self._counts[key].sum(), 1) / self.n_logits

    def shares(self, name: str, n_rows: int) -> F64:
        """How many of all look-ups in a table take each of the first n rows."""
        counts = self._counts[TABLE + name]
        return counts[:n_rows] / max(counts.sum(), 1)

    def save(self, path: Path) -> None:
        values: dict[str, Any] = {f"s{key}": value for key, value in self._sums.items()}
        values |= {f"c{key}": value for key, value in self._counts.items()}
        with open(path.with_suffix(".new"), "wb") as file:
            np.savez(file, n_logits=np.array(self.n_logits), **values)
        path.with_suffix(".new").rename(path)

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        found = cls()
        with np.load(path) as values:
            found.n_logits = int(values["n_logits"])
            for key in values.files:
                if key != "n_logits":
                    (found._sums if key[0] == "s" else found._counts)[key[1:]] = values[key]
        return found


def measure_streamed(model: Streamed, folder: Path, seed: int) -> Sensitivity:
    """Of a decoder; `model` is built for the rows to measure on and has not run.

    Args:
        folder: for the hidden states, one file a layer.
        seed: of the random signs.
    """
    found = Sensitivity()
    model.embed()
    for i in range(len(model.layers)):
        _save(folder / f"probe-{i}.npy", model.hidden)
        model.run(i, {}, partial(_values, model), keep=True)
    gradients = _through_head(model, found, np.random.default_rng(seed))
    for i in reversed(range(len(model.layers))):
        path = folder / f"probe-{i}.npy"
        gradients = _through_layer(model, i, _load(path, len(gradients)), gradients, found)
        path.unlink()
    _through_tables(model, gradients, found)
    return found


def measure_whole(model: Whole, seed: int) -> Sensitivity:
    """Of any model: of its logits, or of the hidden states where it has none."""
    import torch

    found, rng = Sensitivity(), np.random.default_rng(seed)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    with _watching(model.model, "", model.names, found):
        for rows, _ in model.batches:
            for row in rows:
                out = model.model(input_ids=torch.from_numpy(row[None]))
                out = out.logits if "logits" in out else out[0]
                found.n_logits = out.shape[-1]
                out.backward(torch.from_numpy(_signs(rng, tuple(out.shape))))
    return found


def _through_head(model: Streamed, found: Sensitivity, rng: np.random.Generator) -> list[F32]:
    """The gradients at the last layer's outputs; a head [V, K] is multiplied with some rows at a time."""
    import torch

    head = model.model.get_output_embeddings()
    name = model.head_name()
    weight = model.checkpoint[name].array() if name else None
    gradients = []
    for (rows, _), hidden in zip(model.batches, model.hidden, strict=True):
        last = torch.from_numpy(hidden).requires_grad_()
        seen: list[Any] = []
        hook = None if weight is None else head.register_forward_pre_hook(partial(_stop, seen))
        with model._outside(), model._recording(partial(_always, last), note=False):
            try:
                seen.append(model.model(input_ids=torch.from_numpy(rows), use_cache=False)[0])
            except Stop:
                pass
        if hook is not None:
            hook.remove()
        x = seen[0]
        if weight is None:
            found.n_logits, g = x.shape[-1], _signs(rng, tuple(x.shape))
        else:
            found.n_logits, g = len(weight), np.zeros(tuple(x.shape), np.float32)
            for begin in range(0, len(weight), ROWS):
                part = to_float32(weight[begin : begin + ROWS])
                signs = _signs(rng, (*x.shape[:-1], len(part)))
                g += signs @ part
        x.backward(torch.from_numpy(g))
        gradients.append(last.grad.numpy())
    if name:
        found.add(OUTPUT + name, torch.ones(1, found.n_logits))
    return gradients


def _through_layer(
    model: Streamed, i: int, hidden: list[F32], gradients: list[F32], found: Sensitivity
) -> list[F32]:
    """From the gradients at the layer's outputs to those at its inputs."""
    import torch

    layer, before = model.layers[i], []
    paths = model._parameters(i)
    for path, name in paths.items():
        _set(layer, path, model.value(name, partial(_values, model)))
    with _watching(layer, f"{model.prefix}.{i}.", model.names, found):
        for x, g in zip(hidden, gradients, strict=True):
            args, kwargs = _usable(model._calls[i, len(x)])
            start = torch.from_numpy(x).requires_grad_()
            out = layer(start, *args, **kwargs)
            (out[0] if isinstance(out, tuple) else out).backward(torch.from_numpy(g))
            before.append(start.grad.numpy())
    for path in paths:
        _set(layer, path, None)
    return before


def _through_tables(model: Streamed, gradients: list[F32], found: Sensitivity) -> None:
    """From the gradients at the first layer's inputs to those at the embeddings' outputs."""
    import torch

    with model._outside(), _watching(model.model, "", model.names, found):
        for (rows, _), g in zip(model.batches, gradients, strict=True):
            first: list[Any] = []
            with model._recording(partial(_note, first), note=False):
                try:
                    model.model(input_ids=torch.from_numpy(rows), use_cache=False)
                except Stop:
                    pass
            first[0].backward(torch.from_numpy(g))


@contextmanager
def _watching(root: Any, prefix: str, names: dict[str, str], found: Sensitivity) -> Iterator[None]:
    """Adds up the gradients at the outputs of the linear layers and tables in `root`."""
    import torch

    def watch(name: str, is_table: bool) -> Callable[..., Any]:
        def call(module: Any, args: Any, out: Any) -> Any:
            if is_table:
                found.look_up(TABLE + name, args[0], len(module.weight))
                out = out.detach().float().requires_grad_()
            if out.requires_grad:
                out.register_hook(partial(found.add, (TABLE if is_table else OUTPUT) + name))
            return out

        return call

    hooks = []
    for path, module in root.named_modules():
        is_table = isinstance(module, torch.nn.Embedding)
        name = names.get(f"{prefix}{path}.weight", "")
        if name and (is_table or is_multiplied(module) is not None):
            hooks.append(module.register_forward_hook(watch(name, is_table)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _stop(seen: list[Any], module: Any, args: tuple[Any, ...]) -> None:
    seen.append(args[0])
    raise Stop


def _note(first: list[Any], i: int, hidden: Any) -> Any:
    first.append(hidden)
    raise Stop


def _usable(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The arguments of a layer as tensors that gradients may pass by; those of inference mode may not."""
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, call)


def _values(model: Streamed, name: str) -> F32:
    return np.array(to_float32(model.checkpoint[name].array()))


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> F32:
    return rng.integers(0, 2, shape, np.int8).astype(np.float32) * 2 - 1


def _save(path: Path, hidden: list[F32]) -> None:
    with open(path, "wb") as file:
        for batch in hidden:
            np.save(file, batch)


def _load(path: Path, count: int) -> list[F32]:
    with open(path, "rb") as file:
        return [np.load(file) for _ in range(count)]
