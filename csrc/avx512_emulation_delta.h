/* avx512_emulation_delta.h - those intrinsics in plain C that only delta_avx512.c uses: fp64 lanes,
 * comparisons, masked stores, CRC-32C. */
#ifndef BITDELTA_AVX512_EMULATION_DELTA_H_
#define BITDELTA_AVX512_EMULATION_DELTA_H_

#include "avx512_emulation.h"

typedef struct {
    float f32[8];
} __m256;
typedef struct {
    double f64[8];
} __m512d;

enum { _CMP_UNORD_Q = 3, _CMP_NLT_UQ = 5 };

/* ---- fp64 ------------------------------------------------------------------------------------- */

LANEWISE(__m512d, _mm512_setzero_pd, (void), f64, 8, 0)
LANEWISE(__m512d, _mm512_add_pd, (__m512d a, __m512d b), f64, 8, a.f64[i] + b.f64[i])
LANEWISE(__m512d, _mm512_cvtps_pd, (__m256 a), f64, 8, (double)a.f32[i])
LANEWISE(__m256, _mm512_castps512_ps256, (__m512 a), f32, 8, a.f32[i])
LANEWISE(__m256, emulated_upper, (__m512 a), f32, 8, a.f32[i + 8])
#define _mm512_extractf32x8_ps(a, half) ((half) ? emulated_upper(a) : _mm512_castps512_ps256(a))
MEMORY(__m512d, _mm512_loadu_pd, _mm512_storeu_pd, 1)

/* ---- fp32 ------------------------------------------------------------------------------------- */

LANEWISE(__m512, _mm512_set1_ps, (float value), f32, 16, value)
LANEWISE(__m512, _mm512_add_ps, (__m512 a, __m512 b), f32, 16, a.f32[i] + b.f32[i])
LANEWISE(__m512, _mm512_sub_ps, (__m512 a, __m512 b), f32, 16, a.f32[i] - b.f32[i])
LANEWISE(__m512, _mm512_maskz_mov_ps, (__mmask16 mask, __m512 a), f32, 16,
         (mask >> i & 1) ? a.f32[i] : 0)

static inline __mmask16
_mm512_cmp_ps_mask(__m512 a, __m512 b, int comparison)
{
    unsigned mask = 0;
    for (int i = 0; i < 16; i++) {
        int is_unordered = isnan(a.f32[i]) || isnan(b.f32[i]);
        int is_less = a.f32[i] < b.f32[i];
        mask |= (unsigned)(comparison == _CMP_UNORD_Q ? is_unordered : !is_less) << i;
    }
    return (__mmask16)mask;
}

/* ---- integers and conversions ------------------------------------------------------------------ */

LANEWISE(__m512i, _mm512_mask_or_epi32, (__m512i source, __mmask16 mask, __m512i a, __m512i b), u32,
         16, (mask >> i & 1) ? (a.u32[i] | b.u32[i]) : source.u32[i])
LANEWISE(__m512i, _mm512_mask_xor_epi32, (__m512i source, __mmask16 mask, __m512i a, __m512i b),
         u32, 16, (mask >> i & 1) ? (a.u32[i] ^ b.u32[i]) : source.u32[i])
LANEWISE(__m256i, _mm512_cvtepi32_epi16, (__m512i a), u16, 16, (uint16_t)(a.u32[i] & 0xFFFFu))
LANEWISE(__m256i, emulated_cvtps_ph, (__m512 a), u16, 16, bd_f32_to_f16(a.f32[i]))
#define _mm512_cvtps_ph(a, rounding) emulated_cvtps_ph(a)

/* ---- memory ----------------------------------------------------------------------------------- */

static inline void
_mm512_mask_storeu_ps(void *address, __mmask16 mask, __m512 a)
{
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) {
            memcpy((char *)address + 4 * i, &a.f32[i], 4);
        }
    }
}

static inline void
_mm256_mask_storeu_epi16(void *address, __mmask16 mask, __m256i a)
{
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) {
            memcpy((char *)address + 2 * i, &a.u16[i], 2);
        }
    }
}

static inline void
_mm512_stream_ps(void *address, __m512 a)
{
    emulated_alignment(address, 64);
    memcpy(address, &a, sizeof a);
}

static inline void
_mm256_stream_si256(void *address, __m256i a)
{
    emulated_alignment(address, 32);
    memcpy(address, &a, sizeof a);
}

/* ---- checksum --------------------------------------------------------------------------------- */

static inline uint64_t
_mm_crc32_u64(uint64_t crc, uint64_t word)
{
    uint32_t sum = (uint32_t)crc;
    for (int i = 0; i < 64; i++) {
        uint32_t bit = (sum ^ (uint32_t)(word >> i)) & 1u;
        sum = sum >> 1 ^ (0x82F63B78u & (0u - bit));
    }
    return sum;
}

#endif /* BITDELTA_AVX512_EMULATION_DELTA_H_ */
