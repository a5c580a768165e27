"""Studies of what the method costs in quality, on small models trained here: `bitdelta study NAME`.

    pair.py      a base and a fine-tune of it          trial.py   the deltas of one pair
    measure.py   how near to the fine-tune             table.py   mean and spread over seeds

Every other module is a study: TITLE, `rows(trial)` that yields labels and scores, and, where they differ from the
usual, COLUMNS, TUNE (the fine-tune), GOALS (ratios between rows) and `judge(rows)`, lines that follow the table. A
study without pairs has `measure` instead of `rows`. The models stand in for the paper's, which are not small:
relations between methods carry over, figures do not.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..training import Log, silent

STUDIES = {
    "goals": "error against the original recipe, with the goals of this package",
    "scales": "scale distillation, for each form of scales",
    "signs": "signs and scales fitted together, without gradients",
    "svd": "low ranks of as many bytes, before and after distillation",
    "planes": "0 to 8 planes, one after the other and fitted together",
    "budget": "a budget of bits against uniform planes of the same bytes",
    "full": "a full fine-tune, from the paper's recipe to fitted and distilled",
    "lora": "a merged LoRA fine-tune, against its adapter",
    "dpo": "a fine-tune by direct preference optimisation",
    "continued": "long continued training: a large change",
    "quantized": "a delta over a quantised base: INT8, INT4, GPTQ",
    "repair": "a quantised model repaired by a delta to its own original",
    "memory": "peak memory and time of compress, calibrate and distill, against the model's size",
    "paper": "the paper's own tables, for those who have its models: --table N",
}
SEEDS = (0, 1, 2)


def run(
    name: str,
    seeds: Sequence[int] = SEEDS,
    size: str = "small",
    folder: Path | None = None,
    log: Log = silent,
) -> dict[str, Any]:
    """Trains the pairs, or finds them in the folder, and measures the study's rows for every seed.

    Args:
        name: of the study.
        seeds: a pair each.
        size: "small", "wide" (begun with larger weights), "bytes" (without merged words) or "tiny" (for tests).
        folder: keeps the models; default ~/.cache/bitdelta/study.
        log: called with one line at a time.

    Returns:
        A dict that JSON can hold; `rows` as in table.py.

    Raises:
        ValueError: no such study or size, no seeds.
        bitdelta.Error: PyTorch or transformers is missing.
    """
    from ..training import libraries

    if name not in STUDIES:
        raise ValueError(f"study: expected one of {', '.join(STUDIES)}, got {name!r}")
    if name == "paper":
        raise ValueError("study: paper has a function of its own, bitdelta.study.paper_run.run")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different whole numbers, got {list(seeds)}")
    torch, _ = libraries("a study")
    from ..bench import machine
    from .pair import FULL, SIZES, make_pair
    from .table import judge, rows_of
    from .trial import Trial

    module = importlib.import_module(f"{__name__}.{name}")
    sizes = getattr(module, "SIZES", SIZES)
    if size not in sizes:
        raise ValueError(f"size: expected one of {', '.join(sizes)}, got {size!r}")
    start, found = time.perf_counter(), []
    if hasattr(module, "measure"):
        rows = module.measure(seeds, size, log)
    else:
        for seed in seeds:
            pair = make_pair(SIZES[size], seed, folder, getattr(module, "TUNE", FULL), log)
            with tempfile.TemporaryDirectory(prefix="bitdelta-study-") as scratch:
                found.append(dict(module.rows(Trial(pair, Path(scratch), log=log))))
        rows = rows_of(found)
    return {
        "study": name,
        "title": module.TITLE,
        "seeds": list(seeds),
        "size": {"name": size, **({} if hasattr(module, "measure") else asdict(SIZES[size]))},
        "rows": rows,
        "judged": list(module.judge(rows)) if hasattr(module, "judge") else [],
        "goals": judge(rows, getattr(module, "GOALS", ())),
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    from .table import COLUMNS, lines, verdicts

    module = importlib.import_module(f"{__name__}.{report['study']}")
    n = len(report["seeds"])
    title = f"{report['title']}: {n} seed{'s' * (n > 1)}{', mean +- standard deviation' * (n > 1)}"
    yield from lines(report["rows"], title, getattr(module, "COLUMNS", COLUMNS))
    if report["judged"]:
        yield ""
        yield from report["judged"]
    if report["goals"]:
        yield ""
        yield from verdicts(report["goals"])
    yield ""
    yield f"a stand-in of size {report['size']['name']}; the whole took {report['seconds']} s"
