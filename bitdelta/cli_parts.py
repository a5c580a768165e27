"""What the commands share: arguments, and how an answer is printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

BASE = Annotated[
    str, typer.Argument(metavar="BASE", help="Folder or Hub id (NAME@REVISION) of the base model.")
]
FINETUNED = Annotated[str, typer.Argument(metavar="FINETUNED", help="Folder or Hub id of the fine-tune.")]
DELTA = Annotated[str, typer.Argument(metavar="DELTA", help="Folder or Hub id of a packed delta.")]
OUT = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; it must not exist.")]
TEXT = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Text, .jsonl, or a dataset's name; default: the text built in."),
]
DEVICE = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where PyTorch works: cpu (the default), cuda, cuda:1.")
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def answer(report: dict[str, Any], as_json: bool, lines: Iterable[str]) -> None:
    if as_json:
        # NaN is not JSON: a report with one is an error here, not a document that others cannot read
        typer.echo(json.dumps(report, indent=2, allow_nan=False, default=_plain))
    else:
        for line in lines:
            typer.echo(line)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} in the report is not JSON")


SAID = ("ok", "dry_run", "out", "delta")  # what the first line of a summary says
MOST = 8  # items of a list


def summary(report: dict[str, Any], verb: str, path: object) -> Iterable[str]:
    """`verb path`, then what can be said in a line each, aligned; the reasons against it have lines of their own."""
    yield f"{verb} {path}"
    reasons = report.get("reasons") or []
    for reason in reasons[:MOST]:
        yield f"  {reason}"
    if len(reasons) > MOST:
        yield f"  ... and {len(reasons) - MOST} more (--json has all)"
    facts = dict(_fact(key, value) for key, value in report.items() if key not in (*SAID, "reasons", "unit"))
    if "factor" in facts and "unit" in report:
        facts["factor"] += f" ({report['unit'].removeprefix('factor = ')})"
    width = max((len(label) for label, text in facts.items() if text), default=0)
    for label, text in facts.items():
        if text:
            yield f"  {label:<{width}}  {text}"
    if "budget" in report:
        from .info import describe_budget

        yield from (f"  {line}" for line in describe_budget(report["budget"]))


def _fact(key: str, value: Any) -> tuple[str, str]:
    """A label and the value as text with its unit; the text is empty for what does not fit a line."""
    label = key.replace("_", " ")
    if isinstance(value, (str, bool)):
        return label, str(value)
    if isinstance(value, (int, float)):
        if key.endswith("bytes"):
            return label.removesuffix("bytes").strip() or "size", _bytes(value)
        if key == "gb_per_second":
            return "speed", f"{value:.3g} GB/s"
        if key.endswith("seconds"):
            return label.replace("seconds", "time"), f"{value:.2f} s"
        return label, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return label, ", ".join(value[:MOST]) + (" ..." if len(value) > MOST else "")
    return label, ""


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count:,} bytes ({count / size:.2f} {unit})"
    return f"{count:,} bytes"


def message(text: str) -> None:
    typer.echo(text, err=True)


def shows_progress() -> bool:
    return sys.stderr.isatty() and os.environ.get("BITDELTA_PROGRESS") != "0"
