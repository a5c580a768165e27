/* cublas_double.c - the functions of cuBLAS that csrc/cuda_blas.c calls, on the CPU, for tests.
 *
 * Arguments are checked as cuBLAS's manual says, and beyond: a product needs a stream, and after it a
 * workspace. Sums are fp64, k ascending, rounded to fp32 once. Built as a library with a soname. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68, DEFAULT = -1 };

static const uint64_t MAGIC = 0x5AFEC0DE5AFEC0DEu;

typedef struct {
    uint64_t magic;
    int has_stream;
    void *stream, *workspace;
    size_t workspace_bytes;
} double_handle;

/* What tests look at and set. */
struct {
    int64_t n_handles, n_products; /* alive; made */
    void *stream, *workspace;      /* of the latest product */
    int64_t workspace_bytes;
    int32_t m, n, k, lda, ldb, ldc, op_a, op_b, type;
    int32_t refuses; /* the status of every product from here on */
} cublas_double;

const char *
cublasGetStatusString(int status)
{
    return status == OK                 ? "success"
           : status == NOT_INITIALIZED  ? "not initialized"
           : status == INVALID_VALUE    ? "an unsupported value or parameter was passed"
           : status == EXECUTION_FAILED ? "the GPU program failed to execute"
           : status == NOT_SUPPORTED    ? "the functionality requested is not supported"
                                        : "unknown";
}

int
cublasCreate_v2(double_handle **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return NOT_INITIALIZED;
    }
    (*out)->magic = MAGIC;
    cublas_double.n_handles++;
    return OK;
}

static int
is_handle(const double_handle *handle)
{
    return handle != NULL && handle->magic == MAGIC;
}

int
cublasDestroy_v2(double_handle *handle)
{
    if (!is_handle(handle)) {
        return NOT_INITIALIZED;
    }
    handle->magic = 0;
    free(handle);
    cublas_double.n_handles--;
    return OK;
}

int
cublasSetStream_v2(double_handle *handle, void *stream)
{
    if (!is_handle(handle)) {
        return NOT_INITIALIZED;
    }
    handle->has_stream = 1;
    handle->stream = stream;
    handle->workspace = NULL; /* "unconditionally resets the workspace" */
    handle->workspace_bytes = 0;
    return OK;
}

int
cublasSetWorkspace_v2(double_handle *handle, void *workspace, size_t n_bytes)
{
    if (!is_handle(handle)) {
        return NOT_INITIALIZED;
    }
    if (workspace == NULL || (uintptr_t)workspace % 256 != 0) {
        return INVALID_VALUE;
    }
    handle->workspace = workspace;
    handle->workspace_bytes = n_bytes;
    return OK;
}

static float
from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double
half(uint16_t bits)
{
    const uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u,
                   mantissa = bits & 1023u;
    if (exponent == 31) {
        return from_bits(sign | 0x7F800000u | mantissa << 13);
    }
    if (exponent == 0) {
        const double value = mantissa / 16777216.0;
        return sign ? -value : value;
    }
    return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static double
element(const void *data, int type, int64_t at)
{
    return type == R_32F    ? (double)((const float *)data)[at]
           : type == R_16BF ? (double)from_bits((uint32_t)((const uint16_t *)data)[at] << 16)
                            : half(((const uint16_t *)data)[at]);
}

int
cublasGemmEx(double_handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha,
             const void *a, int a_type, int lda, const void *b, int b_type, int ldb,
             const void *beta, void *c, int c_type, int ldc, int compute, int algorithm)
{
    if (!is_handle(handle) || !handle->has_stream || handle->workspace == NULL) {
        return NOT_INITIALIZED;
    }
    if (op_a < 0 || op_a > 1 || op_b != 0 || m < 0 || n < 0 || k < 0 || lda < (op_a ? k : m) ||
        ldb < k || ldc < m || a == NULL || b == NULL || c == NULL) {
        return INVALID_VALUE;
    }
    if (a_type != b_type || (a_type != R_32F && a_type != R_16F && a_type != R_16BF) ||
        c_type != R_32F || compute != COMPUTE_32F || algorithm != DEFAULT ||
        *(const float *)alpha != 1 || *(const float *)beta != 0) {
        return NOT_SUPPORTED;
    }
    if (cublas_double.refuses) {
        return cublas_double.refuses;
    }
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < m; i++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++) {
                sum += element(a, a_type, op_a ? i * lda + l : l * lda + i) *
                       element(b, b_type, j * ldb + l);
            }
            ((float *)c)[j * ldc + i] = (float)sum;
        }
    }
    cublas_double.n_products++;
    cublas_double.stream = handle->stream;
    cublas_double.workspace = handle->workspace;
    cublas_double.workspace_bytes = (int64_t)handle->workspace_bytes;
    cublas_double.m = m;
    cublas_double.n = n;
    cublas_double.k = k;
    cublas_double.lda = lda;
    cublas_double.ldb = ldb;
    cublas_double.ldc = ldc;
    cublas_double.op_a = op_a;
    cublas_double.op_b = op_b;
    cublas_double.type = a_type;
    return OK;
}
