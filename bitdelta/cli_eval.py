"""The command `bitdelta eval`; cli.py adds it to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_parts import BASE, DEBUG, JSON, TEXT, answer, shows_progress


def evaluate(
    base: BASE,
    delta: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]DELTA", help="Folder or Hub id of a packed delta; repeatable."),
    ] = [],  # noqa: B006
    finetuned: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DIR", help="The fine-tune of all deltas, or of the delta NAME; repeatable."
        ),
    ] = [],  # noqa: B006
    text: TEXT = None,
    require: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME:]METRIC<=X", help="Exit with 1 unless it holds, as 'kl<=0.1'; repeatable."
        ),
    ] = [],  # noqa: B006
    refusals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts: count what is refused, before and after.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = 16384,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the models run.")] = "cpu",
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Measure base + delta against the fine-tune: perplexity, logit error, KL, agreement."""
    from .evaluate import describe
    from .evaluate import evaluate as run
    from .requirement import check, parse

    for requirement in require:
        parse(requirement)
    report = run(
        base,
        dict(_named(delta, "delta")),
        _finetuned(finetuned),
        text,
        tokens,
        length,
        batch_size,
        seed,
        dtype,
        device,
        refusals,
        progress=shows_progress(),
    )
    report["required"] = check(report, require)
    answer(report, as_json, describe(report))
    if not all(result["met"] for result in report["required"]):
        raise typer.Exit(1)


def _named(values: list[str], option: str) -> list[tuple[str, str]]:
    """NAME=PATH, or PATH with its last part as the name; an existing path may hold an equals sign."""
    found: list[tuple[str, str]] = []
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            name, path = Path(value).name, value
        if name in dict(found):
            raise ValueError(f"--{option}: two are called {name}; write --{option} NAME={path}")
        found.append((name, path))
    return found


def _finetuned(values: list[str]) -> str | dict[str, str] | None:
    """One for all, or by name."""
    if len(values) == 1 and ("=" not in values[0] or Path(values[0]).exists()):
        return values[0]
    return dict(_named(values, "finetuned")) if values else None
