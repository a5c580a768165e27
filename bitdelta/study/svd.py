"""Singular vectors of the delta in as many bytes as its signs: d ~ B A, of rank r, before and after distillation.

    r = floor((N K / 8 + 4 N) / (2 (N + K)))     factors of two bytes against signs and fp32 row scales

Distilling trains both factors, at the better of two learning rates, by the held-out loss on code. They are kept in
fp32, to their advantage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import training
from .gradient import replace_linears, train_to_logits
from .measure import Scores
from .pair import Pair
from .trial import BATCH, Trial

TITLE = "SVD of equal bytes against 1 bit"
RATES = (3e-4, 1e-3)


class LowRankLinear(nn.Module):  # type: ignore[misc] # torch is Any where it is not installed
    """x W^T + (x A^T) B^T, A [r, K] and B [N, r] from the singular vectors of the difference of two weights [N, K]."""

    def __init__(self, weight: torch.Tensor, finetuned: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        rank = equal_rank(*weight.shape)
        left, size, right = torch.linalg.svd(finetuned - weight, full_matrices=False)
        root = size[:rank].sqrt()
        self.B = nn.Parameter(left[:, :rank] * root)
        self.A = nn.Parameter(root[:, None] * right[:rank])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        return nn.functional.linear(x, self.weight) + low


def equal_rank(n: int, k: int) -> int:
    """Of [n, k]: the largest rank whose factors take no more bytes than a plane of signs with row scales."""
    return max(1, (n * k // 8 + 4 * n) // (2 * (n + k)))


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    yield "base", trial.measure.base
    yield "fine-tune", trial.measure.finetuned
    yield "SVD, initial", trial.measure.model(low_rank(trial.pair)[0])
    yield "SVD, distilled", distilled(trial)
    for scale in ("tensor", "row"):
        plain = trial.plain(1, scale)
        yield f"1 bit {scale}, initial", trial.score(plain)
        yield f"1 bit {scale}, distilled", trial.score(trial.distilled(plain))
    yield "1 bit row, fitted", trial.score(trial.fitted())


def low_rank(pair: Pair) -> tuple[Any, list[nn.Module]]:
    """The fine-tune with low ranks in place of its linears' deltas, and these linears."""
    model = training.load(pair.finetuned).eval()
    return model, replace_linears(model, LowRankLinear, training.load(pair.base))


def distilled(trial: Trial) -> Scores:
    found = []
    for rate in RATES:
        model, linears = low_rank(trial.pair)
        factors = [part for linear in linears for part in linear.parameters()]
        train_to_logits(model, factors, trial.pair, trial.teacher, trial.steps, BATCH, rate, weight_decay=0.0)
        found.append(trial.measure.model(model))
    return min(found, key=lambda scores: scores["code"]["logit_mse"])
