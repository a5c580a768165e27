/* convert.h - fp16 and bf16 to fp32 and back on the device: the bits of csrc/dtype.h, NaN included.
 * Include after gpu.h. */
#ifndef BITDELTA_CONVERT_H_
#define BITDELTA_CONVERT_H_

#include "dtype.h"

/* Bits of one element, in the low end of a word. */
template <bd_dtype dtype>
static __device__ __forceinline__ float
bd_to_f32(uint32_t bits)
{
    if (dtype == BD_F32) {
        return __uint_as_float(bits);
    }
    if (dtype == BD_BF16) {
        return __uint_as_float(bits << 16);
    }
#if defined(BD_EMULATE)
    return bd_f16_to_f32((uint16_t)bits);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    /* the hardware's NaN has no payload, ours keeps it */
    return (bits & 0x7FFFu) <= 0x7C00u
               ? value
               : __uint_as_float((bits & 0x8000u) << 16 | 0x7FC00000u | (bits & 0x3FFu) << 13);
#endif
}

/* value rounded, ties to even. */
template <bd_dtype dtype>
static __device__ __forceinline__ uint32_t
bd_from_f32(float value)
{
    const uint32_t bits = __float_as_uint(value);
    if (dtype == BD_F32) {
        return bits;
    }
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    if (dtype == BD_BF16) {
        return is_nan ? bits >> 16 | 0x40u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    }
#if defined(BD_EMULATE)
    return bd_f32_to_f16(value);
#else
    unsigned short half; /* the hardware's NaN is 0x7fff, ours keeps the sign and the payload */
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return is_nan ? (bits >> 16 & 0x8000u) | 0x7E00u | (bits >> 13 & 0x3FFu) : half;
#endif
}

/* data[index] as fp32. */
template <bd_dtype dtype>
static __device__ __forceinline__ float
bd_load_as(const void *data, int64_t index)
{
    if (dtype == BD_F32) {
        return __ldg(static_cast<const float *>(data) + index);
    }
    return bd_to_f32<dtype>(__ldg(static_cast<const unsigned short *>(data) + index));
}

/* The same where the dtype is known at run time only: the branch is the same for the whole grid. */
static __device__ __forceinline__ float
bd_load_any(const void *data, bd_dtype dtype, int64_t index)
{
    return dtype == BD_F32   ? bd_load_as<BD_F32>(data, index)
           : dtype == BD_F16 ? bd_load_as<BD_F16>(data, index)
                             : bd_load_as<BD_BF16>(data, index);
}

/* The same of memory that the launch also writes, which the read-only cache must not hold. */
static __device__ __forceinline__ float
bd_read_any(const void *data, bd_dtype dtype, int64_t index)
{
    if (dtype == BD_F32) {
        return static_cast<const float *>(data)[index];
    }
    const unsigned bits = static_cast<const unsigned short *>(data)[index];
    return dtype == BD_F16 ? bd_to_f32<BD_F16>(bits) : bd_to_f32<BD_BF16>(bits);
}

static __device__ __forceinline__ void
bd_store_any(void *data, bd_dtype dtype, int64_t index, float value)
{
    if (dtype == BD_F32) {
        static_cast<float *>(data)[index] = value;
    } else {
        static_cast<unsigned short *>(data)[index] = static_cast<unsigned short>(
            dtype == BD_F16 ? bd_from_f32<BD_F16>(value) : bd_from_f32<BD_BF16>(value));
    }
}

#endif /* BITDELTA_CONVERT_H_ */
