/* py_cuda.c - the functions of the module that run on a GPU; DeviceError where none can. */
#include "module.h"

#ifndef BITDELTA_CUDA
#define BITDELTA_CUDA "not built"
#endif

PyDoc_STRVAR(cuda_missing_doc,
             "cuda_missing($module, /)\n--\n\n"
             "None when a GPU can be used, else what is missing. The first call loads the driver.");

PyDoc_STRVAR(cuda_is_emulated_doc,
             "cuda_is_emulated($module, /)\n--\n\n"
             "True when the kernels run on the CPU and take tensors in its memory.");

PyDoc_STRVAR(cuda_quantize_doc,
             "cuda_quantize($module, q, exponents, x, column, /)\n--\n\n"
             "The fixed16 form of the rows of x [M, K], or of fp32(x * column).");

static PyObject *
py_cuda_is_emulated(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(BITDELTA_CUDA_KIND == 2);
}

#if BITDELTA_CUDA_KIND

#include "cuda_call.h"

static PyObject *
py_cuda_missing(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    const char *text = NULL;
    Py_BEGIN_ALLOW_THREADS /* the driver takes its time */
        text = bd_gpu_missing();
    Py_END_ALLOW_THREADS
    if (text == NULL) {
        Py_RETURN_NONE;
    }
    return PyUnicode_FromString(text);
}

/* Compact rows that kernels read and write by vectors of 16 bytes. */
static int
check_vectors(const tensor *view, const char *name, DLDataTypeCode code, int bits,
              const char *letters, int ndim, const int64_t *shape)
{
    return check_dtype(view, name, code, bits) < 0 ||
                   check_shape(view, name, letters, ndim, shape) < 0 ||
                   check_contiguous(view, name, 16) < 0
               ? -1
               : 0;
}

static PyObject *
py_cuda_quantize(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    cuda_call call;
    bd_matrix x = {0};
    const tensor *source = NULL, *q = NULL, *exponents = NULL, *column = NULL;
    PyObject *result = NULL;
    if (check_n_arguments("cuda_quantize", nargs, 4, 4) < 0 || cuda_begin(&call) < 0) {
        return NULL;
    }
    source = cuda_acquire(state, &call, args[2], "x", TENSOR_INPUT);
    if (source == NULL || tensor_to_matrix(source, "x", "[M, K]", ANY_SIZE, ANY_SIZE, &x) < 0 ||
        check_nonempty(&x, "x", "[M, K]") < 0) {
        goto done;
    }
    const int64_t q_shape[] = {x.n_rows, bd_n_lines(x.n_columns) * BD_WORD_BITS};
    q = cuda_acquire(state, &call, args[0], "q", TENSOR_OUTPUT);
    if (q == NULL ||
        check_vectors(q, "q", kDLInt, 16, "[M, K rounded up to 256]", 2, q_shape) < 0) {
        goto done;
    }
    exponents = cuda_acquire(state, &call, args[1], "exponents", TENSOR_OUTPUT);
    if (exponents == NULL ||
        check_vectors(exponents, "exponents", kDLInt, 32, "[M]", 1, &x.n_rows) < 0) {
        goto done;
    }
    if (args[3] != Py_None) {
        column = cuda_acquire(state, &call, args[3], "column", TENSOR_INPUT);
        if (column == NULL ||
            check_vectors(column, "column", kDLFloat, 32, "[K]", 1, &x.n_columns) < 0) {
            goto done;
        }
    }
    bd_status status = BD_OK;
    Py_BEGIN_ALLOW_THREADS
        status = cuda_enter(&call);
        if (status == BD_OK) {
            status = bd_cuda_quantize(&call.ctx, &x, column == NULL ? NULL : column->data, q->data,
                                      exponents->data);
            cuda_leave(&call);
        }
    Py_END_ALLOW_THREADS
    result = cuda_return_status(status);

done:
    cuda_end(&call);
    return result;
}

#else

#define MISSING "this build of bitdelta has no CUDA kernels (" BITDELTA_CUDA ")"

static PyObject *
py_cuda_missing(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyUnicode_FromString(MISSING);
}

static PyObject *
py_cuda_quantize(PyObject *Py_UNUSED(module), PyObject *const *Py_UNUSED(args),
                 Py_ssize_t Py_UNUSED(nargs))
{
    raise_device_error(MISSING);
    return NULL;
}

#endif

PyMethodDef cuda_functions[] = {
    {"cuda_missing", py_cuda_missing, METH_NOARGS, cuda_missing_doc},
    {"cuda_is_emulated", py_cuda_is_emulated, METH_NOARGS, cuda_is_emulated_doc},
    {"cuda_quantize", (PyCFunction)(void (*)(void))py_cuda_quantize, METH_FASTCALL,
     cuda_quantize_doc},
    {NULL, NULL, 0, NULL},
};
