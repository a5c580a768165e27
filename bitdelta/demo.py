"""The demonstration: a small base, three full fine-tunes, and what they cost and keep as one bit a weight.

    models (demo_models.py) -> compress, calibrate, distill -> perplexity, logit MSE -> one batch of all of them

The models are trained in a minute or two and kept in a cache; the rest takes about as long, and is done with the
functions that any model is packed, fitted and run with. Needs PyTorch and transformers, imported inside.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .demo_models import FULL, SMALL, TASKS, Settings, default_cache, models, texts_of
from .table import table
from .threads import default_count
from .training import Log, held_out, kept, libraries, load_tokenizer, seeded, silent

__all__ = ["TASKS", "Evaluation", "Settings", "default_cache", "describe", "models", "run", "small"]

PROMPTS = {
    "code": "    def __init__(self",
    "unicode": "U+0041 LATIN ",
    "shout": "THE VALUE OF ",
}
FORMS = {  # line of the table -> what it is
    "sign(d)": "one scale a matrix, mean |d|",
    "sign(d), distilled": "its scales trained: the paper's recipe, embeddings packed too",
    "fitted signs": "one scale a row, signs and scales fitted to text, without gradients",
    "fitted, distilled": "then the scales trained",
}
SAMPLE_WIDTH = 64  # characters of an answer in the table
ROW = 128  # tokens of a row that is measured
MOST_THREADS = 4  # the models are so small that more threads wait for each other


@dataclass(frozen=True)
class Evaluation:
    """How much text is fitted to, trained on and measured, and how long an answer is."""

    tokens: int = 8192
    calibration_tokens: int = 4096
    distill_steps: int = 40
    distill_length: int = 64
    sample_tokens: int = 48


def run(
    settings: Settings = FULL,
    evaluation: Evaluation = Evaluation(),
    cache: str | os.PathLike[str] | None = None,
    log: Log = silent,
) -> dict[str, Any]:
    """Trains (or finds in the cache), packs, fits, measures, and answers prompts in one batch.

    Args:
        settings: the models and their training.
        evaluation: what is fitted and measured.
        cache: the folder that keeps the models; default `default_cache()`.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold: `models`, and per fine-tune `rows`, one for each model: bytes, perplexity per
        held-out token, mean squared error of the logits, and `recovered`, the share of the loss between base and
        fine-tune that is gone; `batch`: the answers.

    Raises:
        bitdelta.Error: PyTorch or transformers is missing.
    """
    torch, _ = libraries("the demo")
    start = time.perf_counter()
    with _few_threads(torch), tempfile.TemporaryDirectory(prefix="bitdelta-demo-") as scratch:
        root = models(settings, cache, log)
        report: dict[str, Any] = {
            "models": str(root),
            "settings": asdict(settings),
            "evaluation": asdict(evaluation),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "train_seconds": round(time.perf_counter() - start, 1),
            "unit": "bytes of the safetensors files and configuration of one folder, without the tokenizer",
            "base_bytes": _model_bytes(root / "base"),
            "finetunes": {},
        }
        texts, deltas = texts_of(settings), {}
        for task, description in TASKS.items():
            folder = Path(scratch, task)
            found, seconds = _pack(
                root / "base", root / task, kept(texts[task]), folder, evaluation, task, log
            )
            log(f"measuring {task}")
            rows = _measure(root / "base", root / task, found, held_out(texts[task]), evaluation.tokens)
            for row in rows:
                row |= {"seconds": seconds[row["model"]]} if row["model"] in seconds else {}
            report["finetunes"][task] = {"text": description, "rows": rows}
            deltas[task] = found["fitted, distilled"]
        log("answering in one batch")
        report["batch"] = _answer(root / "base", deltas, evaluation.sample_tokens)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def _pack(
    base: Path,
    finetuned: Path,
    text: str,
    folder: Path,
    evaluation: Evaluation,
    task: str,
    log: Log,
) -> tuple[dict[str, Path], dict[str, float]]:
    """The fine-tune in each of FORMS: the folder, and the seconds that its last step took."""
    from .calibrate import calibrate
    from .compress import compress
    from .distill import distill

    folder.mkdir()
    source = folder / "text.txt"
    source.write_text(text, encoding="utf-8")
    rows = folder / "rows"
    found = {name: folder / str(i) for i, name in enumerate(FORMS)}
    seconds = {}

    def train(before: str, after: str) -> None:
        length, steps = evaluation.distill_length, evaluation.distill_steps
        options: Any = {"steps": steps, "length": length, "cache": folder / "answers"}
        distill(base, finetuned, found[before], source, found[after], **options)

    def fit() -> None:
        compress(base, finetuned, rows)
        calibrate(
            base, finetuned, rows, source, found["fitted signs"], n_tokens=evaluation.calibration_tokens
        )

    steps: dict[str, Callable[[], Any]] = {
        "sign(d)": lambda: compress(base, finetuned, found["sign(d)"], scale="tensor"),
        "sign(d), distilled": lambda: train("sign(d)", "sign(d), distilled"),
        "fitted signs": fit,
        "fitted, distilled": lambda: train("fitted signs", "fitted, distilled"),
    }
    for name, step in steps.items():
        log(f"packing {task}: {name}")
        begin = time.perf_counter()
        step()
        seconds[name] = round(time.perf_counter() - begin, 3)
    return found, seconds


def _measure(
    base: Path, finetuned: Path, deltas: dict[str, Path], text: str, n_tokens: int
) -> list[dict[str, Any]]:
    """The rows of the table, all of the same held-out tokens."""
    import torch

    from .evaluate import evaluate

    tokenizer = load_tokenizer(finetuned)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:n_tokens])
    tokens = tokens[: len(tokens) // ROW * ROW].view(-1, ROW).numpy()
    report = evaluate(base, deltas, finetuned, tokens, n_tokens, ROW, batch_size=16)
    scores = report["tenants"]
    first = scores[next(iter(deltas))]
    size = _model_bytes(finetuned)
    rows = [
        {"model": "base", **_scores(first["base"])},
        {"model": "fine-tune", "bytes": size, "perplexity": first["finetuned"]["perplexity"]},
    ]
    gap = math.log(rows[0]["perplexity"] / rows[1]["perplexity"])
    for name, folder in deltas.items():
        own = _delta_bytes(folder)
        row = {"model": name, "bytes": own, "factor": round(size / own, 2), **_scores(scores[name])}
        row["recovered"] = math.log(rows[0]["perplexity"] / row["perplexity"]) / gap
        rows.append(row)
    return rows


def _scores(found: dict[str, Any]) -> dict[str, Any]:
    return {"perplexity": found["perplexity"], "logit_mse": found["logit_mse"]}


def _answer(base: Path, deltas: dict[str, Path], n_tokens: int) -> dict[str, Any]:
    """Every prompt answered by the base and by its fine-tune, all in one batch over one copy of the base."""
    import torch

    from .model import DeltaModel

    model = DeltaModel.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    for task, folder in deltas.items():
        model.load_delta(task, folder)
    tokenizer = load_tokenizer(base)
    tokenizer.padding_side = "left"
    names = [name for task in deltas for name in (None, task)]
    prompts = [PROMPTS[task] for task in deltas for _ in range(2)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    begin = time.perf_counter()
    with seeded(0):  # the most likely tokens alone would soon repeat themselves
        out = model.generate(
            **batch, delta_names=names, max_new_tokens=n_tokens, do_sample=True, temperature=0.6, top_k=20
        )
    seconds = time.perf_counter() - begin
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {
        "rows": [
            {"model": name or "base", "prompt": prompt, "answer": answer}
            for name, prompt, answer in zip(names, prompts, answers, strict=True)
        ],
        "seconds": round(seconds, 3),
    }


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    yield f"a base and three fine-tunes of it, {report['base_bytes']:,} bytes each: {report['models']}"
    yield f"sizes are {report['unit']}"
    yield "perplexity: per token of held-out text, 1 is a perfect guess; logit MSE: against the fine-tune's logits;"
    yield "recovered: how much of the loss between base and fine-tune is gone"
    for task, result in report["finetunes"].items():
        yield ""
        columns = (
            "1 bit a weight",
            ">bytes",
            ">smaller",
            ">logit MSE",
            ">perplexity",
            ">recovered",
            ">seconds",
        )
        rows = [[row["model"], *_cells(row)] for row in result["rows"]]
        yield from table(columns, rows, f"{task}: fine-tuned on {result['text']}")
    yield ""
    yield from (f"{name}: {what}" for name, what in FORMS.items())
    yield ""
    batch = report["batch"]
    rows = [[row["model"], repr(row["prompt"])[1:-1], _short(row["answer"])] for row in batch["rows"]]
    title = f"one batch of {len(rows)} rows, base and three fine-tunes, in {batch['seconds']:.2f} s"
    yield from table(("row of", "prompt", "answer"), rows, title)
    yield ""
    yield f"the whole took {report['seconds']} s; the models are kept, to try the other commands on:"
    folder = Path(report["models"])
    yield f"    bitdelta compress {folder / 'base'} {folder / next(iter(TASKS))} --out DELTA"
    yield "    bitdelta info DELTA"


def _cells(row: dict[str, Any]) -> list[str]:
    formats = {
        "bytes": "{:,}", "factor": "{:.1f}x", "logit_mse": "{:.3g}", "perplexity": "{:.2f}", "recovered": "{:.1%}",
        "seconds": "{:.1f}",
    }  # fmt: skip
    return [form.format(row[key]) if key in row else "" for key, form in formats.items()]


def _short(answer: str) -> str:
    text = repr(answer)[1:-1]
    return text if len(text) <= SAMPLE_WIDTH else f"{text[: SAMPLE_WIDTH - 4]} ..."


@contextmanager
def _few_threads(torch: Any) -> Iterator[None]:
    """As many threads as this process has CPUs, and no more than help; at the end as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, default_count(), MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _model_bytes(folder: Path) -> int:
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return weights + (folder / "config.json").stat().st_size


def _delta_bytes(folder: Path) -> int:
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and "tokenizer" not in path.name
    )


def small() -> tuple[Settings, Evaluation]:
    """Settings for a run of a few seconds, whose text is poor."""
    return SMALL, Evaluation(512, 256, 2, 32, 4)
