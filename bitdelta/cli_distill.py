"""The command `bitdelta distill`; cli.py adds it to the others."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .cli_parts import BASE, DEBUG, DELTA, DEVICE, FINETUNED, JSON, OUT, TEXT, answer, shows_progress, summary


class Loss(str, Enum):
    mse = "mse"
    kl = "kl"


def distill(
    base: BASE,
    finetuned: FINETUNED,
    delta: DELTA,
    out: OUT,
    text: TEXT = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 128,
    lr: Annotated[float, typer.Option(help="Largest learning rate: relative change of a scale.")] = 0.02,
    loss: Annotated[Loss, typer.Option(help="Of the logits, against the fine-tune's.")] = Loss.mse,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the K largest logits.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes of one step.")] = 1,
    weight_decay: Annotated[float, typer.Option(help="Pulls scales to where they began.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides the rows and their order.")] = 0,
    pack: Annotated[bool, typer.Option(help="Windows of the text, or a document a row.")] = True,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice: less memory.")
    ] = False,
    autocast: Annotated[bool, typer.Option("--autocast", help="Compute in bf16 where PyTorch can.")] = False,
    device: DEVICE = None,
    device_map: Annotated[str | None, typer.Option(metavar="MAP", help="Of accelerate: auto.")] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: split the weights (FSDP2).")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the fine-tune's answers here.")
    ] = None,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Train the scales of a delta until it answers as the fine-tune does."""
    from .distill import distill as run

    report = run(
        base,
        finetuned,
        delta,
        text,
        out,
        steps=steps,
        batch_size=batch_size,
        length=length,
        lr=lr,
        loss=loss.value,
        top_k=top_k,
        accumulate=accumulate,
        weight_decay=weight_decay,
        seed=seed,
        pack=pack,
        checkpointing=checkpointing,
        autocast=autocast,
        device=device,
        device_map=device_map,
        shard=shard,
        cache=cache,
        progress=shows_progress(),
    )
    if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes speaks for all
        answer(report, as_json, summary(report, "wrote", out))
