"""The command `bitdelta generate`; cli.py adds it to the others."""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_parts import BASE, DEBUG, DEVICE, JSON
from .cli_parts import answer as _answer


def generate(
    base: BASE,
    prompt: Annotated[
        list[str],
        typer.Option(metavar="NAME:TEXT", help="A prompt for a delta, or :TEXT for the base; repeatable."),
    ],
    delta: Annotated[
        list[str], typer.Option(metavar="NAME=DELTA", help="A packed delta or LoRA adapter; repeatable.")
    ] = [],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of every answer, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: DEVICE = None,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Answer prompts of several fine-tunes in one batch over one base."""
    from . import threads

    threads.let_torch_sleep()
    from .prompts import answer, describe

    deltas: dict[str, str] = {}
    for name, path in (_split(text, "=", "delta", "NAME=DELTA") for text in delta):
        if name in deltas:
            raise ValueError(f"--delta: two are called {name}")
        deltas[name] = path
    prompts = [_split(text, ":", "prompt", "NAME:TEXT") for text in prompt]
    report = answer(base, deltas, prompts, max_new_tokens, temperature, seed, device)
    _answer(report, as_json, describe(report))


def _split(text: str, at: str, option: str, expected: str) -> tuple[str, str]:
    first, found, rest = text.partition(at)
    if not found:
        raise ValueError(f"--{option}: expected {expected}, got {text!r}")
    return first, rest
