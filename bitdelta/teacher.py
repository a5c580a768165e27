"""What the fine-tune answers, computed once and kept on the disk, so that it is never in memory with the student.

FOLDER/targets.npy        fp32, memory-mapped: one entry per row of tokens
FOLDER/head.safetensors   the fine-tune's head, where the targets are the hidden states before it
FOLDER/about.json         written last: what the targets are, and of what

kind "hidden"   [rows, length, hidden]       language models: logits are head(target), so the disk holds
                                             hidden states and not a vocabulary's worth of numbers per token
kind "logits"   [rows, (length,) classes]    classifiers, and heads that are more than one linear
kind "states"   [rows, length, hidden]       models without logits: their final hidden states
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .errors import Error
from .folder import refuse_full
from .group import Group
from .progress import progress_bar
from .student import load_teacher
from .text import refuse_unknown
from .trained import DeltaLinear

Tensor: TypeAlias = torch.Tensor
AGREES = 1e-4  # of the logits' size: what head(hidden) may differ from the model's own logits


class Targets:
    """The cached answers of the fine-tune."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        about = json.loads((folder / "about.json").read_text())
        self.kind: str = about["kind"]
        self.values: NDArray[np.float32] = np.load(folder / "targets.npy", mmap_mode="r")
        self._after = about["after"]
        self._head: DeltaLinear | None = None
        if self.kind == "hidden":
            from safetensors.torch import load_file

            head = load_file(folder / "head.safetensors")
            self._head = DeltaLinear(head["weight"], head.get("bias"), None).to(device)
        self._device = device

    @property
    def has_tokens(self) -> bool:
        """Whether there is an answer for every token, and not one a row."""
        return self.values.ndim == 3

    def of(self, rows: NDArray[np.int64], mask: Tensor) -> Tensor:
        """Logits or states [n, ...], on the device, of the rows' tokens that `mask` [rows, length] keeps."""
        values = torch.from_numpy(self.values[rows])
        if self.has_tokens:
            values = values[mask]
        values = values.to(self._device)
        with torch.no_grad():
            return values if self._head is None else _after_head(self._head(values), self._after)


def answers(model: Any, tokens: Tensor, mask: Tensor) -> Any:
    """The model's output for rows of tokens; padding is hidden from it."""
    inputs: dict[str, Any] = {"input_ids": tokens}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask.long()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    return model(**inputs)


def answer(output: Any) -> Tensor:
    """Logits, or the final hidden states of a model that has none."""
    logits = output.get("logits")
    return output.last_hidden_state if logits is None else logits


def cache_targets(
    finetuned: Checkpoint,
    tokens: NDArray[np.int64],
    mask: NDArray[np.bool_],
    folder: Path,
    batch_size: int,
    group: Group,
    device: torch.device,
    progress: bool = False,
) -> Targets:
    """Computes the targets on a device into `folder`, unless they are there; the processes share the work."""
    if (folder / "about.json").is_file():
        return Targets(folder, device)
    model = load_teacher(finetuned).to(device)
    if model.main_input_name != "input_ids":
        raise Error(f"{finetuned.root}: {type(model).__name__} takes {model.main_input_name}, not text")
    refuse_unknown(tokens, model)

    def inputs(rows: slice) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(tokens[rows]).to(device), torch.from_numpy(mask[rows]).to(device)

    kind, after, values = _probe(model, *inputs(slice(1)))
    if group.is_first:
        _make_room(folder, (len(tokens), *values.shape[1:]), model, kind)
    group.wait()
    target = np.load(folder / "targets.npy", mmap_mode="r+")
    with torch.no_grad(), progress_bar("teacher", len(tokens), progress, "row") as bar:
        for at in range(batch_size * group.rank, len(tokens), batch_size * group.size):
            rows = slice(at, at + batch_size)
            part = _values(model, kind, *inputs(rows))
            target[rows] = part[0].float().cpu().numpy()
            bar.update(len(part[0]))
    target.flush()
    group.wait()
    if group.is_first:
        scratch = folder / "about.json.partial"
        scratch.write_text(json.dumps({"kind": kind, "after": after}))
        scratch.rename(folder / "about.json")
    group.wait()
    return Targets(folder, device)


def _make_room(folder: Path, shape: tuple[int, ...], model: Any, kind: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    refuse_full(folder, 4 * int(np.prod(shape)))
    folder.mkdir(parents=True)
    np.lib.format.open_memmap(folder / "targets.npy", mode="w+", dtype=np.float32, shape=shape)
    if kind == "hidden":
        from safetensors.torch import save_file

        head = model.get_output_embeddings()
        parts = {"weight": head.weight, "bias": head.bias}
        save_file(
            {name: part.detach().contiguous() for name, part in parts.items() if part is not None},
            folder / "head.safetensors",
        )


def _probe(model: Any, tokens: Tensor, mask: Tensor) -> tuple[str, dict[str, float], Tensor]:
    """What to keep of this model: its kind, what follows the head, and the values of one row."""
    with torch.no_grad():
        output = answers(model, tokens, mask)
        if output.get("logits") is None:
            if output.get("last_hidden_state") is None:
                raise Error(f"{type(model).__name__} has neither logits nor final hidden states")
            return "states", {}, output.last_hidden_state
        logits = output.logits
        after = _settings_after_head(model.config)
        if isinstance(model.get_output_embeddings(), DeltaLinear):
            hidden, head = _values(model, "hidden", tokens, mask)
            if head is not None:
                again = _after_head(head(hidden), after)
                if again.shape == logits.shape and bool(
                    (again - logits).abs().max() <= AGREES * logits.abs().max()
                ):
                    return "hidden", after, hidden
    return "logits", {}, logits


def _values(model: Any, kind: str, tokens: Tensor, mask: Tensor) -> tuple[Tensor, DeltaLinear | None]:
    """The values to keep, and the head that makes logits of them."""
    if kind != "hidden":
        return answer(answers(model, tokens, mask)), None
    head, seen = model.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        answers(model, tokens, mask)
    finally:
        hook.remove()
    return (seen[0], head) if len(seen) == 1 else (torch.empty(0), None)


def _settings_after_head(config: Any) -> dict[str, float]:
    """What some models do to their logits: Cohere and MPT scale, Granite divides, Gemma caps."""
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    found = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _after_head(logits: Tensor, after: dict[str, float]) -> Tensor:
    logits = logits * after.get("logit_scale", 1.0) / after.get("logits_scaling", 1.0)
    cap = after.get("final_logit_softcapping")
    return logits if cap is None else cap * torch.tanh(logits / cap)
