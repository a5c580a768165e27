"""The command `bitdelta study`; cli.py adds it to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_parts import DEBUG, JSON, answer, message
from .study import SEEDS, STUDIES


def study(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help=f"{', '.join(STUDIES)}; none: what each of them is."),
    ] = None,
    seed: Annotated[list[int], typer.Option(help="A pair of models each; repeatable.")] = list(SEEDS),  # noqa: B006
    size: Annotated[str, typer.Option(help="small, wide, bytes, or tiny: poor models, soon.")] = "small",
    folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the models here.")] = None,
    table: Annotated[
        int | None, typer.Option(metavar="N", help="Of the paper; the rest is paper's too.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="BASE", help="Instead of the paper's base.")] = None,
    finetuned: Annotated[
        str | None, typer.Option(metavar="FINETUNED", help="Instead of the paper's fine-tune.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Instead of C4, its text.")] = None,
    lm_eval: Annotated[bool, typer.Option(help="Run its tasks, or take own scores alone.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the paper's figures.")
    ] = False,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Measure a claim of the method on small models that are trained here, over several seeds."""
    from .study import describe, paper_run, run
    from .table import table as lines_of

    if name is None:
        lines = lines_of(("study", "what it measures"), list(STUDIES.items()))
        answer({"studies": STUDIES}, as_json, lines)
        return
    if name == "paper":
        report = paper_run.run(
            table, base, finetuned, text, use_lm_eval=lm_eval, dry_run=dry_run, log=message
        )
        answer(report, as_json, paper_run.describe(report))
        return
    if dry_run or not lm_eval or any(value is not None for value in (table, base, finetuned, text)):
        raise ValueError(
            f"{name}: --table, --base, --finetuned, --text, --no-lm-eval and --dry-run are of paper alone"
        )
    report = run(name, seed, size, folder, message)
    answer(report, as_json, describe(report))
