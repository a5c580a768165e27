"""Experts and routers of a mixture: rows of many tenants at once, no weight expanded, the same as cut by tenant."""

import numpy as np
import pytest
import torch
import transformers
from models import make, merged
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

from bitdelta import extract
from bitdelta.batch import Batch, current
from bitdelta.change import Packed, Stack, Whole
from bitdelta.delta import Delta
from bitdelta.experts_forward import ExpertsForward, RouterForward, RowWeight, has_stacks, is_router
from bitdelta.model import DeltaModel
from bitdelta.modules import install, kind_of
from bitdelta.tenant import Tenant

CONFIG = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas_of(weight, seed):
    return [extract(w, w + 0.3 * random(*w.shape, seed=seed + i)) for i, w in enumerate(weight)]


def tenant(model, changes):
    for path in {name.rpartition(".")[0] for name in changes}:
        list(install(model, path))
    by_module = {}
    for name, change in changes.items():
        path, _, leaf = name.rpartition(".")
        by_module.setdefault(path, {})[leaf] = change
    return Tenant("t", "delta", changes, None, by_module=by_module)


def run(tenants, ids, call):
    token = current.set(Batch(tenants, np.array(ids)))
    try:
        with torch.no_grad():
            return call()
    finally:
        current.reset(token)


class Block(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        config = transformers.MixtralConfig(**CONFIG, experts_implementation="eager")
        self.gate, self.experts = MixtralTopKRouter(config), MixtralExperts(config)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = random(*parameter.shape, seed=i) / 4
        self.to(dtype)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        _, weights, chosen = self.gate(flat)
        return self.experts(flat, chosen, weights).reshape(x.shape)


def changed(block, seed, whole=()):
    """A packed (or whole) change of every parameter."""
    found = {}
    for i, (name, parameter) in enumerate(block.named_parameters()):
        weight = parameter.detach().float()
        if name in whole:
            found[name] = Whole(weight + 0.3 * random(*weight.shape, seed=seed + 50 + i))
        elif weight.ndim == 3:
            found[name] = Stack.of(deltas_of(weight, seed + 10 * i))
        else:
            found[name] = Packed(deltas_of([weight], seed)[0])
    return found


def expanded(block, changes):
    copy = Block(next(block.parameters()).dtype)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(changes[name].expand(parameter))
    return copy


@pytest.mark.parametrize("length", [1, 3, 40])  # 40: more rows than our kernels stream the base for
def test_rows_of_experts_and_router_are_those_of_expanded_weights(length):
    block = Block()
    own = [changed(block, 100), changed(block, 200, whole=("experts.down_proj",))]
    x = random(5, length, 32, seed=9)
    with torch.no_grad():
        wanted = [expanded(block, changes)(x) for changes in own] + [Block()(x)]
    tenants = [tenant(block, changes) for changes in own]
    ids = [0, -1, 1, 0, 1]
    found = run(tenants, ids, lambda: block(x))
    for row, who in enumerate(ids):
        assert (found[row] - wanted[who][row]).abs().max() <= 1e-3 * wanted[who][row].abs().max()
    assert torch.equal(block(x), wanted[2])
    alone = run(tenants[:1], [0] * 5, lambda: block(x))
    assert (alone - wanted[0]).abs().max() <= 1e-3 * wanted[0].abs().max()


def test_parts_of_a_matrix_change_on_their_own():
    weight = random(2, 24, 32)
    first, second = deltas_of(weight[:, :8], 1), deltas_of(weight[:, 8:], 5)
    stack = Stack(((0, 8), (8, 24)), ((Packed(first[0]), None), (None, Packed(second[1]))), 32)
    assert stack.shape == (2, 24, 32) and stack.nbytes == first[0].nbytes + second[1].nbytes
    wide = stack.expand(weight)
    assert torch.equal(wide[0, 8:], weight[0, 8:]) and torch.equal(wide[1, :8], weight[1, :8])
    assert torch.equal(wide[0, :8], first[0].expand(weight[0, :8].contiguous()))
    assert torch.equal(wide[1, 8:], second[1].expand(weight[1, 8:].contiguous()))


@torch.no_grad()
def test_a_mixture_runs_without_expanding_a_weight(tmp_path, monkeypatch):
    cls = transformers.MixtralForCausalLM
    make(tmp_path, transformers.MixtralConfig(**CONFIG), cls, tenants=2)
    model = DeltaModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for i in range(2):
        model.load_delta(f"t{i}", tmp_path / f"delta-{i}")
    change = next(iter(model.pool.resident)).changes["model.layers.0.mlp.experts.gate_up_proj"]
    assert change.bounds == ((0, 48), (48, 96)) and len(change.parts) == 4
    ids = torch.randint(3, 96, (3, 6), generator=torch.Generator().manual_seed(1))
    plain = [merged(tmp_path, i, cls)(ids[row : row + 1]).logits[0] for row, i in enumerate([0, None, 1])]

    def refuse(*args, **kwargs):
        raise AssertionError("a weight was expanded")

    monkeypatch.setattr(Delta, "expand", refuse)
    for rows, names in (([0, 1, 2], ["t0", None, "t1"]), ([0], ["t0"])):
        logits = model(ids[rows], delta_names=names).logits
        for row, found in zip(rows, logits, strict=True):
            assert (found - plain[row]).abs().max() <= 1e-3 * plain[row].abs().max()


def test_rows_get_the_gradients_of_expanded_weights():
    block = Block().requires_grad_(False)
    changes = changed(block, 100)
    wanted = expanded(block, changes).requires_grad_(False)
    x = random(3, 2, 32, seed=4)
    alone, mixed = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted(alone).square().sum().backward()
    token = current.set(Batch([tenant(block, changes)], np.array([0, -1, 0])))
    try:
        block(mixed).square().sum().backward()
    finally:
        current.reset(token)
    for row in (0, 2):
        assert (mixed.grad[row] - alone.grad[row]).abs().max() <= 3e-3 * alone.grad[row].abs().max()


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(random(6, 32)), nn.Parameter(random(6, seed=1))

    def forward(self, x):
        return nn.functional.linear(x.float(), self.weight.to(torch.float32), self.bias).softmax(-1)


class Normalised(nn.Module):
    """Uses the values of its weight besides the product."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random(6, 32))

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm())


def test_only_modules_that_multiply_by_their_matrix_run_as_routers():
    block = Block()
    assert has_stacks(block.experts) and kind_of(block.experts) is ExpertsForward
    assert is_router(block.gate) and kind_of(block.gate) is RouterForward and is_router(Biased())
    assert (
        not is_router(Normalised()) and not is_router(nn.Embedding(6, 32)) and not has_stacks(nn.Linear(2, 2))
    )
    weight = RowWeight.of(random(6, 32), lambda x, bias: x)
    assert weight.shape == (6, 32) and weight.to(torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="of a weight that differs by row"):
        torch.add(weight, 1)


def test_a_router_adds_what_changed_of_its_bias():
    model = nn.Sequential(Biased())
    delta = deltas_of([model[0].weight.detach()], 3)[0]
    changes = {"0.weight": Packed(delta), "0.bias": Whole(random(6, seed=8))}
    other = nn.Sequential(Biased())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(changes[name].expand(parameter))
    x = random(4, 32, seed=5)
    with torch.no_grad():
        wanted = [other(x), model(x)]
    found = run([tenant(model, changes)], [0, -1, 0, -1], lambda: model(x))
    for row, who in enumerate([0, 1, 0, 1]):
        assert torch.allclose(found[row], wanted[who][row], atol=1e-4)
