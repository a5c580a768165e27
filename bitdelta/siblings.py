"""Linears of a model that are given the same input run as one on a GPU: queries, keys and values; gate and up.

transformers calls them one after the other. Which follow which is learnt: in a forward, those that were given the very
same tensor in a row are a group. From the next forward on, the first of a group makes the products of all, with the
bits of calls of their own, and the others find theirs. A group of which one is then given something else, or is not
called, was none, and is not tried again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from . import ops
from .batch import Batch, Rows

if TYPE_CHECKING:
    from .linear_forward import LinearForward, LinearPlan

T: TypeAlias = torch.Tensor


@dataclass
class Input:
    """A tensor as it was: the object, and how often it had been written to."""

    tensor: Callable[[], Any]  # a weak reference
    version: int

    @staticmethod
    def of(x: T) -> Input:
        return Input(weakref.ref(x), x._version)

    def is_still(self, x: T) -> bool:
        return self.tensor() is x and self.version == x._version


@dataclass
class Made:
    """A product that waits for its linear to be called."""

    x: Input
    leader: LinearForward
    out: T


@dataclass
class Shared:
    """Of a batch: the linears given one tensor in a row, and the products made ahead."""

    x: Input | None = None
    group: list[LinearForward] = field(default_factory=list)
    made: dict[int, Made] = field(default_factory=dict)  # by id of the linear


def product(linear: LinearForward, plan: LinearPlan, batch: Batch, x: T, shape: tuple[int, int]) -> T:
    """The product [M, N] of a linear with x [..., K] and its rows' deltas of this shape."""
    flat = x.reshape(-1, x.shape[-1])
    rows = batch.rows_of(len(flat), linear.path, x.device)
    own = _part(linear, plan, shape, rows, flat)
    if torch.is_grad_enabled() or not ops.is_plain(x) or x.is_inference():
        return ops.linear(flat, *own)
    shared = batch.shared = batch.shared or Shared()
    found = shared.made.pop(id(linear), None)
    if found is not None and found.x.is_still(x):
        return found.out
    left = [shared.made.pop(id(other), None) for other in linear.followers]
    for one in (found, *left):  # not called, or with another input
        if one is not None:
            one.leader.followers, one.leader.is_alone = (), True
    if not linear.followers:
        _learn(shared, linear, x)
        return ops.linear(flat, *own)
    shared.x = None
    members, parts = [linear], [own]
    for other in linear.followers:
        other_plan = other.planned(batch)
        other_shape = None if other_plan is None else other.fused(other_plan, flat)
        if other_shape is not None:
            part = _part(other, other_plan, other_shape, rows, flat)
            if part[3] is own[3]:
                members.append(other)
                parts.append(part)
    outs = ops.linear_parts(flat, [part[:3] for part in parts], own[3])
    given = Input.of(x)
    for other, out in zip(members[1:], outs[1:], strict=True):
        shared.made[id(other)] = Made(given, linear, out)
    return outs[0]


def _part(
    linear: LinearForward, plan: LinearPlan, shape: tuple[int, int], rows: Rows, x: T
) -> tuple[T, T | None, Any, Any]:
    """weight, bias, deltas, tenant_ids"""
    return linear.module.weight, linear.module.bias, *plan.of(shape, rows, x)


def _learn(shared: Shared, linear: LinearForward, x: T) -> None:
    if shared.x is not None and shared.x.is_still(x):
        shared.group.append(linear)
        leader = shared.group[0]
        if not leader.is_alone:
            leader.followers = tuple(shared.group[1:])
    else:
        shared.x, shared.group = Input.of(x), [linear]
