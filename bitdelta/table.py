"""Tables for the terminal: rich's where stdout is a terminal and rich is there, else plain columns."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator, Sequence


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", pretty: bool | None = None
) -> Iterator[str]:
    """The lines of a table.

    Args:
        columns: titles; one that starts with ">" is aligned to the right.
        rows: cells.
        title: a line above the table.
        pretty: with rich's frames and colours; None: when stdout is a terminal.
    """
    if pretty is None:
        pretty = sys.stdout.isatty()
    if pretty:
        try:
            yield from _rich(columns, rows, title)
            return
        except ImportError:
            pass
    yield from _plain(columns, rows, title)


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Iterator[str]:
    if title:
        yield title
    titles = [column.removeprefix(">") for column in columns]
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        cells = (
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Iterator[str]:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    picture = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold")
    for column in columns:
        right = column.startswith(">")
        picture.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    for row in rows:
        picture.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    text = io.StringIO()
    width = max(80, shutil.get_terminal_size().columns)
    Console(file=text, force_terminal=True, width=width, highlight=False).print(picture)
    yield from text.getvalue().splitlines()


_STYLES = {"met": "green", "missed": "bold red", "base": "dim"}
