"""A packfile's load and hot-swap, and compress, against merely reading the same maps, on checkpoints made here.

The pair is made in a temporary folder (4 GB in all, removed afterwards) and lies in the page cache. Reading
and compress run in turn, each in a new process, so that both touch every page for the first time. A hot-swap opens
a delta and reads all its signs and scales, as the first batch of a tenant does: from the page cache, and from the disk.
The delta is verified afterwards, its checksums, base and error.

    python -m bitdelta.bench.files BASE FINETUNED     # what reading costs: seconds, one JSON number
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import _C
from ..array import flat_bytes
from ..errors import Error
from ..threads import sync
from . import limits

LAYERS, WIDTH, INNER, VOCABULARY = 4, 4096, 11008, 32000  # 2.1 GB in bf16
QUICK = (1, 256, 512, 512)
REPEATS = 5
SWAPS = 5
SAMPLE_SECONDS = 0.002  # between two looks at the memory of compress


def measure(
    quick: bool, memory: dict[str, Any], log: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The disk's limits, and rows of kind load, swap, swap cold, memory, maps and compress.

    Args:
        quick: small checkpoints.
        memory: the memory's limits (limits.of_threads).
        log: called with one line at a time.

    Raises:
        bitdelta.Error: the delta that was written is not good.
    """
    sizes = QUICK if quick else (LAYERS, WIDTH, INNER, VOCABULARY)
    with tempfile.TemporaryDirectory(prefix="bitdelta-bench-") as folder:
        root = Path(folder)
        disk = limits.of_disk(root, quick)
        log(next(limits.lines([disk])))
        log("making two checkpoints" + ("" if quick else " of 2.1 GB each") + f" in {root}")
        shapes = dict(_shapes(*sizes))
        n_bytes, largest = write_pair(root, shapes)
        log(f"compressing {n_bytes / 1e9:.1f} GB, and reading it, {1 if quick else REPEATS} times in turn")
        runs = []
        for _ in range(1 if quick else REPEATS):
            reading = _reading_seconds(root)
            runs.append((reading, *_compress(root)))
        load = _load(root / "delta") + _swaps(root / "delta", memory["bandwidth"], disk["read"])
        _verify(root, log)
    reading, whole = (statistics.median(run[i] for run in runs) for i in (0, 1))
    peaks = [run[2] for run in runs if run[2]]
    rows = [
        {**_row("maps", reading, n_bytes), "share": n_bytes / reading / memory["bandwidth"]},
        # of the same pair of neighbouring runs, so that a slow minute meets both
        {**_row("compress", whole, n_bytes), "share": statistics.median(run[0] / run[1] for run in runs)},
    ]
    if peaks:
        rows.append({"kind": "memory", "peak_bytes": max(peaks), "times": max(peaks) / largest})
    return disk, rows + load


def _row(kind: str, seconds: float, n_bytes: int) -> dict[str, Any]:
    return {"kind": kind, "microseconds": seconds * 1e6, "bytes_per_second": n_bytes / seconds}


def _shapes(layers: int, width: int, inner: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (width, width)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", (inner, width)
        yield f"{prefix}.mlp.down_proj.weight", (width, inner)
        yield f"{prefix}.input_layernorm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def write_pair(root: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Two bf16 checkpoints, `base` and `finetuned`, in `root`; bytes of both, and of the largest tensor."""
    rng = np.random.default_rng(0)
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    files = []
    for folder in ("base", "finetuned"):
        (root / folder).mkdir()
        (root / folder / "config.json").write_text('{"model_type": "llama"}')
        file = (root / folder / "model.safetensors").open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        files.append(file)
    for entry in header.values():
        _write_tensor(rng, (entry["data_offsets"][1] - entry["data_offsets"][0]) // 2, files)
    for file in files:
        file.flush()
        os.fsync(file.fileno())  # or the kernel writes them back while compress is timed
        file.close()
    largest = max(end - begin for begin, end in (entry["data_offsets"] for entry in header.values()))
    return 2 * offset, largest


def _write_tensor(rng: Any, n_elements: int, files: list[Any], step: int = 1 << 22) -> None:
    """bf16 of size 2^-7 .. 2^-4; the fine-tune differs in the lower bits."""
    for begin in range(0, n_elements, step):
        count = min(step, n_elements - begin)
        bits = rng.integers(0, 1 << 16, count, np.uint16) & 0x81FF | 0x3C00
        change = rng.integers(0, 8, count, np.uint16)
        files[0].write(bits.astype("<u2").tobytes())
        files[1].write((bits ^ change).astype("<u2").tobytes())


def _reading_seconds(root: Path) -> float:
    command = [sys.executable, "-m", "bitdelta.bench.files", str(root / "base"), str(root / "finetuned")]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def read_maps(*folders: str) -> float:
    """Seconds of mapping every file and reading every byte, with the library's threads."""
    sync()
    start = time.perf_counter()
    for folder in folders:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                _C.read(view)
    return time.perf_counter() - start


def _compress(root: Path) -> tuple[float, int]:
    """Runs the command: its seconds, start and exit included, and its peak of anonymous bytes (0: unknown)."""
    out = root / "delta"
    if out.exists():
        shutil.rmtree(out)
    program = "import sys; from bitdelta.cli import main; sys.exit(main())"
    arguments = ["compress", str(root / "base"), str(root / "finetuned"), "--out", str(out), "--json"]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise Error(f"compress failed: {errors.strip()}")
    return seconds, peak


def _anonymous_bytes(pid: int) -> int:
    """Resident memory that is not of files: those pages are the page cache's."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _load(folder: Path) -> list[dict[str, Any]]:
    """Opens every delta; a byte of sign planes or scales outside the maps of the packfile is a copied one."""
    if not Path("/proc/self/maps").exists():
        return []
    start = time.perf_counter()
    arrays = _arrays(folder)
    seconds = time.perf_counter() - start
    maps = list(_maps_of(folder))
    copied = sum(array.nbytes for array in arrays if not _lies_in(array, maps))
    return [{"kind": "load", "microseconds": seconds * 1e6, "bytes": copied}]


def _arrays(folder: Path) -> list[Any]:
    """Every array of a packfile, memory-mapped."""
    from ..delta import Delta
    from ..packfile import load

    packfile = load(str(folder))
    arrays = []
    for value in (packfile[name] for name in packfile):
        parts = (value.sign, value.scale, value.column) if isinstance(value, Delta) else (value,)
        arrays += [part for part in parts if isinstance(part, np.ndarray)]
    return arrays


def _swaps(folder: Path, memory: float, disk: float | None) -> list[dict[str, Any]]:
    """Opening a delta and reading it: from the page cache, and from the disk where that can be had."""
    _swap(folder)  # into the page cache
    warm = [_swap(folder) for _ in range(SWAPS)]
    found = [("swap", warm, memory)]
    files = sorted(folder.glob("*.safetensors"))
    cold = []
    for _ in range(SWAPS if disk is not None else 0):
        if all(map(limits.evict, files)):
            cold.append(_swap(folder))
    if disk is not None and cold:
        found.append(("swap cold", cold, disk))
    if len({fold for _, runs, _ in found for _, _, fold in runs}) != 1:
        raise Error("reading the same delta again gave other bytes")
    rows = []
    for kind, runs, limit in found:
        seconds, n_bytes = statistics.median(run[0] for run in runs), runs[0][1]
        row = _row(kind, seconds, n_bytes)
        rows.append({**row, "calls": len(runs), "share": row["bytes_per_second"] / limit})
    return rows


def _swap(folder: Path) -> tuple[float, int, int]:
    """Seconds, bytes, and the exclusive or of all words."""
    sync()
    start, n_bytes, fold = time.perf_counter(), 0, 0
    for array in _arrays(folder):
        n_bytes += array.nbytes
        fold ^= _C.read(flat_bytes(array))
    return time.perf_counter() - start, n_bytes, fold


def _verify(root: Path, log: Callable[[str], None]) -> None:
    from ..verify import verify

    report = verify(root / "delta", root / "base", root / "finetuned")
    if not report["ok"]:
        raise Error(f"the delta that compress wrote is not good: {'; '.join(report['reasons'])}")
    log(f"verified the delta: checksums, base, relative error {report['relative_error']:.3f}")


def _maps_of(folder: Path) -> Iterator[tuple[int, int]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder.resolve()) in line:
            begin, end = line.split()[0].split("-")
            yield int(begin, 16), int(end, 16)


def _lies_in(array: Any, maps: list[tuple[int, int]]) -> bool:
    address = array.ctypes.data
    return any(begin <= address and address + array.nbytes <= end for begin, end in maps)


if __name__ == "__main__":
    print(json.dumps(read_maps(*sys.argv[1:])))
