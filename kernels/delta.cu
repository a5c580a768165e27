/* delta.cu - finetuned - base -> sign planes and scales; the sums of csrc/delta.c in the same order.
 *
 * Order: |r| of a row is summed in fp64 in 16 lanes (column mod 16), columns ascending, folded 8, 4, 2, 1.
 * So a row cannot be divided: two threads share it, each with 8 of the lanes, and a warp takes a strip.
 * Thread 2 i + h reads the 16-byte halves h of every 16 columns of row i, makes their sign bits itself, and
 * joins its bits with its neighbour's by one shuffle for 64 columns.
 *
 * A matrix of 4096 rows gives two warps an SM. To have the some 26 KB in flight that hide the memory's
 * latency, each thread keeps a ring of asynchronous copies in shared memory, 16 KB a warp for 16-bit
 * weights. Nobody else reads them: no barrier is needed. */
#include "gpu.h"
#include "delta.h"

namespace
{

enum {
    LANES = 32,
    STAGES = 4,
    CHUNK = 64,               /* columns of a stage: two lines of signs */
    CHUNK_PIECES = CHUNK / 16 /* of 8 columns, of a thread */
};

/* 16-byte units of 8 columns. */
template <bd_dtype dtype>
struct piece {
    enum { UNITS = dtype == BD_F32 ? 2 : 1, COLUMNS = 8 / UNITS, BYTES = 16 / COLUMNS };
};

/* One tensor's row, as a thread reads it. */
struct row_source {
    const char *data;
    int64_t K; /* 0 for rows beyond the last */
    bool is_aligned;
};

template <bd_dtype dtype>
__device__ row_source
source_of(const bd_matrix &matrix, int64_t n)
{
    const int64_t bytes = piece<dtype>::BYTES;
    const bool has_row = n < matrix.n_rows;
    row_source source;
    source.data =
        static_cast<const char *>(matrix.data) + (has_row ? n : 0) * matrix.row_stride * bytes;
    source.K = has_row ? matrix.n_columns : 0;
    source.is_aligned = reinterpret_cast<uintptr_t>(source.data) % 16 == 0;
    return source;
}

/* Columns k .. k + 7 into units of the ring, zero beyond the row. */
template <bd_dtype dtype>
__device__ __forceinline__ void
fill_piece(const row_source &source, int64_t k, uint4 *slot)
{
    constexpr int COLUMNS = piece<dtype>::COLUMNS, BYTES = piece<dtype>::BYTES;
    BD_UNROLL
    for (int u = 0; u < piece<dtype>::UNITS; u++) {
        const int64_t first = k + u * COLUMNS, left = source.K - first;
        if (source.is_aligned) {
            const int n = left <= 0 ? 0 : left < COLUMNS ? static_cast<int>(left) : COLUMNS;
            bd_copy_async16(slot + u * LANES, source.data + (n > 0 ? first * BYTES : 0), n * BYTES);
        } else {
            unsigned word[4] = {0, 0, 0, 0};
            BD_UNROLL
            for (int i = 0; i < COLUMNS; i++) {
                if (i < left) {
                    const char *at = source.data + (first + i) * BYTES;
                    word[i * BYTES / 4] |=
                        BYTES == 4 ? __ldg(reinterpret_cast<const unsigned *>(at))
                                   : static_cast<unsigned>(
                                         __ldg(reinterpret_cast<const unsigned short *>(at)))
                                         << i % 2 * 16;
                }
            }
            slot[u * LANES] = make_uint4(word[0], word[1], word[2], word[3]);
        }
    }
}

template <bd_dtype dtype>
__device__ __forceinline__ void
read_piece(const uint4 *slot, float value[8])
{
    BD_UNROLL
    for (int u = 0; u < piece<dtype>::UNITS; u++) {
        const uint4 unit = slot[u * LANES];
        const unsigned word[4] = {unit.x, unit.y, unit.z, unit.w};
        BD_UNROLL
        for (int i = 0; i < piece<dtype>::COLUMNS; i++) {
            value[u * 4 + i] = dtype == BD_F32
                                   ? __uint_as_float(word[i & 3])
                                   : bd_to_f32<dtype>(word[i / 2] >> i % 2 * 16 & 0xFFFFu);
        }
    }
}

/* What a thread does. */
struct worker {
    int64_t n; /* its row */
    int half;  /* 0 or 1: which 8 of 16 columns, and which lanes */
    int p;
    row_source base, finetuned;
    uint4 *ring; /* of this lane */
};

template <bd_dtype B, bd_dtype F>
struct ring_layout {
    enum { UNITS = CHUNK_PIECES * (piece<B>::UNITS + piece<F>::UNITS) };
};

/* Starts the copies of a chunk. */
template <bd_dtype B, bd_dtype F>
__device__ __forceinline__ void
fill_stage(const worker &own, int64_t chunk)
{
    uint4 *slot = own.ring + chunk % STAGES * ring_layout<B, F>::UNITS * LANES;
    BD_UNROLL
    for (int c = 0; c < CHUNK_PIECES; c++) {
        const int64_t k = chunk * CHUNK + 16 * c + 8 * own.half;
        fill_piece<B>(own.base, k, slot);
        slot += piece<B>::UNITS * LANES;
        fill_piece<F>(own.finetuned, k, slot);
        slot += piece<F>::UNITS * LANES;
    }
    bd_copy_async_commit();
}

/* r before the worker's plane, 8 columns from k on. */
__device__ __forceinline__ void
subtract_planes(const bd_extract_job &job, const worker &own, int64_t k, float r[8])
{
    for (int j = 0; j < own.p; j++) {
        const float row = bd_row_scale_of(job, j, own.n);
        BD_UNROLL
        for (int i = 0; i < 8; i++) {
            float scale = row;
            if (job.column != NULL && k + i < job.K) {
                scale = __fmul_rn(row, job.column[j * job.K + k + i]);
            }
            r[i] = bd_next_residual(r[i], scale);
        }
    }
}

/* Signs and sums of one chunk that has landed. Returns this thread's bits of the two words. */
template <bd_dtype B, bd_dtype F, bool IS_FIT>
__device__ __forceinline__ uint2
read_stage(const bd_extract_job &job, const worker &own, int64_t chunk, double lane[8])
{
    const uint4 *slot = own.ring + chunk % STAGES * ring_layout<B, F>::UNITS * LANES;
    unsigned word[2] = {0, 0};
    BD_UNROLL
    for (int c = 0; c < CHUNK_PIECES; c++) {
        const int64_t k = chunk * CHUNK + 16 * c + 8 * own.half, left = own.base.K - k;
        float b[8], r[8];
        read_piece<B>(slot, b);
        slot += piece<B>::UNITS * LANES;
        read_piece<F>(slot, r);
        slot += piece<F>::UNITS * LANES;
        BD_UNROLL
        for (int i = 0; i < 8; i++) {
            r[i] = __fsub_rn(r[i], b[i]);
        }
        if (left > 0) {
            subtract_planes(job, own, k, r);
        }
        BD_UNROLL
        for (int i = 0; i < 8; i++) {
            double a = static_cast<double>(i < left ? fabsf(r[i]) : 0.0f);
            if (IS_FIT) {
                a = __dmul_rn(a, i < left ? job.fit_column[k + i] : 0.0);
            }
            lane[i] = __dadd_rn(lane[i], a);
            const bool bit = i < left && !(r[i] < 0.0f);
            word[c / 2] |= static_cast<unsigned>(bit) << (c % 2 * 16 + 8 * own.half + i);
        }
    }
    return make_uint2(word[0], word[1]);
}

/* Names the first element of this thread that is not finite. */
__device__ void
report(const bd_extract_job &job, const worker &own)
{
    for (int64_t k = 8 * own.half; k < own.base.K; k += k % 8 == 7 ? 9 : 1) {
        const float r = bd_residual_at(job, own.n, k, own.p);
        if ((__float_as_uint(r) & 0x7F800000u) == 0x7F800000u) {
            const float b =
                bd_load_any(job.base.data, job.base.dtype, own.n * job.base.row_stride + k);
            const float f = bd_load_any(job.finetuned.data, job.finetuned.dtype,
                                        own.n * job.finetuned.row_stride + k);
            const bool b_is_bad = (__float_as_uint(b) & 0x7F800000u) == 0x7F800000u;
            const bool f_is_bad = (__float_as_uint(f) & 0x7F800000u) == 0x7F800000u;
            const unsigned what = own.p > 0 ? 2u : b_is_bad ? 1u : f_is_bad ? 0u : 2u;
            const unsigned long long at = static_cast<unsigned long long>(own.n * job.K + k);
            atomicMin(job.bad, static_cast<unsigned long long>(own.p) << 60 | at << 2 | what);
            return;
        }
    }
}

/* The sum of the row in both its threads. */
__device__ __forceinline__ double
fold_row(const double own[8])
{
    double lane[16];
    BD_UNROLL
    for (int i = 0; i < 8; i++) { /* lanes i and i + 8: their sum does not ask which comes first */
        lane[i] = __dadd_rn(own[i], __shfl_xor_sync(0xFFFFFFFFu, own[i], 1));
    }
    BD_UNROLL
    for (int width = 4; width > 0; width /= 2) {
        BD_UNROLL
        for (int i = 0; i < width; i++) {
            lane[i] = __dadd_rn(lane[i], lane[i + width]);
        }
    }
    return lane[0];
}

/* What becomes of a row's sum. */
template <bool IS_FIT>
__device__ __forceinline__ void
finish_row(const bd_extract_job &job, const worker &own, double sum)
{
    const bool is_finite = fabs(sum) <= 1.7976931348623157e308;
    if (own.n >= job.N) {
        return;
    }
    if (!IS_FIT && !is_finite) {
        report(job, own);
    }
    if (own.half != 0) {
        return;
    }
    if (IS_FIT) {
        job.row_sums[own.n] = sum / job.state->norm;
    } else if (job.form == BD_SCALE_ROW) {
        job.scale[own.p * job.N + own.n] = static_cast<float>(sum / static_cast<double>(job.K));
    } else {
        job.row_sums[own.n] = job.form == BD_SCALE_TENSOR ? sum : sum / static_cast<double>(job.K);
    }
}

/* One pass over a strip: signs of plane own.p and its sums, or the sums of a fit. */
template <bd_dtype B, bd_dtype F, bool IS_FIT>
__device__ __forceinline__ void
pass(const bd_extract_job &job, const worker &own)
{
    const int64_t n_chunks = IS_FIT ? (job.K + CHUNK - 1) / CHUNK : job.n_lines / 2;
    double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int stage = 0; stage < STAGES; stage++) {
        fill_stage<B, F>(own, stage);
    }
    const int64_t strip = blockIdx.x, row = static_cast<int64_t>(threadIdx.x / 2);
    uint32_t *out = job.sign + own.p * job.plane_words + strip * job.n_lines * BD_STRIP_ROWS +
                    own.half * BD_STRIP_ROWS + row;
    for (int64_t chunk = 0; chunk < n_chunks; chunk++) {
        bd_copy_async_wait<STAGES - 1>();
        uint2 word = read_stage<B, F, IS_FIT>(job, own, chunk, lane);
        fill_stage<B, F>(own, chunk + STAGES);
        if (!IS_FIT) {
            word.x |= __shfl_xor_sync(0xFFFFFFFFu, word.x, 1);
            word.y |= __shfl_xor_sync(0xFFFFFFFFu, word.y, 1);
            out[chunk * 2 * BD_STRIP_ROWS] = own.half == 0 ? word.x : word.y;
        }
    }
    bd_copy_async_wait<0>();
    finish_row<IS_FIT>(job, own, fold_row(lane));
    __syncwarp(); /* the next plane's pass reads the scale */
}

template <bd_dtype B, bd_dtype F, bool IS_FIT>
__global__ void
__launch_bounds__(LANES, 12) /* 12 rings fit an SM */
    extract_strip(const bd_extract_job job, int first_plane, int end_plane)
{
    BD_SHARED(uint4, ring);
    if (IS_FIT && job.state->has_ended) {
        return;
    }
    worker own;
    own.n = static_cast<int64_t>(blockIdx.x) * BD_STRIP_ROWS + threadIdx.x / 2;
    own.half = static_cast<int>(threadIdx.x % 2);
    own.base = source_of<B>(job.base, own.n);
    own.finetuned = source_of<F>(job.finetuned, own.n);
    own.ring = ring + threadIdx.x;
    for (own.p = first_plane; own.p < end_plane; own.p++) {
        pass<B, F, IS_FIT>(job, own);
    }
}

template <bd_dtype B, bd_dtype F, bool IS_FIT>
bd_status
launch_pair(const bd_cuda_context *ctx, const bd_extract_job *job, int first_plane, int end_plane)
{
    const dim3 grid(static_cast<unsigned>(bd_n_strips(job->N)));
    const size_t shared_bytes = STAGES * ring_layout<B, F>::UNITS * LANES * sizeof(uint4);
    return BD_LAUNCH((extract_strip<B, F, IS_FIT>), grid, dim3(LANES), shared_bytes, ctx->stream,
                     *job, first_plane, end_plane);
}

template <bd_dtype B, bool IS_FIT>
bd_status
launch_base(const bd_cuda_context *ctx, const bd_extract_job *job, int first_plane, int end_plane)
{
    return job->finetuned.dtype == BD_F32
               ? launch_pair<B, BD_F32, IS_FIT>(ctx, job, first_plane, end_plane)
           : job->finetuned.dtype == BD_F16
               ? launch_pair<B, BD_F16, IS_FIT>(ctx, job, first_plane, end_plane)
               : launch_pair<B, BD_BF16, IS_FIT>(ctx, job, first_plane, end_plane);
}

template <bool IS_FIT>
bd_status
launch_strips(const bd_cuda_context *ctx, const bd_extract_job *job, int first_plane, int end_plane)
{
    return job->base.dtype == BD_F32 ? launch_base<BD_F32, IS_FIT>(ctx, job, first_plane, end_plane)
           : job->base.dtype == BD_F16
               ? launch_base<BD_F16, IS_FIT>(ctx, job, first_plane, end_plane)
               : launch_base<BD_BF16, IS_FIT>(ctx, job, first_plane, end_plane);
}

/* ---- beside the passes ------------------------------------------------------------------------ */

/* One scale a tensor: the mean over all rows, ascending, one addition after the other. */
__global__ void
__launch_bounds__(LANES) set_tensor_scale(const bd_extract_job job, int p)
{
    double sum = 0.0;
    for (int64_t first = 0; first < job.N; first += LANES) {
        const int64_t n = first + threadIdx.x;
        const double own = n < job.N ? job.row_sums[n] : 0.0;
        for (int lane = 0; lane < LANES; lane++) { /* + 0 beyond the last changes nothing */
            sum = __dadd_rn(sum, __shfl_sync(0xFFFFFFFFu, own, lane));
        }
    }
    if (threadIdx.x == 0) {
        job.scale[p] =
            static_cast<float>(sum / (static_cast<double>(job.N) * static_cast<double>(job.K)));
    }
}

__global__ void
begin(const bd_extract_job job, int64_t n_scales, int64_t n_columns)
{
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t n_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    if (thread == 0) {
        *job.bad = BD_CUDA_NO_BAD;
    }
    for (int64_t i = thread; i < n_scales; i += n_threads) {
        job.scale[i] = 0.0f;
    }
    for (int64_t i = thread; i < n_columns; i += n_threads) {
        job.column[i] = 1.0f;
    }
}

/* The outputs of a matrix without elements: no signs, zero row scales, columns of 1. */
bd_status
extract_nothing(const bd_cuda_context *ctx, const bd_extract_job *job)
{
    const int64_t n_scales = job->form == BD_SCALE_TENSOR ? job->P : job->P * job->N;
    return BD_LAUNCH(begin, dim3(8), dim3(256), 0, ctx->stream, *job, n_scales,
                     job->column == NULL ? 0 : job->P * job->K);
}

} /* namespace */

bd_status
bd_launch_fit_rows(const bd_cuda_context *ctx, const bd_extract_job *job, int p)
{
    return launch_strips<true>(ctx, job, p, p + 1);
}

extern "C" size_t
bd_cuda_extract_workspace_bytes(int64_t N, int64_t K, bd_scale_form form)
{
    const int64_t n_doubles = form == BD_SCALE_ROW ? 0 : N + (form == BD_SCALE_RANK1 ? K : 0);
    return sizeof(bd_fit_state) + static_cast<size_t>(n_doubles) * sizeof(double);
}

extern "C" bd_status
bd_cuda_extract(const bd_cuda_context *ctx, const bd_matrix *base, const bd_matrix *finetuned,
                int P, bd_scale_form form, uint32_t *sign, float *scale, float *column,
                uint64_t *bad, void *workspace)
{
    bd_extract_job job = {};
    job.base = *base;
    job.finetuned = *finetuned;
    job.P = P;
    job.form = form;
    job.sign = sign;
    job.scale = scale;
    job.column = form == BD_SCALE_RANK1 ? column : NULL;
    job.N = base->n_rows;
    job.K = base->n_columns;
    job.n_lines = bd_n_lines(job.K);
    job.plane_words = bd_plane_words(job.N, job.K);
    job.bad = reinterpret_cast<unsigned long long *>(bad);
    job.state = static_cast<bd_fit_state *>(workspace);
    job.row_sums = reinterpret_cast<double *>(job.state + 1);
    job.fit_column = job.row_sums + job.N;
    if (P < 1 || P > BD_MAX_PLANES || job.N > INT32_MAX || job.K > INT32_MAX) {
        return BD_ERR_ARGUMENT;
    }
    if (job.N == 0 || job.K == 0) {
        return extract_nothing(ctx, &job);
    }
    bd_status status = BD_LAUNCH(begin, dim3(1), dim3(1), 0, ctx->stream, job, 0, 0);
    if (form == BD_SCALE_ROW) {
        return status == BD_OK ? launch_strips<false>(ctx, &job, 0, P) : status;
    }
    for (int p = 0; status == BD_OK && p < P; p++) {
        status = launch_strips<false>(ctx, &job, p, p + 1);
        if (status == BD_OK && form == BD_SCALE_TENSOR) {
            status = BD_LAUNCH(set_tensor_scale, dim3(1), dim3(LANES), 0, ctx->stream, job, p);
        } else if (status == BD_OK) {
            status = bd_launch_rank1(ctx, &job, p);
        }
    }
    return status;
}
