"""Runs a table of the paper (paper.py) for those who have its models: `bitdelta study paper --table N`.

    row -> its model: base, fine-tune, or base + delta (compress, distill as in the paper's section 3.1)
        -> own scores against the fine-tune on the text, and lm_eval's on the table's tasks

One model is in memory at a time. Embeddings and the head stay the fine-tune's, as in the paper.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..checkpoint import open_checkpoint
from ..errors import Error
from ..table import table as lines_of
from ..training import Log, libraries, silent
from .paper import ADJUSTED, BATCH, JUDGED, LENGTH, STEPS, TABLES, TASKS, TEXT, Row, Table, Task

WHOLE = ("*embed_tokens*", "*lm_head*", "*wte*", "*embed_out*")
OWN = ("perplexity", "logit_mse", "top1")
N_TOKENS = 16384  # of the own scores


def run(
    number: int | None,
    base: str | None = None,
    finetuned: str | None = None,
    text: Any = None,
    steps: int = STEPS,
    use_lm_eval: bool = True,
    tasks: Mapping[str, Task] = TASKS,
    task_folder: Path | None = None,
    dry_run: bool = False,
    log: Log = silent,
) -> dict[str, Any]:
    """Measures the rows of a table.

    Args:
        number: of the table.
        base, finetuned: instead of the paper's models, in every row; folders or Hub ids.
        text: to distill and to measure on; None: C4, as in the paper.
        steps: of a distillation.
        use_lm_eval: False: only the package's own scores.
        tasks: by the name that the table has for each.
        task_folder: with task files of lm_eval; no others are looked up then.
        dry_run: the plan alone; nothing is loaded.

    Returns:
        A dict that JSON can hold: `rows` with `reported` and `measured`, and the `plan`.

    Raises:
        ValueError: no such table.
        bitdelta.Error: models, lm_eval or PyTorch are missing; the text names what.
    """
    start = time.perf_counter()
    chosen = _table(number, base, finetuned)
    report: dict[str, Any] = {
        "study": "paper",
        "table": number,
        "title": chosen.title,
        "note": chosen.note,
        "rows": [asdict(row) for row in chosen.rows],
        "plan": list(_plan(chosen, text, steps, use_lm_eval, tasks)),
        "dry_run": dry_run,
    }
    if dry_run:
        return report
    libraries("study paper")
    text = TEXT if text is None else text
    folders = _resolve(chosen)
    evaluators: list[Callable[[Any, Any], dict[str, float]]] = []
    wanted = {name: tasks[name] for name in chosen.tasks if name in tasks} if use_lm_eval else {}
    if wanted:
        evaluators.append(_lm_eval(wanted, task_folder))
    for i, row in enumerate(chosen.rows):
        log(f"table {number}: {row.label}")
        with tempfile.TemporaryDirectory(prefix="bitdelta-paper-") as scratch:
            harness = _Harness(row, folders, text, steps, Path(scratch))
            report["rows"][i]["measured"] = (
                harness.size() if row.method == "size" else harness.score(evaluators)
            )
    return {**report, "seconds": round(time.perf_counter() - start, 1)}


def _table(number: int | None, base: str | None, finetuned: str | None) -> Table:
    if number not in TABLES:
        known = ", ".join(map(str, TABLES))
        raise ValueError(
            f"table: expected one of {known} (3 continues 2, 4 is an answer in words), got {number}"
        )
    chosen = TABLES[number]
    return replace(chosen, rows=tuple(_with_models(row, base, finetuned) for row in chosen.rows))


def _with_models(row: Row, base: str | None, finetuned: str | None) -> Row:
    to_itself = row.base == row.finetuned
    after = finetuned or row.finetuned
    return replace(row, base=after if to_itself else base or row.base, finetuned=after)


def _plan(
    chosen: Table, text: Any, steps: int, use_lm_eval: bool, tasks: Mapping[str, Task]
) -> Iterator[str]:
    models = dict.fromkeys(name for row in chosen.rows for name in (row.base, row.finetuned))
    yield f"models: {', '.join(name or 'one that --finetuned names' for name in models)}"
    for row in chosen.rows:
        yield f"{row.label}: {_method(row, steps)}"
    if any(row.method != "size" for row in chosen.rows):
        yield f"own scores: {', '.join(OWN)} against the fine-tune, on {N_TOKENS:,} tokens of {text or TEXT}"
    for name in chosen.tasks if use_lm_eval else ():
        task = tasks.get(name)
        if task is not None:
            fixed = f", of which lm_eval's task has {task.runs}" if task.runs is not None else ""
            yield f"lm_eval: {name} as {task.name}, {task.shots} shots{fixed}, {task.metric}"
    if chosen.tasks:
        yield JUDGED


def _method(row: Row, steps: int) -> str:
    of = f"of {row.finetuned or 'the fine-tune'} over {row.base}"
    over = f"{of}{f' in {row.quantized}' if row.quantized else ''}"
    if row.method in ("base", "finetuned"):
        return f"{row.base if row.method == 'base' else row.finetuned or 'the fine-tune'}{_quantizer(row)}"
    if row.method == "svd":
        return f"{row.rank} largest singular values of every linear's change, {of}"
    if row.method == "size":
        return f"sizes of a delta {of}"
    packed = f"{row.planes} plane{'s' * (row.planes > 1)} {over}"
    return (
        packed
        if row.method == "initial"
        else f"{packed}, distilled {steps} steps of {BATCH} x {LENGTH} tokens"
    )


def _quantizer(row: Row) -> str:
    return f", quantised by {row.quantized}" if row.quantized else ""


def _resolve(chosen: Table) -> dict[str, Path]:
    """Model -> folder; one error for all that are missing."""
    from ..hub import resolve

    found, missing = {}, []
    for name in dict.fromkeys(name for row in chosen.rows for name in (row.base, row.finetuned)):
        try:
            if not name:
                raise Error("the paper does not publish its fine-tune")
            found[name] = resolve(name).root
        except Error as error:
            missing.append(str(error))
    quantizers = {row.quantized for row in chosen.rows}
    if "GPTQ" in quantizers and importlib.util.find_spec("gptqmodel") is None:
        missing.append("the package gptqmodel is not installed: pip install gptqmodel")
    if missing:
        raise Error(
            f"study paper: missing: {'; '.join(missing)}. Name folders with --base and --finetuned; --dry-run shows "
            "the plan"
        )
    return found


class _Harness:
    """Makes one row's model in a scratch folder and measures it."""

    def __init__(self, row: Row, folders: Mapping[str, Path], text: Any, steps: int, scratch: Path) -> None:
        self.row, self.text, self.steps, self.scratch = row, text, steps, scratch
        self.base, self.finetuned = folders[row.base], folders[row.finetuned]
        self.found: dict[str, float] = {}

    def size(self) -> dict[str, float]:
        """Of the fine-tune's and the delta's files, both in 10^9 bytes."""
        from ..compress import compress

        report = compress(
            self.base, self.finetuned, self.scratch / "delta", scale="tensor", whole=_whole(self.finetuned)
        )
        return {
            "GB": report["finetuned_bytes"] / 1e9,
            "delta GB": report["bytes"] / 1e9,
            "factor": report["factor"],
        }

    def score(self, evaluators: list[Callable[[Any, Any], dict[str, float]]]) -> dict[str, float]:
        from ..evaluate import evaluate
        from ..merged_model import load_model

        folder, delta = self.model()
        deltas = {} if delta is None else {"delta": delta}
        report = evaluate(folder, deltas, self.finetuned, self.text, N_TOKENS, LENGTH)
        scores = report["tenants"]["delta" if deltas else "base"]
        self.found |= {name: scores[name] for name in OWN if scores.get(name) is not None}
        if evaluators:
            model, tokenizer = load_model(folder, delta)
            for measure in evaluators:
                self.found |= measure(model, tokenizer)
        return self.found

    def model(self) -> tuple[Path, Path | None]:
        """A checkpoint, and a delta over it."""
        row = self.row
        if row.method == "base":
            return self.base, None
        if row.method == "finetuned":
            return self._quantized(self.finetuned), None
        if row.method == "svd":
            return self._truncated(), None
        return self._delta(self._quantized(self.base))

    def _delta(self, base: Path) -> tuple[Path, Path]:
        from ..compress import compress
        from ..distill import distill

        plain = self.scratch / "plain"
        compress(base, self.finetuned, plain, self.row.planes, "tensor", _whole(self.finetuned))
        if self.row.method == "initial":
            return base, plain
        out = self.scratch / "distilled"
        report = distill(base, self.finetuned, plain, self.text, out, self.steps, BATCH, LENGTH)
        self.found["distillation loss"] = report["loss_after"]
        return base, out

    def _quantized(self, source: Path) -> Path:
        if not self.row.quantized:
            return source
        from ..text import load_tokens
        from ..training import load_tokenizer
        from .quantize import quantize

        tokens = load_tokens(self.text, load_tokenizer(self.finetuned), N_TOKENS, LENGTH)
        return quantize(source, self.row.quantized, tokens, self.scratch / "quantized")

    def _truncated(self) -> Path:
        """The fine-tune with the change of every linear cut to its largest singular values."""
        import torch

        from .. import training
        from .quantize import linears, save

        model, base = training.load(self.finetuned), dict(linears(training.load(self.base)))
        with torch.no_grad():
            for name, module in linears(model):
                before = base[name].weight
                u, s, v = torch.linalg.svd(module.weight - before, full_matrices=False)
                rank = self.row.rank
                module.weight.copy_(before + (u[:, :rank] * s[:rank]) @ v[:rank])
        return save(model, self.finetuned, self.scratch / "truncated")


def _whole(finetuned: Path) -> list[str]:
    """Those of WHOLE that the model has."""
    names = list(open_checkpoint(finetuned))
    return [pattern for pattern in WHOLE if any(fnmatchcase(name, pattern) for name in names)]


def _lm_eval(tasks: Mapping[str, Task], folder: Path | None) -> Callable[[Any, Any], dict[str, float]]:
    """What scores a model on the tasks, in percent."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Error(
            f"study paper: lm_eval is missing ({error}): pip install 'lm_eval[hf]', or --no-lm-eval for the own scores "
            "alone"
        ) from error
    manager = TaskManager(
        include_path=None if folder is None else str(folder), include_defaults=folder is None
    )

    def measure(model: Any, tokenizer: Any) -> dict[str, float]:
        found, wrapped = {}, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        for name, task in tasks.items():
            shots = task.shots if task.runs is None else task.runs
            try:
                result = lm_eval.simple_evaluate(
                    model=wrapped,
                    tasks=[task.name],
                    num_fewshot=shots,
                    task_manager=manager,
                    bootstrap_iters=0,
                )
            except Exception as error:  # lm_eval's, datasets' and the network's own
                reason = " ".join(str(error).split())[:200]
                raise Error(f"lm_eval: {task.name}: {type(error).__name__}: {reason}") from error
            values = {**result["results"], **(result.get("groups") or {})}[task.name]
            chosen = next(value for key, value in values.items() if key.split(",")[0] == task.metric)
            found[name] = 100.0 * chosen
        if all(name in found for name in ADJUSTED):
            found["adjusted average"] = sum(found[name] for name in ADJUSTED) / len(ADJUSTED)
        return found

    return measure


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The table as lines of text: what was measured, and in brackets what the paper reports."""
    rows = report["rows"]
    names = dict.fromkeys(
        name for part in ("reported", "measured") for row in rows for name in row.get(part, {})
    )
    cells = [
        [
            row["label"],
            *(_cell(row.get("measured", {}).get(name), row["reported"].get(name)) for name in names),
        ]
        for row in rows
    ]
    title = f"table {report['table']}: {report['title']}; measured (the paper's)"
    yield from lines_of(("", *(f">{name.replace('_', ' ')}" for name in names)), cells, title)
    yield ""
    if report["note"]:
        yield report["note"]
    yield from report["plan"]


def _cell(measured: float | None, reported: float | None) -> str:
    return " ".join(
        [
            *([] if measured is None else [f"{measured:.4g}"]),
            *([] if reported is None else [f"({reported:g})"]),
        ]
    )
