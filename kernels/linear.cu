/* linear.cu - y[m] = sum_p term_p(t) + base product + bias for all tenants, planes and parts: quantises
 * the rows of the plan, then two launches over its work lists, of which the second needs tenants with more
 * than BD_FEW_ROWS rows (or a GPU without one-bit products). */
#include "gpu.h"
#include "linear.h"

extern "C" size_t
bd_cuda_linear_workspace_bytes(int64_t M, int64_t K, int64_t T, int n_parts, int max_planes,
                               int has_columns)
{
    size_t n_bytes;
    bd_quantized_parts(NULL, bd_plan_places(M, T), K, has_columns ? n_parts * max_planes : 1,
                       &n_bytes);
    return n_bytes;
}

extern "C" bd_status
bd_cuda_linear(const bd_cuda_context *ctx, const bd_cuda_linear_args *args)
{
    const int64_t M = args->x->n_rows, K = args->x->n_columns, T = args->n_deltas;
    if (M > BD_CUDA_MAX_ROWS || K > BD_CUDA_MAX_COLUMNS || T > BD_CUDA_MAX_TENANTS ||
        args->n_parts < 1 || args->n_parts > BD_CUDA_MAX_PARTS || args->max_planes < 1 ||
        args->max_planes > BD_MAX_PLANES) {
        return BD_ERR_ARGUMENT;
    }
    size_t n_bytes;
    bd_linear_job job = {};
    bd_quantize_job quantize = {};
    for (int part = 0; part < args->n_parts; part++) {
        if (args->parts[part].N > BD_CUDA_MAX_COLUMNS) {
            return BD_ERR_ARGUMENT;
        }
        job.parts[part] = args->parts[part];
        quantize.deltas[part] = args->parts[part].deltas;
    }
    if (M == 0) {
        return BD_OK;
    }
    job.n_parts = args->n_parts;
    job.max_planes = args->max_planes;
    job.has_columns = args->has_columns;
    job.K = K;
    job.plan = bd_plan_parts(const_cast<void *>(args->plan), M, T, &n_bytes);
    job.quantized =
        bd_quantized_parts(args->workspace, bd_plan_places(M, T), K,
                           args->has_columns ? args->n_parts * args->max_planes : 1, &n_bytes);
    quantize.x = *args->x;
    quantize.plan = job.plan;
    quantize.max_planes = args->max_planes;
    quantize.has_columns = args->has_columns;
    quantize.out = job.quantized;
    const bool has_many = args->max_rows > BD_FEW_ROWS || !bd_gpu_has_b1(ctx->capability);
    bd_status status = bd_launch_quantize(ctx, &quantize, M);
    if (status == BD_OK) {
        status = bd_launch_decode(ctx, &job);
    }
    if (status == BD_OK && has_many) {
        status = bd_launch_medium(ctx, &job);
    }
    return status;
}
