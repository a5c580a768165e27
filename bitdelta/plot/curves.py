"""Curves of reports that commands print with --json: `study`, `bench model`, `distill`, `info`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .style import COLOURS, axes, finish, line_style, plain_log, whole_ticks, write_value

Report = Mapping[str, Any]
METRICS = {  # of a study's row: label with its unit, factor
    "logit_mse": ("logit MSE against the fine-tune", 1.0),
    "kl": ("KL divergence (nats per token)", 1.0),
    "perplexity": ("perplexity per token", 1.0),
    "recovered": ("loss gap recovered (%)", 100.0),
    "top1": ("same likeliest token as the fine-tune (%)", 100.0),
}
TEXTS = ("code", "prose")
PLANES = re.compile(r"(\d+), (.+)")
REFERENCES = ("base", "fine-tune")
MOST_MODELS = 64  # of a curve computed from sizes
CASES = {
    "merged": "a merged model each",
    "deltas": "base + deltas, one batch",
    "lora": "base + LoRA r={rank}, one batch",
    "peft": "LoRA r={rank} by PEFT",
    "plain": "the base alone, by PyTorch",
}


def quality(report: Report, metric: str = "logit_mse", text: str = "code", ax: Any = None) -> Any:
    """A study's metric against bits per weight, a line for each way to choose them; bars where all have the same.

    Args:
        report: of `bitdelta study planes`, `budget`, `goals`, or another study with pairs of models.
        metric: "logit_mse", "kl", "perplexity", "recovered" or "top1".
        text: "code" (what the fine-tune learnt) or "prose".
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax. Bars of error are the standard deviation over seeds.

    Raises:
        ValueError: no such metric or text, or a report without them.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if text not in TEXTS:
        raise ValueError(f"text: expected 'code' or 'prose', got {text!r}")
    found = [row for row in rows_of(report, "study") if metric in row.get(text, {})]
    if not found:
        raise ValueError(f"report: no row has {metric} on {text}")
    ax = axes(ax)
    series = _by_bits(found)
    label, factor = METRICS[metric]
    n = len(report.get("seeds", ()))
    title = f"{report.get('title', 'study')} (held-out {text}; {n} seed{'s' * (n != 1)})"
    if len({bits for points in series.values() for bits, _ in points}) < 2:
        return _bars(ax, found, metric, text, label, factor, title)
    for i, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point[0])
        values = [_mean(row[text][metric], factor) for _, row in points]
        x = [bits for bits, _ in points]
        ax.errorbar(
            x, [m for m, _ in values], yerr=[s for _, s in values], label=name, capsize=2, **line_style(i)
        )
    _reference_lines(ax, found, metric, text, factor)
    if _spans([row[text][metric]["mean"] for row in found if row["label"] not in REFERENCES]):
        plain_log(ax, "y")
    return finish(ax, "bits per weight", label, title)


def _by_bits(rows: Sequence[Report]) -> dict[str, list[tuple[float, Report]]]:
    """Rows that say how many bits they take, by what else their label says; a row of 0 bits begins every line."""
    series: dict[str, list[tuple[float, Report]]] = {}
    zero = []
    for row in rows:
        planes = PLANES.fullmatch(row["label"])
        bits = row.get("about", {}).get("bits")
        if planes and int(planes[1]) == 0:
            zero.append((0.0, row))
        elif planes:
            series.setdefault(planes[2], []).append((float(planes[1]), row))
        elif bits:
            name = "budget" if "budget" in row["label"] else "uniform planes and scales"
            series.setdefault(name, []).append((float(bits["mean"]), row))
    return {name: [*zero, *points] for name, points in series.items()}


def _bars(
    ax: Any, rows: Sequence[Report], metric: str, text: str, label: str, factor: float, title: str
) -> Any:
    shown = [row for row in rows if row["label"] != "fine-tune" or metric == "perplexity"]
    values = [_mean(row[text][metric], factor) for row in shown]
    is_log = _spans([mean for mean, _ in values])
    for i, (row, (mean, spread)) in enumerate(zip(shown, values, strict=True)):
        is_reference = row["label"] in REFERENCES
        if is_log:  # where the length of a bar would say nothing
            face = "white" if is_reference else COLOURS[0]
            ax.errorbar(mean, i, xerr=spread, fmt="o", color=COLOURS[0], markerfacecolor=face, capsize=2)
        else:
            hatch = "///" if is_reference else ""
            ax.barh(i, mean, xerr=spread, capsize=2, color="#9db8d6", edgecolor=COLOURS[0], hatch=hatch)
        write_value(ax, mean, mean + spread, i)
    ax.set_yticks(range(len(shown)), [row["label"] for row in shown])
    ax.invert_yaxis()
    if is_log:
        ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * 2 if is_log else high * 1.12)  # room for the figures
    finish(ax, label, "", title, legend=False)
    ax.grid(False, axis="y")
    return ax


def _reference_lines(ax: Any, rows: Sequence[Report], metric: str, text: str, factor: float) -> None:
    if metric == "perplexity":
        for row in rows:
            if row["label"] in REFERENCES:
                dash = ":" if row["label"] == "base" else "--"
                value = row[text][metric]["mean"] * factor
                ax.axhline(value, color="black", linewidth=1, linestyle=dash, label=row["label"])


def _mean(value: Report, factor: float) -> tuple[float, float]:
    return value["mean"] * factor, value["spread"] * factor


def _spans(values: Sequence[float]) -> bool:
    """Whether a log scale shows more: all above 0, the largest 20 times the smallest or more."""
    return min(values) > 0 and max(values) >= 20 * min(values)


def memory(report: Report, ax: Any = None) -> Any:
    """Bytes in memory against the number of models.

    Args:
        report: of `bitdelta bench model`, or of `bitdelta info`, whose sizes then give the curve: the base is taken
            to be as large as the fine-tune.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax.

    Raises:
        ValueError: another report.
    """
    if "finetuned_bytes" in report and "bytes" in report:
        counts = [1 << i for i in range(MOST_MODELS.bit_length())]
        whole, delta = report["finetuned_bytes"], report["bytes"]
        lines = {
            "a full model each": [(n, n * whole) for n in counts],
            "base + a delta each": [(n, whole + n * delta) for n in counts],
        }
        title = "Memory of many fine-tunes, from the sizes of one"
    else:
        kinds = cases_of(report, ("merged", "deltas", "lora"))
        lines = {name: [(r["tenants"], r["bytes"]) for r in rows] for name, rows in kinds.items()}
        title = f"Memory of many fine-tunes, {whose(report)}"
    most = max(value for points in lines.values() for _, value in points)
    size, unit = next(
        (size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if most >= size
    )
    ax = axes(ax)
    for i, (name, points) in enumerate(lines.items()):
        ax.plot([n for n, _ in points], [value / size for _, value in points], label=name, **line_style(i))
    doubling(ax, lines)
    plain_log(ax, "y")
    return finish(ax, "number of models", f"memory ({unit})", title)


def cases_of(report: Report, kinds: Sequence[str]) -> dict[str, list[Report]]:
    """Name -> rows by falling importance, each sorted by tenants."""
    found = [row for row in rows_of(report, "suite") if "tokens_per_second" in row and row["kind"] in kinds]
    if not found:
        raise ValueError("report: it has no tenants; expected one of `bitdelta bench model --json`")
    found.sort(key=lambda row: (kinds.index(row["kind"]), row["rank"] or 0, row["tenants"]))
    lines: dict[str, list[Report]] = {}
    for row in found:
        lines.setdefault(CASES[row["kind"]].format(rank=row["rank"]), []).append(row)
    return lines


def whose(report: Report) -> str:
    quick = " (--quick: figures mean nothing)" if report.get("quick") else ""
    layers = report["layers"]
    return f"{report['shape']} of {layers} layer{'s' * (layers != 1)}{quick}"


def doubling(ax: Any, lines: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    ax.set_xscale("log", base=2)
    whole_ticks(ax, sorted({point[0] for points in lines.values() for point in points}))


def loss(report: Report, ax: Any = None) -> Any:
    """The training loss of a distillation against its steps, and the held-out loss before and after.

    Args:
        report: of `bitdelta distill`, or what `bitdelta.distill` returns.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax.

    Raises:
        ValueError: a report without a curve.
    """
    curve = report.get("curve")
    if not isinstance(curve, list) or not curve or not all(map(_is_number, curve)):
        raise ValueError("report: it has no curve; expected one of `bitdelta distill --json`")
    ax = axes(ax)
    kind = {"mse": "MSE of the " + report.get("target", "logits"), "kl": "KL divergence (nats per token)"}
    ax.plot(
        range(1, len(curve) + 1), curve, color=COLOURS[0], linewidth=1.2, label="training rows, each step"
    )
    ends = (("before", ":"), ("after", "--"))
    for end, dash in ends:
        value = report.get(f"held_out_{end}")
        if value is not None:
            ax.axhline(value, color="black", linestyle=dash, linewidth=1.2, label=f"held-out rows, {end}")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if _spans(curve):
        plain_log(ax, "y")
    return finish(ax, "step", kind.get(report.get("loss", ""), "loss"), "Distillation of the scales")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def rows_of(report: Report, key: str) -> list[Report]:
    """The rows of a study or a benchmark."""
    rows = report.get("rows")
    if key not in report or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"report: expected one with {key!r} and 'rows', as --json prints it, got keys {sorted(report)}"
        )
    return rows
