"""The progress bar of the long commands, on stderr."""

from __future__ import annotations

from typing import Any


def progress_bar(what: str, total: int | None, is_shown: bool, unit: str = "B") -> Any:
    """A bar of tqdm over `total` units, None: not known; bytes as kB, MB, GB."""
    from tqdm.auto import tqdm

    return tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=what, disable=not is_shown)
