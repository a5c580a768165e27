"""What objects look like in Jupyter: a heading, facts and a table as HTML, every text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

MOST = 20  # rows of a table


def panel(
    title: str,
    facts: Mapping[str, str],
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
) -> str:
    """HTML of an object.

    Args:
        title: its class and name.
        facts: label -> value.
        columns: of the table; none: no table.
        rows: their cells, as text; of more than MOST the first ones are shown.
    """
    parts = [f"<div><strong>{escape(title)}</strong>"]
    lines = (f"<tr><td>{escape(label)}</td><td>{escape(value)}</td></tr>" for label, value in facts.items())
    parts.append(f"<table>{''.join(lines)}</table>")
    if columns and rows:
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows[:MOST])
        parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>")
        if len(rows) > MOST:
            parts.append(f"<p>and {len(rows) - MOST} more</p>")
    return "".join([*parts, "</div>"])


def size(count: float) -> str:
    """Bytes as text: 1,234 bytes, 1.23 MB."""
    for unit, large in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= large:
            return f"{count / large:.2f} {unit}"
    return f"{count:,.0f} bytes"
