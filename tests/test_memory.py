"""Allocations that fail, one after the other: MemoryError comes back, and no reference is kept.

The calls run in a child that a small library (failing_malloc.c), loaded before libc, denies memory.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitdelta import _C

TESTS = Path(__file__).parent
PREPARE = """
import ctypes, sys
import numpy as np
from bitdelta import _C

library = ctypes.PyDLL(sys.argv[1])
library.fail_allocation.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int)


def outcomes(function, arguments, *how):
    '''Of the call, its first allocation failing, then its second ...; ends with the one for which none fails.'''
    for n in range(1000):
        library.fail_allocation(n, *how)
        try:
            function(*arguments)
            outcome = "done"
        except MemoryError:
            outcome = "MemoryError"
        n_failed = library.stop_failing()
        yield outcome
        if n_failed == 0:
            return


def check(function, arguments, title, needs_memory):
    values = tuple(arguments.values())
    own = [value for value in values if not isinstance(value, (int, str, type(None)))]
    counts = [sys.getrefcount(value) for value in own]
    for how in ((1, 0), (1, 1), (0, 0)):
        seen = list(outcomes(getattr(_C, function), values, *how))
        assert seen[-1] == "done", (title, how, seen)
        if how == (1, 1) and needs_memory:
            assert len(seen) > 1 and set(seen[:-1]) == {"MemoryError"}, (title, seen)
    assert counts == [sys.getrefcount(value) for value in own], title
"""
CHILD = (
    PREPARE
    + """
from border_calls import ARGUMENTS, K, M, N, ones, right


def calls():
    for name in ARGUMENTS:
        if not name.startswith("set_"):
            yield name, right(name), name
    many = right("linear") | {"x": ones(600, K), "out": ones(600, N), "tenant_ids": np.zeros(600, int)}
    yield "linear", many, "linear of several passes"
    many = right("linear_transposed") | {"dy": ones(9, N), "out": ones(9, K), "tenant_ids": [0] * 9}
    yield "linear_transposed", many, "linear_transposed of many rows"


for n_threads in (1, 3):
    _C.set_num_threads(n_threads)
    for function, arguments, title in calls():
        check(function, arguments, title, function in ("extract", "linear", "linear_add", "linear_transposed"))
for n in range(2):
    _C.set_num_threads(1)
    library.fail_allocation(n, 1, 0)
    try:
        _C.set_num_threads(2)
        n_threads = 2
    except MemoryError:
        n_threads = 1
    assert library.stop_failing() == 1 and _C.get_num_threads() == n_threads == 1
print("all answered")
"""
)


def run(child, folder):
    """Runs it in a process whose allocations the library may deny."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "what built the extension"
    library = folder / "failing_malloc.so"
    source = TESTS / "failing_malloc.c"
    subprocess.run(
        [compiler, "-std=c11", "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), str(TESTS / "cuda"), str(TESTS.parent), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", child, library], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "all answered\n", done.stderr[-2000:]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the library that denies memory is for glibc")
@pytest.mark.skipif(_C.build_info()["sanitize"], reason="the sanitizers have an allocator of their own")
def test_every_failed_allocation_is_a_memory_error(tmp_path):
    run(CHILD, tmp_path)
