"""What a tenant makes of one parameter of the model; whatever is not listed is the base's.

    Packed     base [N, K] + sign planes, and the rows that follow them (new tokens)
    Stack      of matrices [E, N, K], parts of each of which are Packed, Whole or the base's
    Whole      another tensor
    LowRank    base + scale * B A (LoRA)
    Converted  made of several checkpoint tensors, as transformers fuses or splits them while loading

Each has `expand(parameter)`: the tenant's value in the parameter's dtype, as a merged checkpoint would hold it; and
`moved(move)`: the same with every tensor x as `move(x)`, another place of the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import torch_delta
from .array import BFloat16Array
from .delta import Delta
from .torch_delta import TorchDelta

Move = Callable[[Tensor], Tensor]


def as_torch(array: Any) -> Tensor:
    """A NumPy array as a tensor of its own; bf16 bits become torch's bf16."""
    if isinstance(array, Tensor):
        return array
    if isinstance(array, BFloat16Array):
        return torch.from_numpy(np.array(array.bits).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


@dataclass(frozen=True, eq=False)
class Packed:
    """round(base[:N] + delta), then `rows`. The delta is a TorchDelta in a GPU's memory, where the model is."""

    delta: Delta | TorchDelta
    rows: Tensor | None = None  # [A, K]

    @property
    def shape(self) -> tuple[int, ...]:
        n, k = self.delta.shape
        return n + (0 if self.rows is None else len(self.rows)), k

    @property
    def nbytes(self) -> int:
        return self.delta.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def expand(self, parameter: Tensor) -> Tensor:
        n = self.delta.shape[0]
        base = parameter.detach()[:n]
        wide: Tensor = self.delta.expand(base.contiguous())
        return wide if self.rows is None else torch.cat([wide, self.rows.to(wide)])

    def moved(self, move: Move) -> Packed:
        parts = torch_delta.as_torch(self.delta)
        column = None if parts.column is None else move(parts.column)
        delta = TorchDelta(move(parts.sign), move(parts.row), column, parts.shape)
        return Packed(delta, None if self.rows is None else move(self.rows))

    def gather(self, tokens: Tensor, base: Tensor) -> Tensor:
        """Rows `tokens` [T] of the tenant's table in fp32, where `base` [T, K] are the base's, clipped to its table."""
        n = self.delta.shape[0]
        known = tokens.clamp(max=n - 1)
        terms = (
            _terms(self.delta, known) if isinstance(self.delta, Delta) else _torch_terms(self.delta, known)
        )
        total = terms + base.float()
        if self.rows is not None:
            added = self.rows[(tokens - n).clamp(min=0)].float()
            total = torch.where((tokens >= n)[:, None], added, total)
        return total


def _terms(delta: Delta, tokens: Tensor) -> Tensor:
    """The planes' sum at rows `tokens` [T], fp32 [T, K], from memory that may be a map of the file."""
    index = tokens.numpy()
    words = np.ascontiguousarray(np.asarray(delta.sign)[:, index // 16, :, index % 16])  # [T, P, L]
    signs = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little", count=delta.shape[1])
    scale = np.asarray(delta.scale)[:, index].T[..., None]
    terms = (signs.astype(np.float32) * 2 - 1) * (scale if delta.column is None else scale * delta.column)
    return torch.from_numpy(np.ascontiguousarray(terms.sum(1, dtype=np.float32)))


def _torch_terms(delta: TorchDelta, tokens: Tensor) -> Tensor:
    """The same on a GPU."""
    scale = delta.row[:, tokens].T[..., None]
    terms = delta.signs_of(tokens) * (scale if delta.column is None else scale * delta.column)
    total = terms[:, 0]
    for p in range(1, delta.planes):
        total = total + terms[:, p]
    return total


@dataclass(frozen=True, eq=False)
class Stack:
    """A stack of matrices [E, N, K]; rows begin..end of each matrix change on their own."""

    bounds: tuple[tuple[int, int], ...]  # of rows: 0 .. N
    parts: tuple[tuple[Packed | Whole | None, ...], ...]  # [E][bounds]; None: the base's
    columns: int

    @staticmethod
    def of(deltas: Sequence[Delta]) -> Stack:
        """A delta a matrix."""
        n, k = deltas[0].shape
        return Stack(((0, n),), tuple((Packed(delta),) for delta in deltas), k)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), self.bounds[-1][1], self.columns

    def moved(self, move: Move) -> Stack:
        parts = tuple(
            tuple(None if part is None else part.moved(move) for part in parts) for parts in self.parts
        )
        return Stack(self.bounds, parts, self.columns)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.parts for part in parts if part is not None)

    def expand(self, parameter: Tensor) -> Tensor:
        out = parameter.detach().clone(memory_format=torch.contiguous_format)
        for target, base, parts in zip(out, parameter.detach(), self.parts, strict=True):
            for (begin, end), part in zip(self.bounds, parts, strict=True):
                if part is not None:
                    target[begin:end] = part.expand(base[begin:end])
        return out


@dataclass(frozen=True, eq=False)
class Whole:
    """The tensor itself."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def expand(self, parameter: Tensor) -> Tensor:
        return self.tensor.to(parameter.dtype) if parameter.is_floating_point() else self.tensor

    def moved(self, move: Move) -> Whole:
        return Whole(move(self.tensor))

    def gather(self, tokens: Tensor, base: Tensor) -> Tensor:
        return self.tensor[tokens]


@dataclass(frozen=True, eq=False)
class LowRank:
    """base + scale * B A; a transposed weight (Conv1D, embeddings) is base + scale * (B A)^T."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        n, k = len(self.b), self.a.shape[1]
        return (k, n) if self.is_transposed else (n, k)

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def moved(self, move: Move) -> LowRank:
        return LowRank(move(self.a), move(self.b), self.scale, self.is_transposed)

    def product(self, x: Tensor) -> Tensor:
        """scale * B A x, computed in the adapter's dtype, as PEFT does."""
        return (x.to(self.a.dtype) @ self.a.T) @ self.b.T * self.scale

    def gather(self, tokens: Tensor, base: Tensor) -> Tensor:
        """Rows `tokens` of an adapted table [vocabulary, K]: a is [r, vocabulary], b is [K, r]."""
        return base.float() + (self.a.T[tokens] @ self.b.T * self.scale).float()

    def expand(self, parameter: Tensor) -> Tensor:
        wide = self.b @ self.a * self.scale
        total = parameter.detach() + (wide.T if self.is_transposed else wide).to(parameter.dtype)
        return total.to(parameter.dtype)


@dataclass(frozen=True, eq=False)
class Converted:
    """Made on the fly, in the host's memory, by transformers' own conversion of the tenant's checkpoint tensors."""

    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    nbytes: int = 0

    def expand(self, parameter: Tensor) -> Tensor:
        return self.make().to(parameter.device, parameter.dtype)

    def moved(self, move: Move) -> Converted:
        return self

    def gather(self, tokens: Tensor, base: Tensor) -> Tensor:
        return self.make().to(base.device)[tokens]


Change = Packed | Stack | Whole | LowRank | Converted
