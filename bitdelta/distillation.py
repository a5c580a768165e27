"""The run behind `distill`: rows and targets, the training loop, the new packfile."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoint import Checkpoint, open_checkpoint
from .distill import Options, Settings
from .errors import Error
from .folder import refuse_existing, refuse_inside
from .group import Group, joined, shard_weights
from .packfile import Packfile, load
from .progress import progress_bar
from .rewrite import rewrite
from .student import Student, load_student
from .teacher import Targets, answer, answers, cache_targets
from .text import load_rows, needs_tokenizer
from .tokenizer import load_tokenizer
from .training_state import TrainingState

logger = logging.getLogger("bitdelta")

Tensor: TypeAlias = torch.Tensor
MOST_HELD_OUT = 64  # rows: enough to see a difference, few enough to measure twice


@dataclass(frozen=True)
class Rows:
    """The tokens of the text, those trained on first; one row of `mask` says which of a row's are not padding."""

    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    n_train: int
    targets: Targets


def run(
    base: Any, finetuned: Any, delta: Any, text: Any, out_dir: Any, settings: Settings, options: Options
) -> dict[str, Any]:
    """`distill` with its options checked and sorted."""
    with joined(options.device) as group:
        if settings.batch_size % group.size:
            raise ValueError(
                f"batch_size: expected a multiple of {group.size}, the processes, got {settings.batch_size}"
            )
        source, target, packfile = open_checkpoint(base), open_checkpoint(finetuned), load(delta)
        if options.shard and group.size == 1:
            raise ValueError("shard: expected several processes, as torchrun starts them, got one")
        refuse_existing(Path(out_dir))
        refuse_inside(out_dir, source.root, target.root, packfile.root)
        packfile.check_base(source)
        work = Path(os.path.abspath(out_dir))
        work = work.with_name(f".{work.name}.distill")
        rows, key = _rows(text, target, packfile, settings, options, work, group)
        student = load_student(source, packfile)
        if not student.trained:
            raise Error(
                f"{packfile.root}: no linear or embedding of the model has planes; there is nothing to distill"
            )
        _place(student, options, group)
        report = _train(
            student, rows, settings, options, group, TrainingState(work / "state.safetensors", key)
        )
        group.wait()
        if group.is_first:
            new = {name: linear.delta() for name, linear in student.trained.items()}
            rewrite(packfile, source, out_dir, lambda name, old: new.get(name, old), target)
            shutil.rmtree(work, ignore_errors=True)
        group.wait()
    return report


def _rows(
    text: Any,
    finetuned: Checkpoint,
    packfile: Packfile,
    settings: Settings,
    options: Options,
    work: Path,
    group: Group,
) -> tuple[Rows, str]:
    """The tokens and the fine-tune's answers to them, and the hash of all that decides the result."""
    wanted = settings.steps * settings.batch_size * settings.accumulate
    wanted += min(MOST_HELD_OUT, max(1, wanted // 10))
    tokenizer = load_tokenizer(finetuned.root) if needs_tokenizer(text) else None
    tokens, mask = load_rows(text, tokenizer, wanted, settings.length, settings.seed, settings.pack)
    if len(tokens) < 2 * group.size:
        raise ValueError(f"text: expected at least {2 * group.size} rows of tokens, got {len(tokens)}")
    held_out = min(MOST_HELD_OUT, max(1, len(tokens) // 11))
    held_out = max(held_out // group.size, 1) * group.size  # the same number for every process
    about = [
        [[name, tensor.fingerprint()] for name, tensor in finetuned.items()],
        tokens.tolist(),
        mask.tolist(),
    ]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    folder = Path(options.cache or work) / f"teacher-{digest[:16]}"
    about_run = settings.batch_size, group, options.device, options.progress
    targets = cache_targets(finetuned, tokens, mask, folder, *about_run)
    prints = [[name, entry.get("sha256")] for name, entry in packfile.entries.items()]
    key = hashlib.sha256(json.dumps([digest, prints, asdict(settings)]).encode()).hexdigest()
    return Rows(tokens, mask, len(tokens) - held_out, targets), key


def _place(student: Student, options: Options, group: Group) -> None:
    """The options that change where and how the model computes, each PyTorch's or accelerate's own."""
    model, kept = student.model, list(student.parameters().values())
    layers = _layers(model)
    model.to(options.device)
    device_map = options.device_map
    if device_map is not None:
        from accelerate import dispatch_model, infer_auto_device_map

        if isinstance(device_map, str):
            device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
        dispatch_model(model, device_map)
    if options.checkpointing:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        chosen = set(layers)
        apply_activation_checkpointing(model, check_fn=lambda module: module in chosen)
        layers = _layers(model)
    if options.shard:
        shard_weights(model, layers, kept, group)


def _layers(model: Any) -> list[Any]:
    """The transformer's layers: what is checkpointed and sharded as one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    names = set(model._no_split_modules or ())
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names
    ]


def _train(
    student: Student,
    rows: Rows,
    settings: Settings,
    options: Options,
    group: Group,
    state: TrainingState,
) -> dict[str, Any]:
    parameters = student.parameters()
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.lr, betas=(0.9, 0.999), weight_decay=settings.weight_decay
    )
    before = _held_out(student, rows, settings, group)
    first, curve = state.load(parameters, optimizer)
    is_shown = options.progress and group.is_first
    with progress_bar("distill", settings.steps, is_shown, " steps", first) as bar:
        for step in range(first, settings.steps):
            for part in optimizer.param_groups:
                part["lr"] = settings.lr * _factor(step, settings.steps)
            value = _step(student, rows, settings, group, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            curve.append(value)
            logger.debug("distill: step %d of %d, loss %.4g", step + 1, settings.steps, value)
            bar.set_postfix_str(f"loss {value:.4g}")
            bar.update()
            if (step + 1) % options.save_every == 0 and group.is_first:
                state.save(parameters, optimizer, step + 1, curve)
    after = _held_out(student, rows, settings, group)
    is_better = after["loss"] <= before["loss"]
    logger.info("distill: held-out loss %.4g before, %.4g after", before["loss"], after["loss"])
    if not is_better:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.zero_()
    ends = max(1, len(curve) // 10)
    return {
        "kept": "distilled scales" if is_better else "the scales as they were: held-out loss rose",
        "target": {"hidden": "logits", "states": "final hidden states"}.get(rows.targets.kind, "logits"),
        "loss": settings.loss,
        "loss_before": sum(curve[:ends]) / ends,
        "loss_after": sum(curve[-ends:]) / ends,
        "held_out_before": before["loss"],
        "held_out_after": after["loss"],
        "held_out_mse_before": before["mse"],
        "held_out_mse_after": after["mse"],
        "curve": curve,
        "steps": settings.steps,
        "resumed_at": first,
        "rows": rows.n_train,
        "held_out_rows": len(rows.tokens) - rows.n_train,
        "scales": sum(parameter.numel() for parameter in parameters.values()),
        "tensors": len(student.trained),
        "not_trained": student.frozen,
        "processes": group.size,
    }


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: up over a twentieth of the steps, then half a cosine down to 0."""
    warm_up = max(1, steps // 20)
    return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _step(student: Student, rows: Rows, settings: Settings, group: Group, step: int) -> float:
    """Gradients of one step, summed over its forward passes and the processes; the loss."""
    passes = list(_batches(rows.n_train, settings, step))
    count = sum(_count(rows, at) for at in passes)
    total = torch.zeros(())
    for at in passes:
        loss = _loss(student, rows, at[group.rank :: group.size], settings, settings.loss) / count
        loss.backward()
        total += loss.detach().cpu()
    parameters = student.parameters().values()
    for parameter in parameters:
        if parameter.grad is None:  # of a linear that the targets do not depend on, as an encoder's pooler
            parameter.grad = torch.zeros_like(parameter)
    group.add([total, *(parameter.grad for parameter in parameters)])
    if not math.isfinite(float(total)):
        raise Error(f"step {step}: the loss is {float(total)}; a lower lr may help")
    return float(total)


def _batches(n_rows: int, settings: Settings, step: int) -> Iterator[NDArray[np.int64]]:
    """The row numbers of each forward pass of a step: every epoch has its own order, from the seed alone."""
    each = settings.batch_size
    for number in range(step * settings.accumulate, (step + 1) * settings.accumulate):
        places = np.arange(number * each, (number + 1) * each)
        orders = {
            epoch: np.random.default_rng((settings.seed, epoch)).permutation(n_rows)
            for epoch in set((places // n_rows).tolist())
        }
        yield np.array([orders[int(place // n_rows)][place % n_rows] for place in places])


def _count(rows: Rows, at: NDArray[np.int64]) -> int:
    """What the loss of these rows is a sum over: tokens that are not padding, or rows."""
    return max(1, int(rows.mask[at].sum())) if rows.targets.has_tokens else len(at)


def _loss(student: Student, rows: Rows, at: NDArray[np.int64], settings: Settings, kind: str) -> Tensor:
    """The sum over these rows' tokens."""
    mask = torch.from_numpy(rows.mask[at])
    device = next(iter(student.trained.values())).row_log.device
    context: AbstractContextManager[Any] = nullcontext()
    if settings.autocast:
        context = torch.autocast(device.type, torch.bfloat16)
    with context:
        tokens = torch.from_numpy(rows.tokens[at])
        values = answer(answers(student.model, tokens.to(device), mask.to(device)))
    values = values[mask.to(values.device)] if rows.targets.has_tokens else values
    wanted = rows.targets.of(at, mask).to(values.device)
    return difference(values.float(), wanted.float(), kind, settings.top_k)


def difference(student: Tensor, teacher: Tensor, kind: str, top_k: int | None = None) -> Tensor:
    """Summed over tokens [n, V]: the mean squared difference over V, or KL(teacher || student) in nats.

    With top_k, over the teacher's k largest logits alone; for KL both are made to sum to 1 over these.
    """
    if top_k is not None and top_k < teacher.shape[-1]:
        teacher, chosen = teacher.topk(top_k, dim=-1)
        student = student.gather(-1, chosen)
    if kind == "mse":
        return (student - teacher).square().mean(-1).sum()
    wanted = teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum()


def _held_out(student: Student, rows: Rows, settings: Settings, group: Group) -> dict[str, float]:
    """The loss, and the mean squared difference of all logits, on the rows never trained on."""
    each = settings.batch_size // group.size
    at = np.arange(rows.n_train, len(rows.tokens))
    mine, count = at[group.rank :: group.size], _count(rows, at)
    total = torch.zeros(2)
    whole = Settings(autocast=settings.autocast)
    with torch.no_grad():
        for begin in range(0, len(mine), each):
            part = mine[begin : begin + each]
            total[0] += _loss(student, rows, part, settings, settings.loss).cpu() / count
            total[1] += _loss(student, rows, part, whole, "mse").cpu() / count
    group.add([total])
    return {"loss": float(total[0]), "mse": float(total[1])}
