"""A fine-tune by direct preference optimisation (DPO, Rafailov et al., arXiv 2305.18290): trained on code, then on
preferences between answers, as Zephyr, one of the paper's models.

    loss    -log sigmoid(beta (log p(chosen) - log p(rejected) - the same of the model before))
    pairs   synthetic: the prompt is a window of prose, `rejected` the prose that follows, `chosen` some code instead

Instead of the loss, which such training does not lower, on held-out pairs: how often the model prefers the chosen
answer, by which margin of log p, and which share of the fine-tune's margin over the base's a delta brings back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .. import training
from ..checkpoint import open_checkpoint
from ..packfile import load
from ..student import load_student
from ..training import Log
from .ladder import COLUMNS as USUAL
from .ladder import ladder
from .measure import Scores
from .pair import FULL, HELD_OUT, Size, Tune, make_pair
from .table import Column
from .trial import Trial

Tensor: TypeAlias = torch.Tensor
TITLE = "DPO fine-tune at 1 bit"
COLUMNS: tuple[Column, ...] = (
    *USUAL[:3],
    ("prefers chosen %", "preference", "accuracy", 100.0),
    ("margin", "preference", "margin", 1.0),
    ("margin recovered %", "preference", "recovered", 100.0),
)
BETA = 0.1  # of the paper's summaries and dialogues
SLOWER = 5  # the rate of the fine-tune, divided
MEASURED = 256  # pairs


def _prefer(model: Any, tokenizer: Any, size: Size, seed: int, log: Log, folder: Path) -> Any:
    """On code as any full fine-tune; then as many steps on preferences."""
    model = FULL.run(model, tokenizer, size, seed, log, folder)
    texts = training.prose(), training.code()
    prose, code = (_tokens(tokenizer, training.kept(text, HELD_OUT)) for text in texts)
    before = copy.deepcopy(model).eval()
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.finetune_rate / SLOWER, weight_decay=0.0)
    with training.seeded(seed + 2000):
        for step in range(size.finetune_steps):
            chosen, rejected = sample(prose, code, size.batch, size.length)
            with torch.no_grad():
                reference = margins(before, chosen, rejected)
            loss = dpo_loss(margins(model, chosen, rejected), reference)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % max(1, size.finetune_steps // 5) == 0:
                log(f"training DPO: step {step + 1} of {size.finetune_steps}, loss {loss.item():.3f}")
    return model


TUNE = Tune("dpo", ["code instead of prose", BETA, SLOWER], _prefer)


def dpo_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """Of margins log p(chosen) - log p(rejected), [n] each."""
    return -torch.nn.functional.logsigmoid(BETA * (policy - reference)).mean()


def margins(model: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
    """log p(chosen) - log p(rejected) of the second half of each row given the first, [n]; rows [n, length]."""
    rows = torch.cat([chosen, rejected])
    half = rows.shape[1] // 2
    logits = model(input_ids=rows, use_cache=False).logits[:, half - 1 : -1].float()
    found = logits.log_softmax(-1).gather(-1, rows[:, half:, None]).sum((1, 2))
    return found[: len(chosen)] - found[len(chosen) :]


def sample(prose: Tensor, code: Tensor, n: int, length: int) -> tuple[Tensor, Tensor]:
    """n pairs of rows [n, length], chosen and rejected, whose first half, of prose, is the same."""
    half = length // 2
    starts = torch.randint(0, len(prose) - length, (n,)).tolist()
    rejected = torch.stack([prose[at : at + length] for at in starts])
    starts = torch.randint(0, len(code) - half, (n,)).tolist()
    answers = torch.stack([code[at : at + length - half] for at in starts])
    return torch.cat([rejected[:, :half], answers], dim=1), rejected


def rows(trial: Trial) -> Iterator[tuple[str, Scores]]:
    """The usual ones, and the model before DPO."""
    preference = Preference(trial)
    pair = trial.pair
    for label, scores in ladder(trial, preference.delta):
        if label in ("base", "fine-tune"):
            scores = {**scores, "preference": getattr(preference, label.replace("-", "_"))}
        yield label, scores
        if label == "base":
            full = make_pair(pair.size, pair.seed, pair.base.parent, FULL, trial.log)
            yield "before DPO", preference.model(training.load(full.finetuned))


class Preference:
    """What a model prefers among held-out pairs, against base and fine-tune."""

    def __init__(self, trial: Trial) -> None:
        self.trial, pair = trial, trial.pair
        texts = training.prose(), training.code()
        prose, code = (_tokens(pair.tokenizer, training.held_out(text, HELD_OUT)) for text in texts)
        with training.seeded(pair.seed):
            self.pairs = sample(prose, code, MEASURED, pair.size.length)
        folders = pair.base, pair.finetuned
        base, fine_tune = (self._margins(training.load(folder).eval()) for folder in folders)
        self._ends = base.mean().item(), fine_tune.mean().item()
        self.base, self.fine_tune = self._scores(base), self._scores(fine_tune)

    def delta(self, folder: Path) -> Scores:
        """The usual scores, and these."""
        student = load_student(open_checkpoint(self.trial.pair.base), load(folder))
        return {**self.trial.score(folder), "preference": self._scores(self._margins(student.model))}

    def model(self, model: Any) -> Scores:
        scores = self.trial.measure.model(model)
        return {**scores, "preference": self._scores(self._margins(model))}

    def _margins(self, model: Any) -> Tensor:
        with torch.inference_mode():
            parts = zip(*(rows.split(16) for rows in self.pairs), strict=True)
            return torch.cat([margins(model, *part) for part in parts])

    def _scores(self, found: Tensor) -> dict[str, float]:
        mean, (base, fine_tune) = found.mean().item(), self._ends
        return {
            "accuracy": (found > 0).float().mean().item(),
            "margin": mean,
            "recovered": (mean - base) / (fine_tune - base),
        }


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])
