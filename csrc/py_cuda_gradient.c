/* py_cuda_gradient.c - transposed products and the gradients of scales on a GPU. */
#include "module.h"

#if BITDELTA_CUDA_KIND

#include "cuda_call.h"

/* What both functions take: dy, x or None, deltas, plan, workspace. */
static int
acquire_gradient(module_state *state, cuda_call *call, PyObject *const *args,
                 bd_cuda_gradient_args *job)
{
    job->dy = cuda_matrix(state, call, args[0], "dy", TENSOR_INPUT, "[M, N]", ANY_SIZE, ANY_SIZE);
    if (job->dy == NULL || cuda_check_size(job->dy, "dy") < 0) {
        return -1;
    }
    const cuda_deltas *deltas = cuda_deltas_view(state, call, args[2], "deltas");
    if (deltas == NULL) {
        return -1;
    }
    const int64_t M = job->dy->n_rows, N = deltas->N;
    if (job->dy->n_columns != N) {
        PyErr_Format(PyExc_ValueError, "dy: expected N = %lld of deltas, got %lld", (long long)N,
                     (long long)job->dy->n_columns);
        return -1;
    }
    job->deltas = deltas->tensors[0].data;
    job->n_deltas = deltas->T;
    job->max_planes = deltas->max_planes;
    job->has_columns = deltas->has_columns;
    job->K = deltas->K;
    if (args[1] != Py_None && (job->x = cuda_matrix(state, call, args[1], "x", TENSOR_INPUT,
                                                    "[M, K]", M, deltas->K)) == NULL) {
        return -1;
    }
    job->plan =
        cuda_scratch(state, call, args[3], "plan", TENSOR_INPUT, bd_cuda_plan_bytes(M, deltas->T));
    if (job->plan == NULL) {
        return -1;
    }
    job->workspace = cuda_scratch(
        state, call, args[4], "workspace", TENSOR_OUTPUT,
        bd_cuda_gradient_workspace_bytes(M, N, deltas->K, deltas->T, deltas->max_planes));
    return job->workspace == NULL ? -1 : 0;
}

/* out: fp32 [T, max_planes, width] of x and dy. */
static float *
acquire_sums(module_state *state, cuda_call *call, PyObject *object, const char *name,
             const char *letters, int64_t width, const bd_cuda_gradient_args *job)
{
    const int64_t shape[] = {job->n_deltas, job->max_planes, width};
    if (job->x == NULL) {
        PyErr_Format(PyExc_ValueError, "x: expected [M, K] for %s, got None", name);
        return NULL;
    }
    return cuda_block(state, call, object, name, TENSOR_OUTPUT, kDLFloat, 32, 4, letters, 3, shape);
}

PyDoc_STRVAR(
    transposed_doc,
    "cuda_linear_transposed($module, dy, x, deltas, plan, workspace, out, dcolumn, /)\n--\n\n"
    "out [M, K] = the rows' delta terms of dy over n; dcolumn fp32 [T, planes, K]: the\n"
    "gradients of column scales, for which x is needed. Either may be None.");

static int
acquire_transposed(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    bd_cuda_gradient_args *job = given;
    if (acquire_gradient(state, call, args, job) < 0) {
        return -1;
    }
    if (args[5] != Py_None && (job->g = cuda_matrix(state, call, args[5], "out", TENSOR_OUTPUT,
                                                    "[M, K]", job->dy->n_rows, job->K)) == NULL) {
        return -1;
    }
    if (args[6] != Py_None && (job->dcolumn = acquire_sums(state, call, args[6], "dcolumn",
                                                           "[T, P, K]", job->K, job)) == NULL) {
        return -1;
    }
    return 0;
}

static bd_status
launch_transposed(cuda_call *call, void *job)
{
    return bd_cuda_linear_transposed(&call->ctx, job);
}

static PyObject *
py_cuda_linear_transposed(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function transposed = {"cuda_linear_transposed", 7, acquire_transposed,
                                             launch_transposed};
    bd_cuda_gradient_args job = {0};
    return cuda_run(module, &transposed, args, nargs, &job);
}

PyDoc_STRVAR(row_gradient_doc,
             "cuda_row_gradient($module, dy, x, deltas, plan, workspace, drow, /)\n--\n\n"
             "drow, fp32 [T, planes, N]: the gradients of row scales.");

static int
acquire_row_gradient(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    bd_cuda_gradient_args *job = given;
    if (acquire_gradient(state, call, args, job) < 0) {
        return -1;
    }
    job->drow = acquire_sums(state, call, args[5], "drow", "[T, P, N]", job->dy->n_columns, job);
    return job->drow == NULL ? -1 : 0;
}

static bd_status
launch_row_gradient(cuda_call *call, void *job)
{
    return bd_cuda_row_gradient(&call->ctx, job);
}

static PyObject *
py_cuda_row_gradient(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function row_gradient = {"cuda_row_gradient", 6, acquire_row_gradient,
                                               launch_row_gradient};
    bd_cuda_gradient_args job = {0};
    return cuda_run(module, &row_gradient, args, nargs, &job);
}

PyMethodDef cuda_gradient_functions[] = {
    {"cuda_linear_transposed", (PyCFunction)(void (*)(void))py_cuda_linear_transposed,
     METH_FASTCALL, transposed_doc},
    {"cuda_row_gradient", (PyCFunction)(void (*)(void))py_cuda_row_gradient, METH_FASTCALL,
     row_gradient_doc},
    {NULL, NULL, 0, NULL},
};

#endif
