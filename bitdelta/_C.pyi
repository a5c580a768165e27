"""The arithmetic core, csrc/: private, positional, strict. Nothing is copied; outputs are written in place.

A tensor is a NumPy array (ml_dtypes.bfloat16 and BFloat16Array too), or speaks DLPack or the buffer protocol, on
the CPU. A matrix has rows of contiguous columns and any distance between rows. Kind and dtype are TypeError, shape
and value ValueError, layout, alignment and overlap BufferError, another device bitdelta.DeviceError.
"""

from collections.abc import Sequence
from typing import Any, TypedDict, final

from .array import Tensor

class _BuildInfo(TypedDict):
    compiler: str
    flags: str
    cuda: str
    sanitize: bool
    python: str

def cuda_missing() -> str | None: ...  # None when a GPU can be used; the first call loads the driver
def cuda_is_emulated() -> bool: ...  # kernels run on the CPU, on tensors in its memory
def cuda_expand(
    out: Tensor,  # [n_rows, K]; may be base itself
    base: Tensor | None,  # [N, K]
    sign: Tensor,  # uint32 [P, S, L, 16], 64-byte aligned
    scale: Tensor,  # fp32 [P, N]
    column: Tensor | None,  # fp32 [P, K]
    N: int,
    row_begin: int,
    /,
) -> None: ...

@final
class CudaDeltas:
    """Deltas of one weight on a GPU and their table, int64 [T, 4]; holds the memory of all."""

    def __new__(
        cls,
        table: Tensor,  # out
        deltas: tuple[tuple[Tensor, Tensor, Tensor | None] | None, ...],  # as of Delta; None: an empty slot
        shape: tuple[int, int],
        /,
    ) -> CudaDeltas: ...
    @property
    def planes(self) -> int: ...  # the most of a slot
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def has_columns(self) -> bool: ...
    def __len__(self) -> int: ...

def cuda_workspace_bytes(operation: str, /, *sizes: int) -> int: ...
def cuda_plan(
    plan: Tensor,  # out: uint8, of cuda_workspace_bytes("plan", M, T), aligned to 256 bytes
    tenant_ids: Tensor,  # int64 [M]
    T: int,
    /,
) -> None: ...
def cuda_linear(
    x: Tensor,  # [M, K]
    parts: tuple[tuple[Tensor, Tensor | None, Tensor | None, CudaDeltas], ...],  # out, product, bias, deltas
    plan: Tensor,
    max_rows: int,  # the most rows that a tenant has; M where not known
    add: bool,
    workspace: Tensor,
    /,
) -> None: ...
def cuda_linear_transposed(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K], for dcolumn
    deltas: CudaDeltas,
    plan: Tensor,
    workspace: Tensor,
    out: Tensor | None,  # [M, K]
    dcolumn: Tensor | None,  # out: fp32 [T, planes, K]
    /,
) -> None: ...
def cuda_row_gradient(
    dy: Tensor,
    x: Tensor,
    deltas: CudaDeltas,
    plan: Tensor,
    workspace: Tensor,
    drow: Tensor,  # out: fp32 [T, planes, N]
    /,
) -> None: ...
def cuda_extract(
    base: Tensor,
    finetuned: Tensor,
    planes: int,
    form: int,  # 0 tensor, 1 row, 2 rank1
    sign: Tensor,
    scale: Tensor,
    column: Tensor | None,
    bad: Tensor,  # out: int64 [1], -1 or where a number is not finite
    workspace: Tensor,
    /,
) -> None: ...
def cuda_position(bad: int, K: int, /) -> tuple[int, int, int]: ...  # row, column, in_base
def cuda_open_blas(
    name: str,  # of a library
    is_loaded: bool,  # look among those that the process has loaded, only
    /,
) -> str | None: ...  # None once one is open; else why not
def cuda_multiply(
    out: Tensor,  # fp32 [M, N]
    a: Tensor,  # [M, K]
    b: Tensor,  # of the dtype of a: [K, N], or [N, K]
    is_transposed: bool,
    workspace: Tensor,
    /,
) -> None: ...
def cuda_fit_signs(
    d: Tensor,  # fp32 [N, K]
    factor: Tensor | None,  # fp32 [K, K]
    order: Tensor,  # int64 [K]; columns that do not exist are left out
    row: Tensor,  # fp32 [P, N]
    column: Tensor | None,  # fp32 [P, K]
    sign: Tensor,  # out
    workspace: Tensor,
    /,
) -> None: ...
def cuda_sweep(
    pull: Tensor,  # in and out: fp32 [N, K]
    hessian: Tensor,  # fp32 [K, K], or its diagonal [K]
    row: Tensor,  # fp32 [P, N]
    column: Tensor | None,  # fp32 [P, K]
    sign: Tensor,  # in and out
    /,
) -> None: ...
def cuda_quantize(
    q: Tensor,  # out: int16 [M, K rounded up to 256]
    exponents: Tensor,  # out: int32 [M]; 2^31 - 1 where a number is not finite
    x: Tensor,  # [M, K]
    column: Tensor | None,  # fp32 [K]
    /,
) -> None: ...

STREAM_ROWS: int  # up to so many rows, `linear` multiplies with the weight itself faster than BLAS

@final
class Delta:
    """sign uint32 [P, S, L, 16] (64-byte aligned), scale fp32 [P, N], column fp32 [P, K] or None; all contiguous."""

    def __new__(
        cls, sign: Tensor, scale: Tensor, column: Tensor | None, shape: tuple[int, int], /
    ) -> Delta: ...
    @property
    def planes(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...

def extract(
    base: Tensor,  # [N, K]
    finetuned: Tensor,  # [N, K]
    planes: int,
    form: str,  # "tensor", "row", "rank1"
    sign: Tensor,  # out: uint32 [P, S, L, 16], 64-byte aligned
    scale: Tensor,  # out: fp32 [P] for "tensor", else [P, N]
    column: Tensor | None,  # out: fp32 [P, K] for "rank1", else None
    checksum: bool,
    /,
) -> int | None: ...  # CRC-32C of base's elements
def expand(
    out: Tensor,  # [row_end - row_begin, K]; may be base itself
    base: Tensor | None,  # [N, K]
    delta: Delta,
    row_begin: int,
    row_end: int,
    /,
) -> None: ...
def fit_signs(
    d: Tensor,  # fp32 [N, K]: finetuned - base
    factor: Tensor | None,  # fp32 [K, K], strictly lower part used
    order: Tensor,  # int64 [K]: the columns in the order of the factor
    row: Tensor,  # fp32 [P, N]
    column: Tensor | None,  # fp32 [P, K]
    sign: Tensor,  # out: uint32 [P, S, L, 16], 64-byte aligned
    /,
) -> None: ...
def sweep(
    pull: Tensor,  # in and out: fp32 [N, K], (finetuned - base - delta) H
    hessian: Tensor,  # H: fp32 [K, K], or its diagonal [K]
    row: Tensor,  # fp32 [P, N]
    column: Tensor | None,  # fp32 [P, K]
    sign: Tensor,  # in and out: uint32 [P, S, L, 16], 64-byte aligned
    /,
) -> None: ...
def linear(
    out: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    weight: Tensor | None,  # [N, K]
    product: Tensor | None,  # fp32 [M, N], instead of weight
    bias: Tensor | None,  # [N]
    deltas: Sequence[Delta],
    tenant_ids: Sequence[int] | Tensor,  # [M], int64 or int32
    precision: str,  # "fixed16", "float32"
    /,
) -> None: ...
def linear_add(
    y: Tensor, x: Tensor, deltas: Sequence[Delta], tenant_ids: Sequence[int] | Tensor, /
) -> None: ...
def linear_transposed(
    out: Tensor, dy: Tensor, deltas: Sequence[Delta], tenant_ids: Sequence[int] | Tensor, /
) -> None: ...
def to_float32(out: Tensor, matrix: Tensor, name: str = "matrix", /) -> None: ...
def crc32c(buffer: Any, value: int = 0, /) -> int: ...
def crc32c_combine(a: int, b: int, n_bytes_b: int, /) -> int: ...
def read(buffer: Any, /) -> int: ...  # exclusive or of the 64-bit words
def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def isa() -> str: ...
def isas() -> tuple[str, ...]: ...
def set_isa(name: str, /) -> None: ...
def build_info() -> _BuildInfo: ...
