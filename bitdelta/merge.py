"""Writes base + delta as a full checkpoint: the fine-tune's names, dtypes, config and tokenizer.

    round(base + sum over planes of scale * sign), one tensor at a time; whole and identical tensors are copied

The folder has model.safetensors, or shards and an index, and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .array import as_bfloat16, flat_bytes
from .checkpoint import Checkpoint, open_checkpoint
from .delta import Delta
from .errors import BaseMismatchError
from .folder import PendingFolder, full_disk, refuse_existing, refuse_full, refuse_inside, reserve, write_all
from .packfile import Packfile, load, spec_bytes
from .progress import progress_bar
from .tensor import DTYPES

MAX_SHARD_BYTES = 5 << 30  # what transformers shards by
ALIGNMENT = 64
BUFFERS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def merge(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    progress: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes the checkpoint that `delta` makes of `base`.

    Args:
        base: the base's checkpoint, a folder or Hub id.
        delta: the packed delta, a folder or Hub id.
        out_dir: the folder to write; it must not exist.
        progress: a progress bar on stderr.
        max_shard_bytes: larger checkpoints are split.
        dry_run: check everything that can refuse; write nothing.

    Returns:
        A dict that JSON can hold: tensors, bytes, shards, files; seconds, unless `dry_run`.

    Raises:
        bitdelta.BaseMismatchError: the delta was made from another base.
        bitdelta.FormatError: a folder that is not what it should be.
        FileExistsError, OSError: `out_dir` exists or cannot be written.
    """
    start = time.perf_counter()
    refuse_existing(Path(out_dir))
    packfile, source = load(delta), open_checkpoint(base)
    refuse_inside(out_dir, source.root, packfile.root)
    packfile.check_base(source)
    files = travelling_files(packfile, source)
    shards = _split(packfile, max_shard_bytes)
    total = sum(_nbytes(entry) for entry in packfile.entries.values())
    refuse_full(out_dir, total)
    report = {
        "out": str(out_dir),
        "tensors": len(packfile),
        "bytes": total,
        "shards": len(shards),
        "files": sorted(files),
    }
    if dry_run:
        return {"dry_run": True, **report}
    folder = PendingFolder(out_dir)
    try:
        folder.clear()
        _write(folder.path, packfile, source, shards, progress_bar("merge", total, progress))
        for name, path in files.items():
            (folder.path / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder.path / name)
        folder.publish()
    except OSError as error:
        raise full_disk(error, Path(out_dir)) from error
    finally:
        folder.discard()
    return {**report, "seconds": round(time.perf_counter() - start, 3)}


def _write(folder: Path, packfile: Packfile, base: Checkpoint, shards: list[list[str]], bar: Any) -> None:
    width = max((_nbytes(packfile.entries[name]) for name in packfile), default=0)
    buffer = np.empty(
        width, np.uint8
    )  # of every expanded tensor in turn; pages that are not used cost nothing
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    with bar:
        for file, shard in zip(names, shards, strict=True):
            with open(folder / file, "wb", buffering=0) as out:
                header = _header(packfile, shard)
                reserve(out.fileno(), len(header) + sum(_nbytes(packfile.entries[name]) for name in shard))
                write_all(out.fileno(), memoryview(header))
                for name in shard:
                    for data in tensor_bytes(packfile, base, name, buffer):
                        write_all(out.fileno(), data)
                    bar.update(_nbytes(packfile.entries[name]))
    if count > 1:
        total = sum(_nbytes(entry) for entry in packfile.entries.values())
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def tensor_bytes(packfile: Packfile, base: Checkpoint, name: str, buffer: np.ndarray) -> Iterator[memoryview]:
    """The bytes of one tensor of the fine-tune, piece by piece; each is valid until the next is asked for."""
    name = packfile.entries[name].get("tied_to", name)
    entry, value = packfile.entries[name], packfile[name]
    if value is None:
        yield memoryview(flat_bytes(base[name].array()))
        base[name].release()
    elif isinstance(value, np.ndarray):
        yield memoryview(flat_bytes(value))
    else:
        weight = base[name].array()
        if isinstance(value, Delta):
            yield _expand(value, weight[: value.shape[0]], entry["dtype"], buffer)
            rows = packfile.rows(name)
            if rows is not None:
                yield memoryview(flat_bytes(rows))
        else:
            for i, delta in enumerate(value):
                yield _expand(delta, weight[i], entry["dtype"], buffer)
        base[name].release()


def _expand(delta: Delta, weight: np.ndarray, dtype: str, buffer: np.ndarray) -> memoryview:
    kind = np.dtype(BUFFERS[dtype])
    n_bytes = delta.shape[0] * delta.shape[1] * kind.itemsize
    out = buffer[:n_bytes].view(kind).reshape(delta.shape)
    delta.expand(weight, out=as_bfloat16(out) if dtype == "BF16" else out)
    return memoryview(buffer[:n_bytes])


def _split(packfile: Packfile, most: int) -> list[list[str]]:
    """Names by shard, in order; within a shard by falling alignment, so that nothing is misaligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in packfile.entries.items():
        if shards[-1] and size + _nbytes(entry) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(entry)
    for shard in shards:
        shard.sort(key=lambda name: -DTYPES[packfile.entries[name]["dtype"]][0])
    return shards


def _header(packfile: Packfile, names: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        entry = packfile.entries[name]
        begin, end = end, end + _nbytes(entry)
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)


def _nbytes(entry: dict[str, Any]) -> int:
    """Bytes that the tensor has in the checkpoint; tied ones are written again."""
    return spec_bytes((entry["dtype"], tuple(entry["shape"])))


def travelling_files(packfile: Packfile, base: Checkpoint) -> dict[str, Path]:
    """The fine-tune's other files: those of the delta, and the base's where they are the same."""
    found = packfile.files()
    for name, about in packfile.config.get("files", {}).items():
        if about["from"] == "base":
            path = base.files.get(name)
            if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
                raise BaseMismatchError(f"{base.root / name} is not the file that the delta was made with")
            found[name] = path
    return found
