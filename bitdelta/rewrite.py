"""A packed delta again, with other values in some of its tensors: fitted signs, distilled scales.

Everything else is copied from the memory-mapped old folder, one tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .delta import Delta
from .packfile import PACKED, Packfile
from .packfile_writer import PackfileWriter
from .residual import relative, sample

Packed = Delta | Sequence[Delta]


def rewrite(
    packfile: Packfile,
    base: Checkpoint,
    out_dir: str | os.PathLike[str],
    change: Callable[[str, Packed], Packed],
    finetuned: Checkpoint | None = None,
) -> None:
    """Writes `out_dir`, a packed delta as `packfile` is, but for the Deltas.

    Args:
        packfile: the old one.
        base: its base's checkpoint.
        out_dir: the folder to write; it must not exist.
        change: called with every tensor's name and its Delta or stack of Deltas; what it returns is stored. Shape,
            form and planes stay.
        finetuned: the fine-tune, to measure relative_error again; without it that field is left out where a value
            has changed.

    Raises:
        FileExistsError, OSError: `out_dir` exists or cannot be written.
    """
    with PackfileWriter(
        out_dir,
        base,
        files=_files(packfile, base),
        finetuned=packfile.config.get("finetuned", {}),
        names=packfile.entries,
        absent=packfile.config.get("absent", ()),
        budget=packfile.budget,
    ) as writer:
        for name, entry in packfile.entries.items():
            errors = {
                key: entry.get(key) for key in ("relative_error", "output_error", "output_error_before")
            }
            kept = {key: entry.get(key) for key in ("dtype", "base_crc32c", "fingerprint", "effect")}
            if entry["form"] == "tied":
                writer.add(name, None, tied_to=entry["tied_to"])
            elif entry["form"] in PACKED:
                old: Any = packfile[name]
                new = change(name, old)
                if new is old:
                    kept |= errors
                else:
                    kept["relative_error"] = _error(name, new, base, finetuned)
                writer.add(name, new, rows=packfile.rows(name), **kept)
            else:
                writer.add(name, packfile[name], shape=entry["shape"], **kept, **errors)


def _files(packfile: Packfile, base: Checkpoint) -> dict[str, Path]:
    """The fine-tune's other files: those that travel with the delta, and the base's where they are the same."""
    found = packfile.files()
    for name, about in packfile.config.get("files", {}).items():
        if about["from"] == "base" and name in base.files:
            found[name] = base.files[name]
    return found


def _error(name: str, value: Packed, base: Checkpoint, finetuned: Checkpoint | None) -> float | None:
    """relative_error as `compress` samples it."""
    if finetuned is None or name not in finetuned:
        return None
    error = relative(sample(base[name].array(), finetuned[name].array(), value))
    return None if error is None else round(error, 6)
