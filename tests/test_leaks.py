"""Nothing is kept after a call, whether it succeeds or fails: references, exports, memory.

Every case runs in a process of its own: 100 calls to warm up, then thousands; the arguments' reference counts must be
what they were, and the process no larger.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from border_calls import ARGUMENTS, WRONG

TESTS = Path(__file__).parent

PREPARE = """
import gc, importlib, resource, sys
from bitdelta import _C
from dlpack_producer import Producer, _alive
calls, n_right, n_wrong = (sys.argv[2:] + ['border_calls', '5000', '500'])[:3]
calls = importlib.import_module(calls)
ARGUMENTS, WRONG, call, right = calls.ARGUMENTS, calls.WRONG, calls.call, calls.right

def kilobytes():
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024

def count(arguments):
    gc.collect()
    counts = [sys.getrefcount(argument) for argument in arguments]
    return [n if n < 100 else 'shared' for n in counts]  # None, types, small ints: others count them too

def run(function, arguments, exception, n):
    for _ in range(n):
        try:
            function(*arguments)
        except exception:
            pass

def check(name, arguments, exception, n):
    function = getattr(_C, name)
    run(function, arguments, exception, min(100, n))
    before, start = count(arguments), kilobytes()
    run(function, arguments, exception, n)
    assert count(arguments) == before, (name, before, count(arguments))
    return kilobytes() - start

def exports(value):  # a Producer keeps its exports on purpose
    return isinstance(value, Producer) or isinstance(value, tuple) and any(map(exports, value))

def stays(grown):  # except under AddressSanitizer, which keeps freed memory for a while
    assert grown < 600 or _C.build_info()['sanitize'], f'{grown} kB'
"""

SUCCESS = (
    PREPARE
    + """
name = sys.argv[1]
arguments = [right(name)[argument] for argument in ARGUMENTS[name]]
grown = check(name, arguments, (), int(n_right))
stays(grown)
"""
)

FAILURE = (
    PREPARE
    + """
grown = 0
for _, name, argument, value, exception, _ in WRONG:
    if name == sys.argv[1] and not exports(value):
        arguments = [(right(name) | {argument: value})[other] for other in ARGUMENTS[name]]
        grown += check(name, arguments, exception, int(n_wrong))
stays(grown)
"""
)

CASES = {
    "torch tensors": """
import torch
x, out = torch.ones(3, 40), torch.ones(3, 20)
for kind in (torch.float32, torch.bfloat16):
    base = right('linear') | {'x': x.to(kind), 'out': out.to(kind), 'tenant_ids': torch.tensor([0, 1, -1])}
    grown = check('linear', [base[name] for name in ARGUMENTS['linear']], (), 5000)
    stays(grown)
""",
    "torch refused": """
import torch
for bad in (torch.ones(3, 40, requires_grad=True), torch.eye(40).to_sparse(), torch.ones(3, 40, dtype=torch.int8)):
    base = right('linear') | {'x': bad}
    grown = check('linear', [base[name] for name in ARGUMENTS['linear']], (BufferError, TypeError), 1000)
    stays(grown)
""",
    "deltas come and go": """
sign, scale, column, shape = right('Delta').values()
grown = check('Delta', [sign, scale, column, shape], (), 20000)
stays(grown)
""",
    "deltas in a cycle": """
import numpy as np, weakref
class Memory(np.ndarray):
    pass
sign, scale, column, shape = right('Delta').values()
def cycle():
    held = scale.view(Memory)
    held.delta = _C.Delta(sign, held, column, shape)
    return weakref.ref(held)
references = [cycle() for _ in range(100)]
gc.collect()
assert [reference() for reference in references] == [None] * 100
""",
    "exports are returned": """
import numpy as np
for protocol in ('legacy', 'versioned'):
    x = Producer(np.ones((3, 40), np.float32), protocol)
    for _ in range(300):
        call('linear', x=x)
    assert x.exported == x.deleted == 300
    for _ in range(300):
        try:
            call('linear', x=x, tenant_ids=[7, 7, 7])
        except ValueError:
            pass
    assert x.exported == x.deleted == 600
""",
    "pools come and go": """
grown = 0
for _ in range(30):
    _C.set_num_threads(4); call('linear'); _C.set_num_threads(1); call('linear')
start = kilobytes()
for _ in range(300):
    _C.set_num_threads(4); call('linear'); _C.set_num_threads(1); call('linear')
stays(kilobytes() - start)
with open('/proc/self/status') as status:
    assert 'Threads:\\t1\\n' in status.read()
""",
}


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS}:{TESTS / 'cuda'}:{TESTS.parent}",
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("function", ARGUMENTS)
def test_success_keeps_nothing(function):
    run(SUCCESS, function)


@pytest.mark.parametrize("function", sorted({case[1] for case in WRONG}))
def test_failure_keeps_nothing(function):
    run(FAILURE, function)


@pytest.mark.parametrize("case", CASES)
def test_keeps_nothing(case):
    run(PREPARE + CASES[case])
