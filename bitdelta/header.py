"""Reads the header of a safetensors file, strictly: nothing that it claims is believed before it is checked.

    8 bytes    n, the header's length, little-endian; n <= 100 MB
    n bytes    UTF-8 JSON object, starting with `{`, padded with spaces:
               {"__metadata__": {text: text}, NAME: {"dtype": CODE, "shape": [...], "data_offsets": [begin, end]}}
    the rest   the tensors' bytes; begin and end count from here. No holes, no overlap, nothing left over.

Stricter than the safetensors library: duplicate names, unknown keys and leading spaces are refused too.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from .errors import FormatError
from .tensor import DTYPES, Tensor, file_size

MAX_JSON_BYTES = 100_000_000  # the safetensors library's own limit of a header
MAX_DIMENSIONS = 8


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of their bytes, and the file's metadata.

    Raises:
        FormatError: not such a file, truncated, or a header that does not agree with the file.
        OSError: the file cannot be read.
    """
    path = Path(path)
    size = file_size(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise FormatError(f"{path}: not a safetensors file: expected at least 8 bytes, got {size}")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_JSON_BYTES:
            raise FormatError(
                f"{path}: not a safetensors file: expected a header of at most {MAX_JSON_BYTES} bytes, got {length}"
            )
        if length > size - 8:
            raise FormatError(f"{path}: truncated: the header needs {8 + length} bytes, the file has {size}")
        raw = file.read(length)
    if len(raw) != length or raw[:1] != b"{":
        raise FormatError(f"{path}: not a safetensors file: the header does not start with {{")
    header = parse_json(raw, path, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__: expected an object of texts")
    return _tensors(header, path, 8 + length, size), metadata


def parse_json(raw: bytes, path: Path, part: str) -> dict[str, Any]:
    """A JSON object; duplicate keys, NaN and names that are not Unicode are refused."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the {part} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: the {part}: expected a JSON object, got a {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 100 MB."""
    size = file_size(path)
    if size > MAX_JSON_BYTES:
        raise FormatError(f"{path}: expected at most {MAX_JSON_BYTES} bytes, got {size}")
    return parse_json(path.read_bytes(), path, "file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode("utf-8")  # half a surrogate pair is no name: UnicodeEncodeError, a ValueError
        if key in found:
            raise ValueError(f"the key {key[:200]!r} occurs twice")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _tensors(header: dict[str, Any], path: Path, start: int, size: int) -> dict[str, Tensor]:
    """Checked entries, sorted by where their bytes lie; `start` = where the data begin in the file."""
    found = [_tensor(name, entry, path, start) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in found:
        if tensor.offset + tensor.nbytes > size:
            raise FormatError(
                f"{path}: truncated: {tensor.name} ends at byte {tensor.offset + tensor.nbytes}, the file has {size}"
            )
        if tensor.offset != end:
            problem = "overlaps what is before it" if tensor.offset < end else "follows a hole"
            raise FormatError(f"{path}: {tensor.name} {problem}: expected byte {end}, got {tensor.offset}")
        end = tensor.offset + tensor.nbytes
    if end != size:
        raise FormatError(f"{path}: the tensors end at byte {end}, the file has {size}")
    return {tensor.name: tensor for tensor in found}


def _tensor(name: str, entry: Any, path: Path, start: int) -> Tensor:
    if not name.isprintable():
        raise FormatError(f"{path}: expected a printable name, got {name[:200]!r}")
    place = f"{path}: {name[:200]}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{place}: expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{place}: dtype: expected one of {', '.join(DTYPES)}, got {str(dtype)[:50]!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{place}: shape: expected at most {MAX_DIMENSIONS} sizes, got {str(shape)[:100]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{place}: data_offsets: expected [begin, end], got {str(offsets)[:100]}")
    bits, extent = DTYPES[dtype][0], DTYPES[dtype][0]
    for length in shape:
        bits *= length
        extent *= length or 1  # NumPy cannot describe [0, 2^62, 2^62] either
    if extent >= 1 << 63:
        raise FormatError(f"{place}: shape: {shape} is beyond any memory")
    nbytes = offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        raise FormatError(f"{place}: {dtype} {shape}: expected {bits / 8:.15g} bytes, got {nbytes}")
    return Tensor(name, dtype, tuple(shape), nbytes, path, start + offsets[0])


def _are_sizes(values: Any) -> bool:
    # type(), as True is an int
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
