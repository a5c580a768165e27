"""What `bitdelta plot` does: reads its input, draws, and writes a PNG, SVG or PDF that appears whole or not at all."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..array import to_float32
from ..checkpoint import open_checkpoint
from ..errors import Error, FormatError
from . import bars, curves, deltas
from .latency import latency
from .style import missing

PICTURES = {
    "quality": "quality against bits per weight: a report of study",
    "memory": "memory against the number of models: a report of bench model, or a delta",
    "latency": "time against tenants, rows or size: a report of bench latency, model, cpu or cuda",
    "rates": "GB/s beside what memory and disk allow: a report of bench io or bench cpu",
    "fitting": "seconds of fitting against distillation: a report of bench calibrate",
    "loss": "training loss: a report of distill",
    "layer-errors": "errors by layer and projection: a delta",
    "scales": "histograms of scales: a delta",
    "variance": "explained variance against rank: a base and its fine-tune",
    "demo": "error of each way to pack three fine-tunes: a report of demo",
}
SUFFIXES = ("png", "svg", "pdf")
SIZE = (6.4, 4.0)  # inches
DPI = 120
LARGEST = 1 << 26  # bytes of a report
MOST_LINES = 7  # of variance, where no tensor is named


def plot(
    name: str,
    inputs: list[str],
    out: str | os.PathLike[str],
    metric: str | None = None,
    text: str | None = None,
    against: str | None = None,
    threads: int | None = None,
    at: int | None = None,
    tensor: str | None = None,
    plane: int | None = None,
    error: str | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """Draws one picture of `PICTURES` and writes it; a file that is there is replaced.

    Args:
        name: of the picture.
        inputs: one report or delta; for "variance" a base and its fine-tune.
        out: FILE.png, .svg or .pdf.
        metric, text: of quality.
        against, threads, at: of latency.
        tensor: of variance: a glob of tensor names; None: those of the middle layer.
        plane: of scales. error: of layer-errors.
        title: instead of the picture's own.

    Returns:
        A dict that JSON can hold: `out`, `bytes`, `plot`, `inputs`, `title`, the labels of `x` and `y`, `series`.

    Raises:
        ValueError: an unknown picture, suffix or option, or a report that lacks what is drawn.
        bitdelta.Error: matplotlib is missing; an input that cannot be read.
        OSError: `out` cannot be written.
    """
    if name not in PICTURES:
        raise ValueError(f"plot: expected one of {', '.join(PICTURES)}, got {name!r}")
    out = Path(out)
    suffix = out.suffix.removeprefix(".").lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"out: expected a file that ends in .{', .'.join(SUFFIXES)}, got {str(out)!r}")
    given = {
        "metric": metric, "text": text, "against": against, "threads": threads, "at": at, "tensor": tensor,
        "plane": plane, "error": error,
    }  # fmt: skip
    options = _options(name, {key: value for key, value in given.items() if value is not None})
    count = 2 if name == "variance" else 1
    if len(inputs) != count:
        wanted = "a base and its fine-tune" if count == 2 else "one report or delta"
        raise ValueError(f"input: expected {wanted} for {name}, got {len(inputs)}")
    figure, ax = _figure()
    _draw(name, inputs, options, ax)
    if title is not None:
        ax.set_title(title, fontsize="medium", wrap=True)
    written = _write(figure, out, suffix)
    lines = ax.get_legend_handles_labels()[1] or [label.get_text() for label in ax.get_yticklabels()]
    labels = {"title": ax.get_title(), "x": ax.get_xlabel(), "y": ax.get_ylabel()}
    return {
        "out": str(out),
        "bytes": written,
        "plot": name,
        "inputs": list(inputs),
        **labels,
        "series": lines,
    }


REPORTS: dict[str, Callable[..., Any]] = {
    "demo": bars.demo,
    "quality": curves.quality,
    "memory": curves.memory,
    "latency": latency,
    "rates": bars.rates,
    "fitting": bars.fitting,
    "loss": curves.loss,
}
USES = {
    "quality": ("metric", "text"),
    "latency": ("against", "threads", "at"),
    "layer-errors": ("error",),
    "scales": ("plane",),
    "variance": ("tensor",),
}


def _options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    for key in given:
        if key not in USES.get(name, ()):
            whose = next(other for other, keys in USES.items() if key in keys)
            raise ValueError(f"{key}: it is an option of {whose}, not of {name}")
    return given


def _figure() -> tuple[Any, Any]:
    """A figure without a window, whatever backend is set."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing(error) from error
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _draw(name: str, inputs: list[str], options: dict[str, Any], ax: Any) -> None:
    from ..packfile import load

    if name == "variance":
        base, finetuned = inputs
        deltas.variance(dict(_changes(base, finetuned, options.get("tensor"))), ax=ax)
    elif name in ("layer-errors", "scales"):
        draw = deltas.layer_errors if name == "layer-errors" else deltas.scales
        draw(load(inputs[0]), **options, ax=ax)
    else:
        report = (
            _size(inputs[0]) if name == "memory" and not Path(inputs[0]).is_file() else _report(inputs[0])
        )
        try:
            REPORTS[name](report, **options, ax=ax)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{inputs[0]}: not a report that {name} can draw: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{inputs[0]}: {error}") from error


def _size(source: str) -> dict[str, Any]:
    from ..info import info

    return info(source)


def _report(source: str) -> dict[str, Any]:
    """The JSON document of a command."""
    path = Path(source)
    if not path.is_file():
        raise Error(f"{source}: no such file; expected the JSON that a command with --json prints")
    if path.stat().st_size > LARGEST:
        raise FormatError(f"{source}: {path.stat().st_size:,} bytes; a report has {LARGEST:,} at most")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: not JSON: {error}") from error
    if not isinstance(report, dict):
        raise FormatError(f"{source}: expected a JSON object, got {type(report).__name__}")
    return report


def _changes(base: str, finetuned: str, glob: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Label -> finetuned - base, of the matrices that the glob names, or of the middle layer's."""
    before, after = open_checkpoint(base), open_checkpoint(finetuned)
    shared = [
        name
        for name, tensor in after.items()
        if name in before and len(tensor.shape) == 2 and tuple(before[name].shape) == tuple(tensor.shape)
    ]
    if glob is not None:
        chosen = [name for name in shared if fnmatch.fnmatchcase(name, glob)]
    else:
        layers = sorted({where[0] for name in shared if (where := deltas.place(name))})
        middle = layers[len(layers) // 2] if layers else None
        chosen = [n for n in shared if middle is None or (deltas.place(n) or (None,))[0] == middle][
            :MOST_LINES
        ]
    if not chosen:
        raise ValueError(f"tensor: no matrix of both {base} and {finetuned} is called {glob or 'anything'}")
    for name in chosen:
        change = to_float32(after[name].array()) - to_float32(before[name].array())
        if change.any():
            yield name.removeprefix("model.").removesuffix(".weight"), change


def _write(figure: Any, out: Path, suffix: str) -> int:
    """Draws to memory, then to a file beside the target, and renames it."""
    from matplotlib import rc_context

    drawn = io.BytesIO()
    dated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[suffix]
    with rc_context({"svg.hashsalt": "bitdelta"}):  # the same input gives the same bytes
        figure.savefig(drawn, format=suffix, metadata=dated)
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(drawn.getvalue())
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, out)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    return len(drawn.getvalue())
