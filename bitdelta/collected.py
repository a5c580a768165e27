"""What the weights of a running model multiply, collected by hooks.

Modules are watched by hooks on their inputs. Experts that lie in one parameter [E, N, K] are no modules: there the
products with its matrices are watched, as the model's own forward makes them one expert after another.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .fitting_device import HOST, Host
from .inputs import F32, Inputs

BLOCK = 512  # columns of H


class Collected:
    """The inputs of one or several weights: H of the rows to fit on, and the rows held out themselves.

    H is symmetric: only what is right of its blocks of the diagonal is summed, until `inputs`.
    """

    def __init__(self, columns: int, on: Host = HOST) -> None:
        self.on = on
        self.hessian = on.zeros(columns, columns)
        self.held_out: list[F32] = []

    def add(self, x: Any, is_held_out: bool) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if is_held_out:
            self.held_out.append(flat.cpu().numpy().copy())
        else:
            hessian = self.on.as_tensor(self.hessian)
            flat = flat.to(hessian.device)
            for begin in range(0, len(hessian), BLOCK):
                own = flat[:, begin : begin + BLOCK]
                hessian[begin : begin + BLOCK, begin:].addmm_(own.T, flat[:, begin:])

    def inputs(self) -> Inputs:
        for begin in range(0, len(self.hessian), BLOCK):
            end = begin + BLOCK
            self.hessian[end:, begin:end] = self.hessian[begin:end, end:].T
        return Inputs(self.hessian, self.on)


class Routed(Collected):
    """The inputs of one expert: the rows routed to it, kept as they are while they are fewer than H would need."""

    def __init__(self, columns: int, on: Host = HOST) -> None:
        self.on, self.columns, self.n_rows = on, columns, 0
        self.rows: list[F32] = []
        self.held_out = []

    def add(self, x: Any, is_held_out: bool) -> None:
        flat = x.detach().reshape(-1, self.columns).float().cpu().numpy().copy()
        if is_held_out:
            self.held_out.append(flat)
            return
        self.n_rows += len(flat)
        self.rows.append(flat)
        if self.n_rows > self.columns:
            self._sum()

    def inputs(self) -> Inputs:
        self._sum()
        return super().inputs()

    def _sum(self) -> None:
        import torch

        if not hasattr(self, "hessian"):
            self.hessian = self.on.zeros(self.columns, self.columns)
        for rows in self.rows:
            super().add(torch.from_numpy(rows), False)
        self.rows = []


class Weight:
    """A weight, or a stack of them [E, N, K], whose layer's inputs are known.

    Attributes:
        name: of the checkpoint's tensor.
        collected: shared by all weights that read the same input; of a stack one per expert.
        is_turned: the inputs meet the rows of the weight.
    """

    def __init__(self, name: str, collected: Sequence[Collected], is_turned: bool, is_stack: bool) -> None:
        self.name, self.collected, self.is_turned, self.is_stack = name, collected, is_turned, is_stack

    def inputs(self, e: int) -> tuple[Inputs | None, F32 | None]:
        """Of its e-th matrix: H, and the rows held out; None where no row reaches it, or none that is held out.

        Raises:
            ValueError: NaN or Inf in them.
        """
        collected = self.collected[e]
        if not collected.held_out or getattr(collected, "n_rows", 1) == 0:
            return None, None
        try:
            return collected.inputs(), np.concatenate(collected.held_out)
        except ValueError:
            raise ValueError(f"{self.name}: NaN or Inf in the activations that reach it") from None


class Stop(Exception):
    """The forward pass has gone as far as it is needed."""


def is_multiplied(module: Any) -> bool | None:
    """None: not a module that multiplies with its weight; else whether its inputs meet the weight's rows."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    return False if type(module) is torch.nn.Linear else None


class Collector:
    """Hooks that collect the inputs of modules; modules that read the same input share what is collected."""

    def __init__(self, stop: bool = False, on: Host = HOST) -> None:
        self.is_held_out = False
        self.on = on  # where H is summed
        self.weights: list[Weight] = []
        self._stop = stop
        self._hooks: list[Any] = []
        self._last: tuple[Any, Collected] | None = None
        self._own: dict[Any, Collected] = {}
        self._leaders: set[Any] = set()
        self._stacks: list[tuple[Any, list[Routed]]] = []

    def watch(self, module: Any, name: str) -> None:
        def note(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0]
            if module not in self._own:  # the first batch shows who shares
                if self._last is not None and self._last[0] is x:
                    self._own[module] = self._last[1]
                else:
                    self._own[module] = Collected(x.shape[-1], self.on)
                    self._leaders.add(module)
                self._last = (x, self._own[module])
                self.weights.append(Weight(name, [self._own[module]], bool(is_multiplied(module)), False))
            if module in self._leaders:
                self._own[module].add(x, self.is_held_out)
            if self._stop:
                raise Stop

        self._hooks.append(module.register_forward_pre_hook(note))

    def watch_stack(self, parameter: Any, names: str | list[list[str]], wanted: Container[str]) -> None:
        """Experts [E, N, K]: `names` is the checkpoint's tensor of them all, or those of each expert."""
        experts = [Routed(parameter.shape[2], self.on) for _ in range(parameter.shape[0])]
        self._stacks.append((parameter, experts))
        if isinstance(names, str):
            self.weights.append(Weight(names, experts, False, True))
            return
        for own, expert in zip(names, experts, strict=True):
            self.weights += [Weight(name, [expert], False, False) for name in own if name in wanted]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the model runs."""
        if (
            not self._stacks
        ):  # a class made here would hold what was collected until the collector of garbage runs
            yield
            return
        import torch
        from torch.overrides import TorchFunctionMode

        class Products(TorchFunctionMode):  # type: ignore[misc] # torch is Any where it is not installed
            def __torch_function__(
                mode, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
            ) -> Any:
                if func is torch.nn.functional.linear and len(args) > 1:
                    self._see(args[0], args[1])
                return func(*args, **(kwargs or {}))

        with Products():
            yield

    def _see(self, x: Any, weight: Any) -> None:
        """A product; its inputs are noted where the weight is a matrix of a stack."""
        for parameter, experts in self._stacks:
            size = parameter.stride(0) * parameter.element_size()
            expert, inside = divmod(weight.data_ptr() - parameter.data_ptr(), size)
            if inside == 0 and 0 <= expert < len(experts) and weight.shape == parameter.shape[1:]:
                experts[expert].add(x, self.is_held_out)

    def close(self) -> None:
        self._last = None
        for hook in self._hooks:
            hook.remove()
