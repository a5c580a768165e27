/* module.h - the Python side of csrc/: everything that includes it may touch Python.h, nothing else.
 *
 * All state is in the module object. */
#ifndef BITDELTA_MODULE_H_
#define BITDELTA_MODULE_H_

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "bitdelta.h"
#include "cuda_blas.h"
#include "kernels.h"
#include "pool.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifndef BITDELTA_CUDA_KIND
#define BITDELTA_CUDA_KIND 0 /* 0: no kernels, 1: a GPU's, 2: emulated on the CPU */
#endif

#define N_CACHED_TYPES 8 /* tensor types whose exchange table is remembered; others are looked up */

typedef struct {
    PyTypeObject *type; /* strong */
    const void *api;    /* DLPackExchangeAPI, alive as long as the process; NULL: it has none */
} exchange_entry;

typedef struct {
    PyTypeObject *delta_type;
    PyTypeObject *cuda_deltas_type; /* NULL in a build without kernels */
    bd_blas *blas;                  /* NULL until one is opened; then stays */
    PyObject *str_exchange_api, *str_dlpack, *str_dlpack_device, *str_requires_grad, *str_is_neg,
        *str_is_conj, *str_bitdelta_dtype;
    PyObject *max_version_kwnames; /* ("max_version",) */
    PyObject *max_version;         /* (1, 3) */
    exchange_entry exchange[N_CACHED_TYPES];
    int n_exchange;
    bd_pool *pool; /* one reference; NULL: one thread */
    const bd_kernels *kernels;
#if PY_VERSION_HEX >= 0x030D0000
    PyMutex lock; /* guards exchange, pool and kernels; before 3.13 the GIL does */
#endif
} module_state;

#if PY_VERSION_HEX >= 0x030D0000
#define STATE_LOCK(state) PyMutex_Lock(&(state)->lock)
#define STATE_UNLOCK(state) PyMutex_Unlock(&(state)->lock)
#else
#define STATE_LOCK(state) ((void)(state))
#define STATE_UNLOCK(state) ((void)(state))
#endif

static inline module_state *
get_state(PyObject *module)
{
    return (module_state *)PyModule_GetState(module);
}

/* The pool and kernels of one call; keeps the pool alive until it is left, which needs no GIL. */
void context_enter(module_state *state, bd_context *ctx);
void context_leave(bd_context *ctx);

/* The pending exception, taken (NULL: none), and put back (steals; NULL: nothing happens). */
PyObject *save_exception(void);
void restore_exception(PyObject *exception);

/* Raises what a status of a bd_* call means. Returns NULL, or None for BD_OK. */
PyObject *return_status(bd_status status);

/* 0, or -1 with TypeError: a function takes least .. most positional arguments. */
int check_n_arguments(const char *function, Py_ssize_t nargs, Py_ssize_t least, Py_ssize_t most);

/* Raises bitdelta.DeviceError. */
void raise_device_error(const char *format, ...);

/* An int, least .. most; 0, or -1 with TypeError or ValueError that names the argument. */
int parse_int(PyObject *object, const char *name, int64_t least, int64_t most, int64_t *out);

/* 0, or -1 with TypeError: only True and False, as the truth of other objects may raise anything. */
int parse_bool(PyObject *object, const char *name, int *out);

/* One type and the functions of the module, by file. */
extern PyType_Spec delta_spec;            /* py_delta.c */
extern PyMethodDef delta_functions[];     /* py_delta.c: extract, expand */
extern PyMethodDef calibrate_functions[]; /* py_calibrate.c: fit_signs, sweep */
extern PyMethodDef product_functions[];   /* py_linear.c: linear, linear_add, linear_transposed */
extern PyMethodDef byte_functions[];      /* py_bytes.c: to_float32, crc32c, crc32c_combine, read */
extern PyMethodDef cuda_functions[];      /* py_cuda.c: cuda_missing, cuda_is_emulated, cuda_expand,
                                           * cuda_quantize */
#if BITDELTA_CUDA_KIND
extern PyType_Spec cuda_deltas_spec;           /* cuda_deltas.c */
extern PyMethodDef cuda_product_functions[];   /* py_cuda_linear.c */
extern PyMethodDef cuda_gradient_functions[];  /* py_cuda_gradient.c */
extern PyMethodDef cuda_delta_functions[];     /* py_cuda_delta.c: cuda_extract */
extern PyMethodDef cuda_blas_functions[];      /* py_cuda_blas.c */
extern PyMethodDef cuda_calibrate_functions[]; /* py_cuda_calibrate.c */
#endif

/* A Delta object's view, or NULL with TypeError when object is not a Delta of this module. */
const bd_delta *delta_view(module_state *state, PyObject *object, const char *name);

/* BufferError when the output shares memory with the signs or scales of a delta. */
int check_delta_apart(const bd_matrix *output, const char *output_name, const bd_delta *delta,
                      const char *name);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_MODULE_H_ */
