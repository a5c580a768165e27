"""The command `bitdelta`: one function per sub-command, each a thin call of the library.

stdout   the answer: text, or with --json one JSON document and nothing else
stderr   progress, messages, errors (one line; --debug adds the traceback)
exit     0 done, 1 the answer is no (verify), 2 wrong use or bad input, 130 interrupted
"""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .cli_distill import distill
from .cli_eval import evaluate
from .cli_generate import generate
from .cli_parts import (
    BASE,
    DEBUG,
    DELTA,
    DEVICE,
    FINETUNED,
    JSON,
    OUT,
    TEXT,
    answer,
    message,
    shows_progress,
    summary,
)
from .cli_plot import plot
from .cli_study import study
from .errors import Error

INTERRUPTED = 130  # 128 + SIGINT

app = typer.Typer(
    help="One base model, a thousand fine-tunes: each stored as sign bits and a few scales.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Scale(str, Enum):
    tensor = "tensor"
    row = "row"
    rank1 = "rank1"


class Fit(str, Enum):
    signs = "signs"
    scales = "scales"


class Inputs(str, Enum):
    finetuned = "finetuned"
    compressed = "compressed"


class Quantized(str, Enum):
    int8 = "int8"
    bnb_int8 = "bnb-int8"
    bnb_nf4 = "bnb-nf4"
    stored = "stored"


class Suite(str, Enum):
    cpu = "cpu"
    io = "io"
    latency = "latency"
    cuda = "cuda"
    model = "model"
    calibrate = "calibrate"


@app.callback(invoke_without_command=True)
def _global(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        import bitdelta

        typer.echo(bitdelta.__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command()
def compress(
    base: BASE,
    finetuned: FINETUNED,
    out: OUT,
    planes: Annotated[int, typer.Option(min=1, max=8, help="Sign planes: bits per weight.")] = 1,
    scale: Annotated[
        Scale, typer.Option(help="One scale per matrix, per row, or per row and column.")
    ] = Scale.row,
    whole: Annotated[
        list[str], typer.Option(metavar="GLOB", help="Store these tensors whole; repeatable.")
    ] = [],  # noqa: B006
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Fit signs and scales to this text; see calibrate.")
    ] = None,
    fit: Annotated[Fit, typer.Option(help="What is fitted to it.")] = Fit.signs,
    budget: Annotated[
        float | None, typer.Option(metavar="BITS", help="Bits per parameter, spent by errors on the text.")
    ] = None,
    quantized_base: Annotated[
        Quantized | None,
        typer.Option(
            help="Against the base's weights as quantised: by torchao, bitsandbytes, or in its files."
        ),
    ] = None,
    device: DEVICE = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate size, memory and time; write nothing.")
    ] = False,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Pack what a fine-tune changed in its base."""
    from .compress import compress as run

    report = run(
        base,
        finetuned,
        out,
        planes=planes,
        scale=scale.value,
        whole=tuple(whole),
        text=text,
        fit=fit.value,
        budget=budget,
        dry_run=dry_run,
        progress=shows_progress(),
        quantized_base=None if quantized_base is None else quantized_base.value,
        device=device,
    )
    answer(report, as_json, summary(report, "would write" if dry_run else "wrote", out))


@app.command(short_help="Fit signs and scales to text.")
def calibrate(
    base: BASE,
    finetuned: FINETUNED,
    delta: DELTA,
    out: OUT,
    text: TEXT = None,
    fit: Annotated[Fit, typer.Option(help="Signs and scales, or the scales alone.")] = Fit.signs,
    inputs: Annotated[
        Inputs, typer.Option(help="Of a layer: from the fine-tune, or from what is compressed so far.")
    ] = Inputs.finetuned,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Of signs, then scales.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to calibrate on.")] = 16384,
    length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a row.")] = 128,
    seed: Annotated[int, typer.Option(help="Decides which rows are drawn.")] = 0,
    device: DEVICE = None,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Fit a delta's signs and scales to text, layer by layer, without gradients."""
    from .calibrate import calibrate as run
    from .calibrate import describe

    report = run(
        base,
        finetuned,
        delta,
        text,
        out,
        fit=fit.value,
        inputs=inputs.value,
        rounds=rounds,
        n_tokens=tokens,
        length=length,
        seed=seed,
        progress=shows_progress(),
        device=device,
    )
    answer(report, as_json, (*summary(report, "wrote", out), *describe(report)))


@app.command(short_help="Show what a delta holds.")
def info(delta: DELTA, as_json: JSON = False, debug: DEBUG = False) -> None:
    """Show what a delta holds: per tensor form, bytes and error; shares; the factor."""
    from .info import describe
    from .info import info as run

    report = run(delta)
    answer(report, as_json, describe(report))


@app.command(short_help="Check a delta and its base.")
def verify(
    delta: DELTA,
    base: Annotated[str, typer.Option(metavar="BASE", help="Folder or Hub id of the base model.")],
    finetuned: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also measure the error against it.")
    ] = None,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Check a delta against its checksums and its base; exit status 1 if it fails."""
    from .verify import verify as run

    report = run(delta, base, finetuned)
    good = bool(report.get("ok"))
    answer(report, as_json, summary(report, "good:" if good else "NOT GOOD:", delta))
    if not good:
        raise typer.Exit(1)


@app.command(short_help="Write base + delta as a checkpoint.")
def merge(
    base: BASE,
    delta: DELTA,
    out: OUT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the inputs; write nothing.")] = False,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Write base + delta as a full checkpoint that transformers loads."""
    from .merge import merge as run

    report = run(base, delta, out, dry_run=dry_run, progress=shows_progress())
    answer(report, as_json, summary(report, "would write" if dry_run else "wrote", out))


@app.command("import-diff", short_help="Convert the original project's diff.pt.")
def import_diff(
    diff: Annotated[
        Path, typer.Argument(metavar="DIFF.pt", help="A diff.pt of the original BitDelta project.")
    ],
    base: Annotated[str, typer.Option(metavar="BASE", help="Folder or Hub id of the base model.")],
    out: OUT,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Convert a diff.pt of the original project; its pickle is never executed."""
    from .import_diff import import_diff as run

    report = run(diff, base, out)
    answer(report, as_json, summary(report, "wrote", out))


app.command("eval", short_help="Measure a delta against its fine-tune.")(evaluate)
app.command(short_help="Answer prompts of many fine-tunes.")(generate)
app.command(short_help="Measure a claim on small models.")(study)
app.command(short_help="Draw what was measured.")(plot)
app.command(short_help="Train a delta's scales by gradients.")(distill)


@app.command(short_help="Check and time the kernels here.")
def bench(
    suite: Annotated[
        Suite,
        typer.Argument(
            help="cpu: kernels and files; io: files only; cuda: a GPU's kernels; latency: one linear against size and "
            "tenants; model: many tenants; calibrate: fitting against distillation."
        ),
    ] = Suite.cpu,
    shape: Annotated[
        str, typer.Option(metavar="NAME", help="model: whose layers (llama-3-8b, mistral-7b, ...).")
    ] = "llama-2-7b",
    layers: Annotated[int, typer.Option(min=1, help="model: how many layers.")] = 2,
    tenants: Annotated[int, typer.Option(min=1, help="model: up to so many tenants.")] = 16,
    whole: Annotated[
        bool, typer.Option("--model", help="cuda: whole models of many tenants, not single products.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1, help="cuda: end in time; the rest is not measured.")] = 240,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes, seconds: checks that it runs.")
    ] = False,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Check the kernels, then time them against the dense product, on this machine."""
    from . import bench as suites

    if suite is Suite.cuda:
        report = suites.run_cuda(quick=quick, seconds=seconds, model=whole, log=message)
        answer(report, as_json, suites.describe(report))
        if report["failed"]:
            raise typer.Exit(1)
        return
    if suite is Suite.model:
        report = suites.run_model(shape, layers, tenants, quick=quick, log=message)
    elif suite is Suite.latency:
        report = suites.run_latency(quick=quick, log=message)
    elif suite is Suite.calibrate:
        report = suites.run_calibration(quick=quick, log=message)
    else:
        report = suites.run(suite.value, quick=quick, log=message)
    answer(report, as_json, suites.describe(report))


@app.command(short_help="Train small models and compress them.")
def demo(
    small: Annotated[bool, typer.Option("--small", help="Tiny models and poor text, in seconds.")] = False,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the models here.")] = None,
    as_json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Train a small base and three fine-tunes, compress them, and measure what is left."""
    from . import demo as demonstration

    chosen = demonstration.small() if small else (demonstration.Settings(), demonstration.Evaluation())
    report = demonstration.run(*chosen, cache=cache, log=message)
    answer(report, as_json, demonstration.describe(report))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status; the entry point of the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(args=arguments, prog_name="bitdelta", standalone_mode=False)
        sys.stdout.flush()
        if status == INTERRUPTED:  # newer versions of typer turn the exception into the status
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        message("bitdelta: interrupted, nothing was written")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has left, as in `bitdelta info X | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - whatever it is, the user reads one line
        usage = getattr(error, "format_message", None)  # typer's own or click's ClickException
        known = usage is not None or isinstance(
            error, (Error, OSError, ValueError, TypeError, BufferError, MemoryError, ImportError)
        )
        if "--debug" in arguments:
            import traceback

            traceback.print_exc()
        text = str(usage()) if usage else str(error) or type(error).__name__
        context = getattr(error, "ctx", None)
        if usage and context is not None:
            text = f"{text.rstrip('.')}; see {context.command_path} --help"
        if not known:
            text = f"internal error: {type(error).__name__}: {text}; --debug shows where"
        line = " ".join(text.split())
        if line:
            message(f"bitdelta: error: {line}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
