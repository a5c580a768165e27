"""How kernels/ is compiled: targets, nvcc, and the host compiler of the emulation. For setup.py and the tests."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
ROOT = KERNELS.parent

# The targets, and the tensor core path of the delta products on each: b1 where it is native (compute capability 8.0
# to 9.0), int8 elsewhere, where ptxas would spell b1 out in some hundred instructions. bd_gpu_has_b1 and BD_HAS_B1
# of gpu.h say the same to C and to the kernels. "a" and "f" targets run on their own kind alone.
TARGETS = {"80": "b1", "86": "b1", "89": "b1", "90": "b1", "90a": "b1", "100f": "int8", "120f": "int8"}
DEFAULT = ("80", "90a", "90+PTX")  # where no GPU is visible; PTX is for what comes after
ALL = ("80", "86", "89", "90a", "100f", "120f", "90+PTX")
# What a visible GPU of a compute capability gets.
OF_CAPABILITY = {
    "8.0": "80",
    "8.6": "86",
    "8.9": "89",
    "9.0": "90a",
    "10.0": "100f",
    "10.3": "100f",
    "12.0": "120f",
}

HOST_FLAGS = ["-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{KERNELS}"]
# As the definitions: every product and sum rounded, so no contraction.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", *INCLUDES]

EMULATION_FLAGS = ["-std=c++17", "-DBD_EMULATE", "-O2", "-ffp-contract=off", *INCLUDES]
EMULATION_FLAGS += ["-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion"]
# The calls that emulation_memory.cpp answers; in kernels alone.
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"
if platform.machine() in ("x86_64", "AMD64"):
    EMULATION_FLAGS.append("-march=x86-64-v2")  # popcnt
WATCH_FLAGS = ["-x", "c++", "-fsanitize=thread", f"-fsanitize={UNDEFINED}"]
WATCH_FLAGS += ["-fno-tree-vectorize", "-fno-tree-slp-vectorize"]


class ToolError(Exception):
    """What is missing for a build with kernels, or what a compiler refused."""


class SettingError(ToolError):
    """A wish that was spoken and cannot be followed, so that a build without kernels is no answer."""


def kernel_sources() -> list[str]:
    """The .cu files, the longest first, as those that are compiled side by side should start."""
    paths = sorted(KERNELS.glob("*.cu"), key=lambda path: -path.stat().st_size)
    return [str(path.relative_to(ROOT)) for path in paths]


def emulation_sources() -> list[str]:
    """What runs kernels on the host."""
    return sorted(str(path.relative_to(ROOT)) for path in KERNELS.glob("emulation*.cpp"))


def warnings_are_errors() -> bool:
    return "-Werror" in shlex.split(os.environ.get("CFLAGS", ""))


def ccache() -> list[str]:
    """Kernels take long to compile: what was compiled before is taken from ccache, where it is installed."""
    found = shutil.which("ccache")
    return [found] if found else []


# ---- the host ----


def cxx() -> list[str]:
    """The host C++ compiler: $CXX, or Python's own."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def emulation_command(compiler: list[str], source: str | Path, output: str | Path) -> list[str]:
    """Compiles a kernel, or a file of the emulation, for the host."""
    watch = WATCH_FLAGS if str(source).endswith(".cu") else []
    strict = ["-Werror"] * warnings_are_errors()
    return [
        *ccache(),
        *compiler,
        *EMULATION_FLAGS,
        *HOST_FLAGS,
        *strict,
        *watch,
        "-c",
        str(source),
        "-o",
        str(output),
    ]


# ---- nvcc ----


def find_nvcc() -> str:
    """The path of nvcc, or ToolError that says where it was looked for."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [
        os.environ.get("CUDACXX"),
        f"{home}/bin/nvcc" if home else None,
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    for place in places:
        found = shutil.which(place) if place else None
        if found:
            return found
    raise ToolError("nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")


def nvcc_version(nvcc: str) -> tuple[int, int]:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", said)
    if not match:
        raise ToolError(f"{nvcc} --version says no release")
    version = int(match[1]), int(match[2])
    if version < (12, 0):
        raise ToolError(f"nvcc is {version[0]}.{version[1]}; kernels need 12.0")
    return version


def cudart(nvcc: str) -> str:
    """The static CUDA runtime that belongs to nvcc, which may be a script somewhere else."""
    said = subprocess.run(
        [nvcc, "-dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False
    ).stderr
    match = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    top = Path(match[1] if match else nvcc + "/../..").resolve()
    for folder in (
        "lib64",
        "lib",
        *(f"targets/{target}-linux/lib" for target in ("x86_64", "sbsa", "aarch64")),
    ):
        library = top / folder / "libcudart_static.a"
        if library.is_file():
            return str(library)
    raise ToolError(f"libcudart_static.a was not found below {top}")


def visible_archs() -> tuple[str, ...]:
    """The targets of the GPUs that nvidia-smi shows; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if done.returncode != 0:
        return ()
    return tuple(sorted({OF_CAPABILITY[line] for line in done.stdout.split() if line in OF_CAPABILITY}))


def wanted_archs(version: tuple[int, int]) -> tuple[str, ...]:
    """BITDELTA_CUDA_ARCHS ("all", or names as in ALL with commas or spaces), else the visible GPUs', else DEFAULT."""
    asked = os.environ.get("BITDELTA_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    archs = tuple(ALL if asked == ["all"] else asked) or visible_archs() or DEFAULT
    for arch in archs:
        if arch.removesuffix("+PTX") not in TARGETS:
            known = ", ".join(["all", *TARGETS])
            raise SettingError(
                f"BITDELTA_CUDA_ARCHS: expected {known}, or one of them with +PTX, got {arch!r}"
            )
        if arch.startswith(("100f", "120f")) and version < (12, 9):
            error, who = (SettingError, "BITDELTA_CUDA_ARCHS") if asked else (ToolError, "the visible GPU")
            raise error(f"{who}: {arch} needs nvcc 12.9, this is {version[0]}.{version[1]}")
    return archs


def nvcc_command(
    nvcc: str, archs: tuple[str, ...], source: str | Path, output: str | Path, visibility: str = "hidden"
) -> list[str]:
    """Compiles a kernel file for the targets."""
    flags = list(NVCC_FLAGS)
    for arch in archs:
        name = arch.removesuffix("+PTX")
        kind = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{name},code={kind}_{name}")
    strict = ["-Werror=all-warnings"] * warnings_are_errors()
    host = ",".join([*HOST_FLAGS, f"-fvisibility={visibility}", "-Wall", "-Wextra"])
    return [*ccache(), nvcc, *flags, *strict, "-Xcompiler", host, "-c", str(source), "-o", str(output)]
