"""Checkpoint folders: what is read equals what the safetensors library reads, and all else is refused by name."""

import gc
import hashlib
import json
import os
import pickle
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from bitdelta import tensor as tensor_module
from bitdelta.array import BFloat16Array, to_float32
from bitdelta.checkpoint import DTYPES, Tensor, open_checkpoint
from bitdelta.errors import Error, FormatError
from bitdelta.header import read_safetensors


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


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model" / "model.safetensors", SOME)
    return tmp_path / "model"


def test_a_single_file_is_read_as_the_safetensors_library_reads_it(folder):
    checkpoint = open_checkpoint(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        assert set(checkpoint) == set(file.keys())
        for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
            np.testing.assert_array_equal(checkpoint[name].array(), file.get_tensor(name))
    embedding = checkpoint["model.embed_tokens.weight"].array()
    assert isinstance(embedding, BFloat16Array) and embedding.shape == (3, 4)
    np.testing.assert_array_equal(embedding.bits, SOME["model.embed_tokens.weight"])
    assert checkpoint.root == folder and checkpoint.id is None and checkpoint.revision is None
    assert checkpoint.config == {} and checkpoint.files == {} and checkpoint.aliases == {}
    assert checkpoint.nbytes == 24 + 16 + 16 and len(checkpoint) == 3


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"z": entry("U8", [2], 4, 6), "a": entry("U8", [1], 3, 4), "m": entry("U8", [3], 0, 3)}
    raw_file(tmp_path / "model.safetensors", header, bytes(range(6)))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["m", "a", "z"]
    assert [checkpoint[name].array().tolist() for name in checkpoint] == [[0, 1, 2], [3], [4, 5]]


def test_shards_are_one_checkpoint(tmp_path):
    names = list(SOME)
    write(tmp_path / "model-00001-of-00002.safetensors", {name: SOME[name] for name in names[:2]})
    write(tmp_path / "model-00002-of-00002.safetensors", {names[2]: SOME[names[2]]})
    weight_map = dict.fromkeys(names[:2], "model-00001-of-00002.safetensors")
    write_index(tmp_path, {**weight_map, names[2]: "model-00002-of-00002.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == names and len(checkpoint.weights) == 2
    np.testing.assert_array_equal(checkpoint[names[2]].array(), SOME[names[2]])


# every dtype


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


# arrays


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


# fingerprints


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


# headers


U8 = {"a": entry("U8", [4], 0, 4)}
HEADERS = {
    "no object": (b"[1]", "does not start with {"),
    "leading space": (b' {"a": 1}', "does not start with {"),
    "not JSON": (b'{"a": ', "not valid JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "half a surrogate": (b'{"\\ud800": 1}', "not valid JSON"),
    "deep": (b'{"a":' * 100_000, "not valid JSON"),
    "long number": (b'{"a":' + b"1" * 10_000 + b"}", "not valid JSON"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        "'a' occurs twice",
    ),
    "twice inside": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
        "'dtype' occurs twice",
    ),
    "metadata": ({**U8, "__metadata__": {"format": 1}}, "__metadata__: expected an object of texts"),
    "metadata list": ({**U8, "__metadata__": ["pt"]}, "__metadata__: expected an object of texts"),
    "escape codes": ({"\x1b[2J": U8["a"]}, r"expected a printable name, got '.x1b"),
    "entry": ({"a": 4}, "a: expected an object of dtype, shape and data_offsets"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, "a: expected an object of dtype"),
    "unknown key": ({"a": {**U8["a"], "order": "F"}}, "a: expected an object of dtype"),
    "dtype": ({"a": entry("Q4", [4], 0, 4)}, "a: dtype: expected one of BOOL, .*got 'Q4'"),
    "dtype kind": ({"a": entry(7, [4], 0, 4)}, "a: dtype: expected one of BOOL"),
    "negative size": ({"a": entry("U8", [-4], 0, 4)}, "a: shape: expected at most 8 sizes"),
    "fraction": ({"a": entry("U8", [4.0], 0, 4)}, "a: shape"),
    "true": ({"a": entry("U8", [True, 4], 0, 4)}, "a: shape"),
    "shape kind": ({"a": entry("U8", "4", 0, 4)}, "a: shape"),
    "dimensions": ({"a": entry("U8", [1] * 8 + [4], 0, 4)}, "a: shape: expected at most 8"),
    "overflow": ({"a": entry("U8", [1 << 32, 1 << 32], 0, 4)}, "a: shape: .* beyond any memory"),
    "overflow hidden by 0": ({"a": entry("U8", [0, 1 << 62, 4], 0, 0)}, "a: shape: .* beyond any memory"),
    "wraps to 4": ({"a": entry("U8", [(1 << 62) + 1, 4], 0, 4)}, "a: shape: .* beyond any memory"),
    "size": ({"a": entry("F32", [2], 0, 4)}, r"a: F32 \[2\]: expected 8 bytes, got 4"),
    "half a byte": ({"a": entry("F4", [7], 0, 4)}, r"a: F4 \[7\]: expected 3.5 bytes, got 4"),
    "offsets": ({"a": entry("U8", [4], 4, 0)}, "a: data_offsets"),
    "negative offset": ({"a": entry("U8", [4], -4, 0)}, "a: data_offsets"),
    "one offset": ({"a": {**U8["a"], "data_offsets": [4]}}, "a: data_offsets"),
    "far": ({"a": entry("U8", [4], 1 << 62, (1 << 62) + 4)}, "truncated: a ends at byte"),
    "beyond": ({"a": entry("U8", [5], 0, 5)}, "truncated: a ends at byte"),
    "hole before": ({"a": entry("U8", [3], 1, 4)}, "a follows a hole"),
    "hole": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [2], 2, 4)}, "b follows a hole: expected byte"),
    "overlap": ({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}, "b overlaps"),
    "same bytes": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, "b overlaps"),
    "left over": ({"a": entry("U8", [3], 0, 3)}, "the tensors end at byte .*, the file has"),
    "nothing": ({}, "the tensors end at byte"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused_by_name(tmp_path, case):
    header, words = HEADERS[case]
    raw_file(tmp_path / "model.safetensors", header, b"1234")
    assert refused(words, tmp_path).startswith(str(tmp_path / "model.safetensors"))


def test_lengths_that_lie_are_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for length, words in (
        (1 << 63, "at most 100000000"),
        (100_000_001, "at most"),
        (200, "truncated: the header"),
    ):
        raw_file(path, U8, b"1234", length)
        refused(words, tmp_path)
    path.write_bytes(b"1234567")
    refused("at least 8 bytes, got 7", tmp_path)
    path.write_bytes(b"")
    refused(r"empty \(0 bytes\)", tmp_path)


def test_every_truncation_is_refused(folder):
    raw = (folder / "model.safetensors").read_bytes()
    for length in range(len(raw)):
        (folder / "model.safetensors").write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_checkpoint(folder)


def test_no_file_is_mistaken_for_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused("Git LFS pointer.*git lfs pull", tmp_path)
    path.write_text("<!DOCTYPE html><html><body>404: not found, try again later</body></html>" * 9)
    refused("not a safetensors file", tmp_path)
    path.unlink()
    os.mkfifo(path)
    refused("not a regular file", tmp_path)  # and does not wait for a writer
    path.unlink()
    path.symlink_to(path.name)
    refused("model.safetensors", tmp_path)
    (tmp_path / "pytorch_model.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"
    )
    path.unlink()
    refused("pytorch_model.bin: a Git LFS pointer", tmp_path)


def library(path):
    """What the safetensors library reads: name -> (dtype, shape, bytes), or None where it refuses."""
    try:
        with safe_open(path, "np") as file:
            return {
                name: (part.get_dtype(), tuple(part.get_shape()))
                for name in file.keys()
                for part in [file.get_slice(name)]
            }
    except Exception:  # noqa: BLE001 - its own error type
        return None


def agrees(path):
    """Ours refuses, or reads within the file and just as the library does; it never accepts what that refuses."""
    size = path.stat().st_size
    try:
        tensors, _ = read_safetensors(path)
    except FormatError:
        return
    for tensor in tensors.values():
        assert 0 <= tensor.offset and tensor.offset + tensor.nbytes <= size
        assert tensor.array().nbytes == tensor.nbytes
    theirs = library(path)
    if theirs is not None or all(
        not tensor.dtype.startswith(("F6", "F4", "F8", "C")) for tensor in tensors.values()
    ):
        assert theirs == {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors.values()}


small = st.integers(-1, 9)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F32", "F4", "BF16", "x", None]),
        "shape": st.lists(st.one_of(small, st.sampled_from([1 << 31, 1 << 63, 2.0, True])), max_size=3),
        "data_offsets": st.lists(small, min_size=1, max_size=3),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "é"]), entries, max_size=3),
    st.binary(max_size=9),
)
def test_invented_headers_never_crash_or_leave_the_file(tmp_path_factory, header, data):
    agrees(raw_file(tmp_path_factory.mktemp("fuzz") / "model.safetensors", header, data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_valid_headers_are_read_as_the_library_does(tmp_path_factory, data):
    header, end = {}, 0
    for i in range(data.draw(st.integers(1, 4))):
        dtype = data.draw(st.sampled_from(["U8", "F16", "F32", "BF16", "I64", "BOOL"]))
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        size = int(np.prod(shape, dtype=int)) * DTYPES[dtype][0] // 8
        header[f"t{i}"] = entry(dtype, shape, end, end + size)
        end += size
    names = data.draw(st.permutations(list(header)))
    path = tmp_path_factory.mktemp("valid") / "model.safetensors"
    raw_file(path, {name: header[name] for name in names}, bytes(end))
    tensors, _ = read_safetensors(path)
    assert library(path) == {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors.values()}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_never_crash_or_leave_the_file(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("fuzz") / "model.safetensors", SOME)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    agrees(path)


# index files


def test_an_index_that_leads_elsewhere_is_refused_by_name(tmp_path):
    secret = write(tmp_path / "secret" / "model.safetensors", SOME)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    write(folder / "sub" / "model.safetensors", SOME)
    bad = [
        *(
            "../secret/model.safetensors",
            str(secret),
            "sub/model.safetensors",
            "./model.safetensors",
            "..",
            "",
        ),
        *("a\\b.safetensors", "a\0.safetensors", "a\n.safetensors", 3, None, ["model.safetensors"], "x.bin"),
    ]
    for name in bad:
        write_index(folder, {"model.norm.weight": name})
        refused("model.norm.weight: expected the name of a .safetensors file in this folder", folder)


def test_links_that_leave_the_folder_are_refused_and_others_followed(tmp_path, folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model-1.safetensors").symlink_to(folder / "model.safetensors")
    write_index(outside, dict.fromkeys(SOME, "model-1.safetensors"))
    refused("model-1.safetensors: a link that leads outside", outside)
    (folder / "model-1.safetensors").symlink_to("model.safetensors")
    (folder / "other").symlink_to(folder)
    assert list(open_checkpoint(folder)) == list(SOME)
    (tmp_path / "alias").symlink_to(folder)
    assert list(open_checkpoint(tmp_path / "alias")) == list(SOME), "the folder itself may be a link"
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(FormatError, match="tokenizer.json: a link that leads outside"):
        _ = open_checkpoint(folder).files


def test_missing_and_foreign_shards_are_refused_by_name(tmp_path):
    write(tmp_path / "a.safetensors", SOME)
    write_index(tmp_path, {**dict.fromkeys(SOME, "a.safetensors"), "lost": "b.safetensors"})
    refused("b.safetensors: missing", tmp_path)
    write(tmp_path / "b.safetensors", {"other": np.ones(1, np.float32)})
    refused("index.json: lost is not in b.safetensors", tmp_path)
    write(
        tmp_path / "b.safetensors",
        {"lost": np.ones(1, np.float32), "model.norm.weight": SOME["model.norm.weight"]},
    )
    refused("b.safetensors: model.norm.weight is in a.safetensors too", tmp_path)
    write(tmp_path / "b.safetensors", {"lost": np.ones(1, np.float32)})
    assert len(open_checkpoint(tmp_path)) == 4
    write_index(tmp_path, {**dict.fromkeys(SOME, "b.safetensors"), "lost": "a.safetensors"})
    refused("is not in [ab].safetensors", tmp_path)


INDICES = {
    "list": ("[]", "expected a JSON object, got a list"),
    "no map": ("{}", "weight_map: expected an object"),
    "empty map": ('{"weight_map": {}}', "weight_map: expected an object"),
    "map kind": ('{"weight_map": ["a"]}', "weight_map: expected an object"),
    "not JSON": ('{"weight_map": {', "not valid JSON"),
    "escape codes": ('{"weight_map": {"\\u001b[2J": "a.safetensors"}}', "expected a printable name"),
    "twice": ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "'a' occurs twice"),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_damaged_index_is_refused(tmp_path, case):
    text, words = INDICES[case]
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(words, tmp_path)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.one_of(
            st.text(max_size=12), st.sampled_from(["a.safetensors", "b.safetensors", "../c.safetensors"])
        ),
        max_size=4,
    )
)
def test_invented_indices_never_crash_or_leave_the_folder(tmp_path_factory, weight_map):
    root = tmp_path_factory.mktemp("index")
    write(root / "c.safetensors", {"a": np.ones(1, np.float32)})
    folder = root / "model"
    write(folder / "a.safetensors", {"a": np.ones(1, np.float32)})
    write_index(folder, weight_map)
    try:
        checkpoint = open_checkpoint(folder)
    except FormatError:
        return
    assert set(weight_map) == {"a"} and all(tensor.path.parent == folder for tensor in checkpoint.values())


# which files count


def test_the_usual_name_wins_then_safetensors_then_the_only_other(tmp_path):
    one = {"t": np.ones(1, np.float32)}
    (tmp_path / "training_args.bin").write_bytes(b"PK\3\4 not weights")
    write(tmp_path / "adapter_model.safetensors", one)
    write(tmp_path / "odd.fp16.safetensors", one)
    (tmp_path / "pytorch_model.bin.bak").write_bytes(b"")
    assert open_checkpoint(tmp_path)["t"].path.name == "odd.fp16.safetensors"
    write(tmp_path / "second.safetensors", one)
    refused("expected model.safetensors or one index of shards, got 2 ", tmp_path)
    write_index(tmp_path, {"t": "second.safetensors"}, "odd.safetensors.index.json")
    assert open_checkpoint(tmp_path)["t"].path.name == "second.safetensors"
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin: empty", tmp_path)
    write_index(tmp_path, {"t": "odd.fp16.safetensors"})
    assert open_checkpoint(tmp_path)["t"].path.name == "odd.fp16.safetensors"
    write(tmp_path / "model.safetensors", one)
    assert open_checkpoint(tmp_path)["t"].path.name == "model.safetensors"


def put(*names):
    def build(folder):
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")

    return build


FOREIGN = {
    "nothing": (put(), "no weights: expected model.safetensors.*it is empty"),
    "something": (put("notes.txt"), "no weights.*it holds notes.txt"),
    "DCP": (put(".metadata", "__0_0.distcp"), "format_utils dcp_to_torch {folder} OUT"),
    "FSDP": (
        put("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "scheduler.pt"),
        "accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT",
    ),
    "ZeRO": (put("zero_to_fp32.py", "latest"), "deepspeed.utils.zero_to_fp32 {folder} OUT"),
    "ZeRO step": (
        put("global_step500/mp_rank_00_model_states.pt", "latest"),
        "deepspeed.utils.zero_to_fp32 {folder} OUT",
    ),
    "ZeRO shards": (put("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed ZeRO.*zero_to_fp32"),
    "Megatron": (put("latest_checkpointed_iteration.txt", "iter_0001000/x"), "Megatron"),
    "GGUF": (put("llama.Q4_K_M.gguf"), "GGUF.*llama.Q4_K_M.gguf"),
    "Meta": (put("consolidated.00.pth", "params.json"), "consolidated.00.pth.*convert_llama_weights_to_hf"),
    "pth": (put("model.pth"), "model.pth.*save_pretrained"),
    "Flax": (put("flax_model.msgpack"), "flax_model.msgpack.*from_flax=True"),
    "TensorFlow": (put("tf_model.h5"), "tf_model.h5.*from_tf=True"),
    "adapter": (put("adapter_config.json", "adapter_model.safetensors"), "PEFT adapter.*merge_and_unload"),
    "delta": (put("delta_config.json", "delta_model.safetensors"), "packed delta.*bitdelta merge"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_formats_are_refused_with_what_converts_them(tmp_path, case):
    build, words = FOREIGN[case]
    build(tmp_path)
    refused(words.format(folder=tmp_path), tmp_path)


def test_a_placeholder_of_empty_tensors_is_refused(tmp_path):
    raw_file(tmp_path / "model.safetensors", {"a": entry("BF16", [0], 0, 0)})
    refused("every tensor is empty.*zero_to_fp32", tmp_path)


def test_neither_folder_nor_hub_id(tmp_path):
    refused("no such folder, and not a Hub id", tmp_path / "absent", Error)
    (tmp_path / "file").write_text("")
    refused("a file; give the folder", tmp_path / "file", Error)


# files that travel


def test_config_and_tokenizer_travel_and_nothing_else(folder):
    travel = ["added_tokens.json", "additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json",
              "generation_config.json", "merges.txt", "modeling_x.py", "preprocessor_config.json",
              "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
              "LICENSE.txt"]  # fmt: skip
    stay = ["README.md", ".gitattributes", ".git/config", "optimizer.pt", "trainer_state.json", "training_args.bin",
            "rng_state.pth", "runs/events", "all_results.json", "adapter_config.json", "delta_config.json", ".env",
            "train.py", "setup.py", "tokenizer.safetensors", "tokenizer/tokenizer.json", "checkpoint-5/config.json",
            "model.safetensors.index.json.lock"]  # fmt: skip
    for name in travel + stay:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "merges.txt").write_text("")
    files = open_checkpoint(folder).files
    assert sorted(files) == sorted(travel)
    assert (
        files["additional_chat_templates/tool.jinja"] == folder / "additional_chat_templates" / "tool.jinja"
    )


def test_a_bad_config_is_refused(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"config.json: .*expected a JSON object"):
        _ = open_checkpoint(folder).config
    (folder / "config.json").write_text('{"vocab_size": 3}')
    assert open_checkpoint(folder).config == {"vocab_size": 3}
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(FormatError, match=r"tokenizer.json: a Git LFS pointer"):
        _ = open_checkpoint(folder).files


# what transformers and torch write


@pytest.fixture(scope="module")
def llama():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16()


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["single", "sharded"])
def test_transformers_folders_hold_the_models_bits(tmp_path, llama, size):
    llama.save_pretrained(tmp_path, max_shard_size=size)
    checkpoint = open_checkpoint(tmp_path)
    assert (len(checkpoint.weights) > 1) == (size == "20KB")
    assert set(checkpoint) == set(llama.state_dict()) - {"lm_head.weight"}
    for name, tensor in checkpoint.items():
        np.testing.assert_array_equal(to_float32(tensor.array()), llama.state_dict()[name].float().numpy())
    assert checkpoint.config["tie_word_embeddings"] is True
    assert set(checkpoint.files) == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("shards", [1, 3])
def test_torch_folders_hold_the_models_bits_and_show_tied_weights(tmp_path, llama, shards):
    import torch

    state = llama.state_dict()
    llama.config.save_pretrained(tmp_path)
    if shards == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names, weight_map = list(state), {}
        names.remove("lm_head.weight")
        names.insert(1, "lm_head.weight")  # beside the embeddings that it is tied to, as transformers shards
        for i in range(shards):
            file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
            part = names[i * 7 : i * 7 + 7]
            torch.save({name: state[name] for name in part}, tmp_path / file)
            weight_map.update(dict.fromkeys(part, file))
        write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == set(state)
    assert set(checkpoint.aliases.items()) == {("lm_head.weight", "model.embed_tokens.weight")}
    assert (
        checkpoint.nbytes == sum(t.nbytes for t in checkpoint.values()) - checkpoint["lm_head.weight"].nbytes
    )
    for name, tensor in checkpoint.items():
        np.testing.assert_array_equal(to_float32(tensor.array()), state[name].float().numpy())


def test_formats_agree_on_fingerprints(tmp_path, llama):
    import torch

    llama.save_pretrained(tmp_path / "one")
    llama.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    (tmp_path / "bin").mkdir()
    state = llama.state_dict()
    turned = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in state.items()}
    torch.save(turned, tmp_path / "bin" / "pytorch_model.bin")
    one, many, torched = (open_checkpoint(tmp_path / name) for name in ("one", "many", "bin"))
    assert torched["model.embed_tokens.weight"].strides == (1, 50)
    for name in one:
        assert one[name].fingerprint() == many[name].fingerprint() == torched[name].fingerprint()


def test_safetensors_win_over_torch_files(tmp_path, llama):
    import torch

    llama.save_pretrained(tmp_path)
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert "other" not in open_checkpoint(tmp_path)


def test_nothing_here_imports_torch(folder):
    import subprocess

    code = (
        "import sys; from bitdelta.checkpoint import open_checkpoint; c = open_checkpoint(sys.argv[1]);"
        "[(t.array(), t.fingerprint()) for t in c.values()]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_a_tensor_says_what_it_is():
    tensor = Tensor("a", "F32", (2,), 8, Path("x"), 64)
    assert tensor.span == 8 and tensor.strides is None and "F32" in repr(tensor)
