"""A base whose linears torchao keeps in int8: deltas are added to what its own kernels give."""

import pytest
import torch
from models import llama_config, make

from bitdelta.errors import BaseMismatchError, Error
from bitdelta.model import DeltaModel

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("int8"), llama_config(hidden_size=64, intermediate_size=96))


def quantized(root, **options):
    from transformers import TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return DeltaModel.from_pretrained(
        root / "base", dtype=torch.float32, quantization_config=config, **options
    )


def dequantize(model):
    """The same weights as a plain model's."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "dequantize"):
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    return model


@torch.no_grad()
def test_rows_over_an_int8_base_equal_those_over_its_dequantised_weights(llama):
    model, wide = quantized(llama), quantized(llama)
    projection = model.model.model.layers[0].mlp.up_proj
    assert "Int8" in type(projection.weight).__name__
    dequantize(wide.model)
    for i in range(2):
        model.load_delta(f"t{i}", llama / f"delta-{i}")
        wide.load_delta(f"t{i}", llama / f"delta-{i}")
    ids = torch.randint(3, 96, (4, 7), generator=torch.Generator().manual_seed(0))
    names = ["t0", None, "t1", "t0"]
    found, wanted = model(ids, delta_names=names).logits, wide(ids, delta_names=names).logits
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    base = model(ids, delta_names=[None] * 4).logits
    assert (base[1] - found[1]).abs().max() <= 1e-4 * base.abs().max()
    assert (base[0] - found[0]).abs().max() > 1e-2
    own = model.generate(ids, delta_names=names, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(names):
        alone = model.generate(ids[row : row + 1], delta_names=[name], max_new_tokens=6, do_sample=False)[0]
        assert own[row, : len(alone)].tolist() == alone.tolist()
    with pytest.raises(Error, match="a quantised weight; merge into the base before"):
        model.merge_and_unload("t0")


def test_fingerprints_are_compared_unless_the_base_is_said_to_be_quantized(llama, tmp_path):
    other = make(tmp_path, llama_config(hidden_size=64, intermediate_size=96), tenants=0, seed=9)
    model = quantized(other)
    with pytest.raises(BaseMismatchError, match="has other values"):
        model.load_delta("t0", llama / "delta-0")
    with pytest.raises(BaseMismatchError, match="Hub ids or all their files must be the same"):
        model.load_delta("t0", llama / "delta-0", allow_base="quantized")
    with pytest.raises(ValueError, match="allow_base: expected 'quantized' or None"):
        model.load_delta("t0", llama / "delta-0", allow_base="any")
