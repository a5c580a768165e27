"""`bitdelta bench`: first every kernel is checked against the reference, then timed, on this machine.

    machine    what it is, and how fast it reads memory
    check      every instruction set against bitdelta.reference
    products   delta products, extraction and expansion against the dense product, interleaved (data, timing)
    files      a packfile's load, and compress against merely reading the same maps
    goals      what each row should reach
    calibration  fitting without gradients against distillation; needs PyTorch and transformers
    model      decoding for many tenants (random_model, decode, model_goals); needs PyTorch and transformers

Everything timed rotates over more than 1 GB of random bits, so that nothing comes from a cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import Error, whole_number
from ..table import table
from ..threads import get_num_threads, let_torch_sleep
from . import check, files, goals, machine


def run(suite: str = "cpu", quick: bool = False, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Checks, then measures.

    Args:
        suite: "cpu" for everything, "io" for packfile and compress only.
        quick: small shapes and few repetitions; the figures mean nothing.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `machine`, `checks`, `rows`, `not_measured`.

    Raises:
        bitdelta.Error: a kernel differs from the reference, or a measurement failed.
    """
    start = time.perf_counter()
    report: dict[str, Any] = {"suite": suite, "quick": quick, "machine": machine.describe()}
    rows: list[dict[str, Any]] = []
    if suite == "cpu":
        report["checks"] = check.kernels(log)
        for threads in sorted({1, machine.cores()}):
            rows += _products(threads, quick, log)
    rows += files.measure(quick, log)
    report["rows"] = [goals.judge(row, report["machine"], quick) for row in rows]
    report["not_measured"] = goals.not_measured(report["rows"], report["machine"]) if suite == "cpu" else []
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def run_model(
    shape: str = "llama-2-7b",
    layers: int = 2,
    tenants: int = 16,
    quick: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Decoding for many tenants: merged models in turn, LoRA, and deltas in one batch.

    Args:
        shape: of a layer: a key of `random_model.SHAPES`.
        layers: how many; the base and all deltas must fit memory and the temporary folder.
        tenants: the most; 1, 2, 4, ... are timed.
        quick: a tiny model and few repetitions; the figures mean nothing.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `machine`, `limits`, `rows`, `goals`.

    Raises:
        ValueError: an unknown shape, or a number below 1.
        bitdelta.Error: tokens differ from those of merged models.
    """
    let_torch_sleep()
    from . import model, model_goals
    from .random_model import SHAPES

    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    for name, number in (("layers", layers), ("tenants", tenants)):
        whole_number(number, name, 1, 1000)
    start = time.perf_counter()
    shape = "tiny" if quick else shape
    report: dict[str, Any] = {"suite": "model", "quick": quick, "machine": machine.describe()}
    report |= {"shape": shape, "layers": layers, "tenants": tenants, "context": model.CONTEXT}
    report["limits"], report["rows"] = model.measure(shape, layers, tenants, quick, log)
    report["goals"] = model_goals.goals(report["rows"], quick)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def run_calibration(quick: bool = False, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Checks the kernels, then times fitting against 100 steps of distillation.

    Args:
        quick: tiny shapes; the figures mean nothing.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `machine`, `checks`, `threads`, `rows`.

    Raises:
        bitdelta.Error: a kernel differs from the reference.
    """
    from . import calibration

    start = time.perf_counter()
    report: dict[str, Any] = {"suite": "calibrate", "quick": quick, "machine": machine.describe()}
    report["checks"] = check.fitting(log)
    report["threads"] = get_num_threads()
    report["rows"] = calibration.measure(quick, log)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    yield from machine.lines(report["machine"])
    if report["suite"] == "calibrate":
        from . import calibration

        yield f"checked against the reference: {report['checks']} results, every bit equal"
        yield ""
        yield from calibration.describe(report["rows"])
        yield from _footer(report, f"{report['threads']} threads; the fit is timed once, a step thrice")
        return
    if report["suite"] == "model":
        from . import model_goals

        yield from model_goals.describe(report)
        yield from _footer(report, "speed: tokens/s relative to the merged models in turn")
        return
    if "checks" in report:
        yield f"checked against the reference: {report['checks']} results, every bit equal"
    for title, rows in _sections(report["rows"]):
        yield ""
        yield from table(goals.COLUMNS, [goals.cells(row) for row in rows], title)
    for lines in (goals.summary(report["rows"]), report["not_measured"]):
        if lines:
            yield ""
            yield from lines
    yield from _footer(
        report, "against: the time relative to the best dense product of the same shape, rows and threads"
    )


def _footer(report: dict[str, Any], about: str) -> Iterator[str]:
    yield ""
    if report["quick"]:
        yield "--quick: small shapes, few repetitions; these figures mean nothing"
    yield "medians; spread: half the distance of the 20th and 80th percentiles, in percent of the median"
    yield about
    yield f"the run took {report['seconds']} s"


def _products(threads: int, quick: bool, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """bench/products.py in a process of its own: BLAS libraries read their thread count at the start."""
    variables = ("BITDELTA", "OMP", "OPENBLAS", "MKL", "VECLIB")
    environment = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in variables}}
    command = [sys.executable, "-m", "bitdelta.bench.products", str(threads), *(["--quick"] if quick else [])]
    rows = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "log" in message:
                log(message["log"])
            else:
                rows.append(message)
    if process.returncode:
        raise Error(f"the measurement with {threads} threads ended with status {process.returncode}")
    return rows


def _sections(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for title in dict.fromkeys(map(goals.section, rows)):
        yield title, [row for row in rows if goals.section(row) == title]
