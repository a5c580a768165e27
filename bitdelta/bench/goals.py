"""What each row should reach, whether it did, and how a row is shown.

A goal is a largest time relative to the dense product ("ratio"), a least share of the read bandwidth ("share"),
or a largest multiple ("times"), number ("bytes") or time ("microseconds"). Machines differ: without AMX many rows of
one tenant are dearer, and Zen 5 reads its memory so fast that a delta's product is bound by arithmetic.
"""

from __future__ import annotations

from typing import Any

from .machine import is_zen5

COLUMNS = ("case", "", ">us", ">spread", ">GB/s", ">of read", ">against", ">goal", "")
NAMES = {
    "dense": "dense product, {rows} row{s}",
    "16 dense": "16 dense products, 1 row each",
    "delta": "delta product, {rows} row{s} of one tenant",
    "transposed": "transposed delta product, 1 row",
    "fused": "base + 16 tenants x 1 row, fused",
    "exact": "base + delta, {rows} rows, exact",
    "merged": "base + delta, {rows} rows, merged",
    "read": "reading two weights",
    "extract": "extraction + packing",
    "checksum": "extraction + packing + checksum",
    "expand": "expansion: base + delta",
    "overhead": "bitdelta.ops.linear, beyond the extension's call",
    "load": "loading a packfile",
    "swap": "hot-swap: load a delta and read it, cached",
    "swap cold": "hot-swap: load a delta and read it, from disk",
    "compress": "compress, whole command",
    "maps": "reading the same maps the first time",
    "memory": "compress, peak memory beyond the page cache",
}


def judge(row: dict[str, Any], facts: dict[str, Any], quick: bool = False) -> dict[str, Any]:
    """The row with its name, `goal` (text or None) and `met` (None: no goal, or a quick run's figure)."""
    name = NAMES[row["kind"]].format(rows=row.get("rows"), s="" if row.get("rows") == 1 else "s")
    found = _goal(row, facts)
    if found is None:
        return {**row, "case": name, "goal": None, "met": None}
    measure, limit = found
    value = row[measure]
    met = value >= limit if measure == "share" else value <= limit
    return {**row, "case": name, "goal": _GOAL_TEXT[measure](limit), "met": None if quick else bool(met)}


def _goal(row: dict[str, Any], facts: dict[str, Any]) -> tuple[str, float] | None:
    kind, isa, many = row["kind"], row.get("variant"), row.get("threads", 1) > 1
    zen5, wide = is_zen5(facts), isa in ("avx512", "amx")
    fixed = {"load": ("bytes", 0.0), "memory": ("times", 3.0), "compress": ("share", 0.7)}
    fixed["overhead"] = "microseconds", 10.0
    if kind in fixed:
        return fixed[kind]
    if isa in ("generic", "neon"):
        return None
    if kind == "delta":
        limit = _delta_goal(row["rows"], str(isa), many, zen5)
        return None if limit is None else ("ratio", limit)
    if kind == "fused":
        return "ratio", 1 / (6 if not zen5 else 5.5 if many else 4.5)
    if kind in ("exact", "merged"):
        return "ratio", 1.8 if kind == "exact" else 1.3
    if kind == "extract":
        return "share", 0.9 if wide else 0.8
    return None


def _delta_goal(rows: int, isa: str, many: bool, zen5: bool) -> float | None:
    if rows == 1:
        one, several, one_zen5 = (1 / 8, 1 / 7, 1 / 4) if isa == "avx2" else (1 / 11, 1 / 10, 1 / 7)
        return several if many else one_zen5 if zen5 else one
    if isa == "amx":
        return {4: 1 / 6, 16: 1 / 6, 64: 1 / 2}.get(rows)
    return {4: 1 / 3, 16: 1 / 2}.get(rows)


def not_measured(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """The goals that this machine cannot show."""
    seen = {row.get("variant") for row in rows}
    lines = []
    if not seen & {"avx512", "amx"}:
        lines.append("delta product, 1 row a tenant, AVX-512 (goal 1/11): not measured here (no AVX-512)")
        lines.append("extraction + packing, AVX-512 (goal 90%): not measured here (no AVX-512)")
    if "avx2" not in seen:
        lines.append("delta product, 1 row a tenant, AVX2 (goal 1/8): not measured here (no AVX2)")
        lines.append("extraction + packing, AVX2 (goal 80%): not measured here (no AVX2)")
    if "amx" not in seen:
        lines.append("4 and 16 rows of one tenant, AMX (goal 1/6): not measured here (no AMX)")
        lines.append("64 rows of one tenant, AMX (goal 1/2): not measured here (no AMX)")
    if facts.get("torch") is None:
        lines.append("the dense products of PyTorch: not measured here (PyTorch is not installed)")
        lines.append(f"{NAMES['overhead']} (goal 10 us): not measured here (PyTorch is not installed)")
    return [*lines, *files_not_measured(rows)]


def files_not_measured(rows: list[dict[str, Any]]) -> list[str]:
    """What this system does not show of files."""
    kinds = {row["kind"] for row in rows}
    why = {"load": "no /proc", "memory": "no /proc", "swap cold": "the page cache keeps the file"}
    return [
        f"{NAMES[kind]}: not measured here ({reason})" for kind, reason in why.items() if kind not in kinds
    ]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """How many goals were met, and each that was missed."""
    judged = [row for row in rows if row["met"] is not None]
    missed = [row for row in judged if not row["met"]]
    if not judged:
        return []
    lines = [f"{len(judged) - len(missed)} of {len(judged)} goals met"]
    for row in missed:
        where = section(row).split(" (")[0]
        shown = cells(row)
        got = next(text for text in (shown[6], shown[5], f"{shown[2]} us") if text)
        lines.append(
            f"  missed: {row['case']}, {row.get('variant') or ''} {where}: {got}, goal {row['goal']}"
        )
    return lines


def section(row: dict[str, Any]) -> str:
    if "shape" not in row:
        return "calls" if row["kind"] == "overhead" else "files"
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    shape = " x ".join(map(str, row["shape"]))
    return f"{shape}, {threads} (reads {row['bandwidth'] / 1e9:.1f} GB/s)"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, in the order of COLUMNS."""
    rate, share, ratio = row.get("bytes_per_second"), row.get("share"), row.get("ratio")
    against = _GOAL_TEXT["ratio"](ratio)[3:] if ratio else ""
    if "times" in row:
        against = f"{row['times']:.2f} x the largest tensor"
    if row["kind"] == "load":
        against = f"{row['bytes']:,} bytes copied"
    return [
        row["case"],
        row.get("variant", ""),
        f"{row['microseconds']:,.0f}" if row.get("microseconds") else "",
        f"{row['spread']:.0%}" if row.get("spread") is not None else "",
        f"{rate / 1e9:.1f}" if rate else "",
        f"{share:.0%}" if share else "",
        against,
        row["goal"] or "",
        "" if row["met"] is None else "met" if row["met"] else "missed",
    ]


_GOAL_TEXT = {
    "ratio": lambda limit: f"<= 1/{1 / limit:.3g}" if limit < 0.95 else f"<= {limit:.3g}x",
    "share": lambda limit: f">= {limit:.0%}",
    "times": lambda limit: f"<= {limit:g} x",
    "bytes": lambda limit: f"{limit:g} bytes",
    "microseconds": lambda limit: f"<= {limit:g} us",
}
