"""A delta as torch tensors, whose scales may be trained, and the kernels' view of them.

sign     int32 [P, ceil(N/16), 8 ceil(K/256), 16]   PyTorch computes little with uint32; the bits are `Delta.sign`'s
row      fp32 [P, N]
column   fp32 [P, K] or None
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from . import _C, cuda, cuda_memory, threads
from .delta import Delta

T: TypeAlias = torch.Tensor


class TorchDelta:
    """A delta of torch tensors that share memory with where they come from; its scales may require gradients.

    Args:
        sign: int32 or uint32 [P, ceil(N/16), 8 ceil(K/256), 16], contiguous, 64-byte aligned.
        row: fp32 [P, N]; for one scale a plane, an expanded [P, 1].
        column: fp32 [P, K], or None.
        shape: (N, K).
    """

    def __init__(self, sign: T, row: T, column: T | None, shape: tuple[int, int]) -> None:
        self.sign = sign.view(torch.int32)
        self.row = row
        self.column = column
        self.shape = shape
        self._handle: _C.Delta | None = None
        self._at: tuple[int, int] | None = None  # the addresses of row and column in _handle

    @property
    def planes(self) -> int:
        """P, 1 to 8."""
        return int(self.sign.shape[0])

    @property
    def handle(self) -> _C.Delta:
        """The tensors as the kernels see them: made once, and it sees what changes in place."""
        row, column = self.row, self.column
        at = row.data_ptr(), 0 if column is None else column.data_ptr()
        if self._handle is None or at != self._at:
            self._handle = handle_of(self.sign, row, column, self.shape)
            is_copied = not row.is_contiguous() or column is not None and not column.is_contiguous()
            self._at = None if is_copied else at
        return self._handle

    @property
    def nbytes(self) -> int:
        """Bytes of signs and scales in memory."""
        column = 0 if self.column is None else self.column.nbytes
        return int(self.sign.nbytes + self.row.nbytes + column)

    def expand(self, base: T) -> T:
        """round(base + the planes summed in order in fp32), as `Delta.expand`; base [N, K] has contiguous rows."""
        out = torch.empty(self.shape, dtype=base.dtype, device=base.device)
        if cuda_memory.is_on_gpu(base):
            return cuda.expand(self, base, out)
        threads.sync()
        _C.expand(out, base, self.handle, 0, self.shape[0])
        return out

    def signs_of(self, rows: T) -> T:
        """-1 and +1, fp32 [n, P, K], of n output rows."""
        return signs_of(self.sign, rows, self.shape[1])

    def __reduce__(self) -> Any:
        return TorchDelta, (self.sign, self.row, self.column, self.shape)

    def __repr__(self) -> str:
        return f"TorchDelta(shape={self.shape}, planes={self.planes})"


def signs_of(sign: T, rows: T, K: int) -> T:
    """-1 and +1, fp32 [n, P, K], of n output rows of `sign`."""
    words = sign[:, rows // 16, :, rows % 16]  # [n, P, lines]
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(2)[..., :K].float() * 2 - 1


_converted: weakref.WeakKeyDictionary[Delta, TorchDelta] = weakref.WeakKeyDictionary()


def as_torch(delta: Delta | TorchDelta) -> TorchDelta:
    """The delta as torch tensors of the same memory; the same object at every call."""
    if isinstance(delta, TorchDelta):
        return delta
    if not isinstance(delta, Delta):
        raise TypeError(f"delta: expected a Delta, got {type(delta).__name__}")
    found = _converted.get(delta)
    if found is None:
        column = None if delta.column is None else _shared(delta.column)
        found = TorchDelta(_shared(delta.sign), _shared(delta.scale), column, delta.shape)
        _converted[delta] = found
    return found


def _shared(array: Any) -> T:
    """A NumPy array, also a read-only memory map, as a tensor of the same memory; nothing here writes to it."""
    if isinstance(array, torch.Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)


# handles


_handles: dict[tuple[int, ...], tuple[_C.Delta, list[weakref.ref[T]]]] = {}


def handle_of(sign: T, row: T, column: T | None, shape: tuple[int, int]) -> _C.Delta:
    """The kernels' view of one delta, kept while its tensors live.

    A handle holds its memory, so what is found under an address is a view of what is there now.
    """
    row, column = row.contiguous(), None if column is None else column.contiguous()
    key = (sign.data_ptr(), row.data_ptr(), 0 if column is None else column.data_ptr(), *shape, sign.shape[0])
    found = _handles.get(key)
    if found is not None and row.dtype is torch.float32:
        return found[0]
    made = new_handle(sign, row, column, shape)
    if key[0] and key[1]:
        drop = _forgetter(key)
        parts = [part for part in (sign, row, column) if part is not None]
        _handles[key] = made, [weakref.ref(part, drop) for part in parts]
    return made


def new_handle(sign: T, row: T, column: T | None, shape: tuple[int, int]) -> _C.Delta:
    column = None if column is None else column.detach()
    return _C.Delta(sign.detach().view(torch.uint32), row.detach(), column, shape)


def _forgetter(key: tuple[int, ...]) -> Callable[[Any], None]:
    def drop(_: Any) -> None:
        _handles.pop(key, None)

    return drop
