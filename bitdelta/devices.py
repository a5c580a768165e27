"""The option `device`: where PyTorch works, checked in one place for every command and function that has it."""

from __future__ import annotations

import os
from typing import Any

from . import _C
from .errors import DeviceError


def torch_device(device: Any = None) -> Any:
    """The torch.device that an option names.

    Args:
        device: a name as PyTorch has it ("cpu", "cuda", "cuda:1") or a torch.device; None: the CPU. Of the processes
            that torchrun starts, each one's "cuda" is a GPU of its own.

    Raises:
        ValueError: not the name of a device.
        bitdelta.DeviceError: a GPU that is not there, or that this build cannot use.
    """
    import torch

    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a name such as 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type != "cuda":
        return found
    missing = _C.cuda_missing()
    if missing is not None or not torch.cuda.is_available():
        raise DeviceError(f"device {device}: {missing or 'PyTorch finds no GPU'}")
    count = torch.cuda.device_count()
    index = int(os.environ.get("LOCAL_RANK", "0")) % count if found.index is None else found.index
    if index >= count:
        raise DeviceError(f"device {device}: there are {count} GPUs")
    return torch.device("cuda", index)
