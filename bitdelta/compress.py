"""Packs what a fine-tune changed in its base: two checkpoint folders -> one packed delta.

    plan every tensor (forms.py) -> one pair at a time: extract, write (packfile_writer.py) -> report

The pairs are visited in the fine-tune's file order, however the base is sharded, and their pages are released
afterwards, so that memory holds the packed form of one tensor, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import _C
from .array import flat_bytes
from .checkpoint import Checkpoint, open_checkpoint
from .compress_report import counts, written
from .delta import FORMS, Delta, extract_with_checksum
from .folder import refuse_existing, refuse_full, refuse_inside
from .forms import Plan, packable, packed_bytes, plan_tensors, stored_bytes
from .info import UNIT
from .packfile import PACKED
from .packfile_writer import PackfileWriter, header_room
from .progress import progress_bar
from .residual import relative, sample
from .tensor import Tensor

CONFIG_BYTES = 1000  # of delta_config.json without its tensors, about
MAX_BITS = 16
TIMED_BYTES = 64 << 20  # what a dry run reads to estimate the time
COMPARED_BYTES = 64 << 10  # at a time: changed tensors show it in the first piece


def compress(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    planes: int = 1,
    scale: str = "row",
    whole: Iterable[str] = (),
    text: Any = None,
    fit: str = "signs",
    budget: float | None = None,
    dry_run: bool = False,
    progress: bool = False,
    quantized_base: Any = None,
    device: Any = None,
) -> dict[str, Any]:
    """Writes the packed delta of `finetuned` against `base`.

    Args:
        base: the base's checkpoint, a folder or Hub id.
        finetuned: the fine-tune's.
        out_dir: the folder to write; it must not exist. Killed, the same call continues where it was.
        planes: sign planes, 1 to 8: bits per weight.
        scale: "tensor", "row" or "rank1"; embeddings and heads have row scales in any case.
        whole: globs of names of tensors to store whole.
        text: what to calibrate on (`bitdelta.calibrate`), a file or dataset; None: sign(d) and mean |d|.
        fit: what calibration fits, "signs" (and scales) or "scales".
        budget: bits per parameter on average over the tensors that can be packed, scales counted; `planes` and
            `scale` are then chosen for each tensor by the error on the text (spend.py).
        dry_run: estimate size, memory and time; write nothing.
        progress: a progress bar on stderr.
        quantized_base: take the delta from what the base computes with when it is quantised like this, and so repair
            what that loses: "int8", "bnb-int8", "bnb-nf4", "stored" or a config of transformers; see
            `bitdelta.quantized`. The sizes of `dry_run` are those without.
        device: where to calibrate on the text, as of `bitdelta.calibrate`.

    Returns:
        A dict that JSON can hold: counts, parameters and share of each form, bytes, factor, relative error, speed.

    Raises:
        ValueError: an option out of range, NaN or Inf in a weight (the text names tensor and index).
        bitdelta.BaseMismatchError: tensors that do not fit together.
        bitdelta.FormatError: a folder that is not a checkpoint.
        FileExistsError, OSError: `out_dir` exists or cannot be written.
    """
    whole = _globs(whole)
    _check_options(planes, scale, text, fit, budget, dry_run, device)
    refuse_existing(Path(out_dir))
    if quantized_base is not None and not dry_run:
        from .quantized import dequantized

        with dequantized(base, quantized_base, out_dir) as weights:
            return compress(
                weights,
                finetuned,
                out_dir,
                planes,
                scale,
                whole,
                text,
                fit,
                budget,
                False,
                progress,
                None,
                device,
            )
    source, target = open_checkpoint(base), open_checkpoint(finetuned)
    refuse_inside(out_dir, source.root, target.root)
    plans, absent = plan_tensors(source, target, planes, "tensor" if budget else scale, whole)
    if dry_run:
        return _estimate(plans, absent, out_dir, source, budget)
    if text is None:
        return _pack(source, target, out_dir, plans, absent, None, progress)
    return _calibrated(
        (base, finetuned), source, target, out_dir, plans, absent, text, fit, budget, progress, device
    )


def _pack(
    source: Checkpoint,
    target: Checkpoint,
    out_dir: str | os.PathLike[str],
    plans: list[Plan],
    absent: list[str],
    budget: float | None,
    progress: bool,
) -> dict[str, Any]:
    """Writes what the plans say, without text."""
    start = time.perf_counter()
    # whole tensors are on the disk twice until the end; see shard.py
    refuse_full(
        out_dir, _size(plans, source) + sum(plan.nbytes for plan in plans if plan.entry["form"] == "whole")
    )
    maps = _hold_maps(source, target)
    prints = {plan.name: plan.base.fingerprint() for plan in plans if plan.base is not None}
    with (
        PackfileWriter(
            out_dir,
            source,
            files=target.files,
            finetuned={"id": target.id, "revision": target.revision, "name": target.root.resolve().name},
            names={plan.name: plan.entry for plan in plans},
            absent=absent,
            key=_key(plans, prints, (source, target)),
            budget=None if budget is None else {"bits": budget},
        ) as writer,
        progress_bar("compress", sum(plan.read_bytes for plan in plans), progress) as bar,
    ):
        for plan in plans:
            if plan.name not in writer.entries:
                _add(writer, plan, prints.get(plan.name))
            bar.update(plan.read_bytes)
    del maps
    return written(plans, absent, out_dir, time.perf_counter() - start)


def _calibrated(
    given: tuple[str | os.PathLike[str], str | os.PathLike[str]],
    source: Checkpoint,
    target: Checkpoint,
    out_dir: str | os.PathLike[str],
    plans: list[Plan],
    absent: list[str],
    text: Any,
    fit: str,
    budget: float | None,
    progress: bool,
    device: Any,
) -> dict[str, Any]:
    """Packs into a folder beside the target, and calibrates from there."""
    from .calibrate import calibrate
    from .spend import forget, spend, warn

    start = time.perf_counter()
    beside = Path(os.path.abspath(out_dir))
    plain = beside.parent / f".{beside.name}.plain"
    shutil.rmtree(plain, ignore_errors=True)
    try:
        if budget is not None:
            plans = spend(plans, target, text, out_dir, budget, fit, progress, device)
        report = _pack(source, target, plain, plans, absent, budget, progress)
        found = calibrate(*given, plain, text, out_dir, fit, progress=progress, device=device)
    finally:
        shutil.rmtree(plain, ignore_errors=True)
        forget(out_dir)
    report |= {"out": str(out_dir), "calibration": found}
    if "budget" in found:
        report["budget"] = found["budget"]
        warn(found["budget"])
    return {**report, "seconds": round(time.perf_counter() - start, 3)}


def _check_options(
    planes: int, scale: str, text: Any, fit: str, budget: Any, dry_run: bool, device: Any
) -> None:
    if type(planes) is not int or not 1 <= planes <= 8:
        raise ValueError(f"planes: expected 1 to 8, got {planes!r}")
    if scale not in FORMS:
        raise ValueError(f"scale: expected 'tensor', 'row' or 'rank1', got {scale!r}")
    if fit not in ("signs", "scales"):
        raise ValueError(f"fit: expected 'signs' or 'scales', got {fit!r}")
    if fit != "signs" and text is None:
        raise ValueError(f"fit: {fit!r} needs a text to fit to")
    if device is not None:
        if text is None:
            raise ValueError(f"device: {device!r} is for calibrating on a text")
        from .devices import torch_device

        torch_device(device)  # before anything is written
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= MAX_BITS:
            raise ValueError(
                f"budget: expected bits per parameter, above 0 and up to {MAX_BITS}, got {budget!r}"
            )
        if text is None and not dry_run:
            raise ValueError("budget: needs text to measure errors on")
        if planes != 1 or scale != "row":
            raise ValueError("budget: chooses planes and scales for each tensor; leave those options out")


def _globs(whole: Iterable[str]) -> tuple[str, ...]:
    globs = (whole,) if isinstance(whole, str) else tuple(whole) if isinstance(whole, Iterable) else (whole,)
    wrong = [glob for glob in globs if not isinstance(glob, str)]
    if wrong:
        raise TypeError(f"whole: expected globs of names of tensors, got {str(wrong[0])[:80]!r}")
    return globs


def _add(writer: PackfileWriter, plan: Plan, fingerprint: str | None) -> None:
    name, entry, tensor, base = plan.name, plan.entry, plan.finetuned, plan.base
    done = partial(_release, [tensor] if base is None else [tensor, base])
    if entry["form"] == "tied":
        writer.add(name, None, tied_to=entry["tied_to"])
        return
    is_same = base is not None and _is_same(base, tensor)
    if base is not None and (is_same or entry["form"] == "same"):
        about = plan.about | ({} if is_same else {"relative_error": 1.0})
        writer.add(
            name,
            None,
            base_crc32c=_C.crc32c(flat_bytes(base.array())),
            fingerprint=fingerprint,
            done=done,
            **about,
        )
    elif base is None or entry["form"] == "whole":
        writer.add(name, tensor.array(), dtype=tensor.dtype, shape=tensor.shape, done=done)
    else:
        _add_packed(writer, plan, fingerprint, done)


def _hold_maps(*checkpoints: Checkpoint) -> dict[Path, np.ndarray]:
    """An array of every file, so that its map is not closed and made again for every tensor."""
    maps: dict[Path, np.ndarray] = {}
    for checkpoint in checkpoints:
        for tensor in checkpoint.values():
            if tensor.path not in maps and tensor.strides is None and tensor.nbytes:
                maps[tensor.path] = tensor.array()
    return maps


def _release(tensors: list[Tensor]) -> None:
    """In the writer's thread, as giving pages back costs a quarter of what extracting takes."""
    for tensor in tensors:
        tensor.release()


def _add_packed(
    writer: PackfileWriter, plan: Plan, fingerprint: str | None, done: Callable[[], None]
) -> None:
    assert plan.base is not None
    entry, before, after = plan.entry, plan.base.array(), plan.finetuned.array()
    n = min(before.shape[-2], after.shape[-2])
    before, rows, after = before[..., :n, :], after[..., n:, :], after[..., :n, :]
    value: Delta | list[Delta]
    if len(entry["shape"]) == 2:
        value, checksum = _extract(plan, "", before, after)
    else:
        value, checksum = _extract_stack(plan, before, after)
    error = relative(sample(before, after, value))
    writer.add(
        plan.name,
        value,
        rows=rows if entry.get("rows") else None,
        done=done,
        dtype=plan.finetuned.dtype,
        base_crc32c=checksum,
        relative_error=None if error is None else round(error, 6),
        fingerprint=fingerprint,
        **plan.about,
    )


def _extract(plan: Plan, index: str, before: np.ndarray, after: np.ndarray) -> tuple[Delta, int]:
    try:
        return extract_with_checksum(before, after, plan.entry["planes"], plan.entry["form"])
    except ValueError as error:  # NaN or Inf
        raise ValueError(f"{plan.name}{index}: {error}") from error


def _extract_stack(plan: Plan, before: np.ndarray, after: np.ndarray) -> tuple[list[Delta], int]:
    """A stack of matrices [E, N, K], one after the other."""
    deltas, checksum = [], 0
    for i in range(len(after)):
        delta, own = _extract(plan, f"[{i}]", before[i], after[i])
        deltas.append(delta)
        checksum = _C.crc32c_combine(checksum, own, before[i].nbytes)
    return deltas, checksum


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; looks no further than the first difference."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    x, y = flat_bytes(a.array()), flat_bytes(b.array())
    step = COMPARED_BYTES
    return all(np.array_equal(x[at : at + step], y[at : at + step]) for at in range(0, x.size, step))


def _key(plans: list[Plan], prints: dict[str, str], checkpoints: tuple[Checkpoint, ...]) -> dict[str, str]:
    """What the result depends on: the plans, the tensors' fingerprints, the files' sizes and times."""
    from . import __version__

    status = [path.stat() for checkpoint in checkpoints for path in checkpoint.weights]
    about = [
        [[plan.name, plan.entry, plan.about, prints.get(plan.name)] for plan in plans],
        [[str(checkpoint.root.resolve()) for checkpoint in checkpoints]],
        [[file.st_size, file.st_mtime_ns] for file in status],
    ]
    return {"version": __version__, "inputs": hashlib.sha256(json.dumps(about).encode()).hexdigest()}


def _size(plans: list[Plan], base: Checkpoint) -> int:
    """Bytes of the delta: its tensors' with the file's header, and those of delta_config.json, about."""
    header = header_room(base, {plan.name: plan.entry for plan in plans})
    return header + CONFIG_BYTES + sum(plan.nbytes + _entry_bytes(plan) for plan in plans)


def _entry_bytes(plan: Plan) -> int:
    """Of the entry in delta_config.json, with digests as long as they will be."""
    digests = {
        "sha256": "0" * 64,
        "fingerprint": "0" * 64,
        "base_crc32c": 1 << 31,
        "relative_error": 0.123456,
    }
    known = digests if plan.entry["form"] in PACKED else {"sha256": "0" * 64}
    return len(json.dumps({plan.name: {**plan.entry, "bytes": plan.nbytes, **known}}))


def _estimate(
    plans: list[Plan],
    absent: list[str],
    out_dir: str | os.PathLike[str],
    base: Checkpoint,
    budget: float | None,
) -> dict[str, Any]:
    """Sizes from the plans; time from one extraction of at most TIMED_BYTES of the largest pair."""
    size, total = _size(plans, base), sum(stored_bytes(plan.entry) for plan in plans)
    packed = [plan for plan in plans if "planes" in plan.entry]
    if budget is not None:
        size += int(sum(budget * packable(plan.entry) / 8 - packed_bytes(plan) for plan in packed))
    read = sum(plan.read_bytes for plan in plans)
    report = {
        "dry_run": True,
        "out": str(out_dir),
        **counts(plans, absent),
        "bytes": size,
        "finetuned_bytes": total,
        "factor": total / size if size else None,
        "unit": UNIT,
        "memory_bytes": 2 * max((plan.nbytes for plan in packed), default=0) + (64 << 20),
        "read_bytes": read,
    }
    if packed:
        report["seconds"] = round(read * _seconds_per_byte(max(packed, key=lambda plan: plan.read_bytes)), 3)
    return report


def _seconds_per_byte(plan: Plan) -> float:
    assert plan.base is not None
    before, after = plan.base.array(), plan.finetuned.array()
    if after.ndim == 3:
        before, after = before[0], after[0]
    rows = max(1, min(before.shape[0], after.shape[0], TIMED_BYTES // (before[0].nbytes + after[0].nbytes)))
    before, after = before[:rows], after[:rows]
    start = time.perf_counter()
    _extract(plan, "", before, after)
    return (time.perf_counter() - start) / (before.nbytes + after.nbytes)
