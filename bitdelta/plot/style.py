"""Axes, and lines that stay apart without colour: each has a marker and a dash of its own."""

from __future__ import annotations

from typing import Any

from ..errors import Error

COLOURS = (
    "#1b4f8a",
    "#c44e14",
    "#2f7d4f",
    "#6b3fa0",
    "#8a6d1b",
    "#444444",
    "#1b8a86",
    "#a03f6b",
)  # dark on white
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
MOST_INSIDE = 4  # lines whose legend is inside the picture


def axes(ax: Any) -> Any:
    """The axes given, or those of a new figure.

    Raises:
        bitdelta.Error: matplotlib is missing.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise missing(error) from error
    return pyplot.subplots(layout="constrained")[1]


def missing(error: ImportError) -> Error:
    return Error(f"plots need matplotlib ({error}): pip install 'bitdelta[plot]'")


def line_style(i: int) -> dict[str, Any]:
    """Of the i-th line."""
    n = i % len(COLOURS)
    return {
        "color": COLOURS[n],
        "marker": MARKERS[n],
        "linestyle": DASHES[n],
        "markersize": 5,
        "linewidth": 1.5,
    }


def finish(ax: Any, x: str, y: str, title: str, legend: bool = True) -> Any:
    """Labels, a light grid and, with two lines or more, the legend."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize="medium", wrap=True)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    count = len(ax.get_legend_handles_labels()[1])
    if legend and count > MOST_INSIDE:
        ax.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif legend and count > 1:
        ax.legend(fontsize="small", frameon=False)
    return ax


def write_value(ax: Any, value: float, x: float, y: float) -> None:
    """Three digits, beside the mark that ends at (x, y)."""
    ax.annotate(f"{value:.3g}", (x, y), (4, 0), textcoords="offset points", va="center", fontsize="small")


def whole_ticks(ax: Any, values: list[int], labels: list[str] | None = None) -> None:
    """A tick at each of these x, and none between."""
    ax.set_xticks(values, labels or [str(value) for value in values])
    ax.minorticks_off()


def plain_log(ax: Any, name: str) -> None:
    """Makes the axis "x" or "y" logarithmic, with plain numbers where it spans few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(ax, f"set_{name}scale")("log")
    axis = getattr(ax, f"{name}axis")
    low, high = axis.get_view_interval()
    if 0 < low and high / low < 300:
        subs = (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
