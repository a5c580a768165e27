/* dtype.h - fp16 and bf16 to fp32 and back, inline. Narrowing rounds ties to even; a NaN stays a NaN
 * (quiet, its upper payload bits kept), as the hardware's conversions do. */
#ifndef BITDELTA_DTYPE_H_
#define BITDELTA_DTYPE_H_

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bitdelta.h"

#ifdef __cplusplus
extern "C" {
#endif

static inline size_t
bd_dtype_bytes(bd_dtype dtype)
{
    return dtype == BD_F32 ? 4 : 2;
}

static inline uint32_t
bd_float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float
bd_bits_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int
bd_is_finite(float value)
{
    return (bd_float_bits(value) & 0x7F800000u) != 0x7F800000u;
}

static inline float
bd_bf16_to_f32(uint16_t half)
{
    return bd_bits_float((uint32_t)half << 16);
}

static inline uint16_t
bd_f32_to_bf16(float value)
{
    uint32_t bits = bd_float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
        return (uint16_t)((bits >> 16) | 0x40u);
    }
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static inline float
bd_f16_to_f32(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) { /* infinite, or NaN made quiet */
        uint32_t quiet = magnitude > 0x7C00u ? 0x400000u : 0u;
        return bd_bits_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13 | quiet);
    }
    if (magnitude >= 0x400u) {
        return bd_bits_float(sign | (magnitude + ((127u - 15u) << 10)) << 13);
    }
    float value = (float)magnitude * 0x1p-24f; /* zero and denormals, exactly */
    return bd_bits_float(sign | bd_float_bits(value));
}

static inline uint16_t
bd_f32_to_f16(float value)
{
    uint32_t bits = bd_float_bits(value), sign = bits >> 16 & 0x8000u,
             magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) {
        return (uint16_t)(sign | 0x7E00u | (magnitude >> 13 & 0x3FFu));
    }
    if (magnitude >= 0x477FF000u) { /* 65520 and above: infinite */
        return (uint16_t)(sign | 0x7C00u);
    }
    if (magnitude >= 0x38800000u) { /* 2^-14 and above: normal; a carry moves into the exponent */
        uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
        return (uint16_t)(sign | (rounded - ((127u - 15u) << 23)) >> 13);
    }
    /* Adding 0.5, whose last place is 2^-24, rounds to the spacing of fp16 denormals. */
    uint32_t rounded = bd_float_bits(bd_bits_float(magnitude) + 0.5f);
    return (uint16_t)(sign | (rounded - 0x3F000000u));
}

/* A statement with T constant, so that what it inlines is compiled for each dtype. */
#define BD_BY_DTYPE(dtype, T, ...)  \
    if ((dtype) == BD_F32) {        \
        const bd_dtype T = BD_F32;  \
        __VA_ARGS__;                \
    } else if ((dtype) == BD_F16) { \
        const bd_dtype T = BD_F16;  \
        __VA_ARGS__;                \
    } else {                        \
        const bd_dtype T = BD_BF16; \
        __VA_ARGS__;                \
    }

/* data[index] as fp32. */
static inline float
bd_load(const void *data, bd_dtype dtype, int64_t index)
{
    if (dtype == BD_F32) {
        return ((const float *)data)[index];
    }
    uint16_t half = ((const uint16_t *)data)[index];
    return dtype == BD_F16 ? bd_f16_to_f32(half) : bd_bf16_to_f32(half);
}

/* data[index] = value, rounded. */
static inline void
bd_store(void *data, bd_dtype dtype, int64_t index, float value)
{
    if (dtype == BD_F32) {
        ((float *)data)[index] = value;
    } else {
        ((uint16_t *)data)[index] = dtype == BD_F16 ? bd_f32_to_f16(value) : bd_f32_to_bf16(value);
    }
}

/* Address of element `column` of row `row`. */
static inline void *
bd_element(const bd_matrix *matrix, int64_t row, int64_t column)
{
    int64_t index = row * matrix->row_stride + column;
    return (char *)matrix->data + index * (int64_t)bd_dtype_bytes(matrix->dtype);
}

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_DTYPE_H_ */
