"""A budget of bits spent on a fine-tune: text -> measurements (measure.py) -> choice (budget.py) -> plans of tensors.

    bits per parameter = 8 * (bytes of signs and scales) / (parameters of all matrices that can be packed)

Norms, biases, added vocabulary rows and what is stored whole are not counted; tensors that have not changed are, with
no bytes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .budget import choose, too_large
from .checkpoint import Checkpoint
from .forms import Plan, packable, with_form
from .hidden import State
from .packfile import PACKED
from .progress import progress_bar
from .tensor import DTYPES

MOST = 8  # names in the log

logger = logging.getLogger("bitdelta")


def spend(
    plans: list[Plan],
    target: Checkpoint,
    text: Any,
    out_dir: str | os.PathLike[str],
    bits: float,
    fit: str,
    progress: bool,
    device: Any = None,
) -> list[Plan]:
    """The plans with the forms and planes that leave the least error within the budget.

    Args:
        plans: those of packed tensors may become of any form.
        target: the fine-tune's checkpoint.
        text: to measure on, as of `calibrate`.
        out_dir: of the delta that is to be.
        bits: per parameter, on average.
        fit: what calibration will fit, "signs" or "scales".
        progress: a progress bar on stderr.
        device: as of `calibrate`.

    Raises:
        ValueError: too few bits; what `calibrate` raises.
    """
    from .calibration_text import HELD_OUT, read_tokens
    from .devices import torch_device
    from .fitting_device import place
    from .measure import Measuring

    packed = {plan.name: plan for plan in plans if plan.entry["form"] in PACKED}
    if not packed:
        return plans
    on = place(torch_device(device))
    tokens = read_tokens(text, target)
    most = int(bits * sum(map(packable, (plan.entry for plan in packed.values()))) / 8)
    with progress_bar("measure", len(packed), progress, " tensors") as bar:
        n_held_out = max(1, len(tokens) // HELD_OUT)
        run = Measuring(packed, target, tokens, n_held_out, bits, fit, 0, Path(out_dir), bar, on)
        found = run.all()
    choice = choose({name: about.candidates for name, about in found.items()}, most)
    done = []
    for plan in plans:
        if plan.name in packed:
            chosen, effect = choice[plan.name], found[plan.name].effect
            about = {"effect": _rounded(effect)}
            if effect > 0:
                about["output_error"] = _rounded(math.sqrt(chosen.error / effect))
            plan = replace(with_form(plan, chosen.form, chosen.planes), about=about)
        done.append(plan)
    return done


def record(entries: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any]) -> dict[str, Any]:
    """What a budget came to, from the packfile's entries: for delta_config.json, the card and the report.

    Args:
        entries: by name.
        known: the budget's `bits`; an earlier record, which stands where output errors are no longer known.

    Returns:
        `bits` asked for, `bits_per_parameter`, `parameters` and `bytes` that count; `effect`, the mean squared change
        of a logit that the deltas make each for itself, added up, and `left`, how much of it the packed forms miss;
        `too_large`, the tensors that miss too much of it.
    """
    counted = {name: entry for name, entry in entries.items() if "effect" in entry}
    if "left" in known and any("output_error" not in entry for entry in counted.values() if entry["effect"]):
        return dict(known)
    parameters = sum(map(packable, counted.values()))
    size = sum(entry["bytes"] - _rows_bytes(entry) for entry in counted.values())
    effects = {name: float(entry["effect"]) for name, entry in counted.items()}
    left = {name: effects[name] * counted[name].get("output_error", 0.0) ** 2 for name in counted}
    return {
        "bits": known["bits"],
        "bits_per_parameter": _rounded(8 * size / max(parameters, 1)),
        "parameters": parameters,
        "bytes": size,
        "effect": _rounded(sum(effects.values())),
        "left": _rounded(sum(left.values())),
        "too_large": too_large(effects, left),
    }


def warn(found: Mapping[str, Any]) -> None:
    """Says in the log which deltas are too large for the budget."""
    names = found["too_large"]
    for name in names[:MOST]:
        logger.warning("%s: its delta is too large for a budget of %g bits", name, found["bits"])
    if len(names) > MOST:
        logger.warning("... and those of %d more tensors", len(names) - MOST)


def forget(out_dir: str | os.PathLike[str]) -> None:
    """Removes what was kept beside `out_dir` to go on after a kill."""
    State(Path(out_dir), "", "budget").remove()


def _rows_bytes(entry: Mapping[str, Any]) -> int:
    return entry.get("rows", 0) * entry["shape"][-1] * DTYPES[entry["dtype"]][0] // 8


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
