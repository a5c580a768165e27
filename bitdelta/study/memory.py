"""Peak memory and time of compress, calibrate and distill against the size of the model, each in a process of its own.

    compress, calibrate                      as the commands do it
    teacher                                  the fine-tune's answers, and one step of distillation
    distill, with autocast, checkpointing    STEPS steps, the answers cached; with what loads and writes

The models are random, as memory and time do not depend on what they say. `peak` is the most memory the process held at
once beyond what it held when it had imported PyTorch and transformers, pages of files (weights, memory-mapped, which
the operating system may drop) among them; `private` is without those. Read from /proc, so on Linux only.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import training
from ..errors import Error
from ..training import Log, child_environment
from .measure import Scores
from .table import Column, rows_of

TITLE = "peak memory and time"
COLUMNS: tuple[Column, ...] = (
    ("peak MB", "memory", "peak", 1e-6),
    ("private MB", "memory", "private", 1e-6),
    ("seconds", "memory", "seconds", 1.0),
)
SIZES = {  # hidden, layers; the vocabulary is VOCABULARY
    "small": ((256, 8), (512, 8), (1024, 8)),
    "tiny": ((128, 8),),
}
VOCABULARY = 4096
BATCH, LENGTH = 4, 128  # the paper's
STEPS = 5
ROWS = 6  # of tokens: 5 to train on
SAMPLED = 0.002  # seconds between two looks at a process
CASES: dict[str, dict[str, Any]] = {
    "compress": {},
    "calibrate": {},
    "teacher": {},
    "distill": {},
    "distill, autocast": {"autocast": True},
    "distill, checkpointing": {"checkpointing": True},
    "distill, autocast, checkpointing": {"autocast": True, "checkpointing": True},
}


def measure(seeds: Sequence[int], size: str, log: Log) -> list[dict[str, Any]]:
    """The rows of every model size and case; the seeds are repetitions, with other weights."""
    if not Path("/proc/self/clear_refs").exists():
        raise Error("study memory: needs /proc, so Linux")
    found: list[dict[str, Scores]] = []
    for seed in seeds:
        scores: dict[str, Scores] = {}
        for hidden, layers in SIZES[size]:
            with tempfile.TemporaryDirectory(prefix="bitdelta-memory-") as scratch:
                folder = Path(scratch)
                label = f"{_make(folder, hidden, layers, seed) / 1e6:.1f} M parameters"
                for case in CASES:
                    scores[f"{label}: {case}"] = {"memory": _watch(case, folder)}
                    log(f"seed {seed}, {label}: {case}")
        found.append(scores)
    return rows_of(found)


def _make(folder: Path, hidden: int, layers: int, seed: int) -> int:
    """base, finetuned and tokens.npy, random; the number of parameters."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with training.seeded(seed):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
        model.save_pretrained(folder / "finetuned")
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (ROWS, LENGTH))
    np.save(folder / "tokens.npy", tokens)
    return int(sum(parameter.numel() for parameter in model.parameters()))


def _watch(case: str, folder: Path) -> dict[str, float]:
    """Runs a case in a child and watches its memory from outside."""
    command = [sys.executable, "-m", "bitdelta.study.memory", case, str(folder)]
    errors = folder / "errors.txt"
    with (
        open(errors, "w") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=child_environment(),
        ) as child,
    ):
        try:
            return _talk(case, child, errors)
        finally:
            child.kill()


def _talk(case: str, child: subprocess.Popen[str], errors: Path) -> dict[str, float]:
    """Lets the child go when it is ready, and looks at it until it has answered."""
    assert child.stdin is not None and child.stdout is not None
    if child.stdout.readline() != "ready\n":
        raise Error(f"study memory: {case} did not start: {_last(errors)}")
    start = _status(child.pid)
    Path(f"/proc/{child.pid}/clear_refs").write_text("5")  # VmHWM begins again
    child.stdin.write("go\n")
    child.stdin.flush()
    private = 0
    while not select.select([child.stdout], [], [], SAMPLED)[0]:
        private = max(private, _status(child.pid).get("RssAnon", 0))
    answer = child.stdout.readline()
    if not answer:
        raise Error(f"study memory: {case} failed: {_last(errors)}")
    peak = _status(child.pid)["VmHWM"]
    return {
        "peak": float(peak - start["VmRSS"]),
        "private": float(private - start["RssAnon"]),
        "seconds": float(json.loads(answer)),
    }


def _last(errors: Path) -> str:
    """The end of what a child said, as one line."""
    return " ".join(errors.read_text().split())[-300:]


def _status(pid: int) -> dict[str, int]:
    """The memory of a process in bytes, by the kernel's names; {} when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    fields = (line.split() for line in text.splitlines())
    return {part[0].rstrip(":"): 1024 * int(part[1]) for part in fields if len(part) == 3 and part[2] == "kB"}


def _child(case: str, folder: Path) -> None:
    """Imports, waits, runs the case, says how many seconds it took, and waits to be looked at."""
    tokens = np.load(folder / "tokens.npy")
    _warm_up()
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    _run(case, folder, tokens)
    print(json.dumps(time.perf_counter() - start), flush=True)
    sys.stdin.readline()


def _warm_up() -> None:
    """What PyTorch and transformers import at their first use is no part of a case."""
    import peft  # noqa: F401 - transformers imports it when a model is loaded
    import torch
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from transformers.models.llama import modeling_llama  # noqa: F401

    from .. import distillation  # noqa: F401

    training.libraries("a study")
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    apply_activation_checkpointing(model, check_fn=lambda module: module is not model)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(1, 1)).sum().backward()
    optimizer.step()


def _run(case: str, folder: Path, tokens: Any) -> None:
    from ..calibrate import calibrate
    from ..compress import compress
    from ..distill import distill

    base, finetuned, delta = folder / "base", folder / "finetuned", folder / "delta"
    if case == "compress":
        compress(base, finetuned, delta)
        return
    out = folder / case.replace(", ", "-")
    if case == "calibrate":
        calibrate(base, finetuned, delta, tokens, out)
        return
    steps = 1 if case == "teacher" else STEPS
    distill(base, finetuned, delta, tokens, out, steps, BATCH, LENGTH, cache=folder / "cache", **CASES[case])


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
