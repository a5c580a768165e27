"""What a packed delta holds: per tensor its form, bytes and error; its size against the fine-tune.

bits per parameter = 8 * (bytes of the delta) / (parameters of the fine-tune)
factor             = (bytes of the fine-tune's tensors as it was stored) / (bytes of the delta)

The bytes of the delta are those of its files of tensors, index and delta_config.json; what else travels, such as a
tokenizer, the fine-tune has too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .forms import parameters, stored_bytes
from .table import table

if TYPE_CHECKING:
    from .packfile import Packfile

FORMS = {
    "tensor": "signs, one scale per matrix",
    "row": "signs, one scale per row",
    "rank1": "signs, row and column scales",
    "whole": "stored whole",
    "same": "identical to the base",
    "left": "changed, but left as in the base",
    "tied": "another name of a tensor above",
}
UNIT = "factor = bytes of the fine-tune's tensors / bytes of the delta"


def info(delta_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes a packfile without touching the base.

    Args:
        delta_dir: a folder written by `bitdelta.compress`, or a Hub id.

    Returns:
        A dict that JSON can hold: `tensors` (name, form, planes, shape, parameters, bytes and, where known,
        relative_error, output_error, effect), `forms` (parameters and share of each), `bytes`, `finetuned_bytes`,
        `factor`, `unit`, `base`, and `budget`, where one chose the forms.

    Raises:
        bitdelta.FormatError: the folder is not a packfile.
    """
    from .packfile import load

    packfile = load(delta_dir)
    tensors = [_tensor(name, dict(entry)) for name, entry in packfile.entries.items()]
    total = sum(tensor["parameters"] for tensor in tensors)
    forms = {}
    for form, description in FORMS.items():
        count = sum(tensor["parameters"] for tensor in tensors if tensor["form"] == form)
        if count or any(tensor["form"] == form for tensor in tensors):
            forms[form] = {
                "parameters": count,
                "share": count / total if total else 0.0,
                "description": description,
            }
    size = delta_bytes(packfile.root)
    finetuned_bytes = sum(tensor["finetuned_bytes"] for tensor in tensors)
    return {
        "delta": str(delta_dir),
        "format_version": packfile.config.get("format_version"),
        "tool_version": packfile.config.get("tool_version"),
        "base": packfile.config.get("base"),
        "parameters": total,
        "bytes": size,
        "finetuned_bytes": finetuned_bytes,
        "bits_per_parameter": 8 * size / total if total else None,
        "factor": finetuned_bytes / size if size else None,
        "unit": UNIT,
        "forms": forms,
        **({} if packfile.budget is None else {"budget": packfile.budget}),
        "tensors": tensors,
    }


def html(packfile: Packfile) -> str:
    """What Jupyter shows: sizes, and for each form how much it holds and errs; the folder may be gone."""
    from .display import panel, size

    tensors = [_tensor(name, dict(entry)) for name, entry in packfile.entries.items()]
    base = packfile.config.get("base") or {}
    stored, whole = (sum(tensor[key] for tensor in tensors) for key in ("bytes", "finetuned_bytes"))
    factor = f", {whole / stored:.1f} times smaller than the fine-tune" if stored else ""
    facts = {
        "base": str(base.get("id") or base.get("name") or "unknown"),
        "tensors": f"{len(tensors)}, {sum(tensor['parameters'] for tensor in tensors):,} parameters",
        "stored": f"{size(stored)}{factor}",
    }
    rows = []
    for form, about in FORMS.items():
        group = [tensor for tensor in tensors if tensor["form"] == form]
        if group:
            n_bytes = sum(tensor["bytes"] for tensor in group)
            rows.append([about, str(len(group)), size(n_bytes), *(spread(group, key) for key in ERRORS)])
    return panel(f"Packfile {packfile.root}", facts, ("form", "tensors", "bytes", *ERRORS.values()), rows)


ERRORS = {"relative_error": "error of the change", "output_error": "error of the output"}


def spread(entries: Sequence[Mapping[str, Any]], key: str) -> str:
    """The median and the largest of an error, as text; nothing where no entry has it."""
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return f"median {median(values):.3f}, most {max(values):.3f}" if values else ""


def delta_bytes(folder: Path) -> int:
    """Bytes of the delta in a folder, finished or about to be."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith(("delta_", "signs-")))


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    rows = []
    for tensor in report["tensors"]:
        planes, shape = tensor["planes"], " x ".join(map(str, tensor["shape"]))
        errors = [_error(tensor["relative_error"]), _error(tensor["output_error"])]
        numbers = ("" if planes is None else str(planes), shape, f"{tensor['bytes']:,}")
        rows.append([tensor["name"], tensor["form"], *numbers, *errors])
    columns = ("tensor", "form", ">planes", ">shape", ">bytes", ">relative error", ">of the output")
    is_calibrated = any(row[-1] for row in rows)
    yield from table(
        columns if is_calibrated else columns[:-1], rows if is_calibrated else [r[:-1] for r in rows]
    )
    yield ""
    for form, share in report["forms"].items():
        yield f"{form:<8} {share['share']:>7.2%} of the parameters ({share['description']})"
    yield f"{report['bytes']:,} bytes for {report['parameters']:,} parameters"
    if report["factor"]:
        yield f"factor {report['factor']:.2f} ({report['unit']})"
        yield f"{report['bits_per_parameter']:.3f} bits per parameter"
    if "budget" in report:
        yield from describe_budget(report["budget"])


def describe_budget(budget: dict[str, Any]) -> Iterator[str]:
    """What a budget came to, as lines of text."""
    share = budget["left"] / budget["effect"] if budget["effect"] else 0.0
    yield (
        f"budget: {budget['bits']:g} bits per parameter that can be packed, {budget['bits_per_parameter']:.4f} used; "
        f"{share:.2%} of the effect on the logits is left out"
    )
    for name in budget["too_large"]:
        yield f"too large for the budget: {name}"


def shown_form(entry: Mapping[str, Any]) -> str:
    """The form of an entry; "left" where the base's values stand for others."""
    return "left" if entry["form"] == "same" and entry.get("relative_error") else str(entry["form"])


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _tensor(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """One row of the table from the packfile's entry; what the entry does not record is None."""
    return {
        "name": name,
        "form": shown_form(entry),
        "planes": entry.get("planes"),
        "shape": list(entry["shape"]),
        "parameters": parameters(entry),
        "bytes": entry.get("bytes", 0),
        "finetuned_bytes": stored_bytes(entry),
        "relative_error": entry.get("relative_error"),
        "output_error": entry.get("output_error"),
        "effect": entry.get("effect"),
    }
