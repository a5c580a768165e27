"""Safetensors files with any header, and folders of them, for tests of reading."""

import json
import struct

import numpy as np
import pytest

from bitdelta.checkpoint import open_checkpoint
from bitdelta.errors import FormatError


def raw_file(path, header, data=b"", length=None):
    """A safetensors file with any header: a dict, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path, arrays):
    """A safetensors file of NumPy arrays; uint16 arrays become BF16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codes = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64", "uint8": "U8"}
    header, data = {}, b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = entry(codes[array.dtype.name], list(array.shape), len(data), len(data) + len(raw))
        data += raw
    text = json.dumps(header).encode()
    return raw_file(path, text + b" " * (-len(text) % 8), data)


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def refused(words, folder, error=FormatError):
    with pytest.raises(error, match=words) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SOME = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.uint16).reshape(3, 4),
    "model.norm.weight": np.linspace(-1, 1, 4, dtype=np.float32),
    "model.layers.0.mlp.up_proj.weight": np.arange(8, dtype=np.float16).reshape(2, 4),
}
