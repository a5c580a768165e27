"""Peers written in Triton: delta products of T tenants from packed signs. Needs triton; nothing else imports it.

    y[t, m, n] = scale[t, n] * sum_k x[t, m, k] * s[t, n, k]      s = +1 where the bit is 1, else -1

`Original` has the layout and the tile list of the BitDelta project: int32 words [K/32, N], bit j of word w is row
32 w + j of K; every word is loaded once for each of its 32 bits; rows padded to 16; no split of K; fp16 results without
the scale. `Tuned` is what Triton can do: a word is loaded once and unpacked in registers, K is split over programs,
signs are the left operand of the tensor cores, or, for one row, flip x's sign bits; layouts, tiles and splits are
chosen by trial. Both make their products in floats: x is not quantised, sums have no fixed order.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

T: TypeAlias = torch.Tensor
ROWS = 16  # the least that tl.dot takes
TRIALS = 5  # launches of a tile's trial
SUM_BLOCK = 4096


# the original's layout


@triton.jit
def product_original(
    x_ptr,  # [T, M, K]
    words_ptr,  # int32 [T, K/32, N]
    y_ptr,  # fp16 [T, M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tenant = tl.program_id(1).to(tl.int64)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = x_ptr + tenant * M * K + m[:, None] * K + k[None, :]
    words_at = words_ptr + tenant * (K // 32) * N + (k[:, None] // 32) * N + n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        x = tl.load(x_at, mask=m[:, None] < M, other=0.0)
        words = tl.load(words_at, mask=n[None, :] < N, other=0)
        signs = 2 * ((words >> (k % 32)[:, None]) & 1) - 1
        total += tl.dot(x, signs.to(x.dtype))
        x_at += BLOCK_K
        words_at += BLOCK_K // 32 * N
    y_at = y_ptr + tenant * M * N + m[:, None] * N + n[None, :]
    tl.store(y_at, total.to(tl.float16), mask=(m[:, None] < M) & (n[None, :] < N))


ORIGINAL_TILES = ((256, 64, 3, 4), (128, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2))  # N, K, stages, warps


@dataclass
class Original:
    """x [T, M, K], words int32 [T, K/32, N] -> y fp16 [T, M, N], without the scale."""

    tile: tuple[int, int, int, int] = ORIGINAL_TILES[0]

    @staticmethod
    def tiles(M: int, N: int, K: int) -> list[Original]:
        return [Original(tile) for tile in ORIGINAL_TILES]

    def __call__(self, x: T, words: T, y: T) -> None:
        n_tenants, M, K = x.shape
        N, (block_n, block_k, stages, warps) = words.shape[2], self.tile
        product_original[triton.cdiv(N, block_n), n_tenants](
            x, words, y, M, N, K, ROWS, block_n, block_k, num_stages=stages, num_warps=warps
        )


# a word loaded once


@triton.jit
def product_by_dot(
    x_ptr,  # [T, M, K]
    words_ptr,  # int32 or uint8 [T, N * K / BITS]
    scale_ptr,  # fp32 [T, N]
    y_ptr,  # fp32 [T, M, N]
    M,
    N,
    K,
    stride_n,
    stride_w,
    BITS: tl.constexpr,  # of a word
    ONE: tl.constexpr,  # the bits of 1 in x's dtype
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tenant, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    w, bit, k = tl.arange(0, BLOCK_K // BITS), tl.arange(0, BITS), tl.arange(0, BLOCK_K)
    words_ptr += tenant * N * (K // BITS)
    x_ptr += tenant * M * K
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for begin in range(part * BLOCK_K, K, SPLIT * BLOCK_K):
        words_at = words_ptr + n[:, None] * stride_n + (begin // BITS + w)[None, :] * stride_w
        words = ~tl.load(words_at, mask=n[:, None] < N, other=0, eviction_policy="evict_first").to(tl.int32)
        halves = ((words[:, :, None] >> bit[None, None, :]) << 15) & 0x8000 | ONE
        signs = tl.reshape(halves, (BLOCK_N, BLOCK_K)).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
        x = tl.load(x_ptr + m[None, :] * K + (begin + k)[:, None], mask=m[None, :] < M, other=0.0)
        total = tl.dot(signs, x, total)
    total *= tl.load(scale_ptr + tenant * N + n, mask=n < N, other=0.0)[:, None]
    y_at = y_ptr + tenant * M * N + m[None, :] * N + n[:, None]
    mask = (m[None, :] < M) & (n[:, None] < N)
    if SPLIT == 1:
        tl.store(y_at, total, mask=mask)
    else:
        tl.atomic_add(y_at, total, mask=mask)


@triton.jit
def product_by_sum(
    x_ptr,  # [T, K], one row a tenant
    words_ptr,  # int32 [T, N * K / 32]
    scale_ptr,  # fp32 [T, N]
    y_ptr,  # fp32 [T, N]
    N,
    K,
    stride_n,
    stride_w,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tenant, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_words = K // 32
    words_ptr += tenant * N * n_words
    x_ptr += tenant * K
    total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    for begin in range(part * BLOCK_W, n_words, SPLIT * BLOCK_W):
        w = begin + tl.arange(0, BLOCK_W)
        words_at = words_ptr + n[:, None] * stride_n + w[None, :] * stride_w
        inside = (n[:, None] < N) & (w[None, :] < n_words)
        words = ~tl.load(words_at, mask=inside, other=0, eviction_policy="evict_first")
        for bit in tl.static_range(32):
            x = tl.load(x_ptr + w * 32 + bit, mask=w < n_words, other=0.0).to(tl.float32)
            flip = (words << (31 - bit)) & -2147483648
            total += (x.to(tl.int32, bitcast=True)[None, :] ^ flip).to(tl.float32, bitcast=True)
    y = tl.sum(total, axis=1) * tl.load(scale_ptr + tenant * N + n, mask=n < N, other=0.0)
    if SPLIT == 1:
        tl.store(y_ptr + tenant * N + n, y, mask=n < N)
    else:
        tl.atomic_add(y_ptr + tenant * N + n, y, mask=n < N)


@dataclass
class Tuned:
    """x [T, M <= 16, K], words int32 [T, N K / 32], scale fp32 [T, N] -> y fp32 [T, M, N].

    Args:
        by_rows: a row's words lie side by side; else a word's rows do.
        bits: of what is loaded, 8 or 32; 0: flips x's sign bits, one row a tenant.
        block_n: rows of a program.
        block_k: columns of a step.
        split: programs that share a row.
    """

    by_rows: bool = True
    bits: int = 32
    block_n: int = 64
    block_k: int = 256
    split: int = 1
    warps: int = 4
    stages: int = 3

    @staticmethod
    def tiles(M: int, N: int, K: int) -> list[Tuned]:
        """What is tried; every combination that was ever near the best on another shape is among them."""
        found = []
        for by_rows in (True, False):
            for split in (1, 2, 4):
                found += [Tuned(by_rows, 32, 64, 256, split), Tuned(by_rows, 32, 128, 256, split, 8, 2)]
            found += [Tuned(by_rows, 8, 64, 256, split) for split in (1, 4)]
            if M == 1:
                found += [Tuned(by_rows, 0, 16, 1024, split) for split in (1, 4)]
                found += [Tuned(by_rows, 0, 64, 512, split) for split in (1, 4)]
        return [each for each in found if each.bits == 0 or K % each.block_k == 0]

    def __call__(self, x: T, words: T, scale: T, y: T) -> None:
        n_tenants, M, K = x.shape
        N, bits = scale.shape[1], self.bits or 32
        strides = (K // bits, 1) if self.by_rows else (1, N)
        if self.split > 1:
            y.zero_()
        grid = triton.cdiv(N, self.block_n), n_tenants, self.split
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if not self.bits:
            product_by_sum[grid](
                x, words, scale, y, N, K, *strides, self.block_n, self.block_k // 32, self.split, **options
            )
            return
        one = 0x3F80 if x.dtype == torch.bfloat16 else 0x3C00
        blocks = bits, one, ROWS, self.block_n, self.block_k, self.split
        product_by_dot[grid](
            x,
            words if bits == 32 else words.view(torch.uint8),
            scale,
            y,
            M,
            N,
            K,
            *strides,
            *blocks,
            **options,
        )


def fastest(tiles: list[Any], call: Any, seconds: float) -> Any:
    """The tile whose `call(tile)` is fastest; those that the GPU cannot run are left out, and all after `seconds`."""
    deadline, best = time.perf_counter() + seconds, None
    for tile in tiles:
        if best is not None and time.perf_counter() > deadline:
            break
        try:
            call(tile)  # compiles
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TRIALS):
            call(tile)
        end.record()
        end.synchronize()
        took = start.elapsed_time(end)
        if best is None or took < best[0]:
            best = took, tile
    return None if best is None else best[1]


# what the bits mean, in plain PyTorch


def signs_of(words: T, N: int, K: int, tile: Any) -> T:
    """+-1 fp32 [T, N, K] as a kernel reads the words."""
    bits = words.reshape(len(words), -1)
    if isinstance(tile, Original):
        unpacked = bits.view(-1, K // 32, 1, N) >> torch.arange(32, device=words.device)[:, None] & 1
        return unpacked.reshape(-1, K, N).transpose(1, 2).float() * 2 - 1
    size = tile.bits or 32
    bits = bits if size == 32 else bits.view(torch.uint8).int()
    if tile.by_rows:
        unpacked = bits.view(-1, N, K // size, 1) >> torch.arange(size, device=words.device) & 1
        return unpacked.reshape(-1, N, K).float() * 2 - 1
    unpacked = bits.view(-1, K // size, 1, N) >> torch.arange(size, device=words.device)[:, None] & 1
    return unpacked.reshape(-1, K, N).transpose(1, 2).float() * 2 - 1


# reading


@triton.jit
def sum_of_blocks(x_ptr, y_ptr, n, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in tl.static_range(STEPS):
        at = begin + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + tl.program_id(0), tl.sum(total, axis=0))


def summed(x: T, parts: T, steps: int = 8) -> None:
    """Sums of fp32 blocks of x, one for each program, into parts."""
    programs = triton.cdiv(x.numel(), steps * SUM_BLOCK)
    if programs > len(parts):
        raise ValueError(f"parts: expected at least {programs} elements, got {len(parts)}")
    sum_of_blocks[(programs,)](x, parts, x.numel(), steps, SUM_BLOCK, num_warps=8)
