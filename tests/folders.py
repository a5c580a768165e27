"""Small checkpoint folders for tests, written without the code under test."""

import json
import struct

import numpy as np

from bitdelta.array import from_float32

CODES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32", "uint8": "U8"}


def code(array):
    name = getattr(array, "__bitdelta_dtype__", array.dtype.name)
    return {"bfloat16": "BF16", "bool": "BOOL", **CODES}[name]


def write_safetensors(path, tensors):
    """name -> array, or (dtype code, shape, bytes) for what NumPy does not have."""
    header, blobs, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, value in tensors.items():
        if isinstance(value, tuple):
            dtype, shape, blob = value
        else:
            dtype, shape, blob = code(value), value.shape, np.ascontiguousarray(value).tobytes()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(blob)]}
        end += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_checkpoint(folder, tensors, config=None, n_shards=1, files=()):
    """A folder of one file or of shards with an index; `files`: name -> text."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for name, text in dict(files).items():
        (folder / name).write_text(text)
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names, weight_map = list(tensors), {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = names[i::n_shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def weights(rng, shape, dtype="bfloat16", scale=1.0):
    return from_float32((rng.standard_normal(shape) * scale).astype(np.float32), dtype)


def changed(rng, weight, dtype="bfloat16", scale=0.05):
    """The weight of a fine-tune: a small change everywhere."""
    from bitdelta.array import to_float32

    step = (rng.standard_normal(weight.shape) * scale).astype(np.float32)
    return from_float32(to_float32(weight) + step, dtype)


def same_bits(a, b):
    return a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def read_all(folder):
    """Every tensor of a checkpoint folder, by its own reader."""
    from bitdelta.checkpoint import open_checkpoint

    return {name: tensor.array() for name, tensor in open_checkpoint(folder).items()}
