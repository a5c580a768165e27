"""The recipe of the original project, written here after its description and what its code is known to do.

    y = x W^T + scale * (x S^T)     one scale a matrix, at first mean |d|; S = sign(d), +1 for 0

What `bitdelta.distill` does otherwise: every parameter of the compressed model is trained (embeddings, norms and head
with the scales), the planes' part of the gradient of x is dropped, scales are trained as they are, with AdamW's weight
decay, and no text is held out. 100 steps of 4 rows of 128 tokens, learning rate 1e-4 (BitDelta, arXiv 2402.10193, and
its repository's train.py). Here everything is fp32, where the original rounds to bf16, which does it no harm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import training
from .gradient import replace_linears, train_to_logits
from .pair import Pair

RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # the original's default first


class SignLinear(nn.Module):  # type: ignore[misc] # torch is Any where it is not installed
    """weight and sign fp32 [N, K]; the scale is trained."""

    def __init__(self, weight: torch.Tensor, finetuned: torch.Tensor) -> None:
        super().__init__()
        d = finetuned - weight
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("sign", torch.where(d < 0, -1.0, 1.0), persistent=False)
        self.scale = nn.Parameter(d.abs().mean())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        planes = nn.functional.linear(x.detach(), self.sign)  # the original's kernel has no gradient of x
        return nn.functional.linear(x, self.weight) + self.scale * planes


def compressed(pair: Pair) -> Any:
    """The fine-tune with its linears as signs and one scale each."""
    model = training.load(pair.finetuned).eval()
    replace_linears(model, SignLinear, training.load(pair.base))
    return model


def distilled(pair: Pair, wanted: torch.Tensor, rate: float, steps: int = 100, batch: int = 4) -> Any:
    """After the original's training; `wanted` as of `gradient.teacher`."""
    model = compressed(pair)
    train_to_logits(model, model.parameters(), pair, wanted, steps, batch, rate)
    return model
