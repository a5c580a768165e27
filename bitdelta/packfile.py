"""The packed delta on the disk: what the folder holds, and reading it by memory map.

    delta_config.json           version, base, and per tensor its entry (below), in the fine-tune's order
    delta_model.safetensors     the tensors; or delta_model-00001-of-0000N.safetensors and an index
    README.md                   a model card
    config.json, ...            the fine-tune's other files, where they differ from the base's

Keys of the tensors, for NAME of shape [N, K] (a stack of matrices [E, N, K] has one more dimension in front):

    NAME.sign           U32 [P, ceil(N/16), 8 ceil(K/256), 16]   at a multiple of 64 bytes of the file
    NAME.scale          F32 [P]      form "tensor"               the signs come first, then what has 8-byte
    NAME.scale          F32 [P, N]   form "row"                  elements, 4-byte, 2-byte, 1-byte, so that
    NAME.scale.row      F32 [P, N]   form "rank1"                all is aligned without holes
    NAME.scale.column   F32 [P, K]   form "rank1"
    NAME.rows           [A, K]       the last A rows, which the base does not have; N counts the others
    NAME                as the fine-tune's                       form "whole"

delta_config.json: `format_version` (1), `tool_version`; `base` and `finetuned` (id, revision, name; over a quantised
base how, and a fingerprint of its files: the tensors' fingerprints are then of the dequantised weights); `files` (where
the other files come from, and their SHA-256); `absent` (the base's tensors that the fine-tune lacks); with a budget
`budget`, what was asked, used and left; and `tensors`, their entries by name in the fine-tune's order.

An entry: form (also "same" as the base's, and "tied" to another tensor of the fine-tune), shape and dtype of the
fine-tune's tensor, planes, rows (A), bytes, sha256 of the keys' bytes in the order above, fingerprint of the base's
tensor (SHA-256 over dtype, shape and 16 evenly spaced 4-KiB blocks), base_crc32c of the base's elements that were
used, relative_error ||d - approximation|| / ||d|| of d = finetuned - base on up to 16 rows, evenly spaced; after
`calibrate` output_error ||X (d - approximation)^T|| / ||X d^T|| on inputs X of the layer that were held out, and
output_error_before, and of a stack kept_experts, those that kept their signs. Of a form chosen by a budget (spend.py)
effect, the mean squared change of a logit that d makes; "same" with a relative_error (of 1) has changed and is left
as the base's.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .checkpoint import travels
from .delta import Delta
from .errors import BaseMismatchError, FormatError
from .header import read_json, read_safetensors
from .layout import contained, inside
from .tensor import DTYPES, FLOATS, Tensor

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

FORMAT_VERSION = 1
CONFIG, MODEL, INDEX, CARD = (
    "delta_config.json",
    "delta_model.safetensors",
    "delta_model.safetensors.index.json",
    "README.md",
)
SHARD = re.compile(r"delta_model-\d{5}-of-\d{5}\.safetensors")
PACKED = ("tensor", "row", "rank1")  # forms with signs
FORMS = (*PACKED, "whole", "same", "tied")
MAX_PLANES = 8
ALIGNMENT = 64  # of the data and of every sign tensor in the file: one line of signs

Spec = tuple[str, tuple[int, ...]]  # dtype code, shape


def keys_of(name: str, entry: Mapping[str, Any]) -> dict[str, Spec]:
    """The keys of one tensor with dtype and shape, in the order that its sha256 takes them."""
    form, shape = entry["form"], tuple(entry["shape"])
    if form == "whole":
        return {name: (entry["dtype"], shape)}
    if form not in PACKED:
        return {}
    added = entry.get("rows", 0)
    *stack, n, k = shape
    n -= added
    lead = (*stack, entry["planes"])
    keys: dict[str, Spec] = {f"{name}.sign": ("U32", (*lead, -(-n // 16), 8 * -(-k // 256), 16))}
    if form == "rank1":
        keys[f"{name}.scale.row"] = ("F32", (*lead, n))
        keys[f"{name}.scale.column"] = ("F32", (*lead, k))
    else:
        keys[f"{name}.scale"] = ("F32", (*lead, n) if form == "row" else lead)
    if added:
        keys[f"{name}.rows"] = (entry["dtype"], (added, k))
    return keys


def spec_bytes(spec: Spec) -> int:
    return DTYPES[spec[0]][0] * math.prod(spec[1]) // 8


def load(delta_dir: str | os.PathLike[str]) -> Packfile:
    """Opens a packed delta; no tensor is read before it is used, none is copied.

    Args:
        delta_dir: a folder written by `bitdelta.compress`, or a Hub id (`NAME@REVISION`).

    Returns:
        A read-only mapping, tensor name -> what the fine-tune changed; see `Packfile`.

    Raises:
        bitdelta.FormatError: not a packed delta, an unknown version, or parts that do not belong together.
        OSError: a file cannot be read.

    >>> bitdelta.load("vicuna-delta")["model.layers.0.mlp.up_proj.weight"].planes    # doctest: +SKIP
    1
    """
    from .hub import resolve

    root = resolve(delta_dir).root
    if not (root / CONFIG).is_file():
        raise FormatError(f"{root}: no {CONFIG} in it; not a packed delta")
    config = read_json(contained(root, CONFIG))
    _check_config(config, root / CONFIG)
    return Packfile(root, config, _check_tensors(config["tensors"], _read_files(root), root))


class Packfile(Mapping[str, Any]):
    """A packed delta. Tensor name of the fine-tune -> what it is there:

    Delta            base [N, K] + sign planes; `rows(name)` are the added rows that follow, if any
    tuple of Delta   one per matrix of a stack [E, N, K]
    np.ndarray       stored whole
    None             the same as the base's

    A tied tensor is what the tensor is that it is tied to. `entries` describes every tensor (see the module).
    """

    def __init__(self, root: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.root = root
        self.config = config
        self.entries: dict[str, dict[str, Any]] = config["tensors"]
        self.tensors = tensors  # key of the file -> Tensor

    def __getitem__(self, name: str) -> Delta | tuple[Delta, ...] | np.ndarray | None:
        name, entry = self._untied(name)
        if entry["form"] == "same":
            return None
        if entry["form"] == "whole":
            return self.tensors[name].array()
        shape = entry["shape"]
        n, k = shape[-2] - entry.get("rows", 0), shape[-1]
        row, column = self._scales(name, entry, n)
        sign = self.tensors[f"{name}.sign"].array()
        if len(shape) == 2:
            return Delta(sign=sign, scale=row, column=column, shape=(n, k), form=entry["form"])
        return tuple(
            Delta(
                sign=sign[i],
                scale=row[i],
                column=None if column is None else column[i],
                shape=(n, k),
                form=entry["form"],
            )
            for i in range(shape[0])
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        stored = sum(entry.get("bytes", 0) for entry in self.entries.values())
        return f"Packfile({str(self.root)!r}, {len(self)} tensors, {stored:,} bytes)"

    def _repr_html_(self) -> str:
        from .info import html

        return html(self)

    @property
    def quantized(self) -> str | None:
        """How the base was quantised whose weights this delta was taken from, or None."""
        found = self.config.get("base", {}).get("quantized")
        return None if found is None else str(found)

    def rows(self, name: str) -> np.ndarray | None:
        """The rows that the fine-tune added below the base's (new tokens), or None."""
        name, entry = self._untied(name)
        return self.tensors[f"{name}.rows"].array() if entry.get("rows") else None

    def files(self) -> dict[str, Path]:
        """The fine-tune's other files that travel with the delta: name -> path."""
        found = self.config.get("files", {})
        return {name: inside(self.root, name) for name, file in found.items() if file["from"] == "delta"}

    @property
    def budget(self) -> dict[str, Any] | None:
        """What came of the budget that chose the forms, if one did; see spend.py."""
        return self.config.get("budget")

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Raises BaseMismatchError unless `checkpoint` is the base that this delta was made from.

        Compares the fingerprint of every tensor that the delta needs; `bitdelta.verify` compares every byte.
        """
        wrong = [name for name in self.entries if not self.has_base(name, checkpoint)]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            known = self.config.get("base", {})
            made_from = known.get("id") or known.get("name")
            which = "has no such tensor" if wrong[0] not in checkpoint else "has other values"
            if self.quantized is not None:
                made_from = f"{made_from}, quantised ({self.quantized}): load it with allow_base='quantized'"
            raise BaseMismatchError(
                f"{wrong[0]}: {checkpoint.root} {which}{more}; {self.root} was made from {made_from}"
                + (f" at revision {known['revision']}" if known.get("revision") else "")
            )

    def has_base(self, name: str, checkpoint: Checkpoint) -> bool:
        """Whether the base's tensor, if the delta needs it, has the fingerprint of the one it was made from."""
        expected = self.entries[name].get("fingerprint")
        return expected is None or name in checkpoint and checkpoint.fingerprint(name) == expected

    def _untied(self, name: str) -> tuple[str, dict[str, Any]]:
        entry = self.entries[name]
        return (
            (entry["tied_to"], self.entries[entry["tied_to"]]) if entry["form"] == "tied" else (name, entry)
        )

    def _scales(self, name: str, entry: dict[str, Any], n: int) -> tuple[np.ndarray, np.ndarray | None]:
        if entry["form"] == "rank1":
            return self.tensors[f"{name}.scale.row"].array(), self.tensors[f"{name}.scale.column"].array()
        scale = self.tensors[f"{name}.scale"].array()
        if entry["form"] == "tensor":
            scale = np.repeat(scale[..., None], n, axis=-1)
        return scale, None


def _read_files(root: Path) -> dict[str, Tensor]:
    """Key -> Tensor, of the one file or of all shards."""
    if not (root / INDEX).exists():
        return read_safetensors(contained(root, MODEL))[0]
    weight_map = read_json(contained(root, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{root / INDEX}: weight_map: expected an object of key -> file name")
    tensors: dict[str, Tensor] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise FormatError(
                f"{root / INDEX}: expected delta_model-*-of-*.safetensors, got {str(file)[:200]!r}"
            )
    for file in dict.fromkeys(weight_map.values()):
        for key, tensor in read_safetensors(contained(root, file))[0].items():
            if weight_map.get(key) != file:
                raise FormatError(f"{root / INDEX}: {key[:200]} is in {file}, the index says otherwise")
            tensors[key] = tensor
    missing = next((key for key in weight_map if key not in tensors), None)
    if missing is not None:
        raise FormatError(f"{root / INDEX}: {missing[:200]} is not in {weight_map[missing]}")
    return tensors


def _check_tensors(entries: dict[str, Any], tensors: dict[str, Tensor], root: Path) -> dict[str, Tensor]:
    """Every key that the entries need, of the right kind and place, and no other."""
    expected: dict[str, Spec] = {}
    for name, entry in entries.items():
        keys = keys_of(name, entry)
        twice = next((key for key in keys if key in expected), None)
        if twice is not None:
            raise FormatError(f"{root}: two tensors need the key {twice[:200]}")
        expected.update(keys)
        size = sum(map(spec_bytes, keys.values()))
        if entry["bytes"] != size:
            raise FormatError(f"{root / CONFIG}: {name[:200]}: bytes: expected {size}, got {entry['bytes']}")
    for key, (dtype, shape) in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            raise FormatError(f"{root}: {key[:200]} is missing; the config says that it is there")
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise FormatError(
                f"{root}: {key[:200]}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if key.endswith(".sign") and dtype == "U32" and tensor.offset % ALIGNMENT:
            raise FormatError(
                f"{root}: {key[:200]} starts at byte {tensor.offset}, not a multiple of {ALIGNMENT}"
            )
    unknown = next((key for key in tensors if key not in expected), None)
    if unknown is not None:
        raise FormatError(f"{root}: {unknown[:200]} is in the file but not in {CONFIG}")
    return tensors


def _check_config(config: dict[str, Any], path: Path) -> None:
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: format_version: expected a number from 1, got {str(version)[:50]!r}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version {version} is newer than this bitdelta, which reads up to {FORMAT_VERSION}; "
            "upgrade bitdelta"
        )
    entries = config.get("tensors")
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: tensors: expected an object of name -> entry")
    for name, entry in entries.items():
        _check_entry(name, entry, path)
    for name, entry in entries.items():
        if entry["form"] == "tied":
            other = entries.get(entry.get("tied_to") if isinstance(entry.get("tied_to"), str) else None)
            if other is None or other["form"] == "tied" or other["shape"] != entry["shape"]:
                raise FormatError(f"{path}: {name[:200]}: tied_to: expected another tensor of the same shape")
    for part in ("base", "finetuned"):
        about = config.get(part, {})
        if not isinstance(about, dict) or not all(isinstance(v, str | None) for v in about.values()):
            raise FormatError(f"{path}: {part}: expected an object of texts")
    _check_budget(config.get("budget"), path)
    absent, files = config.get("absent", []), config.get("files", {})
    if not isinstance(absent, list) or not all(isinstance(name, str) for name in absent):
        raise FormatError(f"{path}: absent: expected a list of names")
    if not isinstance(files, dict):
        raise FormatError(f"{path}: files: expected an object of name -> file")
    for name, file in files.items():
        if not is_plain(name) or not isinstance(file, dict) or file.get("from") not in ("base", "delta"):
            raise FormatError(
                f"{path}: files: {name[:200]!r}: expected a file name, and `from` base or delta"
            )
        if not _is_hex(file.get("sha256")):
            raise FormatError(f"{path}: files: {name[:200]!r}: sha256: expected 64 hexadecimal digits")


def _check_budget(budget: Any, path: Path) -> None:
    if budget is None:
        return
    names = budget.get("too_large") if isinstance(budget, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{path}: budget: expected an object with too_large, a list of names")
    for field in ("bits", "bits_per_parameter", "effect", "left"):
        if not _is_error(budget.get(field)):
            raise FormatError(f"{path}: budget: {field}: expected a number from 0")


def is_plain(name: str) -> bool:
    """Whether this is the name of a file that may travel, at most one folder deep; never of weights."""
    parts = name.split("/")
    return (
        len(parts) <= 2
        and not any(part in ("", ".", "..") or part.startswith("delta_model") for part in parts)
        and not any(character in name for character in "\0\\")
        and travels(name)
    )


def _check_entry(name: str, entry: Any, path: Path) -> None:
    def refuse(field: str, expected: str) -> NoReturn:
        got = entry.get(field) if isinstance(entry, dict) else entry
        raise FormatError(f"{path}: {name[:200]}: {field}: expected {expected}, got {str(got)[:80]!r}")

    if not isinstance(entry, dict):
        refuse("entry", "an object")
    form, shape, dtype = entry.get("form"), entry.get("shape"), entry.get("dtype")
    if form not in FORMS:
        refuse("form", f"one of {', '.join(FORMS)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(size) for size in shape):
        refuse("shape", "a list of sizes")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse("dtype", f"one of {', '.join(DTYPES)}")
    if not _is_count(entry.get("bytes")):
        refuse("bytes", "a count")
    if form in PACKED:
        if dtype not in FLOATS:
            refuse("dtype", f"one of {', '.join(sorted(FLOATS))}")
        if not _is_count(entry.get("planes")) or not 1 <= entry["planes"] <= MAX_PLANES:
            refuse("planes", f"1 to {MAX_PLANES}")
        if len(shape) not in (2, 3) or not all(shape):
            refuse("shape", "2 or 3 sizes of at least 1")
        rows = entry.get("rows", 0)
        if not _is_count(rows) or rows and (len(shape) != 2 or rows >= shape[0]):
            refuse("rows", "fewer rows than the shape has")
    if form in (*PACKED, "same"):
        if not _is_hex(entry.get("fingerprint")):
            refuse("fingerprint", "64 hexadecimal digits")
        if not _is_count(entry.get("base_crc32c", 0)) or entry.get("base_crc32c", 0) >= 1 << 32:
            refuse("base_crc32c", "a number of 32 bits")
    if form in (*PACKED, "whole") and not _is_hex(entry.get("sha256")):
        refuse("sha256", "64 hexadecimal digits")
    for field in ("relative_error", "output_error", "output_error_before", "effect"):
        if field in entry and not _is_error(entry[field]):
            refuse(field, "a number from 0")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_error(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
