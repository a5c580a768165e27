"""What becomes of one tensor in a packed delta: its entry in the config, and its arrays in the order of the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .array import flat_bytes
from .delta import Delta
from .packfile import PACKED, Spec, keys_of, spec_bytes
from .tensor import DTYPES, Tensor

Value = Delta | Sequence[Delta] | np.ndarray | None
Entry = dict[str, Any]
Described = tuple[Entry, list[np.ndarray]]

CODES = {np.dtype(kind): code for code, (_, kind) in DTYPES.items() if kind and code != "BF16"}


def describe(
    name: str,
    value: Value,
    rows: np.ndarray | None,
    base: Tensor | None,
    entries: Mapping[str, Entry],
    about: Mapping[str, Any],
) -> Described:
    """The entry, without the checksum of its bytes, and its arrays; arguments as of `PackfileWriter.add`.

    Args:
        base: the base's tensor of this name, if there is one.
        entries: those written before, for ties.
        about: further fields; None says nothing.
    """
    facts = {field: fact for field, fact in about.items() if fact is not None}
    if value is None:
        entry, arrays = _unchanged(name, base, entries, facts.get("tied_to"))
    elif isinstance(value, np.ndarray):
        code = facts.get("dtype") or _code(name, value)
        entry, arrays = {"form": "whole", "shape": list(value.shape), "dtype": code}, [value]
    else:
        entry, arrays = _packed(value, rows, "F32" if base is None else base.dtype)
    entry |= {"shape": list(facts.pop("shape", entry["shape"])), "dtype": facts.pop("dtype", entry["dtype"])}
    entry["bytes"] = sum(map(spec_bytes, keys_of(name, entry).values()))
    if entry["form"] in (*PACKED, "same") and "fingerprint" not in facts:
        if base is None:
            raise ValueError(f"add: {name} is not a tensor of the base; there is nothing to add its delta to")
        facts["fingerprint"] = base.fingerprint()
    return entry | facts, arrays


def _unchanged(
    name: str, base: Tensor | None, entries: Mapping[str, Entry], tied_to: str | None
) -> Described:
    if tied_to is not None:
        other = entries[tied_to]
        return {"form": "tied", "shape": other["shape"], "dtype": other["dtype"]}, []
    if base is None:
        raise ValueError(f"add: {name} is not a tensor of the base; there is nothing that it is the same as")
    return {"form": "same", "shape": list(base.shape), "dtype": base.dtype}, []


def _packed(value: Delta | Sequence[Delta], rows: np.ndarray | None, dtype: str) -> Described:
    stack = [value] if isinstance(value, Delta) else list(value)
    first = stack[0]
    if any((d.form, d.planes, d.shape) != (first.form, first.planes, first.shape) for d in stack):
        raise ValueError("add: the matrices of a stack differ in form, planes or shape")
    parts: list[list[np.ndarray]] = [
        [d.sign for d in stack],
        [d.scale[:, 0] if d.form == "tensor" else d.scale for d in stack],
    ]
    if first.form == "rank1":
        parts.append([d.column for d in stack if d.column is not None])
    arrays: list[np.ndarray] = [part[0] if isinstance(value, Delta) else np.stack(part) for part in parts]
    lead = () if isinstance(value, Delta) else (len(stack),)
    n, k = first.shape
    entry: Entry = {"form": first.form, "planes": first.planes, "shape": [*lead, n, k], "dtype": dtype}
    if rows is not None:
        entry |= {"shape": [n + rows.shape[0], k], "rows": int(rows.shape[0])}
        arrays.append(rows)
    return entry, arrays


def bytes_of(key: str, spec: Spec, array: np.ndarray) -> memoryview:
    """The bytes that the file holds for a key; a view where the array is contiguous."""
    flat = flat_bytes(array)
    if flat.nbytes != spec_bytes(spec):
        raise ValueError(
            f"add: {key}: expected {spec[0]} {list(spec[1])}, got {array.dtype} {list(array.shape)}"
        )
    return memoryview(flat)


def _code(name: str, array: np.ndarray) -> str:
    """The safetensors code of an array's dtype."""
    if getattr(array, "__bitdelta_dtype__", array.dtype.name) == "bfloat16":
        return "BF16"
    code = CODES.get(array.dtype)
    if code is None:
        raise TypeError(f"add: {name}: a tensor of {array.dtype} has no place in a safetensors file")
    return code
