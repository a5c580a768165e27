"""How long fitting without gradients takes, against 100 steps of distillation on the same text.

    layers   one weight each: H and its factor, the fit, the error on held-out rows; a step of distillation is the
             product, its gradients for inputs and scales, and the fine-tune's output, once a token
    model    the commands themselves, on a Llama of random weights

Tokens are as many and as long as `calibrate` and `distill` take when nothing is said: 16384, and 512 a step. Steps are
timed a few times and counted a hundred times. Needs PyTorch and transformers.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import ops, threads
from ..activations import BATCH_TOKENS
from ..collected import Collected
from ..delta import Delta, extract
from ..fitting import fit, output_errors
from ..table import table

LAYERS = ((4096, 4096), (4096, 11008))
QUICK = ((96, 64), (64, 96))
FITTED, HELD_OUT, STEP = 14336, 2048, 512  # tokens
STEPS, GOAL = 100, 1.5
REPEATS = 3
COLUMNS = (
    "weight",
    ">H s",
    ">factor s",
    ">fit s",
    ">held out s",
    ">in all s",
    ">100 steps s",
    ">ratio",
    "goal",
)
PARTS = ("inputs", "factor", "fit", "held_out")


def measure(quick: bool, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row per layer, and one of kind "model"."""
    rows = []
    for N, K in QUICK if quick else LAYERS:
        log(
            f"fitting a weight [{N}, {K}], and {REPEATS} steps of distillation, {threads.get_num_threads()} threads"
        )
        rows.append(_judge(_layer(N, K, 16 if quick else 1), quick))
    log("calibrating and distilling a model")
    rows.append(_judge(_model(quick), quick))
    return rows


def describe(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as lines of text."""
    yield from table(COLUMNS, [_cells(row) for row in rows], "calibration against distillation")
    yield "H serves every weight that reads the same inputs: in a Llama three of four do not pay for it again"


def _judge(row: dict[str, Any], quick: bool) -> dict[str, Any]:
    ratio = row["seconds"] / row["distillation_seconds"]
    return {**row, "ratio": ratio, "goal": GOAL, "met": None if quick else ratio <= GOAL}


def _cells(row: dict[str, Any]) -> list[str]:
    parts = [f"{row[part]:.2f}" if part in row else "" for part in PARTS]
    times = [f"{row[name]:.2f}" for name in ("seconds", "distillation_seconds")]
    met = {None: "", True: " met", False: " missed"}[row["met"]]
    return [row["case"], *parts, *times, f"{row['ratio']:.2f}", f"<= {GOAL}{met}"]


def _layer(N: int, K: int, fraction: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(N, K, generator=generator)).bfloat16()
    tuned = (base.float() + 0.002 * torch.randn(N, K, generator=generator)).bfloat16()
    spread = torch.exp(torch.randn(K, generator=generator) / 2)  # some columns are larger, as in a model
    x = torch.randn(BATCH_TOKENS // fraction, K, generator=generator) * spread
    row: dict[str, Any] = {"kind": "layer", "case": f"[{N}, {K}]", "N": N, "K": K}
    collected = Collected(K)

    def collect() -> Any:
        for _ in range(FITTED // BATCH_TOKENS):
            collected.add(x, False)
        return collected.inputs()

    inputs, row["inputs"] = _timed(collect)
    _, row["factor"] = _timed(lambda: (inputs.damped, inputs.order, inputs.factor))
    delta, row["fit"] = _timed(lambda: fit(base, tuned, inputs))
    d, held_out = tuned.float().numpy() - base.float().numpy(), x[: HELD_OUT // fraction].numpy()
    plain = extract(base, tuned)
    (wrong, _), row["held_out"] = _timed(lambda: output_errors(d, [plain, delta], held_out))
    row["error"] = (wrong[1] / wrong[0]) ** 0.5  # of the fitted signs, relative to plain ones
    row["seconds"] = sum(row[part] for part in PARTS)
    step, teacher = _steps(base, tuned, delta, x[: STEP // fraction])
    row |= {"step_seconds": step, "teacher_seconds": teacher}
    row["distillation_seconds"] = STEPS * step + (FITTED + HELD_OUT) // STEP * teacher
    return row


def _steps(base: torch.Tensor, tuned: torch.Tensor, delta: Delta, x: torch.Tensor) -> tuple[float, float]:
    """Seconds of a step, and of the fine-tune's output for its tokens."""
    parts, nobody = ops.as_torch(delta), torch.full((len(x),), -1)
    log_scale = torch.zeros_like(parts.row).requires_grad_()

    def teach() -> torch.Tensor:
        return ops.linear(x, tuned, None, [], nobody)

    def step() -> None:
        inputs = x.detach().requires_grad_()
        student = ops.TorchDelta(parts.sign, parts.row * log_scale.exp(), None, delta.shape)
        y = ops.linear(inputs, base, None, [student], torch.zeros_like(nobody))
        torch.nn.functional.mse_loss(y, wanted).backward()

    wanted = teach()
    return _median(step), _median(teach)


def _model(quick: bool) -> dict[str, Any]:
    from .. import compress, distill
    from ..calibrate import calibrate

    hidden, layers, n_tokens = (32, 1, 512) if quick else (256, 4, FITTED + HELD_OUT)
    with tempfile.TemporaryDirectory(prefix="bitdelta-bench-") as folder:
        root = Path(folder)
        _write_pair(root, hidden, layers)
        pair, delta = (root / "base", root / "tuned"), root / "delta"
        compress(*pair, delta)
        text = np.random.default_rng(0).integers(0, 512, (n_tokens // 128, 128))
        fitted = calibrate(*pair, delta, text, root / "fitted")
        distilled = distill(*pair, delta, text, root / "distilled", steps=2 if quick else STEPS)
    return {
        "kind": "model",
        "case": f"a Llama, hidden {hidden}, {layers} layers",
        "seconds": fitted["seconds"],
        "distillation_seconds": distilled["seconds"],
    }


def _write_pair(root: Path, hidden: int, layers: int) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=512,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.002 * torch.randn_like(parameter)
    model.save_pretrained(root / "tuned")


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def _median(call: Callable[[], Any]) -> float:
    return statistics.median(_timed(call)[1] for _ in range(REPEATS))
