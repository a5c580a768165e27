/* py_cuda_delta.c - extract on a GPU. */
#include "module.h"

#if BITDELTA_CUDA_KIND

#include "cuda_call.h"

typedef struct {
    const bd_matrix *base, *finetuned;
    int P;
    bd_scale_form form;
    uint32_t *sign;
    float *scale, *column;
    uint64_t *bad;
    void *workspace;
} extraction;

static int
acquire_extraction(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    extraction *job = given;
    static const int64_t one[] = {1};
    int64_t P = 0, form = 0;
    if (parse_int(args[2], "planes", 1, BD_MAX_PLANES, &P) < 0 ||
        parse_int(args[3], "form", 0, 2, &form) < 0) {
        return -1;
    }
    job->P = (int)P;
    job->form = (bd_scale_form)form;
    job->base =
        cuda_matrix(state, call, args[0], "base", TENSOR_INPUT, "[N, K]", ANY_SIZE, ANY_SIZE);
    if (job->base == NULL) {
        return -1;
    }
    const int64_t N = job->base->n_rows, K = job->base->n_columns;
    if (N > INT32_MAX || K > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "base: expected N and K below 2^31, got %lld and %lld",
                     (long long)N, (long long)K);
        return -1;
    }
    job->finetuned = cuda_matrix(state, call, args[1], "finetuned", TENSOR_INPUT, "[N, K]", N, K);
    if (job->finetuned == NULL) {
        return -1;
    }
    const int64_t sign_shape[] = {P, bd_n_strips(N), bd_n_lines(K), BD_STRIP_ROWS};
    const int64_t row_shape[] = {P, N}, column_shape[] = {P, K};
    const int is_tensor = form == BD_SCALE_TENSOR;
    job->sign = cuda_block(state, call, args[4], "sign", TENSOR_OUTPUT, kDLUInt, 32, 64,
                           "[P, S, L, 16]", 4, sign_shape);
    if (job->sign == NULL || (job->scale = cuda_block(state, call, args[5], "scale", TENSOR_OUTPUT,
                                                      kDLFloat, 32, 4, is_tensor ? "[P]" : "[P, N]",
                                                      is_tensor ? 1 : 2, row_shape)) == NULL) {
        return -1;
    }
    if ((form == BD_SCALE_RANK1) != (args[6] != Py_None)) {
        PyErr_SetString(PyExc_ValueError, "column: expected fp32 [P, K] in form rank1, else None");
        return -1;
    }
    if (form == BD_SCALE_RANK1 &&
        (job->column = cuda_block(state, call, args[6], "column", TENSOR_OUTPUT, kDLFloat, 32, 4,
                                  "[P, K]", 2, column_shape)) == NULL) {
        return -1;
    }
    job->bad = cuda_block(state, call, args[7], "bad", TENSOR_OUTPUT, kDLInt, 64, 8, "[1]", 1, one);
    if (job->bad == NULL) {
        return -1;
    }
    job->workspace = cuda_scratch(state, call, args[8], "workspace", TENSOR_OUTPUT,
                                  bd_cuda_extract_workspace_bytes(N, K, job->form));
    return job->workspace == NULL ? -1 : 0;
}

PyDoc_STRVAR(extract_doc,
             "cuda_extract($module, base, finetuned, planes, form, sign, scale, column, bad,\n"
             "             workspace, /)\n--\n\n"
             "As extract; bad, int64 [1], becomes -1 or what cuda_position reads.");

static bd_status
launch_extraction(cuda_call *call, void *given)
{
    const extraction *job = given;
    return bd_cuda_extract(&call->ctx, job->base, job->finetuned, job->P, job->form, job->sign,
                           job->scale, job->column, job->bad, job->workspace);
}

static PyObject *
py_cuda_extract(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function extract = {"cuda_extract", 9, acquire_extraction, launch_extraction};
    extraction job = {0};
    return cuda_run(module, &extract, args, nargs, &job);
}

PyDoc_STRVAR(
    position_doc,
    "cuda_position($module, bad, K, /)\n--\n\n"
    "(row, column, in_base) of the first element that is not finite; in_base -1: neither,\n"
    "but their difference.");

static PyObject *
py_cuda_position(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int64_t bad = 0, K = 0;
    if (check_n_arguments("cuda_position", nargs, 2, 2) < 0 ||
        parse_int(args[0], "bad", INT64_MIN, INT64_MAX, &bad) < 0 ||
        parse_int(args[1], "K", 1, INT32_MAX, &K) < 0) {
        return NULL;
    }
    const bd_position at = bd_cuda_bad_position((uint64_t)bad, K);
    return Py_BuildValue("(LLi)", (long long)at.row, (long long)at.column, at.in_base);
}

PyMethodDef cuda_delta_functions[] = {
    {"cuda_extract", (PyCFunction)(void (*)(void))py_cuda_extract, METH_FASTCALL, extract_doc},
    {"cuda_position", (PyCFunction)(void (*)(void))py_cuda_position, METH_FASTCALL, position_doc},
    {NULL, NULL, 0, NULL},
};

#endif
