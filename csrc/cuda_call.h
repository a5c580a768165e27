/* cuda_call.h - one call on a GPU: its tensors, its device, its stream. C only.
 *
 * cuda_run does what all functions share: arguments are acquired, outputs checked to lie apart, the GPU
 * made current, the kernels launched without the GIL, and everything given back. All tensors of a call are
 * on one GPU; it runs on the current stream of whoever made the first one. */
#ifndef BITDELTA_CUDA_CALL_H_
#define BITDELTA_CUDA_CALL_H_

#include "cuda.h"
#include "cuda_device.h"
#include "tensor.h"

#define CUDA_MAX_TENSORS 16

typedef struct {
    bd_cuda_context ctx;
    int is_in_place;   /* the first two tensors may be the same */
    char message[512]; /* of a launch that returned BD_ERR_CUDA; empty: bd_gpu_message() has it */
    int n_tensors, n_lent;
    tensor tensors[CUDA_MAX_TENSORS];
    bd_matrix memory[CUDA_MAX_TENSORS]; /* what they cover */
    const char *names[CUDA_MAX_TENSORS];
} cuda_call;

/* A function of the module: what it takes and what it does. */
typedef struct {
    const char *name;
    int n_arguments;
    /* Fills a job from the arguments; 0, or -1 with an exception. */
    int (*acquire)(module_state *state, cuda_call *call, PyObject *const *args, void *job);
    /* Without the GIL, the GPU being the thread's. */
    bd_status (*launch)(cuda_call *call, void *job);
} cuda_function;

/* None, or NULL with an exception. */
PyObject *cuda_run(PyObject *module, const cuda_function *function, PyObject *const *args,
                   Py_ssize_t nargs, void *job);

/* 0, or -1 with DeviceError that says what is missing. */
int cuda_require(void);

/* The next argument, which the call holds to its end; NULL with an exception. A matrix has rows of
 * contiguous columns; a block is compact, of one dtype and aligned to `alignment` bytes; who asks for the
 * bare tensor checks it and sets call->memory. */
const tensor *cuda_tensor(module_state *state, cuda_call *call, PyObject *object, const char *name,
                          int mode);
const bd_matrix *cuda_matrix(module_state *state, cuda_call *call, PyObject *object,
                             const char *name, int mode, const char *letters, int64_t n_rows,
                             int64_t n_columns);
void *cuda_block(module_state *state, cuda_call *call, PyObject *object, const char *name, int mode,
                 DLDataTypeCode code, int bits, int64_t alignment, const char *letters, int ndim,
                 const int64_t *shape);

/* 0, or -1 with ValueError: more rows or columns than kernels of products take. */
int cuda_check_size(const bd_matrix *matrix, const char *name);

/* A plan or a workspace: uint8 [n], aligned to 256 bytes, of at least n_bytes. */
void *cuda_scratch(module_state *state, cuda_call *call, PyObject *object, const char *name,
                   int mode, size_t n_bytes);

/* [n] of fp32, fp16 or bf16, compact. 0, or -1 with an exception. */
int cuda_vector(module_state *state, cuda_call *call, PyObject *object, const char *name, int64_t n,
                const void **data, bd_dtype *dtype);

/* A Python object: deltas [T] of one weight, their table, and the memory of both. Kernels of the emulation
 * may read it for as long as it lives. */
typedef struct {
    PyObject_HEAD int64_t N, K, T;
    int max_planes, has_columns;
    int64_t n_tensors, n_lent;
    tensor *tensors;      /* the table first */
    bd_cuda_delta *slots; /* what the table is copied from, without waiting for it */
} cuda_deltas;

/* NULL with an exception when object is something else, or on another GPU than the call's tensors. */
const cuda_deltas *cuda_deltas_view(module_state *state, const cuda_call *call, PyObject *object,
                                    const char *name);

/* As return_status; BD_ERR_CUDA is a DeviceError with CUDA's own words. */
PyObject *cuda_return_status(bd_status status);

#endif /* BITDELTA_CUDA_CALL_H_ */
