"""What `bench cuda` times: linears of named models, tenants and rows; their bytes and rooflines. Needs no GPU.

N outputs, K inputs, T tenants, M rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

MIN_SETS, MIN_BYTES = 3, 400_000_000  # buffers that calls go through in turn: no cache holds them
MAX_SETS = 256
DELTA, WHOLE, PREFILL, TRAINING, EXTRACTION = "delta", "base + delta", "prefill", "training", "extraction"
HOST, MODEL = "host", "model"
EVEN, ZIPF, QUARTER_BASE, MIXED = "even", "Zipf 1.5", "a quarter base only", "32 tenants decode, 1 prefills"

# who makes a product
OURS, MERGED, CUBLAS = "bitdelta", "bitdelta merged", "cuBLAS, base only"
MM, BMM, GROUPED = "torch.mm, one a tenant", "torch.bmm", "grouped_mm"
DENSE = MM, BMM, GROUPED
FOUR_STEPS = "cuBLAS + original's Triton, scale, add"  # as its demo runs a linear
ORIGINAL, TUNED = "original's layout, Triton", "tuned Triton W1A16"
EXPANDED = "dequantise + cuBLAS"
RANKS, LORA = (16, 64, 128), "LoRA r={}, two bmm"


@dataclass(frozen=True)
class Linear:
    """Weights that share x: q, k and v, or gate and up; one for the others."""

    name: str
    widths: tuple[int, ...]  # N of each
    K: int

    @property
    def N(self) -> int:
        return sum(self.widths)

    @property
    def bits_bytes(self) -> int:
        """Of one plane; widths are multiples of 16, K of 256."""
        return self.N * self.K // 8


def linears(hidden: int, inner: int, pairs: int) -> tuple[Linear, ...]:
    """A Llama layer's; `pairs`: outputs of the key's projection, as many as of the value's."""
    return (
        Linear("qkv", (hidden, pairs, pairs), hidden),
        Linear("o", (hidden,), hidden),
        Linear("gate_up", (inner, inner), hidden),
        Linear("down", (hidden,), inner),
    )


LAYERS = {  # the configs on the Hub
    "7B": linears(4096, 11008, 4096),
    "8B": linears(4096, 14336, 1024),
    "13B": linears(5120, 13824, 5120),
    "70B": linears(8192, 28672, 1024),
    "tiny": linears(256, 512, 256),  # checks that it runs
}
NAMES = ("qkv", "o", "gate_up", "down")
SHAPES = ((4096, 4096), (11008, 4096), (57344, 8192))  # of extraction


@dataclass(frozen=True)
class Problem:
    """One linear of one batch."""

    kind: str
    model: str
    name: str  # of the linear
    tenants: int  # T
    rows: int  # of each tenant, or of the whole batch for ZIPF
    mix: str = EVEN
    planes: int = 1
    has_columns: bool = False
    peers: bool = False

    @property
    def about(self) -> dict[str, Any]:
        """What a row of the report says of it."""
        return {
            "kind": self.kind,
            "model": self.model,
            "linear": self.name,
            "tenants": self.tenants,
            "rows": self.rows,
            "mix": self.mix,
            "planes": self.planes,
            "columns": self.has_columns,
        }

    @property
    def linear(self) -> Linear:
        return next(each for each in LAYERS[self.model] if each.name == self.name)

    def ids(self) -> list[int]:
        """Each row's tenant, -1 for the base."""
        if self.mix == ZIPF:
            return zipf(self.rows, self.tenants)
        if self.mix == MIXED:  # one prompt of `rows` rows, and a row of each other tenant
            return [0] * self.rows + list(range(1, self.tenants))
        ids = [t for t in range(self.tenants) for _ in range(self.rows)]
        return [-1 if at % 4 == 3 else t for at, t in enumerate(ids)] if self.mix == QUARTER_BASE else ids

    @property
    def delta_bytes(self) -> int:
        """Read of one set: planes and scales of the tenants that have rows."""
        linear, seen = self.linear, len({t for t in self.ids() if t >= 0})
        scales = linear.N + (len(linear.widths) * linear.K if self.has_columns else 0)
        return seen * self.planes * (linear.bits_bytes + 4 * scales)

    @property
    def row_bytes(self) -> int:
        """x and y, in bf16."""
        return 2 * len(self.ids()) * (self.linear.K + self.linear.N)

    @property
    def base_bytes(self) -> int:
        return 2 * self.linear.N * self.linear.K

    @property
    def n_bytes(self) -> int:
        """The fewest that a call must move."""
        return self.delta_bytes + self.row_bytes + (0 if self.kind == DELTA else self.base_bytes)

    @property
    def dense_bytes(self) -> int:
        """The fewest that a weight in bf16 for every tenant must move."""
        seen = len({t for t in self.ids() if t >= 0})
        return seen * self.base_bytes + self.row_bytes


def zipf(n_rows: int, n_tenants: int) -> list[int]:
    """Tenants of rows by popularity: t's share is as 1 / (t + 1)^1.5, rounded down; the first gets the rest."""
    weights = [(t + 1) ** -1.5 for t in range(n_tenants)]
    counts = [int(n_rows * weight / sum(weights)) for weight in weights]
    counts[0] += n_rows - sum(counts)
    return [t for t, count in enumerate(counts) for _ in range(count)]


def n_sets(set_bytes: int) -> int:
    """How many buffers to go through in turn."""
    return min(MAX_SETS, max(MIN_SETS, ceil(MIN_BYTES / max(1, set_bytes))))


def roofline(n_bytes: int, n_operations: int, bandwidth: float, rate: float) -> float:
    """Seconds that no call can be below: bytes per second read, operations per second of the dense product."""
    return max(n_bytes / bandwidth, n_operations / rate)


def problems() -> list[Problem]:
    """In the order of their worth: what the goals ask for, then what else users ask."""
    layer = [Problem(DELTA, "7B", name, 16, 1, peers=True) for name in ("gate_up", "qkv", "down", "o")]
    layer += [Problem(WHOLE, "7B", name, 16, 1, peers=True) for name in NAMES]
    layer += [Problem(WHOLE, "7B", name, 1, 1) for name in NAMES]
    layer += [Problem(DELTA, "7B", "gate_up", 8, 8, peers=True)]
    layer += [Problem(WHOLE, "7B", name, 64, 1, peers=True) for name in NAMES]
    layer += [Problem(PREFILL, "7B", name, 1, 2048) for name in NAMES]
    layer += [Problem(TRAINING, "7B", name, 1, 512) for name in NAMES]
    return layer + _further()


def _further() -> list[Problem]:
    gate = "gate_up"
    found = [Problem(DELTA, "70B", gate, 4, 1), Problem(DELTA, "70B", gate, 8, 8)]
    found += [Problem(DELTA, "7B", gate, 16, 1, planes=planes) for planes in (2, 4)]
    found += [Problem(DELTA, "7B", gate, 16, 1, has_columns=True)]
    found += [Problem(WHOLE, "7B", gate, tenants, 1) for tenants in (2, 4, 8, 32)]
    found += [Problem(WHOLE, "7B", gate, 16, 4), Problem(WHOLE, "7B", gate, 16, 64, ZIPF)]
    found += [Problem(WHOLE, "7B", gate, 16, 1, QUARTER_BASE)]
    found += [Problem(WHOLE, "8B", name, 16, 1, peers=True) for name in NAMES]
    found += [Problem(PREFILL, "7B", gate, tenants, rows) for tenants, rows in ((1, 128), (1, 512), (4, 512))]
    found += [Problem(PREFILL, "7B", gate, 33, 1024, MIXED)]
    found += [Problem(WHOLE, "13B", gate, 16, 1), Problem(WHOLE, "70B", gate, 16, 1, peers=True)]
    return found


def tiny() -> list[Problem]:
    """Each kind and mix at a size for tests."""
    found = [Problem(DELTA, "tiny", name, 3, rows) for name in ("qkv", "o") for rows in (1, 8)]
    found += [Problem(DELTA, "tiny", "down", 2, 1, planes=2, has_columns=True)]
    found += [Problem(WHOLE, "tiny", "gate_up", 4, 6, mix) for mix in (ZIPF, QUARTER_BASE)]
    found += [Problem(PREFILL, "tiny", "o", 1, 40), Problem(PREFILL, "tiny", "o", 3, 9, MIXED)]
    return [*found, Problem(TRAINING, "tiny", "down", 1, 20)]
