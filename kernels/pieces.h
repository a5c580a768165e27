/* pieces.h - tensor core products with q in two bytes, q = 256 high + low: high signed, low not. */
#ifndef BITDELTA_PIECES_H_
#define BITDELTA_PIECES_H_

#include "gpu.h"
#include "linear.h"

#if defined(BD_EMULATE)
#define BD_UNROLL_BY(n)
#else
#define BD_PRAGMA(text) _Pragma(#text)
#define BD_UNROLL_BY(n) BD_PRAGMA(unroll(n))
#endif

/* As bd_mma_u8s8 (gpu.h), both operands unsigned. */
static __device__ __forceinline__ void
bd_mma_u8u8(int d[4], const unsigned a[4], const unsigned b[2])
{
#if defined(BD_EMULATE)
    /* b = 2 * (7 bits) + bit, which bytes with a sign can hold */
    const unsigned upper[2] = {b[0] >> 1 & 0x7F7F7F7Fu, b[1] >> 1 & 0x7F7F7F7Fu};
    const unsigned bit[2] = {b[0] & 0x01010101u, b[1] & 0x01010101u};
    int twice[4] = {0, 0, 0, 0};
    bd_mma_u8s8(twice, a, upper);
    bd_mma_u8s8(d, a, bit);
    for (int i = 0; i < 4; i++) {
        d[i] += 2 * twice[i];
    }
#else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* 256 high + low, modulo the width of Z. */
template <typename Z>
static __device__ __forceinline__ Z
bd_join_pieces(int high, int low)
{
    return static_cast<Z>(static_cast<long long>(high)) * 256u + static_cast<Z>(low);
}

/* Products of 8 B rows with a pair of strips: c[b][2 i + piece], piece 0 high, 1 low. */
template <int B>
static __device__ __forceinline__ void
bd_multiply_pieces(const uint4 *signs, const uint4 *pieces, int block_units, const bd_tile &tile,
                   int c[B][4][4])
{
    BD_UNROLL
    for (int b = 0; b < B; b++) {
        BD_UNROLL
        for (int i = 0; i < 4; i++) {
            c[b][i][0] = c[b][i][1] = c[b][i][2] = c[b][i][3] = 0;
        }
    }
    constexpr bool LOADS_AHEAD =
        B < 4; /* 32 rows leave no registers, and memory is not their bound */
    uint4 line[2], next[2];
    if (LOADS_AHEAD) {
        bd_load_signs(signs, tile.first_group, tile.end_group, next);
    }
    for (int group = tile.first_group; group < tile.end_group; group++) {
        if (LOADS_AHEAD) {
            line[0] = next[0];
            line[1] = next[1];
            bd_load_signs(signs, group + 1, tile.end_group, next);
        } else {
            bd_load_signs(signs, group, tile.end_group, line);
        }
        BD_UNROLL_BY(B == 1 ? 8 : 1) /* with more rows, unrolled loops spill */
        for (int i = 0; i < 8; i++) {
            const unsigned ones = 0x01010101u;
            const unsigned a0[4] = {line[0].x >> i & ones, line[0].y >> i & ones,
                                    line[1].x >> i & ones, line[1].y >> i & ones};
            const unsigned a1[4] = {line[0].z >> i & ones, line[0].w >> i & ones,
                                    line[1].z >> i & ones, line[1].w >> i & ones};
            BD_UNROLL
            for (int b = 0; b < B; b++) {
                const uint4 piece = __ldg(pieces + b * block_units +
                                          (group * BD_GROUP_UNITS + i * 4) * BD_ROW_BLOCK);
                const unsigned high[2] = {piece.x, piece.y}, low[2] = {piece.z, piece.w};
                bd_mma_u8s8(c[b][0], a0, high);
                bd_mma_u8u8(c[b][1], a0, low);
                bd_mma_u8s8(c[b][2], a1, high);
                bd_mma_u8u8(c[b][3], a1, low);
            }
        }
    }
}

#endif /* BITDELTA_PIECES_H_ */
