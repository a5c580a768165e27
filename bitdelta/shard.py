"""One safetensors file that is written while it is not yet known what it will hold.

    signs-N    room for the header, then the signs in the order in which they come
    rest-N     all other tensors, in the order in which they come

`assemble` appends the rest to the signs, by falling alignment of their elements, and writes the header into its room,
padded with spaces. So the signs, nearly all bytes, are written once, and every tensor is aligned without holes.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from .folder import reserve, write_all
from .packfile import FORMAT_VERSION, Spec, spec_bytes
from .tensor import DTYPES

COPY_BYTES = 4 << 20  # at a time


class Shard:
    """The two files of one shard; `room` = where the data start, a multiple of 64."""

    def __init__(self, folder: Path, number: int, room: int) -> None:
        self.start = room  # of the data
        self.keys: dict[str, Spec] = {}
        self.signs_bytes = self.rest_bytes = 0
        self.signs_path, self.rest_path = folder / f"signs-{number}", folder / f"rest-{number}"
        self.signs = os.open(self.signs_path, os.O_RDWR | os.O_CREAT, 0o666)
        self.rest = os.open(self.rest_path, os.O_RDWR | os.O_CREAT, 0o666)
        os.lseek(self.signs, self.start, os.SEEK_SET)

    @property
    def size(self) -> int:
        return self.signs_bytes + self.rest_bytes

    def reserve(self, size: int) -> None:
        """Disk space for so many bytes of this shard."""
        reserve(self.signs, self.start + size if size > 0 else 0)

    def append(self, key: str, spec: Spec, data: memoryview) -> None:
        write_all(self.signs if _is_sign(key, spec) else self.rest, data)
        self._count(key, spec)

    def skip(self, key: str, spec: Spec, digest: Any) -> None:
        """Counts what a dead writer has written, and hashes it."""
        is_sign, left = _is_sign(key, spec), spec_bytes(spec)
        file, at = (self.signs, self.start + self.signs_bytes) if is_sign else (self.rest, self.rest_bytes)
        while left:
            piece = os.pread(file, min(left, COPY_BYTES), at)
            if not piece:
                break
            digest.update(piece)
            at, left = at + len(piece), left - len(piece)
        self._count(key, spec)

    def position(self) -> tuple[int, int, int]:
        return len(self.keys), self.signs_bytes, self.rest_bytes

    def back(self, position: tuple[int, int, int]) -> None:
        count, self.signs_bytes, self.rest_bytes = position
        self.keys = dict(list(self.keys.items())[:count])

    def truncate(self) -> None:
        for file, end in ((self.signs, self.start + self.signs_bytes), (self.rest, self.rest_bytes)):
            os.ftruncate(file, end)
            os.lseek(file, end, os.SEEK_SET)

    def assemble(self) -> None:
        """Makes the safetensors file: signs, then the rest by falling alignment, then the header in its room."""
        self.truncate()
        places, at = {}, 0
        for key, spec in self.keys.items():
            if not _is_sign(key, spec):
                places[key] = at
                at += spec_bytes(spec)
        order = sorted(self.keys, key=lambda key: _rank(key, self.keys[key]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "bitdelta_format": str(FORMAT_VERSION)}}
        end = 0
        for key in order:
            dtype, shape = self.keys[key]
            begin, end = end, end + spec_bytes((dtype, shape))
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            if key in places:
                _copy(self.rest, places[key], self.signs, end - begin)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= self.start - 8, "the header outgrew its room"
        os.lseek(self.signs, 0, os.SEEK_SET)
        write_all(self.signs, memoryview(struct.pack("<Q", self.start - 8) + text.ljust(self.start - 8)))

    def close(self) -> None:
        for file in (self.signs, self.rest):
            if file >= 0:
                os.close(file)
        self.signs = self.rest = -1

    def _count(self, key: str, spec: Spec) -> None:
        self.keys[key] = spec
        if _is_sign(key, spec):
            self.signs_bytes += spec_bytes(spec)
        else:
            self.rest_bytes += spec_bytes(spec)


def _is_sign(key: str, spec: Spec) -> bool:
    return spec[0] == "U32" and key.endswith(".sign") and len(spec[1]) >= 4 and spec[1][-1] == 16


def _rank(key: str, spec: Spec) -> int:
    """Signs first, then by the elements' alignment; sorting keeps the order of arrival within a rank."""
    return 0 if _is_sign(key, spec) else 9 - max(1, DTYPES[spec[0]][0] // 8)


def _copy(source: int, at: int, target: int, left: int) -> None:
    """Bytes from one file to the end of another."""
    while left:
        piece = os.pread(source, min(left, COPY_BYTES), at)
        if not piece:
            raise OSError("a file was cut while it was being written")
        write_all(target, memoryview(piece))
        at, left = at + len(piece), left - len(piece)
