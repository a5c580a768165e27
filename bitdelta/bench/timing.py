"""Interleaved timing: every round runs each case, so that a machine's moods meet all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import _C

SHORT = 0.01  # seconds: cases shorter than this get an untimed call before the timed ones
BURST = 3  # timed calls of a short case in one round
MAX_ROUNDS = 60

Key = TypeVar("Key")


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Case:
    """What to time: `call` gets a number that grows, which says what weights or deltas to take."""

    call: Callable[[int], object]
    n_bytes: int  # read and written by one call
    isa: str  # instruction set of our own kernels
    check: Callable[[Any], None] | None = (
        None  # of what `call(0)` returned or wrote; raises where that is wrong
    )

    def verify(self) -> bool:
        """Calls and checks; whether there is a check."""
        if self.check is not None:
            self._use_isa()
            self.check(self.call(0))
        return self.check is not None

    def _use_isa(self) -> None:
        if _C.isa() != self.isa:
            _C.set_isa(self.isa)

    def seconds(self, turn: int) -> float:
        self._use_isa()
        start = time.perf_counter()
        self.call(turn)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Sample:
    """Seconds of one call."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th
    calls: int

    @property
    def spread(self) -> float:
        """Half the distance of the percentiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


def interleaved(cases: Mapping[Key, Case], seconds: float, min_rounds: int) -> dict[Key, Sample]:
    """Times all cases for about `seconds` together; a slow case sits out some of the rounds."""
    turns = dict.fromkeys(cases, 0)
    times: dict[Key, list[float]] = {key: [] for key in cases}

    def call(key: Key) -> float:
        turns[key] += 1
        return cases[key].seconds(turns[key])

    estimates = {key: min(call(key), call(key)) for key in cases}
    bursts = {key: BURST if estimate < SHORT else 1 for key, estimate in estimates.items()}
    share = seconds / len(cases)
    rounds = {
        key: max(min_rounds, min(MAX_ROUNDS, int(share / (estimates[key] * (burst + (burst > 1))))))
        for key, burst in bursts.items()
    }
    most = max(rounds.values())
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(most):
            for key, burst in bursts.items():
                if (turn + 1) * rounds[key] // most == turn * rounds[key] // most:
                    continue
                if burst > 1:
                    call(key)  # wakes the threads this case uses, after another one's
                times[key] += [call(key) for _ in range(burst)]
    finally:
        if is_enabled:
            gc.enable()
    return {key: sample_of(values) for key, values in times.items()}


def fastest(cases: Mapping[Key, Case], factor: float) -> dict[Key, Case]:
    """The cases that three trials show within `factor` of the fastest one."""
    for case in cases.values():
        case.seconds(0)  # the first call is slower than the rest
    seconds = {key: min(case.seconds(turn) for turn in (1, 2, 3)) for key, case in cases.items()}
    limit = factor * min(seconds.values())
    return {key: case for key, case in cases.items() if seconds[key] <= limit}


def sample_of(values: list[float]) -> Sample:
    """Median and percentiles of seconds."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return Sample(at(0.5), at(0.2), at(0.8), len(ordered))
