"""In how many directions the inputs of a model's linears have their power: what room error feedback has.

    C = X^T X / rows of one linear's inputs, eigenvalues e    K of them
    even       (sum e)^2 / (K sum e^2): 1 where all directions are alike, 1 / K where all the power is in one
    most       the share of the K directions that hold 95 % of the power

An error in a direction without power changes no output. So where few directions have power, signs can be chosen so
that their errors fall into the others; where all are alike, no choice is better than the nearest sign.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import training
from .pair import Pair
from .quantize import linears

MOST = 0.95
BATCH = 8  # rows at a time


def directions(pair: Pair) -> dict[str, float]:
    """`even` and `most`, the mean over the fine-tune's linears, on the calibration text."""
    model = training.load(pair.finetuned).eval()
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            x = inputs[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + (x.T @ x).double()

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears(model)]
    with torch.inference_mode():
        for rows in torch.from_numpy(pair.calibration).split(BATCH):
            model(input_ids=rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = [spread(total) for total in sums.values()]
    return {name: sum(one[name] for one in found) / len(found) for name in ("even", "most")}


def spread(covariance: torch.Tensor) -> dict[str, float]:
    """`even` and `most` of a symmetric positive matrix [K, K]."""
    values = torch.linalg.eigvalsh(covariance.double()).clamp(min=0).flip(0)
    power, k = float(values.sum()), len(values)
    n_most = int((values.cumsum(0) < MOST * power).sum()) + 1
    return {"even": power**2 / (k * float(values.square().sum())), "most": n_most / k}
