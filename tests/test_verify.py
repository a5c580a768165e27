"""verify: finds every kind of damage, on the delta's side, on the base's and on the fine-tune's."""

import json
import os

import numpy as np
import pytest
from folders import changed, weights, write_checkpoint

from bitdelta import reference
from bitdelta.array import to_float32
from bitdelta.compress import compress
from bitdelta.errors import FormatError
from bitdelta.packfile import load
from bitdelta.verify import verify

LARGE = "model.layers.0.q_proj.weight"  # larger than what a fingerprint samples


@pytest.fixture
def case(tmp_path, rng):
    before = {
        LARGE: weights(rng, (256, 512)),
        "experts": weights(rng, (2, 40, 300)),
        "lm_head.weight": weights(rng, (50, 300)),
        "norm.weight": weights(rng, (300,)),
        "frozen.weight": weights(rng, (300, 300)),
    }
    after = {name: changed(rng, weight) for name, weight in before.items()}
    after["frozen.weight"] = before["frozen.weight"]
    after["lm_head.weight"] = np.concatenate([after["lm_head.weight"], weights(rng, (2, 300))])
    write_checkpoint(tmp_path / "base", before, files={"tokenizer.json": "t"})
    write_checkpoint(tmp_path / "finetuned", after, {"new": 1}, files={"tokenizer.json": "t"})
    compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta")
    return tmp_path, before, after


def check(root, *words, base="base", finetuned="finetuned"):
    """verify says no, and why."""
    report = verify(root / "delta", root / base, None if finetuned is None else root / finetuned)
    assert report["ok"] is False and report["reasons"]
    for word in words:
        assert any(word in reason for reason in report["reasons"]), report["reasons"]
    json.dumps(report)


def test_what_is_right_is_ok_and_the_errors_are_the_references(case):
    root, before, after = case
    report = verify(root / "delta", root / "base", root / "finetuned")
    assert report["ok"] is True and report["reasons"] == []
    assert set(report["errors"]) == {LARGE, "experts", "lm_head.weight"}
    d = to_float32(after[LARGE]) - to_float32(before[LARGE])
    left = d - reference.expand(None, load(root / "delta")[LARGE])
    expected = np.linalg.norm(left.astype(np.float64)) / np.linalg.norm(d.astype(np.float64))
    assert report["errors"][LARGE] == pytest.approx(expected, rel=1e-6)
    assert report["largest_error"].split()[0] in report["errors"] and 0 < report["relative_error"] < 1
    assert verify(root / "delta", root / "base")["ok"] is True
    json.dumps(report)


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("key", [f"{LARGE}.sign", f"{LARGE}.scale", "norm.weight", "lm_head.weight.rows"])
def test_one_flipped_bit_of_the_delta_is_found(case, key):
    root, *_ = case
    tensor = load(root / "delta").tensors[key]
    flip(root / "delta" / "delta_model.safetensors", tensor.offset + tensor.nbytes // 2)
    check(root, key.rpartition(".")[0] if key != "norm.weight" else key)


@pytest.mark.parametrize("name", [LARGE, "experts", "lm_head.weight", "frozen.weight"])
def test_one_flipped_bit_of_the_base_is_found_between_the_fingerprints_samples(case, name):
    from bitdelta.checkpoint import open_checkpoint

    root, *_ = case
    tensor = open_checkpoint(root / "base")[name]
    before = tensor.fingerprint()
    flip(root / "base" / "model.safetensors", tensor.offset + 5000)
    if tensor.nbytes > 100_000:
        assert open_checkpoint(root / "base")[name].fingerprint() == before
    check(root, name, finetuned=None)


def test_a_base_tensor_that_the_delta_does_not_need_may_change(case):
    from bitdelta.checkpoint import open_checkpoint

    root, *_ = case
    flip(root / "base" / "model.safetensors", open_checkpoint(root / "base")["norm.weight"].offset)
    assert verify(root / "delta", root / "base")["ok"] is True


def test_another_base_is_named(case, rng):
    root, before, _ = case
    write_checkpoint(
        root / "other", {**before, LARGE: weights(rng, (256, 512))}, files={"tokenizer.json": "t"}
    )
    check(root, f"{LARGE} has other values", base="other")
    write_checkpoint(root / "fewer", {name: w for name, w in before.items() if name != "experts"})
    check(root, "experts is missing", "tokenizer.json is missing", base="fewer")


def test_another_fine_tune_is_noticed(case, rng):
    root, before, after = case
    other = {name: changed(rng, weight, scale=0.08) for name, weight in before.items()}
    other["lm_head.weight"] = after["lm_head.weight"]
    write_checkpoint(root / "other", other)
    check(root, f"{LARGE}: relative error", "norm.weight: not", "frozen.weight: not", finetuned="other")
    write_checkpoint(root / "more", {**after, "extra.weight": after["norm.weight"]})
    check(root, "extra.weight is in the fine-tune only", finetuned="more")
    write_checkpoint(root / "shape", {**after, "norm.weight": weights(rng, (301,))})
    check(root, "norm.weight: BF16 [301]", finetuned="shape")


def test_a_file_that_travels_and_was_changed_is_found(case):
    root, *_ = case
    (root / "delta" / "config.json").write_text("{}")
    check(root, "config.json is missing or has changed")
    (root / "delta" / "config.json").unlink()
    check(root, "config.json is missing or has changed")


def test_a_truncated_delta_is_not_ok_and_no_delta_is_an_error(case):
    root, *_ = case
    path = root / "delta" / "delta_model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    check(root, "truncated")
    with pytest.raises(FormatError, match="not a packed delta"):
        verify(root / "base", root / "base")
