"""Memory on a GPU, or of a build that emulates one: which tensors are there, and new ones beside them."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from . import _C
from .array import Tensor, aligned_empty, dtype_name, empty_like, is_torch
from .errors import DeviceError

EMULATED = _C.cuda_is_emulated()


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether the functions here are those to call for this tensor."""
    if EMULATED:
        return os.environ.get("BITDELTA_DEVICE") == "emulated"
    return bool(getattr(tensor, "is_cuda", False)) and is_torch(tensor)


def empty_as(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, of like's kind, dtype and device."""
    return empty(like, shape, dtype_name(like))


def on_gpu_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the host, from pinned memory: nothing waits."""
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor


def refuse_capture(expected: str) -> None:
    """What is brought to the GPU in a captured graph would be read again, from wherever it was, at every replay."""
    torch = sys.modules.get("torch")
    if torch is not None and not EMULATED and torch.cuda.is_current_stream_capturing():
        raise DeviceError(f"{expected} while a stream is captured: run once before capturing")


def require() -> None:
    missing = _C.cuda_missing()
    if missing is not None:
        raise DeviceError(missing)


def empty(like: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if dtype == "bfloat16":
        return empty_like(like, shape)
    return aligned_empty(shape, dtype)


def scratch(like: Tensor, n_bytes: int) -> Tensor:
    """uint8 [n_bytes], aligned to 256 bytes."""
    if not is_torch(like):
        return aligned_empty((n_bytes,), np.uint8, 256)
    torch = sys.modules["torch"]
    memory = torch.empty(n_bytes + (0 if like.is_cuda else 256), dtype=torch.uint8, device=like.device)
    start = -memory.data_ptr() % 256
    return memory[start : start + n_bytes]


def to_host(tensor: Tensor) -> Any:
    if not is_torch(tensor):
        return np.ascontiguousarray(tensor)
    torch = sys.modules["torch"]
    if tensor.dtype == torch.uint32:
        return tensor.view(torch.int32).cpu().numpy().view(np.uint32)
    return tensor.cpu().numpy()
