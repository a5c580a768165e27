"""The restricted reader of torch.save files: what it reads, and everything that it refuses."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdelta.errors import FormatError
from bitdelta.torchfile import open_torch_file


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    if value.bit_length() < 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(kind, key, count):
    return b"(" + text("storage") + b"c" + kind + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(kind, key, count, shape, strides, start=0):
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(kind, key, count)
        + number(start)
        + numbers(shape)
        + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def state(items):
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in items.items()) + b"u."


def archive(
    path, pickled, data=None, *, byteorder=b"little", compression=zipfile.ZIP_STORED, prefix="archive"
):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{prefix}/data.pkl", pickled)
        if byteorder is not None:
            file.writestr(f"{prefix}/byteorder", byteorder)
        for key, raw in (data or {}).items():
            # torch pads every entry to 64 bytes by an extra field; so do these
            entry = f"{prefix}/data/{key}"
            padding = -(file.fp.tell() + 30 + len(entry) + 4) % 64
            info = zipfile.ZipInfo(entry)
            info.compress_type = compression
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            file.writestr(info, raw)
    return path


FLOAT = b"torch\nFloatStorage\n"
SIX = np.arange(6, dtype=np.float32)


@pytest.fixture
def plain(tmp_path):
    pickled = state({"a": tensor(FLOAT, "0", 6, (2, 3), (3, 1)), "b": tensor(FLOAT, "0", 6, (2,), (1,), 4)})
    return archive(tmp_path / "plain.bin", pickled, {"0": SIX.tobytes()})


def refused(path, words):
    with pytest.raises(FormatError, match=words) as caught:
        open_torch_file(path)
    assert "\n" not in str(caught.value)


def test_reads_tensors_and_views_of_one_storage(plain):
    tensors = open_torch_file(plain)
    assert list(tensors) == ["a", "b"]
    assert tensors["a"].dtype == "F32" and tensors["a"].shape == (2, 3) and tensors["a"].nbytes == 24
    np.testing.assert_array_equal(tensors["a"].array(), SIX.reshape(2, 3))
    np.testing.assert_array_equal(tensors["b"].array(), SIX[4:])
    assert not tensors["a"].array().flags.writeable


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_reads_what_torch_writes_and_refuses_its_legacy_format(tmp_path, modern):
    torch = pytest.importorskip("torch")
    weights = {
        "half": torch.arange(12).reshape(3, 4).half(),
        "bfloat": torch.linspace(-1, 1, 8).bfloat16(),
        "parameter": torch.nn.Parameter(torch.tensor(0.25)),
        "int": torch.arange(4, dtype=torch.int32),
        "long": torch.arange(4),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 7),
    }
    weights["tied"] = weights["half"]
    weights["transposed"] = torch.arange(12).reshape(3, 4).bfloat16().t()
    weights["columns"] = torch.arange(24).reshape(2, 3, 4)[:, ::2, 1:3]
    weights["complex"] = torch.tensor([1 + 2j])
    weights["fp8"] = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    weights["uint16"] = torch.tensor([1, 65535]).to(torch.uint16)
    weights["attribute"] = torch.ones(3)
    weights["attribute"].note = "dropped"
    weights["decay"] = torch.nn.Parameter(torch.ones(2))
    weights["decay"].no_decay = True
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=modern)
    if not modern:
        refused(path, "convert it: python -c .*torch.save")
        return
    tensors = open_torch_file(path)
    assert set(tensors) == set(weights)
    for name, weight in weights.items():
        got = np.asarray(tensors[name].array())
        assert got.shape == tuple(weight.shape)
        assert got.tobytes() == weight.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert not np.asarray(tensors[name].array()).flags.writeable
        np.testing.assert_array_equal(
            np.frombuffer(tensors[name].read(0, got.nbytes), got.dtype), np.asarray(got).reshape(-1)
        )
    assert tensors["tied"].offset == tensors["half"].offset


def test_reads_a_state_dict_with_its_metadata(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    torch.save(model.state_dict(), tmp_path / "model.bin")
    tensors = open_torch_file(tmp_path / "model.bin")
    np.testing.assert_array_equal(tensors["0.weight"].array(), model[0].weight.detach().numpy())


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("protocol", range(6))
def test_never_executes_a_malicious_pickle(tmp_path, protocol):
    marker = str(tmp_path / "executed")
    path = archive(tmp_path / "evil.bin", pickle.dumps({"a": Attack(marker)}, protocol))
    refused(path, "mkdir|opcode")
    assert not os.path.exists(marker)


EVIL = {
    "global": (b"\x80\x02cos\nsystem\n(" + text("true") + b"tR.", "os.system"),
    "builtins": (b"\x80\x02cbuiltins\neval\n(" + text("1") + b"tR.", "builtins.eval"),
    "stack global": (
        b"\x80\x04" + text("os") + text("system") + b"\x93" + text("true") + b"\x85R.",
        "os.system",
    ),
    "torch load": (b"\x80\x02ctorch\nload\n)R.", "torch.load"),
    "instance": (b"(ios\nsystem\n.", "opcode INST"),
    "object": (b"\x80\x02(cos\nsystem\no.", "os.system"),
    "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "call a storage": (b"\x80\x02ctorch\nFloatStorage\n)R.", "called"),
    "build a tensor": (b"\x80\x02" + tensor(FLOAT, "0", 6, (6,), (1,)) + b"}b.", "expected dict"),
    "not a dict": (b"\x80\x02].", "expected a dict"),
    "not a tensor": (state({"a": b"K\x01"}), "is a int, not a tensor"),
    "escape codes": (state({"\x1b[2J": tensor(FLOAT, "0", 6, (6,), (1,))}), "printable"),
    "nested": (state({"a": b"}"}), "is a dict, not a tensor"),
    "twice": (b"\x80\x02}(" + (text("a") + b"N") * 2 + b"u.", "twice"),
    "no stop": (b"\x80\x02}", "truncated or damaged"),
    "empty": (b"", "truncated or damaged"),
    "underflow": (b"\x80\x02R.", "truncated or damaged"),
    "no mark": (b"\x80\x02t.", "mark"),
    "no memo": (b"\x80\x02h\x05.", "truncated or damaged"),
    "two objects": (b"\x80\x02}}.", "2 objects"),
    "key": (b"\x80\x02}()Ku.", "truncated or damaged"),
    "list key": (b"\x80\x02}]Ns.", "dict key"),
}


@pytest.mark.parametrize("case", EVIL)
def test_refuses_what_a_dict_of_tensors_does_not_need(tmp_path, case):
    pickled, words = EVIL[case]
    refused(archive(tmp_path / "evil.bin", pickled, {"0": SIX.tobytes()}), words)


def test_a_list_that_holds_itself_is_refused_without_recursion(tmp_path):
    refused(archive(tmp_path / "cycle.bin", b"\x80\x02]q\x00h\x00a."), "expected a dict")
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 200  # 2^200 leaves, were it ever printed or hashed
    refused(archive(tmp_path / "doubled.bin", doubled + b"."), "expected a dict")


SHAPES = {
    "broadcast": ((6, 6), (0, 1), 0, "does not fit"),
    "beyond by strides": ((3, 2), (2, 3), 0, "does not fit"),
    "strides overflow": ((2, 2), (1 << 61, 1 << 61), 0, "does not fit"),
    "empty but huge": ((0, 1 << 61, 1 << 61), (1, 1, 1), 0, "does not fit"),
    "negative stride": ((6,), (-1,), 0, "between 0"),
    "negative size": ((-6,), (1,), 0, "between 0"),
    "negative start": ((2,), (1,), -1, "between 0"),
    "beyond the storage": ((2,), (1,), 5, "does not fit"),
    "too large": ((7,), (1,), 0, "does not fit"),
    "overflow": ((1 << 40, 1 << 40), (1 << 40, 1), 0, "does not fit"),
    "huge": ((1 << 62,), (1,), 0, "between 0"),
    "dimensions": ((1,) * 9, (1,) * 9, 0, "at most 8"),
    "strides missing": ((2, 3), (1,), 0, "strides"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_refuses_shapes_and_strides_that_are_not_a_part_of_the_storage(tmp_path, case):
    shape, strides, start, words = SHAPES[case]
    pickled = state({"a": tensor(FLOAT, "0", 6, shape, strides, start)})
    refused(archive(tmp_path / "shape.bin", pickled, {"0": SIX.tobytes()}), words)


def test_refuses_a_storage_whose_entry_is_missing_or_has_another_size(tmp_path):
    pickled = state({"a": tensor(FLOAT, "0", 6, (6,), (1,))})
    refused(archive(tmp_path / "missing.bin", pickled), "missing")
    refused(archive(tmp_path / "short.bin", pickled, {"0": b"1234"}), "expected 24 bytes, got 4")
    huge = state({"a": tensor(FLOAT, "0", 1 << 61, (1,), (1,))})
    refused(archive(tmp_path / "huge.bin", huge, {"0": b"1234"}), "got 4")
    unknown = state({"a": tensor(b"torch\nComplexDoubleStorage\n", "0", 3, (3,), (1,))})
    refused(archive(tmp_path / "kind.bin", unknown, {"0": SIX.tobytes()}), "ComplexDoubleStorage")


def test_refuses_big_endian_compressed_and_duplicate_entries(tmp_path):
    pickled = state({"a": tensor(FLOAT, "0", 6, (6,), (1,))})
    data = {"0": SIX.tobytes()}
    refused(archive(tmp_path / "big.bin", pickled, data, byteorder=b"big"), "little")
    bomb = {"0": b"\0" * (1 << 20)}
    refused(archive(tmp_path / "bomb.bin", pickled, bomb, compression=zipfile.ZIP_DEFLATED), "compressed")
    with zipfile.ZipFile(tmp_path / "twice.bin", "w") as file:
        file.writestr("a/data.pkl", pickled)
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a/data.pkl", pickled)
    refused(tmp_path / "twice.bin", "two entries")
    with zipfile.ZipFile(tmp_path / "none.bin", "w") as file:
        file.writestr("a/other", pickled)
    refused(tmp_path / "none.bin", "expected one PREFIX/data.pkl")


def test_refuses_entries_that_overlap(tmp_path):
    pickled = state({"a": tensor(FLOAT, "0", 6, (6,), (1,))})
    path = archive(tmp_path / "overlap.bin", pickled, {"0": SIX.tobytes(), "1": SIX.tobytes()})
    raw = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        first, second = (file.getinfo(f"archive/data/{key}").header_offset for key in "01")
    central = raw.rindex(b"archive/data/1") - 46
    assert struct.unpack_from("<I", raw, central + 42)[0] == second
    path.write_bytes(raw[: central + 42] + struct.pack("<I", first) + raw[central + 46 :])
    refused(path, "overlaps|damaged")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_torch_file(tmp_path / "absent.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    refused(tmp_path / "empty.bin", "not a zip")


def test_every_truncation_is_refused(plain, tmp_path):
    raw = plain.read_bytes()
    target = tmp_path / "cut.bin"
    for length in range(0, len(raw), 7):
        target.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_torch_file(target)


def survives(path):
    """A damaged file is either refused or read within its bounds; never anything else."""
    try:
        tensors = open_torch_file(path)
        for tensor_ in tensors.values():
            assert 0 <= tensor_.offset and tensor_.offset + tensor_.span <= os.path.getsize(path)
            assert tensor_.array().size <= os.path.getsize(path)
    except FormatError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_bytes_never_crash_or_leave_the_file(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    pickled = state({"a": tensor(FLOAT, "0", 6, (2, 3), (3, 1))})
    path = archive(folder / "fuzz.bin", pickled, {"0": SIX.tobytes()})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    survives(path)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(list(b"\x80\x02}]()tuQRbqh.XKJNsae\x85\x86\x87\x88\x89\x00\x01\x94\x93")), max_size=30
    )
)
def test_random_opcodes_never_crash(tmp_path_factory, opcodes):
    path = archive(tmp_path_factory.mktemp("fuzz") / "fuzz.bin", bytes(opcodes), {"0": SIX.tobytes()})
    survives(path)
