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

PyDoc_STRVAR(cuda_expand_doc,
             "cuda_expand($module, out, base, sign, scale, column, N, row_begin, /)\n--\n\n"
             "out = rows row_begin .. of round(fp32(base) + the planes' sum); base None is zeros.");

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

/* ---- quantize ---- */

typedef struct {
    const bd_matrix *x;
    const float *column;
    int16_t *q;
    int32_t *exponents;
} quantization;

static int
acquire_quantization(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    quantization *job = given;
    job->x = cuda_matrix(state, call, args[2], "x", TENSOR_INPUT, "[M, K]", ANY_SIZE, ANY_SIZE);
    if (job->x == NULL || cuda_check_size(job->x, "x") < 0) {
        return -1;
    }
    const int64_t M = job->x->n_rows, K = job->x->n_columns;
    const int64_t q_shape[] = {M, bd_n_lines(K) * BD_WORD_BITS};
    job->q = cuda_block(state, call, args[0], "q", TENSOR_OUTPUT, kDLInt, 16, 16,
                        "[M, K rounded up to 256]", 2, q_shape);
    if (job->q == NULL ||
        (job->exponents = cuda_block(state, call, args[1], "exponents", TENSOR_OUTPUT, kDLInt, 32,
                                     4, "[M]", 1, &M)) == NULL) {
        return -1;
    }
    if (args[3] != Py_None &&
        (job->column = cuda_block(state, call, args[3], "column", TENSOR_INPUT, kDLFloat, 32, 4,
                                  "[K]", 1, &K)) == NULL) {
        return -1;
    }
    return 0;
}

static bd_status
launch_quantization(cuda_call *call, void *given)
{
    const quantization *job = given;
    return bd_cuda_quantize(&call->ctx, job->x, job->column, job->q, job->exponents);
}

static PyObject *
py_cuda_quantize(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function quantize = {"cuda_quantize", 4, acquire_quantization,
                                           launch_quantization};
    quantization job = {0};
    return cuda_run(module, &quantize, args, nargs, &job);
}

/* ---- expand ---- */

typedef struct {
    const bd_matrix *out, *base;
    bd_delta delta;
    int64_t begin, end;
} expansion;

/* (out, base, sign, scale, column, shape's N, row_begin) */
static int
acquire_expansion(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    expansion *job = given;
    int64_t P = 0, N = 0, begin = 0;
    if (parse_int(args[5], "N", 1, INT32_MAX, &N) < 0 ||
        parse_int(args[6], "row_begin", 0, N - 1, &begin) < 0) {
        return -1;
    }
    job->out =
        cuda_matrix(state, call, args[0], "out", TENSOR_OUTPUT, "[n_rows, K]", ANY_SIZE, ANY_SIZE);
    if (job->out == NULL) {
        return -1;
    }
    const int64_t K = job->out->n_columns;
    job->begin = begin;
    job->end = begin + job->out->n_rows;
    if (job->end > N) {
        PyErr_Format(PyExc_ValueError, "out: expected at most N - row_begin = %lld rows, got %lld",
                     (long long)(N - begin), (long long)job->out->n_rows);
        return -1;
    }
    if (args[1] != Py_None && (job->base = cuda_matrix(state, call, args[1], "base", TENSOR_INPUT,
                                                       "[N, K]", N, K)) == NULL) {
        return -1;
    }
    const int64_t sign_shape[] = {ANY_SIZE, bd_n_strips(N), bd_n_lines(K), BD_STRIP_ROWS};
    job->delta.sign = cuda_block(state, call, args[2], "sign", TENSOR_INPUT, kDLUInt, 32, 64,
                                 "[P, S, L, 16]", 4, sign_shape);
    if (job->delta.sign == NULL) {
        return -1;
    }
    P = call->tensors[call->n_tensors - 1].shape[0];
    if (P < 1 || P > BD_MAX_PLANES) {
        PyErr_Format(PyExc_ValueError, "sign: expected 1 .. %d planes, got %lld", BD_MAX_PLANES,
                     (long long)P);
        return -1;
    }
    const int64_t row_shape[] = {P, N}, column_shape[] = {P, K};
    job->delta.row = cuda_block(state, call, args[3], "scale", TENSOR_INPUT, kDLFloat, 32, 4,
                                "[P, N]", 2, row_shape);
    if (job->delta.row == NULL ||
        (args[4] != Py_None &&
         (job->delta.column = cuda_block(state, call, args[4], "column", TENSOR_INPUT, kDLFloat, 32,
                                         4, "[P, K]", 2, column_shape)) == NULL)) {
        return -1;
    }
    job->delta.N = N;
    job->delta.K = K;
    job->delta.P = (int)P;
    call->is_in_place = job->base != NULL;
    return 0;
}

static bd_status
launch_expansion(cuda_call *call, void *given)
{
    const expansion *job = given;
    return bd_cuda_expand(&call->ctx, job->base, &job->delta, job->begin, job->end, job->out);
}

static PyObject *
py_cuda_expand(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function expand = {"cuda_expand", 7, acquire_expansion, launch_expansion};
    expansion job = {0};
    return cuda_run(module, &expand, args, nargs, &job);
}

#else

#define MISSING "this build of bitdelta has no CUDA kernels (" BITDELTA_CUDA ")"

static PyObject *
py_cuda_missing(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyUnicode_FromString(MISSING);
}

static PyObject *
refuse(PyObject *Py_UNUSED(module), PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    raise_device_error(MISSING);
    return NULL;
}

#define py_cuda_quantize refuse
#define py_cuda_expand refuse

#endif

PyMethodDef cuda_functions[] = {
    {"cuda_missing", py_cuda_missing, METH_NOARGS, cuda_missing_doc},
    {"cuda_is_emulated", py_cuda_is_emulated, METH_NOARGS, cuda_is_emulated_doc},
    {"cuda_expand", (PyCFunction)(void (*)(void))py_cuda_expand, METH_FASTCALL, cuda_expand_doc},
    {"cuda_quantize", (PyCFunction)(void (*)(void))py_cuda_quantize, METH_FASTCALL,
     cuda_quantize_doc},
#if !BITDELTA_CUDA_KIND
    {"cuda_workspace_bytes", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_plan", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_linear", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_extract", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_linear_transposed", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_row_gradient", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_position", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_open_blas", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_multiply", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_fit_signs", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
    {"cuda_sweep", (PyCFunction)(void (*)(void))refuse, METH_FASTCALL, NULL},
#endif
    {NULL, NULL, 0, NULL},
};
