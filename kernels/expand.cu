/* expand.cu - round(fp32(base) + t), t = the planes' fp32(row * column) * s summed in order in fp32.
 *
 * A thread makes 8 columns, one byte of a sign word; 32 neighbours a row of 256 columns, and the warps of a
 * block rows of one strip, so that every 64-byte line of signs is used whole. What counts is reading base
 * and writing: 4 bytes a weight of 16 bits, against 1/8 byte of signs. */
#include "gpu.h"
#include "convert.h"
#include "cuda.h"

namespace
{

enum { WARPS = 8, THREADS = 32 * WARPS, COLUMNS = 8 };

struct expand_job {
    bd_matrix base; /* data NULL: zeros */
    bd_matrix out;
    bd_delta delta;
    int64_t row_begin, row_end, n_lines, plane_words;
};

/* The planes' sum at 8 columns of row n. */
__device__ __forceinline__ void
sum_planes(const expand_job &job, int64_t n, int64_t k, float sum[COLUMNS])
{
    const bd_delta &delta = job.delta;
    const uint32_t *sign = delta.sign +
                           (n / BD_STRIP_ROWS * job.n_lines + k / BD_WORD_BITS) * BD_STRIP_ROWS +
                           n % BD_STRIP_ROWS;
    for (int p = 0; p < delta.P; p++) {
        const unsigned bits = __ldg(sign + p * job.plane_words) >> k % BD_WORD_BITS;
        const float row = __ldg(delta.row + p * delta.N + n);
        BD_UNROLL
        for (int i = 0; i < COLUMNS; i++) {
            float scale = row;
            if (delta.column != NULL && k + i < delta.K) {
                scale = __fmul_rn(row, __ldg(delta.column + p * delta.K + k + i));
            }
            const unsigned flip = ((bits >> i & 1u) ^ 1u) << 31;
            const float term = __uint_as_float(__float_as_uint(scale) ^ flip);
            sum[i] = p == 0 ? term : __fadd_rn(sum[i], term);
        }
    }
}

template <bd_dtype dtype>
__device__ __forceinline__ void
store_row(void *data, int64_t at, int n, const float value[COLUMNS])
{
    constexpr int BYTES = dtype == BD_F32 ? 4 : 2;
    char *out = static_cast<char *>(data) + at * BYTES;
    if (n == COLUMNS && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
        unsigned word[COLUMNS * BYTES / 4];
        BD_UNROLL
        for (int i = 0; i < COLUMNS * BYTES / 4; i++) {
            word[i] = BYTES == 4 ? bd_from_f32<dtype>(value[i])
                                 : bd_from_f32<dtype>(value[(2 * i) % COLUMNS]) |
                                       bd_from_f32<dtype>(value[(2 * i + 1) % COLUMNS]) << 16;
        }
        BD_UNROLL
        for (int i = 0; i < COLUMNS * BYTES / 16; i++) {
            reinterpret_cast<uint4 *>(out)[i] =
                make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
        }
        return;
    }
    BD_UNROLL
    for (int i = 0; i < COLUMNS; i++) {
        if (i < n) {
            bd_store_any(data, dtype, at + i, value[i]);
        }
    }
}

/* 8 elements from `at` on, n of them there; out may be base itself, so not through the read-only cache. */
template <bd_dtype dtype>
__device__ __forceinline__ void
load_row(const void *data, int64_t at, int n, float value[COLUMNS])
{
    constexpr int BYTES = dtype == BD_F32 ? 4 : 2;
    const char *in = static_cast<const char *>(data) + at * BYTES;
    if (n == COLUMNS && reinterpret_cast<uintptr_t>(in) % 16 == 0) {
        BD_UNROLL
        for (int i = 0; i < COLUMNS * BYTES / 16; i++) {
            const uint4 unit = reinterpret_cast<const uint4 *>(in)[i];
            const unsigned word[4] = {unit.x, unit.y, unit.z, unit.w};
            BD_UNROLL
            for (int j = 0; j < 16 / BYTES; j++) {
                value[(i * 4 + j) % COLUMNS] =
                    BYTES == 4 ? bd_to_f32<dtype>(word[j % 4])
                               : bd_to_f32<dtype>(word[j / 2] >> j % 2 * 16 & 0xFFFFu);
            }
        }
        return;
    }
    BD_UNROLL
    for (int i = 0; i < COLUMNS; i++) {
        if (i < n) {
            value[i] = BYTES == 4
                           ? reinterpret_cast<const float *>(in)[i]
                           : bd_to_f32<dtype>(reinterpret_cast<const unsigned short *>(in)[i]);
        }
    }
}

template <bd_dtype B, bd_dtype O>
__global__ void
__launch_bounds__(THREADS, 4) expand_rows(const expand_job job)
{
    const int64_t n = job.row_begin + static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (n >= job.row_end) {
        return;
    }
    for (int64_t k = threadIdx.x % 32 * COLUMNS; k < job.delta.K; k += 32 * COLUMNS) {
        const int n_here = job.delta.K - k < COLUMNS ? static_cast<int>(job.delta.K - k) : COLUMNS;
        float sum[COLUMNS], value[COLUMNS] = {0, 0, 0, 0, 0, 0, 0, 0};
        sum_planes(job, n, k, sum);
        if (job.base.data != NULL) {
            load_row<B>(job.base.data, n * job.base.row_stride + k, n_here, value);
        }
        BD_UNROLL
        for (int i = 0; i < COLUMNS; i++) {
            value[i] = __fadd_rn(value[i], sum[i]);
        }
        store_row<O>(job.out.data, (n - job.row_begin) * job.out.row_stride + k, n_here, value);
    }
}

template <bd_dtype B>
bd_status
launch_base(const bd_cuda_context *ctx, const expand_job &job)
{
    const dim3 grid(static_cast<unsigned>((job.row_end - job.row_begin + WARPS - 1) / WARPS));
    const auto kernel = job.out.dtype == BD_F32   ? expand_rows<B, BD_F32>
                        : job.out.dtype == BD_F16 ? expand_rows<B, BD_F16>
                                                  : expand_rows<B, BD_BF16>;
    return BD_LAUNCH(kernel, grid, dim3(THREADS), 0, ctx->stream, job);
}

} /* namespace */

extern "C" bd_status
bd_cuda_expand(const bd_cuda_context *ctx, const bd_matrix *base, const bd_delta *delta,
               int64_t row_begin, int64_t row_end, const bd_matrix *out)
{
    expand_job job = {};
    if (delta->N > INT32_MAX || delta->K > INT32_MAX) {
        return BD_ERR_ARGUMENT;
    }
    if (row_begin == row_end || delta->K == 0) {
        return BD_OK;
    }
    if (base != NULL) {
        job.base = *base;
    }
    job.out = *out;
    job.delta = *delta;
    job.row_begin = row_begin;
    job.row_end = row_end;
    job.n_lines = bd_n_lines(delta->K);
    job.plane_words = bd_plane_words(delta->N, delta->K);
    return job.base.dtype == BD_F32   ? launch_base<BD_F32>(ctx, job)
           : job.base.dtype == BD_F16 ? launch_base<BD_F16>(ctx, job)
                                      : launch_base<BD_BF16>(ctx, job);
}
