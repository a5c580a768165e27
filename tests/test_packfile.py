"""The packed delta on the disk: its bytes never change, hostile ones are refused, nothing is copied to read it.

Renew the golden files, after a change of the format that was meant: python tests/test_packfile.py
"""

import json
import os
import re
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from folders import changed, same_bits, weights, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitdelta import reference
from bitdelta.array import as_bfloat16, from_float32
from bitdelta.checkpoint import open_checkpoint
from bitdelta.errors import BaseMismatchError, Error, FormatError
from bitdelta.header import read_safetensors
from bitdelta.packfile import load
from bitdelta.packfile_writer import PackfileWriter

GOLDEN = Path(__file__).parent / "golden" / "delta"


def ramp(shape, step, dtype="float32"):
    """Values that any machine computes alike: multiples of 1/64 between -1 and 1."""
    count = int(np.prod(shape))
    values = (np.arange(count) * step % 129 - 64).astype(np.float32) / 64
    return from_float32(values.reshape(shape), dtype)


def golden_checkpoints():
    before = {
        "embed.weight": ramp((20, 40), 7, "bfloat16"),
        "a.weight": ramp((17, 33), 11),
        "b.weight": ramp((16, 256), 13, "float16"),
        "experts": ramp((2, 18, 40), 17, "bfloat16"),
        "norm.weight": ramp((5,), 3, "bfloat16"),
        "same.weight": ramp((3, 3), 5),
    }
    after = {
        "embed.weight": ramp((22, 40), 29, "bfloat16"),
        "a.weight": ramp((17, 33), 31),
        "b.weight": ramp((16, 256), 37, "float16"),
        "experts": ramp((2, 18, 40), 41, "bfloat16"),
        "norm.weight": ramp((5,), 43, "bfloat16"),
        "same.weight": before["same.weight"],
        "flags": np.array([True, False, True]),
        "ids": np.arange(3, dtype=np.int64),
    }
    return before, after


def write_golden(scratch, out):
    """Every form, with the reference's arithmetic, so that only the format is under test."""
    before, after = golden_checkpoints()
    base = open_checkpoint(write_checkpoint(scratch / "base", before, {"vocab_size": 20}))
    names = dict.fromkeys(before)
    names |= {
        name: {"form": "whole", "shape": after[name].shape, "dtype": "BOOL"} for name in ("flags", "ids")
    }
    names["tied.weight"] = {"form": "tied", "shape": [17, 33], "dtype": "F32"}
    with PackfileWriter(
        out, base, config={"vocab_size": 22}, names=names, absent=["old.bias"], finetuned={"id": None}
    ) as writer:
        writer.add(
            "embed.weight",
            reference.extract(before["embed.weight"], after["embed.weight"][:20]),
            rows=after["embed.weight"][20:],
            relative_error=0.5,
            base_crc32c=1,
        )
        writer.add("a.weight", reference.extract(before["a.weight"], after["a.weight"], 2, "tensor"))
        writer.add("flags", after["flags"])
        writer.add("b.weight", reference.extract(before["b.weight"], after["b.weight"], 1, "rank1"))
        stack = [reference.extract(b, f) for b, f in zip(before["experts"], after["experts"], strict=True)]
        writer.add("experts", stack)
        writer.add("norm.weight", after["norm.weight"])
        writer.add("same.weight", None)
        writer.add("ids", after["ids"])
        writer.add("tied.weight", None, tied_to="a.weight")
    return before, after


def without_version(content):
    return re.sub(rb"bitdelta \d+\.\d+\.\d+\w*", b"bitdelta VERSION", content)


def test_the_bytes_are_the_golden_ones(tmp_path):
    write_golden(tmp_path, tmp_path / "delta")
    made = {path.name: path.read_bytes() for path in (tmp_path / "delta").iterdir()}
    kept = {path.name: path.read_bytes() for path in GOLDEN.iterdir()}
    assert set(made) == set(kept)
    for name in made:
        assert without_version(made[name]) == without_version(kept[name]), name


def test_the_golden_files_are_read_as_what_they_were_made_from():
    before, after = golden_checkpoints()
    packfile = load(GOLDEN)
    assert same_bits(packfile.rows("embed.weight"), after["embed.weight"][20:])
    expected = {
        "embed.weight": reference.extract(before["embed.weight"], after["embed.weight"][:20]),
        "a.weight": reference.extract(before["a.weight"], after["a.weight"], 2, "tensor"),
        "b.weight": reference.extract(before["b.weight"], after["b.weight"], 1, "rank1"),
    }
    for name, delta in expected.items():
        found = packfile[name]
        assert (found.form, found.planes, found.shape) == (delta.form, delta.planes, delta.shape)
        assert same_bits(found.sign, delta.sign) and same_bits(found.scale, delta.scale)
        assert found.column is None or same_bits(found.column, delta.column)
    for i, found in enumerate(packfile["experts"]):
        assert same_bits(found.sign, reference.extract(before["experts"][i], after["experts"][i]).sign)
    for name in ("norm.weight", "flags", "ids"):
        assert same_bits(packfile[name], after[name])
    assert packfile["same.weight"] is None and "old.bias" not in packfile
    assert same_bits(packfile["tied.weight"].sign, packfile["a.weight"].sign)
    assert list(packfile.files()) == ["config.json"] and packfile.config["absent"] == ["old.bias"]


def test_a_bit_lies_where_the_format_says():
    """Read without this package: bit j of word i of line l of strip s is row 16 s + i, column 32 l + j."""
    before, after = golden_checkpoints()
    raw = (GOLDEN / "delta_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 64 == 0
    begin = 8 + length + header["a.weight.sign"]["data_offsets"][0]
    assert begin % 64 == 0 and header["a.weight.sign"]["shape"] == [2, 2, 8, 16]
    d = after["a.weight"] - before["a.weight"]
    for n, k in [(0, 0), (0, 31), (0, 32), (15, 5), (16, 0), (16, 32), (3, 20)]:
        s, i, line, j = n // 16, n % 16, k // 32, k % 32
        (word,) = struct.unpack_from("<I", raw, begin + 4 * ((s * 8 + line) * 16 + i))
        assert word >> j & 1 == (0 if d[n, k] < 0 else 1)
    (beyond,) = struct.unpack_from("<I", raw, begin + 4 * ((1 * 8 + 0) * 16 + 1))
    assert beyond == 0  # row 17


def test_the_safetensors_library_reads_the_file():
    from safetensors import safe_open

    packfile = load(GOLDEN)
    with safe_open(GOLDEN / "delta_model.safetensors", "np") as file:
        assert set(file.keys()) == set(packfile.tensors)
        assert file.metadata()["format"] == "pt"
        for key, tensor in packfile.tensors.items():
            if tensor.dtype != "BF16":
                assert same_bits(file.get_tensor(key), tensor.array())


def test_torch_reads_the_file_too():
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN / "delta_model.safetensors")
    rows = load(GOLDEN).rows("embed.weight")
    assert torch.equal(tensors["embed.weight.rows"].view(torch.uint16), torch.from_numpy(rows.bits.copy()))


def test_signs_come_first_at_multiples_of_64_bytes_and_all_is_aligned():
    tensors, _ = read_safetensors(GOLDEN / "delta_model.safetensors")
    is_sign = [key.endswith(".sign") for key in tensors]
    assert is_sign == sorted(is_sign, reverse=True) and any(is_sign)
    for key, tensor in tensors.items():
        assert tensor.offset % (64 if key.endswith(".sign") else tensor.array().itemsize) == 0


def test_reading_maps_and_copies_nothing():
    delta = load(GOLDEN)["embed.weight"]
    for array in (delta.sign, delta.scale):
        assert not array.flags.owndata and not array.flags.writeable
    maps = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "delta_model" in line
    ]
    at = delta.sign.ctypes.data
    assert any(int(m[0].split("-")[0], 16) <= at < int(m[0].split("-")[1], 16) for m in maps)


@pytest.fixture
def golden(tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "delta"))


def edit(folder, change):
    path = folder / "delta_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def entry_edit(name="a.weight", **fields):
    return lambda config: config["tensors"][name].update(fields)


WRONG = {
    "version 2": (lambda c: c.update(format_version=2), "format_version 2 is newer.*upgrade"),
    "version 0": (lambda c: c.update(format_version=0), "format_version"),
    "version text": (lambda c: c.update(format_version="1"), "format_version"),
    "version true": (lambda c: c.update(format_version=True), "format_version"),
    "no version": (lambda c: c.pop("format_version"), "format_version"),
    "tensors list": (lambda c: c.update(tensors=[]), "tensors: expected an object"),
    "entry": (lambda c: c["tensors"].update({"a.weight": 3}), "expected an object"),
    "form": (entry_edit(form="ternary"), "form: expected one of"),
    "form kind": (entry_edit(form=["row"]), "form: expected one of"),
    "dtype": (entry_edit(dtype="F31"), "dtype: expected one of"),
    "dtype kind": (entry_edit(dtype=["F32"]), "dtype: expected one of"),
    "integer signs": (entry_edit(dtype="I32"), "dtype: expected one of BF16"),
    "planes 0": (entry_edit(planes=0), "planes: expected 1 to 8"),
    "planes 9": (entry_edit(planes=9), "planes: expected 1 to 8"),
    "planes 3": (entry_edit(planes=3), "bytes: expected"),
    "shape": (entry_edit(shape=[17, -33]), "shape: expected a list"),
    "shape 1-D": (entry_edit(shape=[17]), "2 or 3 sizes"),
    "shape other": (entry_edit("b.weight", shape=[16, 300]), "bytes: expected"),
    "shape huge": (entry_edit("b.weight", shape=[1 << 61, 1 << 61]), "bytes: expected"),
    "shape of as many bytes": (
        entry_edit("embed.weight", shape=[22, 41]),
        "embed.weight.rows|bytes: expected",
    ),
    "bytes": (entry_edit(bytes=1), "bytes: expected"),
    "bytes kind": (entry_edit(bytes=None), "bytes: expected a count"),
    "rows": (entry_edit(rows=17), "rows"),
    "hash": (entry_edit(sha256="x"), "sha256: expected 64"),
    "fingerprint": (lambda c: c["tensors"]["same.weight"].pop("fingerprint"), "fingerprint: expected 64"),
    "crc": (entry_edit(base_crc32c=1 << 32), "base_crc32c"),
    "error nan": (entry_edit(relative_error=-1), "relative_error"),
    "error": (entry_edit(relative_error="small"), "relative_error"),
    "tied to nothing": (lambda c: c["tensors"]["tied.weight"].update(tied_to="zz"), "tied_to"),
    "tied to a list": (lambda c: c["tensors"]["tied.weight"].update(tied_to=["a"]), "tied_to"),
    "tied to itself": (lambda c: c["tensors"]["tied.weight"].update(tied_to="tied.weight"), "tied_to"),
    "missing key": (lambda c: c["tensors"].update(new=c["tensors"]["flags"]), "new is missing"),
    "unknown key": (lambda c: c["tensors"].pop("flags"), "flags is in the file but not"),
    "base": (lambda c: c.update(base=[]), "base: expected an object of texts"),
    "absent": (lambda c: c.update(absent="old"), "absent: expected a list"),
    "files": (lambda c: c.update(files=[]), "files: expected an object"),
    "file outside": (
        lambda c: c["files"].update({"../x": {"from": "delta", "sha256": "0" * 64}}),
        "expected a file name",
    ),
    "file absolute": (
        lambda c: c["files"].update({"/etc/passwd": {"from": "delta", "sha256": "0" * 64}}),
        "expected a file name",
    ),
    "file source": (lambda c: c["files"]["config.json"].update({"from": "web"}), "`from` base or delta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_is_not_right_is_refused_by_name(golden, name):
    change, words = WRONG[name]
    edit(golden, change)
    with pytest.raises(FormatError, match=words) as caught:
        load(golden)
    assert "delta" in str(caught.value)


def test_a_folder_without_config_is_no_packed_delta(tmp_path):
    with pytest.raises(FormatError, match="no delta_config.json in it; not a packed delta"):
        load(tmp_path)
    with pytest.raises(Error, match="missing"):
        load(tmp_path / "missing")


def test_a_config_with_a_key_twice_is_refused(golden):
    path = golden / "delta_config.json"
    path.write_text(path.read_text().replace('"absent"', '"format_version": 1, "absent"'))
    with pytest.raises(FormatError, match="occurs twice"):
        load(golden)


def test_a_truncated_file_is_refused(golden):
    path = golden / "delta_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match="truncated"):
        load(golden)


def test_signs_off_their_alignment_are_refused(golden):
    path = golden / "delta_model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    path.write_bytes(struct.pack("<Q", length + 8) + raw[8 : 8 + length] + b" " * 8 + raw[8 + length :])
    with pytest.raises(FormatError, match="not a multiple of 64"):
        load(golden)


@pytest.mark.parametrize(
    "name", ["../delta_model-00001-of-00002.safetensors", "x.safetensors", "/etc/passwd", 5]
)
def test_an_index_may_only_name_shards_in_the_folder(golden, name):
    index = {"weight_map": {"flags": name}}
    (golden / "delta_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"expected delta_model-\*-of-\*.safetensors"):
        load(golden)


def test_a_shard_that_is_a_link_to_the_outside_is_refused(golden, tmp_path):
    (golden / "delta_model.safetensors").rename(tmp_path / "elsewhere")
    (golden / "delta_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="leads outside"):
        load(golden)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_refused_or_read_and_never_crash(tmp_path, data):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "fuzz", dirs_exist_ok=True))
    file = folder / data.draw(st.sampled_from(["delta_config.json", "delta_model.safetensors"]))
    raw = bytearray(file.read_bytes())
    end = min(len(raw), 3000)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "digit"]))
        if kind == "flip":
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            raw[at:at] = data.draw(
                st.sampled_from([b"{", b'"', b",", b"null", b"1e999", b"-1", b"\xff", b"[]"])
            )
        else:
            digits = [i for i in range(end) if i < len(raw) and 48 <= raw[i] <= 57]
            raw[digits[at % len(digits)]] = data.draw(st.integers(48, 57))
    file.write_bytes(raw)
    try:
        packfile = load(folder)
    except FormatError as error:
        assert str(error)
        return
    for name in packfile:
        value = packfile[name]
        assert packfile.rows(name) is None or packfile.rows(name).size
        if isinstance(value, np.ndarray):
            value.tobytes()


@pytest.fixture
def base(tmp_path, rng):
    tensors = {f"layers.{i}.weight": weights(rng, (32, 300), "float32") for i in range(6)}
    return tensors, open_checkpoint(write_checkpoint(tmp_path / "base", tensors))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 600),
    planes=st.integers(1, 8),
    scale=st.sampled_from(["tensor", "row", "rank1"]),
    stack=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read(tmp_path, n, k, planes, scale, stack, seed):
    shape = (stack, n, k) if stack else (n, k)
    rng = np.random.default_rng(seed)
    tensors = {"a": weights(rng, shape, "float32"), "b": weights(rng, (n,))}
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    checkpoint = open_checkpoint(write_checkpoint(root / "base", tensors))
    pairs = [(w, changed(rng, w, "float32")) for w in (tensors["a"] if stack else [tensors["a"]])]
    made = [reference.extract(before, after, planes, scale) for before, after in pairs]
    with PackfileWriter(root / "delta", checkpoint) as writer:
        writer.add("b", tensors["b"])
        writer.add("a", made if stack else made[0])
    packfile = load(root / "delta")
    found = packfile["a"] if stack else (packfile["a"],)
    assert same_bits(packfile["b"], tensors["b"]) and len(found) == len(made)
    for a, b in zip(found, made, strict=True):
        assert (a.shape, a.form, a.planes) == (b.shape, b.form, b.planes)
        assert same_bits(a.sign, b.sign) and same_bits(a.scale, b.scale)
        assert a.column is None or same_bits(a.column, b.column)


def test_a_large_delta_is_split_and_read_as_one(tmp_path, rng, base):
    tensors, checkpoint = base
    made = {}
    with PackfileWriter(tmp_path / "delta", checkpoint, max_shard_bytes=3000) as writer:
        for name, weight in tensors.items():
            made[name] = reference.extract(weight, changed(rng, weight, "float32"))
            writer.add(name, made[name])
    names = sorted(path.name for path in (tmp_path / "delta").iterdir())
    assert "delta_model-00001-of-00006.safetensors" in names and "delta_model.safetensors.index.json" in names
    packfile = load(tmp_path / "delta")
    assert all(same_bits(packfile[name].sign, made[name].sign) for name in tensors)
    index = tmp_path / "delta" / "delta_model.safetensors.index.json"
    document = json.loads(index.read_text())
    key = next(iter(document["weight_map"]))
    document["weight_map"][key] = "delta_model-00002-of-00006.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(FormatError, match=f"{key} is in delta_model-00001-of-00006.safetensors"):
        load(tmp_path / "delta")


def test_another_base_is_refused(tmp_path, rng, base):
    tensors, checkpoint = base
    with PackfileWriter(tmp_path / "delta", checkpoint) as writer:
        for name, weight in tensors.items():
            writer.add(name, reference.extract(weight, changed(rng, weight, "float32")))
    packfile = load(tmp_path / "delta")
    packfile.check_base(checkpoint)
    other = {**tensors, "layers.3.weight": tensors["layers.3.weight"] + 1}
    with pytest.raises(BaseMismatchError, match=r"layers.3.weight: .* has other values; .* made from base"):
        packfile.check_base(open_checkpoint(write_checkpoint(tmp_path / "other", other)))
    del other["layers.3.weight"]
    with pytest.raises(BaseMismatchError, match="has no such tensor"):
        packfile.check_base(open_checkpoint(write_checkpoint(tmp_path / "fewer", other)))


def test_the_writer_refuses_what_the_format_cannot_say(tmp_path, base):
    tensors, checkpoint = base
    name, weight = next(iter(tensors.items()))
    delta = reference.extract(weight, weight)
    for value, words in (
        (np.array(["text"]), "no place in a safetensors file"),
        ([delta, reference.extract(weight, weight, 2)], "matrices of a stack differ"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            with PackfileWriter(tmp_path / "delta", checkpoint) as writer:
                writer.add(name, value)
        assert not (tmp_path / "delta").exists()
    with pytest.raises(ValueError, match="already there"):
        with PackfileWriter(tmp_path / "delta", checkpoint) as writer:
            writer.add(name, delta)
            writer.add(name, delta)
    with pytest.raises(ValueError, match="other is not a tensor of the base"):
        with PackfileWriter(tmp_path / "delta", checkpoint) as writer:
            writer.add("other", delta)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_name_of_any_characters_survives(tmp_path, rng):
    name = 'wei"rd/näme.weight'
    tensors = {name: weights(rng, (32, 300), "float32")}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "base", tensors))
    with PackfileWriter(tmp_path / "delta", checkpoint) as writer:
        writer.add(name, as_bfloat16(np.zeros((2, 2), np.uint16)))
    assert load(tmp_path / "delta")[name].shape == (2, 2)


if __name__ == "__main__":
    if GOLDEN.exists():
        shutil.rmtree(GOLDEN)
    with tempfile.TemporaryDirectory() as scratch:
        write_golden(Path(scratch), GOLDEN)
    sys.stdout.write(f"wrote {GOLDEN}\n")
