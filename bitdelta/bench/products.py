"""Delta products, extraction and expansion against the dense product, for one number of threads.

Run as a process of its own by `bitdelta bench`, with BLAS set to the same number of threads. Each group of cases is
timed interleaved, so that a ratio compares what ran side by side, and each case is checked first on the weights that
it is timed with (strips.py). N output rows, K input columns, M rows of x.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import _C, reference
from ..array import aligned_empty, empty_like
from ..errors import Error
from ..linear import linear
from ..threads import set_num_threads
from . import machine, strips
from .data import FULL, QUICK, Data, at
from .timing import Case, Sample, fastest, interleaved

SHAPES, QUICK_SHAPES = ((4096, 4096), (11008, 4096)), ((512, 512), (528, 256))
TENANTS = 16
RIVAL_FACTOR = 2.5  # a dense product this much slower in a trial is no rival and is not timed

Cases = dict[tuple[str, str], Case]  # (kind, variant or instruction set) -> case


class Bench:
    """One shape; every group of cases is a method."""

    def __init__(self, data: Data, shape: tuple[int, int], quick: bool, torch: Any) -> None:
        self.data, self.shape, self.torch = data, shape, torch
        self.seconds, self.min_rounds = (0.01, 2) if quick else (4.0, 5)
        self.weights, self.deltas = data.weights(*shape), data.deltas(*shape)
        self.isas = [name for name in _C.isas() if "emulated" not in name]
        self.weight_bytes, self.sign_bytes = self.weights[0].nbytes, self.deltas[0].nbytes

    def groups(self) -> list[Callable[[], Cases]]:
        return [
            lambda: self.dense(1) | self.delta(1) | self.transposed(),
            self.tenants,
            lambda: self.dense(4) | self.delta(4, scalar=False),
            lambda: self.dense(16) | self.delta(16, scalar=False),
            lambda: self.dense(64) | self.delta(64, scalar=False),
            lambda: self.dense(256) | self.whole(256),
            self.extraction,
        ]

    def dense(self, M: int, x: Any = None, out: Any = None) -> Cases:
        """The dense products worth timing: ours, which writes to `out`, and those of the libraries found here."""
        N, K = self.shape
        x, ids = self.data.rows(M, K) if x is None else x, np.full(M, -1)
        out = empty_like(x, (M, N)) if out is None else out

        def own(turn: int) -> None:
            weight = at(self.weights, turn)
            if M <= _C.STREAM_ROWS:
                _C.linear(out, x, weight, None, None, (), ids, "fixed16")
            else:
                linear(x, weight, [], ids, out=out)

        def check(y: Any) -> None:
            strips.close(f"own dense product, {M} rows", out, x, self.weights[:1], (), ids)

        rivals = {("dense", "own bf16"): Case(own, self.weight_bytes, self.isas[0], check)}
        return rivals | fastest(rivals | self.libraries(x), RIVAL_FACTOR)

    def libraries(self, x: Any) -> Cases:
        """NumPy's product in fp32, or PyTorch's in bf16 and in fp32."""
        M, torch = len(x), self.torch
        wide = np.left_shift(x.bits, 16, dtype=np.uint32).view(np.float32)
        floats = self.data.float_weights(*self.shape)

        def case(name: str, call: Callable[[int], Any], weights: list[Any], size: int) -> Case:
            def check(y: Any) -> None:
                strips.close(f"{name}, {M} rows", y, x, weights[:1], (), np.full(M, -1))

            return Case(call, size * self.weight_bytes, self.isas[0], check)

        if torch is None:
            calls = {"NumPy fp32": (lambda turn: wide @ at(floats, turn).T, floats, 2)}
        else:

            def half(array: Any) -> Any:
                return torch.from_numpy(array.bits.view(np.int16)).view(torch.bfloat16)

            product = torch.nn.functional.linear
            x16, halves = half(x), list(map(half, self.weights))
            x32, singles = torch.from_numpy(wide), list(map(torch.from_numpy, floats))
            calls = {
                "torch bf16": (lambda turn: product(x16, at(halves, turn)), self.weights, 1),
                "torch fp32": (lambda turn: product(x32, at(singles, turn)), floats, 2),
            }
        return {("dense", name): case(name, *call) for name, call in calls.items()}

    def per_isa(
        self,
        kind: str,
        call: Callable[[int], object],
        n_bytes: int,
        check: Callable[[str, Any], None],
        scalar: bool = True,
    ) -> Cases:
        """One case for each instruction set of this machine; `check` gets a name and what `call(0)` returned."""
        isas = [isa for isa in self.isas if scalar or isa != "generic" or isa == self.isas[0]]
        return {(kind, isa): Case(call, n_bytes, isa, partial(check, f"{kind}, {isa}")) for isa in isas}

    def delta(self, M: int, scalar: bool = True) -> Cases:
        """M rows of one tenant, the delta's product alone."""
        N, K = self.shape
        x, ids = self.data.rows(M, K), np.zeros(M, np.int64)
        out = empty_like(x, (M, N))

        def call(turn: int) -> None:
            _C.linear(out, x, None, None, None, [at(self.deltas, turn).handle], ids, "fixed16")

        def check(what: str, _: Any) -> None:
            strips.exact(f"{what}, {M} rows", out, x, self.deltas[:1], ids)

        return self.per_isa("delta", call, self.sign_bytes, check, scalar)

    def transposed(self) -> Cases:
        N, K = self.shape
        dy, ids = self.data.rows(1, N), np.zeros(1, np.int64)
        out = empty_like(dy, (1, K))

        def call(turn: int) -> None:
            _C.linear_transposed(out, dy, [at(self.deltas, turn).handle], ids)

        def check(what: str, _: Any) -> None:
            wanted = reference.linear_transposed(dy, [strips.columns_of(self.deltas[0])], ids)
            strips.same(what, out[:, : strips.COLUMNS], wanted)

        return self.per_isa("transposed", call, self.sign_bytes, check)

    def tenants(self) -> Cases:
        """16 rows of 16 tenants over one base, fused, against one dense product for each of 16 models."""
        N, K = self.shape
        x, ids = self.data.rows(TENANTS, K), np.arange(TENANTS)
        out = empty_like(x, (TENANTS, N))

        def fused(turn: int) -> None:
            first = turn * TENANTS
            handles = [at(self.deltas, first + i).handle for i in range(TENANTS)]
            _C.linear(out, x, at(self.weights, turn), None, None, handles, ids, "fixed16")

        def sixteen(one: Case) -> Case:
            def call(turn: int) -> None:
                for i in range(TENANTS):
                    one.call(turn * TENANTS + i)

            def check(_: Any) -> None:
                one.verify()

            return Case(call, one.n_bytes * TENANTS, one.isa, check)

        def check(what: str, _: Any) -> None:
            deltas = [at(self.deltas, i) for i in range(TENANTS)]
            strips.close(what, out, x, self.weights[:1], deltas, ids)

        singles = {(f"{TENANTS} {kind}", name): sixteen(case) for (kind, name), case in self.dense(1).items()}
        n_bytes = self.weight_bytes + TENANTS * self.sign_bytes
        return singles | self.per_isa("fused", fused, n_bytes, check, scalar=False)

    def whole(self, M: int) -> Cases:
        """Base and delta of M rows of one tenant."""
        N, K = self.shape
        x, ids = self.data.rows(M, K), np.zeros(M, np.int64)
        out = empty_like(x, (M, N))

        def call(precision: str) -> Callable[[int], object]:
            return lambda turn: linear(
                x, at(self.weights, turn), [at(self.deltas, turn)], ids, precision=precision, out=out
            )

        def check(what: str, _: Any) -> None:
            strips.close(f"{what}, {M} rows", out, x, self.weights[:1], self.deltas[:1], ids)

        n_bytes = self.weight_bytes + self.sign_bytes
        exact = self.per_isa("exact", call("fixed16"), n_bytes, check, scalar=False)
        return exact | self.per_isa("merged", call("merged"), n_bytes, check, scalar=False)

    def extraction(self) -> Cases:
        """Pairs of weights: read, extracted, and one of them expanded."""
        N, K = self.shape
        size = self.weight_bytes // 8
        sign = aligned_empty(self.deltas[0].sign.shape, np.uint32)
        scale, out = np.empty((1, N), np.float32), empty_like(self.weights[0], (N, K))

        def pair_of(turn: int) -> Any:
            first = turn % (len(self.weights) // 2) * 2
            return self.data.words[first * size : (first + 2) * size]

        def read(turn: int) -> int:
            return _C.read(pair_of(turn))

        def check_read(found: int) -> None:
            if found != int(np.bitwise_xor.reduce(pair_of(0))):
                raise Error("reading two weights: not all of their words were read")

        def extract(checksum: bool) -> Callable[[int], object]:
            def call(turn: int) -> int | None:
                first = turn % (len(self.weights) // 2) * 2
                base, finetuned = self.weights[first : first + 2]
                return _C.extract(base, finetuned, 1, "row", sign, scale, None, checksum)

            return call

        def check_extract(what: str, checksum: int | None) -> None:
            base, finetuned = self.weights[:2]
            for rows in strips.row_strips(N):
                wanted = reference.extract(base[rows], finetuned[rows])
                strips.same(what, sign[:, rows.start // strips.ROWS : rows.stop // strips.ROWS], wanted.sign)
                strips.same(what, scale[:, rows], wanted.scale)
            if checksum is not None and checksum != _C.crc32c(base.bits):
                raise Error(f"{what}: its checksum is not that of the base")

        def expand(turn: int) -> None:
            _C.expand(out, at(self.weights, turn), at(self.deltas, turn).handle, 0, N)

        def check_expand(what: str, _: Any) -> None:
            for rows in strips.row_strips(N):
                wanted = reference.expand(self.weights[0][rows], strips.rows_of(self.deltas[0], rows))
                strips.same(what, out[rows], wanted)

        pair = 2 * self.weight_bytes
        return (
            {("read", ""): Case(read, pair, self.isas[0], check_read)}
            | self.per_isa("extract", extract(False), pair, check_extract)
            | self.per_isa("checksum", extract(True), pair, check_extract)
            | self.per_isa("expand", expand, pair + self.sign_bytes, check_expand)
        )


def rows_of(cases: Cases, samples: dict[tuple[str, str], Sample], bandwidth: float) -> list[dict[str, Any]]:
    """A group's rows: ratios to its best dense product, shares of its own reading where it has one."""
    dense = [sample.median for (kind, _), sample in samples.items() if kind.endswith("dense")]
    if ("read", "") in samples:
        bandwidth = cases["read", ""].n_bytes / samples["read", ""].median
    return [
        {
            "kind": kind,
            "variant": variant,
            "microseconds": sample.median * 1e6,
            "spread": sample.spread,
            "calls": sample.calls,
            "bytes_per_second": cases[kind, variant].n_bytes / sample.median,
            "share": cases[kind, variant].n_bytes / sample.median / bandwidth,
            "ratio": sample.median / min(dense) if dense else None,
        }
        for (kind, variant), sample in samples.items()
    ]


def measure(threads: int, quick: bool, emit: Callable[[dict[str, Any]], None]) -> None:
    set_num_threads(threads)
    torch = torch_of(threads) if threads > 1 or not quick else None
    data = Data(QUICK if quick else FULL)
    bandwidth = machine.read_bandwidth(data.words, 3 if quick else 9)
    name = "1 thread" if threads == 1 else f"{threads} threads"
    counts = (1, TENANTS, 4, 16, 64, 256, None)
    for shape in QUICK_SHAPES if quick else SHAPES:
        bench = Bench(data, shape, quick, torch)
        emit({"log": f"{name}: timing {shape[0]} x {shape[1]}"})
        for M, group in zip(counts, bench.groups(), strict=True):
            cases = group()
            emit({"checked": sum(case.verify() for case in cases.values())})
            samples = interleaved(cases, bench.seconds, bench.min_rounds)
            for row in rows_of(cases, samples, bandwidth):
                emit({"shape": shape, "threads": threads, "rows": M, "bandwidth": bandwidth, **row})


def torch_of(threads: int) -> Any:
    """PyTorch with as many threads, or None."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return torch


def main() -> None:
    def emit(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    measure(int(sys.argv[1]), "--quick" in sys.argv, emit)
