"""Small pairs to distill, whose best scales are known, and deltas of them whose scales are wrong; as fixtures too."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from folders import same_bits
from models import llama_config

import bitdelta
from bitdelta.checkpoint import open_checkpoint
from bitdelta.rewrite import rewrite

VOCABULARY = 96
SHORT = {"steps": 12, "batch_size": 4, "length": 16, "lr": 0.05}


def make_pair(folder, kind=transformers.LlamaForCausalLM, config=None, size=0.02, dtype=torch.float32):
    """A random base, and a fine-tune of which signs and row scales are exact: so the best scales are known."""
    config = config or llama_config()
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


def make_delta(pair, out, **options):
    """Compressed, beside OUT as `exact`; then every scale made wrong by up to a factor of two."""
    exact = out.with_name("exact")
    bitdelta.compress(*pair, exact, **options)
    rng = np.random.default_rng(2)

    def spoil(name, value):
        if not isinstance(value, bitdelta.Delta):
            return value
        shape = value.scale.shape if value.form != "tensor" else (value.planes, 1)
        return replace(value, scale=(value.scale * np.exp2(rng.uniform(-1, 1, shape))).astype(np.float32))

    rewrite(bitdelta.load(exact), open_checkpoint(pair[0]), out, spoil)
    return out


def scales(folder):
    packfile = bitdelta.load(folder)
    return {key: tensor.array() for key, tensor in packfile.tensors.items() if ".scale" in key}


def same_files(a, b):
    return (a / "delta_model.safetensors").read_bytes() == (b / "delta_model.safetensors").read_bytes()


def assert_only_scales_differ(old, new):
    old, new = bitdelta.load(old), bitdelta.load(new)
    assert list(old) == list(new) and old.config["files"] == new.config["files"]
    for key, tensor in old.tensors.items():
        after = new.tensors[key].array()
        if ".scale" in key:
            assert (after > 0).all() and (after != tensor.array()).any(), key
        else:
            assert same_bits(tensor.array(), after), key


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, (60, 16))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def delta(pair, tmp_path_factory):
    return make_delta(pair, tmp_path_factory.mktemp("delta") / "row")
