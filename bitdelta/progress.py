"""The progress bar of the long commands: text on stderr, a widget in Jupyter where ipywidgets is installed."""

from __future__ import annotations

import warnings
from typing import Any


def progress_bar(what: str, total: int | None, is_shown: bool, unit: str = "B", initial: int = 0) -> Any:
    """A bar of tqdm over `total` units, None: not known; bytes as kB, MB, GB; `initial` were done before."""
    with warnings.catch_warnings():  # that ipywidgets is not installed: the bar is text then
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    return tqdm(
        total=total, unit=unit, unit_scale=unit == "B", desc=what, disable=not is_shown, initial=initial
    )
