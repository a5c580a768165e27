"""A delta taken from what a quantised base computes with repairs what quantisation lost."""

import importlib
import json

import numpy as np
import pytest
import torch
import transformers
from folders import same_bits
from models import llama_config, shift

import bitdelta
from bitdelta.checkpoint import open_checkpoint
from bitdelta.cli import main
from bitdelta.errors import BaseMismatchError, Error
from bitdelta.model import DeltaModel
from bitdelta.quantized import dequantize

pytest.importorskip("torchao", reason="torchao is not installed")
quantized = importlib.import_module("bitdelta.quantized")
METHODS = ("int8", "bnb-int8", "bnb-nf4")
SIZE = {
    "int8": 5e-5,
    "bnb-int8": 5e-5,
    "bnb-nf4": 2e-3,
}  # of the change: smaller than what quantisation loses


def needs(method):
    if method.startswith("bnb"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(hidden_size=64, intermediate_size=96))
    model.save_pretrained(folder / "base")
    for size in set(SIZE.values()):
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        shift(model.model.layers, 1, size)
        model.save_pretrained(folder / f"tuned-{size}")
    return folder


@pytest.fixture(scope="module")
def packed(base):
    """The delta over the int8 base."""
    bitdelta.compress(base / "base", tuned(base, "int8"), base / "int8", quantized_base="int8")
    return base / "int8"


def tuned(base, method):
    return base / f"tuned-{SIZE[method]}"


def over(folder, method):
    """The model over the base as it is quantised."""
    config = None if method == "stored" else quantized._config(method)
    options = {} if config is None else {"quantization_config": config}
    if method.startswith("bnb"):
        options["device_map"] = {"": "cpu"}
    return DeltaModel.from_pretrained(folder, dtype=torch.float32, **options)


@torch.no_grad()
def logits(model, **options):
    tokens = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    return model(tokens, **options).logits


@pytest.mark.parametrize("method", METHODS)
def test_the_delta_brings_a_quantised_base_nearer_to_the_fine_tune_than_one_of_the_full_base(
    base, method, tmp_path
):
    needs(method)
    wanted = logits(transformers.AutoModelForCausalLM.from_pretrained(tuned(base, method)))
    bitdelta.compress(base / "base", tuned(base, method), tmp_path / "full")
    bitdelta.compress(base / "base", tuned(base, method), tmp_path / "own", quantized_base=method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "own"]
    model = over(base / "base", method)
    errors = {"base": logits(model, delta_names=None)}
    for name in ("full", "own"):
        model.load_delta(name, tmp_path / name, allow_base="quantized")
        errors[name] = logits(model, delta_names=name)
    errors = {name: (found - wanted).square().mean().item() for name, found in errors.items()}
    assert errors["own"] < 0.75 * errors["full"] < 0.75 * errors["base"]


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_the_librarys_own_dequantisation(base, method, tmp_path):
    needs(method)
    report = dequantize(base / "base", method, tmp_path / "plain")
    found, before = open_checkpoint(tmp_path / "plain"), open_checkpoint(base / "base")
    assert set(found) == set(before) and len(report["quantized"]) == 14
    model = over(base / "base", method).model
    for name in found:
        value = found[name].array()
        if name not in report["quantized"]:
            assert same_bits(value, before[name].array())
            continue
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        if method == "int8":
            assert same_bits(value, weight.dequantize().numpy())
        elif method == "bnb-nf4":
            from bitsandbytes.functional import dequantize_4bit

            assert same_bits(value, dequantize_4bit(weight.data, weight.quant_state).numpy())
        else:  # a step of its grid is 1/127 of the row's largest; its product rounds to fp16
            error = np.abs(value - before[name].array()).max(1) / np.abs(before[name].array()).max(1)
            assert (error <= 0.5 / 127 + 2e-3).all() and (error > 0).any()


def test_a_base_whose_files_are_quantised_is_the_same_base(base, packed, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base / "base", dtype=torch.float32, quantization_config=quantized._config("int8")
    )
    model.save_pretrained(tmp_path / "stored")
    bitdelta.compress(tmp_path / "stored", tuned(base, "int8"), tmp_path / "delta", quantized_base="stored")
    assert bitdelta.load(tmp_path / "delta").quantized == "stored"
    results = []
    for folder, method, delta in (
        (tmp_path / "stored", "stored", tmp_path / "delta"),
        (base / "base", "int8", packed),
    ):
        found = over(folder, method)
        found.load_delta("t", delta, allow_base="quantized")
        results.append(logits(found, delta_names="t"))
    assert torch.equal(*results)


def test_signs_are_fitted_over_the_quantised_base_too(base, packed, tmp_path):
    tokens = np.random.default_rng(0).integers(3, 96, (64, 16))
    report = bitdelta.compress(
        base / "base", tuned(base, "int8"), tmp_path / "out", text=tokens, quantized_base="int8"
    )
    assert report["calibration"]["output_error"] < report["calibration"]["output_error_before"]
    model = over(base / "base", "int8")
    model.load_delta("plain", packed, allow_base="quantized")
    model.load_delta("fitted", tmp_path / "out", allow_base="quantized")
    wanted = logits(transformers.AutoModelForCausalLM.from_pretrained(tuned(base, "int8")))
    plain, fitted = (
        (logits(model, delta_names=name) - wanted).square().mean() for name in ("plain", "fitted")
    )
    assert fitted < plain


def test_over_another_base_it_is_refused(base, packed, tmp_path):
    other = shift(transformers.LlamaForCausalLM.from_pretrained(base / "base"), 5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"quantised \(int8\): load it with allow_base='quantized'"):
        over(base / "base", "int8").load_delta("t", packed)
    with pytest.raises(BaseMismatchError, match="this model's is not quantised"):
        DeltaModel.from_pretrained(base / "base").load_delta("t", packed, allow_base="quantized")
    with pytest.raises(BaseMismatchError, match="Hub ids or all their files must be the same"):
        over(tmp_path / "other", "int8").load_delta("t", packed, allow_base="quantized")
    with pytest.raises(BaseMismatchError, match="quantised"):
        bitdelta.merge(base / "base", packed, tmp_path / "merged")


def test_verify_and_the_card_know_the_base(base, packed, tmp_path):
    assert bitdelta.verify(packed, base / "base")["ok"]
    assert not bitdelta.verify(packed, tuned(base, "int8"))["ok"]
    with pytest.raises(ValueError, match="give as base the folder that bitdelta.quantized.dequantize writes"):
        bitdelta.verify(packed, base / "base", tuned(base, "int8"))
    dequantize(base / "base", "int8", tmp_path / "plain")
    assert bitdelta.verify(packed, tmp_path / "plain", tuned(base, "int8"))["ok"]
    card = (packed / "README.md").read_text()
    assert 'allow_base="quantized"' in card and "bitdelta merge" not in card


def test_the_command_and_a_killed_runs_weights(base, packed, tmp_path, monkeypatch, capsys):
    dequantize(base / "base", "int8", tmp_path / ".out.dequantized")  # a kill left them
    monkeypatch.setattr(quantized, "_load", None)
    arguments = ["compress", str(base / "base"), str(tuned(base, "int8")), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--quantized-base", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forms"]
    name = "delta_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (packed / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("int3", ValueError, "quantized_base: expected one of int8, .*, got 'int3'"),
        (3, ValueError, "or a quantization config of transformers, got int"),
        ("stored", ValueError, "'stored', and .* is not quantised"),
    ],
    ids=["unknown", "number", "plain"],
)
def test_methods_that_do_not_fit_are_refused(base, tmp_path, method, error, words):
    with pytest.raises(error, match=words):
        bitdelta.compress(base / "base", tuned(base, "int8"), tmp_path / "out", quantized_base=method)
    assert not list(tmp_path.iterdir())


def test_a_method_that_quantises_nothing_is_refused(base, tmp_path):
    config = quantized._config("int8")
    config.modules_to_not_convert = ["model", "lm_head"]
    with pytest.raises(Error, match="quantises nothing in LlamaForCausalLM"):
        dequantize(base / "base", config, tmp_path / "out")
    assert not list(tmp_path.iterdir())
