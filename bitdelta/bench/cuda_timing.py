"""Timing on a GPU: a CUDA graph of calls that go through all sets, replayed, and the same calls one by one.

A sample is the time of one pass over the sets, divided by their number: between two events on the stream, so it is
the GPU's own clock. Nothing waits for the GPU between samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from .timing import Sample, sample_of

Call = Callable[[], object]
SAMPLES, FEWEST = 100, 10  # FEWEST where SAMPLES would take longer than what is given
WARM_SECONDS, MOST_WARM = 0.05, 1000  # untimed passes: a GPU that had nothing to do has lowered its clocks
HOST_CALLS = 100  # enqueued without waiting; the driver's queue holds some thousand launches


def each(call: Callable[[Any], object], items: Iterable[Any]) -> list[Call]:
    """A call for every item."""
    return [partial(call, item) for item in items]


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls, each of which has run before on a stream of its own, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(calls: Sequence[Call], seconds: float) -> Sample:
    """Seconds of one call in a graph of all of them."""
    graph = graph_of(calls)
    sample = timed(graph.replay, len(calls), seconds)
    graph.reset()
    return sample


def eager(calls: Sequence[Call], seconds: float) -> Sample:
    """Seconds of one call, all made in turn by the host."""

    def run() -> None:
        for call in calls:
            call()

    return timed(run, len(calls), seconds)


def timed(run: Call, n_calls: int, seconds: float) -> Sample:
    """Samples of `run`, which makes n_calls: SAMPLES of them, fewer where they would take longer than `seconds`."""
    run()
    once = _elapsed(run, 2) / 2
    for _ in range(min(MOST_WARM, int(WARM_SECONDS / max(once, 1e-9)))):
        run()
    count = n_samples(once, seconds)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
    ]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sample_of([start.elapsed_time(end) / 1e3 / n_calls for start, end in events])


def n_samples(once: float, seconds: float) -> int:
    """How many samples of `once` seconds fit."""
    return max(FEWEST, min(SAMPLES, int(seconds / max(once, 1e-9))))


def _elapsed(run: Call, times: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def host(call: Call, n_samples: int = 20) -> Sample:
    """Seconds that the host spends in one call which the GPU keeps up with: HOST_CALLS in a row, then it waits."""
    call()
    seconds = []
    for _ in range(n_samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        seconds.append((time.perf_counter() - start) / HOST_CALLS)
    torch.cuda.synchronize()
    return sample_of(seconds)
