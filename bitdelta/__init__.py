"""bitdelta: one base model, a thousand fine-tunes, each stored as sign bits and a few scales.

The data's way through the package, one module a stage:

    checkpoint   base and fine-tuned folders, memory-mapped     open_checkpoint in bitdelta.checkpoint
    delta        finetuned - base -> sign planes and scales     extract, Delta
    packfile     one folder: safetensors + JSON                 compress, load, verify, merge, import_diff
    calibrate    signs and scales fitted to text                calibrate
    distill      scales trained to the fine-tune's logits       distill
    tenant       many fine-tunes in one model                   DeltaModel
    linear       base product + every row's own delta           linear, linear_add, linear_transposed; ops

Around them: `as_bfloat16` names bf16 in plain NumPy; `set_num_threads`, `get_num_threads`; `show_config` prints what
this build and machine can do; `plot` draws reports and deltas; `Error` and its children; `reference` is every numeric
function in plain NumPy.
The arithmetic is C, in `bitdelta._C`; `bitdelta --help` lists the commands.
"""

from __future__ import annotations

from typing import Any

try:
    from . import _C  # noqa: F401
except ImportError:
    from importlib.util import find_spec as _find_spec

    if _find_spec("bitdelta._C") is not None:
        raise
    raise ImportError(
        "bitdelta's extension is not built in this source tree; in the folder of setup.py type: pip install -e ."
    ) from None

from . import reference
from .array import as_bfloat16
from .calibrate import calibrate
from .compress import compress
from .config import show_config
from .delta import Delta, extract
from .distill import distill
from .errors import BaseMismatchError, DeviceError, Error, FormatError
from .import_diff import import_diff
from .linear import linear, linear_add, linear_transposed
from .merge import merge
from .packfile import load
from .threads import get_num_threads, set_num_threads
from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "BaseMismatchError",
    "Delta",
    "DeviceError",
    "Error",
    "FormatError",
    "as_bfloat16",
    "calibrate",
    "compress",
    "distill",
    "extract",
    "get_num_threads",
    "import_diff",
    "linear",
    "linear_add",
    "linear_transposed",
    "load",
    "merge",
    "reference",
    "set_num_threads",
    "show_config",
    "verify",
]

# Imported when first asked for: they need PyTorch or matplotlib.
_LAZY = {"DeltaModel": "bitdelta.model"}
_LAZY_MODULES = ("merged_model", "ops", "plot")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"bitdelta.{name}")
    raise AttributeError(f"module 'bitdelta' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
