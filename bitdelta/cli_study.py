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
    size: Annotated[str, typer.Option(help="small, or tiny: seconds, and poor models.")] = "small",
    folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the models here.")] = None,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Measure a claim of the method on small models that are trained here, over several seeds."""
    from .study import describe, run
    from .table import table

    if name is None:
        answer({"studies": STUDIES}, as_json, table(("study", "what it measures"), list(STUDIES.items())))
        return
    report = run(name, seed, size, folder, message)
    answer(report, as_json, describe(report))
