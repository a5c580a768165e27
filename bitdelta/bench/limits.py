"""What this machine allows: how fast it reads memory, multiplies dense matrices, and reads and writes its disk."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..threads import set_num_threads
from . import machine
from .data import FULL, QUICK
from .timing import seconds_of

PEAK = 2048  # rows and columns of the dense product
DISK = 1 << 28  # bytes written and read
BLOCK = 1 << 23
SAMPLES = 16  # pages looked at before a file counts as gone from the page cache, the last one first:
READ_AHEAD = 1 << 21  # a look may fetch as many bytes behind it


def of_threads(threads: int, quick: bool) -> dict[str, Any]:
    """`threads`, `bandwidth` (bytes read a second) and `flops` (fp32 operations a second of NumPy's product)."""
    set_num_threads(threads)
    # written, or all pages would be the same page of zeros and lie in a cache
    buffer = np.full((QUICK if quick else FULL) // 8, 1, np.uint64)
    size = 128 if quick else PEAK
    a, b = np.full((size, size), 0.5, np.float32), np.full((size, size), 0.25, np.float32)
    seconds = statistics.median(seconds_of(lambda: a @ b) for _ in range(5))
    bandwidth = machine.read_bandwidth(buffer, 3 if quick else 9)
    return {"threads": threads, "bandwidth": bandwidth, "flops": 2 * size**3 / seconds}


def of_disk(folder: Path, quick: bool) -> dict[str, float | None]:
    """Bytes a second of a new file in `folder`: `write` until it is on the disk, `read` from there (None: unknown).

    It is unknown where the page cache keeps the file, as that of a tmpfs does.
    """
    block, count = os.urandom(BLOCK), 1 if quick else DISK // BLOCK
    path = folder / "disk"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
    write = count * BLOCK / (time.perf_counter() - start)
    read = None
    if evict(path):
        read = count * BLOCK / seconds_of(lambda: _read(path))
    path.unlink()
    return {"write": write, "read": read}


def evict(path: Path) -> bool:
    """Takes a file that is on the disk out of the page cache; False where it stays, or one cannot know."""
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return False
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = path.stat().st_size
        count = max(1, min(SAMPLES, size // READ_AHEAD))
        for offset in (size * i // count for i in reversed(range(count))):
            try:
                os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:  # the file system does not tell
                return False
            return False
    return True


def lines(limits: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each number of threads, and one for the disk."""
    for limit in limits:
        if "threads" in limit:
            name = "1 thread" if limit["threads"] == 1 else f"{limit['threads']} threads"
            yield (
                f"limits, {name}: reads {limit['bandwidth'] / 1e9:.1f} GB/s, "
                f"{limit['flops'] / 1e9:.0f} GFLOP/s in fp32"
            )
        else:
            read = "not known" if limit["read"] is None else f"{limit['read'] / 1e9:.2f} GB/s"
            yield f"limits, disk: writes {limit['write'] / 1e9:.2f} GB/s, reads {read}"


def _read(path: Path) -> None:
    block = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def main() -> None:
    print(json.dumps(of_threads(int(sys.argv[1]), "--quick" in sys.argv)))
