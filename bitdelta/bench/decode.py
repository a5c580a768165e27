"""One decoding step of a batch: transformers' forward over a cache of random keys and values, greedy.

The cache is cut back after every step, so that all steps are alike. LoRA runs beside it: every row's own adapter, as
S-LoRA multiplies them, one gathered product over all tenants for A and one for B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import nn

from .. import ops

T: TypeAlias = torch.Tensor


class Decoder:
    """A model and a cache of `rows` rows; `step` gives each row's next token.

    Args:
        model: of transformers.
        rows: of the batch.
        context: tokens that are in the cache.
        seed: of keys, values and first tokens.
        forward: what runs the model; default: its own call.
    """

    def __init__(
        self, model: Any, rows: int, context: int, seed: int = 0, forward: Callable[..., Any] | None = None
    ) -> None:
        from transformers import DynamicCache

        config = model.config
        generator = torch.Generator().manual_seed(seed)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = rows, config.num_key_value_heads, context, width
        self.forward = forward or model
        known = signature(type(model).forward).parameters
        self.name = "cache" if "cache" in known else "past_key_values"  # before transformers 5.23
        self.cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            pair = (torch.randn(shape, generator=generator).to(model.dtype) for _ in "kv")
            self.cache.update(*pair, layer)
        self.tokens = torch.randint(3, config.vocab_size, (rows, 1), generator=generator)

    def step(self) -> T:
        """Tokens [rows, 1]; the cache is as it was."""
        logits: T = self.forward(self.tokens, use_cache=True, **{self.name: self.cache}).logits
        self.cache.crop(-1)
        return logits[:, -1:].argmax(-1)


def twin(model: Any) -> Any:
    """Another model of the same parameters, the tensors shared."""
    return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class LoraRows:
    """Random adapters of rank r on every linear of the layers, one a tenant, for rows in the order of the tenants.

        y[t] = W x[t] + B[t] (A[t] x[t])

    W x is made by this package's kernels: on processors without bf16 instructions PyTorch's are far slower for more
    than one row, which would say nothing about LoRA.
    """

    def __init__(self, model: Any, tenants: int, rank: int) -> None:
        self.model = model
        self.pairs: dict[str, tuple[T, T]] = {}
        generator = torch.Generator().manual_seed(rank)
        for path, module in _linears(model):
            n, k = module.weight.shape
            a, b = (torch.empty(tenants, *shape, dtype=model.dtype) for shape in ((rank, k), (n, rank)))
            for part in (a, b):
                part.random_(-128, 129, generator=generator).mul_(1 / 74 / part.shape[-1])
            self.pairs[path] = a, b

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for pair in self.pairs.values() for part in pair)

    @contextmanager
    def installed(self) -> Iterator[None]:
        changed = []
        for path, (a, b) in self.pairs.items():
            module = self.model.get_submodule(path)
            module.forward = _Gathered(module, a, b)
            changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                del module.forward


class PeftRows:
    """The same by PEFT: an adapter a tenant, and their names by row.

    PEFT gives a batch to each adapter in turn, and PyTorch makes the product with the base.
    """

    def __init__(self, model: Any, tenants: int, rank: int) -> None:
        import peft

        targets = sorted({path.rpartition(".")[2] for path, _ in _linears(model)})
        config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        self.names = [f"t{i}" for i in range(tenants)]
        self.base = model
        self.model = peft.get_peft_model(model, config, adapter_name=self.names[0]).eval()
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        self.model.to(model.dtype)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for name, part in self.model.named_parameters() if "lora_" in name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, adapter_names=self.names, **kwargs)


class _Gathered:
    def __init__(self, module: Any, a: T, b: T) -> None:
        self.module, self.a, self.b = module, a, b

    def __call__(self, x: T) -> T:
        rows = x.reshape(len(self.a), -1, x.shape[-1])  # [tenants, rows of each, K]
        low = torch.bmm(rows, self.a.transpose(1, 2))
        own = torch.bmm(low, self.b.transpose(1, 2)).reshape(*x.shape[:-1], -1)
        return base_product(self.module, x).add_(own)


def base_product(module: Any, x: T) -> T:
    """W x by this package's kernels."""
    return ops.linear(x, module.weight, module.bias, [], [-1] * (x.numel() // x.shape[-1]))


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in path:
            yield path, module
