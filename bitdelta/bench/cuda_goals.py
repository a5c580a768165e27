"""What `bench cuda` should reach on an H200, whether it did, and how its rows are shown.

A goal is judged by rows of a report; where a row is missing it is "not measured", and says why if that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..table import table
from .cuda_cases import (
    CUBLAS,
    DELTA,
    DENSE,
    EVEN,
    EXTRACTION,
    HOST,
    MERGED,
    MODEL,
    NAMES,
    ORIGINAL,
    OURS,
    PREFILL,
    TRAINING,
    TUNED,
    WHOLE,
    Problem,
)

ENOUGH_BITS = 50_000_000  # bytes: a delta's product whose time is that of reading them
PREFILL_ROWS, TRAINING_ROWS = 2048, 512
Row = dict[str, Any]
COLUMNS = ("case", "by", ">us", ">spread", ">eager us", ">GB/s", ">of read", ">times ours")


class Rows:
    """A report's rows, found by what they are."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def all(self, **what: Any) -> list[Row]:
        return [row for row in self.rows if all(row.get(key) == value for key, value in what.items())]

    def one(self, **what: Any) -> Row | None:
        found = self.all(**what)
        return found[0] if found else None

    def layer(self, by: tuple[str, ...], **what: Any) -> float | None:
        """Microseconds of the four linears of a 7B layer, each by the fastest of `by`; None if one is missing."""
        total = 0.0
        for name in NAMES:
            times = [
                row["microseconds"]
                for each in by
                for row in self.all(
                    model="7B", linear=name, by=each, mix=EVEN, planes=1, columns=False, **what
                )
            ]
            if not times:
                return None
            total += min(times)
        return total


@dataclass(frozen=True)
class Goal:
    case: str
    limit: float
    is_least: bool
    unit: str  # as in the text: "{:.0%} of read bandwidth"
    value: Callable[[Rows], float | None]


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _delta_share(n_rows: int) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        found = rows.all(kind=DELTA, by=OURS, rows=n_rows, planes=1, columns=False)
        shares = [row["share"] for row in found if row["bits_bytes"] >= ENOUGH_BITS]
        return min(shares, default=None)

    return value


def _layer_share(rows: Rows) -> float | None:
    what = {"kind": WHOLE, "tenants": 16, "rows": 1}
    time = rows.layer((OURS,), **what)
    roofs = [rows.one(model="7B", linear=name, by=OURS, mix=EVEN, **what) for name in NAMES]
    return _ratio(sum(row["roofline_microseconds"] for row in roofs if row), time) if time else None


def _against(kind: str, by: tuple[str, ...], tenants: int) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        what = {"kind": kind, "tenants": tenants, "rows": 1}
        return _ratio(rows.layer(by, **what), rows.layer((OURS,), **what))

    return value


def _added(rows: Rows) -> float | None:
    added = []
    for name in NAMES:
        what = {"kind": WHOLE, "model": "7B", "linear": name, "tenants": 1}
        ours, base = (rows.one(by=by, **what) for by in (OURS, CUBLAS))
        if ours is None or base is None:
            return None
        added.append(ours["microseconds"] - base["microseconds"])
    return max(added)


def _prefill(by: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        what = {"kind": PREFILL, "tenants": 1, "rows": PREFILL_ROWS}
        return _ratio(rows.layer((CUBLAS,), **what), rows.layer((by,), **what))

    return value


def _training(rows: Rows) -> float | None:
    what = {"kind": TRAINING, "tenants": 1, "rows": TRAINING_ROWS}
    return _ratio(rows.layer((OURS,), **what), rows.layer((CUBLAS,), **what))


def _extraction(rows: Rows) -> float | None:
    return min((row["copy_share"] for row in rows.all(kind=EXTRACTION, by=OURS)), default=None)


def _host(rows: Rows) -> float | None:
    row = rows.one(kind=HOST, by=OURS)
    return None if row is None else row["microseconds"]


def _model_memory(rows: Rows) -> float | None:
    found = rows.all(kind=MODEL, by=OURS)
    return max((row["added_share"] for row in found if "added_share" in row), default=None)


GOALS = (
    Goal(
        "delta only, 1 row a tenant, >= 50 MB of bits",
        0.85,
        True,
        "{:.0%} of read bandwidth",
        _delta_share(1),
    ),
    Goal("delta only, 8 rows a tenant", 0.65, True, "{:.0%} of read bandwidth", _delta_share(8)),
    Goal("base + 16 tenants, Llama-2-7B layer", 0.80, True, "{:.0%} of the summed roofline", _layer_share),
    Goal("against the best dense alternative, 16 tenants", 6.5, True, "{:.3g}x", _against(WHOLE, DENSE, 16)),
    Goal("against the best dense alternative, 64 tenants", 10.5, True, "{:.3g}x", _against(WHOLE, DENSE, 64)),
    Goal(
        "against the original's Triton kernel, 16 tenants",
        8.0,
        True,
        "{:.3g}x",
        _against(DELTA, (ORIGINAL,), 16),
    ),
    Goal("against the tuned Triton W1A16, 16 tenants", 1.5, True, "{:.3g}x", _against(DELTA, (TUNED,), 16)),
    Goal("1 tenant, time added to a 7B linear", 3.0, False, "{:.3g} us", _added),
    Goal("prefill 2048 rows, one tenant, merged", 0.80, True, "{:.0%} of plain cuBLAS", _prefill(MERGED)),
    Goal("prefill 2048 rows, one tenant, exact", 0.45, True, "{:.0%} of plain cuBLAS", _prefill(OURS)),
    Goal("dX + scale gradient, 512 rows", 2.3, False, "{:.3g}x dense dX", _training),
    Goal("extraction", 0.88, True, "{:.0%} of copy bandwidth", _extraction),
    Goal("host overhead of an eager call without the dispatcher", 8.0, False, "{:.3g} us", _host),
    Goal("whole model: memory added by a tenant", 1 / 12, False, "{:.3f} of a model", _model_memory),
)


def judge(rows: list[Row], quick: bool = False) -> list[dict[str, Any]]:
    """Each goal with `value`, and `met`: None where not measured, or measured by a quick run."""
    found, judged = Rows(rows), []
    for goal in GOALS:
        value = goal.value(found)
        met = None
        if value is not None and not quick:
            met = bool(value >= goal.limit if goal.is_least else value <= goal.limit)
        text = (">= " if goal.is_least else "<= ") + goal.unit.format(goal.limit)
        judged.append(
            {
                "case": goal.case,
                "goal": text,
                "limit": goal.limit,
                "value": value,
                "text": "not measured" if value is None else goal.unit.format(value),
                "met": met,
            }
        )
    return judged


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows, those of a problem that we have timed too with `ratio`: their time over ours."""
    ours = {_problem(row): row["microseconds"] for row in rows if row["by"] == OURS}
    return [
        {**row, "ratio": row["microseconds"] / ours[_problem(row)]} if _problem(row) in ours else row
        for row in rows
    ]


def _problem(row: Row) -> tuple[Any, ...]:
    keys = ("kind", "model", "linear", "tenants", "rows", "mix", "planes", "columns")
    return tuple(row.get(key) for key in keys)


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    facts, limits = report["machine"], report.get("limits")
    yield f"{facts['gpu']}, {facts['processors']} processors, {facts['memory_gb']:.0f} GB, driver {facts['driver']}"
    yield f"bitdelta {facts['bitdelta']} ({facts['build']}), torch {facts['torch']}, Triton {facts['triton'] or 'no'}"
    if limits:
        yield (
            f"reads {limits['read'] / 1e9:,.0f} GB/s ({limits['reader']}), copies {limits['copy'] / 1e9:,.0f} GB/s, "
            f"{limits['rate'] / 1e12:,.0f} TFLOP/s in bf16"
        )
    for kind in dict.fromkeys(row["kind"] for row in report["rows"]):
        yield ""
        yield from table(COLUMNS, [cells(row) for row in report["rows"] if row["kind"] == kind], kind)
    yield ""
    goals = [(goal["case"], goal["goal"], goal["text"], said(goal)) for goal in report["goals"]]
    yield from table(("goal", ">", ">here", ""), goals, "")
    for title in ("not_measured", "failed"):
        for line in report.get(title, ()):
            yield f"{title.replace('_', ' ')}: {line}"
    yield ""
    if report["quick"]:
        yield "--quick: a subset with few samples; no goal is judged"
    yield (
        "us: medians of replays of a CUDA graph that goes through all sets; spread: half the distance of the 20th and"
        " 80th percentiles"
    )
    yield f"the run took {report['seconds']} s"


def said(goal: dict[str, Any]) -> str:
    return "" if goal["met"] is None else "met" if goal["met"] else "missed"


def cells(row: Row) -> list[str]:
    """A row of the table, in the order of COLUMNS."""
    eager, rate, share, ratio = (
        row.get(key) for key in ("eager_microseconds", "bytes_per_second", "share", "ratio")
    )
    return [
        case_of(row),
        row["by"],
        f"{row['microseconds']:,.1f}",
        f"{row['spread']:.0%}",
        f"{eager:,.1f}" if eager else "",
        f"{rate / 1e9:,.0f}" if rate else "",
        f"{share:.0%}" if share else "",
        f"{ratio:.2f}" if ratio else "",
    ]


def case_of(row: Row) -> str:
    """What was multiplied, in a few words."""
    if row["kind"] in (HOST, MODEL):
        return str(row["case"])
    if row["kind"] == EXTRACTION:
        return f"{row['N']} x {row['K']} {row['dtype']}"
    tenants, rows = row["tenants"], row["rows"]
    words = [
        row["model"],
        row["linear"],
        f"{tenants} tenant{'s' * (tenants > 1)} x {rows} row{'s' * (rows > 1)}",
    ]
    words += [row["mix"]] if row["mix"] != EVEN else []
    words += [f"{row['planes']} planes"] if row["planes"] > 1 else []
    return ", ".join([" ".join(words), *(["column scales"] if row["columns"] else [])])


def name_of(problem: Problem) -> str:
    """A problem in a few words."""
    return f"{problem.kind}, {case_of(problem.about)}"
