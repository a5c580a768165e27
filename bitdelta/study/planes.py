"""0 to 8 planes, row scales: each the sign of what those before left over, or all chosen together for the layer."""

from __future__ import annotations

from collections.abc import Iterator

from .. import training
from .gradient import replace_linears
from .measure import Scores
from .trial import Trial

TITLE = "planes: bits per weight of the linears"
PLANES = (1, 2, 3, 4, 5, 6, 7, 8)


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    yield "base", trial.measure.base
    yield "fine-tune", trial.measure.finetuned
    yield "0, linears of the base", no_planes(trial)
    for planes in PLANES:
        yield f"{planes}, one after the other", trial.score(trial.plain(planes))
        yield f"{planes}, fitted together", trial.score(trial.fitted(planes))


def no_planes(trial: Trial) -> Scores:
    """The fine-tune's embeddings and norms around the base's linears."""
    import torch

    def linear(before: torch.Tensor, after: torch.Tensor) -> torch.nn.Linear:
        made = torch.nn.Linear(before.shape[1], before.shape[0], bias=False)
        made.weight.data = before
        return made

    model = training.load(trial.pair.finetuned)
    replace_linears(model, linear, training.load(trial.pair.base))
    return trial.measure.model(model)
