"""How near a compressed model is to the fine-tune, on code and on prose that nothing has seen.

    logit_mse    mean over positions and words of (fine-tune - compressed)^2
    perplexity   of the next token
    top1         share of positions where both have the same likeliest word
    recovered    (loss of the base - loss) / (loss of the base - loss of the fine-tune), loss = log perplexity: 0 is the
                 base and 1 the fine-tune; on prose the fine-tune's loss is the larger one

Base and deltas compute in fp32, as base product plus planes: nothing is rounded as merging would round it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import training
from ..answers import Sample, Teacher, answers
from ..checkpoint import open_checkpoint
from ..evaluate import score
from ..packfile import load
from ..student import load_student
from .pair import Pair

Scores = dict[str, dict[str, float]]  # text -> metric -> value
BATCH = 8  # rows at a time


class Measure:
    """The fine-tune's answers to both texts, and the losses of base and fine-tune: computed once for a pair."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._samples = {
            text: Sample(tokens, np.ones(tokens.shape, bool)) for text, tokens in pair.measured.items()
        }
        model = training.load(pair.finetuned).eval()
        self._teachers = {text: _teacher(model, sample) for text, sample in self._samples.items()}
        self._losses: dict[str, tuple[float, float]] = {}
        self.finetuned = self._scores(model)
        self.base = self._scores(training.load(pair.base).eval())
        for text in self._samples:
            ends = self.base[text]["perplexity"], self.finetuned[text]["perplexity"]
            self._losses[text] = math.log(ends[0]), math.log(ends[1])
        for scores in (self.base, self.finetuned):
            self._recovered(scores)

    def delta(self, folder: Path, base: Path | None = None) -> Scores:
        """Of base + a packed delta; `base` where that is not the pair's."""
        return self.model(load_student(open_checkpoint(base or self.pair.base), load(folder)).model)

    def model(self, model: Any) -> Scores:
        """Of a model with the pair's vocabulary."""
        return self._recovered(self._scores(model.eval()))

    def _scores(self, model: Any) -> Scores:
        found: Scores = {}
        for text, sample in self._samples.items():
            scores = score(model, sample, self._teachers[text], BATCH)
            found[text] = {name: math.nan if value is None else value for name, value in scores.items()}
        return found

    def _recovered(self, scores: Scores) -> Scores:
        for text, (base, finetuned) in self._losses.items():
            scores[text]["recovered"] = (base - math.log(scores[text]["perplexity"])) / (base - finetuned)
        return scores


def _teacher(model: Any, sample: Sample) -> Teacher:
    """These few logits fit in memory: fp32 [rows, length, words]."""
    parts = [answers(model, tokens, mask).float() for _, tokens, mask in sample.batches(BATCH)]
    return Teacher(torch.cat(parts).numpy(), None)
