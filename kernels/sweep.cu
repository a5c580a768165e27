/* sweep.cu - every column in turn moves to the level that lowers ||X (D - Q)^T|| most: csrc/sweep.c.
 *
 * With H = X^T X and G = (D - Q) H that level is the nearest to q + G[k] / H[k, k]; moving by `change` takes
 * change * H[k] from G's row. Rows are independent, and a warp takes one. It visits 32 columns at a time,
 * one word of each plane: a lane has its column's G and H[k, k], so that columns that stay cost no memory
 * access. A move reads a row of H (from the L2, where all rows of G share it) and rewrites the row of G;
 * some fifth of the columns move at first, few later, and these accesses are the bound. */
#include "gpu.h"
#include "cuda.h"
#include "levels.h"

namespace
{

enum { LANES = 32 };

/* What a warp knows of 32 columns. */
struct line_state {
    int64_t begin;                /* first column */
    unsigned word[BD_MAX_PLANES]; /* signs, in every lane */
    float row[BD_MAX_PLANES];     /* scales of the row, in every lane */
    float column[BD_MAX_PLANES];  /* of the lane's column */
    float pull, diagonal;         /* of the lane's column */
};

__device__ __forceinline__ void
load_line(const bd_sweep_args &args, int64_t n, int64_t line, int lane, const uint32_t *words,
          int64_t plane_words, line_state *state)
{
    const int64_t k = line * BD_WORD_BITS + lane;
    const bool has_column = k < args.K;
    state->begin = line * BD_WORD_BITS;
    state->pull = has_column ? args.pull[n * args.K + k] : 0.0f;
    state->diagonal = 1.0f;
    if (has_column) {
        state->diagonal = __ldg(args.hessian + (args.is_diagonal ? k : k * args.K + k));
    }
    BD_UNROLL
    for (int p = 0; p < BD_MAX_PLANES; p++) {
        if (p < args.P) {
            state->word[p] = words[p * plane_words + line * BD_STRIP_ROWS];
            state->column[p] =
                args.column != NULL && has_column ? __ldg(args.column + p * args.K + k) : 1.0f;
        }
    }
}

/* Takes change * H[k] from the row of G; the lane's own column of the line at hand is in `state` alone. */
__device__ __forceinline__ void
take_row(const bd_sweep_args &args, int64_t n, int64_t k, float change, int lane, line_state *state)
{
    const int64_t own = state->begin + lane;
    if (args.is_diagonal) {
        if (own == k) {
            state->pull = __fsub_rn(state->pull, __fmul_rn(change, state->diagonal));
        }
        return;
    }
    const float *hessian = args.hessian + k * args.K;
    float *pull = args.pull + n * args.K;
    if (own < args.K) {
        state->pull = __fsub_rn(state->pull, __fmul_rn(change, __ldg(hessian + own)));
    }
    for (int64_t c = lane; c < args.K; c += LANES) {
        if (c != own) {
            pull[c] = __fsub_rn(pull[c], __fmul_rn(change, __ldg(hessian + c)));
        }
    }
}

/* Column j of the line. */
__device__ __forceinline__ void
visit_column(const bd_sweep_args &args, int64_t n, int j, int lane, line_state *state)
{
    float scale[BD_MAX_PLANES];
    int code = 0;
    BD_UNROLL
    for (int p = 0; p < BD_MAX_PLANES; p++) {
        scale[p] = 0.0f;
        if (p < args.P) {
            const float column = __shfl_sync(0xFFFFFFFFu, state->column[p], j);
            scale[p] = args.column == NULL ? state->row[p] : __fmul_rn(state->row[p], column);
            code |= static_cast<int>(state->word[p] >> j & 1u) << p;
        }
    }
    const float now = bd_level_of(code, args.P, scale);
    const float step = __fdiv_rn(state->pull, state->diagonal);
    const float want = __fadd_rn(now, __shfl_sync(0xFFFFFFFFu, step, j));
    const int nearest = bd_nearest<LANES>(want, lane, args.P, scale);
    const float level = bd_level_of(nearest, args.P, scale);
    const float there = fabsf(__fsub_rn(want, level)), here = fabsf(__fsub_rn(want, now));
    if (there < __fmul_rn(here, 0.9999f)) {
        BD_UNROLL
        for (int p = 0; p < BD_MAX_PLANES; p++) {
            if (p < args.P) {
                state->word[p] =
                    (state->word[p] & ~(1u << j)) | static_cast<unsigned>(nearest >> p & 1) << j;
            }
        }
        take_row(args, n, state->begin + j, __fsub_rn(level, now), lane, state);
    }
}

__global__ void
__launch_bounds__(LANES, 16)
    sweep_row(const bd_sweep_args args, int64_t n_lines, int64_t plane_words)
{
    const int64_t n = blockIdx.x;
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t *words = args.sign + n / BD_STRIP_ROWS * n_lines * BD_STRIP_ROWS + n % BD_STRIP_ROWS;
    line_state state;
    BD_UNROLL
    for (int p = 0; p < BD_MAX_PLANES; p++) {
        state.row[p] = p < args.P ? __ldg(args.row + p * args.N + n) : 0.0f;
        state.word[p] = 0;
        state.column[p] = 0.0f;
    }
    for (int64_t line = 0; line * BD_WORD_BITS < args.K; line++) {
        load_line(args, n, line, lane, words, plane_words, &state);
        for (int j = 0; j < LANES && state.begin + j < args.K; j++) {
            visit_column(args, n, j, lane, &state);
        }
        if (state.begin + lane < args.K) {
            args.pull[n * args.K + state.begin + lane] = state.pull;
        }
        __syncwarp(); /* every lane has read the words */
        BD_UNROLL
        for (int p = 0; p < BD_MAX_PLANES; p++) {
            if (p < args.P && lane == 0) {
                words[p * plane_words + line * BD_STRIP_ROWS] = state.word[p];
            }
        }
    }
}

} /* namespace */

extern "C" bd_status
bd_cuda_sweep(const bd_cuda_context *ctx, const bd_sweep_args *args)
{
    if (args->P < 1 || args->P > BD_MAX_PLANES || args->N > INT32_MAX || args->K > INT32_MAX) {
        return BD_ERR_ARGUMENT;
    }
    if (args->N == 0 || args->K == 0) {
        return BD_OK;
    }
    return BD_LAUNCH(sweep_row, dim3(static_cast<unsigned>(args->N)), dim3(LANES), 0, ctx->stream,
                     *args, bd_n_lines(args->K), bd_plane_words(args->N, args->K));
}
