"""Reads the tensors of a `torch.save` file (`pytorch_model*.bin`, `diff.pt`) without executing its pickle.

    ARCHIVE.zip                              entries stored, never compressed
        PREFIX/data.pkl                      pickle of a flat dict: name -> _rebuild_tensor_v2(storage, ...)
        PREFIX/byteorder                     b"little" (absent in older files, which are little-endian too)
        PREFIX/data/KEY                      the raw bytes of one storage, memory-mapped where they lie

A pickle is a program. Here its opcodes are interpreted by a machine that knows a closed list of opcodes and a closed
list of names; a name is a label, never looked up, imported or called. Whatever is not on the lists is a `FormatError`.
Everything a file claims (offsets, sizes, shapes, strides) is checked against the file before a byte of it is read.

Source of the format: torch/serialization.py (`_save`), torch/_utils.py (`_rebuild_tensor_v2`), pickletools.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FormatError

if TYPE_CHECKING:
    from .checkpoint import Tensor

MAX_PICKLE_BYTES = 64 << 20  # a 100 000-tensor model needs about 20 MB
MAX_DIMENSIONS = 8

# storage type -> (safetensors code, bytes of one element)
STORAGES = {
    "torch DoubleStorage": ("F64", 8),
    "torch FloatStorage": ("F32", 4),
    "torch HalfStorage": ("F16", 2),
    "torch BFloat16Storage": ("BF16", 2),
    "torch LongStorage": ("I64", 8),
    "torch IntStorage": ("I32", 4),
    "torch ShortStorage": ("I16", 2),
    "torch CharStorage": ("I8", 1),
    "torch ByteStorage": ("U8", 1),
    "torch BoolStorage": ("BOOL", 1),
}
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
ORDERED_DICT = "collections OrderedDict"
NAMES = frozenset(STORAGES) | {REBUILD_TENSOR, REBUILD_PARAMETER, ORDERED_DICT}


@dataclass(frozen=True)
class _Name:
    """A name that the pickle mentions; a label that is compared, never resolved."""

    text: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    itemsize: int
    count: int  # elements


@dataclass(frozen=True)
class _View:
    """A contiguous tensor inside one storage; `start` in elements."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    count: int


class _Mark:
    """The pickle machine's mark on the stack."""


@dataclass(frozen=True)
class _Entry:
    offset: int  # of the data, in the file
    size: int


def open_torch_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, by name, as memory-mapped `bitdelta.checkpoint.Tensor`.

    Args:
        path: a zip container holding one flat dict of contiguous tensors.

    Returns:
        name -> Tensor, in the file's order. Tied tensors share their offset.

    Raises:
        FormatError: anything but that: legacy files, other objects, compressed entries, offsets, shapes or
            sizes that the file does not hold, names outside the closed list.
        OSError: the file cannot be read.
    """
    from .checkpoint import Tensor  # checkpoint.py reads .bin shards through this module

    path = Path(path)
    entries, pickled = _read_archive(path)
    try:
        state = _interpret(pickled, path)
    except (ValueError, IndexError, KeyError, TypeError, struct.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{path}: data.pkl is truncated or damaged: {error}") from error
    if not isinstance(state, dict):
        raise FormatError(f"{path}: expected a dict of tensors, got {_kind(state)}; save model.state_dict()")
    tensors = {}
    for name, view in state.items():
        if not isinstance(name, str):
            raise FormatError(f"{path}: expected tensor names to be text, got {_kind(name)}")
        if not isinstance(view, _View):
            raise FormatError(f"{path}: {name[:200]!r} is {_kind(view)}, not a tensor; save model.state_dict() alone")
        storage = view.storage
        entry = entries.get(storage.key)
        if entry is None:
            raise FormatError(f"{path}: {name[:200]!r} needs the entry data/{storage.key[:80]}, which is missing")
        if entry.size != storage.count * storage.itemsize:
            raise FormatError(
                f"{path}: entry data/{storage.key[:80]} of {name[:200]!r}: expected {storage.count * storage.itemsize} "
                f"bytes, got {entry.size}"
            )
        offset = entry.offset + view.start * storage.itemsize
        if view.count and offset % storage.itemsize:
            raise FormatError(f"{path}: {name[:200]!r} starts at byte {offset}, not aligned to {storage.itemsize} bytes")
        tensors[name] = Tensor(
            name=name,
            dtype=storage.dtype,
            shape=view.shape,
            nbytes=view.count * storage.itemsize,
            path=path,
            offset=offset,
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
                f"{path}: not a zip container of torch.save (files written before torch 1.6 are not); convert it: python -c "
                f'"import torch; torch.save(torch.load({quoted!r}, map_location=\'cpu\', weights_only=True), '
                f"{quoted + '.zip'!r})\""
            )
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error, EOFError) as error:
            raise FormatError(f"{path}: damaged or truncated zip container: {error}") from error
        places: dict[str, _Entry] = {}
        for info in infos:
            if info.filename in places:
                raise FormatError(f"{path}: two entries are named {info.filename[:200]!r}")
            places[info.filename] = _locate(file, info, size, path)
        _refuse_overlap(places, path)
        pickles = [name for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise FormatError(f"{path}: expected one PREFIX/data.pkl, got {len(pickles)}; not written by torch.save?")
        prefix = pickles[0][: -len("data.pkl")]
        byteorder = places.get(prefix + "byteorder")
        if byteorder is not None:
            file.seek(byteorder.offset)
            order = file.read(min(byteorder.size, 16))
            if order != b"little":
                raise FormatError(f"{path}: byteorder: expected little, got {order!r}; save it on a little-endian machine")
        place = places[pickles[0]]
        if place.size > MAX_PICKLE_BYTES:
            raise FormatError(f"{path}: data.pkl: expected at most {MAX_PICKLE_BYTES} bytes, got {place.size}")
        file.seek(place.offset)
        pickled = file.read(place.size)
    start = prefix + "data/"
    return {name[len(start) :]: place for name, place in places.items() if name.startswith(start)}, pickled


def _locate(file: io.BufferedReader, info: zipfile.ZipInfo, size: int, path: Path) -> _Entry:
    """Where an entry's data lies, by its local header, checked against the file's size."""
    name = info.filename[:200]
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise FormatError(f"{path}: entry {name!r} is compressed; torch.save stores entries as they are, save it again")
    if info.flag_bits & 1:
        raise FormatError(f"{path}: entry {name!r} is encrypted")
    if not 0 <= info.header_offset <= size - 30:
        raise FormatError(f"{path}: entry {name!r}: its header at byte {info.header_offset} lies outside the file")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise FormatError(f"{path}: entry {name!r}: no local header at byte {info.header_offset}")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    offset = info.header_offset + 30 + name_length + extra_length
    if info.file_size < 0 or offset + info.file_size > size:
        raise FormatError(f"{path}: entry {name!r}: bytes {offset} to {offset + info.file_size} lie outside the file of {size}")
    return _Entry(offset, info.file_size)


def _refuse_overlap(places: dict[str, _Entry], path: Path) -> None:
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].size)):
        if place.offset < end:
            raise FormatError(f"{path}: entry {name[:200]!r} overlaps the one before it")
        end = place.offset + place.size


def _interpret(pickled: bytes, path: Path) -> Any:
    """Runs the closed list of opcodes; returns the object left at STOP."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _Mark:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise ValueError("a mark is missing")

    for opcode, argument, position in _operations(pickled):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name in _TUPLES:
            items = tuple(stack[-_TUPLES[name] :])
            if len(items) != _TUPLES[name]:
                raise ValueError("the stack is empty")
            del stack[-_TUPLES[name] :]
            stack.append(items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "APPEND":
            item = stack.pop()
            _expect(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = pop_to_mark()
            _expect(stack[-1], list).extend(items)
        elif name == "SETITEM":
            value = stack.pop()
            key = stack.pop()
            _set_items(_expect(stack[-1], dict), [key, value])
        elif name == "SETITEMS":
            items = pop_to_mark()
            _set_items(_expect(stack[-1], dict), items)
        elif name == "GLOBAL":
            stack.append(_name(argument, position, path))
        elif name == "STACK_GLOBAL":
            attribute, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
            stack.append(_name(f"{module} {attribute}", position, path))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), path))
        elif name == "REDUCE":
            arguments = _expect(stack.pop(), tuple)
            stack.append(_reduce(_expect(stack.pop(), _Name), arguments, path))
        elif name == "BUILD":
            stack.pop()  # the attributes of an OrderedDict (`_metadata`), which carry nothing we need
            _expect(stack[-1], dict)
        elif name == "STOP":
            if len(stack) != 1:
                raise ValueError(f"{len(stack)} objects are left at the end, expected one")
            return stack[0]
        else:
            raise FormatError(f"{path}: data.pkl: opcode {name} at byte {position} is not one that a dict of tensors needs")
    raise ValueError("no STOP")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING")
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _operations(pickled: bytes) -> Iterator[tuple[Any, Any, int]]:
    # genops reads opcodes and their arguments and executes nothing
    for opcode, argument, position in pickletools.genops(pickled):
        yield opcode, argument, position or 0


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__.lstrip('_')}, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """A description that does not print the value, which may be huge or nested without end."""
    if isinstance(value, _Name):
        return f"the name {value.text!r}"
    return f"a {type(value).__name__.lstrip('_').lower()}"


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2]):
        if not isinstance(key, (str, int)):
            raise TypeError(f"a dict key is {_kind(key)}")
        if key in target:
            raise ValueError(f"the key {str(key)[:200]!r} occurs twice")
        target[key] = value


def _name(text: str, position: int, path: Path) -> _Name:
    if text not in NAMES:
        raise FormatError(
            f"{path}: data.pkl names {text[:200].replace(' ', '.', 1)!r} at byte {position}; only tensors are read, nothing "
            "is executed. Save model.state_dict() alone, or do not trust this file"
        )
    return _Name(text)


def _storage(value: Any, path: Path) -> _Storage:
    """('storage', type, key, location, count) -> _Storage."""
    items = _expect(value, tuple)
    if len(items) != 5 or items[0] != "storage":
        raise ValueError("a persistent id is not a storage")
    kind, key, count = _expect(items[1], _Name), _expect(items[2], str), _size(items[4])
    if kind.text not in STORAGES:
        raise FormatError(f"{path}: {kind.text!r} is not a storage type that is read")
    dtype, itemsize = STORAGES[kind.text]
    return _Storage(key, dtype, itemsize, count)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("a size or stride is not an integer between 0 and 2^62")
    return value


def _reduce(function: _Name, arguments: tuple[Any, ...], path: Path) -> Any:
    if function.text == ORDERED_DICT:
        if arguments:
            raise ValueError("OrderedDict with arguments")
        return {}
    if function.text == REBUILD_PARAMETER:
        if not arguments:
            raise ValueError("a parameter without data")
        return _expect(arguments[0], _View)
    if function.text == REBUILD_TENSOR:
        if len(arguments) not in (6, 7):
            raise ValueError(f"_rebuild_tensor_v2 with {len(arguments)} arguments")
        return _rebuild(*arguments[:4], path)
    raise ValueError(f"{function.text!r} is called")


def _rebuild(storage: Any, start: Any, shape: Any, strides: Any, path: Path) -> _View:
    storage, start = _expect(storage, _Storage), _size(start)
    shape = tuple(map(_size, _expect(shape, tuple)))
    strides = tuple(map(_size, _expect(strides, tuple)))
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions with {len(strides)} strides; at most {MAX_DIMENSIONS}")
    count = 1
    for size in shape:
        count *= size
    expected = 1  # the stride of a row-major tensor, from the last dimension back; unread where the size is 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if count and size != 1 and stride != expected:
            raise FormatError(
                f"{path}: a tensor of shape {list(shape)} has strides {list(strides)}; only contiguous tensors are read, "
                "save it after .contiguous()"
            )
        expected *= size
    if start + count > storage.count:
        raise FormatError(
            f"{path}: a tensor of shape {list(shape)} at element {start} does not fit its storage of {storage.count} elements"
        )
    return _View(storage, start, shape, count)
