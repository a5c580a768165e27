/* py_cuda_calibrate.c - fit_signs and sweep on a GPU: the arguments of py_calibrate.c, and its bits. */
#include "module.h"

#if BITDELTA_CUDA_KIND

#include "cuda_call.h"

/* What a kernel takes with d or pull [N, K]: row, column or None, sign. */
typedef struct {
    int64_t N, K;
    int P;
    const float *row, *column;
    uint32_t *sign;
} given_scales;

static int
acquire_scales(module_state *state, cuda_call *call, PyObject *const *args, given_scales *scales)
{
    const int64_t N = scales->N, K = scales->K, row_shape[] = {ANY_SIZE, N};
    if (N > INT32_MAX || K > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: expected N and K below 2^31, got %lld and %lld",
                     call->names[0], (long long)N, (long long)K);
        return -1;
    }
    scales->row = cuda_block(state, call, args[0], "row", TENSOR_INPUT, kDLFloat, 32, 4, "[P, N]",
                             2, row_shape);
    if (scales->row == NULL) {
        return -1;
    }
    const int64_t P = call->tensors[call->n_tensors - 1].shape[0], column_shape[] = {P, K};
    if (P < 1 || P > BD_MAX_PLANES) {
        PyErr_Format(PyExc_ValueError, "row: expected 1 .. %d planes, got %lld", BD_MAX_PLANES,
                     (long long)P);
        return -1;
    }
    if (args[1] != Py_None &&
        (scales->column = cuda_block(state, call, args[1], "column", TENSOR_INPUT, kDLFloat, 32, 4,
                                     "[P, K]", 2, column_shape)) == NULL) {
        return -1;
    }
    const int64_t sign_shape[] = {P, bd_n_strips(N), bd_n_lines(K), BD_STRIP_ROWS};
    scales->P = (int)P;
    scales->sign = cuda_block(state, call, args[2], "sign", TENSOR_OUTPUT, kDLUInt, 32, 64,
                              "[P, S, L, 16]", 4, sign_shape);
    return scales->sign == NULL ? -1 : 0;
}

/* ---- fit_signs ---- */

typedef struct {
    bd_fit_args args;
    void *workspace;
} fitting;

static int
acquire_fitting(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    fitting *job = given;
    const bd_matrix *d =
        cuda_matrix(state, call, args[0], "d", TENSOR_INPUT, "[N, K]", ANY_SIZE, ANY_SIZE);
    if (d == NULL || check_dtype(&call->tensors[0], "d", kDLFloat, 32) < 0) {
        return -1;
    }
    given_scales scales = {.N = d->n_rows, .K = d->n_columns};
    const int64_t square[] = {scales.K, scales.K};
    const float *factor = NULL;
    if (args[1] != Py_None && (factor = cuda_block(state, call, args[1], "factor", TENSOR_INPUT,
                                                   kDLFloat, 32, 4, "[K, K]", 2, square)) == NULL) {
        return -1;
    }
    const int64_t *order =
        cuda_block(state, call, args[2], "order", TENSOR_INPUT, kDLInt, 64, 8, "[K]", 1, square);
    if (order == NULL || acquire_scales(state, call, args + 3, &scales) < 0) {
        return -1;
    }
    job->args = (bd_fit_args){.d = d,
                              .factor = factor,
                              .order = order,
                              .P = scales.P,
                              .row = scales.row,
                              .column = scales.column,
                              .sign = scales.sign};
    job->workspace = cuda_scratch(state, call, args[6], "workspace", TENSOR_OUTPUT,
                                  bd_cuda_fit_workspace_bytes(scales.N, scales.K));
    return job->workspace == NULL ? -1 : 0;
}

static bd_status
launch_fitting(cuda_call *call, void *given)
{
    const fitting *job = given;
    return bd_cuda_fit_signs(&call->ctx, &job->args, job->workspace);
}

PyDoc_STRVAR(fit_signs_doc,
             "cuda_fit_signs($module, d, factor, order, row, column, sign, workspace, /)\n--\n\n"
             "As fit_signs; columns that order names wrongly are left out.");

static PyObject *
py_cuda_fit_signs(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function fit = {"cuda_fit_signs", 7, acquire_fitting, launch_fitting};
    fitting job = {0};
    return cuda_run(module, &fit, args, nargs, &job);
}

/* ---- sweep ---- */

/* [K, K], or its diagonal [K]. */
static int
acquire_hessian(module_state *state, cuda_call *call, PyObject *object, bd_sweep_args *job)
{
    const int64_t shape[] = {job->K, job->K};
    const tensor *view = cuda_tensor(state, call, object, "hessian", TENSOR_INPUT);
    if (view == NULL || check_dtype(view, "hessian", kDLFloat, 32) < 0) {
        return -1;
    }
    job->is_diagonal = view->ndim == 1;
    if (check_shape(view, "hessian", job->is_diagonal ? "[K]" : "[K, K]", job->is_diagonal ? 1 : 2,
                    shape) < 0 ||
        check_contiguous(view, "hessian", 4) < 0) {
        return -1;
    }
    call->memory[call->n_tensors - 1] = tensor_extent(view);
    job->hessian = view->data;
    return 0;
}

static int
acquire_sweep(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    static const int64_t any[] = {ANY_SIZE, ANY_SIZE};
    bd_sweep_args *job = given;
    job->pull =
        cuda_block(state, call, args[0], "pull", TENSOR_OUTPUT, kDLFloat, 32, 4, "[N, K]", 2, any);
    if (job->pull == NULL) {
        return -1;
    }
    given_scales scales = {.N = call->tensors[0].shape[0], .K = call->tensors[0].shape[1]};
    job->N = scales.N;
    job->K = scales.K;
    if (acquire_hessian(state, call, args[1], job) < 0 ||
        acquire_scales(state, call, args + 2, &scales) < 0) {
        return -1;
    }
    job->P = scales.P;
    job->row = scales.row;
    job->column = scales.column;
    job->sign = scales.sign;
    return 0;
}

static bd_status
launch_sweep(cuda_call *call, void *job)
{
    return bd_cuda_sweep(&call->ctx, job);
}

PyDoc_STRVAR(sweep_doc,
             "cuda_sweep($module, pull, hessian, row, column, sign, /)\n--\n\nAs sweep.");

static PyObject *
py_cuda_sweep(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function sweep = {"cuda_sweep", 5, acquire_sweep, launch_sweep};
    bd_sweep_args job = {0};
    return cuda_run(module, &sweep, args, nargs, &job);
}

PyMethodDef cuda_calibrate_functions[] = {
    {"cuda_fit_signs", (PyCFunction)(void (*)(void))py_cuda_fit_signs, METH_FASTCALL,
     fit_signs_doc},
    {"cuda_sweep", (PyCFunction)(void (*)(void))py_cuda_sweep, METH_FASTCALL, sweep_doc},
    {NULL, NULL, 0, NULL},
};

#endif
