"""Pictures of what was measured; needs matplotlib (`pip install 'bitdelta[plot]'`).

    curves.py    quality against bits, memory against tenants, loss against steps: from --json reports
    latency.py   a decoding step or one linear against tenants, rows and size: from --json reports
    bars.py      rates beside what memory and disk allow, what fitting costs, the demonstration: from --json reports
    deltas.py    errors of layers, scales, explained variance: from a delta, or a base and its fine-tune
    style.py     axes, and lines that stay apart without colour
    picture.py   what `bitdelta plot NAME INPUT --out FILE` does

Every function draws on `ax` (matplotlib's Axes; None: a new figure of pyplot) and returns it. A report that lacks what
is drawn is a ValueError.
"""

from __future__ import annotations

from .bars import demo, fitting, rates
from .curves import loss, memory, quality
from .deltas import layer_errors, scales, variance
from .latency import latency

__all__ = [
    "demo",
    "fitting",
    "latency",
    "layer_errors",
    "loss",
    "memory",
    "quality",
    "rates",
    "scales",
    "variance",
]
