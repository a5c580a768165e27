/* py_cuda_blas.c - the base product on a GPU. */
#include "module.h"

#if BITDELTA_CUDA_KIND

#include <stdio.h>

#include "cuda_blas.h"
#include "cuda_call.h"

/* ---- opening ---- */

PyDoc_STRVAR(open_doc,
             "cuda_open_blas($module, name, is_loaded, /)\n--\n\n"
             "None once a cuBLAS is open, by this name or before; else why it cannot be opened.");

static PyObject *
py_cuda_open_blas(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    char message[BD_BLAS_MESSAGE_BYTES] = "";
    int is_loaded = 0;
    if (check_n_arguments("cuda_open_blas", nargs, 2, 2) < 0 ||
        parse_bool(args[1], "is_loaded", &is_loaded) < 0) {
        return NULL;
    }
    if (!PyUnicode_Check(args[0])) {
        PyErr_Format(PyExc_TypeError, "name: expected str, got %.80s", Py_TYPE(args[0])->tp_name);
        return NULL;
    }
    PyObject *name = NULL; /* as bytes of the file system */
    if (!PyUnicode_FSConverter(args[0], &name)) {
        return NULL;
    }
    STATE_LOCK(state);
    const int is_open = state->blas != NULL;
    STATE_UNLOCK(state);
    bd_blas *opened = NULL, *other = NULL;
    bd_status status = BD_OK;
    if (!is_open) {
        const char *text = PyBytes_AS_STRING(name);
        Py_BEGIN_ALLOW_THREADS /* cuBLAS has hundreds of megabytes */
            status = bd_blas_open(text, is_loaded, &opened, message);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(name);
    if (status == BD_ERR_MEMORY) {
        return PyErr_NoMemory();
    }
    if (status != BD_OK) {
        return PyUnicode_DecodeFSDefault(message);
    }
    STATE_LOCK(state);
    if (state->blas == NULL) {
        state->blas = opened;
    } else {
        other = opened; /* another thread was first */
    }
    STATE_UNLOCK(state);
    bd_blas_close(other);
    Py_RETURN_NONE;
}

/* ---- the product ---- */

typedef struct {
    bd_blas *blas;
    bd_blas_args args;
} multiplication;

/* 0, or -1 with ValueError: cuBLAS counts in int. */
static int
check_counts(const bd_matrix *matrix, const char *name)
{
    if (matrix->n_rows <= INT32_MAX && matrix->row_stride <= INT32_MAX) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError,
                 "%s: expected fewer than 2^31 rows and row strides below it, got %lld and %lld",
                 name, (long long)matrix->n_rows, (long long)matrix->row_stride);
    return -1;
}

/* (out, a, b, is_transposed, workspace) */
static int
acquire_multiplication(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    multiplication *job = given;
    int is_transposed = 0;
    if (parse_bool(args[3], "is_transposed", &is_transposed) < 0) {
        return -1;
    }
    STATE_LOCK(state);
    job->blas = state->blas; /* stays until the module goes */
    STATE_UNLOCK(state);
    if (job->blas == NULL) {
        raise_device_error("no cuBLAS is open: cuda_open_blas");
        return -1;
    }
    const bd_matrix *a =
        cuda_matrix(state, call, args[1], "a", TENSOR_INPUT, "[M, K]", ANY_SIZE, ANY_SIZE);
    if (a == NULL) {
        return -1;
    }
    const bd_matrix *b = cuda_matrix(
        state, call, args[2], "b", TENSOR_INPUT, is_transposed ? "[N, K]" : "[K, N]",
        is_transposed ? ANY_SIZE : a->n_columns, is_transposed ? a->n_columns : ANY_SIZE);
    if (b == NULL) {
        return -1;
    }
    if (a->dtype != b->dtype) {
        PyErr_SetString(PyExc_TypeError, "b: expected the dtype of a");
        return -1;
    }
    const bd_matrix *out = cuda_matrix(state, call, args[0], "out", TENSOR_OUTPUT, "[M, N]",
                                       a->n_rows, is_transposed ? b->n_rows : b->n_columns);
    if (out == NULL || check_dtype(&call->tensors[2], "out", kDLFloat, 32) < 0 ||
        check_counts(a, "a") < 0 || check_counts(b, "b") < 0 || check_counts(out, "out") < 0) {
        return -1;
    }
    void *workspace = cuda_scratch(state, call, args[4], "workspace", TENSOR_OUTPUT, 0);
    if (workspace == NULL) {
        return -1;
    }
    job->args = (bd_blas_args){
        a, b, out, is_transposed, workspace, (size_t)tensor_n_bytes(&call->tensors[3])};
    return 0;
}

_Static_assert(sizeof((cuda_call *)0)->message >= BD_BLAS_MESSAGE_BYTES, "cuBLAS writes to it");

static bd_status
launch_multiplication(cuda_call *call, void *given)
{
    const multiplication *job = given;
    const int device = call->tensors[0].device;
    if (!bd_blas_is_ready(job->blas, device) && bd_gpu_is_captured(call->ctx.stream)) {
        (void)snprintf(call->message, sizeof call->message,
                       "the first base product on GPU %d creates a handle of cuBLAS, which cannot "
                       "happen while its stream is captured: run one before",
                       device);
        return BD_ERR_CUDA;
    }
    return bd_blas_multiply(job->blas, device, call->ctx.stream, &job->args, call->message);
}

PyDoc_STRVAR(multiply_doc,
             "cuda_multiply($module, out, a, b, is_transposed, workspace, /)\n--\n\n"
             "out = a b or a b^T by the cuBLAS that cuda_open_blas opened.");

static PyObject *
py_cuda_multiply(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function multiply = {"cuda_multiply", 5, acquire_multiplication,
                                           launch_multiplication};
    multiplication job = {0};
    return cuda_run(module, &multiply, args, nargs, &job);
}

PyMethodDef cuda_blas_functions[] = {
    {"cuda_open_blas", (PyCFunction)(void (*)(void))py_cuda_open_blas, METH_FASTCALL, open_doc},
    {"cuda_multiply", (PyCFunction)(void (*)(void))py_cuda_multiply, METH_FASTCALL, multiply_doc},
    {NULL, NULL, 0, NULL},
};

#endif
