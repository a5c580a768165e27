/* avx512_emulation.h - the AVX-512 intrinsics that csrc/ uses, in plain C.
 *
 * Same names, same results, same faults: masked-off lanes touch no memory, and an aligned access to
 * an unaligned address traps. Rounding is to nearest, as the drivers set it. */
#ifndef BITDELTA_AVX512_EMULATION_H_
#define BITDELTA_AVX512_EMULATION_H_

#if defined(_IMMINTRIN_H_INCLUDED) || defined(__IMMINTRIN_H)
#error "the emulation stands in for <immintrin.h>"
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"

/* Registers, as lanes; lane 0 is the lowest. */
typedef union {
    int32_t i32[16];
    uint32_t u32[16];
} __m512i;
typedef struct {
    float f32[16];
} __m512;
typedef union {
    int16_t i16[16];
    uint16_t u16[16];
} __m256i;
typedef uint16_t __mmask16;

enum { _MM_HINT_T1, _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };

/* A function whose result has n lanes, each given by an expression in its number i. */
#define LANEWISE(result_type, name, parameters, lanes, n, lane)          \
    __attribute__((noinline, unused)) static result_type name parameters \
    {                                                                    \
        result_type result;                                              \
        for (int i = 0; i < (n); i++) {                                  \
            result.lanes[i] = (lane);                                    \
        }                                                                \
        return result;                                                   \
    }

/* Two functions of a and b: _mm512_name, and _mm512_mask_name, which keeps lanes of `source` where
 * the mask is 0. */
#define BINARY(type, name, lanes, n, lane)                                                      \
    LANEWISE(type, _mm512_##name, (type a, type b), lanes, n, lane)                             \
    LANEWISE(type, _mm512_mask_##name, (type source, __mmask16 mask, type a, type b), lanes, n, \
             (mask >> i & 1) ? (lane) : source.lanes[i])

/* ---- constants and casts ---------------------------------------------------------------------- */

LANEWISE(__m512i, _mm512_setzero_si512, (void), u32, 16, 0)
LANEWISE(__m512i, _mm512_set1_epi32, (int32_t value), i32, 16, value)
LANEWISE(__m512, _mm512_setzero_ps, (void), f32, 16, 0)
LANEWISE(__m512, _mm512_castsi512_ps, (__m512i a), f32, 16, bd_bits_float(a.u32[i]))
LANEWISE(__m512i, _mm512_castps_si512, (__m512 a), u32, 16, bd_float_bits(a.f32[i]))

/* ---- memory ----------------------------------------------------------------------------------- */

static inline void
emulated_alignment(const void *address, uintptr_t bytes)
{
    if ((uintptr_t)address % bytes != 0) {
        __builtin_trap();
    }
}

static inline float
emulated_f32(const void *address, int i)
{
    float value;
    memcpy(&value, (const char *)address + 4 * i, 4);
    return value;
}

static inline uint16_t
emulated_u16(const void *address, int i)
{
    uint16_t value;
    memcpy(&value, (const char *)address + 2 * i, 2);
    return value;
}

/* name_load..., name_store... of a whole register. */
#define MEMORY(type, load, store, bytes)                                       \
    __attribute__((noinline, unused)) static type load(const void *address)    \
    {                                                                          \
        type result;                                                           \
        emulated_alignment(address, bytes);                                    \
        memcpy(&result, address, sizeof result);                               \
        return result;                                                         \
    }                                                                          \
    __attribute__((noinline, unused)) static void store(void *address, type a) \
    {                                                                          \
        emulated_alignment(address, bytes);                                    \
        memcpy(address, &a, sizeof a);                                         \
    }

MEMORY(__m512i, _mm512_load_si512, _mm512_store_si512, 64)
MEMORY(__m512i, _mm512_loadu_si512, _mm512_storeu_si512, 1)
MEMORY(__m512, _mm512_loadu_ps, _mm512_storeu_ps, 1)
MEMORY(__m256i, _mm256_loadu_si256, _mm256_storeu_si256, 1)

LANEWISE(__m512, _mm512_maskz_loadu_ps, (__mmask16 mask, const void *address), f32, 16,
         (mask >> i & 1) ? emulated_f32(address, i) : 0)
LANEWISE(__m256i, _mm256_maskz_loadu_epi16, (__mmask16 mask, const void *address), u16, 16,
         (mask >> i & 1) ? emulated_u16(address, i) : (uint16_t)0)

#define _mm_prefetch(address, hint) ((void)(address))

/* ---- integers --------------------------------------------------------------------------------- */

BINARY(__m512i, add_epi32, u32, 16, a.u32[i] + b.u32[i])
BINARY(__m512i, sub_epi32, u32, 16, a.u32[i] - b.u32[i])
BINARY(__m512i, and_epi32, u32, 16, a.u32[i] & b.u32[i])
BINARY(__m512i, max_epi32, i32, 16, a.i32[i] > b.i32[i] ? a.i32[i] : b.i32[i])
LANEWISE(__m512i, _mm512_and_si512, (__m512i a, __m512i b), u32, 16, a.u32[i] & b.u32[i])
LANEWISE(__m512i, _mm512_slli_epi32, (__m512i a, unsigned n), u32, 16, n < 32 ? a.u32[i] << n : 0)
LANEWISE(__m512i, _mm512_srli_epi32, (__m512i a, unsigned n), u32, 16, n < 32 ? a.u32[i] >> n : 0)
LANEWISE(__m512i, _mm512_permutexvar_epi32, (__m512i index, __m512i a), u32, 16,
         a.u32[index.u32[i] & 15])

static inline int
_mm512_reduce_max_epi32(__m512i a)
{
    for (int i = 1; i < 16; i++) {
        a.i32[0] = a.i32[i] > a.i32[0] ? a.i32[i] : a.i32[0];
    }
    return a.i32[0];
}

/* ---- conversions ------------------------------------------------------------------------------ */

static inline int32_t
emulated_round(float value)
{
    return value >= -0x1p31f && value < 0x1p31f ? (int32_t)rintf(value) : INT32_MIN;
}

static inline int16_t
emulated_saturate(int32_t value)
{
    return (int16_t)(value > INT16_MAX ? INT16_MAX : value < INT16_MIN ? INT16_MIN : value);
}

LANEWISE(__m512, _mm512_cvtph_ps, (__m256i a), f32, 16, bd_f16_to_f32(a.u16[i]))
LANEWISE(__m512i, _mm512_cvtepu16_epi32, (__m256i a), u32, 16, a.u16[i])
LANEWISE(__m256i, _mm512_cvtsepi32_epi16, (__m512i a), i16, 16, emulated_saturate(a.i32[i]))
LANEWISE(__m512i, emulated_cvt_nearest, (__m512 a), i32, 16, emulated_round(a.f32[i]))
#define _mm512_cvt_roundps_epi32(a, rounding) emulated_cvt_nearest(a)

/* ---- fp32 ------------------------------------------------------------------------------------- */

BINARY(__m512, mul_ps, f32, 16, a.f32[i] * b.f32[i])
LANEWISE(__m512, _mm512_fmadd_ps, (__m512 a, __m512 b, __m512 c), f32, 16,
         fmaf(a.f32[i], b.f32[i], c.f32[i]))

/* Folded 8, 4, 2, 1. */
static inline float
_mm512_reduce_add_ps(__m512 a)
{
    for (int n = 8; n > 0; n /= 2) {
        for (int i = 0; i < n; i++) {
            a.f32[i] += a.f32[i + n];
        }
    }
    return a.f32[0];
}

#endif /* BITDELTA_AVX512_EMULATION_H_ */
