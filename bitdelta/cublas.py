"""Where cuBLAS is looked for, which makes the base product of GPU tensors (`cuda.multiply`).

The first of these that opens is used as long as the process lives. Nothing links against it.

    1  BITDELTA_CUBLAS, a file or a name for the loader: nothing else is then tried
    2  libcublas.so.13, or .12, that the process has loaded, as by PyTorch
    3  the pip packages nvidia-cublas (nvidia/cu13/lib) and nvidia-cublas-cu12 (nvidia/cublas/lib), along sys.path
    4  libcublas.so.13, or .12, where the loader looks: LD_LIBRARY_PATH, ldconfig
    5  lib64 and lib of CUDA_PATH, of CUDA_HOME, and of /usr/local/cuda

With emulated kernels only the first counts: another cuBLAS would want a GPU's memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from . import _C
from .errors import DeviceError

VARIABLE = "BITDELTA_CUBLAS"
NAMES = ("libcublas.so.13", "libcublas.so.12")
PACKAGES = ("nvidia/cu13/lib", "nvidia/cublas/lib")

_is_open = False


def candidates() -> Iterator[tuple[str, bool]]:
    """Names of libraries in their order, and whether to look among those loaded only."""
    own = os.environ.get(VARIABLE)
    if own:
        yield own, False
    if own or _C.cuda_is_emulated():
        return
    for name in NAMES:
        yield name, True
    folders = [Path(place, package) for place in sys.path for package in PACKAGES]
    yield from _files(folders)
    for name in NAMES:
        yield name, False
    homes = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    yield from _files([Path(home, lib) for home in homes if home for lib in ("lib64", "lib")])


def _files(folders: list[Path]) -> Iterator[tuple[str, bool]]:
    for folder in folders:
        for name in NAMES:
            if (folder / name).is_file():
                yield str(folder / name), False


def open_first() -> None:
    """Opens cuBLAS where none is open yet.

    Raises:
        DeviceError: none was found; the text says where it was looked for and what each place lacks.
    """
    global _is_open
    if _is_open:
        return
    tried = []
    for name, is_loaded in candidates():
        wrong = _C.cuda_open_blas(name, is_loaded)
        if wrong is None:
            _is_open = True
            return
        tried.append(f"{name}: {wrong}")
    if _C.cuda_is_emulated() and not tried:
        raise DeviceError(f"no cuBLAS: emulated kernels multiply by the library that {VARIABLE} names")
    raise DeviceError(
        "no cuBLAS that can be used was found among the loaded libraries, the pip packages nvidia-cublas, where the"
        f" loader looks and in CUDA_PATH; {VARIABLE} may name one. " + "; ".join(tried)
    )
