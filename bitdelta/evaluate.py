"""How near the compressed fine-tunes are to the fine-tunes, on text.

    perplexity   exp(mean of -log p(next token)); of causal models, and of encoder-decoders that reconstruct the text
    logit_mse    mean over positions and words of (teacher - student)^2: the loss of BitDelta's distillation
    kl           mean over positions of KL(teacher || student), in nats
    top1         share of positions where both have the same likeliest word
    recovered    1 - logit_mse / logit_mse of the base: how much of the fine-tune's change the delta brought back
    hidden_mse   instead of these, for models without logits: of the last hidden states

The teacher is the fine-tune, the student base + delta (or the base). Every model is in memory alone: the teacher's
answers wait on the disk. Vocabularies of two sizes are compared on the words that both have.
"""

from __future__ import annotations

import math
import operator
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .answers import Sample, Teacher, answers, record
from .devices import torch_device
from .errors import whole_number
from .merged_model import check_dtype, load_model
from .progress import progress_bar
from .refusals import Refusals, refusals_of
from .requirement import METRICS
from .table import table
from .text import load_rows, refuse_unknown

Source: TypeAlias = str | os.PathLike[str]


@dataclass
class Tenant:
    """One delta to evaluate, and the fine-tune that it stands for, if that is there."""

    name: str
    delta: Source | None
    finetuned: Source | None
    scores: dict[str, Any] = field(default_factory=dict)


def evaluate(
    base: Source,
    deltas: Mapping[str, Source] | Sequence[Source] = (),
    finetuned: Mapping[str, Source] | Source | None = None,
    text: Any = None,
    n_tokens: int = 16384,
    length: int = 128,
    batch_size: int = 4,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    refusals: Source | None = None,
    max_new_tokens: int = 48,
    progress: bool = False,
) -> dict[str, Any]:
    """Measures base + delta, for every delta alone, against its fine-tune.

    Args:
        base: the base's checkpoint, a folder or Hub id.
        deltas: packed deltas, by name or with their folder's name; none: the base is measured.
        finetuned: the fine-tune, or one by each delta's name; None: perplexities only.
        text: a text or jsonl file, a dataset's name, tokens [rows, length], or None: the text built in (text.py).
        n_tokens, length, seed: how much of it, in rows of `length`.
        batch_size: rows at a time.
        dtype: of the parameters; "float32" leaves differences to the weights alone.
        device: where models run, as "cuda".
        refusals: a file of prompts, to compare what is refused before and after compression (refusals.py).
        max_new_tokens: of an answer to those.
        progress: a progress bar on stderr.

    Returns:
        A dict that JSON can hold: `tenants`: name -> the metrics above, with those of `base` and `finetuned`; what
        cannot be measured, or is not finite, is None.

    Raises:
        bitdelta.BaseMismatchError: the delta of another base.
        ValueError, bitdelta.Error, OSError: wrong arguments, text or folders.
    """
    start = time.perf_counter()
    batch_size = whole_number(batch_size, "batch_size", 1, 1 << 20)
    length = whole_number(length, "length", 2, 1 << 24)
    n_rows = max(1, whole_number(n_tokens, "n_tokens", 1, 1 << 40) // length)
    check_dtype(dtype)
    device = str(torch_device(device))
    tenants = _tenants(base, deltas, finetuned)
    prompts = None if refusals is None else Refusals(refusals, max_new_tokens)
    run = Run(base, batch_size, dtype, device, prompts, progress_bar("eval", None, progress, "row"))
    with run.bar:
        for group in _groups(tenants):
            _measure(run, group, lambda tokenizer: Sample(*load_rows(text, tokenizer, n_rows, length, seed)))
    return {
        "base": os.fspath(base),
        "text": "the text built in"
        if text is None
        else str(text)
        if isinstance(text, (str, os.PathLike))
        else "tokens",
        "length": length,
        "tenants": {tenant.name: tenant.scores for tenant in tenants},
        "seconds": round(time.perf_counter() - start, 1),
    }


@dataclass
class Run:
    """What the models of one evaluation share."""

    base: Source
    batch_size: int
    dtype: str
    device: str
    prompts: Refusals | None
    bar: Any


def _tenants(
    base: Source,
    deltas: Mapping[str, Source] | Sequence[Source],
    finetuned: Mapping[str, Source] | Source | None,
) -> list[Tenant]:
    if isinstance(deltas, (str, os.PathLike)):
        deltas = [deltas]
    if not isinstance(deltas, Mapping | Sequence):
        raise TypeError(f"deltas: expected packed deltas, by name or in a list, got {type(deltas).__name__}")
    if not isinstance(deltas, Mapping):
        names = [Path(os.fspath(path)).name for path in deltas]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"deltas: two are called {twice}; give them names")
        deltas = dict(zip(names, deltas, strict=True))
    if not isinstance(finetuned, Mapping):
        return [Tenant(name, path, finetuned) for name, path in deltas.items()] or [
            Tenant("base", None, finetuned)
        ]
    unknown = next((name for name in finetuned if name not in deltas), None)
    if unknown is not None:
        raise ValueError(
            f"finetuned: {unknown} is the name of no delta; there are {', '.join(deltas) or 'none'}"
        )
    return [Tenant(name, path, finetuned.get(name)) for name, path in deltas.items()]


def _groups(tenants: list[Tenant]) -> list[list[Tenant]]:
    """Tenants of one fine-tune together: it and the base are measured once for all of them."""
    groups: dict[Any, list[Tenant]] = {}
    for i, tenant in enumerate(tenants):
        groups.setdefault(i if tenant.finetuned is None else os.fspath(tenant.finetuned), []).append(tenant)
    return list(groups.values())


def _measure(run: Run, group: list[Tenant], sample_of: Callable[[Any], Sample]) -> None:
    """The scores of the group's fine-tune, of its deltas and of the base, one model in memory after another."""
    with tempfile.TemporaryDirectory(prefix="bitdelta-eval-") as folder:
        teacher = sample = refused = None
        of_finetuned: dict[str, Any] = {}
        if group[0].finetuned is not None:
            model, tokenizer = load_model(group[0].finetuned, None, run.dtype, run.device)
            sample = sample_of(tokenizer)
            refuse_unknown(sample.tokens, model)
            teacher = record(model, sample, Path(folder), run.batch_size, run.bar.update)
            of_finetuned = _scores(map(teacher, range(len(sample))), sample, None, _shift(model), True)
            refused = _refused(run, model, tokenizer, of_finetuned)
            del model
        of_base: dict[str, Any] = {}
        for tenant in (*group, Tenant("base", None, None, of_base)):
            model, tokenizer = load_model(run.base, tenant.delta, run.dtype, run.device)
            sample = sample_of(tokenizer) if sample is None else sample
            _score_student(run, model, tokenizer, sample, teacher, refused, tenant.scores)
            del model
            if tenant.delta is None:
                break
        for tenant in group:
            _complete(tenant, sample, of_finetuned, of_base)


def _score_student(
    run: Run,
    model: Any,
    tokenizer: Any,
    sample: Sample,
    teacher: Teacher | None,
    refused: list[bool] | None,
    scores: dict[str, Any],
) -> None:
    if int(sample.tokens.max()) >= _n_words(model):  # the base does not know the fine-tune's new words
        scores |= dict.fromkeys(METRICS[:4])
    else:
        scores |= score(model, sample, teacher, run.batch_size, run.bar.update)
    mine = _refused(run, model, tokenizer, scores)
    if refused is not None and mine is not None:
        scores["refusal_agreement"] = sum(map(operator.eq, mine, refused)) / len(mine)


def _complete(
    tenant: Tenant, sample: Sample | None, of_finetuned: dict[str, Any], of_base: dict[str, Any]
) -> None:
    scores = tenant.scores
    scores["tokens"] = 0 if sample is None else int(sample.mask.sum())
    if tenant.finetuned is not None:
        scores["finetuned"] = dict(of_finetuned)
    if tenant.delta is None:
        return
    scores["delta"], scores["base"] = os.fspath(tenant.delta), dict(of_base)
    left, whole = scores.get("logit_mse"), of_base.get("logit_mse")
    if left is not None and whole:
        scores["recovered"] = 1 - left / whole


def _refused(run: Run, model: Any, tokenizer: Any, scores: dict[str, Any]) -> list[bool] | None:
    if run.prompts is None:
        return None
    found = refusals_of(model, tokenizer, run.prompts)
    scores["refused"] = sum(found)
    scores["prompts"] = len(found)
    return found


def _n_words(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def score(
    model: Any,
    sample: Sample,
    teacher: Teacher | None = None,
    batch_size: int = 4,
    step: Callable[[int], object] = lambda n: None,
) -> dict[str, float | None]:
    """The metrics of one model; those that need a teacher only with one."""
    has_logits = model.base_model is not model or model.get_output_embeddings() is not None
    found = _answers(model, sample, batch_size, step)
    return _scores(found, sample, teacher, _shift(model), has_logits)


def _answers(
    model: Any, sample: Sample, batch_size: int, step: Callable[[int], object]
) -> Iterator[torch.Tensor]:
    for _, tokens, mask in sample.batches(batch_size):
        yield from answers(model, tokens, mask).float().cpu()
        step(len(tokens))


def _scores(
    found: Iterable[torch.Tensor],
    sample: Sample,
    teacher: Teacher | None,
    shift: int | None,
    has_logits: bool,
) -> dict[str, float | None]:
    """Of the answers to the sample's rows in order."""
    sums = dict.fromkeys(("nll", "predicted", "square", "values", "kl", "same", "positions"), 0.0)
    for i, logits in enumerate(found):
        row, kept = sample.tokens[i], sample.mask[i]
        if shift is not None:
            _add_prediction(sums, logits, row, kept, shift)
        if teacher is not None:
            _add_comparison(sums, logits, teacher(i), kept, has_logits)
    scores: dict[str, float | None] = {}
    if shift is not None:
        scores["perplexity"] = _exp(_ratio(sums["nll"], sums["predicted"]))
    if teacher is not None:
        scores["logit_mse" if has_logits else "hidden_mse"] = _ratio(sums["square"], sums["values"])
        if has_logits:
            scores |= {
                "kl": _ratio(sums["kl"], sums["positions"]),
                "top1": _ratio(sums["same"], sums["positions"]),
            }
    return scores


def _shift(model: Any) -> int | None:
    """How far ahead the token lies that a position predicts; None: the model predicts none."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return 0 if model.get_output_embeddings() is not None else None
    return 1 if "CausalLM" in name or "LMHead" in name else None


def _add_prediction(
    sums: dict[str, float], logits: torch.Tensor, row: torch.Tensor, kept: torch.Tensor, shift: int
) -> None:
    """logits [L, V], tokens row [L] and whether they are text, kept [L]."""
    end = len(row) - shift
    targets, used = row[shift:], kept[shift:] & kept[:end]
    if used.any():
        loss = torch.nn.functional.cross_entropy(logits[:end][used].double(), targets[used], reduction="sum")
        sums["nll"] += loss.item()
        sums["predicted"] += int(used.sum())


def _add_comparison(
    sums: dict[str, float], student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, has_logits: bool
) -> None:
    """[L, V] each, or [C] of a classifier."""
    if student.dim() == 1:
        student, teacher = student[None], teacher[None]
    else:
        student, teacher = student[kept], teacher[kept]
    words = min(student.shape[1], teacher.shape[1])
    student, teacher = student[:, :words].double(), teacher[:, :words].double()
    sums["square"] += (student - teacher).square().sum().item()
    sums["values"] += student.numel()
    sums["positions"] += len(student)
    if has_logits:
        expected, found = teacher.log_softmax(1), student.log_softmax(1)
        sums["kl"] += (expected.exp() * (expected - found)).sum().item()
        sums["same"] += int((student.argmax(1) == teacher.argmax(1)).sum())


def _ratio(total: float, count: float) -> float | None:
    return total / count if count and math.isfinite(total) else None


def _exp(value: float | None) -> float | None:
    return None if value is None or value > 700 else math.exp(value)


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    shown = [
        m for m in METRICS if any(m in row for t in report["tenants"].values() for row in _rows(t).values())
    ]
    if any("refused" in tenant for tenant in report["tenants"].values()):
        shown.append("refused")
    lines = []
    for name, tenant in report["tenants"].items():
        rows = [
            [label, *(_cell(row.get(metric)) for metric in shown)] for label, row in _rows(tenant).items()
        ]
        columns = ("", *(f">{metric.replace('_', ' ')}" for metric in shown))
        lines += [*table(columns, rows, f"{name}: {tenant['tokens']:,} tokens of {report['text']}"), ""]
    for result in report.get("required", []):
        verdict = "met" if result["met"] else "NOT MET"
        lines.append(
            f"{result['tenant']}: {result['condition']} {verdict}: {_cell(result['value']) or 'no value'}"
        )
    return lines


def _rows(tenant: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {str(label): tenant[label] for label in ("base", "finetuned") if label in tenant}
    rows["base + delta" if "delta" in tenant else "base"] = tenant
    return rows


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
