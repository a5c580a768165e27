/* cuda_call.c - see cuda_call.h; nothing in a build without kernels. */
#include "module.h"

#if BITDELTA_CUDA_KIND

#include <stdio.h>

#include "cuda_call.h"

#define LEAST_CAPABILITY 80 /* the oldest of kernels/toolchain.py's targets */

int
cuda_require(void)
{
    const char *missing = NULL;
    Py_BEGIN_ALLOW_THREADS /* the first call loads the driver */
        missing = bd_gpu_missing();
    Py_END_ALLOW_THREADS
    if (missing != NULL) {
        raise_device_error("%s", missing);
        return -1;
    }
    return 0;
}

const tensor *
cuda_tensor(module_state *state, cuda_call *call, PyObject *object, const char *name, int mode)
{
    tensor *view = &call->tensors[call->n_tensors];
    const tensor *first = &call->tensors[0];
    if (tensor_acquire(state, object, name, mode | TENSOR_GPU, view) < 0) {
        return NULL;
    }
    call->names[call->n_tensors++] = name;
    if (view->device != first->device) {
        raise_device_error("%s: expected memory of GPU %d, as the tensors before it, got GPU %d",
                           name, first->device, view->device);
        return NULL;
    }
    call->ctx.stream = first->stream;
    return view;
}

const bd_matrix *
cuda_matrix(module_state *state, cuda_call *call, PyObject *object, const char *name, int mode,
            const char *letters, int64_t n_rows, int64_t n_columns)
{
    bd_matrix *matrix = &call->memory[call->n_tensors];
    const tensor *view = cuda_tensor(state, call, object, name, mode);
    if (view == NULL || tensor_to_matrix(view, name, letters, n_rows, n_columns, matrix) < 0 ||
        check_nonempty(matrix, name, letters) < 0) {
        return NULL;
    }
    return matrix;
}

int
cuda_check_size(const bd_matrix *matrix, const char *name)
{
    if (matrix->n_rows <= BD_CUDA_MAX_ROWS && matrix->n_columns <= BD_CUDA_MAX_COLUMNS) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected at most [%d, %d], got [%lld, %lld]", name,
                 BD_CUDA_MAX_ROWS, BD_CUDA_MAX_COLUMNS, (long long)matrix->n_rows,
                 (long long)matrix->n_columns);
    return -1;
}

void *
cuda_block(module_state *state, cuda_call *call, PyObject *object, const char *name, int mode,
           DLDataTypeCode code, int bits, int64_t alignment, const char *letters, int ndim,
           const int64_t *shape)
{
    bd_matrix *memory = &call->memory[call->n_tensors];
    const tensor *view = cuda_tensor(state, call, object, name, mode);
    if (view == NULL || check_dtype(view, name, code, bits) < 0 ||
        check_shape(view, name, letters, ndim, shape) < 0 ||
        check_contiguous(view, name, alignment) < 0) {
        return NULL;
    }
    *memory = tensor_extent(view);
    return view->data;
}

void *
cuda_scratch(module_state *state, cuda_call *call, PyObject *object, const char *name, int mode,
             size_t n_bytes)
{
    static const int64_t any[] = {ANY_SIZE};
    void *data = cuda_block(state, call, object, name, mode, kDLUInt, 8, 256, "[n]", 1, any);
    const int64_t got = data == NULL ? 0 : call->tensors[call->n_tensors - 1].shape[0];
    if (data != NULL && (uint64_t)got < n_bytes) {
        PyErr_Format(PyExc_ValueError, "%s: expected at least %zu bytes, got %lld", name, n_bytes,
                     (long long)got);
        return NULL;
    }
    return data;
}

int
cuda_vector(module_state *state, cuda_call *call, PyObject *object, const char *name, int64_t n,
            const void **data, bd_dtype *dtype)
{
    bd_matrix *memory = &call->memory[call->n_tensors];
    const tensor *view = cuda_tensor(state, call, object, name, TENSOR_INPUT);
    if (view == NULL || check_shape(view, name, "[N]", 1, &n) < 0) {
        return -1;
    }
    tensor row = *view; /* borrowed: [1, N] */
    row.ndim = 2;
    row.shape[0] = 1;
    row.shape[1] = n;
    row.strides[0] = n;
    row.strides[1] = view->strides[0];
    if (tensor_to_matrix(&row, name, "[1, N]", 1, n, memory) < 0) {
        return -1;
    }
    *data = memory->data;
    *dtype = memory->dtype;
    return 0;
}

static int
are_same(const bd_matrix *a, const bd_matrix *b)
{
    return a->data == b->data && a->dtype == b->dtype && a->n_rows == b->n_rows &&
           a->n_columns == b->n_columns && (a->row_stride == b->row_stride || a->n_rows == 1);
}

/* BufferError when an output shares memory with another tensor. */
static int
check_apart(const cuda_call *call)
{
    for (int i = 0; i < call->n_tensors; i++) {
        if ((call->tensors[i].mode & TENSOR_OUTPUT) == 0) {
            continue;
        }
        for (int j = 0; j < call->n_tensors; j++) {
            const int may_be_same = call->is_in_place && i + j == 1;
            if (i == j || (may_be_same && are_same(&call->memory[i], &call->memory[j]))) {
                continue;
            }
            if (check_overlap(&call->memory[i], call->names[i], &call->memory[j], call->names[j]) <
                0) {
                return -1;
            }
        }
    }
    return 0;
}

/* From the first byte of a view to behind its last. */
static size_t
extent_bytes(const tensor *view)
{
    int64_t last = 0;
    for (int i = 0; i < view->ndim; i++) {
        if (view->shape[i] == 0) {
            return 0;
        }
        last += (view->shape[i] - 1) * view->strides[i];
    }
    return (size_t)(last + 1) * view->dtype.bits / 8;
}

static void
take_back(cuda_call *call)
{
    while (call->n_lent > 0) {
        const tensor *view = &call->tensors[--call->n_lent];
        bd_gpu_take_back(view->data, extent_bytes(view), (view->mode & TENSOR_OUTPUT) != 0);
    }
}

/* Launches with the GPU as the thread's, and with the tensors lent to emulated kernels. */
static bd_status
launch(cuda_call *call, const cuda_function *function, void *job)
{
    int before = 0;
    bd_status status = bd_gpu_enter(call->tensors[0].device, &before, &call->ctx.capability,
                                    &call->ctx.n_processors);
    if (status != BD_OK) {
        return status;
    }
    if (call->ctx.capability < LEAST_CAPABILITY) {
        (void)snprintf(call->message, sizeof call->message,
                       "GPU %d has compute capability %d.%d, the kernels need %d.%d or newer",
                       call->tensors[0].device, call->ctx.capability / 10,
                       call->ctx.capability % 10, LEAST_CAPABILITY / 10, LEAST_CAPABILITY % 10);
        status = BD_ERR_CUDA;
    }
    while (status == BD_OK && call->n_lent < call->n_tensors) {
        const tensor *view = &call->tensors[call->n_lent];
        status = bd_gpu_lend(view->data, extent_bytes(view), (view->mode & TENSOR_OUTPUT) != 0);
        call->n_lent += status == BD_OK;
    }
    if (status == BD_OK) {
        status = function->launch(call, job);
    }
    take_back(call);
    bd_gpu_leave(before);
    return status;
}

static void
release(cuda_call *call)
{
    PyObject *pending = save_exception(); /* a deleter may run anything */
    while (call->n_tensors > 0) {
        tensor_release(&call->tensors[--call->n_tensors]);
    }
    restore_exception(pending);
}

PyObject *
cuda_run(PyObject *module, const cuda_function *function, PyObject *const *args, Py_ssize_t nargs,
         void *job)
{
    cuda_call call = {0};
    PyObject *result = NULL;
    if (check_n_arguments(function->name, nargs, function->n_arguments, function->n_arguments) <
            0 ||
        cuda_require() < 0) {
        return NULL;
    }
    if (function->acquire(get_state(module), &call, args, job) == 0 && check_apart(&call) == 0) {
        bd_status status = BD_OK;
        Py_BEGIN_ALLOW_THREADS
            status = launch(&call, function, job);
        Py_END_ALLOW_THREADS
        if (status == BD_ERR_CUDA && call.message[0] != '\0') {
            raise_device_error("%s", call.message);
        } else {
            result = cuda_return_status(status);
        }
    }
    release(&call);
    return result;
}

PyObject *
cuda_return_status(bd_status status)
{
    if (status == BD_ERR_CUDA) {
        raise_device_error("%s", bd_gpu_message());
        return NULL;
    }
    return return_status(status);
}

#endif
