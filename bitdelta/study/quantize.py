"""Quantised models, as checkpoints of what they compute with: INT8 and INT4 rounded to nearest, and GPTQ.

    INT8 RTN    w ~ scale * q, q in -127..127, one scale a row: max |w| / 127
    INT4 RTN    q in -7..7, one scale for every GROUP columns of a row
    GPTQ        4 bits, the same groups, by the package gptqmodel (arXiv 2210.17323), calibrated on the pair's text

The transformer's linears are quantised; embeddings, norms and the head stay. Folders hold fp32, so that nothing is
rounded twice.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from .. import training
from ..errors import Error
from .pair import Tokens

Tensor: TypeAlias = torch.Tensor
GROUP = 64  # columns of a scale
METHODS = ("INT8 RTN", "INT4 RTN", "GPTQ")
MISSING = "GPTQ: left out, as the package gptqmodel is not installed; it runs on the CPU too"


def methods() -> list[str]:
    """Those that run here."""
    return [name for name in METHODS if name != "GPTQ" or importlib.util.find_spec("gptqmodel")]


def quantize(source: Path, method: str, tokens: Tokens, out: Path) -> Path:
    """Writes the checkpoint of `source`, quantised; `tokens` [rows, length] are what GPTQ is calibrated on."""
    if method == "GPTQ":
        return _gptq(source, tokens, out)
    bits, group = {"INT8 RTN": (8, None), "INT4 RTN": (4, GROUP)}[method]
    model = training.load(source)
    with torch.no_grad():
        for name, module in linears(model):
            if group is not None and module.in_features % group:
                raise Error(f"{name}: {module.in_features} inputs are no multiple of {group}, a group's")
            module.weight.copy_(round_to_nearest(module.weight, bits, group))
    return save(model, source, out)


def round_to_nearest(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """weight [N, K] in `bits`, symmetric, with one scale a row or for every `group` columns of it."""
    parts = weight.reshape(len(weight), -1, weight.shape[1] if group is None else group)
    most = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / most
    return ((parts / scale).round().clamp(-most, most) * scale).reshape(weight.shape)


def linears(model: Any) -> list[tuple[str, Any]]:
    """The transformer's, without the head."""
    head = model.get_output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    ]


def save(model: Any, source: Path, out: Path) -> Path:
    """As fp32, with the tokenizer of `source`."""
    model.to(torch.float32).save_pretrained(out)
    training.load_tokenizer(source).save_pretrained(out)
    return out


def _gptq(source: Path, tokens: Tokens, out: Path) -> Path:
    """In a process of its own: the package changes torch and transformers when it is imported."""
    out = out.absolute()
    with tempfile.TemporaryDirectory(prefix="bitdelta-gptq-") as folder:
        np.save(Path(folder, "tokens.npy"), tokens)
        command = [sys.executable, "-m", "bitdelta.study.gptq", source, Path(folder, "tokens.npy"), out]
        environment = {"GPTQMODEL_CPU_WORKERS": "2", **training.child_environment()}  # it wants two at least
        done = subprocess.run(
            list(map(str, command)), check=False, capture_output=True, text=True, env=environment, cwd=folder
        )
    if done.returncode != 0 or not out.is_dir():
        last = " ".join(done.stderr.split())[-300:]
        raise Error(f"gptqmodel: status {done.returncode}: {last}")
    return out
