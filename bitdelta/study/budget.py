"""A budget of bits against uniform planes of the same bytes, the whole model packed, embeddings too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..compress import compress
from ..forms import packable
from ..packfile import PACKED, load
from .measure import Scores
from .table import COLUMNS as USUAL
from .trial import Trial

TITLE = "a budget of bits, calibrated"
COLUMNS = (("bits", "about", "bits", 1.0), *USUAL)
UNIFORM = ((1, "tensor"), (1, "row"), (2, "row"), (3, "row"))
ASKED = "as a budget"


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    yield "base", trial.measure.base
    for planes, scale in UNIFORM:
        label = f"{planes} plane{'s' * (planes > 1)}, {scale}"
        uniform = _compressed(trial, label, planes=planes, scale=scale)
        yield label, _score(trial, uniform)
        chosen = _compressed(trial, f"{label}, {ASKED}", budget=bits_used(uniform))
        yield f"{label}, {ASKED}", _score(trial, chosen)


def judge(found: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the budget errs no more than the planes above it, on average over the seeds."""
    lines = []
    for uniform, budget in zip(found[1::2], found[2::2], strict=True):
        ratios = [
            budget[text]["logit_mse"]["mean"] / uniform[text]["logit_mse"]["mean"]
            for text in ("code", "prose")
        ]
        held = "holds" if max(ratios) <= 1 else "DOES NOT HOLD"
        told = " and ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"{held}: {uniform['label']}: as a budget {told} of its logit MSE (code, prose)")
    return lines


def bits_used(delta: Path) -> float:
    """Bits per parameter of the tensors with signs."""
    packed = [entry for entry in load(delta).entries.values() if entry["form"] in PACKED]
    return 8 * sum(entry["bytes"] for entry in packed) / sum(map(packable, packed))


def _compressed(trial: Trial, label: str, **options: Any) -> Path:
    out = trial.folder / label.replace(", ", "-").replace(" ", "-")
    pair = trial.pair
    if not out.exists():
        compress(pair.base, pair.finetuned, out, text=pair.calibration, **options)
        trial.log(f"seed {pair.seed}: {label}")
    return out


def _score(trial: Trial, delta: Path) -> Scores:
    record = load(delta).budget
    bits = bits_used(delta) if record is None else record["bits_per_parameter"]
    return {**trial.measure.delta(delta), "about": {"bits": bits}}
