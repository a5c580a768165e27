"""The paper's own tables as data: models, tasks, shots, methods, and the figures that it reports.

BitDelta: Your Fine-Tune May Only Be Worth One Bit, arXiv 2402.10193, v3. The figures are those that the authors'
project page repeats (fasterdecoding.github.io/BitDelta, and docs/index.html of FasterDecoding/BitDelta); a table or
row without figures is one that only the paper itself has, and nothing is filled in for it. Task and shots are the
paper's section 4.1, the distillation that of 3.1. `paper_run.py` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TEXT = "allenai/c4:en"  # 800 samples of 128 tokens: 200 steps of 4
STEPS, BATCH, LENGTH = 200, 4, 128


@dataclass(frozen=True)
class Task:
    """A benchmark as the paper takes it, and lm_eval's name for it.

    Args:
        name: lm_eval's.
        shots: the paper's.
        metric: of lm_eval's; the paper does not name its own, these are the usual ones of the Open LLM Leaderboard.
        runs: the shots that lm_eval's task has, where they are fixed and others.
    """

    name: str
    shots: int
    metric: str
    runs: int | None = None


TASKS = {
    "ARC": Task("arc_challenge", 25, "acc_norm"),
    "BBH": Task("bbh_fewshot", 5, "exact_match", runs=3),  # its questions come with three worked examples
    "HellaSwag": Task("hellaswag", 10, "acc_norm"),
    "TruthfulQA": Task("truthfulqa_mc2", 0, "acc"),
    "LAMBADA": Task("lambada_openai", 0, "acc"),
    "Winogrande": Task("winogrande", 0, "acc"),
    "GSM8K": Task("gsm8k", 5, "exact_match"),
}
ADJUSTED = ("ARC", "BBH", "HellaSwag", "Winogrande")  # the "adjusted average" is theirs
JUDGED = "MT-Bench is FastChat's and needs a language model as its judge; it is not run"


@dataclass(frozen=True)
class Row:
    """One line of a table: what is measured, and what the paper reports.

    Args:
        label: the paper's.
        base, finetuned: Hub ids; "" where the paper does not publish the model.
        method: base, finetuned, initial (sign(d), mean |d|), distilled, svd.
        planes: of a delta.
        quantized: "", or a method of quantize.py that the base (of `finetuned`: it) is put through first.
        rank: of svd.
        reported: metric -> figure.
    """

    label: str
    base: str
    finetuned: str
    method: str
    planes: int = 1
    quantized: str = ""
    rank: int = 0
    reported: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Row, ...]
    tasks: tuple[str, ...] = ("TruthfulQA", "GSM8K", *ADJUSTED)
    note: str = ""


LLAMA, CHAT = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"
VICUNA, LONG = "lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5-16k"
MISTRAL, ZEPHYR = "mistralai/Mistral-7B-v0.1", "HuggingFaceH4/zephyr-7b-beta"
LARGER = {"13b": "meta-llama/Llama-2-13b", "70b": "meta-llama/Llama-2-70b"}


def _figures(truthful: float, gsm8k: float, bench: float | None, adjusted: float) -> dict[str, float]:
    bench_of = {} if bench is None else {"MT-Bench": bench}
    return {"TruthfulQA": truthful, "GSM8K": gsm8k, **bench_of, "adjusted average": adjusted}


VICUNA_ROWS = (
    Row("Llama 2-7B", LLAMA, VICUNA, "base", reported=_figures(38.96, 13.57, None, 60.53)),
    Row("Vicuna-7B v1.5", LLAMA, VICUNA, "finetuned", reported=_figures(50.36, 19.03, 6.04, 60.51)),
    Row(
        "BitDelta-Initial",
        LLAMA,
        VICUNA,
        "initial",
        reported={"distillation loss": 0.41, **_figures(47.63, 19.56, 5.67, 60.99)},
    ),
    Row(
        "BitDelta",
        LLAMA,
        VICUNA,
        "distilled",
        reported={"distillation loss": 0.052, **_figures(49.97, 20.17, 5.99, 60.68)},
    ),
)


def _pair(name: str, base: str, finetuned: str) -> tuple[Row, ...]:
    return (
        Row(name, base, finetuned, "finetuned"),
        Row(f"{name}, BitDelta-Initial", base, finetuned, "initial"),
        Row(f"{name}, BitDelta", base, finetuned, "distilled"),
    )


MODELS = (
    *VICUNA_ROWS,
    *_pair("Llama 2-7B Chat", LLAMA, CHAT),
    *_pair("Vicuna-7B v1.5 16k", LLAMA, LONG),
    *_pair("Zephyr-7B-beta", MISTRAL, ZEPHYR),
)
SOME = (
    "the paper has 17 fine-tunes; here are those that it or its repository names where we could read, and the figures "
    "of one"
)

QUANTIZED = (
    Row("Baseline, FP16", LLAMA, CHAT, "finetuned", reported=_figures(45.32, 22.74, 6.56, 59.81)),
    Row(
        "Baseline, INT8 RTN",
        LLAMA,
        CHAT,
        "finetuned",
        quantized="INT8 RTN",
        reported=_figures(45.02, 22.29, 6.28, 59.63),
    ),
    Row(
        "Baseline, GPTQ",
        LLAMA,
        CHAT,
        "finetuned",
        quantized="GPTQ",
        reported=_figures(44.92, 19.48, 5.90, 58.67),
    ),
    Row("Llama 2-7B, FP16 + delta", LLAMA, CHAT, "distilled", reported=_figures(44.95, 20.24, 6.47, 59.88)),
    Row(
        "Llama 2-7B, INT8 RTN + delta",
        LLAMA,
        CHAT,
        "distilled",
        quantized="INT8 RTN",
        reported=_figures(44.71, 19.86, 6.16, 59.85),
    ),
    Row(
        "Llama 2-7B, GPTQ + delta",
        LLAMA,
        CHAT,
        "distilled",
        quantized="GPTQ",
        reported=_figures(42.52, 19.94, 6.02, 59.22),
    ),
    Row(
        "Llama 2-7B Chat, GPTQ + delta",
        CHAT,
        CHAT,
        "distilled",
        quantized="GPTQ",
        reported=_figures(44.63, 22.14, 6.11, 59.17),
    ),
)
NO_QUIP = (
    "the paper's rows of QuIP# are left out: neither their figures nor a package that quantises on a CPU"
)


def _size(name: str, base: str, finetuned: str, gb: float, delta_gb: float, factor: float) -> Row:
    reported = {"GB": gb, "delta GB": delta_gb, "factor": factor}
    return Row(name, base, finetuned, "size", reported=reported)


TABLES = {
    1: Table(
        "1 bit against truncated singular values",
        (
            Row("Llama 2-7B", LLAMA, CHAT, "base"),
            Row("Llama 2-7B Chat", LLAMA, CHAT, "finetuned"),
            Row("BitDelta-Initial", LLAMA, CHAT, "initial"),
            Row("BitDelta", LLAMA, CHAT, "distilled"),
            Row("SVD, r = 16", LLAMA, CHAT, "svd", rank=16),
            Row("SVD, r = 128", LLAMA, CHAT, "svd", rank=128),
        ),
        note="no figures in reach; the paper also distills its SVD factors, which this does not",
    ),
    2: Table("fine-tunes of several families", MODELS, note=SOME),
    5: Table(
        "sizes and compression factors",
        (
            _size("Llama 2-7B", LLAMA, CHAT, 13.48, 1.24, 10.87),
            _size("Llama 2-13B", f"{LARGER['13b']}-hf", f"{LARGER['13b']}-chat-hf", 26.03, 2.09, 12.45),
            _size("Llama 2-70B", f"{LARGER['70b']}-hf", f"{LARGER['70b']}-chat-hf", 137.95, 8.95, 15.41),
            _size("Mistral-7B v0.1", MISTRAL, ZEPHYR, 14.48, 1.30, 11.14),
        ),
        tasks=(),
        note="the paper's sizes are decimal GB, its deltas binary ones; ours are both decimal, so that its 10.87 is "
        "10.10 in one unit. Any fine-tune without added tokens has the same size.",
    ),
    6: Table("a delta over a quantised base", QUANTIZED, note=NO_QUIP),
    7: Table(
        "a LoRA fine-tune (r = 16, UltraChat), merged",
        (
            Row("Llama 2-7B", LLAMA, "", "base"),
            Row("fine-tune", LLAMA, "", "finetuned"),
            Row("BitDelta", LLAMA, "", "distilled"),
        ),
        tasks=tuple(TASKS),
        note="no figures in reach; the fine-tune is not published: give it with --finetuned",
    ),
    8: Table("a delta over a quantised base, every task", QUANTIZED, tuple(TASKS), NO_QUIP),
    9: Table(
        "more bits",
        (
            *VICUNA_ROWS[:2],
            *(
                Row(f"{n} bit{'s' * (n > 1)}", LLAMA, VICUNA, "distilled", planes=n, reported={})
                for n in range(1, 9)
            ),
        ),
        tasks=tuple(TASKS),
        note="the paper's figures for each number of bits are not in reach",
    ),
    10: Table("fine-tunes of several families, every task", MODELS, tuple(TASKS), SOME),
}
