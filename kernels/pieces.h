/* pieces.h - tensor core products with q in two bytes, q = 256 high + low: high signed, low not. */
#ifndef BITDELTA_PIECES_H_
#define BITDELTA_PIECES_H_

#include "gpu.h"

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

#endif /* BITDELTA_PIECES_H_ */
