"""Headers of safetensors files: read as the library reads them, and refused by name where they lie."""

import os

import numpy as np
import pytest
from checkpoint_files import SOME, entry, raw_file, refused, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from bitdelta.checkpoint import DTYPES, open_checkpoint
from bitdelta.errors import FormatError
from bitdelta.header import read_safetensors


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model" / "model.safetensors", SOME)
    return tmp_path / "model"


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
