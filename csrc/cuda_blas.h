/* cuda_blas.h - the base product by cuBLAS, which is opened where it is found and never linked.
 *
 * out = a b, or a b^T, in fp32 sums of fp32, fp16 or bf16 inputs: CUBLAS_COMPUTE_32F in cuBLAS's default
 * mode, which rounds no input (no TF32). The kernels' epilogue adds it before its one rounding. No Python,
 * no CUDA headers. */
#ifndef BITDELTA_CUDA_BLAS_H_
#define BITDELTA_CUDA_BLAS_H_

#include <stddef.h>

#include "bitdelta.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a product may use, 256-byte aligned: what cuBLAS's manual recommends for Hopper, the hungriest. */
#define BD_BLAS_WORKSPACE_BYTES ((size_t)32 << 20)
#define BD_BLAS_MESSAGE_BYTES 512 /* a path of a library, and what is wrong with it */

/* An opened library and its handles, one a GPU. May be used by several threads at once. */
typedef struct bd_blas bd_blas;

/* A dlopen-ed library with cuBLAS's functions: `name` among those that this process has loaded, else
 * (is_loaded 0) as dlopen finds it, libcublasLt of the same folder before it. BD_ERR_CUDA: message says
 * why not. */
bd_status bd_blas_open(const char *name, int is_loaded, bd_blas **out,
                       char message[BD_BLAS_MESSAGE_BYTES]);

/* NULL does nothing. The library stays loaded: its runtime may have more to do when the process ends. */
void bd_blas_close(bd_blas *blas);

/* Whether a product on this GPU creates nothing: the first one makes the GPU's handle, which must not
 * happen while a stream is captured. */
int bd_blas_is_ready(bd_blas *blas, int device);

typedef struct {
    const bd_matrix *a;   /* [M, K] */
    const bd_matrix *b;   /* [K, N], or [N, K] where is_transposed; of a's dtype */
    const bd_matrix *out; /* fp32 [M, N]; overlaps nothing */
    int is_transposed;
    void *workspace;
    size_t workspace_bytes;
} bd_blas_args;

/* On the stream, of the GPU `device`, which is the thread's. Sizes and row strides below 2^31. Allocates
 * nothing but the handle, and waits for nothing. BD_ERR_CUDA: message has cuBLAS's words. */
bd_status bd_blas_multiply(bd_blas *blas, int device, void *stream, const bd_blas_args *args,
                           char message[BD_BLAS_MESSAGE_BYTES]);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_CUDA_BLAS_H_ */
