"""The model card (README.md) of a packed delta: what it is, how large, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .forms import parameters, stored_bytes
from .info import FORMS, describe_budget, shown_form, spread

QUALITY = {
    "relative_error": "Relative error of the packed tensors' changes, on a sample of rows",
    "output_error": "Relative error of what they add to their layers' outputs, on text held out",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(config: dict[str, Any], delta_bytes: int) -> str:
    """Markdown with the Hub's front matter.

    Args:
        config: what delta_config.json holds.
        delta_bytes: bytes of the delta's tensors and config.
    """
    base, finetuned = config["base"], config["finetuned"]
    base_name = base["id"] or base["name"] or "BASE"
    entries = config["tensors"].values()
    finetuned_bytes = sum(map(stored_bytes, entries))
    lines = ["---", "library_name: bitdelta", "tags:", "- bitdelta"]
    if base["id"] and _HUB_ID.fullmatch(base["id"]):
        lines += [f"base_model: {base['id']}", "base_model_relation: adapter"]
    lines += [
        "---",
        "",
        f"# {_text(finetuned.get('id') or finetuned.get('name') or 'A fine-tune')}, as a delta",
        "",
    ]
    revision = f" at revision `{base['revision']}`" if base["revision"] else ""
    lines += [
        f"What a full fine-tune changed in `{_text(base_name)}`{revision}, stored as sign bits and scales by",
        f"{config['tool_version']} (format version {config['format_version']}).",
        "",
        f"{delta_bytes:,} bytes, against {finetuned_bytes:,} bytes of the fine-tune's tensors:",
        f"{finetuned_bytes / max(delta_bytes, 1):.1f} times smaller.",
        "",
        "| tensors | parameters | how |",
        "|---|---|---|",
    ]
    for form, description in FORMS.items():
        group = [entry for entry in entries if shown_form(entry) == form]
        if group:
            planes = sorted({entry["planes"] for entry in group if "planes" in entry})
            count = sum(map(parameters, group))
            how = description + (f", planes: {', '.join(map(str, planes))}" if planes else "")
            lines.append(f"| {len(group)} | {count:,} | {how} |")
    packed = [entry for entry in entries if "planes" in entry]
    for key, about in QUALITY.items():
        if said := spread(packed, key):
            lines += ["", f"{about}: {said}."]
    if "budget" in config:
        named = [_text(name) for name in config["budget"]["too_large"]]
        lines += ["", *(f"- {line}" for line in describe_budget({**config["budget"], "too_large": named}))]
    return "\n".join([*lines, *_usage(base, base_name)]) + "\n"


def _usage(base: Mapping[str, str | None], name: str) -> list[str]:
    """How to use the delta; over a quantised base there is no way back to a full checkpoint."""
    if base.get("quantized"):
        return [
            "",
            f"It was taken from the base as quantised by {_text(str(base['quantized']))}, and runs over that:",
            "",
            '    DeltaModel.load_delta(NAME, DELTA, allow_base="quantized")',
        ]
    return [
        "",
        "Back to a full checkpoint, which transformers loads:",
        "",
        f"    bitdelta merge {_text(name)} DELTA --out FOLDER",
        "",
        "Beside other fine-tunes of the base, in one batch:",
        "",
        f'    model = bitdelta.DeltaModel.from_pretrained("{_text(name)}")',
        '    model.load_delta("NAME", "DELTA")',
        '    model.generate(**batch, delta_names=["NAME", None])',
        "",
        "In Python, memory-mapped: `bitdelta.load(DELTA)`. The base must be the one named above; `bitdelta verify`",
        "checks that.",
    ]


def _text(name: str) -> str:
    """A name that cannot change the Markdown around it."""
    return re.sub(r"[^\w./ -]", "_", name)
