"""A base whose linears have no `weight`, as GPTQ's and AWQ's: integers [K, N] and scales of groups instead."""

import pytest
import torch
from models import llama_config, make
from torch import nn

from bitdelta.errors import BaseMismatchError, Error
from bitdelta.model import DeltaModel

GROUP = 16


class GroupedLinear(nn.Module):
    """What their modules have in common; the arithmetic of 4 bits, unpacked."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        groups = linear.weight.detach().T.reshape(-1, GROUP, self.out_features)  # [K / 16, 16, N]
        self.register_buffer("scales", groups.abs().amax(1, keepdim=True) / 7)
        self.register_buffer("qweight", (groups / self.scales).round().to(torch.int8))
        self.bias = None

    def forward(self, x):
        return x @ (self.qweight * self.scales).reshape(self.in_features, self.out_features)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("grouped"), llama_config())


def quantised(root, plain=False):
    """The base with its layers' linears in groups of 4 bits; plain: linears of the same values."""
    model = DeltaModel.from_pretrained(root / "base", dtype=torch.float32).model
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            own = GroupedLinear(module)
            if plain:
                with torch.no_grad():
                    module.weight.copy_(own(torch.eye(own.in_features)).T)
            else:
                model.model.set_submodule(path, own)
    return DeltaModel(model, root / "base")


@torch.no_grad()
def test_rows_equal_those_over_linears_of_the_same_values(root):
    model, plain = quantised(root), quantised(root, plain=True)
    for found in (model, plain):
        for i in range(2):
            found.load_delta(f"t{i}", root / f"delta-{i}", allow_base="quantized")
    ids = torch.randint(3, 96, (4, 7), generator=torch.Generator().manual_seed(0))
    names = ["t0", None, "t1", "t0"]
    found, wanted = (each(ids, delta_names=names).logits for each in (model, plain))
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    base = model(ids).logits
    assert (found[[0, 2, 3]] - base[[0, 2, 3]]).abs().amax((1, 2)).min() > 1e-2
    report, same = model.coverage("t0"), plain.coverage("t0")
    assert report == same and report["linear"] > 0.5
    with pytest.raises(Error, match="_proj.weight: a quantised weight; merge into the base before"):
        model.merge_and_unload("t0")


def test_what_it_cannot_take_is_refused_by_name(root, tmp_path):
    model = quantised(root)
    deep = make(tmp_path / "deep", llama_config(num_hidden_layers=3), tenants=1)
    with pytest.raises(BaseMismatchError, match="Hub ids or all their files must be the same"):
        model.load_delta("t", deep / "delta-0", allow_base="quantized")
    assert model.deltas == []
