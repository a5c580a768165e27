"""What `compress` reports: counts of what is planned, and sizes and errors of what was written."""

from __future__ import annotations

import os
from typing import Any

from . import threads
from .forms import Plan, parameters
from .info import info
from .packfile import Packfile, load
from .residual import relative, sample


def counts(plans: list[Plan], absent: list[str]) -> dict[str, Any]:
    extra = [plan.name for plan in plans if plan.base is None and plan.entry["form"] != "tied"]
    return {
        "tensors": len(plans),
        "parameters": sum(parameters(plan.entry) for plan in plans),
        "extra": extra,
        "absent": absent,
    }


def written(
    plans: list[Plan], absent: list[str], out_dir: str | os.PathLike[str], seconds: float
) -> dict[str, Any]:
    """What `info` reads back from the folder, without the table of tensors, and how long it took."""
    found = info(out_dir)
    errors = [tensor for tensor in found["tensors"] if tensor["relative_error"] is not None]
    worst = max(errors, key=lambda tensor: tensor["relative_error"], default=None)
    read = sum(plan.read_bytes for plan in plans)
    return {
        "out": str(out_dir),
        **counts(plans, absent),
        "forms": found["forms"],
        "bytes": found["bytes"],
        "finetuned_bytes": found["finetuned_bytes"],
        "bits_per_parameter": found["bits_per_parameter"],
        "factor": found["factor"],
        "unit": found["unit"],
        "relative_error": _relative_error(plans, load(out_dir)),
        "largest_error": None if worst is None else f"{worst['name']} {worst['relative_error']:.4f}",
        "threads": threads.get_num_threads(),
        "seconds": round(seconds, 3),
        "gb_per_second": round(read / seconds / 1e9, 3),
    }


def _relative_error(plans: list[Plan], packfile: Packfile) -> float | None:
    """Over all tensors with signs, and those left as in the base, from the sample that each entry's error is of."""
    wrong = total = 0.0
    for plan in plans:
        if plan.base is not None and packfile.entries[plan.name].get("relative_error") is not None:
            value: Any = packfile[plan.name]
            sums = sample(plan.base.array(), plan.finetuned.array(), value)
            wrong, total = wrong + sums[0], total + sums[1]
    return relative((wrong, total)) if total else None
