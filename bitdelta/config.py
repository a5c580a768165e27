"""What this build and this machine can do: `show_config()` and `python -m bitdelta`, to paste into an issue."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from . import _C, threads

PACKAGES = ("numpy", "safetensors", "torch", "transformers", "huggingface_hub", "ml_dtypes")


def show_config() -> None:
    """Prints versions, compiler, instruction sets, threads and whether CUDA kernels are in this build.

    >>> import bitdelta
    >>> bitdelta.show_config()  # doctest: +ELLIPSIS
    bitdelta ...
    """
    print("\n".join(f"{name:<16} {value}" for name, value in describe().items()))


def describe() -> dict[str, str]:
    """The lines of `show_config`, by name. Nothing is imported for it: versions come from the metadata."""
    build = _C.build_info()
    lines = {"bitdelta": f"{_version('bitdelta')}, {Path(__file__).parent}"}
    lines["python"] = f"{sys.version.split()[0]}, {platform.platform()}"
    lines |= {name: _version(name) for name in PACKAGES}
    lines["cpu"] = _cpu()
    lines["compiler"] = f"{build['compiler']}: {build['flags']}"
    lines["sanitizers"] = "AddressSanitizer, UndefinedBehaviorSanitizer" if build["sanitize"] else "no"
    lines["isa"] = f"{_C.isa()} (here: {', '.join(_C.isas())}; {_variable('BITDELTA_ISA')})"
    try:
        lines["threads"] = f"{threads.get_num_threads()} (from {_source_of_threads()})"
    except ValueError as error:  # the environment asks for what cannot be
        lines["threads"] = str(error)
    missing = None if build["cuda"].startswith("not built") else _C.cuda_missing()
    lines["cuda"] = build["cuda"] + (f"; {missing}" if missing else "")
    return lines


def _version(name: str) -> str:
    from importlib import metadata  # slow to load, and nobody else needs it

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name == "bitdelta":
            from . import __version__

            return f"{__version__} (not installed)"
        return "not installed"


def _variable(name: str) -> str:
    value = os.environ.get(name)
    return f"{name}={value}" if value else f"{name} not set"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        model = ""
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


def _source_of_threads() -> str:
    chosen = threads._chosen
    if chosen is not None:
        from_environment = os.environ.get(threads.VARIABLE) == str(chosen)
        return f"{threads.VARIABLE}={chosen}" if from_environment else "set_num_threads"
    if "torch" in sys.modules:
        return "torch.get_num_threads()"
    quota = threads.cgroup_quota()
    return (
        f"the affinity mask, {'no cgroup quota' if quota is None else f'at most the cgroup quota {quota:g}'}"
    )
