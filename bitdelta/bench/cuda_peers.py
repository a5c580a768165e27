"""What users could run instead, each checked before it is timed.

For base + delta: a weight in bf16 for every tenant, multiplied one after the other, by bmm and by grouped_mm; and, as
context only, LoRA of some ranks. For the delta alone: the two kernels of cuda_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from . import cuda_check
from .cuda_cases import BMM, DELTA, DENSE, FOUR_STEPS, LORA, MM, ORIGINAL, RANKS, TUNED, Problem, n_sets
from .cuda_data import Data
from .cuda_timing import Call, each

TUNING_SECONDS = 40.0  # of one problem's tiles, most of it compiling


@dataclass
class Peer:
    """A rival's calls, one for each set."""

    name: str
    calls: list[Call]
    check: Callable[[], None]
    n_bytes: int  # the fewest that one call moves
    about: dict[str, Any] = field(default_factory=dict)
    x: Any = None  # what is multiplied, and the result, of kernels that others go on with
    y: Any = None


def peers(problem: Problem, seconds: float) -> Iterator[tuple[str, Callable[[Data], Peer]]]:
    """Names, and what builds them; building raises MemoryError where the pools are too small.

    `seconds` are left of the run: no tiles are tried for longer.
    """
    if problem.kind == DELTA:
        yield ORIGINAL, partial(triton_peer, problem=problem, name=ORIGINAL, seconds=seconds)
        yield TUNED, partial(triton_peer, problem=problem, name=TUNED, seconds=seconds)
        return
    for name in DENSE:
        yield name, partial(dense, problem=problem, name=name)
    yield FOUR_STEPS, partial(four_steps, problem=problem, seconds=seconds)
    for rank in RANKS:
        yield LORA.format(rank), partial(lora, problem=problem, rank=rank)


def dense(data: Data, problem: Problem, name: str) -> Peer:
    """x [T, m, K] times a bf16 weight [T, N, K] of every tenant."""
    n_tenants, m, N, K = problem.tenants, problem.rows, problem.linear.N, problem.linear.K
    size = 2 * n_tenants * N * K
    count = _count(data.weights.n_bytes, size)
    weights = [data.weights.cut(i * size, (n_tenants, N, K), torch.bfloat16) for i in range(count)]
    x = data.rows(n_tenants, m, K)
    out = torch.empty(n_tenants, m, N, dtype=x.dtype, device=x.device)
    grouped = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    ends = torch.arange(1, n_tenants + 1, dtype=torch.int32, device=x.device) * m
    results = [out] * count

    def call(i: int) -> None:
        weight = weights[i]
        if name == MM:
            for t in range(n_tenants):
                torch.mm(x[t], weight[t].T, out=out[t])
        elif name == BMM:
            torch.bmm(x, weight.transpose(1, 2), out=out)
        else:
            results[i] = grouped(x.view(-1, K), weight.transpose(1, 2), offs=ends).view(n_tenants, m, N)

    def check() -> None:
        out.fill_(float("nan"))
        call(0)
        n = slice(max(0, N - 64), N)
        for t in {0, n_tenants - 1}:
            expected = x[t].double() @ weights[0][t, n].double().T
            cuda_check.close(results[0][t, :, n], expected, cuda_check.CLOSE, name)

    return Peer(name, each(call, range(count)), check, problem.dense_bytes)


def lora(data: Data, problem: Problem, rank: int) -> Peer:
    """x W^T + (x A) B, with A [T, K, r] and B [T, r, N] of every tenant; each product rounded to bf16."""
    n_tenants, m, N, K = problem.tenants, problem.rows, problem.linear.N, problem.linear.K
    n_bytes = problem.base_bytes + 2 * n_tenants * rank * (N + K) + problem.row_bytes
    count = min(_count(data.weights.n_bytes, 2 * N * K), n_sets(n_bytes))
    weights = [data.weights.cut(i * 2 * N * K, (N, K), torch.bfloat16) for i in range(count)]
    first = [data.rows(n_tenants, K, rank) / K**0.5 for _ in range(count)]
    second = [data.rows(n_tenants, rank, N) / rank**0.5 for _ in range(count)]
    x = data.rows(n_tenants, m, K)
    results: list[Any] = [None]

    def call(i: int) -> None:
        y = torch.mm(x.view(-1, K), weights[i].T).view(n_tenants, m, N)
        results[0] = torch.baddbmm(y, torch.bmm(x, first[i]), second[i])

    def check() -> None:
        call(0)
        last = n_tenants - 1
        expected = x[last].double() @ weights[0].double().T
        expected += x[last].double() @ first[0][last].double() @ second[0][last].double()
        cuda_check.close(results[0][last], expected, cuda_check.CLOSE, f"LoRA r={rank}")

    return Peer(LORA.format(rank), each(call, range(count)), check, n_bytes)


def four_steps(data: Data, problem: Problem, tile: Any = None, seconds: float = TUNING_SECONDS) -> Peer:
    """x W^T + scale * (the delta by the original's kernel): one scale a tenant, fp16 in between, four launches."""
    n_tenants, m, N, K = problem.tenants, problem.rows, problem.linear.N, problem.linear.K
    kernel = triton_peer(data, problem, ORIGINAL, tile, torch.float16, seconds)
    scale = data.scales(n_tenants, 1, 1).half()
    count = min(len(kernel.calls), _count(data.weights.n_bytes, 2 * N * K))
    weights = [data.weights.cut(i * 2 * N * K, (N, K), torch.float16) for i in range(count)]
    results: list[Any] = [None]

    def call(i: int) -> None:
        kernel.calls[i]()
        base = torch.mm(kernel.x.view(-1, K), weights[i].T).view(n_tenants, m, N)
        results[0] = base + scale * kernel.y

    def check() -> None:
        kernel.check()
        call(0)
        expected = kernel.x[-1].double() @ weights[0].double().T + scale[-1].double() * kernel.y[-1].double()
        cuda_check.close(results[0][-1], expected, cuda_check.CLOSE, FOUR_STEPS)

    calls = each(call, range(count))
    return Peer(FOUR_STEPS, calls, check, problem.base_bytes + kernel.n_bytes, kernel.about)


def triton_peer(
    data: Data,
    problem: Problem,
    name: str,
    tile: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = TUNING_SECONDS,
) -> Peer:
    """The delta alone by a Triton kernel.

    Args:
        tile: of the kernel; None: the fastest by trial, which needs a GPU.
        dtype: of x.
        seconds: for trying tiles, at most TUNING_SECONDS.
    """
    from . import cuda_triton

    kind: Any = cuda_triton.Original if name == ORIGINAL else cuda_triton.Tuned
    n_tenants, m, N, K = problem.tenants, problem.rows, problem.linear.N, problem.linear.K
    size = n_tenants * N * K // 8
    count = min(_count(data.bits.n_bytes, size), n_sets(size))
    shape = (n_tenants, K // 32, N) if name == ORIGINAL else (n_tenants, N * K // 32)
    words = [data.bits.cut(i * size, shape) for i in range(count)]
    x, scale = data.rows(n_tenants, m, K, dtype=dtype), data.scales(n_tenants, N)
    y = torch.empty(
        n_tenants, m, N, dtype=torch.float16 if name == ORIGINAL else torch.float32, device=x.device
    )

    def run(tile: Any, i: int) -> None:
        if name == ORIGINAL:
            tile(x, words[i], y)
        else:
            tile(x, words[i], scale, y)

    if tile is None:
        turn = iter(range(1 << 30))
        tiles = kind.tiles(m, N, K)
        seconds = min(seconds, TUNING_SECONDS)
        tile = cuda_triton.fastest(tiles, lambda each: run(each, next(turn) % count), seconds)

    def check() -> None:
        y.fill_(float("nan"))
        run(tile, 0)
        last = slice(n_tenants - 1, n_tenants)
        signs = cuda_triton.signs_of(words[0][last], N, K, tile)[0, -64:]
        expected = x[-1].double() @ signs.double().T
        if name == TUNED:
            expected *= scale[-1, -64:].double()
        cuda_check.close(y[-1, :, -64:], expected, cuda_check.CLOSE, name)

    calls = each(partial(run, tile), range(count))
    return Peer(name, calls, check, size + problem.row_bytes, {"tile": repr(tile)}, x, y)


def _count(pool_bytes: int, size: int) -> int:
    """Sets that a pool holds."""
    count = min(pool_bytes // size, n_sets(size))
    if count < 3:
        raise MemoryError(
            f"three sets of {size / 1e9:.1f} GB are more than the {pool_bytes / 1e9:.1f} GB set aside"
        )
    return count
