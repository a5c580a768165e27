"""Every function of bitdelta._C that runs on a GPU, called rightly and wrongly: errors, leaks, failing allocations.

On the emulated build: memory is NumPy's there, and a kernel that leaves what it was lent is found.
"""

import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from bitdelta import _C, DeviceError

if not _C.cuda_is_emulated():
    pytest.skip("needs a build with BITDELTA_CUDA=emulate", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_leaks
import test_memory
from cuda_calls import ARGUMENTS, WRONG, K, M, N, T, call, make_deltas, make_plan, ones, right, slot
from dlpack_producer import Producer

LAUNCHES = [name for name in ARGUMENTS if name not in ("CudaDeltas", "cuda_workspace_bytes", "cuda_position")]


def test_every_function_is_here():
    assert set(ARGUMENTS) == {name for name in dir(_C) if name.lower().startswith("cuda")} - {
        "cuda_missing",
        "cuda_is_emulated",
    }


@pytest.mark.parametrize("function", ARGUMENTS)
def test_right_arguments_are_accepted_and_too_few_or_many_are_not(function):
    call(function)
    given = list(right(function).values())
    for wrong in (given[:-1], [*given, None]):
        with pytest.raises(TypeError):
            getattr(_C, function)(*wrong)


@pytest.mark.parametrize(
    "function, argument, value, exception, words", [c[1:] for c in WRONG], ids=[c[0] for c in WRONG]
)
def test_a_wrong_argument_is_named(function, argument, value, exception, words):
    with pytest.raises(exception) as caught:
        call(function, **{argument: value})
    for word in words:
        assert word in str(caught.value)
    if isinstance(value, Producer):
        assert value.exported == value.deleted


def test_every_output_must_lie_apart():
    outputs = {
        "cuda_quantize": ("q", "exponents"),
        "cuda_linear_transposed": ("out", "dcolumn", "workspace"),
        "cuda_row_gradient": ("drow", "workspace"),
        "cuda_extract": ("sign", "scale", "column", "bad", "workspace"),
        "cuda_multiply": ("out", "workspace"),
        "cuda_fit_signs": ("sign", "workspace"),
        "cuda_sweep": ("pull", "sign"),
        "cuda_plan": ("plan",),
    }
    for function, names in outputs.items():
        for name in names:
            given = right(function)
            others = [
                other
                for other, value in given.items()
                if other != name and isinstance(value, np.ndarray) and value.nbytes >= 4
            ]
            for other in others:
                changed = right(function)
                n_bytes = max(changed[name].nbytes, changed[other].nbytes) + 512
                memory = np.zeros(n_bytes, np.uint8)
                memory = memory[-memory.ctypes.data % 256 :]
                for each in (name, other):
                    own = changed[each]
                    changed[each] = memory[: own.nbytes].view(own.dtype).reshape(own.shape)
                with pytest.raises(BufferError, match="expected memory of its own, got some that overlaps"):
                    getattr(_C, function)(*(changed[each] for each in ARGUMENTS[function]))


@pytest.mark.parametrize("protocol", ["legacy", "versioned"])
def test_capsules_are_given_back_once(protocol):
    x = Producer(ones(M, K), protocol)
    for n in range(1, 4):
        call("cuda_quantize", x=x)
        assert x.exported == x.deleted == n
    with pytest.raises(ValueError):
        call("cuda_quantize", x=x, column=ones(K + 1))
    assert x.exported == x.deleted == 4
    sign, scale, column = (Producer(part, protocol) for part in slot())
    deltas = _C.CudaDeltas(np.zeros((T, 4), np.int64), ((sign, scale, column), None), (N, K))
    assert (sign.exported, sign.deleted) == (1, 0)
    del deltas
    assert sign.deleted == scale.deleted == column.deleted == 1


def test_producers_that_break_their_promises_are_refused():
    class Evil(Producer):
        def __dlpack_device__(self):
            raise RuntimeError("no device")

    with pytest.raises(BufferError, match="x: its DLPack export failed: no device"):
        call("cuda_quantize", x=Evil(ones(M, K)))

    class Liar(Producer):
        def __dlpack__(self, **keywords):
            return object()

    with pytest.raises(BufferError, match="x: "):
        call("cuda_quantize", x=Liar(ones(M, K)))


def test_an_evicted_slot_and_ids_out_of_range_give_nan_rows():
    out, ids = ones(M, N), np.array([1, 5, -2])
    plan = right("cuda_plan")["plan"]
    _C.cuda_plan(plan, ids, T)
    call("cuda_linear", plan=plan, parts=((out, None, None, make_deltas()),))
    assert np.isnan(out).all()
    call("cuda_linear", plan=make_plan(), parts=((out, None, None, make_deltas()),))
    assert np.isfinite(out[:2]).all() and np.isnan(out[2]).all()


@pytest.mark.parametrize("function", sorted({*LAUNCHES} - {"cuda_open_blas"}))
def test_a_gpu_older_than_the_targets_is_refused(function, monkeypatch):
    monkeypatch.setenv("BITDELTA_EMULATION_CAPABILITY", "75")
    with pytest.raises(DeviceError, match="GPU 0 has compute capability 7.5, the kernels need 8.0 or newer"):
        call(function)
    monkeypatch.delenv("BITDELTA_EMULATION_CAPABILITY")
    call(function)


# ---- leaks and failing allocations ----


@pytest.mark.parametrize("function", ARGUMENTS)
def test_success_keeps_nothing(function):
    n = 10 if function in LAUNCHES else 5000
    test_leaks.run(test_leaks.SUCCESS, function, "cuda_calls", str(n))


@pytest.mark.parametrize("function", sorted({case[1] for case in WRONG}))
def test_failure_keeps_nothing(function):
    test_leaks.run(test_leaks.FAILURE, function, "cuda_calls", "0", "300")


FAILING = (
    test_memory.PREPARE
    + """
from cuda_calls import ARGUMENTS, right

for name in ARGUMENTS:
    if name != "cuda_extract":
        check(name, right(name), name, name in ("CudaDeltas", "cuda_quantize", "cuda_linear"))
small = {"planes": 1, "form": 1, "column": None, "sign": right("cuda_extract")["sign"][:1]}
small = right("cuda_extract") | small | {"scale": right("cuda_extract")["scale"][:1]}
check("cuda_extract", small, "cuda_extract", True)
print("all answered")
"""
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the library that denies memory is for glibc")
@pytest.mark.skipif(_C.build_info()["sanitize"], reason="the sanitizers have an allocator of their own")
def test_every_failed_allocation_is_a_memory_error(tmp_path):
    test_memory.run(FAILING, tmp_path)
