"""Training of any parameters of a model to the fine-tune's logits: what the recipes that are compared with need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import training
from .pair import Pair


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def teacher(pair: Pair, batch: int = 8) -> torch.Tensor:
    """The fine-tune's logits of the calibration text, fp32 [rows, length, words]."""
    model = training.load(pair.finetuned).eval()
    with torch.no_grad():
        return torch.cat([logits_of(model, rows) for rows in torch.from_numpy(pair.calibration).split(batch)])


def train_to_logits(
    model: Any,
    parameters: Iterable[nn.Parameter],
    pair: Pair,
    wanted: torch.Tensor,
    steps: int,
    batch: int,
    rate: float,
    weight_decay: float = 0.01,
) -> list[float]:
    """AdamW with PyTorch's other defaults and a cosine down to 0, on the mean squared difference of all logits.

    Args:
        model: of transformers, in fp32.
        parameters: those that are trained.
        pair: its calibration text is trained on, its seed orders the rows.
        wanted: `teacher(pair)`.
        steps, batch: of so many rows.
        rate: the learning rate at the start.
        weight_decay: 0.01 is PyTorch's default.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=rate, weight_decay=weight_decay)
    tokens, curve = torch.from_numpy(pair.calibration), []
    for step, rows in zip(range(steps), _batches(len(tokens), batch, pair.seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = nn.functional.mse_loss(logits_of(model, tokens[rows]), wanted[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def _batches(n_rows: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Without end: every epoch in an order of its own."""
    rng, kept = np.random.default_rng(seed), np.empty(0, np.int64)
    while True:
        while len(kept) < batch:
            kept = np.concatenate([kept, rng.permutation(n_rows)])
        yield torch.from_numpy(kept[:batch])
        kept = kept[batch:]


def replace_linears(
    model: Any, make: Callable[[torch.Tensor, torch.Tensor], nn.Module], base: Any
) -> list[nn.Module]:
    """Puts make(base weight, fine-tune's weight) in the place of every linear of the fine-tune's transformer layers.

    Args:
        model: the fine-tune, in fp32; changed.
        make: of two weights [N, K].
        base: the base, in fp32.

    Returns:
        What was put in.
    """
    made = []
    for name, module in list(model.get_decoder().layers.named_modules()):
        if isinstance(module, nn.Linear):
            before = base.get_decoder().layers.get_submodule(name).weight.data
            made.append(make(before, module.weight.data))
            model.get_decoder().layers.set_submodule(name, made[-1])
    return made
