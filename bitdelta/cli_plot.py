"""The command `bitdelta plot`; cli.py adds it to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_parts import DEBUG, JSON, answer, summary


def plot(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of the picture; none: what each of them is.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT", help="A report (a command's --json), a delta, or BASE FINETUNED for variance."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A .png, .svg or .pdf to write.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="quality: logit_mse, kl, perplexity, recovered or top1."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="NAME", help="quality: code or prose.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="WHAT", help="latency: tenants, size or rows, as the report has it.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="latency of bench cpu: of which run.")
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(metavar="N", help="latency of bench latency: of which size, or of how many tenants."),
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(metavar="GLOB", help="variance: which tensors; else the middle layer's.")
    ] = None,
    plane: Annotated[int | None, typer.Option(metavar="N", help="scales: which plane, from 0.")] = None,
    error: Annotated[
        str | None, typer.Option(metavar="NAME", help="layer-errors: relative_error or output_error.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Instead of the picture's own.")] = None,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Draw what was measured: a report of another command, or a delta."""
    from .plot.picture import PICTURES
    from .plot.picture import plot as run
    from .table import table as lines_of

    if name is None:
        lines = lines_of(("plot", "what it draws, from what"), list(PICTURES.items()))
        answer({"plots": PICTURES}, as_json, lines)
        return
    if out is None:
        raise ValueError("out: expected --out FILE, a .png, .svg or .pdf to write")
    report = run(name, inputs or [], out, metric, text, against, threads, at, tensor, plane, error, title)
    answer(report, as_json, summary(report, "wrote", out))
