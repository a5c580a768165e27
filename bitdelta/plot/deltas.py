"""Pictures of a delta: errors of its layers, its scales, and what a low rank of the same bytes would explain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..packfile import Packfile
from .style import COLOURS, DASHES, axes, finish, line_style, plain_log

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.(.+?)(?:\.weight)?$")
ERRORS = {
    "relative_error": "relative error of the change",
    "output_error": "relative error of the output",
}
MOST_BINS = 60
WIDTHS = 1.2, 2.4  # of histograms: with four dashes each they are told apart in grey
MOST_WRITTEN = 200  # cells that have their figure written on them


def place(name: str) -> tuple[int, str] | None:
    """The layer's number and the projection of a tensor's name, or None outside the layers.

    >>> place("model.layers.3.self_attn.q_proj.weight")
    (3, 'self_attn.q_proj')
    """
    found = LAYER.search(name)
    return (int(found[1]), found[2]) if found else None


def layer_errors(packfile: Packfile, error: str | None = None, ax: Any = None) -> Any:
    """A heat map of errors, layer by projection; white where a tensor has none.

    Args:
        packfile: of `bitdelta.load`.
        error: "relative_error" (of the change) or "output_error" (after `calibrate`); None: the latter where it is.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax.

    Raises:
        ValueError: no such error, or no packed tensor in a layer has one.
    """
    if error is not None and error not in ERRORS:
        raise ValueError(f"error: expected one of {', '.join(ERRORS)}, got {error!r}")
    entries = packfile.entries.items()
    if error is None:
        error = (
            "output_error" if any(e.get("output_error") is not None for _, e in entries) else "relative_error"
        )
    cells = {}
    for name, entry in entries:
        where = place(name)
        if where and "planes" in entry and entry.get(error) is not None:
            cells[where] = float(entry[error])
    if not cells:
        raise ValueError(f"packfile: no packed tensor in a numbered layer has a {error}")
    layers = sorted({layer for layer, _ in cells})
    projections = list(dict.fromkeys(projection for _, projection in cells))
    grid = np.full((len(projections), len(layers)), np.nan)
    for (layer, projection), value in cells.items():
        grid[projections.index(projection), layers.index(layer)] = value
    ax = axes(ax)
    image = ax.imshow(
        grid,
        cmap="Greys",
        vmin=0,
        vmax=1.25 * max(cells.values()) or 1.0,
        aspect="auto",
        interpolation="nearest",
    )
    if grid.size <= MOST_WRITTEN:
        top = np.nanmax(grid)
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                ink = "white" if value > 0.6 * top else "black"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=ink)
    step = max(1, len(layers) // 16)
    ax.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.set_yticks(range(len(projections)), projections, fontsize="small")
    ax.set_xlabel("layer")
    ax.set_ylabel("projection")
    ax.set_title("Error by layer and projection", fontsize="medium")
    ax.figure.colorbar(image, ax=ax, label=ERRORS[error])
    return ax


def scales(packfile: Packfile, plane: int = 0, ax: Any = None) -> Any:
    """Histograms of the scales of one plane, a line for each projection, over all layers.

    Of form rank1 the row scale times the mean of |column scale|.

    Args:
        packfile: of `bitdelta.load`.
        plane: which of them, from 0.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax.

    Raises:
        ValueError: no tensor has such a plane.
    """
    found: dict[str, list[np.ndarray]] = {}
    for name, entry in packfile.entries.items():
        if entry.get("planes", 0) > plane >= 0:
            where = place(name)
            value: Any = packfile[name]  # a Delta, or a tuple of them
            for delta in value if isinstance(value, tuple) else (value,):
                row = np.abs(delta.scale[plane])
                if delta.column is not None:
                    row = row * np.abs(delta.column[plane]).mean()
                found.setdefault(where[1] if where else name.removesuffix(".weight"), []).append(row)
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    joined = {name: values[values > 0] for name, values in joined.items() if (values > 0).any()}
    if not joined:
        raise ValueError(f"plane: expected one that a tensor has a scale above 0 in, got {plane}")
    low = min(values.min() for values in joined.values())
    high = max(values.max() for values in joined.values())
    fewest = min(map(len, joined.values()))
    edges = np.geomspace(low * 0.999, high * 1.001, min(MOST_BINS, 8 + int(fewest**0.5)) + 1)
    ax = axes(ax)
    for i, (name, values) in enumerate(joined.items()):
        share = 100 * np.histogram(values, edges)[0] / len(values)
        n = i % len(COLOURS)
        ax.stairs(share, edges, label=name, color=COLOURS[n], linestyle=DASHES[n], linewidth=WIDTHS[n // 4])
    plain_log(ax, "x")
    planes = (
        f" of plane {plane + 1}" if any(e.get("planes", 1) > 1 for e in packfile.entries.values()) else ""
    )
    return finish(ax, "scale (change of a weight)", "share of rows (%)", f"Scales{planes} by projection")


def equal_rank(n: int, k: int) -> int:
    """The rank of bf16 factors [N, r] and [r, K] within the bytes of one plane: signs, and an fp32 scale a row.

    >>> equal_rank(4096, 4096)
    129
    """
    return max(1, (n * k + 32 * n) // (16 * (n + k)))


def explained(change: np.ndarray) -> np.ndarray:
    """Share of ||d||^2 that the best approximation of rank 1, 2, ... keeps: [min(N, K)]."""
    d = np.asarray(change, np.float64)
    if d.ndim != 2:
        raise ValueError(f"change: expected a matrix [N, K], got {list(d.shape)}")
    gram = d @ d.T if d.shape[0] <= d.shape[1] else d.T @ d
    energy = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
    if not energy.sum() > 0:
        raise ValueError("change: expected one with a value other than 0")
    return np.cumsum(energy) / energy.sum()


def variance(changes: Mapping[str, np.ndarray], ax: Any = None) -> Any:
    """Cumulative explained variance against the rank; a large marker where factors take as many bytes as one plane.

    Args:
        changes: label -> finetuned - base, [N, K]. A LoRA fine-tune reaches 100 % at its rank, a full one does not.
        ax: matplotlib's axes; None: new ones.

    Returns:
        ax.

    Raises:
        ValueError: nothing to draw, or a change that is no matrix or 0.

    Source: BitDelta, arXiv 2402.10193, section 2.
    """
    if not changes:
        raise ValueError("changes: expected at least one, got none")
    curves = {name: (explained(change), equal_rank(*change.shape)) for name, change in changes.items()}
    ax = axes(ax)
    for i, (name, (share, equal)) in enumerate(curves.items()):
        style = line_style(i)
        ranks = np.arange(1, len(share) + 1)
        at = min(equal, len(share))
        ax.plot(ranks, 100 * share, label=f"{name} (r = {at})", **{**style, "marker": ""})
        ax.plot(
            [at],
            [100 * share[at - 1]],
            color=style["color"],
            marker=style["marker"],
            markersize=9,
            linestyle="",
        )
    ax.set_xscale("log", base=2)
    top = max(len(share) for share, _ in curves.values())
    ticks = [1 << i for i in range(top.bit_length())]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(0, 103)
    title = "Explained by a low rank (marks: the bytes of 1 bit)"
    return finish(ax, "rank r", "explained variance of the change (%)", title)
