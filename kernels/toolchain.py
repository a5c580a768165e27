"""How kernels/ is compiled: the targets, nvcc, and the host compiler of the emulation. For setup.py and the tests."""

from __future__ import annotations

from pathlib import Path

KERNELS = Path(__file__).resolve().parent
ROOT = KERNELS.parent

# Every target that kernels are checked for, and the tensor core path of the delta products there: b1 where it is
# native (compute capability 8.0 to 9.0), int8 elsewhere, where ptxas would spell b1 out in some hundred instructions.
# csrc and the kernels take the same from bd_gpu_has_b1 and BD_HAS_B1 of gpu.h.
TARGETS = {"80": "b1", "86": "b1", "89": "b1", "90": "b1", "90a": "b1", "100f": "int8", "120f": "int8"}
DEFAULT_ARCHS = ("80", "90a")
ALL_ARCHS = ("80", "86", "89", "90", "90a", "100f", "120f")

EMULATION_FLAGS = [
    "-std=c++17", "-DBD_EMULATE", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
    "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion",
]  # fmt: skip
# The calls that emulation_memory.cpp answers; for kernels alone.
WATCH_FLAGS = [
    "-x", "c++", "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow",
    "-fno-tree-vectorize", "-fno-tree-slp-vectorize",
]  # fmt: skip


def kernel_sources() -> list[str]:
    """The .cu files."""
    return sorted(str(path.relative_to(ROOT)) for path in KERNELS.glob("*.cu"))


def emulation_sources() -> list[str]:
    """What runs kernels on the host."""
    return sorted(str(path.relative_to(ROOT)) for path in KERNELS.glob("emulation*.cpp"))


def emulation_command(compiler: list[str], source: str | Path, output: str | Path) -> list[str]:
    """Compiles a kernel file, or a file of the emulation, for the host."""
    watch = WATCH_FLAGS if str(source).endswith(".cu") else []
    includes = [f"-I{ROOT / 'csrc'}", f"-I{KERNELS}"]
    return [*compiler, *EMULATION_FLAGS, *includes, *watch, "-c", str(source), "-o", str(output)]
