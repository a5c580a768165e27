"""Interprets the pickle of a `torch.save` file by closed lists, and executes nothing.

A pickle is a program. Here its opcodes are interpreted by a machine that knows a closed list of opcodes and a
closed list of names; a name is a label, never looked up, imported or called. What is not on the lists is a
`FormatError`.

Source of the format: torch/_utils.py (`_rebuild_tensor_v2`), torch/serialization.py, pickletools.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FormatError

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
    "torch ComplexFloatStorage": ("C64", 8),
    "torch.storage UntypedStorage": ("U8", 1),  # of _rebuild_tensor_v3, which names the dtype itself
}
DTYPES = {  # what has no storage type of its own
    "torch uint16": ("U16", 2),
    "torch uint32": ("U32", 4),
    "torch uint64": ("U64", 8),
    "torch float8_e4m3fn": ("F8_E4M3", 1),
    "torch float8_e5m2": ("F8_E5M2", 1),
    "torch float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "torch float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "torch float8_e8m0fnu": ("F8_E8M0", 1),
}
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_TENSOR_DTYPE = "torch._utils _rebuild_tensor_v3"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
REBUILD_PARAMETER_STATE = "torch._utils _rebuild_parameter_with_state"  # with Python attributes, dropped
REBUILD_TYPE = "torch._tensor _rebuild_from_type_v2"  # a plain tensor with Python attributes, dropped
TYPES = frozenset(("torch Tensor", "torch.nn.parameter Parameter"))
ORDERED_DICT = "collections OrderedDict"
NAMES = frozenset(
    (*STORAGES, *DTYPES, *TYPES, ORDERED_DICT, REBUILD_TENSOR, REBUILD_TENSOR_DTYPE)
) | frozenset((REBUILD_PARAMETER, REBUILD_PARAMETER_STATE, REBUILD_TYPE))


@dataclass(frozen=True)
class _Name:
    """A name that the pickle mentions; a label that is compared, never resolved."""

    text: str


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: str
    itemsize: int
    count: int  # elements


@dataclass(frozen=True)
class View:
    """A tensor inside one storage; `start` and `strides` in elements, `strides` None when row-major."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    count: int
    strides: tuple[int, ...] | None


class _Mark:
    """The pickle machine's mark on the stack."""


def interpret(pickled: bytes, path: Path) -> Any:
    """The object that the pickle describes: dicts, lists, tuples, plain values and `View`s.

    Args:
        pickled: the bytes of data.pkl.
        path: the file it comes from, for messages.

    Raises:
        FormatError: a truncated or damaged pickle, or one that needs more than a dict of tensors needs.
    """
    try:
        return _interpret(pickled, path)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        struct.error,
        OverflowError,
        RecursionError,
    ) as error:
        raise FormatError(f"{path}: data.pkl is truncated or damaged: {error}") from error


def describe_kind(value: Any) -> str:
    """A description that does not print the value, which may be huge or nested without end."""
    if isinstance(value, _Name):
        return f"the name {value.text!r}"
    return f"a {type(value).__name__.lstrip('_').lower()}"


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
            values = pop_to_mark()
            _expect(stack[-1], list).extend(values)
        elif name == "SETITEM":
            value = stack.pop()
            key = stack.pop()
            _set_items(_expect(stack[-1], dict), [key, value])
        elif name == "SETITEMS":
            pairs = pop_to_mark()
            _set_items(_expect(stack[-1], dict), pairs)
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
            raise FormatError(
                f"{path}: data.pkl: opcode {name} at byte {position} is not one that a dict of tensors needs"
            )
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
        raise TypeError(f"expected {kind.__name__.lstrip('_')}, got {describe_kind(value)}")
    return value


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int)):
            raise TypeError(f"a dict key is {describe_kind(key)}")
        if key in target:
            raise ValueError(f"the key {str(key)[:200]!r} occurs twice")
        target[key] = value


def _name(text: str, position: int, path: Path) -> _Name:
    if text not in NAMES:
        raise FormatError(
            f"{path}: data.pkl names {text[:200].replace(' ', '.', 1)!r} at byte {position}; "
            "only tensors are read, nothing is executed. Save model.state_dict() alone, or distrust the file"
        )
    return _Name(text)


def _storage(value: Any, path: Path) -> Storage:
    """('storage', type, key, location, count) -> Storage."""
    items = _expect(value, tuple)
    if len(items) != 5 or items[0] != "storage":
        raise ValueError("a persistent id is not a storage")
    kind, key, count = _expect(items[1], _Name), _expect(items[2], str), _size(items[4])
    if kind.text not in STORAGES:
        raise FormatError(f"{path}: {kind.text!r} is not a storage type that is read")
    dtype, itemsize = STORAGES[kind.text]
    return Storage(key, dtype, itemsize, count)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("a size or stride is not an integer between 0 and 2^62")
    return value


def _reduce(function: _Name, arguments: tuple[Any, ...], path: Path) -> Any:
    if function.text == ORDERED_DICT:
        if arguments:
            raise ValueError("OrderedDict with arguments")
        return {}
    if function.text in (REBUILD_PARAMETER, REBUILD_PARAMETER_STATE):
        if not arguments:
            raise ValueError("a parameter without data")
        return _expect(arguments[0], View)
    if function.text == REBUILD_TYPE:
        inner, kind, inner_arguments, _ = arguments
        if _expect(kind, _Name).text not in TYPES or _expect(inner, _Name).text == REBUILD_TYPE:
            raise ValueError(f"{kind.text!r} is not a kind of tensor that is read")
        return _reduce(inner, _expect(inner_arguments, tuple), path)
    if function.text == REBUILD_TENSOR:
        if len(arguments) not in (6, 7):
            raise ValueError(f"_rebuild_tensor_v2 with {len(arguments)} arguments")
        storage, offset, shape, stride = arguments[:4]
        return _rebuild(storage, offset, shape, stride, path)
    if function.text == REBUILD_TENSOR_DTYPE:
        if len(arguments) not in (7, 8):
            raise ValueError(f"_rebuild_tensor_v3 with {len(arguments)} arguments")
        storage, offset, shape, stride = arguments[:4]
        return _rebuild(_typed(storage, arguments[6]), offset, shape, stride, path)
    raise ValueError(f"{function.text!r} is called")


def _typed(storage: Any, dtype: Any) -> Storage:
    """An untyped storage as one of elements of `dtype`."""
    storage, dtype = _expect(storage, Storage), _expect(dtype, _Name)
    if dtype.text not in DTYPES:
        raise ValueError(f"{dtype.text!r} is not a dtype that is read")
    code, itemsize = DTYPES[dtype.text]
    if storage.itemsize != 1 or storage.count % itemsize:
        raise ValueError(f"a storage of {storage.count} bytes for {dtype.text!r}")
    return Storage(storage.key, code, itemsize, storage.count // itemsize)


def _rebuild(storage: Any, start: Any, shape: Any, strides: Any, path: Path) -> View:
    storage, start = _expect(storage, Storage), _size(start)
    shape = tuple(map(_size, _expect(shape, tuple)))
    strides = tuple(map(_size, _expect(strides, tuple)))
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions with {len(strides)} strides; at most {MAX_DIMENSIONS}")
    count = extent = 1
    for size in shape:
        count *= size
        extent *= size or 1
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else -1
    if start + max(count, last + 1) > storage.count or extent >= 1 << 62:
        raise FormatError(
            f"{path}: a tensor of shape {list(shape)} and strides {list(strides)} at element {start} does not fit "
            f"its storage of {storage.count} elements"
        )
    return View(storage, start, shape, count, None if _is_row_major(shape, strides) else strides)


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1  # from the last dimension back; a stride is never used where the size is 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True
