"""`bitdelta bench cuda`: checks and times the kernels on the GPU of this machine, against what else could be run there.

    cuda_limits   what the GPU reads, copies and multiplies, measured
    cuda_cases    which products, in the order of their worth; bytes and rooflines
    cuda_data     operands: random bits in several sets
    cuda_measure  what is measured, each case checked first
    cuda_check    the CPU's bits on slices of what is to be timed
    cuda_peers    rivals; two of them are cuda_triton's
    cuda_timing   CUDA graphs and eager calls
    cuda_goals    what each row should reach; the table
    cuda_model    whole models of many tenants in one CUDA graph

What does not fit the time given is listed as not measured. A case that fails is listed, and the rest goes on.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .. import _C
from ..errors import DeviceError
from . import cuda_cases, cuda_goals
from .cuda_cases import (
    Problem,
)

DEVICE = "cuda"  # of torch; tests name the emulation's
SECONDS = 240.0  # of a whole run, unless told otherwise
BITS_BYTES, WEIGHT_BYTES = 3 << 30, 46 << 30  # three sets of the largest problem with peers
CASE_SECONDS, QUICK_SECONDS = 0.5, 0.05  # of one measurement
QUICK_PROBLEMS = 9  # the layer of 16 tenants, and one more
Log = Callable[[str], None]
Row = dict[str, Any]


def run(
    quick: bool = False, seconds: float = SECONDS, model: bool = False, log: Log = print
) -> dict[str, Any]:
    """Checks, then measures, until the time is over.

    Args:
        quick: a subset with few samples; no goal is judged.
        seconds: of the whole run; what is left then is listed as not measured.
        model: whole models instead of single products.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `machine`, `limits`, `rows`, `goals`, `not_measured`, `failed`.

    Raises:
        bitdelta.DeviceError: no GPU that this build and PyTorch can use.
    """
    require()
    start = time.perf_counter()
    report: dict[str, Any] = {
        "suite": "cuda",
        "quick": quick,
        "machine": machine(),
        "not_measured": [],
        "failed": [],
    }
    bench = Bench(report, quick, start + seconds, log)
    if model:
        from .cuda_model import measure

        rows = measure(bench, quick, log)
    else:
        rows = list(bench.rows())
    report["rows"] = cuda_goals.with_ratios(rows)
    report["goals"] = cuda_goals.judge(report["rows"], quick)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def require() -> None:
    """Raises DeviceError that says what is missing."""
    missing = _C.cuda_missing()
    if missing is None and _C.cuda_is_emulated():
        missing = "the kernels of this build run on the CPU (BITDELTA_CUDA=emulate)"
    if missing is None:
        missing = _torch_missing()
    if missing is not None:
        raise DeviceError(f"bench cuda needs a GPU: {missing}")


def _torch_missing() -> str | None:
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} sees none"


def machine() -> dict[str, Any]:
    """The GPU and the versions."""
    import torch

    import bitdelta

    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "processors": facts.multi_processor_count,
        "l2_bytes": getattr(facts, "L2_cache_size", 0),
        "memory_gb": round(facts.total_memory / 1e9, 1),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton(),
        "build": str(_C.build_info().get("cuda", "")),
        "bitdelta": bitdelta.__version__,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said.strip().split("\n")[0] or "unknown"


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Bench:
    """One run: what was measured, what failed, and the time that is left."""

    def __init__(self, report: dict[str, Any], quick: bool, deadline: float, log: Log) -> None:
        self.report, self.quick, self.deadline, self.log = report, quick, deadline, log
        self.case_seconds = QUICK_SECONDS if quick else CASE_SECONDS

    def rows(self) -> Iterator[Row]:
        import torch

        from . import cuda_limits, cuda_measure
        from .cuda_data import Data

        with torch.no_grad():
            free = torch.cuda.mem_get_info()[0]
            self.data = Data(BITS_BYTES, min(WEIGHT_BYTES, free // 2 // 64 * 64), DEVICE)
            self.limits = cuda_limits.measure(self.data, self.case_seconds)
            self.report["limits"] = self.limits
            self.log(
                f"reads {self.limits['read'] / 1e9:,.0f} GB/s, copies {self.limits['copy'] / 1e9:,.0f} GB/s, "
                f"{self.limits['rate'] / 1e12:,.0f} TFLOP/s"
            )
            yield from self.part("small products by cuBLAS", partial(cuda_measure.small_products, self))
            yield from self.part("host overhead", partial(cuda_measure.host, self))
            yield from self.part("extraction", partial(cuda_measure.extraction, self))
            problems = cuda_cases.problems()
            for problem in problems[:QUICK_PROBLEMS] if self.quick else problems:
                measure = partial(cuda_measure.product, self, problem)
                yield from self.part(cuda_goals.name_of(problem), measure)

    def part(self, name: str, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """The rows of one part; what goes wrong in it is listed, and what comes after the deadline too."""
        import torch

        if not self.seconds_left():
            self.report["not_measured"].append(f"{name}: the time was over")
            return
        self.log(name)
        try:
            yield from measure()
        except MemoryError as error:
            self.report["not_measured"].append(f"{name}: {error}")
        except torch.cuda.OutOfMemoryError:
            self.report["not_measured"].append(f"{name}: the GPU's memory is too small")
        except Exception as error:  # noqa: BLE001 - whatever one case does, the others are measured
            self.report["failed"].append(f"{name}: {_said(error)}")
        self._clean(name)

    def _clean(self, name: str) -> None:
        """Frees what the part held; an error that the GPU does not recover from ends the run."""
        import torch

        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.report["failed"].append(f"after {name} the GPU cannot be used: {_said(error)}")
            self.deadline = 0

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.perf_counter())

    def row(
        self, problem: Problem, by: str, calls: list[Any], n_bytes: int, n_operations: int = 0, **more: Any
    ) -> Row:
        """One row of the report: calls in a graph, and eager."""
        sample, alone = self.samples(calls)
        return {
            **problem.about,
            "bits_bytes": problem.tenants * problem.planes * problem.linear.bits_bytes,
            "by": by,
            "sets": len(calls),
            **self.figures(sample, alone, n_bytes, n_operations),
            **more,
        }

    def samples(self, calls: list[Any]) -> tuple[Any, Any]:
        from . import cuda_timing

        return cuda_timing.replayed(calls, self.case_seconds), cuda_timing.eager(calls, self.case_seconds)

    def host_sample(self, call: Any) -> Any:
        from . import cuda_timing

        return cuda_timing.host(call)

    def figures(self, sample: Any, alone: Any, n_bytes: int, n_operations: int = 0) -> Row:
        roof = cuda_cases.roofline(n_bytes, n_operations, self.limits["read"], self.limits["rate"])
        return {
            "microseconds": sample.median * 1e6,
            "spread": sample.spread,
            "samples": sample.calls,
            "eager_microseconds": alone.median * 1e6,
            "eager_spread": alone.spread,
            "bytes": n_bytes,
            "bytes_per_second": n_bytes / sample.median,
            "share": n_bytes / sample.median / self.limits["read"],
            "roofline_microseconds": roof * 1e6,
        }
