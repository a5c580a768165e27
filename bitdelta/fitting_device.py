"""Where the matrices of a fit are: NumPy's arrays and the core on the CPU, torch's tensors and kernels on a GPU.

What is as large as a weight in fp32 (d, H, products) stays on the device. Signs, scales and sums over rows, a
thirtieth of that, are NumPy's on both, so that `fitting.py` decides alike; they go there and back for each step.
Operators (+, -, *, @, slices) are those of both kinds.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _C, cuda_memory, threads
from .array import aligned_copy, aligned_empty
from .delta import Delta

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bits = NDArray[np.uint32]
Matrix: TypeAlias = Any  # fp32, of the device's kind

BLOCK = 256  # rows of the factor made at a time: the rest of the work is one product


class Host:
    """NumPy, its BLAS, and csrc/.

    Attributes:
        device: what PyTorch calls it.
    """

    device: Any = "cpu"

    def put(self, array: np.ndarray) -> Matrix:
        return array

    def get(self, matrix: Matrix) -> np.ndarray:
        return np.asarray(matrix)

    def as_tensor(self, matrix: Matrix) -> Any:
        """The same memory as a tensor of torch."""
        import torch

        return torch.from_numpy(matrix)

    def zeros(self, *shape: int) -> Matrix:
        return np.zeros(shape, np.float32)

    def copy(self, matrix: Matrix) -> Matrix:
        return matrix.copy()

    def is_finite(self, matrix: Matrix) -> bool:
        return bool(np.isfinite(matrix).all())

    def permuted(self, square: Matrix, order: I64) -> Matrix:
        """Rows and columns in another order."""
        return square[np.ix_(order, order)]

    def take_rows(self, into: Matrix, source: Matrix, rows: NDArray[np.bool_]) -> None:
        into[rows] = source[rows]

    def dots(self, a: Matrix, b: Matrix) -> F64:
        """Row by row the sum of a b, in fp64."""
        out: F64 = np.einsum("nk,nk->n", a, b, dtype=np.float64)
        return out

    def column_dots(self, a: Matrix, b: Matrix) -> F64:
        out: F64 = np.einsum("nk,nk->k", a, b, dtype=np.float64)
        return out

    def diagonal(self, values: Matrix) -> Matrix:
        """[K] as [K, K]."""
        return np.diag(values)

    def solve(self, square: Matrix, right: F32) -> F32:
        out: F32 = np.linalg.solve(square, right)
        return out

    def factorise(self, matrix: Matrix) -> None:
        """H [K, K] becomes, below its diagonal, U^T with U U^T = H, U upper triangular, each row over its diagonal.

        Above the diagonal something is left. LinAlgError: H is not positive definite in fp32.
        """
        _factorise(matrix)

    def expand(
        self, sign: Bits, scale: F32, column: F32 | None, shape: tuple[int, int], rows: slice
    ) -> Matrix:
        """Rows of the planes' sum, fp32 [rows, K]; they begin at a strip."""
        threads.sync()
        out = np.empty((rows.stop - rows.start, shape[1]), np.float32)
        delta = Delta(sign, scale, column, shape, "row" if column is None else "rank1")
        _C.expand(out, None, delta.handle, rows.start, rows.stop)
        return out

    def fit_signs(self, d: Matrix, factor: Matrix | None, order: I64, scale: F32, column: F32 | None) -> Bits:
        threads.sync()
        sign: Bits = aligned_empty((len(scale), *_strips(tuple(d.shape))), np.uint32)
        _C.fit_signs(d, factor, order, scale, column, sign)
        return sign

    def sweep(self, pull: Matrix, hessian: Matrix, scale: F32, column: F32 | None, sign: Bits) -> None:
        """pull and sign are changed."""
        threads.sync()
        _C.sweep(pull, hessian, scale, column, sign)


class Gpu(Host):
    """torch on its device, and kernels/: `fit_signs`, `sweep` and `expand` have the bits of the core.

    Emulated kernels take the CPU's memory; the device is then torch's CPU.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self._torch, self.device = torch, device

    def put(self, array: np.ndarray) -> Matrix:
        array = np.ascontiguousarray(array)
        if array.dtype == np.uint32:
            return self._torch.from_numpy(array.view(np.int32)).to(self.device).view(self._torch.uint32)
        return self._torch.from_numpy(array).to(self.device)

    def get(self, matrix: Matrix) -> np.ndarray:
        return np.asarray(cuda_memory.to_host(matrix))

    def as_tensor(self, matrix: Matrix) -> Any:
        return matrix

    def zeros(self, *shape: int) -> Matrix:
        with self._torch.inference_mode(False):  # what is summed there is changed later
            return self._torch.zeros(shape, device=self.device)

    def copy(self, matrix: Matrix) -> Matrix:
        return matrix.clone()

    def is_finite(self, matrix: Matrix) -> bool:
        return bool(self._torch.isfinite(matrix).all())

    def permuted(self, square: Matrix, order: I64) -> Matrix:
        at = self.put(order)
        return square[at[:, None], at]

    def take_rows(self, into: Matrix, source: Matrix, rows: NDArray[np.bool_]) -> None:
        at = self.put(np.flatnonzero(rows))
        into[at] = source[at]

    def dots(self, a: Matrix, b: Matrix) -> F64:
        return self.get((a.double() * b.double()).sum(1))

    def column_dots(self, a: Matrix, b: Matrix) -> F64:
        return self.get((a.double() * b.double()).sum(0))

    def diagonal(self, values: Matrix) -> Matrix:
        return self._torch.diag(values)

    def solve(self, square: Matrix, right: F32) -> F32:
        found, status = self._torch.linalg.solve_ex(square, self.put(right))
        if int(status):
            raise np.linalg.LinAlgError("Singular matrix")
        return self.get(found)

    def factorise(self, matrix: Matrix) -> None:
        lower, status = self._torch.linalg.cholesky_ex(matrix.flip(0, 1).double())
        if int(status):
            raise np.linalg.LinAlgError("Matrix is not positive definite")
        upper = lower.flip(0, 1)
        matrix.copy_(upper.T / upper.diagonal()[:, None])

    def expand(
        self, sign: Bits, scale: F32, column: F32 | None, shape: tuple[int, int], rows: slice
    ) -> Matrix:
        strips = slice(rows.start // 16, -(-rows.stop // 16))
        n_rows = rows.stop - rows.start
        out = self._torch.empty(n_rows, shape[1], device=self.device)
        parts = self.put(aligned_copy(sign[:, strips])), self.put(scale[:, rows])
        _C.cuda_expand(out, None, *parts, self._column(column), n_rows, 0)
        return out

    def fit_signs(self, d: Matrix, factor: Matrix | None, order: I64, scale: F32, column: F32 | None) -> Bits:
        shape = tuple(d.shape)
        sign = self._torch.empty((len(scale), *_strips(shape)), dtype=self._torch.uint32, device=self.device)
        workspace = cuda_memory.scratch(d, _C.cuda_workspace_bytes("fit", *shape))
        scales = self.put(scale), self._column(column)
        _C.cuda_fit_signs(d, factor, self.put(order), *scales, sign, workspace)
        return aligned_copy(self.get(sign))

    def sweep(self, pull: Matrix, hessian: Matrix, scale: F32, column: F32 | None, sign: Bits) -> None:
        placed = self.put(aligned_copy(sign))
        _C.cuda_sweep(pull, hessian, self.put(scale), self._column(column), placed)
        sign[...] = self.get(placed)

    def _column(self, column: F32 | None) -> Matrix | None:
        return None if column is None else self.put(column)


HOST = Host()


def place(device: Any) -> Host:
    """Where to fit for a torch.device: on a GPU, or on the emulated one where the environment asks for it."""
    import torch

    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    return Gpu(device) if cuda_memory.is_on_gpu(torch.empty(0, device=device)) else HOST


def _strips(shape: tuple[int, int]) -> tuple[int, int, int]:
    return -(-shape[0] // 16), 8 * -(-shape[1] // 256), 16


def _factorise(matrix: F32) -> None:
    """From the last rows to the first; above the diagonal something of H stays."""
    K = len(matrix)
    for end in range(K, 0, -BLOCK):
        begin = max(0, end - BLOCK)
        rows = matrix[begin:end, :end]
        if end < K:
            rows -= matrix[end:, begin:end].T @ matrix[end:, :end]
        lower = np.linalg.cholesky(rows[::-1, begin:][:, ::-1].astype(np.float64))
        upper = lower[::-1, ::-1]
        rows[:, begin:] = upper.T
        rows[:, :begin] = np.linalg.inv(upper).astype(np.float32) @ rows[:, :begin]
    matrix /= np.diagonal(matrix).copy()[:, None]
