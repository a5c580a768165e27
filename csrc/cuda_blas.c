/* cuda_blas.c - see cuda_blas.h. Names and numbers are those of cublas_api.h and library_types.h
 * (https://docs.nvidia.com/cuda/cublas/), the same from CUDA 11 to 13. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* RTLD_NOLOAD */
#endif
#include "cuda_blas.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_DEVICES = 64,
    MAX_PATH = 4096,
    STATUS_OK = 0,     /* CUBLAS_STATUS_SUCCESS */
    OP_N = 0,          /* CUBLAS_OP_N */
    OP_T = 1,          /* CUBLAS_OP_T */
    R_32F = 0,         /* CUDA_R_32F */
    R_16F = 2,         /* CUDA_R_16F */
    R_16BF = 14,       /* CUDA_R_16BF */
    COMPUTE_32F = 68,  /* CUBLAS_COMPUTE_32F */
    GEMM_DEFAULT = -1, /* CUBLAS_GEMM_DEFAULT */
};

struct bd_blas {
    int (*create)(void **handle);
    int (*destroy)(void *handle);
    int (*set_stream)(void *handle, void *stream);
    int (*set_workspace)(void *handle, void *workspace, size_t n_bytes);
    int (*gemm)(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha,
                const void *a, int a_type, int lda, const void *b, int b_type, int ldb,
                const void *beta, void *c, int c_type, int ldc, int compute, int algorithm);
    const char *(*status_text)(int status);
    pthread_mutex_t lock; /* of the handles, each from its stream to its product */
    void *handles[MAX_DEVICES];
};

/* ---- opening ---- */

/* libcublasLt beside a library given by its path: cuBLAS needs it, and has no path to its own folder. */
static void
open_neighbour(const char *name)
{
    static const char own[] = "libcublas.so", neighbour[] = "libcublasLt.so";
    const char *slash = strrchr(name, '/');
    char path[MAX_PATH];
    if (slash == NULL || strncmp(slash + 1, own, strlen(own)) != 0) {
        return;
    }
    const int n = snprintf(path, sizeof path, "%.*s/%s%s", (int)(slash - name), name, neighbour,
                           slash + 1 + strlen(own));
    if (n > 0 && (size_t)n < sizeof path) {
        (void)dlopen(path,
                     RTLD_NOW | RTLD_LOCAL); /* what is wrong is said when cuBLAS asks for it */
    }
}

/* 0, or -1 and the name of the function that the library does not have. */
static int
find_functions(void *library, bd_blas *blas, const char **missing)
{
    const struct {
        const char *name;
        void *place; /* of a function pointer */
    } functions[] = {
        {"cublasCreate_v2", &blas->create},
        {"cublasDestroy_v2", &blas->destroy},
        {"cublasSetStream_v2", &blas->set_stream},
        {"cublasSetWorkspace_v2", &blas->set_workspace},
        {"cublasGemmEx", &blas->gemm},
        {"cublasGetStatusString", &blas->status_text},
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *found = dlsym(library, functions[i].name);
        if (found == NULL) {
            *missing = functions[i].name;
            return -1;
        }
        memcpy(functions[i].place, &found, sizeof found); /* as dlsym's manual does */
    }
    return 0;
}

bd_status
bd_blas_open(const char *name, int is_loaded, bd_blas **out, char message[BD_BLAS_MESSAGE_BYTES])
{
    const char *missing = NULL;
    *out = NULL;
    if (!is_loaded) {
        open_neighbour(name);
    }
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL | (is_loaded ? RTLD_NOLOAD : 0));
    if (library == NULL) {
        const char *said =
            is_loaded ? NULL : dlerror(); /* a library that is not loaded is no error */
        (void)snprintf(message, BD_BLAS_MESSAGE_BYTES, "%s", said == NULL ? "not loaded" : said);
        return BD_ERR_CUDA;
    }
    bd_blas *blas = calloc(1, sizeof *blas);
    if (blas == NULL) {
        (void)dlclose(library);
        return BD_ERR_MEMORY;
    }
    if (find_functions(library, blas, &missing) < 0) {
        (void)snprintf(message, BD_BLAS_MESSAGE_BYTES, "it has no %s", missing);
        (void)dlclose(library);
        free(blas);
        return BD_ERR_CUDA;
    }
    if (pthread_mutex_init(&blas->lock, NULL) != 0) {
        (void)dlclose(library);
        free(blas);
        return BD_ERR_MEMORY;
    }
    *out = blas;
    return BD_OK;
}

void
bd_blas_close(bd_blas *blas)
{
    if (blas == NULL) {
        return;
    }
    for (int i = 0; i < MAX_DEVICES; i++) {
        if (blas->handles[i] != NULL) {
            (void)blas->destroy(blas->handles[i]);
        }
    }
    (void)pthread_mutex_destroy(&blas->lock);
    free(blas);
}

/* ---- products ---- */

int
bd_blas_is_ready(bd_blas *blas, int device)
{
    (void)pthread_mutex_lock(&blas->lock);
    const int is_ready = device >= 0 && device < MAX_DEVICES && blas->handles[device] != NULL;
    (void)pthread_mutex_unlock(&blas->lock);
    return is_ready;
}

static int
data_type(bd_dtype dtype)
{
    return dtype == BD_F32 ? R_32F : dtype == BD_F16 ? R_16F : R_16BF;
}

/* cuBLAS is column-major, so it sees our rows as columns: out^T = op(b)^T a^T. */
static int
run(const bd_blas *blas, void *handle, const bd_blas_args *args)
{
    const float one = 1, zero = 0;
    const bd_matrix *a = args->a, *b = args->b, *out = args->out;
    return blas->gemm(handle, args->is_transposed ? OP_T : OP_N, OP_N, (int)out->n_columns,
                      (int)out->n_rows, (int)a->n_columns, &one, b->data, data_type(b->dtype),
                      (int)b->row_stride, a->data, data_type(a->dtype), (int)a->row_stride, &zero,
                      out->data, R_32F, (int)out->row_stride, COMPUTE_32F, GEMM_DEFAULT);
}

bd_status
bd_blas_multiply(bd_blas *blas, int device, void *stream, const bd_blas_args *args,
                 char message[BD_BLAS_MESSAGE_BYTES])
{
    const char *at = "cublasCreate";
    int status = STATUS_OK;
    if (device < 0 || device >= MAX_DEVICES) {
        return BD_ERR_ARGUMENT;
    }
    (void)pthread_mutex_lock(&blas->lock);
    if (blas->handles[device] == NULL) {
        status = blas->create(&blas->handles[device]);
    }
    void *handle = blas->handles[device];
    if (status == STATUS_OK) {
        at = "cublasSetStream";
        status = blas->set_stream(handle, stream); /* and takes the workspace away */
    }
    if (status == STATUS_OK) {
        at = "cublasSetWorkspace";
        status = blas->set_workspace(handle, args->workspace, args->workspace_bytes);
    }
    if (status == STATUS_OK) {
        at = "cublasGemmEx";
        status = run(blas, handle, args);
    }
    (void)pthread_mutex_unlock(&blas->lock);
    if (status != STATUS_OK) {
        (void)snprintf(message, BD_BLAS_MESSAGE_BYTES, "%s: %s", at, blas->status_text(status));
        return BD_ERR_CUDA;
    }
    return BD_OK;
}
