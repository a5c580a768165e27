"""Figures by case: rates beside what memory and disk allow, what fitting costs, what the demonstration found."""

from __future__ import annotations

from typing import Any

from .curves import Report, rows_of
from .style import COLOURS, axes, finish, line_style, plain_log, write_value

SHADES = ("#22456b", "#5a83ad", "#9db8d6", "#d9e4f0")  # told apart in grey
PARTS = {
    "inputs": "sums of the inputs' products",
    "factor": "their factor",
    "fit": "the fit",
    "held_out": "held-out error",
}


def rates(report: Report, ax: Any = None) -> Any:
    """GB/s of loading, compressing and extracting, beside what memory and disk allow.

    Args:
        report: of `bitdelta bench io` or `bench cpu`; of the latter the run with the most threads, its first shape.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax.

    Raises:
        ValueError: another report.
    """
    rows = [row for row in rows_of(report, "suite") if row.get("bytes_per_second") and "case" in row]
    if not rows or "limits" not in report:
        raise ValueError("report: it has no rates and limits; expected one of `bitdelta bench io --json`")
    timed = [row for row in rows if "threads" in row]
    if timed:
        most, shape = max(row["threads"] for row in timed), timed[0]["shape"]
        timed = [r for r in timed if r["threads"] == most and r["shape"] == shape and r["kind"] in KERNELS]
    shown = [*timed, *(row for row in rows if "threads" not in row)]
    memory, disk = [limit for limit in report["limits"] if "bandwidth" in limit][-1], report["limits"][-1]
    bars = [("memory: reading", memory["bandwidth"], True)]
    bars += [(f"disk: {what}", disk[key], True) for key, what in DISK.items() if disk.get(key)]
    bars += [(_name(row), row["bytes_per_second"], False) for row in shown]
    ax = axes(ax)
    for i, (_, rate, is_limit) in enumerate(bars):
        ax.barh(
            i,
            rate / 1e9,
            color="white" if is_limit else SHADES[2],
            edgecolor=COLOURS[0],
            hatch="///" * is_limit,
        )
        write_value(ax, rate / 1e9, rate / 1e9, i)
    ax.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.12 * max(rate for _, rate, _ in bars) / 1e9)
    quick = " (--quick: figures mean nothing)" if report.get("quick") else ""
    finish(ax, "GB/s", "", f"What memory and disk allow (hatched), and what is reached{quick}", legend=False)
    ax.grid(False, axis="y")
    return ax


DISK = {"write": "writing", "read": "reading"}
KERNELS = ("dense", "delta", "extract", "expand")


def _name(row: Report) -> str:
    return f"{row['case']}, {row['variant']}" if row.get("variant") else str(row["case"])


def fitting(report: Report, ax: Any = None) -> Any:
    """Seconds of fitting a weight or a model without gradients, by part, against 100 steps of distillation.

    Args:
        report: of `bitdelta bench calibrate`.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax.

    Raises:
        ValueError: another report.
    """
    rows = [row for row in rows_of(report, "suite") if "distillation_seconds" in row]
    if not rows:
        raise ValueError("report: it has no fits; expected one of `bitdelta bench calibrate --json`")
    ax, labels = axes(ax), set()
    for i, row in enumerate(rows):
        left = 0.0
        for (part, name), shade in zip(PARTS.items(), SHADES, strict=True):
            if part in row:
                label = None if name in labels else name
                labels.add(name)
                ax.barh(i - 0.2, row[part], 0.36, left, color=shade, edgecolor=COLOURS[0], label=label)
                left += row[part]
        if not left:
            ax.barh(
                i - 0.2, row["seconds"], 0.36, color="white", edgecolor=COLOURS[0], label="all of calibrate"
            )
        steps = None if i else "100 steps of distillation"
        ax.barh(
            i + 0.2,
            row["distillation_seconds"],
            0.36,
            color="white",
            edgecolor=COLOURS[0],
            hatch="///",
            label=steps,
        )
        for y, seconds in ((i - 0.2, row["seconds"]), (i + 0.2, row["distillation_seconds"])):
            write_value(ax, seconds, seconds, y)
    ax.set_yticks(range(len(rows)), [row["case"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max(max(row["seconds"], row["distillation_seconds"]) for row in rows))
    threads = f"{report['threads']} thread{'s' * (report['threads'] != 1)}"
    quick = " (--quick: figures mean nothing)" if report.get("quick") else ""
    finish(ax, "seconds", "", f"Fitting without gradients against distillation, {threads}{quick}")
    ax.grid(False, axis="y")
    return ax


def demo(report: Report, ax: Any = None) -> Any:
    """Logit MSE against the fine-tune of each way to pack it, a marker for each fine-tune.

    Args:
        report: of `bitdelta demo`.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax.

    Raises:
        ValueError: another report.
    """
    tasks = report.get("finetunes")
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError("report: it has no fine-tunes; expected one of `bitdelta demo --json`")
    ax = axes(ax)
    names: list[str] = []
    for i, (task, found) in enumerate(tasks.items()):
        rows = [row for row in found["rows"] if "logit_mse" in row]  # all but the fine-tune itself
        names = [row["model"] for row in rows]
        style = {**line_style(i), "linestyle": ""}
        ax.plot(
            [row["logit_mse"] for row in rows], range(len(rows)), label=f"{task}: {found['text']}", **style
        )
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    plain_log(ax, "x")
    finish(ax, "logit MSE against the fine-tune", "", "Three fine-tunes at 1 bit per weight", legend=False)
    ax.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.16))
    return ax
