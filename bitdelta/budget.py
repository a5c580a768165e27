"""Spends a budget of bits: per tensor the scale form and the planes, so that the measured error of all is least.

    candidates                  of a tensor: form, planes (0: the base's values), bytes in the file, error (measure.py)
    convex hulls                steps from each tensor's smallest candidate, first what saves most error per byte
    single changes, exchanges   of one tensor, or of one for another, as long as any lowers the error and fits

Errors of different tensors are taken to add up. Everything is deterministic; ties go to the tensor that comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXCHANGED = 4096  # candidates in all up to which pairs of changes are tried
LOST = 0.1  # of what the fine-tune changes through an average tensor: more left is too much


@dataclass(frozen=True)
class Candidate:
    """One way to store a tensor: `error` is the mean squared change of the logits that it leaves."""

    form: str
    planes: int
    nbytes: int
    error: float


Choice = dict[str, Candidate]


def choose(tensors: Mapping[str, Sequence[Candidate]], most: int) -> Choice:
    """A candidate for every tensor, of at most `most` bytes together.

    Raises:
        ValueError: even the smallest candidates take more.
    """
    names = list(tensors)
    options = [_useful(tensors[name]) for name in names]
    at = [0] * len(names)
    left = most - sum(option[0].nbytes for option in options)
    if left < 0:
        raise ValueError(f"budget: the smallest forms take {most - left:,} bytes, it allows {most:,}")
    if names:
        _change(options, at, _climb(options, at, left))
    return {name: option[i] for name, option, i in zip(names, options, at, strict=True)}


def too_large(effects: Mapping[str, float], left: Mapping[str, float]) -> list[str]:
    """Names of tensors that still change the logits by more than `LOST` of what an average tensor's delta does.

    Args:
        effects: per tensor the mean squared change of the logits that its delta makes.
        left: what its stored form leaves of it.
    """
    limit = LOST * sum(effects.values()) / max(len(effects), 1)
    return [name for name in effects if left[name] > limit]


def _useful(candidates: Sequence[Candidate]) -> list[Candidate]:
    """By rising bytes and falling error, those that no other beats."""
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nbytes, c.error)):
        if not found or candidate.error < found[-1].error:
            found.append(candidate)
    return found


def _hull(option: list[Candidate]) -> list[int]:
    """The candidates on the lower convex hull."""
    hull: list[int] = []
    for i in range(len(option)):
        while len(hull) > 1 and _slope(option, hull[-2], hull[-1]) <= _slope(option, hull[-2], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(option: list[Candidate], a: int, b: int) -> float:
    """Error saved per byte."""
    return (option[a].error - option[b].error) / (option[b].nbytes - option[a].nbytes)


def _climb(options: list[list[Candidate]], at: list[int], left: int) -> int:
    """Takes the steps of all hulls by falling slope; a tensor whose step does not fit stays. Bytes left."""
    steps = []
    for t, option in enumerate(options):
        hull = _hull(option)
        for i, (a, b) in enumerate(zip(hull, hull[1:], strict=False)):
            steps.append((-_slope(option, a, b), t, i, a, b))
    stopped: set[int] = set()
    for _, t, _, a, b in sorted(steps):
        size = options[t][b].nbytes - options[t][a].nbytes
        if t in stopped or size > left:
            stopped.add(t)
            continue
        at[t], left = b, left - size
    return left


def _change(options: list[list[Candidate]], at: list[int], left: int) -> None:
    """Changes one tensor, or two at once, to what lowers the error most, until nothing does."""
    owner = np.array([t for t, option in enumerate(options) for _ in option])
    index = np.array([i for option in options for i in range(len(option))])
    sizes = np.array([c.nbytes for option in options for c in option], np.int64)
    errors = np.array([c.error for option in options for c in option])
    first = np.concatenate([[0], np.cumsum([len(option) for option in options])])[:-1]
    while True:
        now = first + np.array(at, np.int64)
        more, saved = sizes - sizes[now][owner], errors[now][owner] - errors
        moves = _best(owner, more, saved, left, len(owner) <= EXCHANGED)
        if not moves:
            return
        for move in moves:
            at[owner[move]] = int(index[move])
            left -= int(more[move])


def _best(
    owner: NDArray[np.int64],
    more: NDArray[np.int64],
    saved: NDArray[np.float64],
    left: int,
    with_pairs: bool,
) -> list[int]:
    """The one or two candidates that save most and fit into `left` bytes; none where nothing saves."""
    least = 1e-12 * float(np.abs(saved).sum())  # rounding is no gain
    alone = np.where(more <= left, saved, 0)
    best, moves = float(alone.max(initial=0)), [int(alone.argmax())] if len(alone) else []
    for i in np.flatnonzero(saved > 0) if with_pairs else ():
        both = saved[i] + saved
        both[(owner == owner[i]) | (more[i] + more > left)] = 0
        j = int(both.argmax())
        if both[j] > best * (1 + 1e-12):
            best, moves = float(both[j]), [int(i), j]
    return moves if best > least else []
