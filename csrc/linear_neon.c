/* linear_neon.c - arm64 inner loops of linear.c (Advanced SIMD, which every arm64 processor has).
 *
 * Products by table look-up: four columns of q have 16 sums of those under the 1 bits, held as three
 * tables of 16 bytes, low, middle and high. A line loaded by bytes has in one register 8 columns of 16
 * rows: two index registers. z = 2 (sum under the bits) - (sum of q), modulo 2^32, which z fits. */
#include "dtype.h"
#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <stddef.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    TABLE_BYTES = 48,        /* low, middle, high */
    LINE_TABLES = 8,         /* one for every four columns */
    HEAD_BYTES = 64,         /* in front of a row's tables: the sum of its q */
    FLUSH_LINES = 8,         /* 64 look-ups: high bytes, -2 .. 1, then still fit int8 */
    PREFETCH_WORDS = 32 * 16 /* 2 KB ahead in every strip */
};

static int64_t
row_bytes(int64_t n_lines)
{
    return HEAD_BYTES + n_lines * LINE_TABLES * TABLE_BYTES;
}

static int64_t
lut_prepared_bytes(int64_t n_lines, int64_t n_rows)
{
    return n_rows * row_bytes(n_lines);
}

static int64_t
lut_scratch_bytes(int64_t n_strips, int64_t n_lines, int64_t n_rows)
{
    (void)n_strips, (void)n_lines, (void)n_rows;
    return 0;
}

/* The sums of the subsets of four q, entry i taking q[b] where bit b of i is 1, as bytes. */
static void
write_tables(const int16_t *q, uint8_t *tables)
{
    int32_t sums[16] = {0};
    for (int b = 0; b < 4; b++) {
        for (int i = 0; i < 1 << b; i++) {
            sums[i + (1 << b)] = sums[i] + q[b];
        }
    }
    for (int i = 0; i < 16; i++) {
        const uint32_t sum = (uint32_t)sums[i];
        tables[i] = (uint8_t)sum;
        tables[16 + i] = (uint8_t)(sum >> 8);
        tables[32 + i] = (uint8_t)(sum >> 16);
    }
}

static void
lut_prepare(const int16_t *q, int64_t q_stride, int64_t n_lines, int64_t n_rows, void *prepared)
{
    uint8_t *out = prepared;
    for (int64_t m = 0; m < n_rows; m++, q += q_stride) {
        int32_t *total = (int32_t *)(void *)out;
        *total = 0;
        out += HEAD_BYTES;
        for (int64_t k = 0; k < n_lines * BD_WORD_BITS; k += 4, out += TABLE_BYTES) {
            write_tables(q + k, out);
            *total += q[k] + q[k + 1] + q[k + 2] + q[k + 3];
        }
    }
}

/* Sums of 16 rows, in parts that are narrow enough to be quick. */
typedef struct {
    uint16x8_t low[2], middle[2];
    int8x16_t high;
} narrow_sums;

INLINE void
look_up(narrow_sums *sums, const uint8x16x3_t table, uint8x16_t index)
{
    const uint8x16_t low = vqtbl1q_u8(table.val[0], index);
    const uint8x16_t middle = vqtbl1q_u8(table.val[1], index);
    const uint8x16_t high = vqtbl1q_u8(table.val[2], index);
    sums->low[0] = vaddw_u8(sums->low[0], vget_low_u8(low));
    sums->low[1] = vaddw_high_u8(sums->low[1], low);
    sums->middle[0] = vaddw_u8(sums->middle[0], vget_low_u8(middle));
    sums->middle[1] = vaddw_high_u8(sums->middle[1], middle);
    sums->high = vaddq_s8(sums->high, vreinterpretq_s8_u8(high));
}

/* wide += sums, rows 4 j .. 4 j + 3 in wide[j]. */
INLINE void
flush(uint32x4_t wide[4], const narrow_sums *sums)
{
    const int16x8_t high[2] = {vmovl_s8(vget_low_s8(sums->high)), vmovl_high_s8(sums->high)};
    for (int i = 0; i < 2; i++) {
        const uint32x4_t top[2] = {
            vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(high[i]))),
            vreinterpretq_u32_s32(vmovl_high_s16(high[i])),
        };
        uint32x4_t *sum = wide + 2 * i;
        sum[0] = vaddw_u16(sum[0], vget_low_u16(sums->low[i]));
        sum[1] = vaddw_high_u16(sum[1], sums->low[i]);
        sum[0] = vaddq_u32(sum[0], vshll_n_u16(vget_low_u16(sums->middle[i]), 8));
        sum[1] = vaddq_u32(sum[1], vshll_high_n_u16(sums->middle[i], 8));
        sum[0] = vaddq_u32(sum[0], vshlq_n_u32(top[0], 16));
        sum[1] = vaddq_u32(sum[1], vshlq_n_u32(top[1], 16));
    }
}

/* G strips, one row. */
INLINE void
lut_tile(const uint32_t *sign, int64_t strip_stride, int64_t n_lines, const uint8_t *tables,
         int32_t total, int32_t *z, const int G)
{
    uint32x4_t wide[2][4];
    for (int g = 0; g < G; g++) {
        for (int j = 0; j < 4; j++) {
            wide[g][j] = vdupq_n_u32(0);
        }
    }
    for (int64_t l = 0; l < n_lines; l += FLUSH_LINES) {
        narrow_sums sums[2];
        for (int g = 0; g < G; g++) {
            sums[g] = (narrow_sums){
                {vdupq_n_u16(0), vdupq_n_u16(0)}, {vdupq_n_u16(0), vdupq_n_u16(0)}, vdupq_n_s8(0)};
        }
        for (int i = 0; i < FLUSH_LINES; i++, sign += BD_STRIP_ROWS) {
            uint8x16x4_t columns[2]; /* val[b]: columns 8 b .. 8 b + 7 of the 16 rows */
            for (int g = 0; g < G; g++) {
                columns[g] = vld4q_u8((const uint8_t *)(sign + g * strip_stride));
                __builtin_prefetch(sign + g * strip_stride + PREFETCH_WORDS);
            }
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++, tables += 2 * TABLE_BYTES) {
                const uint8x16x3_t first = vld1q_u8_x3(tables);
                for (int g = 0; g < G; g++) {
                    look_up(&sums[g], first, vandq_u8(columns[g].val[b], vdupq_n_u8(15)));
                }
                const uint8x16x3_t second = vld1q_u8_x3(tables + TABLE_BYTES);
                for (int g = 0; g < G; g++) {
                    look_up(&sums[g], second, vshrq_n_u8(columns[g].val[b], 4));
                }
            }
        }
        for (int g = 0; g < G; g++) {
            flush(wide[g], &sums[g]);
        }
    }
    const uint32x4_t minus = vdupq_n_u32((uint32_t)total);
    for (int g = 0; g < G; g++) {
        for (int j = 0; j < 4; j++) {
            const uint32x4_t sum = vsubq_u32(vaddq_u32(wide[g][j], wide[g][j]), minus);
            vst1q_s32(z + BD_STRIP_ROWS * g + 4 * j, vreinterpretq_s32_u32(sum));
        }
    }
}

/* A row's tables stay in a near cache for all strips of the call. */
static void
lut_product(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
            const void *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, void *scratch)
{
    (void)scratch;
    for (int64_t m = 0; m < n_rows; m++, z += z_stride) {
        const uint8_t *row = (const uint8_t *)prepared + m * row_bytes(n_lines);
        const int32_t total = *(const int32_t *)(const void *)row;
        int64_t s = 0;
        for (; s + 2 <= n_strips; s += 2) {
            lut_tile(sign + s * strip_stride, strip_stride, n_lines, row + HEAD_BYTES, total,
                     z + BD_STRIP_ROWS * s, 2);
        }
        if (s < n_strips) {
            lut_tile(sign + s * strip_stride, strip_stride, n_lines, row + HEAD_BYTES, total,
                     z + BD_STRIP_ROWS * s, 1);
        }
    }
}

/* ---- base products of few rows ---------------------------------------------------------------- */

enum { STREAM_ROWS = 4 }; /* rows of x that share a weight: 16 sums */

/* 4 values as fp32. */
INLINE float32x4_t
load4(const void *data, bd_dtype dtype, int64_t k)
{
    if (dtype == BD_F32) {
        return vld1q_f32((const float *)data + k);
    }
    const uint16x4_t half = vld1_u16((const uint16_t *)data + k);
    return dtype == BD_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(half))
                           : vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(half), 16));
}

/* 16 columns from column k of one weight row and R rows of x. */
INLINE void
stream_step(float32x4_t sum[][4], const float *x, int64_t x_stride, const void *weight,
            bd_dtype dtype, int64_t k, const int R)
{
    for (int j = 0; j < 4; j++) {
        const float32x4_t w = load4(weight, dtype, k + 4 * j);
        for (int r = 0; r < R; r++) {
            sum[r][j] = vfmaq_f32(sum[r][j], vld1q_f32(x + r * x_stride + k + 4 * j), w);
        }
    }
}

/* One weight row and R rows of x. Every sum has its own 16 lanes and one fold, whatever R. */
INLINE void
stream_tile(const float *x, int64_t x_stride, const void *weight, bd_dtype dtype, int64_t K,
            float *out, int64_t out_stride, const int R)
{
    float32x4_t sum[STREAM_ROWS][4];
    for (int r = 0; r < R; r++) {
        for (int j = 0; j < 4; j++) {
            sum[r][j] = vdupq_n_f32(0.0f);
        }
    }
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        stream_step(sum, x, x_stride, weight, dtype, k, R);
    }
    if (k < K) {
        const size_t bytes = dtype == BD_F32 ? 4 : 2, n_left = (size_t)(K - k);
        float last_x[STREAM_ROWS][16] = {{0}}, last_weight[16] = {0};
        memcpy(last_weight, (const char *)weight + (size_t)k * bytes, n_left * bytes);
        for (int r = 0; r < R; r++) {
            memcpy(last_x[r], x + r * x_stride + k, n_left * 4);
        }
        stream_step(sum, last_x[0], 16, last_weight, dtype, 0, R);
    }
    for (int r = 0; r < R; r++) {
        const float32x4_t left = vaddq_f32(sum[r][0], sum[r][2]);
        const float32x4_t right = vaddq_f32(sum[r][1], sum[r][3]);
        out[r * out_stride] = vaddvq_f32(vaddq_f32(left, right));
    }
}

INLINE void
stream_typed(const float *x, int64_t x_stride, int64_t M, const void *weight, bd_dtype dtype,
             int64_t weight_stride, int64_t n_rows, int64_t K, float *out, int64_t out_stride)
{
    const int64_t bytes = weight_stride * (dtype == BD_F32 ? 4 : 2);
    const char *row = weight;
    for (int64_t n = 0; n < n_rows; n++, row += bytes, out++) {
        int64_t m = 0;
        for (; m + STREAM_ROWS <= M; m += STREAM_ROWS) {
            stream_tile(x + m * x_stride, x_stride, row, dtype, K, out + m * out_stride, out_stride,
                        STREAM_ROWS);
        }
        for (; m < M; m++) {
            stream_tile(x + m * x_stride, x_stride, row, dtype, K, out + m * out_stride, out_stride,
                        1);
        }
    }
}

static void
stream_rows(const float *x, int64_t x_stride, int64_t M, const void *weight, bd_dtype dtype,
            int64_t weight_stride, int64_t n_rows, int64_t K, float *out, int64_t out_stride)
{
    BD_BY_DTYPE(dtype, T,
                stream_typed(x, x_stride, M, weight, T, weight_stride, n_rows, K, out, out_stride));
}

void
bd_fill_neon_linear(bd_kernels *table)
{
    static const bd_product lut = {
        .name = "lut",
        .max_rows = INT64_MAX,
        .prepared_bytes = lut_prepared_bytes,
        .scratch_bytes = lut_scratch_bytes,
        .prepare = lut_prepare,
        .product = lut_product,
    };
    table->stream_rows = stream_rows;
    table->products[0] = lut;
    table->products[1] = (bd_product){0};
}

#endif /* __aarch64__ */
