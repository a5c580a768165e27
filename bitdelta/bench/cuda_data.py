"""Random bits and weights in the memory of a device, seen as the operands of any problem in turn.

A pool is one block of random words; a set takes the next bytes of it. So every set lies in memory of its own, and no
cache holds what a call reads again. Without a GPU the device is the emulation's, the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from .. import _C, cuda, cuda_memory
from .cuda_cases import DELTA, Problem, n_sets

T: TypeAlias = torch.Tensor
STEP = 1 << 28  # words made at a time
SCALE = 0.002


class Pool:
    """Random 32-bit words on a device.

    Args:
        n_bytes: of all.
        device: of torch.
        as_weights: the words are pairs of bf16 of size 2^-7 to 2^-4 and either sign, so none is NaN or denormal.
    """

    def __init__(self, n_bytes: int, device: str, as_weights: bool = False) -> None:
        self.words = torch.empty(n_bytes // 4, dtype=torch.int32, device=device)
        generator = torch.Generator(device).manual_seed(as_weights + 1)
        for begin in range(0, len(self.words), STEP):
            part = self.words[begin : begin + STEP]
            part.random_(-(1 << 31), (1 << 31) - 1, generator=generator)
            if as_weights:
                part.bitwise_and_(0x81FF81FF - (1 << 32)).bitwise_or_(0x3C003C00)

    @property
    def n_bytes(self) -> int:
        return 4 * len(self.words)

    def cut(self, at: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> T:
        """The bytes from `at` on, as a tensor. Raises ValueError where the pool ends before."""
        tensor_bytes = torch.empty(0, dtype=dtype).element_size()
        for size in shape:
            tensor_bytes *= size
        end = at + tensor_bytes
        if at % 64 or end > self.n_bytes:
            raise ValueError(f"at: expected a multiple of 64 up to {self.n_bytes - tensor_bytes}, got {at}")
        return self.words[at // 4 : end // 4].view(dtype).view(shape)


class Data:
    """The pools of bits and of weights."""

    def __init__(self, bits_bytes: int, weight_bytes: int, device: str) -> None:
        self.device = device
        self.bits, self.weights = Pool(bits_bytes, device), Pool(weight_bytes, device, as_weights=True)
        self.generator = torch.Generator(device).manual_seed(3)

    def rows(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> T:
        """Gaussian."""
        return torch.randn(shape, device=self.device, generator=self.generator).to(dtype)

    def scales(self, *shape: int) -> T:
        """fp32, SCALE times 0.5 to 1.5."""
        return (torch.rand(shape, device=self.device, generator=self.generator) + 0.5) * SCALE


@dataclass
class Part:
    """One weight of a set: T deltas, and as the kernels find them."""

    signs: T  # uint32 [T, P, N/16, K/32, 16]
    rows: T  # fp32 [T, P, N]
    columns: T | None  # fp32 [T, P, K]
    table: Any
    out: T  # [M, N]


class Batch:
    """The operands of one problem in one set, and the calls that are timed.

    Args:
        data: the pools.
        problem: what to multiply.
        plan: of the batch's rows, from `plan_of`; every set shares it.
        at: number of the set.
    """

    def __init__(self, data: Data, problem: Problem, plan: Any, at: int) -> None:
        linear, ids = problem.linear, problem.ids()
        self.problem, self.data, self.plan = problem, data, plan
        self.x = data.rows(len(ids), linear.K)
        if problem.kind != DELTA:
            self.weight = data.weights.cut(at * problem.base_bytes, (linear.N, linear.K), torch.bfloat16)
        self.out = torch.empty(len(ids), linear.N, dtype=torch.bfloat16, device=data.device)
        self.parts: list[Part] = []
        begin, first = at * problem.tenants * problem.planes * linear.bits_bytes, 0
        for N in linear.widths:
            self.parts.append(self._part(N, begin, self.out[:, first : first + N]))
            begin += problem.tenants * problem.planes * N * linear.K // 8
            first += N
        tables = [part.table for part in self.parts]
        sizes = plan.n_rows, linear.K, plan.n_deltas, len(tables), problem.planes, int(problem.has_columns)
        self.workspace = cuda_memory.scratch(self.x, _C.cuda_workspace_bytes("linear", *sizes))
        self._parts = tuple((part.out, None, None, part.table) for part in self.parts)

    def _part(self, N: int, begin: int, out: T) -> Part:
        K, P, n_tenants = self.problem.linear.K, self.problem.planes, self.problem.tenants
        signs = self.data.bits.cut(begin, (n_tenants, P, N // 16, K // 32, 16)).view(torch.uint32)
        rows = self.data.scales(n_tenants, P, N)
        columns = self.data.scales(n_tenants, P, K) / SCALE if self.problem.has_columns else None
        slots = tuple((signs[t], rows[t], None if columns is None else columns[t]) for t in range(n_tenants))
        memory = torch.empty((n_tenants, 4), dtype=torch.int64, device=self.data.device)
        return Part(signs, rows, columns, _C.CudaDeltas(memory, slots, (N, K)), out)

    def delta(self) -> None:
        """The delta's terms alone, of all parts."""
        _C.cuda_linear(self.x, self._parts, self.plan.memory, self.plan.max_rows, False, self.workspace)

    def product(self) -> T:
        """The base product, fp32 [M, N]."""
        return cuda.multiply(self.x, self.weight, is_transposed=True)

    def whole(self) -> None:
        """Base and delta: cuBLAS, then the kernels, which add and round once."""
        self.add_delta(self.product())

    def add_delta(self, product: T) -> None:
        parts, first = [], 0
        for part in self.parts:
            end = first + part.out.shape[1]
            parts.append((part.out, product[:, first:end], None, part.table))
            first = end
        _C.cuda_linear(self.x, tuple(parts), self.plan.memory, self.plan.max_rows, False, self.workspace)

    def call(self) -> None:
        """What the problem asks for."""
        if self.problem.kind == DELTA:
            self.delta()
        else:
            self.whole()


def plan_of(problem: Problem, device: str) -> Any:
    """The plan of the problem's rows."""
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    ids: Any = problem.ids()
    return cuda.plan(ids, len(ids), problem.tenants, like)


def batches(data: Data, problem: Problem) -> list[Batch]:
    """As many sets as it takes, of what the pools hold."""
    plan, linear = plan_of(problem, data.device), problem.linear
    bits = problem.tenants * problem.planes * linear.bits_bytes
    most = data.bits.n_bytes // bits
    if problem.kind != DELTA:
        most = min(most, data.weights.n_bytes // problem.base_bytes)
    wanted = n_sets(problem.n_bytes)
    if most < min(wanted, 3):
        raise ValueError(f"problem: expected at most a third of the pools, got {bits} bytes of bits")
    return [Batch(data, problem, plan, at) for at in range(min(most, wanted))]
