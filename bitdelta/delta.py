"""One fine-tuned weight as its base plus sign planes and scales: finetuned ~ base + sum_p scale_p * S_p.

    sign     uint32 [P, ceil(N/16), 8 ceil(K/256), 16]: strips of 16 rows, 32 columns a word, 1 = +scale
    scale    fp32 [P, N], one per plane and output row
    column   fp32 [P, K] or None; the scale is then fp32(row * column)
    form     "tensor" (every row has the same scale), "row" or "rank1": what the packfile stores

`reference.py` has the arithmetic in plain NumPy, `csrc/delta.c` the one that runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C, cuda_memory, threads
from .array import Tensor, aligned_copy, aligned_empty, empty_like
from .errors import whole_number

FORMS = ("tensor", "row", "rank1")


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """The packed difference of one weight [N, K]. Arrays are not copied; they may be read-only memory maps.

    Args:
        sign: uint32 [P, ceil(N/16), 8 ceil(K/256), 16], C-contiguous, 64-byte aligned; padding bits zero.
        scale: fp32 [P, N], C-contiguous.
        column: fp32 [P, K], C-contiguous, or None.
        shape: (N, K).
        form: "tensor", "row" or "rank1".

    Raises:
        TypeError, ValueError, BufferError: an array is not as above.

    >>> import bitdelta, numpy as np
    >>> base = np.zeros((2, 3), np.float32)
    >>> d = bitdelta.extract(base, np.array([[1, -1, 2], [-3, 0, 3]], np.float32))
    >>> d
    Delta(shape=(2, 3), planes=1, form='row', nbytes=520)
    >>> d.scale.tolist()
    [[1.3333333730697632, 2.0]]
    """

    sign: NDArray[np.uint32]
    scale: NDArray[np.float32]
    column: NDArray[np.float32] | None
    shape: tuple[int, int]
    form: str = "row"
    handle: _C.Delta = field(init=False)  # the arrays as the kernels see them

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form: expected 'tensor', 'row' or 'rank1', got {self.form!r}")
        if (self.column is not None) != (self.form == "rank1"):
            raise ValueError(
                f"column: expected {'fp32 [P, K]' if self.form == 'rank1' else 'None'} in form {self.form!r}"
            )
        N, K = self.shape
        object.__setattr__(self, "shape", (int(N), int(K)))
        object.__setattr__(self, "handle", _C.Delta(self.sign, self.scale, self.column, self.shape))

    @property
    def planes(self) -> int:
        """P, 1 to 8."""
        return int(self.sign.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of signs and scales in memory."""
        return self.sign.nbytes + self.scale.nbytes + (0 if self.column is None else self.column.nbytes)

    def expand(self, base: Tensor | None, out: Tensor | None = None) -> Tensor:
        """round(base + the planes summed in order in fp32), ties to even.

        Args:
            base: [N, K] of fp32, fp16 or bf16, or None: the delta alone, in fp32.
            out: [N, K] to write to, of any of these dtypes; may be base itself. Default: new, of base's kind.

        Returns:
            out.

        >>> import bitdelta, numpy as np
        >>> base = np.ones((1, 2), np.float32)
        >>> bitdelta.extract(base, np.array([[2, 0]], np.float32)).expand(base)
        array([[2., 0.]], dtype=float32)
        """
        if base is not None and cuda_memory.is_on_gpu(base):
            from . import cuda  # which imports this module

            return cuda.expand(self, base, cuda_memory.empty_as(base, self.shape) if out is None else out)
        threads.sync()
        if out is None:
            out = np.empty(self.shape, np.float32) if base is None else empty_like(base, self.shape)
        _C.expand(out, base, self.handle, 0, self.shape[0])
        return out

    def __repr__(self) -> str:
        return f"Delta(shape={self.shape}, planes={self.planes}, form={self.form!r}, nbytes={self.nbytes})"

    def _repr_html_(self) -> str:
        from .display import panel, size

        n, k = self.shape
        scales = np.abs(self.scale)
        facts = {
            "shape": f"{n} x {k}",
            "planes": str(self.planes),
            "form": self.form,
            "in memory": f"{size(self.nbytes)}, {8 * self.nbytes / max(n * k, 1):.2f} bits per weight",
        }
        if scales.size:
            facts["scales"] = f"{scales.min():.3g} to {scales.max():.3g}, mean {scales.mean():.3g}"
        return panel("Delta", facts)

    def __reduce__(self) -> Any:
        return _restore, (self.sign, self.scale, self.column, self.shape, self.form)


def _restore(sign: Any, scale: Any, column: Any, shape: Any, form: str) -> Delta:
    """After pickling or copying, which keep no alignment."""
    return Delta(aligned_copy(sign), scale, column, shape, form)


def extract(base: Tensor, finetuned: Tensor, planes: int = 1, scale: str = "row") -> Delta:
    """Packs finetuned - base into sign planes and scales.

    The first plane is sign(d) with the scale mean |d|, which minimises the squared error for these signs (BitDelta,
    arXiv 2402.10193, section 3.1); every further plane does the same to what the ones before left over.

    Args:
        base: [N, K] of fp32, fp16 or bf16: NumPy, torch, or anything that speaks DLPack; rows contiguous.
        finetuned: [N, K], its dtype may be another.
        planes: P, 1 to 8; every plane is one bit per weight.
        scale: "tensor" (one scale per plane), "row" (one per plane and row) or "rank1" (row times column, by
            alternating least squares).

    Returns:
        A Delta with arrays of its own.

    Raises:
        TypeError, BufferError: a tensor's kind, dtype, device or layout.
        ValueError: shapes that differ, planes or scale out of range, NaN or Inf in a weight (the text gives the
            first index).

    >>> import bitdelta, numpy as np
    >>> base = np.zeros((1, 4), np.float16)
    >>> d = bitdelta.extract(base, np.array([[4, -2, 1, 1]], np.float16), planes=2)
    >>> d.scale.tolist(), d.expand(base).tolist()
    ([[2.0], [1.0]], [[3.0, -1.0, 1.0, 1.0]])
    """
    if cuda_memory.is_on_gpu(base):
        from . import cuda  # which imports this module

        return cuda.extract(base, finetuned, planes, scale)
    return _extract(base, finetuned, planes, scale, False)[0]


def extract_with_checksum(base: Tensor, finetuned: Tensor, planes: int, scale: str) -> tuple[Delta, int]:
    """`extract`, and the CRC-32C of base's elements, which the same pass over memory sums."""
    delta, checksum = _extract(base, finetuned, planes, scale, True)
    assert checksum is not None
    return delta, checksum


def _extract(
    base: Tensor, finetuned: Tensor, planes: int, scale: str, checksum: bool
) -> tuple[Delta, int | None]:
    N, K, planes = extract_sizes(base, finetuned, planes, scale)
    threads.sync()
    sign = aligned_empty((planes, -(-N // 16), 8 * -(-K // 256), 16), np.uint32)
    row = np.empty(planes if scale == "tensor" else (planes, N), np.float32)
    column = np.empty((planes, K), np.float32) if scale == "rank1" else None
    crc = _C.extract(base, finetuned, planes, scale, sign, row, column, checksum)
    return extracted(sign, row, column, (N, K), scale), crc


def extract_sizes(base: Tensor, finetuned: Tensor, planes: int, scale: str) -> tuple[int, int, int]:
    """N, K and P of an extraction, or the error that names the argument."""
    N, K = matrix_shape(base, "base")
    if matrix_shape(finetuned, "finetuned") != (N, K):
        raise ValueError(f"finetuned: expected {[N, K]} as base, got {list(finetuned.shape)}")
    planes = whole_number(planes, "planes", 1, 8)
    if scale not in FORMS:
        raise ValueError(f"scale: expected 'tensor', 'row' or 'rank1', got {scale!r}")
    return N, K, planes


def extracted(
    sign: NDArray[np.uint32],
    row: NDArray[np.float32],
    column: NDArray[np.float32] | None,
    shape: tuple[int, int],
    scale: str,
) -> Delta:
    """The Delta of what a kernel has written; `row` is [P] for the form "tensor"."""
    if not (np.isfinite(row).all() and (column is None or np.isfinite(column).all())):
        raise ValueError("finetuned - base: expected scales within fp32, got one beyond")
    if scale == "tensor":
        row = np.repeat(row[:, None], shape[0], axis=1)
    return Delta(sign, row, column, shape, scale)


def matrix_shape(array: Tensor, name: str, letters: str = "[N, K]") -> tuple[int, int]:
    """The two dimensions of a matrix of any kind, or the error that names it."""
    shape = getattr(array, "shape", None)
    if shape is None:
        raise TypeError(
            f"{name}: expected a tensor of float32, float16 or bfloat16, got {type(array).__name__}"
        )
    if len(shape) != 2:
        raise ValueError(f"{name}: expected a matrix {letters}, got {list(shape)}")
    return int(shape[0]), int(shape[1])
