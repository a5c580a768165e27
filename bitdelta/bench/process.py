"""A measurement in a process of its own: BLAS libraries read their number of threads when they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from ..errors import Error

VARIABLES = ("BITDELTA", "OMP", "OPENBLAS", "MKL", "VECLIB")


def run(module: str, threads: int, quick: bool, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Runs `main` of bitdelta.bench.MODULE with argument THREADS; it prints JSON objects, one a line.

    Args:
        module: of this package.
        threads: of the kernels and of BLAS.
        quick: adds --quick.
        log: called with what an object calls "log".

    Returns:
        The other objects.

    Raises:
        bitdelta.Error: the process failed.
    """
    environment = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in VARIABLES}}
    program = f"from bitdelta.bench.{module} import main; main()"
    command = [sys.executable, "-c", program, str(threads), *(["--quick"] if quick else [])]
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
