"""Time of a decoding step or of one linear: reports of `bench model`, `bench latency`, `bench cpu`, `bench cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.cuda_cases import EVEN, OURS, WHOLE
from .curves import Report, cases_of, doubling, rows_of, whose
from .style import axes, finish, line_style, plain_log, whole_ticks

AGAINST = {
    "model": ("tenants",),
    "cuda": ("tenants",),
    "latency": ("tenants", "size"),
    "cpu": ("rows", "size"),
}
PRODUCTS = {"dense": "dense product, the fastest here", "delta": "1-bit delta's product"}
LINEARS = {
    "naive": "a dense product each",
    "deltas": "base + deltas, one call",
    "lora": "base + LoRA r={rank}, gathered",
}
Points = list[tuple[int, float, float]]  # x, microseconds, spread


def latency(
    report: Report,
    against: str | None = None,
    threads: int | None = None,
    at: int | None = None,
    ax: Any = None,
) -> Any:
    """Time of a decoding step against tenants, or of one linear against tenants, rows or the weight's size.

    Args:
        report: of `bitdelta bench model`, `bench cuda`, `bench latency` or `bench cpu`.
        against: "tenants" for the first two; that or "size" (of a square weight) for the third; "rows" (of one
            tenant) or "size" (output rows of the weight, one row of x) for the last. None: the first of these.
        threads: which of the runs of `bench cpu`; None: the one with the most.
        at: of `bench latency`: at which size, or with "size" at how many tenants; None: the most.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax. Bars of error are half the distance of the 20th and 80th percentiles.

    Raises:
        ValueError: another report, or something that it does not have.

    Source of the figure against size and tenants: BitDelta, arXiv 2402.10193, section 4.
    """
    suite = report.get("suite")
    allowed = AGAINST.get(str(suite), AGAINST["cpu"])
    against = allowed[0] if against is None else against
    if against not in allowed:
        raise ValueError(f"against: expected one of {', '.join(allowed)} for this report, got {against!r}")
    if threads is not None and suite != "cpu":
        raise ValueError(f"threads: it is an option of a report of bench cpu, not of bench {suite}")
    if at is not None and suite != "latency":
        raise ValueError(f"at: it is an option of a report of bench latency, not of bench {suite}")
    if suite == "model":
        kinds = cases_of(report, ("merged", "deltas", "lora", "peft", "plain"))
        lines = {name: [_point(row, "tenants") for row in rows] for name, rows in kinds.items()}
        label, title = "tenants, a row each", f"A decoding step, {whose(report)}"
    elif suite == "cuda":
        lines, label, title = _on_gpu(report)
    elif suite == "latency":
        lines, label, title = _linears(report, against, at)
    else:
        lines, label, title = _products(report, against, threads)
    ax = axes(ax)
    for i, (name, points) in enumerate(lines.items()):
        x, y = [p[0] for p in points], [p[1] / 1e3 for p in points]
        ax.errorbar(x, y, [p[1] * p[2] / 1e3 for p in points], label=name, capsize=2, **line_style(i))
    if suite == "cpu" and against == "size":
        whole_ticks(ax, sorted({p[0] for points in lines.values() for p in points}))
        ax.set_ylim(bottom=0)
    else:
        doubling(ax, lines)
        plain_log(ax, "y")
    return finish(ax, label, "time (ms)", title)


def _point(row: Report, x: str) -> tuple[int, float, float]:
    return row[x], row["microseconds"], row["spread"]


def _on_gpu(report: Report) -> tuple[dict[str, Points], str, str]:
    """Base and deltas of the largest linear of Llama-2-7B, ours and by whatever else was measured, ours first."""
    rows = rows_of(report, "suite")
    wanted = {
        "kind": WHOLE,
        "model": "7B",
        "linear": "gate_up",
        "rows": 1,
        "mix": EVEN,
        "planes": 1,
        "columns": False,
    }
    rows = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if not rows:
        raise ValueError(
            "report: it has no products of 7B gate_up; expected one of `bitdelta bench cuda --json`"
        )
    names = dict.fromkeys([OURS, *(row["by"] for row in rows)])
    lines = {name: sorted(_point(row, "tenants") for row in rows if row["by"] == name) for name in names}
    title = f"Llama-2-7B gate_up on {report['machine']['gpu']}{_quick(report)}"
    return {name: points for name, points in lines.items() if points}, "tenants, a row each", title


def _linears(report: Report, against: str, at: int | None) -> tuple[dict[str, Points], str, str]:
    """Naive, deltas and LoRA of one size, or of one number of tenants."""
    rows, other = rows_of(report, "suite"), "size" if against == "tenants" else "tenants"
    had = sorted({row[other] for row in rows})
    at = had[-1] if at is None else at
    if at not in had:
        raise ValueError(f"at: expected one of {', '.join(map(str, had))}, got {at}")
    lines: dict[str, Points] = {}
    for kind, name in LINEARS.items():
        for rank in sorted({row["rank"] or 0 for row in rows if row["kind"] == kind}):
            chosen = [r for r in rows if (r["kind"], r["rank"] or 0, r[other]) == (kind, rank, at)]
            points = [_point(row, against) for row in chosen]
            lines[name.format(rank=rank)] = sorted(points)
    if against == "tenants":
        label, title = "tenants, a row each", f"One linear, {at} x {at}"
    else:
        label, title = (
            "rows and columns of the weight",
            f"One linear, {at} tenant{'s' * (at != 1)}, a row each",
        )
    return lines, label, f"{title}, {_threads(rows[0]['threads'])}{_quick(report)}"


def _products(report: Report, against: str, threads: int | None) -> tuple[dict[str, Points], str, str]:
    """The dense product and the delta's, each by its fastest kernel."""
    rows = [row for row in rows_of(report, "suite") if row.get("kind") in PRODUCTS]
    if not rows:
        raise ValueError("report: it has no products; expected one of `bitdelta bench cpu --json`")
    used = sorted({row["threads"] for row in rows})
    threads = used[-1] if threads is None else threads
    if threads not in used:
        raise ValueError(f"threads: expected one of {', '.join(map(str, used))}, got {threads}")
    rows = [row for row in rows if row["threads"] == threads]
    shapes = sorted({tuple(row["shape"]) for row in rows})
    if against == "rows":
        rows = [row for row in rows if tuple(row["shape"]) == shapes[0]]
        label, title = "rows of x, all of one tenant", f"A weight of {shapes[0][0]} x {shapes[0][1]}"
    else:
        rows = [row for row in rows if row["rows"] == 1]
        widths = ", ".join(str(k) for k in sorted({shape[1] for shape in shapes}))
        label, title = f"output rows of the weight (input columns: {widths})", "One row of x"
    lines = {
        name: _fastest([row for row in rows if row["kind"] == kind], against)
        for kind, name in PRODUCTS.items()
    }
    return lines, label, f"{title}, {_threads(threads)}{_quick(report)}"


def _fastest(rows: Sequence[Report], against: str) -> Points:
    best: dict[int, tuple[int, float, float]] = {}
    for row in rows:
        x = row["rows"] if against == "rows" else row["shape"][0]
        if x not in best or row["microseconds"] < best[x][1]:
            best[x] = x, row["microseconds"], row["spread"]
    return [best[x] for x in sorted(best)]


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _quick(report: Report) -> str:
    return " (--quick: figures mean nothing)" if report.get("quick") else ""
