"""Requirements of a release, `--require 'kl<=0.1'`: what they say, and whether a report of `evaluate` meets them."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("perplexity", "logit_mse", "kl", "top1", "recovered", "hidden_mse", "refusal_agreement")
OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
REQUIREMENT = re.compile(
    r"\s*(?:(?P<name>[^<>]+):)?\s*(?P<metric>\w+)\s*(?P<op><=|>=|<|>)\s*(?P<value>\S+)\s*"
)


@dataclass(frozen=True)
class Requirement:
    """metric OP limit, of one tenant or (None) of all."""

    name: str | None
    metric: str
    op: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.op}{self.limit:g}"


def parse(text: str) -> Requirement:
    """[NAME:]METRIC<=NUMBER, also <, >=, >.

    Raises:
        ValueError: not of this form, or no metric.

    >>> str(parse("kl <= 0.1"))
    'kl<=0.1'
    """
    parts = REQUIREMENT.fullmatch(text)
    if parts is None or not _is_number(parts["value"]):
        raise ValueError(f"require: expected [NAME:]METRIC<=NUMBER, as in 'kl<=0.1', got {text!r}")
    if parts["metric"] not in METRICS:
        raise ValueError(f"require: expected one of {', '.join(METRICS)}, got {parts['metric']!r}")
    return Requirement(
        parts["name"] and parts["name"].strip(), parts["metric"], parts["op"], float(parts["value"])
    )


def check(report: dict[str, Any], requirements: Sequence[str]) -> list[dict[str, Any]]:
    """Whether each requirement holds, of every tenant that it is about. A value of None never does.

    Args:
        report: of `evaluate`.
        requirements: as `parse` takes them.

    Returns:
        Per requirement and tenant: tenant, condition, value, met.

    Raises:
        ValueError: as `parse`; a metric that was not measured; an unknown tenant.
    """
    tenants = report["tenants"]
    found = []
    for requirement in map(parse, requirements):
        for name in [requirement.name] if requirement.name else tenants:
            if name not in tenants:
                raise ValueError(f"require: {name!r} is none of {', '.join(tenants)}")
            if requirement.metric not in tenants[name]:
                raise ValueError(
                    f"require: {requirement.metric} of {name} was not measured; it may need --finetuned or --refusals"
                )
            value = tenants[name][requirement.metric]
            met = value is not None and bool(OPERATORS[requirement.op](value, requirement.limit))
            found.append({"tenant": name, "condition": str(requirement), "value": value, "met": met})
    return found


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False
