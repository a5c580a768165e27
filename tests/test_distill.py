"""Distillation trains scales and nothing else, lowers the held-out loss, and survives kills."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from folders import same_bits

import bitdelta
from bitdelta.checkpoint import open_checkpoint
from bitdelta.rewrite import rewrite

distillation = importlib.import_module("bitdelta.distillation")
student = importlib.import_module("bitdelta.student")
teacher = importlib.import_module("bitdelta.teacher")

VOCABULARY = 96


def llama(**changes):
    about = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**about | changes)


def make_pair(folder, kind, config, size=0.02, dtype=torch.float32):
    """A random base, and a fine-tune of which signs and row scales are exact: so the best scales are known."""
    torch.manual_seed(1)
    config.architectures = [kind.__name__]
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.float().parameters():
            rows = size * (0.5 + torch.rand(len(parameter), *[1] * (parameter.dim() - 1)))
            parameter.add_(rows * torch.randn_like(parameter).sign())
    model.to(dtype).save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def make_delta(pair, out, spoilt=True, **options):
    """Compressed; then every scale of a linear made wrong by up to a factor of two."""
    bitdelta.compress(*pair, out.with_name("exact"), **options)
    rng = np.random.default_rng(2)

    def spoil(name, value):
        if "embed" in name or not isinstance(value, bitdelta.Delta):
            return value
        factor = np.exp2(
            rng.uniform(-1, 1, value.scale.shape if value.form != "tensor" else (value.planes, 1))
        )
        return replace(value, scale=(value.scale * factor).astype(np.float32))

    rewrite(bitdelta.load(out.with_name("exact")), open_checkpoint(pair[0]), out, spoil)
    return out


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, (60, 16))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("llama"), *llama())


@pytest.fixture(scope="module")
def delta(pair, tmp_path_factory):
    return make_delta(pair, tmp_path_factory.mktemp("delta") / "row")


SHORT = {"steps": 12, "batch_size": 4, "length": 16, "lr": 0.05}


def scales(folder):
    packfile = bitdelta.load(folder)
    return {key: tensor.array() for key, tensor in packfile.tensors.items() if ".scale" in key}


def logits(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits


@pytest.fixture(scope="module")
def distilled(pair, delta, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "out"
    report = bitdelta.distill(*pair, delta, tokens, out, **SHORT | {"steps": 60})
    return out, report


def test_lowers_the_loss_on_rows_never_trained_on(distilled):
    _, report = distilled
    assert report["held_out_after"] < 0.1 * report["held_out_before"]
    assert report["loss_after"] < 0.2 * report["loss_before"] and len(report["curve"]) == 60
    assert report["target"] == "logits" and report["kept"] == "distilled scales"
    json.dumps(report, allow_nan=False)


def test_the_merged_result_is_as_close_as_the_report_says(pair, delta, distilled, tokens, tmp_path):
    out, report = distilled
    wanted = logits(pair[1], tokens)
    errors = []
    for i, folder in enumerate((delta, out)):
        bitdelta.merge(pair[0], folder, tmp_path / str(i))
        errors.append((logits(tmp_path / str(i), tokens) - wanted)[-5:].square().mean().item())
    assert errors[0] == pytest.approx(report["held_out_before"], rel=0.1)
    assert errors[1] == pytest.approx(report["held_out_after"], rel=0.1)


def test_only_scales_change_and_they_stay_positive(delta, distilled):
    out, _ = distilled
    old, new = bitdelta.load(delta), bitdelta.load(out)
    assert list(old) == list(new) and old.config["files"] == new.config["files"]
    for key, tensor in old.tensors.items():
        after = new.tensors[key].array()
        if ".scale" in key and "embed" not in key:
            assert (after > 0).all() and (after != tensor.array()).any()
        else:
            assert same_bits(tensor.array(), after)


def test_the_scales_come_back_to_the_right_ones(delta, distilled):
    out, _ = distilled
    right, wrong, found = (scales(folder) for folder in (delta.with_name("exact"), delta, out))

    def error(some):
        return np.mean([np.abs(np.log(some[key] / right[key])).mean() for key in right if "embed" not in key])

    assert error(found) < 0.5 * error(wrong)
