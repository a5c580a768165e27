"""What the tests share: seeds, instruction sets, kinds of tensors, tolerances.

The delta terms are integers, so tests of them compare with `==`; the tolerances are for what is summed in floats.
"""

import os
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

import bitdelta
from bitdelta import _C
from bitdelta.array import from_float32, to_float32

DTYPES = ("float32", "float16", "bfloat16")
CUBLAS_DOUBLE = Path(__file__).parent / "cuda" / "cublas_double.c"
KINDS = ("numpy", "torch", "ml_dtypes")

# Relative to the largest value of the row. fp32 sums of a few thousand products err by some 1e-6; one rounding to
# the 11 bits of fp16 or the 8 bits of bf16 by at most half a unit, and a unit where the sums round apart.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture
def rng(request):
    """Random numbers of the test's own: the same whatever else runs."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=_C.isas())
def isa(request):
    """Every instruction set that this machine can run or emulate, in use while the test runs."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request, tmp_path_factory):
    """The functions of csrc/cuda.h, on the emulation and on a GPU (cuda/kernel_calls.py)."""
    require_kernels(request.param)
    import kernel_calls

    folder = tmp_path_factory.mktemp("kernels")
    if request.param == "cuda":
        built = os.environ.get("BITDELTA_TEST_KERNELS")  # by kernel_calls.py, for several runs
        return kernel_calls.OnGpu(built or kernel_calls.build_for_gpu(folder))
    return kernel_calls.Kernels(kernel_calls.build(folder))


@pytest.fixture(autouse=True)
def _default_threads():
    """A test that sets the number of threads leaves no trace."""
    yield
    bitdelta.set_num_threads(None)


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory):
    """Where the studies of the whole session keep their models."""
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="session")
def tiny_pair(study_folder):
    """A base and its full fine-tune, trained in some seconds."""
    from bitdelta.study.pair import SIZES, make_pair

    return make_pair(SIZES["tiny"], 0, study_folder)


def tensor(values, dtype="float32", kind="numpy"):
    """fp32 values rounded to a dtype, as NumPy (bf16 as BFloat16Array), ml_dtypes or torch."""
    rounded = from_float32(np.asarray(values, np.float32), dtype)
    if kind == "ml_dtypes":
        ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is part of the test extra")
        return rounded.view(np.uint16).view(ml_dtypes.bfloat16) if dtype == "bfloat16" else rounded
    if kind == "torch":
        import torch

        return torch.from_numpy(np.array(to_float32(rounded))).to(getattr(torch, dtype))
    return rounded


def bits(array):
    """The array's bits as unsigned integers, so that -0.0 and NaN compare too."""
    if type(array).__module__ == "torch":
        import torch

        array = array.view(torch.uint16 if array.dtype != torch.float32 else torch.uint32).numpy()
    array = np.ascontiguousarray(np.asanyarray(array))
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def pair(rng, n, k, dtype="float32", size=0.02):
    """A base weight [N, K] and a fine-tune of it."""
    base = rng.normal(size=(n, k)).astype(np.float32)
    finetuned = base + rng.normal(scale=size, size=(n, k)).astype(np.float32)
    return tensor(base, dtype), tensor(finetuned, dtype)


# ---- the GPU: a real one by torch, or the emulation, where its memory is NumPy's ----


def require_kernels(kind):
    """Skips the test where this build, or this machine, has no kernels of a kind: "emulated" or "cuda"."""
    if kind == "emulated":
        if not _C.cuda_is_emulated():
            pytest.skip("needs a build with BITDELTA_CUDA=emulate")
        return
    if _C.cuda_is_emulated():
        pytest.skip("needs a build for GPUs, and a GPU; this one's kernels are emulated")
    if (missing := _C.cuda_missing()) is not None:
        pytest.skip(f"needs a GPU: {missing}")


class Emulated:
    name = "cpu"  # of torch
    float32 = np.float32

    def put(self, array):
        return np.ascontiguousarray(array)

    def get(self, array):
        return array


class Gpu:
    name = "cuda"

    @property
    def float32(self):
        import torch

        return torch.float32

    def put(self, array):
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).cuda()

    def get(self, tensor):
        return tensor.cpu().numpy()


@pytest.fixture(scope="session", autouse=True)
def _cublas_double(tmp_path_factory):
    """What emulated kernels multiply by, here and in child processes."""
    if _C.cuda_is_emulated():
        library = compile_library(CUBLAS_DOUBLE, tmp_path_factory.mktemp("cublas") / "libcublas.so.13")
        os.environ["BITDELTA_CUBLAS"] = str(library)


def compile_library(source, output, *flags):
    """A C file as a shared library whose soname is its name."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "what built the extension"
    options = ["-std=c11", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-Wl,-soname,{output.name}"]
    subprocess.run([compiler, *options, source, "-o", output, *flags], check=True)
    return output


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Puts NumPy arrays where kernels find them (`put`), and gets them back (`get`)."""
    require_kernels(request.param)
    return Gpu() if request.param == "cuda" else Emulated()
