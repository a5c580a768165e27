"""`bitdelta bench`: first every kernel is checked against the reference, then timed, on this machine.

    machine    what it is
    limits     how fast it reads memory, multiplies, reads and writes its disk: printed first
    check      every instruction set against bitdelta.reference
    products   delta products, extraction and expansion against the dense product, interleaved (data, timing), each
               checked first on what it is timed with (strips); a process for each number of threads (process)
    latency    one linear against its size and the number of tenants: naive, LoRA, deltas
    overhead   what PyTorch's side adds to a call of the extension; needs PyTorch
    files      a packfile's load and hot-swap, and compress, against reading maps, memory and disk
    goals      what each row should reach
    calibration  fitting without gradients against distillation; needs PyTorch and transformers
    model      decoding for many tenants (random_model, decode, model_goals); needs PyTorch and transformers
    cuda       the kernels of a GPU (cuda_*); needs one, and PyTorch

Everything timed rotates over more than 1 GB of random bits, so that nothing comes from a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import whole_number
from ..table import table
from ..threads import get_num_threads, let_torch_sleep
from . import check, files, goals, limits, machine, overhead, process


def run(suite: str = "cpu", quick: bool = False, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Checks, then measures.

    Args:
        suite: "cpu" for everything, "io" for packfile and compress only.
        quick: small shapes and few repetitions; the figures mean nothing.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `machine`, `limits`, `checks`, `rows`, `not_measured`.

    Raises:
        bitdelta.Error: a kernel differs from the reference, or a measurement failed.
    """
    start = time.perf_counter()
    each = sorted({1, machine.cores()})
    report = _begin(suite, quick, each, log)
    rows: list[dict[str, Any]] = []
    if suite == "cpu":
        report["checks"] = check.kernels(log)
        for threads in each:
            rows += process.run("products", threads, quick, log)
        rows += overhead.measure(quick)
        report["checked_cases"] = _taken(rows)
    disk, measured = files.measure(quick, report["limits"][-1], log)
    report["limits"].append(disk)
    rows += measured
    report["rows"] = [goals.judge(row, report["machine"], quick) for row in rows]
    if suite == "cpu":
        report["not_measured"] = goals.not_measured(report["rows"], report["machine"])
    else:
        report["not_measured"] = goals.files_not_measured(report["rows"])
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def run_latency(quick: bool = False, log: Callable[[str], None] = print) -> dict[str, Any]:
    """One linear against its size and the number of tenants, by all threads.

    Args:
        quick: small shapes and few repetitions; the figures mean nothing.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `machine`, `limits`, `checks`, `checked_cases`, `rows`.

    Raises:
        bitdelta.Error: a kernel differs from the reference, or a measurement failed.
    """
    start = time.perf_counter()
    report = _begin("latency", quick, [machine.cores()], log)
    report["checks"] = check.kernels(log)
    report["rows"] = process.run("latency", machine.cores(), quick, log)
    report["checked_cases"] = _taken(report["rows"])
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
    report = _begin("model", quick, [get_num_threads()], log)
    report |= {"shape": shape, "layers": layers, "tenants": tenants, "context": model.CONTEXT}
    report["limits"] = report["limits"][0]
    report["rows"], report["limits"]["best_ratio"] = model.measure(
        shape, layers, tenants, quick, report["limits"], log
    )
    report["goals"] = model_goals.goals(report["rows"], quick)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def run_calibration(quick: bool = False, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Checks the kernels, then times fitting against 100 steps of distillation.

    Args:
        quick: tiny shapes; the figures mean nothing.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `machine`, `limits`, `checks`, `threads`, `rows`.

    Raises:
        bitdelta.Error: a kernel differs from the reference.
    """
    from . import calibration

    start = time.perf_counter()
    report = _begin("calibrate", quick, [get_num_threads()], log)
    report["checks"] = check.fitting(log)
    report["threads"] = get_num_threads()
    report["rows"] = calibration.measure(quick, log)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def run_cuda(
    quick: bool = False, seconds: float = 240.0, model: bool = False, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Checks the kernels of a GPU, then times them: see `bench.cuda.run`."""
    from . import cuda

    return cuda.run(quick, seconds, model, log)


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    if report["suite"] == "cuda":
        from . import cuda_goals

        yield from cuda_goals.describe(report)
        return
    yield from machine.lines(report["machine"])
    if report["suite"] != "model":
        yield from limits.lines(report["limits"])
    if report["suite"] == "latency":
        from . import latency

        yield _checked(report)
        yield ""
        yield from latency.describe(report["rows"])
        yield from _footer(
            report, "of read: the bytes that the deltas' call needs, a second, relative to reading"
        )
        return
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
        yield _checked(report)
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


def _begin(suite: str, quick: bool, threads: list[int], log: Callable[[str], None]) -> dict[str, Any]:
    """A report with the machine and its limits for these numbers of threads, measured before all else."""
    report: dict[str, Any] = {"suite": suite, "quick": quick, "machine": machine.describe(), "limits": []}
    for count in threads:
        report["limits"] += process.run("limits", count, quick, log)
    for line in limits.lines(report["limits"]):
        log(line)
    return report


def _taken(rows: list[dict[str, Any]]) -> int:
    """Takes the rows that say how many cases were checked out of the others; their sum."""
    found = [row for row in rows if "checked" in row]
    rows[:] = [row for row in rows if "checked" not in row]
    return sum(row["checked"] for row in found)


def _checked(report: dict[str, Any]) -> str:
    cases = report["checked_cases"]
    return (
        f"checked against the reference: {report['checks']} results, every bit equal; and {cases} timed cases on their "
        f"own weights, two strips of rows each"
    )


def _sections(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for title in dict.fromkeys(map(goals.section, rows)):
        yield title, [row for row in rows if goals.section(row) == title]
