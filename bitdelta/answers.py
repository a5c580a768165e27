"""What a model answers to rows of tokens, kept on the disk so that no other model is in memory beside it.

    R rows of L positions, V words, H hidden

Where the model is a linear head over hidden states, those are kept [R, L, H] with the head's weight [V, H], and the
logits are computed from them again; else (a head with a cap or a factor, V <= H, 16-bit models) the logits [R, L, V].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from .folder import refuse_full

T: TypeAlias = torch.Tensor


class Sample:
    """Rows of tokens int64 [R, L], and which of them are text, bool [R, L]."""

    def __init__(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        self.tokens = torch.from_numpy(tokens)
        self.mask = torch.from_numpy(mask)

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int) -> Iterator[tuple[slice, T, T]]:
        for begin in range(0, len(self), size):
            rows = slice(begin, begin + size)
            yield rows, self.tokens[rows], self.mask[rows]


def answers(model: Any, tokens: T, mask: T) -> T:
    """The model's logits [B, L, V], [B, C] of a classifier, or the last hidden states [B, L, H] of an encoder.

    Encoder-decoder models reconstruct their input: the same tokens are the decoder's labels.
    """
    device = next(model.parameters()).device
    inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device).long()}
    if model.config.is_encoder_decoder:
        inputs["labels"] = inputs["input_ids"]
    with torch.inference_mode():
        out = model(**inputs)
    found: T = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
    return found


class Teacher:
    """Row i's answers, from the disk.

    Args:
        rows: fp32 [R, ...]: hidden states where there is a head, else answers.
        head: weight [V, H] and bias [V] or None; None: `rows` are the answers.
    """

    def __init__(self, rows: np.ndarray, head: tuple[T, T | None] | None) -> None:
        self.rows = rows
        self.head = head

    def __call__(self, i: int) -> T:
        """[L, V], [C] or [L, H] of row i, in fp32."""
        row = torch.from_numpy(np.array(self.rows[i]))
        return row if self.head is None else torch.nn.functional.linear(row, *self.head)


def record(
    model: Any, sample: Sample, folder: Path, batch_size: int, step: Callable[[int], object] = lambda n: None
) -> Teacher:
    """The model's answers, written into `folder`.

    Args:
        model: of transformers.
        sample: what it answers to.
        folder: where the files go; it must outlive the teacher.
        batch_size: rows at a time.
        step: told how many rows are done, after each batch.
    """
    head, inputs = model.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) if head else None
    kept: np.ndarray | None = None
    is_hidden = False
    try:
        for rows, tokens, mask in sample.batches(batch_size):
            found = answers(model, tokens, mask).float().cpu()
            if kept is None:
                is_hidden = _is_head_of(head, inputs, found)
                shape = (len(sample), *(inputs[-1].shape[1:] if is_hidden else found.shape[1:]))
                refuse_full(folder / "answers", 4 * int(np.prod(shape)))
                kept = np.memmap(folder / "answers", np.float32, "w+", shape=shape)
            kept[rows] = (inputs[-1].float().cpu() if is_hidden else found).numpy()
            inputs.clear()
            step(len(tokens))
    finally:
        if hook is not None:
            hook.remove()
    assert kept is not None
    return Teacher(kept, _keep_head(head, folder) if is_hidden else None)


def _is_head_of(head: Any, inputs: list[T], logits: T) -> bool:
    """Whether the logits are the head's product with what came into it, and keeping that is smaller."""
    if type(head) is not torch.nn.Linear or head.weight.dtype != torch.float32 or len(inputs) != 1:
        return False
    hidden = inputs[0]
    if hidden.shape[:-1] != logits.shape[:-1] or hidden.shape[-1] >= logits.shape[-1]:
        return False
    with torch.inference_mode():
        again = torch.nn.functional.linear(hidden, head.weight, head.bias).cpu()
    return torch.allclose(again, logits, rtol=1e-5, atol=1e-6)


def _keep_head(head: Any, folder: Path) -> tuple[T, T | None]:
    """Its weight as a memory map, so that it takes no memory that the next model needs."""
    weight = np.memmap(folder / "head", np.float32, "w+", shape=tuple(head.weight.shape))
    weight[...] = head.weight.detach().cpu().numpy()
    return torch.from_numpy(weight), None if head.bias is None else head.bias.detach().cpu().clone()
