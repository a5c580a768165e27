"""Arrays of fp32, fp16 and bf16 of any kind: NumPy, ml_dtypes, torch, and bf16 bits in plain NumPy.

bf16 is the upper half of fp32. NumPy has no such dtype, so `BFloat16Array` names an array of uint16 bits; it
moves (slices, copies, concatenates) and refuses to compute. Rounding is to nearest, ties to even, everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Tensor: TypeAlias = Any  # np.ndarray, torch.Tensor, or anything that speaks DLPack or the buffer protocol

NAMES = ("float32", "float16", "bfloat16")

# what only moves elements; everything else would compute with the bits
_MOVES = {
    np.array_split, np.broadcast_to, np.concatenate, np.copy, np.copyto, np.expand_dims, np.hstack, np.moveaxis,
    np.ndim, np.ravel, np.repeat, np.reshape, np.roll, np.shape, np.shares_memory, np.may_share_memory, np.size,
    np.split, np.squeeze, np.stack, np.swapaxes, np.take, np.tile, np.transpose, np.vstack, np.empty_like,
    np.zeros_like, np.flip,
}  # fmt: skip


class BFloat16Array(np.ndarray[Any, np.dtype[np.uint16]]):
    """uint16 bits that mean bf16. Single elements come out as their float; `bits` is the plain uint16 array.

    `np.asarray` strips the meaning and returns the bits, as for every subclass of ndarray: use `to_float32`.
    """

    __bitdelta_dtype__ = "bfloat16"  # what the extension looks for

    @property
    def bits(self) -> NDArray[np.uint16]:
        return super().view(np.ndarray)

    def view(self, *args: Any, **kwargs: Any) -> Any:
        """Like ndarray's, but a view of another dtype or of the bits (`view(np.uint16)`) is a plain array."""
        if not args and not kwargs:
            return super().view()
        return self.bits.view(*args, **kwargs)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """The values, by way of fp32."""
        if isinstance(dtype, type) and issubclass(dtype, BFloat16Array):
            raise TypeError("astype: BFloat16Array is no dtype; bitdelta.array.from_float32 rounds to it")
        return to_float32(self).astype(dtype, *args, **kwargs)

    def tolist(self) -> Any:
        return to_float32(self).tolist()

    def item(self, *args: Any) -> Any:
        return to_float32(self).item(*args)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(found, np.uint16):
            return to_float32(np.full((), found, np.uint16).view(BFloat16Array))[()]
        return found

    def __repr__(self) -> str:
        return f"BFloat16Array({np.array2string(to_float32(self), separator=', ', prefix='BFloat16Array(')})"

    def __str__(self) -> str:
        return str(to_float32(self))

    def __array_ufunc__(self, ufunc: Any, method: Any, *inputs: Any, **kwargs: Any) -> NoReturn:
        _refuse(ufunc.__name__)

    def __array_function__(self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        if func not in _MOVES:
            _refuse(func.__name__)
        moved = super().__array_function__(func, types, args, kwargs)
        if isinstance(moved, np.ndarray) and moved.dtype != np.uint16:
            _refuse(f"{func.__name__} with {moved.dtype}")
        return moved.view(BFloat16Array) if isinstance(moved, np.ndarray) else moved

    def _no_arithmetic(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("this method")

    argmax = argmin = argpartition = argsort = clip = cumprod = cumsum = dot = max = mean = min = (
        _no_arithmetic
    )
    partition = prod = round = searchsorted = sort = std = sum = trace = var = _no_arithmetic


def _refuse(what: str) -> NoReturn:
    raise TypeError(f"{what}: NumPy cannot compute in bf16; take bitdelta.array.to_float32(a), or a.bits")


def as_bfloat16(uint16_array: NDArray[np.uint16]) -> BFloat16Array:
    """Says that the bits of a uint16 array are bf16. Nothing is copied.

    Args:
        uint16_array: NumPy uint16 of any shape.

    Returns:
        A view of the same memory that every function of this package takes as bf16.

    Raises:
        TypeError: not a NumPy array of uint16.

    >>> import bitdelta, numpy as np
    >>> bitdelta.as_bfloat16(np.array([0x3F80, 0xC000], np.uint16))
    BFloat16Array([ 1., -2.])
    """
    if not isinstance(uint16_array, np.ndarray) or uint16_array.dtype != np.uint16:
        got = getattr(uint16_array, "dtype", type(uint16_array).__name__)
        raise TypeError(f"uint16_array: expected a NumPy array of uint16, got {got}")
    view: BFloat16Array = uint16_array.view(BFloat16Array)
    return view


def dtype_name(array: Tensor, name: str = "array") -> str:
    """ "float32", "float16" or "bfloat16", whatever the array's kind; else TypeError."""
    found = getattr(array, "__bitdelta_dtype__", None)
    if found is None:
        dtype = getattr(array, "dtype", None)
        if dtype is None:
            raise TypeError(
                f"{name}: expected a tensor of float32, float16 or bfloat16, got {type(array).__name__}"
            )
        found = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]  # torch: "torch.bfloat16"
    if found not in NAMES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {found}")
    return str(found)


def flat_bytes(array: np.ndarray) -> NDArray[np.uint8]:
    """An array's bytes, in C order; a view where they lie so."""
    return np.ascontiguousarray(array).view(np.ndarray).reshape(-1).view(np.uint8)


def to_float32(array: Tensor) -> NDArray[np.float32]:
    """The values as NumPy fp32, exactly; fp32 itself is not copied.

    Args:
        array: fp32, fp16 or bf16 of any shape and kind (NumPy, ml_dtypes, BFloat16Array, torch on the CPU, or a
            matrix that speaks DLPack).

    >>> to_float32(as_bfloat16(np.array([0x4049], np.uint16)))
    array([3.140625], dtype=float32)
    """
    name = dtype_name(array)
    if is_torch(array):
        torch = sys.modules["torch"]
        values: NDArray[np.float32] = array.detach().to(torch.float32).cpu().numpy()
        return values
    if not isinstance(array, np.ndarray):
        from . import _C

        out = np.empty(tuple(array.shape), np.float32)
        _C.to_float32(out, array)
        return out
    if name == "bfloat16":
        bits = array.view(np.uint16)
        return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    return array.astype(np.float32, copy=False)


def from_float32(values: NDArray[np.float32], name: str) -> NDArray[Any]:
    """fp32 rounded to "float32" (the array itself), "float16", or "bfloat16" (a BFloat16Array).

    Ties go to even; what is beyond the largest finite number becomes infinite; NaN stays NaN.

    >>> from_float32(np.array([1.00390625, 1.01171875], np.float32), "bfloat16")
    BFloat16Array([1.      , 1.015625])
    """
    values = np.asarray(values, np.float32)
    if name == "float32":
        return values
    if name == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16)
    if name != "bfloat16":
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {name}")
    word = values.view(np.uint32) if values.ndim else values.reshape(1).view(np.uint32).reshape(())
    rounded = (word + np.uint32(0x7FFF) + ((word >> 16) & 1)) >> 16  # wraps for NaN only, replaced below
    quiet = (word >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).view(BFloat16Array)


def is_torch(array: Tensor) -> bool:
    """Whether this is a torch.Tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, getattr(torch, "Tensor", ()))


def aligned_empty(shape: Sequence[int], dtype: DTypeLike, alignment: int = 64) -> NDArray[Any]:
    """Like np.empty, the first element at a multiple of `alignment` bytes (64: one line of signs)."""
    kind = np.dtype(dtype)
    n_bytes = kind.itemsize * int(np.prod(shape, dtype=np.int64))
    raw = np.empty(n_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start:][:n_bytes].view(kind).reshape(shape)


def aligned_copy(array: NDArray[Any]) -> NDArray[Any]:
    """The same elements, C-contiguous, as `aligned_empty` places them."""
    out = aligned_empty(array.shape, array.dtype)
    out[...] = array
    return out


def empty_like(array: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised array of the same kind and dtype and of this shape.

    torch for torch, a BFloat16Array for one, NumPy for the rest (ml_dtypes' dtypes included).
    """
    if isinstance(array, np.ndarray):
        made = np.empty(shape, array.dtype)
        return made.view(BFloat16Array) if isinstance(array, BFloat16Array) else made
    if is_torch(array):
        return sys.modules["torch"].empty(shape, dtype=array.dtype)
    name = dtype_name(array)
    if name == "bfloat16":
        return np.empty(shape, np.uint16).view(BFloat16Array)
    return np.empty(shape, name)
