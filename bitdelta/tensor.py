"""One tensor in a file: where its bytes lie, and the read-only array that is mapped over them.

Nothing is read before it is asked for. The maps of a file are shared by its arrays and closed with the last of
them, so that a checkpoint of any number of shards, visited tensor by tensor, holds one open file at a time.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import FormatError

# safetensors code -> (bits of one element, NumPy dtype of `array()`; "" = carried as raw bytes)
DTYPES = {
    "BOOL": (8, "?"),
    "U8": (8, "u1"),
    "I8": (8, "i1"),
    "U16": (16, "<u2"),
    "I16": (16, "<i2"),
    "U32": (32, "<u4"),
    "I32": (32, "<i4"),
    "U64": (64, "<u8"),
    "I64": (64, "<i8"),
    "F16": (16, "<f2"),
    "BF16": (16, "<u2"),
    "F32": (32, "<f4"),
    "F64": (64, "<f8"),
    "C64": (64, "<c8"),
    "F8_E5M2": (8, ""),
    "F8_E4M3": (8, ""),
    "F8_E8M0": (8, ""),
    "F8_E4M3FNUZ": (8, ""),
    "F8_E5M2FNUZ": (8, ""),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "F4": (4, ""),
}
FLOATS = frozenset(("F32", "F16", "BF16"))  # what deltas are taken of
BLOCKS, BLOCK_BYTES = 16, 4096  # of a fingerprint

# of files that are mapped now; two threads that map the same file at once may make two maps, which is harmless
_maps: weakref.WeakValueDictionary[tuple[int, ...], mmap.mmap] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: `nbytes` at `offset` of `path`, row-major, little-endian.

    Tied tensors share path and offset. `dtype` is the code that safetensors uses (`DTYPES`). `strides`, in elements,
    is None for row-major values; only PyTorch's files hold others, and `array()` copies those into order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Bytes of the file from the first element to the end of the last; nbytes when row-major."""
        if self.strides is None or not self.nbytes:
            return self.nbytes
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * (DTYPES[self.dtype][0] // 8)

    def array(self) -> np.ndarray:
        """The values, read-only, mapped where they lie; no byte is copied.

        BF16 is a `BFloat16Array`. fp8 is uint8 of the tensor's shape, fp4 and fp6 are uint8 [nbytes]. A tensor that
        starts off its own alignment (files of early safetensors versions) is read into memory instead.

        Raises:
            FormatError: the file has been truncated since it was opened.
        """
        bits, kind = DTYPES[self.dtype]
        dtype = np.dtype(kind or "u1")
        shape = (self.nbytes,) if bits % 8 else self.shape
        if not self.nbytes:
            values = np.empty(shape, dtype)
            values.flags.writeable = False
        elif self.strides is not None:
            steps = tuple(dtype.itemsize * stride for stride in self.strides)
            values = np.ndarray(shape, dtype, self._map(), self.offset, steps).copy(order="C")
            values.flags.writeable = False
        elif self.offset % dtype.itemsize:
            values = np.frombuffer(self.read(0, self.nbytes), dtype).reshape(shape)
        else:
            values = np.ndarray(shape, dtype, buffer=self._map(), offset=self.offset)
        if self.dtype == "BF16":
            from .array import as_bfloat16

            return as_bfloat16(values)
        return values

    def read(self, begin: int, end: int) -> bytes:
        """Bytes begin..end of the row-major values, copied, without mapping the file."""
        if self.strides is not None:
            return np.asarray(self.array()).reshape(-1).view(np.uint8)[begin:end].tobytes()
        pieces = []
        with open(self.path, "rb", buffering=0) as file:
            while begin < end:
                piece = os.pread(file.fileno(), min(end - begin, 1 << 30), self.offset + begin)
                if not piece:
                    raise self._truncated(os.fstat(file.fileno()).st_size)
                pieces.append(piece)
                begin += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def fingerprint(self) -> str:
        """SHA-256 (64 hexadecimal digits) of the tensor's kind and of 16 samples of its bytes.

        Hashed are, in this order:
          1. the ASCII text `DTYPE [D0, D1, ...]` and a newline, as in `BF16 [4096, 11008]`; a scalar has `[]`;
          2. of nbytes <= 65536: all bytes;
             of more: the 16 blocks of 4096 bytes that start at byte i * (nbytes - 4096) // 15, i = 0..15.
        The bytes are those of the row-major, little-endian values, so shards, names and file formats do not matter.
        """
        digest = hashlib.sha256(f"{self.dtype} {list(self.shape)}\n".encode("ascii"))
        if self.nbytes <= BLOCKS * BLOCK_BYTES:
            digest.update(self.read(0, self.nbytes))
        else:
            for i in range(BLOCKS):
                begin = i * (self.nbytes - BLOCK_BYTES) // (BLOCKS - 1)
                digest.update(self.read(begin, begin + BLOCK_BYTES))
        return digest.hexdigest()

    def prefetch(self) -> None:
        """A hint: the pages will be needed soon. Worth it for the next tensor while this one is computed."""
        self._advise("MADV_WILLNEED", self._map())

    def release(self) -> None:
        """A hint: the pages are not needed now. They leave this process, not the page cache; arrays stay valid."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                mapped = _maps.get(_identity(os.fstat(file.fileno())))
        except OSError:
            return
        self._advise("MADV_DONTNEED", mapped)

    def _map(self) -> mmap.mmap:
        """The one map of the file; alive while an array uses it."""
        with open(self.path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size < self.offset + self.span:
                raise self._truncated(status.st_size)
            mapped = _maps.get(_identity(status))
            if mapped is None:
                # a map of Python before 3.13 keeps a duplicate of the descriptor open
                keep = {"trackfd": False} if sys.version_info >= (3, 13) else {}
                mapped = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ, **keep)
                _maps[_identity(status)] = mapped
            return mapped

    def _advise(self, advice: str, mapped: mmap.mmap | None) -> None:
        option = getattr(mmap, advice, None)
        if mapped is None or option is None or not self.nbytes:
            return
        begin = self.offset - self.offset % mmap.PAGESIZE
        mapped.madvise(option, begin, self.offset + self.span - begin)

    def _truncated(self, size: int) -> FormatError:
        return FormatError(
            f"{self.path}: {self.name}: expected bytes {self.offset} to {self.offset + self.span}, "
            f"the file has {size} now; it was cut since it was opened"
        )


def file_size(path: Path) -> int:
    """The size of a file that can hold tensors; named pipes, folders and Git LFS pointers are refused."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path}: not a regular file")
    if status.st_size == 0:
        raise FormatError(f"{path}: empty (0 bytes); copy or download it again")
    if status.st_size < 1024:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise FormatError(
                    f"{path}: a Git LFS pointer, not the file itself; fetch it: git lfs pull (in {path.parent})"
                )
    return status.st_size


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Changes when the file at a path is replaced or rewritten."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
