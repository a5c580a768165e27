/* quantize.cu - fixed16: u = x or fp32(x * column) -> q int16 and an exponent, for a row at a time.
 *
 *   e = max(frexp exponent of max |u|, -96);  q = clamp(round_ties_even(u * 2^(15-e)), -32768, 32767)
 *
 * A block takes a row, twice: for the largest |u|, then for q; the second time it comes from the L1 cache.
 * Written is as much as x has in fp16. Layouts: quantize.h. */
#include "gpu.h"
#include "convert.h"
#include "quantize.h"

namespace
{

enum { THREADS = 256, WARPS = THREADS / 32 };

/* What a block's threads share. */
struct block_state {
    unsigned long long total; /* sum of q, modulo 2^64 */
    unsigned least;           /* complement of the bits of max |u| */
    unsigned unused;
};

template <bd_dtype dtype>
struct row_source {
    const void *x;
    int64_t begin; /* element of the row's start */
    const float *column;
    int64_t K;

    __device__ __forceinline__ float at(int64_t k) const
    {
        const float value = bd_load_as<dtype>(x, begin + k);
        return column == NULL ? value : __fmul_rn(value, __ldg(column + k));
    }
};

/* Without their signs, fp32 numbers are ordered like their bits. */
template <bd_dtype dtype>
__device__ unsigned
largest_bits(const row_source<dtype> &source)
{
    unsigned largest = 0;
    for (int64_t k = threadIdx.x; k < source.K; k += THREADS) {
        largest = max(largest, __float_as_uint(source.at(k)) & 0x7FFFFFFFu);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, lanes));
    }
    return largest;
}

__device__ int
exponent_of(unsigned largest)
{
    const int e = largest == 0 ? 0 : static_cast<int>(largest >> 23) - 126;
    return max(e, BD_MIN_EXPONENT);
}

/* q of column k, 0 beyond the last. */
template <bd_dtype dtype>
__device__ __forceinline__ int
quantized(const row_source<dtype> &source, int64_t k, float factor)
{
    return k < source.K ? min(__float2int_rn(__fmul_rn(source.at(k), factor)), 32767) : 0;
}

/* A warp makes the 16 bit planes of a group: 16 ballots a word, of which each lane keeps four. */
template <bd_dtype dtype>
__device__ int
store_planes(const row_source<dtype> &source, int group, float factor, uint4 *out)
{
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    unsigned kept[4] = {0, 0, 0, 0};
    int total = 0;
    BD_UNROLL
    for (int l = 0; l < BD_GROUP_LINES; l++) {
        const int q = quantized(source, (group * BD_GROUP_LINES + l) * 32 + lane, factor);
        total += q;
        BD_UNROLL
        for (int p = 0; p < 16; p++) {
            const unsigned plane = __ballot_sync(0xFFFFFFFFu, q >> p & 1);
            const bool is_mine = g == p % 8 && t == l / 2;
            kept[p / 8 * 2 + l % 2] = is_mine ? plane : kept[p / 8 * 2 + l % 2];
        }
    }
    out[group * BD_GROUP_UNITS + lane] = make_uint4(kept[0], kept[1], kept[2], kept[3]);
    return total;
}

/* A lane makes 16 bytes of pieces: 4 columns from each of two places. */
template <bd_dtype dtype>
__device__ int
store_pieces(const row_source<dtype> &source, int group, float factor, int is_transposed, int row,
             uint4 *out)
{
    const int lane = static_cast<int>(threadIdx.x % 32), i = lane / 4, t = lane % 4;
    const int64_t begin = static_cast<int64_t>(group) * BD_PAD_COLUMNS;
    const int64_t k = begin + (is_transposed ? 32 * i + 4 * t : 64 * t + i);
    const int step = is_transposed ? 1 : 8, second = is_transposed ? 16 : 32;
    unsigned piece[4] = {0, 0, 0, 0}; /* high, high, low, low */
    int total = 0;
    BD_UNROLL
    for (int c = 0; c < 2; c++) {
        BD_UNROLL
        for (int b = 0; b < 4; b++) {
            const int q = quantized(source, k + c * second + b * step, factor);
            const unsigned bits = static_cast<unsigned>(q);
            total += q;
            piece[c] |= (bits >> 8 & 0xFFu) << 8 * b;
            piece[2 + c] |= (bits & 0xFFu) << 8 * b;
        }
    }
    out[(group * BD_GROUP_UNITS + i * 4) * BD_ROW_BLOCK + row * 4 + t] =
        make_uint4(piece[0], piece[1], piece[2], piece[3]);
    return total;
}

/* The largest |u| of the row to the whole block. */
template <bd_dtype dtype>
__device__ unsigned
share_largest(const row_source<dtype> &source, block_state *state)
{
    if (threadIdx.x == 0) {
        state->least = ~0u;
        state->total = 0;
    }
    __syncthreads();
    const unsigned largest = largest_bits(source);
    if (threadIdx.x % 32 == 0) {
        atomicMin(&state->least, ~largest);
    }
    __syncthreads();
    return ~state->least;
}

/* Which column scale the block's row takes; false where there is nothing to do. */
__device__ bool
find_column(const bd_quantize_job &job, int tenant, const float **column)
{
    const int prepared = static_cast<int>(blockIdx.y);
    const int part = prepared / job.max_planes, p = prepared % job.max_planes;
    *column = NULL;
    if (!job.has_columns && !job.is_transposed) {
        return true;
    }
    const bd_cuda_delta delta = job.deltas[part][tenant];
    if (bd_is_lost(delta, job.max_planes, job.has_columns) || p >= delta.P) {
        return false;
    }
    if (job.is_transposed) {
        *column = delta.row + p * job.x.n_columns;
        return true;
    }
    *column = delta.column == NULL ? NULL : delta.column + p * job.x.n_columns;
    return delta.column != NULL || p == 0;
}

template <bd_dtype dtype>
__global__ void
__launch_bounds__(THREADS) quantize_rows(const bd_quantize_job job)
{
    BD_SHARED(block_state, state);
    const int4 row = job.plan.rows[blockIdx.x]; /* {row of the batch, tenant, place, kind} */
    row_source<dtype> source = {job.x.data, row.x * job.x.row_stride, NULL, job.x.n_columns};
    if (row.y < 0 || !find_column(job, row.y, &source.column)) {
        return;
    }
    const bd_quantized &out = job.out;
    const int64_t at = blockIdx.y * out.n_places + row.z;
    bd_row_scale scale = {BD_ROW_LOST, 0, 0};
    const unsigned largest = share_largest(source, state);
    if (largest < 0x7F800000u) {
        scale.exponent = exponent_of(largest);
        const float factor =
            __uint_as_float(static_cast<unsigned>(127 + 15 - scale.exponent) << 23);
        const int64_t row_units = static_cast<int64_t>(out.n_groups) * BD_GROUP_UNITS;
        const int in_block = row.z % BD_ROW_BLOCK;
        int64_t total = 0;
        for (int group = static_cast<int>(threadIdx.x / 32); group < out.n_groups; group += WARPS) {
            if (row.w == BD_KIND_FEW && !job.is_transposed && !job.is_in_pieces) {
                total += store_planes(source, group, factor, out.units + at * row_units);
            } else {
                total += store_pieces(source, group, factor, job.is_transposed, in_block,
                                      out.units + (at - in_block) * row_units);
            }
        }
        atomicAdd(&state->total, static_cast<unsigned long long>(total));
        __syncthreads();
        scale.total = static_cast<int64_t>(state->total);
    }
    if (threadIdx.x == 0) {
        out.scales[at] = scale;
    }
}

/* ---- alone, in plain order -------------------------------------------------------------------- */

struct plain_job {
    bd_matrix x;
    const float *column;
    int16_t *q;
    int32_t *exponents;
};

template <bd_dtype dtype>
__global__ void
__launch_bounds__(THREADS) quantize_plain(const plain_job job)
{
    BD_SHARED(block_state, state);
    const int64_t row = blockIdx.x, K_padded = (job.x.n_columns + 255) / 256 * 256;
    const row_source<dtype> source = {job.x.data, row * job.x.row_stride, job.column,
                                      job.x.n_columns};
    const unsigned largest = share_largest(source, state);
    const bool is_lost = largest >= 0x7F800000u;
    const int e = is_lost ? 0 : exponent_of(largest);
    const float factor = __uint_as_float(static_cast<unsigned>(127 + 15 - e) << 23);
    for (int64_t k = threadIdx.x; k < K_padded; k += THREADS) {
        job.q[row * K_padded + k] =
            static_cast<int16_t>(is_lost ? 0 : quantized(source, k, factor));
    }
    if (threadIdx.x == 0) {
        job.exponents[row] = is_lost ? BD_ROW_LOST : e;
    }
}

} /* namespace */

bd_status
bd_launch_quantize(const bd_cuda_context *ctx, const bd_quantize_job *job, int64_t M)
{
    const dim3 grid(static_cast<unsigned>(M), static_cast<unsigned>(job->out.n_prepared));
    const auto kernel = job->x.dtype == BD_F32   ? quantize_rows<BD_F32>
                        : job->x.dtype == BD_F16 ? quantize_rows<BD_F16>
                                                 : quantize_rows<BD_BF16>;
    return BD_LAUNCH(kernel, grid, dim3(THREADS), sizeof(block_state), ctx->stream, *job);
}

extern "C" bd_status
bd_cuda_quantize(const bd_cuda_context *ctx, const bd_matrix *x, const float *column, int16_t *q,
                 int32_t *exponents)
{
    if (x->n_rows > BD_CUDA_MAX_ROWS || x->n_columns > BD_CUDA_MAX_COLUMNS) {
        return BD_ERR_ARGUMENT;
    }
    if (x->n_rows == 0) {
        return BD_OK;
    }
    const plain_job job = {*x, column, q, exponents};
    const auto kernel = x->dtype == BD_F32   ? quantize_plain<BD_F32>
                        : x->dtype == BD_F16 ? quantize_plain<BD_F16>
                                             : quantize_plain<BD_BF16>;
    return BD_LAUNCH(kernel, dim3(static_cast<unsigned>(x->n_rows)), dim3(THREADS),
                     sizeof(block_state), ctx->stream, job);
}
