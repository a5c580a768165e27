"""Rules about the C sources and the extension: what compiles, what may be written where, what is visible."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from bitdelta import _C

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.glob("*.c"))
HEADERS = sorted(CSRC.glob("*.h"))
KERNELS = sorted(
    path
    for pattern in ("kernels/*.cu", "kernels/*.h", "csrc/*cuda*.[ch]")
    for path in ROOT.glob(pattern)
    if not path.name.startswith("emulation")
)
BORDER = {"cuda_call", "cuda_deltas", "module", "tensor", "tensor_check", "tensor_dlpack"}
BORDER |= {"py_bytes", "py_calibrate", "py_cuda", "py_delta", "py_linear"}
BORDER |= {"py_cuda_blas", "py_cuda_calibrate", "py_cuda_delta", "py_cuda_gradient", "py_cuda_linear"}
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
SYSTEM = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{np.get_include()}"]
COMPILERS = [compiler for compiler in ("gcc", "clang") if shutil.which(compiler)]


def compiles(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def code(path):
    """The text without comments and string literals."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', " ", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
@pytest.mark.parametrize("standard", ["c11", "c++17"])
def test_headers_compile_alone(path, standard, tmp_path):
    if standard == "c++17" and re.search(
        r"C only|emulation|_Atomic", path.read_text(encoding="utf-8")[:2000]
    ):
        standard = "c11"  # part of one C file; still alone
    suffix, compiler = (".c", "gcc") if standard == "c11" else (".cpp", "g++")
    includer = tmp_path / f"alone{suffix}"
    includer.write_text(f'#include "{path.name}"\n#include "{path.name}"\n')
    flags = [flag for flag in WARNINGS if suffix == ".c" or flag != "-Wconversion"]
    compiles(
        compiler, f"-std={standard}", "-fsyntax-only", *flags, "-Wno-unused", f"-I{CSRC}", *SYSTEM, includer
    )


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_compile_without_a_warning(path, compiler):
    machine = ["-march=x86-64-v2"] if _C.build_info()["flags"].find("x86-64-v2") >= 0 else []
    compiles(compiler, "-std=c11", "-O1", "-fsyntax-only", *WARNINGS, *machine, f"-I{CSRC}", *SYSTEM, path)


@pytest.mark.parametrize("path", [*SOURCES, *HEADERS], ids=lambda path: path.name)
def test_only_the_border_sees_python(path):
    sees = "Python.h" in path.read_text(encoding="utf-8") or '"module.h"' in path.read_text(encoding="utf-8")
    assert not sees or path.stem in BORDER


@pytest.mark.parametrize("path", [*SOURCES, *HEADERS], ids=lambda path: path.name)
def test_nothing_forbidden_is_called(path):
    forbidden = (
        r"\b(exit|abort|_exit|alloca|gets|strcpy|strcat|sprintf|printf|puts|system|rand|srand|setenv)\s*\("
    )
    assert re.findall(forbidden, code(path)) == []
    assert "omp" not in re.findall(r"#\s*pragma\s+(\w+)", path.read_text(encoding="utf-8"))
    assert "PyErr_Print" not in code(path)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_and_their_launchers_neither_allocate_nor_wait(path):
    assert (
        re.findall(r"\b(?:cuda|cu)\w*(?:Malloc|Alloc|Free|[a-z]Synchronize)\w*|\bmalloc\b", code(path)) == []
    )


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem in BORDER], ids=lambda path: path.name)
def test_every_cleared_error_says_why(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "PyErr_Clear()" in line and "/*" not in line] == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem in BORDER], ids=lambda path: path.name)
def test_calls_come_in_pairs(path):
    text = code(path)
    assert text.count("Py_BEGIN_ALLOW_THREADS") == text.count("Py_END_ALLOW_THREADS")
    assert text.count("context_enter(") == text.count("context_leave(")
    assert len(re.findall(r"\bSTATE_LOCK\(", text)) <= len(re.findall(r"\bSTATE_UNLOCK\(", text))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem in BORDER], ids=lambda path: path.name)
def test_nothing_of_python_is_called_without_the_gil(path):
    for block in re.findall(r"Py_BEGIN_ALLOW_THREADS(.*?)Py_END_ALLOW_THREADS", code(path), re.DOTALL):
        assert re.findall(r"\bPy[A-Z]\w*|\btensor_(?!n_bytes)\w+|\bPy_(?!None)\w+", block) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lines_and_functions_stay_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 600
    start = None
    for number, line in enumerate(lines, 1):
        if line == "{":
            start = number
        elif line == "}" and start is not None:
            assert number - start <= 90, f"{path.name}:{start}"
            start = None


def test_only_the_init_function_is_exported():
    nm = shutil.which("nm")
    assert nm, "nm is part of binutils, as is the linker"
    command = (
        [nm, "-gU", _C.__file__] if sys.platform == "darwin" else [nm, "-D", "--defined-only", _C.__file__]
    )
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {line.split()[-1].lstrip("_") for line in listed if line}
    if _C.build_info()["sanitize"]:
        names = {name for name in names if "asan" not in name and "ubsan" not in name}
    assert names == {"PyInit__C"}


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is part of binutils on Linux")
@pytest.mark.skipif(_C.build_info()["sanitize"], reason="the sanitizers add data of their own")
@pytest.mark.skipif(_C.cuda_is_emulated(), reason="the emulation knows what memory it was lent")
def test_no_state_outside_the_module_but_the_tables_of_kernels():
    listed = subprocess.run(["objdump", "-t", _C.__file__], capture_output=True, text=True, check=True).stdout
    found = {
        line.split()[-1].partition(".")[0]
        for line in listed.splitlines()
        if re.search(r" \.(data|bss)\t", line)
    }
    found = {name for name in found if not name.startswith("__")} - {"completed"}
    # What nvcc registers kernels by, and the state of its runtime.
    found = {
        name
        for name in found
        if not re.match(r"libcudart_static|fatbinData|_Z.*(__device_stub__|__cudaFat|__nv_)", name)
    }
    of_dispatch = {"tables", "names", "once", "amx_once", "amx_permitted"}  # filled once
    of_python = {
        "module_def", "module_functions", "module_slots", "delta_spec", "delta_slots", "delta_getset",
        "delta_functions", "calibrate_functions", "product_functions", "byte_functions", "cuda_functions",
        "cuda_deltas_spec", "deltas_slots", "deltas_getset", "cuda_product_functions", "cuda_gradient_functions",
        "cuda_delta_functions", "cuda_blas_functions", "cuda_calibrate_functions",
        "PyArray_API",
        "PyArray_RUNTIME_VERSION",
    }  # fmt: skip
    assert found - of_dispatch - of_python == set()


def python(script):
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_import_brings_no_torch():
    done = python(
        "import sys, bitdelta; print([m for m in ('torch', 'transformers', 'typer') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_sub_interpreter_imports_or_refuses():
    done = python(
        "import bitdelta, _testcapi\n"
        "code = '''\n"
        "import sys\n"
        "try:\n"
        "    import bitdelta._C\n"
        "    bitdelta._C.crc32c(b'x')\n"
        "except ImportError as error:\n"
        "    assert 'interpreter' in str(error), error\n"
        "'''\n"
        "status = _testcapi.run_in_subinterp(code)\n"
        "import numpy as np\n"
        "bitdelta.extract(np.zeros((1, 1), 'f'), np.zeros((1, 1), 'f'))\n"
        "print('alive', status)"
    )
    if "No module named '_testcapi'" in done.stderr:
        pytest.skip("this Python has no _testcapi")
    assert done.stdout.startswith("alive"), done.stderr


def test_an_unknown_isa_in_the_environment_stops_the_import():
    done = python("import os; os.environ['BITDELTA_ISA'] = 'sse9'; import bitdelta")
    assert done.returncode != 0
    assert "ImportError: BITDELTA_ISA: expected one of" in done.stderr
    assert "got 'sse9'" in done.stderr


def test_the_isa_of_the_environment_is_used():
    done = python(
        "import os; os.environ['BITDELTA_ISA'] = 'generic'; from bitdelta import _C; print(_C.isa())"
    )
    assert done.stdout.strip() == "generic", done.stderr


def test_the_stub_names_what_the_extension_has():
    stub = (ROOT / "bitdelta" / "_C.pyi").read_text(encoding="utf-8")
    named = set(re.findall(r"^(?:def|class) ([A-Za-z]\w*)", stub, re.MULTILINE)) | {"STREAM_ROWS"}
    if _C.build_info()["cuda"].startswith("not built"):
        named.remove("CudaDeltas")
    assert named == {name for name in dir(_C) if not name.startswith("_")}
