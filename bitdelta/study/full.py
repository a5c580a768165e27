"""A full fine-tune: every parameter trained on code; the paper's own case."""

from __future__ import annotations

from collections.abc import Iterator

from .ladder import COLUMNS, ladder
from .measure import Scores
from .trial import Trial

__all__ = ["COLUMNS", "TITLE", "rows"]
TITLE = "full fine-tune at 1 bit"


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    yield from ladder(trial)
