"""The base product by cuBLAS: what the library is called with, where it is found, and what is said without one.

The library is cublas_double.c. csrc/cuda_blas.c is C alone, so it is also called without Python and without kernels.
"""

import ctypes
import subprocess
import sys
from ctypes import POINTER, Structure, byref, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import pytest
from conftest import CUBLAS_DOUBLE, DTYPES, bits, compile_library, tensor
from kernel_calls import Matrix, matrix

import bitdelta
from bitdelta import _C, cublas, cuda
from bitdelta.array import aligned_empty, to_float32

ROOT = Path(__file__).parent.parent.parent
OK, ARGUMENT, CUDA = 0, 3, 4  # bd_status
REFUSED = 13  # CUBLAS_STATUS_EXECUTION_FAILED


class Log(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("n_handles", "n_products")],
        *[(name, c_void_p) for name in ("stream", "workspace")],
        ("workspace_bytes", c_int64),
        *[
            (name, c_int32)
            for name in ("m", "n", "k", "lda", "ldb", "ldc", "op_a", "op_b", "type", "refuses")
        ],
    ]


class Args(Structure):
    _fields_ = [
        *[(name, POINTER(Matrix)) for name in ("a", "b", "out")],
        ("is_transposed", c_int),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blas")
    output = folder / "cuda_blas.so"
    source = ROOT / "csrc" / "cuda_blas.c"
    warnings = ["-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", "-pthread", "-ldl"]
    made = ctypes.CDLL(str(compile_library(source, output, *warnings)))
    made.bd_blas_open.argtypes = [ctypes.c_char_p, c_int, POINTER(c_void_p), ctypes.c_char_p]
    made.bd_blas_close.argtypes = [c_void_p]
    made.bd_blas_is_ready.argtypes = [c_void_p, c_int]
    made.bd_blas_multiply.argtypes = [c_void_p, c_int, c_void_p, POINTER(Args), ctypes.c_char_p]
    return made


@pytest.fixture
def double(tmp_path):
    """A double of the test's own: its path and what it notes."""
    path = compile_library(CUBLAS_DOUBLE, tmp_path / "libcublas.so.13")
    return str(path), Log.in_dll(ctypes.CDLL(str(path)), "cublas_double")


@pytest.fixture
def blas(library, double):
    opened, message = c_void_p(), ctypes.create_string_buffer(512)
    assert library.bd_blas_open(double[0].encode(), 0, byref(opened), message) == OK, message.value
    yield opened
    library.bd_blas_close(opened)
    assert double[1].n_handles == 0


def multiply(library, blas, a, b, is_transposed, device=0, stream=None, workspace=None):
    n = b.shape[0] if is_transposed else b.shape[1]
    out = np.full((a.shape[0], n + 3), 9, np.float32)[:, :n]
    workspace = aligned_empty((512,), np.uint8, 256) if workspace is None else workspace
    matrices = [ctypes.pointer(matrix(each)) for each in (a, b, out)]
    args = Args(*matrices, is_transposed, workspace.ctypes.data, workspace.nbytes)
    message = ctypes.create_string_buffer(512)
    status = library.bd_blas_multiply(blas, device, stream, byref(args), message)
    return status, out, message.value.decode()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_go_to_cublas_as_columns(library, blas, double, rng, dtype, is_transposed):
    a, b = rng.normal(size=(3, 9)), rng.normal(size=(5, 9) if is_transposed else (9, 5))
    a, b = tensor(a, dtype)[:, :7], tensor(b, dtype)[:, :7] if is_transposed else tensor(b, dtype)[:7]
    workspace = aligned_empty((1024,), np.uint8, 256)
    status, out, _ = multiply(library, blas, a, b, is_transposed, 2, 0x1230, workspace)
    assert status == OK
    exact = [to_float32(each).astype(np.float64) for each in (a, b)]
    expected = exact[0] @ (exact[1].T if is_transposed else exact[1])
    assert np.allclose(out, expected, rtol=1e-6, atol=1e-6)
    assert np.all(out.base[:, 5:] == 9)
    log = double[1]
    assert (log.stream, log.workspace, log.workspace_bytes) == (0x1230, workspace.ctypes.data, 1024)
    assert (log.m, log.n, log.k) == (5, 3, 7)
    assert (log.lda, log.ldb, log.ldc) == (9 if is_transposed else 5, 9, 8)
    assert (log.op_a, log.op_b) == (int(is_transposed), 0)


def test_a_gpu_has_one_handle_and_every_product_its_stream(library, blas, double):
    x = np.ones((2, 2), np.float32)
    assert not library.bd_blas_is_ready(blas, 1)
    for device, stream in ((1, 0x10), (1, 0x20), (0, 0x30)):
        assert multiply(library, blas, x, x, False, device, stream)[0] == OK
        assert double[1].stream == stream
        assert library.bd_blas_is_ready(blas, device)
    assert (double[1].n_handles, double[1].n_products) == (2, 3)
    for device in (-1, 64):
        assert multiply(library, blas, x, x, False, device)[0] == ARGUMENT
        assert not library.bd_blas_is_ready(blas, device)


def test_what_cublas_refuses_is_said_in_its_words(library, blas, double):
    x = np.ones((2, 2), np.float32)
    double[1].refuses = REFUSED
    status, _, said = multiply(library, blas, x, x, False)
    assert (status, said) == (CUDA, "cublasGemmEx: the GPU program failed to execute")
    double[1].refuses = 0
    misaligned = aligned_empty((512,), np.uint8, 256)[16:]
    status, _, said = multiply(library, blas, x, x, False, workspace=misaligned)
    assert (status, said) == (CUDA, "cublasSetWorkspace: an unsupported value or parameter was passed")
    assert multiply(library, blas, x, x, False)[0] == OK


def test_what_is_no_cublas_is_not_opened(library, tmp_path):
    opened, message = c_void_p(), ctypes.create_string_buffer(512)
    source = tmp_path / "old.c"
    source.write_text("int cublasCreate_v2, cublasDestroy_v2, cublasSetStream_v2, cublasGemmEx;")
    old = compile_library(source, tmp_path / "libcublas.so.9")
    text = tmp_path / "libcublas.so.13"
    text.write_text("no library")
    for name, is_loaded, said in (
        (old, 0, "it has no cublasSetWorkspace_v2"),
        (text, 0, "libcublas.so.13: "),
        (tmp_path / "none.so", 0, "none.so: cannot open shared object file"),
        ("libcublas_that_is_not_there.so", 1, "not loaded"),
    ):
        assert library.bd_blas_open(str(name).encode(), is_loaded, byref(opened), message) == CUDA
        assert said in message.value.decode()
        assert opened.value is None


# ---- where it is looked for ----


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Folders as the packages and the toolkit make them; nothing else is found."""
    monkeypatch.setattr(_C, "cuda_is_emulated", lambda: False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), str(tmp_path / "other")])
    for name in ("BITDELTA_CUBLAS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    files = [
        "site/nvidia/cublas/lib/libcublas.so.12",
        "other/nvidia/cu13/lib/libcublas.so.13",
        "cuda/lib64/libcublas.so.12",
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    return [str(tmp_path / name) for name in files]


def test_places_are_tried_in_the_documented_order(places, monkeypatch):
    sonames = ["libcublas.so.13", "libcublas.so.12"]
    found = list(cublas.candidates())
    assert found[:7] == [
        *[(name, True) for name in sonames],
        *[(name, False) for name in places[:2]],
        *[(name, False) for name in sonames],
        (places[2], False),
    ]
    monkeypatch.setenv("BITDELTA_CUBLAS", "/opt/libcublas.so")
    assert list(cublas.candidates()) == [("/opt/libcublas.so", False)]


def test_the_error_says_what_every_place_lacks(places, monkeypatch):
    monkeypatch.setattr(cublas, "_is_open", False)
    monkeypatch.setattr(_C, "cuda_open_blas", lambda name, is_loaded: f"wrong {is_loaded}")
    with pytest.raises(bitdelta.DeviceError) as caught:
        cublas.open_first()
    said = str(caught.value)
    assert "pip packages nvidia-cublas" in said and "BITDELTA_CUBLAS may name one" in said
    for name in places:
        assert f"{name}: wrong False" in said
    assert "libcublas.so.13: wrong True" in said


FIRST = """
import ctypes, sys
from pathlib import Path
import numpy as np
from bitdelta import _C, cublas, cuda

how, *paths = sys.argv[1:]
doubles = {}
if how == "loaded":
    doubles[paths[0]] = ctypes.CDLL(paths[0])
sys.path = [str(Path(path).parents[3]) for path in paths[1:]] if how != "variable" else []
emulated = _C.cuda_is_emulated
_C.cuda_is_emulated = lambda: how == "variable"
x = np.ones((2, 3), np.float32)
assert np.array_equal(cuda.multiply(x, x, True), np.full((2, 2), 3, np.float32))
with open("/proc/self/maps") as maps:
    print(sorted({line.split()[-1] for line in maps if "libcublas.so" in line}))
for path in paths:
    library = doubles.get(path) or ctypes.CDLL(path, mode=4 | 2)  # RTLD_NOLOAD: as it is
    print(path, ctypes.c_int64.in_dll(library, "cublas_double").value)
"""


@pytest.mark.parametrize("how", ["loaded", "package", "variable"])
def test_the_first_that_opens_multiplies(how, tmp_path, monkeypatch):
    if not _C.cuda_is_emulated():
        pytest.skip("needs a build with BITDELTA_CUDA=emulate")
    places = {"loaded": "torch/lib", "package": "site/nvidia/cu13/lib", "variable": "own"}
    for place in places.values():
        (tmp_path / place).mkdir(parents=True)
    path = compile_library(CUBLAS_DOUBLE, tmp_path / places[how] / "libcublas.so.13")
    paths = [path]
    if how == "package":
        monkeypatch.delenv("BITDELTA_CUBLAS")
        paths = [path, path]
    elif how == "loaded":
        monkeypatch.delenv("BITDELTA_CUBLAS")
    else:
        monkeypatch.setenv("BITDELTA_CUBLAS", str(path))
    done = subprocess.run(
        [sys.executable, "-c", FIRST, how, *map(str, paths)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[:2] == [str([str(path)]), f"{path} 1"], done.stderr[-2000:]


# ---- through the package ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_rows_have_the_bits_of_cublas_alone(device, rng, dtype):
    base, finetuned, x = (rng.normal(size=shape) for shape in ((40, 300), (40, 300), (5, 300)))
    delta = bitdelta.extract(tensor(base, dtype), tensor(finetuned, dtype))
    weight, x = (tensor(values, dtype, "torch").to(device.name) for values in (base, x))
    alone = cuda.multiply(x, weight, is_transposed=True)
    y = bits(cuda.linear(x, weight, [delta], [-1, 0, -1, 0, -1]).cpu())
    rounded = bits(alone.to(x.dtype).cpu())
    assert np.array_equal(y[::2], rounded[::2])
    assert not np.array_equal(y[1::2], rounded[1::2])
    assert np.array_equal(bits(cuda.linear(x, weight, [], [-1] * 5).cpu()), rounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_takes_any_strides_and_dtypes(device, rng, dtype):
    a, b = rng.normal(size=(3, 300)), rng.normal(size=(300, 40))
    x, weight = (tensor(values, dtype, "torch").to(device.name) for values in (a, b))
    expected = cuda.multiply(x, weight)
    assert np.allclose(expected.cpu(), x.cpu().double() @ weight.cpu().double(), rtol=1e-4, atol=1e-4)
    turned = weight.T.contiguous()
    for other, is_transposed in ((turned, True), (turned.T, False), (weight.T, True)):
        assert np.allclose(cuda.multiply(x, other, is_transposed).cpu(), expected.cpu(), rtol=1e-5, atol=1e-5)
    apart = weight.repeat(1, 2)[:, ::2]
    assert np.allclose(
        cuda.multiply(x.T.contiguous().T, apart).cpu(),
        cuda.multiply(x, apart.contiguous()).cpu(),
        rtol=1e-5,
        atol=1e-5,
    )
    mixed = cuda.multiply(x.float(), weight)
    assert np.allclose(mixed.cpu(), expected.cpu(), rtol=1e-5, atol=1e-5)
    assert cuda.multiply(x[:0], weight).shape == (0, 40)


@pytest.mark.parametrize(
    "place, value, error, said",
    [
        (0, np.zeros((3, 6), np.float32), ValueError, "out: expected [M, N] = [3, 5], got [3, 6]"),
        (0, np.zeros((3, 5), np.float16), TypeError, "out: expected float32, got float16"),
        (1, np.zeros((3, 8), np.float32)[:, ::2], BufferError, "a: expected rows of contiguous columns"),
        (2, np.zeros((5, 8), np.float32), ValueError, "b: expected [N, K] = [?, 7], got [5, 8]"),
        (2, np.zeros((5, 7), np.float16), TypeError, "b: expected the dtype of a"),
        (3, 1, TypeError, "is_transposed: expected a bool, got int"),
        (4, np.zeros(600, np.uint8)[1:500], BufferError, "workspace: expected memory aligned to 256"),
        (4, None, TypeError, "workspace: expected"),
    ],
)
def test_bad_arguments_are_named(device, place, value, error, said):
    if not _C.cuda_is_emulated():
        pytest.skip("the values are the host's")
    cublas.open_first()
    given = [np.zeros(shape, np.float32) for shape in ((3, 5), (3, 7), (5, 7))]
    given += [True, aligned_empty((512,), np.uint8, 256)]
    _C.cuda_multiply(*given)
    given[place] = value
    with pytest.raises(error) as caught:
        _C.cuda_multiply(*given)
    assert said in str(caught.value)


def test_an_output_that_overlaps_an_input_is_refused(device):
    if not _C.cuda_is_emulated():
        pytest.skip("the values are the host's")
    x = np.zeros((5, 5), np.float32)
    with pytest.raises(BufferError, match="out: expected memory of its own, got some that overlaps a"):
        _C.cuda_multiply(x, x, x.copy(), True, aligned_empty((512,), np.uint8, 256))


CAPTURED = """
import os
import numpy as np
import bitdelta
from bitdelta import cuda

x = np.ones((2, 300), np.float32)
delta = bitdelta.extract(np.zeros((5, 300), np.float32), np.ones((5, 300), np.float32))
for call in (lambda: cuda.multiply(x, x, True), lambda: cuda.table([delta], x)):
    os.environ["BITDELTA_EMULATION_CAPTURE"] = "1"
    try:
        call()
    except bitdelta.DeviceError as error:
        print(error)
    del os.environ["BITDELTA_EMULATION_CAPTURE"]
    call()
os.environ["BITDELTA_EMULATION_CAPTURE"] = "1"
print(cuda.linear(x, np.ones((5, 300), np.float32), [delta], [0, -1])[:, 0])
"""


def test_what_must_be_created_is_refused_while_a_stream_is_captured():
    if not _C.cuda_is_emulated():
        pytest.skip("needs a build with BITDELTA_CUDA=emulate")
    done = subprocess.run([sys.executable, "-c", CAPTURED], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr[-2000:]
    assert "cannot happen while its stream is captured: run one before" in lines[0]
    assert lines[1].startswith("deltas: their table is written")
    assert lines[2] == "[600. 300.]"
