"""Tensors of a checkpoint: dtypes, maps of files, fingerprints."""

import gc
import hashlib
import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import SOME, entry, raw_file, write, write_index

from bitdelta import tensor as tensor_module
from bitdelta.checkpoint import DTYPES, open_checkpoint
from bitdelta.errors import FormatError


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model" / "model.safetensors", SOME)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_library_is_carried(tmp_path, dtype):
    bits, kind = DTYPES[dtype]
    data = (bytes(2 * bits // 2) if dtype == "BOOL" else bytes(range(2 * bits // 2)))[: 8 * bits // 8]
    raw_file(tmp_path / "model.safetensors", {"a": entry(dtype, [2, 4], 0, len(data))}, data)
    tensor = open_checkpoint(tmp_path)["a"]
    values = np.asarray(tensor.array())
    assert values.tobytes() == data and tensor.dtype == dtype and tensor.shape == (2, 4)
    assert values.dtype == np.dtype(kind or "u1") and not values.flags.writeable
    assert values.shape == ((2, 4) if bits % 8 == 0 else (len(data),))


def test_arrays_are_views_of_one_map_of_the_file(folder):
    before = set(tensor_module._maps)  # others may still hold maps of their own

    def count():
        gc.collect()
        return len(set(tensor_module._maps) - before)

    checkpoint = open_checkpoint(folder)
    first, second = (checkpoint[name].array() for name in list(checkpoint)[1:])
    assert count() == 1
    assert not first.flags.writeable and not first.flags.owndata
    with pytest.raises(ValueError, match="WRITEABLE|read-only"):
        first.flags.writeable = True
    del first
    assert count() == 1, "the second array still uses it"
    np.testing.assert_array_equal(second, SOME["model.layers.0.mlp.up_proj.weight"])
    del second
    assert count() == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_many_shards_visited_one_by_one_hold_few_descriptors(tmp_path):
    weight_map = {}
    for i in range(300):
        write(tmp_path / f"m-{i}.safetensors", {f"t{i}": np.full(4, i, np.float32)})
        weight_map[f"t{i}"] = f"m-{i}.safetensors"
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    for tensor in open_checkpoint(write_index(tmp_path, weight_map)).values():
        assert tensor.array()[0] == int(tensor.name[1:])
        tensor.fingerprint()
        most = max(most, len(os.listdir("/proc/self/fd")))
    assert most <= before + 3


def test_a_tensor_off_its_alignment_is_copied_and_right(tmp_path):
    values = np.linspace(0, 1, 5, dtype=np.float32)
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [5], 1, 21)}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    raw_file(tmp_path / "model.safetensors", raw, b"\7" + values.tobytes())
    tensor = open_checkpoint(tmp_path)["b"]
    assert tensor.offset % 4 == 1
    array = tensor.array()
    np.testing.assert_array_equal(array, values)
    assert array.flags.aligned and not array.flags.writeable


def test_scalars_and_empty_tensors(tmp_path):
    header = {
        "scalar": entry("F32", [], 0, 4),
        "empty": entry("F32", [0, 7], 4, 4),
        "vast": entry("BF16", [0, 1 << 40], 4, 4),
    }
    raw_file(tmp_path / "model.safetensors", header, np.float32(2.5).tobytes())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint["scalar"].array() == np.float32(2.5) and checkpoint["scalar"].array().shape == ()
    assert checkpoint["empty"].array().shape == (0, 7)
    assert checkpoint["vast"].array().shape == (0, 1 << 40)
    checkpoint["empty"].release()
    assert len(checkpoint["empty"].fingerprint()) == 64


def test_release_and_prefetch_are_hints_that_change_nothing(folder):
    tensor = open_checkpoint(folder)["model.norm.weight"]
    tensor.release()  # not mapped yet
    tensor.prefetch()
    array = tensor.array()
    tensor.release()
    np.testing.assert_array_equal(array, SOME["model.norm.weight"])


@pytest.mark.skipif(not os.path.isfile("/proc/self/smaps"), reason="reads resident memory from /proc")
def test_release_gives_the_pages_back(tmp_path):
    write(tmp_path / "model.safetensors", {"a": np.ones(4 << 20, np.float32)})

    def resident():
        lines = Path("/proc/self/smaps").read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "model.safetensors")))
        return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))

    tensor = open_checkpoint(tmp_path)["a"]
    array = tensor.array()
    assert array.sum() == 4 << 20
    assert resident() > 15000
    tensor.release()
    assert resident() < 100
    assert array[-1] == 1


def test_a_file_replaced_after_opening_is_mapped_anew(folder):
    tensor = open_checkpoint(folder)["model.norm.weight"]
    old = tensor.array()
    changed = {**SOME, "model.norm.weight": np.full(4, 9, np.float32)}
    write(folder / "new", changed)
    os.replace(folder / "new", folder / "model.safetensors")
    np.testing.assert_array_equal(old, SOME["model.norm.weight"])
    np.testing.assert_array_equal(tensor.array(), 9)


def test_a_file_cut_after_opening_is_refused_not_mapped(folder):
    checkpoint = open_checkpoint(folder)
    last = checkpoint[list(checkpoint)[-1]]
    os.truncate(folder / "model.safetensors", last.offset + 3)
    for use in (last.array, last.fingerprint, last.prefetch, lambda: last.read(0, last.nbytes)):
        with pytest.raises(FormatError, match=f"{last.name}: expected bytes .* it was cut"):
            use()


def test_threads_share_the_map(folder):
    checkpoint = open_checkpoint(folder)
    wrong = []

    def work():
        for _ in range(200):
            if not np.array_equal(checkpoint["model.norm.weight"].array(), SOME["model.norm.weight"]):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tensors_cross_process_borders(folder):
    tensor = open_checkpoint(folder)["model.norm.weight"]
    assert pickle.loads(pickle.dumps(tensor)) == tensor


def test_fingerprint_follows_the_recipe_of_its_docstring(tmp_path):
    small, large = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(40000, dtype=np.float32)
    write(tmp_path / "model.safetensors", {"small": small, "large": large})
    checkpoint = open_checkpoint(tmp_path)
    expected = hashlib.sha256(b"F32 [2, 3]\n" + small.tobytes()).hexdigest()
    assert checkpoint["small"].fingerprint() == expected
    raw = large.tobytes()
    blocks = [raw[i * (len(raw) - 4096) // 15 : i * (len(raw) - 4096) // 15 + 4096] for i in range(16)]
    assert blocks[0] == raw[:4096] and blocks[-1] == raw[-4096:]
    expected = hashlib.sha256(b"F32 [40000]\n" + b"".join(blocks)).hexdigest()
    assert checkpoint["large"].fingerprint() == expected


def test_fingerprints_of_known_bytes_never_change(tmp_path):
    write(tmp_path / "model.safetensors", {"a": np.arange(12, dtype=np.uint16).reshape(3, 4)})
    assert (
        open_checkpoint(tmp_path)["a"].fingerprint()
        == "c3685f9c3b90cdd1f1dc6abe14da1338eb26e1b2a4f8ba4390d66f67baf52baf"
    )


def test_fingerprint_knows_values_shape_and_dtype_but_not_name_or_file(tmp_path):
    values = np.arange(8, dtype=np.float16)
    changed = values.copy()
    changed[3] += 1
    write(tmp_path / "a" / "model.safetensors", {"x": np.zeros(3, np.uint8), "n": values, "c": changed})
    write(tmp_path / "b" / "other.safetensors", {"m": values, "r": values.reshape(2, 4)})
    write(
        tmp_path / "b" / "other.safetensors",
        {"m": values, "r": values.reshape(2, 4), "i": values.view(np.uint16)},
    )
    a, b = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert a["n"].fingerprint() == b["m"].fingerprint()
    assert len({t.fingerprint() for t in (a["n"], a["c"], b["r"], b["i"])}) == 4
