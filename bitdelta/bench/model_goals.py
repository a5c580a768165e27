"""What decoding for many tenants should reach, and how its rows are shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..table import table

TENANTS = 16  # the goals of speed and memory are those of as many
SPEED, MEMORY, BASE_ROWS = (
    4.0,
    6.0,
    0.95,
)  # times the merged models' tokens/s, 1/bytes; of the plain model's tokens/s
LOAD, BESIDE = 3.0, 1.1  # times mapping and copying; times the step without loads
COLUMNS = ("case", ">tenants", ">ms a step", ">spread", ">tokens/s", ">GB", ">speed", ">memory")
NAMES = {
    "merged": "merged models in turn",
    "deltas": "deltas, one batch",
    "base rows": "base rows of DeltaModel",
    "plain": "the plain model",
    "lora": "LoRA r={rank}, one batch",
    "peft": "LoRA r={rank} by PEFT",
}


def goals(rows: list[dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """Each goal with `value`, `limit` and `met` (None in a quick run, and of fewer than TENANTS)."""
    most = max(row["tenants"] for row in rows if "tenants" in row)
    found = {(row["kind"], row.get("tenants")): row for row in rows}
    deltas, merged, base = (found[kind, most] for kind in ("deltas", "merged", "base rows"))
    load, beside = found["load", None], found["beside", None]
    times, few = merged["bytes"] / deltas["bytes"], most < TENANTS
    cases = [
        (
            f"tokens/s of {most} tenants, times {most} merged models in turn",
            deltas["speed"],
            SPEED,
            True,
            few,
        ),
        (f"memory of {most} merged models, times that batch's", times, MEMORY, True, few),
        ("tokens/s of base rows, times the plain model's", base["speed"], BASE_ROWS, True, False),
        ("hot-load, times mapping the file and copying what is whole", load["times"], LOAD, False, False),
        ("a batch's step beside loads, times without", beside["times"], BESIDE, False, False),
    ]
    return [
        {
            "goal": name,
            "value": value,
            "limit": limit,
            "met": None if quick or is_open else bool(value >= limit if is_least else value <= limit),
            "sign": ">=" if is_least else "<=",
        }
        for name, value, limit, is_least, is_open in cases
    ]


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The limits, the table and the goals as lines of text."""
    limits, rows = report["limits"], report["rows"]
    threads = "1 thread" if limits["threads"] == 1 else f"{limits['threads']} threads"
    yield (
        f"limits, {threads}: reads {limits['bandwidth'] / 1e9:.1f} GB/s, {limits['flops'] / 1e9:.0f} GFLOP/s in fp32"
    )
    yield (
        f"so {report['tenants']} merged models at the read bandwidth, against one base product for all rows at that "
        f"peak, would take {limits['best_ratio']:.1f} times as long, the deltas' own work left out"
    )
    yield ""
    title = f"{report['shape']}, {report['layers']} layers, bf16, {report['context']} tokens in the cache"
    yield from table(COLUMNS, [_cells(row, rows) for row in rows if "speed" in row], title)
    yield ""
    for row in rows:
        if row["kind"] == "load":
            yield (
                f"a hot-load takes {row['microseconds'] / 1e3:.1f} ms; mapping its file and copying what is stored "
                f"whole takes {row['floor'] / 1e3:.1f} ms"
            )
        elif row["kind"] == "resident":
            yield f"resident memory grew by {row['bytes'] / 1e9:.2f} GB for base and {row['tenants']} deltas, all read"
    yield ""
    for goal in report["goals"]:
        verdict = "" if goal["met"] is None else "met: " if goal["met"] else "MISSED: "
        whose = f" of {TENANTS} tenants" if goal["met"] is None and not report["quick"] else ""
        yield f"{verdict}{goal['goal']}: {goal['value']:.2f}, goal{whose} {goal['sign']} {goal['limit']:g}"


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    merged = next(r for r in rows if r["kind"] == "merged" and r["tenants"] == row["tenants"])
    is_base = row["kind"] in ("base rows", "plain")
    speed = merged["microseconds"] / row["microseconds"]
    return [
        NAMES[row["kind"]].format(rank=row["rank"]),
        str(row["tenants"]),
        f"{row['microseconds'] / 1e3:.1f}",
        f"{row['spread']:.0%}",
        f"{row['tokens_per_second']:.1f}",
        f"{row['bytes'] / 1e9:.2f}",
        f"{speed:.2f}x",
        "" if is_base else f"1/{merged['bytes'] / row['bytes']:.1f}",
    ]
