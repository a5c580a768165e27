"""Checks a packed delta against its own checksums, against its base and, if given, against the fine-tune.

the delta       SHA-256 of every tensor and file
the base        fingerprint (16 samples) and CRC-32C (every byte) of every tensor that the delta needs
the fine-tune   names, shapes, dtypes; whole and identical tensors byte by byte; the relative error of the others
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import _C
from .array import flat_bytes, to_float32
from .checkpoint import Checkpoint, open_checkpoint
from .delta import Delta
from .errors import FormatError
from .hub import resolve
from .packfile import CONFIG, PACKED, Packfile, keys_of, load
from .residual import Sums, relative, sample, squared_errors

SAME_ERROR = 0.01  # relative: the sample's error repeats to rounding, another fine-tune's differs


def verify(
    delta: str | os.PathLike[str],
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Reads everything and says what is wrong.

    Args:
        delta: the packed delta, a folder or Hub id.
        base: the checkpoint that it should belong to.
        finetuned: the fine-tune that it was made from.

    Returns:
        A dict that JSON can hold: `ok`, `reasons` (texts; empty when ok), `checked_bytes`, and with `finetuned`
        `relative_error` (over all tensors with signs), `largest_error` and `errors` per tensor.

    Raises:
        bitdelta.FormatError, bitdelta.Error, OSError: a folder that is no packed delta or no checkpoint at all.
    """
    start = time.perf_counter()
    reasons: list[str] = []
    report: dict[str, Any] = {"ok": False, "reasons": reasons, "delta": str(delta), "base": str(base)}
    source = open_checkpoint(base)
    target = None if finetuned is None else open_checkpoint(finetuned)
    try:
        packfile = load(delta)
    except FormatError as error:
        if not (resolve(delta).root / CONFIG).is_file():
            raise
        reasons.append(str(error))  # it claims to be one, and is damaged
        return report
    if target is not None and packfile.quantized and not source.origin.get("quantized"):
        raise ValueError(
            f"finetuned: {packfile.root} was taken from a base quantised by {packfile.quantized}; to measure "
            "its error, give as base the folder that bitdelta.quantized.dequantize writes"
        )
    checked = _check_delta(packfile, reasons) + _check_base(packfile, source, reasons)
    report |= {"tensors": len(packfile), "checked_bytes": checked}
    if target is not None and not reasons:
        report |= _check_finetuned(packfile, source, target, reasons)
    report |= {"ok": not reasons, "seconds": round(time.perf_counter() - start, 3)}
    return report


def _check_delta(packfile: Packfile, reasons: list[str]) -> int:
    checked = 0
    for name, entry in packfile.entries.items():
        keys = keys_of(name, entry)
        digest = hashlib.sha256()
        for key in keys:
            tensor = packfile.tensors[key]
            digest.update(flat_bytes(tensor.array()))
            checked += tensor.nbytes
            tensor.release()
        if keys and digest.hexdigest() != entry["sha256"]:
            reasons.append(f"{name}: its bytes in {packfile.root} do not have the SHA-256 of {CONFIG}")
    for name, path in packfile.files().items():
        if not path.is_file() or not _has_sha256(path, packfile.config["files"][name]["sha256"]):
            reasons.append(f"{path} is missing or has changed")
    return checked


def _check_base(packfile: Packfile, base: Checkpoint, reasons: list[str]) -> int:
    checked = 0
    if packfile.quantized and not base.origin.get("quantized"):
        if packfile.config["base"].get("fingerprint") != base.identity:
            reasons.append(
                f"{base.root} has other values than the base that was quantised for {packfile.root}"
            )
        return checked
    for name, entry in packfile.entries.items():
        if not packfile.has_base(name, base):
            which = "has other values" if name in base else "is missing"
            reasons.append(f"{name} {which} in {base.root}; the delta was made from another base")
        elif "base_crc32c" in entry:
            used = flat_bytes(base[name].array())
            if entry.get("form") in PACKED and len(entry["shape"]) == 2:
                rows = entry["shape"][0] - entry.get("rows", 0)
                used = used[: rows * entry["shape"][1] * base[name].array().itemsize]
            if _C.crc32c(used) != entry["base_crc32c"]:
                reasons.append(f"{name} in {base.root} does not have the CRC-32C of {CONFIG}")
            checked += used.nbytes
            base[name].release()
    for name, about in packfile.config.get("files", {}).items():
        if about["from"] == "base":
            path = base.files.get(name)
            if path is None or not _has_sha256(path, about["sha256"]):
                reasons.append(f"{base.root / name} is missing or has changed since the delta was made")
    return checked


def _check_finetuned(
    packfile: Packfile, base: Checkpoint, target: Checkpoint, reasons: list[str]
) -> dict[str, Any]:
    errors: dict[str, float] = {}
    wrong = total = 0.0
    for name in sorted(set(packfile) ^ set(target)):
        reasons.append(f"{name} is in {'the delta' if name in packfile else 'the fine-tune'} only")
    for name, entry in packfile.entries.items():
        if name not in target:
            continue
        tensor = target[name]
        if (list(tensor.shape), tensor.dtype) != (entry["shape"], entry["dtype"]):
            reasons.append(
                f"{name}: {tensor.dtype} {list(tensor.shape)} in the fine-tune, "
                f"{entry['dtype']} {entry['shape']} in the delta"
            )
        elif entry["form"] in PACKED:
            sums, sampled = _errors(packfile, base, name, tensor.array())
            errors[name] = relative(sums) or 0.0
            wrong, total = wrong + sums[0], total + sums[1]
            known = entry.get("relative_error")
            if known is not None and not math.isclose(
                sampled or 0.0, known, rel_tol=SAME_ERROR, abs_tol=1e-4
            ):
                reasons.append(f"{name}: relative error {sampled or 0:.6f}, {known:.6f} when it was made")
            rows = packfile.rows(name)
            if rows is not None and not _equal(rows, tensor.array()[-rows.shape[0] :]):
                reasons.append(f"{name}: its added rows are not the fine-tune's")
        elif entry["form"] == "same" and entry.get("relative_error"):  # left as in the base
            d = to_float32(tensor.array()) - to_float32(base[name].array())
            power = float(np.square(d, dtype=np.float64).sum())
            errors[name], wrong, total = 1.0, wrong + power, total + power
        elif entry["form"] != "tied":
            kept = base[name] if entry["form"] == "same" else packfile.tensors[name]
            if not _equal(kept.array(), tensor.array()):
                reasons.append(f"{name}: not the fine-tune's values")
        tensor.release()
    worst = max(errors, key=lambda name: errors[name], default=None)
    return {
        "finetuned": str(target.root),
        "relative_error": relative((wrong, total)) if errors else None,
        "largest_error": None if worst is None else f"{worst} {errors[worst]:.4f}",
        "errors": errors,
    }


def _errors(packfile: Packfile, base: Checkpoint, name: str, after: np.ndarray) -> tuple[Sums, float | None]:
    """The two sums over all rows, and the relative error of the sample that compress takes."""
    before = base[name].array()
    value: Any = packfile[name]
    is_stack = not isinstance(value, Delta)
    sums = np.zeros(2)
    for delta, b, f in zip(value, before, after, strict=True) if is_stack else ((value, before, after),):
        sums += squared_errors(b, f, delta)
    return (float(sums[0]), float(sums[1])), relative(sample(before, after, value))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(flat_bytes(a), flat_bytes(b))


def _has_sha256(path: Path, digest: str) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == digest
