"""One linear of a decoding step against its size and the number of tenants, a row each.

    naive     a dense product for each tenant, with a weight of its own
    lora r    one base product for all rows, and every row's own adapter, as S-LoRA multiplies them: gathered
    deltas    base and deltas of all rows in one call

Square weights [N, N] in bf16. Dense products and adapters are those of the library that is fastest here for this size
and number of rows; each case is checked first (strips.py). Source of the figure: BitDelta, arXiv 2402.10193, section 4.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from .. import _C
from ..array import as_bfloat16, empty_like, to_float32
from ..table import table
from ..threads import let_torch_sleep, set_num_threads
from . import machine, strips
from .data import FULL, QUICK, Data, at
from .products import Bench, Cases, torch_of
from .timing import Case, fastest, interleaved

SIZES, QUICK_SIZES = (1024, 2048, 4096, 8192), (256, 512)
TENANTS, QUICK_TENANTS = (1, 2, 4, 8, 16), (1, 3)
RANKS = 16, 128
COLUMNS = (
    ">size",
    ">tenants",
    ">naive ms",
    *(f">LoRA r={rank} ms" for rank in RANKS),
    ">deltas ms",
    ">spread",
    ">of read",
    ">against naive",
)


class Linear(Bench):
    """The cases of one size."""

    def __init__(self, data: Data, size: int, quick: bool, torch: Any) -> None:
        super().__init__(data, (size, size), quick, torch)
        self.seconds = 0.01 if quick else 2.5
        self.one = _best(self.dense(1))

    def cases(self, tenants: int) -> dict[tuple[str, str, int], Case]:
        """(kind, variant, rank) -> case."""
        x = self.data.rows(tenants, self.shape[0])
        (_, name), one = self.one
        found = {("naive", name, 0): self.naive(one, tenants), ("deltas", self.isas[0], 0): self.deltas_of(x)}
        out = empty_like(x, x.shape)
        dense = self.dense(tenants, x, out)
        for rank in RANKS:
            name, case = _best(self.lora(dense, x, out, rank))
            found["lora", name, rank] = case
        return found

    def naive(self, one: Case, tenants: int) -> Case:
        def call(turn: int) -> None:
            for i in range(tenants):
                one.call(turn * tenants + i)

        def check(_: Any) -> None:
            one.verify()

        return Case(call, tenants * self.weight_bytes, one.isa, check)

    def deltas_of(self, x: Any) -> Case:
        out, ids = empty_like(x, x.shape), np.arange(len(x))

        def own(turn: int) -> list[Any]:
            return [at(self.deltas, turn * len(x) + i) for i in range(len(x))]

        def call(turn: int) -> None:
            handles = [delta.handle for delta in own(turn)]
            _C.linear(out, x, at(self.weights, turn), None, None, handles, ids, "fixed16")

        def check(_: Any) -> None:
            strips.close("deltas, fused", out, x, self.weights[:1], own(0), ids)

        return Case(call, self.weight_bytes + len(x) * self.sign_bytes, self.isas[0], check)

    def lora(self, dense: Cases, x: Any, out: Any, rank: int) -> dict[str, Case]:
        """x W^T by each library, plus every row's (x A^T) B^T: A [tenants, r, N], B [tenants, N, r]."""
        tenants, size = x.shape
        count = tenants * rank * size  # elements of all A

        def factors(flat: Any, turn: int) -> tuple[Any, Any]:
            first = 2 * count * (turn % (len(flat) // (2 * count)))
            a, b = flat[first : first + count], flat[first + count : first + 2 * count]
            return a.reshape(tenants, rank, size), b.reshape(tenants, size, rank)

        def check(weight: Any, flat: Any, y: Any) -> None:
            a, b = map(to_float32, factors(flat, 0))
            u = to_float32(x).astype(np.float64)
            low = np.einsum("tk,trk->tr", u, a)
            for rows in strips.row_strips(size):
                wanted = u @ to_float32(weight[rows]).T + np.einsum("tr,tnr->tn", low, b[:, rows])
                strips.near(f"LoRA r={rank}, {tenants} rows", to_float32(y[:, rows]), wanted)

        n_bytes = self.weight_bytes + 4 * count  # of adapters in bf16
        cases = {}
        for (_, name), base in dense.items():
            weight = (self.data.float_weights(size, size) if "fp32" in name else self.weights)[0]
            for kind, (flat, apply) in self.adapters(x, factors).items():
                call = _added(base, apply, out)
                cases[f"{name}, adapters {kind}"] = Case(
                    call, n_bytes, base.isa, partial(check, weight, flat)
                )
        return cases

    def adapters(self, x: Any, factors: Any) -> dict[str, tuple[Any, Callable[[int], Any]]]:
        """By name: where all factors are, and a call that gives rows times factors, [tenants, N]."""
        torch, wide = self.torch, to_float32(x)[:, None]
        floats, halves = self.data.floats, as_bfloat16(self.data.words.view(np.uint16))
        if torch is None:

            def numpy(turn: int) -> Any:
                a, b = factors(floats, turn)
                return (wide @ a.transpose(0, 2, 1) @ b.transpose(0, 2, 1))[:, 0]

            return {"NumPy fp32": (floats, numpy)}

        def gathered(rows: Any, flat: Any, turn: int) -> Any:
            a, b = factors(flat, turn)
            return torch.bmm(torch.bmm(rows, a.transpose(1, 2)), b.transpose(1, 2))[:, 0]

        rows, half = torch.from_numpy(wide), torch.from_numpy(halves.bits.view(np.int16)).view(torch.bfloat16)
        return {
            "bf16": (halves, partial(gathered, rows.to(torch.bfloat16), half)),
            "fp32": (floats, partial(gathered, rows, torch.from_numpy(floats))),
        }


def _added(base: Case, apply: Callable[[int], Any], own: Any) -> Callable[[int], Any]:
    """base + adapters, as the library of the adapters adds."""

    def call(turn: int) -> Any:
        product: Any = base.call(turn)
        product = own if product is None else product
        adapted = apply(turn)
        if isinstance(adapted, np.ndarray):
            adapted += to_float32(product)
            return adapted
        if not hasattr(product, "add_"):
            import torch

            product = torch.from_numpy(product.bits.view(np.int16)).view(torch.bfloat16)
        return product.add_(adapted)

    return call


def _best(cases: dict[Any, Case]) -> tuple[Any, Case]:
    return next(iter(fastest(cases, 1.0).items()))


def measure(threads: int, quick: bool, emit: Callable[[dict[str, Any]], None]) -> None:
    set_num_threads(threads)
    torch = torch_of(threads)
    data = Data(QUICK if quick else FULL)
    bandwidth = machine.read_bandwidth(data.words, 3 if quick else 9)
    for size in QUICK_SIZES if quick else SIZES:
        emit({"log": f"{size} x {size}, {threads} thread{'s' * (threads != 1)}"})
        linear = Linear(data, size, quick, torch)
        for tenants in QUICK_TENANTS if quick else TENANTS:
            cases = linear.cases(tenants)
            emit({"checked": sum(case.verify() for case in cases.values())})
            samples = interleaved(cases, linear.seconds, linear.min_rounds)
            naive = next(sample.median for (kind, *_), sample in samples.items() if kind == "naive")
            for (kind, variant, rank), sample in samples.items():
                rate = cases[kind, variant, rank].n_bytes / sample.median
                emit(
                    {
                        "kind": kind,
                        "variant": variant,
                        "rank": rank or None,
                        "size": size,
                        "tenants": tenants,
                        "threads": threads,
                        "microseconds": sample.median * 1e6,
                        "spread": sample.spread,
                        "calls": sample.calls,
                        "bytes_per_second": rate,
                        "share": rate / bandwidth,
                        "speed": naive / sample.median,
                    }
                )


def describe(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each size and number of tenants."""
    found = {(row["size"], row["tenants"], row["kind"], row["rank"]): row for row in rows}
    lines = []
    for size, tenants in dict.fromkeys((row["size"], row["tenants"]) for row in rows):
        ours = found[size, tenants, "deltas", None]
        kinds = [("naive", None), *(("lora", rank) for rank in RANKS), ("deltas", None)]
        times = [f"{found[size, tenants, kind, rank]['microseconds'] / 1e3:.3f}" for kind, rank in kinds]
        shares = [f"{ours['spread']:.0%}", f"{ours['share']:.0%}", f"{ours['speed']:.2f}x"]
        lines.append([str(size), str(tenants), *times, *shares])
    yield from table(
        COLUMNS,
        lines,
        f"one linear, a row a tenant, {rows[0]['threads']} thread{'s' * (rows[0]['threads'] != 1)}",
    )
    names = {
        kind: sorted({row["variant"] for row in rows if row["kind"] == kind}) for kind in ("naive", "lora")
    }
    yield f"naive by {', '.join(names['naive'])}; LoRA by {'; '.join(names['lora'])}"


def main() -> None:
    def emit(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    let_torch_sleep()  # beside the kernels' own threads
    measure(int(sys.argv[1]), "--quick" in sys.argv, emit)
