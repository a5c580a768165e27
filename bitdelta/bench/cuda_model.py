"""Whole models of many tenants: a decoding step in one CUDA graph, against separate models in turn.

    separate   a model a tenant, each decoding a row of its own, until they do not fit the GPU
    deltas     one base, a delta a tenant, one batch: every linear, the head and the embeddings as one plane with row
               scales, norms whole

Llama-2-7B's shapes, random weights and bits, a static cache of CONTEXT tokens that every step reads whole. R rows, a
row a tenant; H hidden, V vocabulary, C context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn import functional

from .. import _C, cuda, cuda_memory
from . import cuda as cuda_run
from . import cuda_check, cuda_timing
from .cuda_cases import MODEL, OURS, linears

if TYPE_CHECKING:
    from .cuda import Bench

T: TypeAlias = torch.Tensor
CONTEXT = 256
COUNTS = 1, 2, 4, 8, 16, 32, 64
SEPARATE = "separate models, in turn"
EPSILON, THETA, SIZE, SCALE = 1e-5, 10_000.0, 0.02, 0.002
CLOSE = 3e-2  # of logits, which a model in bf16 rounds a dozen times a layer
SECONDS = 1.5  # of one number of tenants


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    layers: int
    vocabulary: int

    def widths(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Outputs of each part, and inputs, of a layer's linears."""
        return {each.name: (each.widths, each.K) for each in linears(self.hidden, self.inner, self.hidden)}


LLAMA = Shape(4096, 11008, 32, 32, 32000)
TINY = Shape(256, 512, 4, 2, 512)


class Weights:
    """A model's own: embeddings and head [V, H], norms [H], linears [N, K]."""

    def __init__(self, shape: Shape, device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def random(*sizes: int) -> T:
            values = torch.empty(sizes, dtype=dtype, device=device)
            return values.normal_(0, SIZE, generator=generator)

        self.shape = shape
        self.embeddings, self.head = (random(shape.vocabulary, shape.hidden) for _ in range(2))
        self.norms = [1 + random(shape.hidden) for _ in range(2 * shape.layers + 1)]
        self.linears = [
            {name: random(sum(parts), K) for name, (parts, K) in shape.widths().items()}
            for _ in range(shape.layers)
        ]

    @property
    def nbytes(self) -> int:
        every = [
            self.embeddings,
            self.head,
            *self.norms,
            *(w for layer in self.linears for w in layer.values()),
        ]
        return sum(each.nbytes for each in every)


class Dense:
    """Products of one model."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def embed(self, tokens: T) -> T:
        return self.weights.embeddings[tokens]

    def norm(self, at: int) -> T:
        return self.weights.norms[at]

    def linear(self, layer: int, name: str, x: T) -> T:
        return torch.mm(x, self.weights.linears[layer][name].T)

    def head(self, x: T) -> T:
        return torch.mm(x, self.weights.head.T)


class Plane:
    """Random signs with row scales for T deltas of parts that share x."""

    def __init__(self, n_tenants: int, parts: tuple[int, ...], K: int, device: str, generator: Any) -> None:
        self.parts, self.K = parts, K
        self.signs = [
            torch.empty((n_tenants, 1, N // 16, K // 32, 16), dtype=torch.int32, device=device).random_(
                -(1 << 31), (1 << 31) - 1, generator=generator
            )
            for N in parts
        ]
        self.rows = [
            torch.rand((n_tenants, 1, N), device=device, generator=generator).add_(0.5).mul_(SCALE)
            for N in parts
        ]

    def tables(self, count: int) -> list[Any]:
        """Of the first `count` tenants."""
        found = []
        for signs, rows, N in zip(self.signs, self.rows, self.parts, strict=True):
            slots = tuple((signs[t].view(torch.uint32), rows[t], None) for t in range(count))
            memory = torch.empty((count, 4), dtype=torch.int64, device=signs.device)
            found.append(_C.CudaDeltas(memory, slots, (N, self.K)))
        return found

    def merged(self, base: T, t: int) -> T:
        """round(base + delta) of tenant t."""
        out, first = torch.empty_like(base), 0
        for signs, rows, N in zip(self.signs, self.rows, self.parts, strict=True):
            part = slice(first, first + N)
            _C.cuda_expand(out[part], base[part], signs[t].view(torch.uint32), rows[t], None, N, 0)
            first += N
        return out


class Tenants:
    """The deltas of T tenants of a base."""

    def __init__(self, base: Weights, n_tenants: int) -> None:
        shape, device = base.shape, str(base.head.device)
        generator = torch.Generator(device).manual_seed(7)
        plane = partial(Plane, n_tenants, device=device, generator=generator)
        self.base, self.n_tenants = base, n_tenants
        self.embeddings, self.head = (plane((shape.vocabulary,), shape.hidden) for _ in range(2))
        self.norms = (
            torch.stack(base.norms)[:, None].expand(-1, n_tenants, -1).contiguous()
        )  # [2 L + 1, T, H]
        self.linears = [
            {name: plane(parts, K) for name, (parts, K) in shape.widths().items()}
            for _ in range(shape.layers)
        ]

    def merged(self, t: int) -> Weights:
        """Tenant t's model."""
        found = object.__new__(Weights)
        found.shape = self.base.shape
        found.embeddings = self.embeddings.merged(self.base.embeddings, t)
        found.head = self.head.merged(self.base.head, t)
        found.norms = list(self.norms[:, t])
        found.linears = [
            {name: plane.merged(weights[name], t) for name, plane in planes.items()}
            for planes, weights in zip(self.linears, self.base.linears, strict=True)
        ]
        return found


class Mixed:
    """Products of a batch whose row t is tenant t's, fused."""

    def __init__(self, tenants: Tenants, count: int) -> None:
        self.tenants, self.count, base = tenants, count, tenants.base
        like = base.head
        self.plan = cuda.plan(list(range(count)), count, count, like)
        self.tables = [
            {name: plane.tables(count) for name, plane in each.items()} for each in tenants.linears
        ]
        self.head_tables = tenants.head.tables(count)
        most = max(K for _, K in base.shape.widths().values())
        self.workspace = cuda_memory.scratch(
            like, _C.cuda_workspace_bytes("linear", count, most, count, 3, 1, 0)
        )
        self.places = torch.arange(count, device=like.device)
        self.bits = torch.arange(32, device=like.device)

    def embed(self, tokens: T) -> T:
        plane = self.tenants.embeddings
        words = plane.signs[0][self.places, 0, tokens // 16, :, tokens % 16]  # [R, H/32]
        signs = ((words[:, :, None] >> self.bits & 1) * 2 - 1).flatten(1)
        rows = plane.rows[0][self.places, 0, tokens]
        base = self.tenants.base.embeddings[tokens]
        return (base.float() + signs * rows[:, None]).to(base.dtype)

    def norm(self, at: int) -> T:
        return self.tenants.norms[at, : self.count]

    def linear(self, layer: int, name: str, x: T) -> T:
        return self._add(x, self.tenants.base.linears[layer][name], self.tables[layer][name])

    def head(self, x: T) -> T:
        return self._add(x, self.tenants.base.head, self.head_tables)

    def _add(self, x: T, weight: T, tables: list[Any]) -> T:
        product = cuda.multiply(x, weight, is_transposed=True)
        out, parts, first = torch.empty(product.shape, dtype=x.dtype, device=x.device), [], 0
        for table in tables:
            part = slice(first, first + table.shape[0])
            parts.append((out[:, part], product[:, part], None, table))
            first = part.stop
        _C.cuda_linear(x, tuple(parts), self.plan.memory, self.plan.max_rows, False, self.workspace)
        return out


class Decoder:
    """A step of R rows over a static cache, whose last place every step writes again.

    Args:
        products: `Dense` or `Mixed`.
        rows: R.
        seed: of keys, values and tokens.
    """

    def __init__(
        self, shape: Shape, products: Any, rows: int, like: T, seed: int, context: int = CONTEXT
    ) -> None:
        self.shape, self.products, self.context = shape, products, context
        generator = torch.Generator(like.device).manual_seed(seed)
        width = shape.hidden // shape.heads
        sizes = 2, rows, shape.heads, context, width
        self.cache = [
            torch.empty(sizes, dtype=like.dtype, device=like.device).normal_(generator=generator)
            for _ in range(shape.layers)
        ]
        self.tokens = torch.randint(shape.vocabulary, (rows,), device=like.device, generator=generator)
        angles = (context - 1) * THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = torch.cat([angles, angles]).to(like.device)
        self.cos, self.sin = (each.to(like.dtype) for each in (turns.cos(), turns.sin()))

    def step(self) -> T:
        """Logits [R, V]."""
        products, heads = self.products, self.shape.heads
        h = products.embed(self.tokens)
        for layer, cache in enumerate(self.cache):
            x = rms(h, products.norm(2 * layer))
            q, k, v = products.linear(layer, "qkv", x).view(len(h), 3, heads, -1).unbind(1)
            cache[0, :, :, -1], cache[1, :, :, -1] = self._turn(k), v
            y = functional.scaled_dot_product_attention(self._turn(q)[:, :, None], cache[0], cache[1])
            h = h + products.linear(layer, "o", y.reshape(len(h), -1))
            x = rms(h, products.norm(2 * layer + 1))
            gate, up = products.linear(layer, "gate_up", x).chunk(2, dim=1)
            h = h + products.linear(layer, "down", functional.silu(gate) * up)
        logits: T = products.head(rms(h, products.norm(2 * self.shape.layers)))
        return logits

    def _turn(self, x: T) -> T:
        """Rotary position embedding of the last place."""
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-right, left], dim=-1) * self.sin


def rms(x: T, weight: T) -> T:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def check(device: str) -> None:
    """Logits of a small model's mixed batch against those of its merged models.

    Raises:
        bitdelta.Error: they are not close.
    """
    base = Weights(TINY, device, 0)
    tenants = Tenants(base, 3)
    mixed = Decoder(TINY, Mixed(tenants, 3), 3, base.head, 1, 32)
    logits = mixed.step()
    for t in range(3):
        alone = Decoder(TINY, Dense(tenants.merged(t)), 1, base.head, 1, 32)
        alone.tokens = mixed.tokens[t : t + 1]
        alone.cache = [each[:, t : t + 1].clone() for each in mixed.cache]
        cuda_check.close(logits[t], alone.step()[0], CLOSE, f"tenant {t}'s logits")


def measure(bench: Bench, quick: bool, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of kind MODEL."""
    with torch.no_grad():
        check(cuda_run.DEVICE)
        log("checked a small model's logits against its merged models")
        shape, counts = (TINY, COUNTS[:3]) if quick else (LLAMA, COUNTS)
        rows = list(_of_deltas(bench, shape, counts))
        torch.cuda.empty_cache()
        return [*rows, *_of_separate(bench, shape, counts)]


def _of_deltas(bench: Bench, shape: Shape, counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The most tenants that fit are made at once; fewer are the first of them."""
    base, tenants, most = Weights(shape, cuda_run.DEVICE, 0), None, counts[-1]
    before = torch.cuda.memory_allocated()
    while tenants is None:
        try:
            tenants = Tenants(base, most)
        except torch.cuda.OutOfMemoryError:
            bench.report["not_measured"].append(f"deltas of {most} tenants: the GPU's memory is too small")
            most //= 2
            if not most:
                return
    added = (torch.cuda.memory_allocated() - before) / most
    for count in counts:
        if count <= most:
            make = partial(_step_of, shape, Mixed(tenants, count), count, base)
            more = {"added_bytes": added, "added_share": added / base.nbytes}
            used = base.nbytes + count * added
            yield from bench.part(
                f"{count} tenants, deltas", partial(_row, bench, OURS, count, make, used, more)
            )


def _of_separate(bench: Bench, shape: Shape, counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    models: list[Weights] = []
    for count in counts:
        try:
            while len(models) < count:
                models.append(Weights(shape, cuda_run.DEVICE, len(models)))
        except torch.cuda.OutOfMemoryError:
            fit = len(models)
            bench.report["not_measured"].append(f"{count} separate models: {fit} fill the GPU's memory")
            return
        make = partial(_steps_of, shape, list(models))
        used = sum(model.nbytes for model in models)
        yield from bench.part(
            f"{count} separate models", partial(_row, bench, SEPARATE, count, make, used, {})
        )


def _step_of(shape: Shape, products: Any, rows: int, base: Weights) -> Callable[[], object]:
    return Decoder(shape, products, rows, base.head, rows).step


def _steps_of(shape: Shape, models: list[Weights]) -> Callable[[], object]:
    steps = [_step_of(shape, Dense(model), 1, model) for model in models]
    return lambda: [step() for step in steps]


def _row(
    bench: Bench,
    by: str,
    count: int,
    make: Callable[[], Callable[[], object]],
    used: float,
    more: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    torch.cuda.reset_peak_memory_stats()
    step, start = make(), time.perf_counter()
    sample = cuda_timing.replayed([step], 0.1 if bench.quick else SECONDS)
    bench.log(
        f"{count} tenants, {by}: {sample.median * 1e3:.2f} ms a step ({time.perf_counter() - start:.1f} s)"
    )
    yield {
        "kind": MODEL,
        "case": f"{count} tenant{'s' * (count > 1)}",
        "tenants": count,
        "by": by,
        "microseconds": sample.median * 1e6,
        "spread": sample.spread,
        "samples": sample.calls,
        "tokens_per_second": count / sample.median,
        "bytes": used,  # of weights and deltas
        "peak_bytes": torch.cuda.max_memory_allocated(),
        **more,
    }
