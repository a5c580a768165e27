"""diff.pt of the original project -> packfile: words keep their meaning, what does not fit is refused."""

import importlib
import json

import numpy as np
import pytest

from bitdelta.array import to_float32
from bitdelta.errors import BaseMismatchError, FormatError

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

N, K = 40, 96  # neither a multiple of 16 rows nor of 256 columns


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(10, 8).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(N, K).bfloat16(),
        "model.layers.0.mlp.down_proj.weight": torch.randn(K, N).bfloat16(),
        "model.norm.weight": torch.ones(8).bfloat16(),
        "lm_head.weight": torch.randn(10, 8).bfloat16(),
    }
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10}))
    return folder, tensors


def pack(signs):
    """The original's `pack` of a bool [K, N]: word w holds rows 32 w .. 32 w + 31, bit i = row 32 w + i."""
    k, n = signs.shape
    words = (signs.reshape(k // 32, 32, n).astype(np.uint64) << np.arange(32, dtype=np.uint64)[:, None]).sum(
        1
    )
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@pytest.fixture
def diff(base):
    signs = np.random.default_rng(1).random((K, N)) < 0.5
    module = "model.layers.0.mlp.up_proj"
    return signs, {
        module + ".mask": pack(signs),
        module + ".coeff": torch.nn.Parameter(torch.tensor(0.03125)),
        "model.norm.weight": torch.full((8,), 1.5).bfloat16(),
    }


def test_every_bit_of_a_mask_is_found_in_the_strips_and_the_padding_is_zero():
    from bitdelta.import_diff import strips

    signs = np.random.default_rng(2).random((K, N)) < 0.5
    sign = strips(pack(signs).numpy())
    assert sign.shape == (1, 3, 8, 16) and sign.dtype == np.uint32 and sign.ctypes.data % 64 == 0
    bits = (sign[0][..., None] >> np.arange(32, dtype=np.uint32)) & 1  # [strip, word, row, bit]
    rows = bits.transpose(0, 2, 1, 3).reshape(48, 256)
    np.testing.assert_array_equal(rows[:N, :K], signs.T)
    assert rows[N:].sum() == 0 and rows[:, K:].sum() == 0


def convert(tmp_path, base, items):
    from bitdelta.import_diff import import_diff

    torch.save(items, tmp_path / "diff.pt")
    return import_diff(tmp_path / "diff.pt", base[0], tmp_path / "delta")


def test_every_tensor_of_the_base_is_accounted_for_in_its_order(tmp_path, base, diff, monkeypatch):
    code = importlib.import_module("bitdelta.import_diff")  # `bitdelta.import_diff` itself is the function
    seen = {}
    monkeypatch.setattr(code, "_write", lambda base, items, config, out: seen.update(items))
    a, b = torch.randn(N, 2), torch.randn(2, K)
    module = "model.layers.0.mlp.down_proj"  # weight [K, N]: A [N, r], B [r, K]
    convert(tmp_path, base, {**diff[1], module + ".A": a, module + ".B": b})
    assert set(seen) == set(base[1])
    packed = seen["model.layers.0.mlp.up_proj.weight"]
    assert packed.shape == (N, K) and packed.scale.shape == (1, N) and (packed.scale == 0.03125).all()
    expected = base[1][module + ".weight"].float() + (a @ b).T
    np.testing.assert_allclose(to_float32(seen[module + ".weight"]), expected.numpy(), rtol=2**-7, atol=1e-6)
    np.testing.assert_array_equal(to_float32(seen["model.norm.weight"]), 1.5)
    assert seen["lm_head.weight"] is None


def test_one_tensor_is_mapped_at_a_time(tmp_path, base, diff, monkeypatch):
    code, tensor = importlib.import_module("bitdelta.import_diff"), importlib.import_module("bitdelta.tensor")
    maps, before = [], set(tensor._maps)  # others may still hold maps of their own

    def write(base, items, config, out):
        for _ in items:
            maps.append(len(set(tensor._maps) - before))

    monkeypatch.setattr(code, "_write", write)
    convert(tmp_path, base, diff[1])
    assert len(maps) == len(base[1]) and max(maps) <= 1, "of the diff; what the base keeps is not mapped"


def test_a_torch_base_and_a_strided_mask_are_read(tmp_path, base, diff):
    from bitdelta.packfile import load

    folder = tmp_path / "torch"
    folder.mkdir()
    torch.save(base[1], folder / "pytorch_model.bin")
    mask = diff[1][M + ".mask"]
    convert(tmp_path, (folder, base[1]), {**diff[1], M + ".mask": mask.t().contiguous().t()})
    (tmp_path / "delta").rename(tmp_path / "first")
    convert(tmp_path, base, diff[1])
    name = M + ".weight"
    first, second = load(tmp_path / "first"), load(tmp_path / "delta")
    np.testing.assert_array_equal(first[name].sign, second[name].sign)
    assert first.entries[name]["fingerprint"] == second.entries[name]["fingerprint"]


def test_a_mask_becomes_the_same_weight(tmp_path, base, diff):
    from bitdelta.packfile import load

    signs, items = diff
    report = convert(tmp_path, base, items)
    assert (report["packed"], report["whole"], report["lowrank"], report["same"]) == (1, 1, 0, 3)
    name = "model.layers.0.mlp.up_proj.weight"
    delta = load(tmp_path / "delta")[name]
    assert delta.shape == (N, K) and delta.planes == 1 and delta.form == "tensor"
    weight = base[1][name].float()
    expected = (
        weight + torch.from_numpy(np.where(signs.T, np.float32(0.03125), np.float32(-0.03125)))
    ).bfloat16()
    got = delta.expand(base[1][name].view(torch.uint16).numpy().view(bfloat16()))
    np.testing.assert_array_equal(to_float32(got), expected.float().numpy())


def bfloat16():
    return pytest.importorskip("ml_dtypes").bfloat16


def test_merging_the_converted_file_gives_the_originals_model(tmp_path, base, diff):
    from safetensors.torch import load_file

    from bitdelta.merge import merge

    signs, items = diff
    convert(tmp_path, base, items)
    merge(base[0], tmp_path / "delta", tmp_path / "merged")
    merged = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        merged.update(load_file(path))
    assert set(merged) == set(base[1])
    torch.testing.assert_close(merged["model.norm.weight"], items["model.norm.weight"], rtol=0, atol=0)
    torch.testing.assert_close(merged["lm_head.weight"], base[1]["lm_head.weight"], rtol=0, atol=0)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = (
        base[1][name].float() + torch.from_numpy(np.where(signs.T, 0.03125, -0.03125)).float()
    ).bfloat16()
    torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)


def test_low_rank_parts_are_expanded(tmp_path, base, diff):
    from bitdelta.packfile import load

    a, b = torch.randn(N, 2), torch.randn(2, K)
    module = "model.layers.0.mlp.down_proj"  # weight [K, N]: A [N, r], B [r, K]
    report = convert(tmp_path, base, {**diff[1], module + ".A": a, module + ".B": b})
    assert report["lowrank"] == 1
    got = to_float32(load(tmp_path / "delta")[module + ".weight"])
    expected = base[1][module + ".weight"].float() + (a @ b).T
    np.testing.assert_allclose(got, expected.numpy(), rtol=2**-7, atol=1e-6)


def test_a_grown_vocabulary_is_stored_and_told_to_the_config(tmp_path, base, diff):
    from bitdelta.merge import merge

    grown = {
        "lm_head.weight": torch.zeros(12, 8).bfloat16(),
        "model.embed_tokens.weight": torch.zeros(12, 8).bfloat16(),
    }
    convert(tmp_path, base, {**diff[1], **grown})
    merge(base[0], tmp_path / "delta", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 12


WRONG = {
    "no coeff": (lambda d: d.pop(M + ".coeff"), FormatError, "without model.layers.0.mlp.up_proj.coeff"),
    "no mask": (lambda d: d.pop(M + ".mask"), FormatError, "without model.layers.0.mlp.up_proj.mask"),
    "mask dtype": (lambda d: d.update({M + ".mask": d[M + ".mask"].long()}), FormatError, "expected int32"),
    "mask shape": (
        lambda d: d.update({M + ".mask": d[M + ".mask"][:2]}),
        BaseMismatchError,
        r"\[96/32, 40\]",
    ),
    "coeff": (lambda d: d.update({M + ".coeff": torch.tensor(float("nan"))}), FormatError, "NaN or Inf"),
    "coeff shape": (lambda d: d.update({M + ".coeff": torch.ones(2)}), FormatError, "expected one float"),
    "other base": (lambda d: d.update({"other.mask": d[M + ".mask"]}), BaseMismatchError, "no other.weight"),
    "extra": (lambda d: d.update({"other.weight": torch.ones(2)}), BaseMismatchError, "not in the base"),
    "shape": (lambda d: d.update({"model.norm.weight": torch.ones(9)}), BaseMismatchError, r"expected \[8\]"),
    "half a pair": (
        lambda d: d.update({"model.layers.0.mlp.down_proj.A": torch.ones(N, 1)}),
        FormatError,
        "without",
    ),
    "twice": (lambda d: d.update({M + ".weight": torch.ones(N, K)}), FormatError, "two forms"),
}
M = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(tmp_path, base, diff, case):
    change, error, words = WRONG[case]
    change(diff[1])
    with pytest.raises(error, match=words):
        convert(tmp_path, base, diff[1])
    assert not (tmp_path / "delta").exists()


def test_a_plain_state_dict_is_not_a_diff(tmp_path, base):
    with pytest.raises(FormatError, match="no NAME.mask"):
        convert(tmp_path, base, {"model.norm.weight": torch.ones(8)})
