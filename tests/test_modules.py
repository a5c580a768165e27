"""Wrapped modules: rows whose order says nothing, and modules that cannot run rows of several tenants."""

import numpy as np
import pytest
import torch
from torch import nn

from bitdelta.batch import Batch, current
from bitdelta.change import Whole
from bitdelta.errors import Error
from bitdelta.modules import install, kind_of
from bitdelta.split_forward import NormForward, SplitForward, broadcasts
from bitdelta.tenant import Tenant


class Experts(nn.Module):
    """Experts in a list: each sees the rows that a router sends it, in any number."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x):
        flat = x.reshape(-1, 4)
        chosen, out = flat.argmax(1) % 3, torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0].flip(0)
            out[rows] = expert(flat[rows])
        return out.reshape(x.shape)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Experts()
        self.norm = nn.LayerNorm(4)
        self.attention = Attention()

    def forward(self, x):
        return self.norm(self.block(x))


class Attention(nn.Module):
    """Holds a parameter itself and takes a cache."""

    def __init__(self):
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(4))

    def forward(self, x, past_key_values=None):
        return x + self.sinks


def tenant(model, changes):
    changes = {name: Whole(value) for name, value in changes.items()}
    by_module = {}
    for name, change in changes.items():
        path, _, leaf = name.rpartition(".")
        by_module.setdefault(path, {})[leaf] = change
    for path in by_module:
        list(install(model, path))
    return Tenant("t", "delta", changes, None, by_module=by_module)


def run(model, x, tenants, ids):
    token = current.set(Batch(tenants, np.array(ids)))
    try:
        with torch.no_grad():
            return model(x)
    finally:
        current.reset(token)


def test_experts_in_a_list_run_each_tenants_rows_by_themselves():
    torch.manual_seed(0)
    model, other = Model(), Model()
    x = torch.randn(4, 5, 4)
    with torch.no_grad():
        wanted = [model(x), other(x)]
    own = {name: value for name, value in other.state_dict().items() if name.startswith(("block", "norm"))}
    found = run(model, x, [tenant(model, own)], [0, -1, 0, -1])
    for row, who in enumerate([1, 0, 1, 0]):
        assert torch.allclose(found[row], wanted[who][row], atol=1e-6)
    assert torch.equal(model(x), wanted[0])


def test_a_module_with_parameters_and_a_cache_of_its_own_is_refused_by_name():
    with pytest.raises(
        Error, match="attention: Attention holds changed parameters itself and takes past_key"
    ):
        tenant(Model(), {"attention.sinks": torch.ones(4)})


def test_rows_that_belong_to_no_entry_of_the_batch_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4))
    changed = tenant(model, {"0.weight": torch.zeros(4, 4)})
    with pytest.raises(Error, match="0: 7 rows inside a batch of 2"):
        run(model, torch.randn(7, 4), [changed], [0, -1])
    assert run(model, torch.randn(7, 4), [changed], [0, 0]).shape == (7, 4)


class SortedExperts(nn.Module):
    """A stack that takes its rows sorted by expert, as many for each."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        return torch.bmm(x.view(2, -1, 4), self.weight).view(-1, 4)


class Sorting(nn.Module):
    """Gives all rows to both experts, all of the first one's first."""

    def __init__(self):
        super().__init__()
        self.experts = SortedExperts()

    def forward(self, x):
        flat = x.reshape(-1, 4)
        return self.experts(flat.repeat(2, 1)).view(2, *x.shape).sum(0)


def test_a_block_that_sorts_rows_by_expert_is_cut_by_tenant():
    torch.manual_seed(0)
    model, other = nn.Sequential(Sorting()), nn.Sequential(Sorting())
    x = torch.randn(4, 6, 4)
    with torch.no_grad():
        wanted = [model(x), other(x)]
    changed = tenant(model, dict(other.state_dict()))
    found = run(model, x, [changed], [0, -1, 0, -1])
    for row, who in enumerate([1, 0, 1, 0]):
        assert torch.allclose(found[row], wanted[who][row], atol=1e-6)
    assert torch.equal(model(x), wanted[0])
    with pytest.raises(Error, match="0.experts: SortedExperts takes its rows sorted by expert"):
        run(model[0].experts, x.view(-1, 4), [changed], [0, -1, 0, -1])
    with pytest.raises(
        Error, match="0: SortedExperts takes its rows sorted .* not from the forward of Sequential"
    ):
        tenant(nn.Sequential(SortedExperts()), {"0.weight": torch.zeros(2, 4, 4)})  # nothing around it to cut


class Reversed(nn.Module):
    """Called a norm, but its weight does not broadcast."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        return x * self.weight.flip(0)


class ReversedNorm(Reversed):
    pass


def test_only_a_norm_that_broadcasts_is_run_for_all_tenants_at_once():
    assert broadcasts(nn.LayerNorm(4)) and kind_of(nn.LayerNorm(4)) is NormForward
    assert not broadcasts(ReversedNorm()) and kind_of(ReversedNorm()) is SplitForward
    assert not broadcasts(Reversed()) and not broadcasts(nn.BatchNorm1d(4))
