"""Reads the tensors of a `torch.save` file (`pytorch_model*.bin`, `diff.pt`) without executing its pickle.

    ARCHIVE.zip                              entries stored, never compressed
        PREFIX/data.pkl                      pickle of a flat dict: name -> _rebuild_tensor_v2(storage, ...)
        PREFIX/byteorder                     b"little" (absent in older files, which are little-endian too)
        PREFIX/data/KEY                      the raw bytes of one storage, memory-mapped where they lie

What a file claims (offsets, sizes, shapes, strides) is checked before a byte of it is read. The pickle is
interpreted by `torchpickle.py`, which executes nothing.

Source of the format: torch/serialization.py (`_save`).
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .errors import FormatError
from .tensor import Tensor
from .torchpickle import View, describe_kind, interpret

MAX_PICKLE_BYTES = 64 << 20  # a 100 000-tensor model needs about 20 MB


@dataclass(frozen=True)
class _Entry:
    offset: int  # of the data, in the file
    size: int


def open_torch_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, by name, as memory-mapped `Tensor`s.

    Args:
        path: a zip container holding one flat dict of tensors.

    Returns:
        name -> Tensor, in the file's order. Tied tensors share their offset.

    Raises:
        FormatError: anything but that: legacy files, other objects, compressed entries, offsets, shapes or
            sizes that the file does not hold, names outside the closed list.
        OSError: the file cannot be read.
    """
    path = Path(path)
    entries, pickled = _read_archive(path)
    state = interpret(pickled, path)
    if not isinstance(state, dict):
        raise FormatError(
            f"{path}: expected a dict of tensors, got {describe_kind(state)}; save model.state_dict()"
        )
    tensors = {}
    for name, view in state.items():
        if not isinstance(name, str):
            raise FormatError(f"{path}: expected tensor names to be text, got {describe_kind(name)}")
        if not name.isprintable():
            raise FormatError(f"{path}: expected a printable name, got {name[:200]!r}")
        if not isinstance(view, View):
            raise FormatError(
                f"{path}: {name[:200]!r} is {describe_kind(view)}, not a tensor; "
                "save model.state_dict() alone"
            )
        storage = view.storage
        entry = entries.get(storage.key)
        if entry is None:
            raise FormatError(
                f"{path}: {name[:200]!r} needs the entry data/{storage.key[:80]}, which is missing"
            )
        if entry.size != storage.count * storage.itemsize:
            raise FormatError(
                f"{path}: entry data/{storage.key[:80]} of {name[:200]!r}: "
                f"expected {storage.count * storage.itemsize} bytes, got {entry.size}"
            )
        offset = entry.offset + view.start * storage.itemsize
        tensors[name] = Tensor(
            name=name,
            dtype=storage.dtype,
            shape=view.shape,
            nbytes=view.count * storage.itemsize,
            path=path,
            offset=offset,
            strides=view.strides,
        )
    return tensors


def _read_archive(path: Path) -> tuple[dict[str, _Entry], bytes]:
    """The storages' places in the file, by key, and the bytes of data.pkl."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(4)
        if magic != b"PK\x03\x04":
            quoted = str(path)
            raise FormatError(
                f"{path}: not a zip container of torch.save (files written before torch 1.6 are not); "
                "convert it: python -c "
                f"\"import torch; torch.save(torch.load({quoted!r}, map_location='cpu', weights_only=True), "
                f'{quoted + ".zip"!r})"'
            )
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (
            zipfile.BadZipFile,
            ValueError,
            NotImplementedError,
            OverflowError,
            struct.error,
            EOFError,
        ) as error:
            raise FormatError(f"{path}: damaged or truncated zip container: {error}") from error
        places: dict[str, _Entry] = {}
        for info in infos:
            if info.filename in places:
                raise FormatError(f"{path}: two entries are named {info.filename[:200]!r}")
            places[info.filename] = _locate(file, info, size, path)
        _refuse_overlap(places, path)
        pickles = [name for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise FormatError(
                f"{path}: expected one PREFIX/data.pkl, got {len(pickles)}; not written by torch.save?"
            )
        prefix = pickles[0][: -len("data.pkl")]
        byteorder = places.get(prefix + "byteorder")
        if byteorder is not None:
            file.seek(byteorder.offset)
            order = file.read(min(byteorder.size, 16))
            if order != b"little":
                raise FormatError(
                    f"{path}: byteorder: expected little, got {order!r}; save it on a little-endian machine"
                )
        place = places[pickles[0]]
        if place.size > MAX_PICKLE_BYTES:
            raise FormatError(
                f"{path}: data.pkl: expected at most {MAX_PICKLE_BYTES} bytes, got {place.size}"
            )
        file.seek(place.offset)
        pickled = file.read(place.size)
    start = prefix + "data/"
    return {name[len(start) :]: place for name, place in places.items() if name.startswith(start)}, pickled


def _locate(file: io.BufferedReader, info: zipfile.ZipInfo, size: int, path: Path) -> _Entry:
    """Where an entry's data lies, by its local header, checked against the file's size."""
    name = info.filename[:200]
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise FormatError(
            f"{path}: entry {name!r} is compressed; torch.save stores entries as they are, save it again"
        )
    if info.flag_bits & 1:
        raise FormatError(f"{path}: entry {name!r} is encrypted")
    if not 0 <= info.header_offset <= size - 30:
        raise FormatError(
            f"{path}: entry {name!r}: its header at byte {info.header_offset} lies outside the file"
        )
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise FormatError(f"{path}: entry {name!r}: no local header at byte {info.header_offset}")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    offset = info.header_offset + 30 + name_length + extra_length
    if info.file_size < 0 or offset + info.file_size > size:
        raise FormatError(
            f"{path}: entry {name!r}: bytes {offset} to {offset + info.file_size} lie outside the file"
        )
    return _Entry(offset, info.file_size)


def _refuse_overlap(places: dict[str, _Entry], path: Path) -> None:
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].size)):
        if place.offset < end:
            raise FormatError(f"{path}: entry {name[:200]!r} overlaps the one before it")
        end = place.offset + place.size
