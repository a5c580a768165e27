"""One seed of a study: its pair, how it is measured, and the deltas that the rows are about.

Deltas are of the transformer's linears; embeddings and the head travel whole, so that what differs between rows is
how the linears are compressed. A delta asked for twice is made once.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..calibrate import calibrate
from ..compress import compress
from ..distill import distill
from ..training import Log, silent
from .measure import Measure, Scores
from .pair import Pair, Tokens

STEPS = 100  # of every distillation: what the original project takes
BATCH = 4


class Trial:
    """Makes and measures the deltas of one pair in a scratch folder.

    Args:
        pair: the models and tokens.
        folder: where deltas go; the caller removes it.
        steps: of a distillation.
        measure: what measures them, where it is there already.
    """

    def __init__(
        self,
        pair: Pair,
        folder: Path,
        steps: int = STEPS,
        log: Log = silent,
        measure: Measure | None = None,
    ) -> None:
        self.pair, self.folder, self.steps, self.log = pair, folder, steps, log
        self.measure = measure or Measure(pair)
        self.seconds: dict[Path, float] = {}  # what making a delta took, without the delta it began with

    @cached_property
    def teacher(self) -> Any:
        """The fine-tune's logits of the calibration text, for recipes of a study's own."""
        from .gradient import teacher

        return teacher(self.pair)

    def over(self, base: Path, folder: Path) -> Trial:
        """The same with another base, measured against the base and fine-tune of this one."""
        return Trial(replace(self.pair, base=base), folder, self.steps, self.log, self.measure)

    def plain(self, planes: int = 1, scale: str = "row") -> Path:
        """sign(d) and mean |d|."""
        out = self.folder / f"plain-{planes}-{scale}"
        if not out.exists():
            start = time.perf_counter()
            compress(self.pair.base, self.pair.finetuned, out, planes, scale, whole="*embed_tokens*")
            self._done(out, start)
        return out

    def fitted(
        self,
        planes: int = 1,
        scale: str = "row",
        rounds: int = 3,
        fit: str = "signs",
        tokens: int | None = None,
    ) -> Path:
        """Signs and scales, or scales alone, fitted to the first `tokens` of the calibration text; no gradients."""
        out = self.folder / f"fitted-{planes}-{scale}-{rounds}-{fit}-{tokens}"
        if not out.exists():
            plain, start = self.plain(planes, scale), time.perf_counter()
            rows = self.pair.calibration[
                : None if tokens is None else max(2, tokens // self.pair.size.length)
            ]
            calibrate(
                self.pair.base, self.pair.finetuned, plain, rows, out, fit, rounds=rounds,
                n_tokens=rows.size, length=rows.shape[1],
            )  # fmt: skip
            self._done(out, start)
        return out

    def distilled(self, delta: Path, lr: float = 0.02, tokens: Tokens | None = None) -> Path:
        """With the scales of `delta` trained on the calibration text, or on other tokens [rows, length]."""
        rows = self.pair.calibration if tokens is None else tokens
        out = self.folder / f"{delta.name}-distilled-{lr}-{zlib.crc32(rows.tobytes()):08x}"
        if not out.exists():
            start = time.perf_counter()
            distill(
                self.pair.base, self.pair.finetuned, delta, rows, out, self.steps, BATCH, rows.shape[1], lr,
                seed=self.pair.seed, cache=self.folder / "teacher",
            )  # fmt: skip
            self._done(out, start)
        return out

    def score(self, delta: Path) -> Scores:
        """Of base + delta, with the bytes of its packed linears and the seconds that its making took."""
        from ..packfile import load

        scores = self.measure.delta(delta, self.pair.base)
        packed = [entry["bytes"] for entry in load(delta).entries.values() if "planes" in entry]
        scores["about"] = {"bytes": float(sum(packed)), "seconds": self.seconds[delta]}
        return scores

    def _done(self, out: Path, start: float) -> None:
        self.seconds[out] = time.perf_counter() - start
        self.log(f"seed {self.pair.seed}: {out.name}, {self.seconds[out]:.1f} s")
