"""What the figures were measured on: processor, threads, versions, and how fast memory is read."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import _C
from ..threads import get_num_threads


def describe() -> dict[str, Any]:
    """Everything but the bandwidth, which each thread count measures for itself."""
    import bitdelta

    facts = _cpuinfo()
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "vendor": facts.get("vendor_id", ""),
        "family": int(facts.get("cpu family", 0)),
        "model": int(facts.get("model", 0)),
        "caches": _caches(),
        "cores": cores(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "isa": _C.isa(),
        "isas": list(_C.isas()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": _torch_version(),
        "compiler": str(_C.build_info().get("compiler", "")),
        "bitdelta": bitdelta.__version__,
    }


def lines(facts: dict[str, Any]) -> Iterator[str]:
    cores = f"{facts['cores']} core{'s' * (facts['cores'] != 1)}"
    yield (
        f"{facts['cpu']} (family {facts['family']}, model {facts['model']}), {cores}, "
        f"caches {facts['caches']}, {facts['memory_gb']} GB of memory"
    )
    yield f"instruction sets: {', '.join(facts['isas'])}; used: {facts['isa']}"
    yield (
        f"bitdelta {facts['bitdelta']} ({facts['compiler']}), Python {facts['python']}, "
        f"NumPy {facts['numpy']}, torch {facts['torch'] or 'not installed'}, {facts['system']}"
    )


def cores() -> int:
    """Threads that this process may use at once, as the library counts them."""
    return get_num_threads()


def is_zen5(facts: dict[str, Any]) -> bool:
    return bool(facts["vendor"] == "AuthenticAMD" and facts["family"] == 26)


def read_bandwidth(buffer: np.ndarray[Any, Any], repeats: int) -> float:
    """Bytes per second of reading the buffer with the library's threads; the median."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        _C.read(buffer)
        seconds.append(time.perf_counter() - start)
    return float(buffer.nbytes / statistics.median(seconds))


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines; empty where the system has no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches() -> str:
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (folder / "type").read_text().strip()
        if kind != "Instruction":
            found.append(f"L{(folder / 'level').read_text().strip()} {(folder / 'size').read_text().strip()}")
    return ", ".join(found) or "unknown"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _torch_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    if "torch" in sys.modules and sys.modules["torch"] is None:
        return None
    try:
        return version("torch")
    except PackageNotFoundError:
        return None
