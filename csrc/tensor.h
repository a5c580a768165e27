/* tensor.h - a Python object as a view of memory, and the checks that arguments share.
 *
 * Understood: NumPy arrays (with ml_dtypes.bfloat16, and uint16 whose class says
 * __bitdelta_dtype__ = "bfloat16"), the DLPack C exchange API, __dlpack__ with versioned and legacy
 * capsules, the buffer protocol. CPU and pinned memory; a GPU's by the exchange API alone, which tells
 * the producer's stream. Nothing is ever copied. */
#ifndef BITDELTA_TENSOR_H_
#define BITDELTA_TENSOR_H_

#include "module.h"
#include "third_party/dlpack.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TENSOR_MAX_NDIM 8

#define TENSOR_INPUT 0
#define TENSOR_OUTPUT 1 /* must be writable */
#define TENSOR_KEEP 2   /* outlives the call: an owning export, not only a view */
#define TENSOR_GPU 4    /* a GPU's memory, not the CPU's; with emulated kernels still the CPU's */

/* Owned by whoever acquired it; {0} is a valid empty tensor. */
typedef struct {
    void *data;
    DLDataType dtype;
    int ndim;
    int64_t shape[TENSOR_MAX_NDIM];
    int64_t strides[TENSOR_MAX_NDIM]; /* elements */
    int is_readonly;
    int mode;                /* as it was acquired */
    int device;              /* of TENSOR_GPU: its number */
    void *stream;            /* of TENSOR_GPU: the one its producer works on */
    PyObject *owner;         /* strong */
    DLManagedTensor *legacy; /* at most one of these three */
    DLManagedTensorVersioned *versioned;
    Py_buffer buffer; /* held when buffer.obj is set */
} tensor;

/* Both return 0, or -1 with an exception that names the argument; the tensor is then empty. */
int tensor_acquire(module_state *state, PyObject *object, const char *name, int mode, tensor *out);
int tensor_acquire_dlpack(module_state *state, PyObject *object, const char *name, int mode,
                          tensor *out); /* tensor_dlpack.c; 1: the object does not speak DLPack */
void tensor_release(tensor *view);

/* Loads NumPy's C API; once, at import. */
int tensor_import(void);

/* Fills dtype, shape and strides (NULL: compact) from a DLTensor; -1 with an exception. */
int tensor_from_dltensor(const DLTensor *source, const char *name, tensor *out);

/* Checks (tensor_check.c): 0, or -1 with an exception. In a shape, ANY_SIZE accepts any. */

#define ANY_SIZE INT64_MIN /* no size and no stride */

/* dtype and shape; letters is how messages call the shape: "[M, K]". */
int check_shape(const tensor *view, const char *name, const char *letters, int ndim,
                const int64_t *shape);
int check_contiguous(const tensor *view, const char *name, int64_t alignment);
int check_dtype(const tensor *view, const char *name, DLDataTypeCode code, int bits);

/* As a matrix of rows; the size of its bytes is sure not to overflow. */
int tensor_to_matrix(const tensor *view, const char *name, const char *letters, int64_t n_rows,
                     int64_t n_columns, bd_matrix *out);
int check_nonempty(const bd_matrix *matrix, const char *name, const char *letters);

/* BufferError when the output shares memory with the input. */
int check_overlap(const bd_matrix *output, const char *output_name, const bd_matrix *input,
                  const char *input_name);

size_t dtype_size(bd_dtype dtype);
int64_t tensor_n_bytes(const tensor *view); /* of a compact tensor */

/* A view as bytes, for overlaps of what is no matrix: one row of n_bytes / 2 "elements". */
bd_matrix tensor_extent(const tensor *view);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_TENSOR_H_ */
