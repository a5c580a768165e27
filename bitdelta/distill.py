"""Scale distillation: the scales of a packed delta trained until the compressed model answers as the fine-tune does.

    minimise over the scales   mean over tokens of |logits(base + delta) - logits(fine-tune)|^2

(BitDelta, arXiv 2402.10193, section 3.1.) Signs and every other weight stay. What is trained is the logarithm of a
factor on each scale (`student.py`), by AdamW with a warm-up and a cosine. The fine-tune's answers come from the disk
(`teacher.py`), the rows of tokens from `text.py`, the loop is `distillation.py`, and the result is a new packfile
with the same signs.

    .OUT.distill/teacher/             the cached answers
    .OUT.distill/state.safetensors    scales, optimiser and step of the last save; the same command continues from it
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import Error, whole_number

LOSSES = ("mse", "kl")


@dataclass(frozen=True)
class Settings:
    """What decides the result, besides models and text."""

    steps: int = 200
    batch_size: int = 4
    length: int = 128
    lr: float = 0.02
    loss: str = "mse"
    top_k: int | None = None
    accumulate: int = 1
    weight_decay: float = 0.0
    pack: bool = True
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "accumulate"):
            whole_number(getattr(self, name), name, 1, 1 << 40)
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected 'mse' or 'kl', got {self.loss!r}")
        if self.top_k is not None:
            whole_number(self.top_k, "top_k", 1, 1 << 31)
        whole_number(self.seed, "seed", 0, (1 << 63) - 1)
        for name, least in (("lr", 1e-12), ("weight_decay", 0.0)):
            number = getattr(self, name)
            if not isinstance(number, int | float) or not least <= number < math.inf:
                raise ValueError(f"{name}: expected a number from {least:g}, got {number!r}")


@dataclass(frozen=True)
class Options:
    """What decides where and how it computes."""

    checkpointing: bool = False
    device: Any = None
    device_map: Any = None
    shard: bool = False
    cache: str | os.PathLike[str] | None = None
    save_every: int = 20
    progress: bool = False

    def __post_init__(self) -> None:
        whole_number(self.save_every, "save_every", 1, 1 << 40)
        if not isinstance(self.device_map, Mapping) and self.device_map not in (None, "auto"):
            raise ValueError(
                f"device_map: expected 'auto' or a dict, module -> device, got {str(self.device_map)[:80]!r}"
            )


def distill(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    text: Any,
    out_dir: str | os.PathLike[str],
    steps: int = 200,
    batch_size: int = 4,
    length: int = 128,
    lr: float = 0.02,
    loss: str = "mse",
    top_k: int | None = None,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    seed: int = 0,
    pack: bool = True,
    checkpointing: bool = False,
    autocast: bool = False,
    device: Any = None,
    device_map: Any = None,
    shard: bool = False,
    cache: str | os.PathLike[str] | None = None,
    save_every: int = 20,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains the scales of `delta` and writes the delta with the new ones.

    Args:
        base, finetuned: checkpoints, folders or Hub ids.
        delta: the packed delta between them.
        text: what to train on, as in `bitdelta.text`; None: the text that comes with Python.
        out_dir: the folder to write; it must not exist.
        steps: of the optimiser. 0.1 of the rows (at most 64) are held out and never trained on.
        batch_size: rows of one forward pass, over all processes.
        length: tokens of a row.
        lr: the largest learning rate: about how much a scale may change in a step, relative to its size.
        loss: "mse" of the logits (of the final hidden states, for models without logits) or "kl"(fine-tune ||
            compressed).
        top_k: only the k largest logits of the fine-tune count, per token.
        accumulate: forward passes of one step.
        weight_decay: pulls scales towards where they began.
        seed: decides the rows and their order.
        pack: rows are windows of the text; False: a document a row, padded.
        checkpointing: activations are computed again in the backward pass: less memory, more time.
        autocast: the student's forward pass in bf16 where PyTorch's autocast says so.
        device: where both models compute, as "cuda"; None: the CPU. Scales and their gradients are then the GPU
            kernels', with the sums of the CPU.
        device_map: of accelerate, "auto" or module -> device, for the student; the fine-tune is on `device`.
        shard: under torchrun, split the frozen weights over the processes.
        cache: a folder to keep the fine-tune's answers in, for other runs on the same text.
        save_every: steps between saves; a killed run continues from the last.
        progress: a progress bar on stderr.

    Returns:
        A dict that JSON can hold: loss on the held-out rows before and after, the curve, counts, seconds.

    Raises:
        ValueError: an option out of range, a text that is too short.
        bitdelta.DeviceError: a GPU that is not there, or that this build cannot use.
        bitdelta.BaseMismatchError, FormatError, Error: models that do not fit together, a loss that is not finite.
        FileExistsError, OSError: `out_dir` exists or cannot be written.

    Source: BitDelta, arXiv 2402.10193, section 3.1.
    """
    start = time.perf_counter()
    settings = Settings(
        steps, batch_size, length, lr, loss, top_k, accumulate, weight_decay, pack, autocast, seed
    )
    _require_torch()
    from .devices import torch_device
    from .distillation import run

    options = Options(checkpointing, torch_device(device), device_map, shard, cache, save_every, progress)
    report = run(base, finetuned, delta, text, out_dir, settings, options)
    seconds = round(time.perf_counter() - start, 3)
    return {"out": str(out_dir), **report, "seconds": seconds}


def _require_torch() -> None:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Error(
            f"distillation needs PyTorch and transformers ({error}): pip install '.[torch]'"
        ) from error
    del torch, transformers
