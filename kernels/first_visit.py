"""Everything that a first visit to a GPU needs, in order, in ten minutes: build, suite, rates, bench, sanitizers.

    python kernels/first_visit.py OUT             from the root of the repository; results into the folder OUT
    python kernels/first_visit.py --dry-run OUT   prints the plan

Every step has a time limit of its own and is stopped with all that it started; the next one runs whatever became of
it. OUT gets few files: summary.json, a log or a JSON document a step, and progress.log with what JSON steps say.
It needs nvcc, and Python with PyTorch, pytest and this package's dependencies; nothing is installed or downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 590.0  # of all steps
SHORTEST = 5.0  # a step with less time left is not begun
TO_END_IN_TIME = "{seconds}"  # of a command that ends by itself: four fifths of what its step may take
KERNEL_TESTS = ("linear", "gradient", "delta", "calibrate")


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float  # the most that it may take
    output: str  # file in OUT; of a JSON document, what it says beside goes to progress.log
    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)


def plan(build: str) -> list[Step]:
    """The steps; `build` is a folder for the kernels that tests call one by one."""
    python = sys.executable
    suite = [python, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-o", "timeout=90", "-p", "no:cacheprovider"]
    of_kernels = [f"tests/cuda/test_{name}_kernels.py" for name in KERNEL_TESTS]
    others = [f"--ignore={path}" for path in of_kernels]
    bench = [python, "-m", "bitdelta.cli", "bench", "cuda", "--json"]
    build_here = [python, "setup.py", "-q", "build_ext", "--inplace"]
    library = {"BITDELTA_TEST_KERNELS": f"{build}/kernels.so"}
    single = {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
    }  # every tensor an allocation, so that its bounds are known
    few_rows = "tests/cuda/test_linear_kernels.py::test_one_tenant_with_many_or_few_rows"
    return [
        Step("gpu", 15, "build.log", ["nvidia-smi"]),
        Step("extension", 120, "build.log", build_here, {"BITDELTA_CUDA": "1"}),
        Step("kernels for tests", 90, "build.log", [python, "tests/cuda/kernel_calls.py", build]),
        Step("suite", 100, "suite.log", [*suite, *others, "tests/cuda"]),
        Step("suite of single kernels", 60, "suite.log", [*suite, *of_kernels], library),
        Step("rates", 60, "rates.json", [python, "kernels/microbench/rates.py"]),
        Step("bench", 230, "bench.json", [*bench, "--seconds", TO_END_IN_TIME]),
        Step("whole models", 60, "model.json", [*bench, "--model", "--seconds", TO_END_IN_TIME]),
        sanitizer("memcheck", [*suite, "tests/cuda/test_cuda_products.py", "-k", "bits_of_the_cpu"], single),
        sanitizer("racecheck", [*suite, few_rows, "-k", "cuda"], library),
        sanitizer("synccheck", [*suite, few_rows, "-k", "cuda"], library),
    ]


def sanitizer(tool: str, command: list[str], variables: dict[str, str]) -> Step:
    tools = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    return Step(tool, 60, "sanitizer.log", [*tools, *command], variables)


def run(steps: list[Step], out: Path, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Runs the steps, each within its time and what is left of `seconds`; how each ended."""
    deadline, ended = time.monotonic() + seconds, []
    for step in steps:
        limit = min(step.seconds, deadline - time.monotonic())
        start = time.monotonic()
        status = run_one(step, out, limit) if limit >= SHORTEST else "no time was left"
        took, said = round(time.monotonic() - start, 1), last_line(out / log_of(step))
        ended.append({"step": step.name, "ended": status, "seconds": took, "said": said})
        print(f"{step.name}: {status}, {took} s: {said}", flush=True)
        (out / "summary.json").write_text(json.dumps(ended, indent=1) + "\n", encoding="utf-8")
    return ended


def log_of(step: Step) -> str:
    return "progress.log" if step.output.endswith(".json") else step.output


def last_line(path: Path) -> str:
    """Of pytest how many passed, of a sanitizer how many errors there are."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def run_one(step: Step, out: Path, limit: float) -> str:
    """ "ok", or what went wrong."""
    path, log = out / step.output, out / log_of(step)
    is_json = path != log
    command = [word.replace(TO_END_IN_TIME, str(int(0.8 * limit))) for word in step.command]
    if shutil.which(command[0]) is None:
        return f"{command[0]} was not found"
    with path.open("w" if is_json else "a") as output, log.open("a") as said:
        print(f"\n== {step.name}: {' '.join(command)}", file=said, flush=True)
        environment = {**os.environ, **step.variables, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output if is_json else said,
            stderr=said if is_json else subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s"
    return "ok" if status == 0 else f"exit status {status}"


def show(out: Path) -> None:
    """The tables of what was measured, as far as it was."""
    sys.path.insert(0, str(ROOT))
    from bitdelta import bench

    for name in ("bench.json", "model.json"):
        text = (out / name).read_text(encoding="utf-8") if (out / name).is_file() else ""
        try:
            lines = list(bench.describe(json.loads(text)))
        except ValueError:  # not begun, or stopped before its end
            lines = [f"{name}: no report"]
        print(*lines, "", sep="\n")


def main(arguments: list[str]) -> int:
    dry = "--dry-run" in arguments
    folders = [each for each in arguments if each != "--dry-run"]
    if len(folders) != 1 or folders[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    if dry:
        for step in plan("BUILD"):
            variables = "".join(f"{name}={value} " for name, value in step.variables.items())
            print(f"{step.name}, {step.seconds:.0f} s -> {step.output}: {variables}{' '.join(step.command)}")
        return 0
    out = Path(folders[0]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as build:
        ended = run(plan(build), out)
    show(out)
    return int(any(each["ended"] != "ok" for each in ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
