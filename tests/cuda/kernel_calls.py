"""The kernels called as csrc/cuda.h says, by ctypes: "device memory" is NumPy's, lent for a call.

The emulation reads it as it is. A GPU does too, once the driver has pinned and mapped the pages it lies in.

    python tests/cuda/kernel_calls.py FOLDER     builds FOLDER/kernels.so for the visible GPUs
"""

import ctypes
import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

from bitdelta.array import aligned_empty, dtype_name
from bitdelta.delta import Delta

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "kernels"))
import toolchain

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
FORMS = {"tensor": 0, "row": 1, "rank1": 2}
NO_BAD = 2**64 - 1


class Context(Structure):
    _fields_ = [("stream", c_void_p), ("n_processors", c_int), ("capability", c_int)]


class Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int),
        ("n_rows", c_int64),
        ("n_columns", c_int64),
        ("row_stride", c_int64),
    ]


class DeltaOnDevice(Structure):
    _fields_ = [
        ("sign", c_void_p),
        ("row", c_void_p),
        ("column", c_void_p),
        ("N", c_int64),
        ("K", c_int64),
        ("P", c_int),
    ]


class FitArgs(Structure):
    _fields_ = [
        ("d", POINTER(Matrix)),
        ("factor", c_void_p),
        ("order", c_void_p),
        ("P", c_int),
        ("row", c_void_p),
        ("column", c_void_p),
        ("sign", c_void_p),
    ]


class SweepArgs(Structure):
    _fields_ = [
        ("pull", c_void_p),
        ("hessian", c_void_p),
        ("is_diagonal", c_int),
        ("N", c_int64),
        ("K", c_int64),
        ("P", c_int),
        ("row", c_void_p),
        ("column", c_void_p),
        ("sign", c_void_p),
    ]


class Part(Structure):
    _fields_ = [
        ("deltas", c_void_p),
        ("N", c_int64),
        ("product", c_void_p),
        ("product_stride", c_int64),
        ("add", c_int),
        ("bias", c_void_p),
        ("bias_dtype", c_int),
        ("y", Matrix),
    ]


class LinearArgs(Structure):
    _fields_ = [
        ("x", POINTER(Matrix)),
        ("plan", c_void_p),
        ("n_deltas", c_int64),
        ("max_planes", c_int),
        ("has_columns", c_int),
        ("max_rows", c_int64),
        ("n_parts", c_int),
        ("parts", Part * 4),
        ("workspace", c_void_p),
    ]


class GradientArgs(Structure):
    _fields_ = [
        ("dy", POINTER(Matrix)),
        ("x", POINTER(Matrix)),
        ("plan", c_void_p),
        ("deltas", c_void_p),
        ("n_deltas", c_int64),
        ("max_planes", c_int),
        ("has_columns", c_int),
        ("K", c_int64),
        ("g", POINTER(Matrix)),
        ("drow", c_void_p),
        ("dcolumn", c_void_p),
        ("workspace", c_void_p),
    ]


TABLE = np.dtype([("sign", np.uint64), ("row", np.uint64), ("column", np.uint64), ("P", np.int64)])


@dataclasses.dataclass
class PartOfCall:
    """One weight of a call of `Kernels.linear`."""

    deltas: list
    y: np.ndarray
    product: np.ndarray | None = None
    bias: np.ndarray | None = None
    add: bool = False
    before: np.ndarray | None = None  # for the test: y before the call


def build(folder):
    """Compiles kernels/ for the emulation into a library in `folder`."""
    sources = [*toolchain.kernel_sources(), *toolchain.emulation_sources()]
    objects = [str(folder / f"{Path(source).name}.o") for source in sources]
    compiler = toolchain.cxx()
    commands = [
        [*toolchain.emulation_command(compiler, source, output), "-Werror"]
        for source, output in zip(sources, objects, strict=True)
    ]
    return link(commands, [*compiler, "-shared", *objects, "-pthread"], folder, 2)


def build_for_gpu(folder, archs=None, names=None):
    """Compiles kernels/ by nvcc for the visible GPUs, with functions that ctypes finds; `names`: these files alone."""
    nvcc = toolchain.find_nvcc()
    archs = toolchain.visible_archs() if archs is None else archs
    assert archs, "nvidia-smi shows no GPU"
    every = toolchain.kernel_sources()
    sources = [source for source in every if names is None or Path(source).name in names]
    sources = [*sources, str(Path(__file__).parent / "host_memory.cu")]
    objects = [str(folder / f"{Path(source).name}.o") for source in sources]
    commands = [
        toolchain.nvcc_command(nvcc, archs, source, output, visibility="default")
        for source, output in zip(sources, objects, strict=True)
    ]
    return link(commands, [nvcc, "-shared", *objects], folder, os.cpu_count())


def link(commands, linker, folder, n_jobs):
    """Runs the commands side by side, then the linker; the library's path."""
    with ThreadPoolExecutor(n_jobs) as pool:
        for done in pool.map(
            lambda command: subprocess.run(command, capture_output=True, text=True, cwd=toolchain.ROOT),
            commands,
        ):
            assert done.returncode == 0, done.stderr[-3000:]
    library = folder / "kernels.so"
    subprocess.run([*linker, "-o", str(library)], check=True)
    return library


def bytes_of(array):
    """The array's memory: its first byte's address, and how many."""
    first, end = np.lib.array_utils.byte_bounds(np.asarray(array))
    return first, end - first


class Kernels:
    """The functions of csrc/cuda.h. What they write is checked against what the arrays hold."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.bd_gpu_message.restype = ctypes.c_char_p
        self.context = Context(None, 2, 80)
        for name in ("plan", "linear_workspace", "gradient_workspace", "extract_workspace", "fit_workspace"):
            function = getattr(self.library, f"bd_cuda_{name}_bytes", None)
            if function is not None:
                function.restype = c_size_t

    def has(self, capability):
        """Whether kernels chosen for a compute capability run here."""
        return True

    # calls

    def call(self, name, *arguments, reads=(), writes=()):
        """bd_cuda_<name>(context, *arguments) with these arrays lent; raises where it fails."""
        loans = [(*bytes_of(array), 0) for array in reads if array is not None and array.size]
        loans += [(*bytes_of(array), 1) for array in writes if array is not None and array.size]
        loans = [(c_void_p(address), c_size_t(n), c_int(flag)) for address, n, flag in loans]
        for loan in loans:
            assert self.library.bd_gpu_lend(*loan) == 0
        try:
            status = getattr(self.library, f"bd_cuda_{name}")(byref(self.context), *arguments)
        finally:
            for loan in loans:
                self.library.bd_gpu_take_back(*loan)
        self.check(name, status)

    def check(self, name, status):
        if status == 4:
            raise RuntimeError(self.library.bd_gpu_message().decode())
        if status:
            raise ValueError(f"bd_cuda_{name}: status {status}")

    def workspace(self, name, *arguments):
        n_bytes = getattr(self.library, f"bd_cuda_{name}_bytes")(*arguments)
        memory = aligned_empty(((n_bytes + 3) // 4 + 64,), np.uint32)
        start = (-memory.ctypes.data % 256) // 4
        memory[...] = 0xA5A5A5A5
        return memory[start : start + (n_bytes + 3) // 4]

    # operations

    def plan(self, ids, n_deltas):
        ids = np.ascontiguousarray(ids, np.int64)
        plan = self.workspace("plan", c_int64(len(ids)), c_int64(n_deltas))
        self.call(
            "plan",
            pointer(ids),
            c_int64(len(ids)),
            c_int64(n_deltas),
            pointer(plan),
            reads=[ids],
            writes=[plan],
        )
        return plan

    def quantize(self, x, column=None):
        m, k = x.shape
        q = np.full((m, -(-k // 256) * 256), 99, np.int16)
        exponents = np.full(m, 99, np.int32)
        self.call(
            "quantize",
            byref(matrix(x)),
            pointer(column),
            pointer(q),
            pointer(exponents),
            reads=[x, column],
            writes=[q, exponents],
        )
        return q, exponents

    def linear(self, x, parts, ids, n_deltas=None, max_rows=None, max_planes=None):
        """Writes every part's y."""
        n_deltas = len(parts[0].deltas) if n_deltas is None else n_deltas
        plan = self.plan(ids, n_deltas)
        every = [delta for part in parts for delta in part.deltas if isinstance(delta, Delta)]
        planes = max([1, *(delta.planes for delta in every)]) if max_planes is None else max_planes
        has_columns = any(delta.column is not None for delta in every)
        tables = [table(part.deltas) for part in parts]
        arguments = LinearArgs(
            x=ctypes.pointer(matrix(x)),
            plan=pointer(plan),
            n_deltas=n_deltas,
            max_planes=planes,
            has_columns=has_columns,
            max_rows=len(ids) if max_rows is None else max_rows,
            n_parts=len(parts),
        )
        for at, part in enumerate(parts):
            arguments.parts[at] = Part(
                deltas=pointer(tables[at]),
                N=part.y.shape[1],
                product=pointer(part.product),
                product_stride=0 if part.product is None else part.product.strides[0] // 4,
                add=part.add,
                bias=pointer(part.bias),
                bias_dtype=0 if part.bias is None else DTYPES[dtype_name(part.bias, "bias")],
                y=matrix(part.y),
            )
        workspace = self.workspace(
            "linear_workspace",
            *map(c_int64, (len(ids), x.shape[1], n_deltas)),
            len(parts),
            planes,
            int(has_columns),
        )
        arguments.workspace = pointer(workspace)
        reads = [x, plan, *tables]
        for part in parts:
            reads += [part.product, part.bias]
        self.call(
            "linear",
            byref(arguments),
            reads=reads + arrays(every),
            writes=[workspace, *(part.y for part in parts)],
        )

    def gradients(self, name, dy, x, deltas, ids, g=None, drow=False, dcolumn=False):
        """linear_transposed into g, or row_gradient: (drow, dcolumn) [T, P, N or K], None where not wanted."""
        n, k = dy.shape[1], x.shape[1]
        plan, slots = self.plan(ids, len(deltas)), table(deltas)
        every = [delta for delta in deltas if isinstance(delta, Delta)]
        planes = max([1, *(delta.planes for delta in every)])
        outs = [
            np.full((len(deltas), planes, width), 99, np.float32) if is_wanted else None
            for is_wanted, width in ((drow, n), (dcolumn, k))
        ]
        sizes = map(c_int64, (len(ids), n, k, len(deltas)))
        workspace = self.workspace("gradient_workspace", *sizes, planes)
        arguments = GradientArgs(
            dy=ctypes.pointer(matrix(dy)),
            x=ctypes.pointer(matrix(x)),
            plan=pointer(plan),
            deltas=pointer(slots),
            n_deltas=len(deltas),
            max_planes=planes,
            has_columns=any(delta.column is not None for delta in every),
            K=k,
            g=None if g is None else ctypes.pointer(matrix(g)),
            drow=pointer(outs[0]),
            dcolumn=pointer(outs[1]),
            workspace=pointer(workspace),
        )
        self.call(
            name, byref(arguments), reads=[dy, x, plan, slots, *arrays(every)], writes=[workspace, g, *outs]
        )
        return outs

    def extract(self, base, finetuned, planes=1, form="row"):
        """A Delta, or the position (row, column, in_base) of what is not finite."""
        n, k = base.shape
        sign = aligned_empty((planes, -(-n // 16), 8 * -(-k // 256), 16), np.uint32)
        sign[...] = 0xA5A5A5A5
        scale = np.full(planes if form == "tensor" else (planes, n), 99, np.float32)
        column = np.full((planes, k), 99, np.float32) if form == "rank1" else None
        bad = np.zeros(1, np.uint64)
        workspace = self.workspace("extract_workspace", c_int64(n), c_int64(k), FORMS[form])
        self.call(
            "extract",
            byref(matrix(base)),
            byref(matrix(finetuned)),
            planes,
            FORMS[form],
            *map(pointer, (sign, scale, column, bad, workspace)),
            reads=[base, finetuned],
            writes=[sign, scale, column, bad, workspace],
        )
        if int(bad[0]) != NO_BAD:
            place, what = (int(bad[0]) << 4 & NO_BAD) >> 6, int(bad[0]) & 3
            return (*divmod(place, k), what if what < 2 else -1)
        if form == "tensor":
            scale = np.repeat(scale[:, None], n, axis=1)
        return Delta(sign, scale, column, (n, k), form)

    def fit_signs(self, d, factor, order, row, column, sign):
        n, k = d.shape
        workspace = self.workspace("fit_workspace", c_int64(n), c_int64(k))
        arguments = FitArgs(
            ctypes.pointer(matrix(d)),
            *map(pointer, (factor, order)),
            len(row),
            *map(pointer, (row, column, sign)),
        )
        self.call(
            "fit_signs",
            byref(arguments),
            pointer(workspace),
            reads=[d, factor, order, row, column],
            writes=[sign, workspace],
        )

    def sweep(self, pull, hessian, row, column, sign):
        fields = [int(hessian.ndim == 1), *pull.shape, len(row), *map(pointer, (row, column, sign))]
        arguments = SweepArgs(pointer(pull), pointer(hessian), *fields)
        self.call("sweep", byref(arguments), reads=[hessian, row, column], writes=[pull, sign])

    def expand(self, base, delta, out, rows=None):
        first, end = rows or (0, delta.shape[0])
        fields = [*map(pointer, (delta.sign, delta.scale, delta.column)), *delta.shape, delta.planes]
        self.call(
            "expand",
            None if base is None else byref(matrix(base)),
            byref(DeltaOnDevice(*fields)),
            c_int64(first),
            c_int64(end),
            byref(matrix(out)),
            reads=[base, *arrays([delta])],
            writes=[out],
        )


class OnGpu(Kernels):
    """The same on a GPU, which reads and writes the arrays where they lie, in the host's memory."""

    def __init__(self, path):
        super().__init__(path)
        before, capability, processors = c_int(), c_int(), c_int()
        self.check("gpu_enter", self.library.bd_gpu_enter(0, *map(byref, (before, capability, processors))))
        self.context = Context(None, processors.value, capability.value)
        self.capability = capability.value

    def has(self, capability):
        return capability > 90 or 80 <= self.capability <= 90

    def call(self, name, *arguments, reads=(), writes=()):
        arrays = [array for array in (*reads, *writes) if array is not None and array.size]
        pinned = []
        try:
            for address, n_bytes in pages(map(bytes_of, arrays)):
                error = self.library.test_pin(c_void_p(address), c_size_t(n_bytes))
                assert error == 0, f"cudaHostRegister: {error}"
                pinned.append(address)
            status = getattr(self.library, f"bd_cuda_{name}")(byref(self.context), *arguments)
            error = self.library.test_wait()
            assert error == 0, f"{name}: CUDA error {error}"
        finally:
            for address in pinned:
                self.library.test_unpin(c_void_p(address))
        self.check(name, status)


PAGE = 4096


def pages(extents):
    """Whole pages that cover the extents (address, bytes): [(address, bytes)], ascending, none of them twice."""
    found = []
    for address, n_bytes in sorted(extents):
        first, end = address // PAGE * PAGE, -(-(address + n_bytes) // PAGE) * PAGE
        if found and first <= found[-1][1]:
            found[-1][1] = max(end, found[-1][1])
        else:
            found.append([first, end])
    return [(first, end - first) for first, end in found]


def pointer(array):
    return None if array is None else c_void_p(array.ctypes.data)


def matrix(array):
    return Matrix(
        array.ctypes.data,
        DTYPES[dtype_name(array, "array")],
        *array.shape,
        array.strides[0] // array.itemsize,
    )


def table(deltas):
    """Slots of a table; None is an empty slot, 0 a tenant without a delta of this weight."""
    slots = np.zeros(max(1, len(deltas)), TABLE)
    slots["P"] = -1
    for at, delta in enumerate(deltas):
        if delta == 0:
            slots[at]["P"] = 0
        elif delta is not None:
            slots[at] = (
                delta.sign.ctypes.data,
                delta.scale.ctypes.data,
                0 if delta.column is None else delta.column.ctypes.data,
                delta.planes,
            )
    return slots


def arrays(deltas):
    """The memory of deltas, each once."""
    found = {}
    for delta in deltas:
        for array in (delta.sign, delta.scale, delta.column):
            if array is not None:
                found[array.ctypes.data] = array
    return list(found.values())


if __name__ == "__main__":
    build_for_gpu(Path(sys.argv[1]))
