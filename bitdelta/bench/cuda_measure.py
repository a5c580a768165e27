"""The measurements of `bench cuda`: each checks what it times, and yields rows of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from .. import _C, cuda, cuda_memory, ops
from ..errors import Error
from ..torch_delta import TorchDelta
from . import cuda_cases, cuda_check, cuda_peers
from .cuda_cases import (
    CUBLAS,
    DELTA,
    EXPANDED,
    EXTRACTION,
    HOST,
    MERGED,
    OURS,
    PREFILL,
    TRAINING,
    WHOLE,
    Problem,
)
from .cuda_data import Batch, Data, batches, plan_of
from .cuda_goals import name_of
from .cuda_timing import each

if TYPE_CHECKING:
    from .cuda import Bench

Row: TypeAlias = dict[str, Any]


def product(bench: Bench, problem: Problem) -> Iterator[Row]:
    """Ours first, checked and timed; then what it is compared with."""
    found = batches(bench.data, problem)
    if problem.kind == TRAINING:
        yield from training(bench, problem, found)
        return
    cuda_check.products(found[0])
    n_operations = 0 if problem.kind == DELTA else 2 * len(problem.ids()) * problem.base_bytes // 2
    yield bench.row(problem, OURS, [batch.call for batch in found], problem.n_bytes, n_operations)
    if problem.kind == PREFILL or problem.tenants == 1:
        yield from base(bench, problem, found)
    if problem.kind == PREFILL:
        yield from merged(bench, problem, found)
    if problem.peers:
        yield from peers(bench, problem)


def base(bench: Bench, problem: Problem, found: list[Batch]) -> Iterator[Row]:
    """The base alone, in bf16, as every model without deltas runs it."""

    def call(batch: Batch) -> None:
        torch.mm(batch.x, batch.weight.T, out=batch.out)

    yield bench.row(problem, CUBLAS, each(call, found), problem.base_bytes + problem.row_bytes)


def merged(bench: Bench, problem: Problem, found: list[Batch]) -> Iterator[Row]:
    """W' = round(base + delta), then one product: ours by panels where this build has it, and of the whole W'."""
    n_bytes = problem.n_bytes
    if problem.tenants > 1:
        return
    linear, ids = problem.linear, np.zeros(len(problem.ids()), np.int64)
    scratch = torch.empty(linear.N, linear.K, dtype=torch.bfloat16, device=bench.data.device)
    found[0].whole()
    exact = found[0].out.clone()

    def expanded(batch: Batch) -> None:
        first = 0
        for part in batch.parts:
            rows = slice(first, first + part.out.shape[1])
            column = None if part.columns is None else part.columns[0]
            N = part.out.shape[1]
            _C.cuda_expand(scratch[rows], batch.weight[rows], part.signs[0], part.rows[0], column, N, 0)
            first += N
        torch.mm(batch.x, scratch.T, out=batch.out)

    def by_panels(batch: Batch) -> None:
        first = 0
        for part in batch.parts:
            N = part.out.shape[1]
            column = None if part.columns is None else part.columns[0]
            delta = TorchDelta(part.signs[0].view(torch.int32), part.rows[0], column, (N, linear.K))
            weight = batch.weight[first : first + N]
            cuda.linear(batch.x, weight, [delta], ids, None, "merged", part.out)
            first += N

    for by, call in ((EXPANDED, expanded), (MERGED, by_panels)):
        found[0].out.fill_(float("nan"))
        call(found[0])
        cuda_check.close(found[0].out, exact, cuda_check.CLOSE, by)
        yield bench.row(problem, by, each(call, found), n_bytes)


def peers(bench: Bench, problem: Problem) -> Iterator[Row]:
    """The rivals of a problem, each a part of its own."""
    for name, build in cuda_peers.peers(problem, bench.seconds_left()):
        yield from bench.part(f"{name_of(problem)}, {name}", partial(_peer, bench, problem, build))


def _peer(bench: Bench, problem: Problem, build: Callable[[Data], cuda_peers.Peer]) -> Iterator[Row]:
    peer = build(bench.data)
    peer.check()
    yield bench.row(problem, peer.name, peer.calls, peer.n_bytes, **peer.about)


def training(bench: Bench, problem: Problem, found: list[Batch]) -> Iterator[Row]:
    """dX and the gradient of row scales, against the dense dX alone."""
    linear, ids = problem.linear, torch.tensor(problem.ids())
    dy = bench.data.rows(len(ids), linear.N)
    dys = [part.contiguous() for part in dy.split(linear.widths, dim=1)]

    def call(batch: Batch) -> tuple[Any, ...]:
        dx = cuda.multiply(dy, batch.weight)
        found: tuple[Any, ...] = ()
        for part, mine in zip(batch.parts, dys, strict=True):
            found = cuda.gradients(mine, batch.x, part.table, batch.plan, True, True, False)
            dx += found[0]
        return dx.to(torch.bfloat16), *found

    _, g, drow, _ = call(found[0])
    cuda_check.gradients(found[0].parts[-1], found[0].x, dys[-1], ids, g, drow)
    n_bytes, n_operations = problem.n_bytes, 2 * len(ids) * linear.N * linear.K
    yield bench.row(problem, OURS, each(call, found), n_bytes, n_operations)
    dense = each(lambda batch: torch.mm(dy, batch.weight), found)
    yield bench.row(problem, CUBLAS, dense, problem.base_bytes + problem.row_bytes, n_operations)


def small_products(bench: Bench) -> Iterator[Row]:
    """What cuBLAS makes of few rows: the base's part of every batch, fp32 results as our kernels take them."""
    for name in cuda_cases.NAMES:
        for n_rows in (1, 8, 16, 32, 64):
            problem = Problem(WHOLE, "7B", name, n_rows, 1)
            size, linear = problem.base_bytes, problem.linear
            count = cuda_cases.n_sets(size)
            weights = [
                bench.data.weights.cut(i * size, (linear.N, linear.K), torch.bfloat16) for i in range(count)
            ]
            x = bench.data.rows(n_rows, linear.K)
            calls = each(partial(cuda.multiply, x, is_transposed=True), weights)
            yield bench.row(problem, CUBLAS + ", fp32", calls, size + problem.row_bytes)


def host(bench: Bench) -> Iterator[Row]:
    """What the host spends in an eager call of one row, by how it is made; the GPU is done sooner."""
    problem = Problem(DELTA, "tiny", "o", 1, 1)
    batch = Batch(bench.data, problem, plan_of(problem, bench.data.device), 0)
    part, ids = batch.parts[0], torch.zeros(1, dtype=torch.int64, device=bench.data.device)
    delta = TorchDelta(
        part.signs[0].view(torch.int32), part.rows[0], None, (part.rows.shape[2], batch.x.shape[1])
    )
    calls = {
        OURS: ("the extension", batch.delta),
        "bitdelta.cuda.linear": (
            "the library, table and plan made",
            lambda: cuda.linear(batch.x, None, part.table, batch.plan, out=batch.out),
        ),
        "bitdelta.ops.linear": (
            "the dispatcher, ids on the GPU",
            lambda: ops.linear(batch.x, None, None, [delta], ids),
        ),
    }
    for by, (case, call) in calls.items():
        sample = bench.host_sample(call)
        yield {
            "kind": HOST,
            "case": case,
            "by": by,
            "microseconds": sample.median * 1e6,
            "spread": sample.spread,
            "samples": sample.calls,
        }


def extraction(bench: Bench) -> Iterator[Row]:
    """One plane with row scales, of pairs in bf16, and of the first shape in every dtype."""
    kinds = [(shape, torch.bfloat16) for shape in cuda_cases.SHAPES[: 1 if bench.quick else None]]
    kinds += [(cuda_cases.SHAPES[0], dtype) for dtype in (torch.float16, torch.float32)]
    for (N, K), dtype in kinds:
        yield extraction_row(bench, N, K, dtype)


def extraction_row(bench: Bench, N: int, K: int, dtype: Any) -> Row:
    size = N * K * torch.empty(0, dtype=dtype).element_size()
    count = cuda_cases.n_sets(2 * size)
    weights = [bench.data.weights.cut(i * size, (N, K), dtype) for i in range(2 * count)]
    sign = torch.empty((1, N // 16, K // 32, 16), dtype=torch.int32, device=bench.data.device).view(
        torch.uint32
    )
    scale = torch.empty((1, N), dtype=torch.float32, device=bench.data.device)
    bad = torch.empty(1, dtype=torch.int64, device=bench.data.device)
    workspace = cuda_memory.scratch(scale, _C.cuda_workspace_bytes("extract", N, K, 1))

    def call(i: int) -> None:
        _C.cuda_extract(weights[2 * i], weights[2 * i + 1], 1, 1, sign, scale, None, bad, workspace)

    call(0)
    if int(bad[0]) != -1:
        raise Error(f"extract says that {_C.cuda_position(int(bad[0]), K)} is not finite")
    cuda_check.extraction(weights[0], weights[1], sign, scale)
    n_bytes = 2 * size + N * K // 8 + 4 * N
    figures = bench.figures(*bench.samples(each(call, range(count))), n_bytes)
    return {
        "kind": EXTRACTION,
        "N": N,
        "K": K,
        "dtype": str(dtype).removeprefix("torch."),
        "by": OURS,
        "sets": count,
        **figures,
        "copy_share": figures["bytes_per_second"] / bench.limits["copy"],
    }
