/* py_cuda_linear.c - plans, workspaces, products and their gradients on a GPU. */
#include "module.h"

#if BITDELTA_CUDA_KIND

#include "cuda_call.h"

/* ---- workspace ---- */

typedef struct {
    const char *name;
    int64_t most;
} size_limit;

#define ROWS_M {"M", BD_CUDA_MAX_ROWS}
#define COLUMNS(letter) {letter, BD_CUDA_MAX_COLUMNS}
#define TENANTS_T {"T", BD_CUDA_MAX_TENANTS}
#define PLANES {"planes", BD_MAX_PLANES}

static const struct {
    const char *name;
    int n_sizes;
    size_limit sizes[6];
} operations[] = {
    {"plan", 2, {ROWS_M, TENANTS_T}},
    {"linear",
     6,
     {ROWS_M, COLUMNS("K"), TENANTS_T, {"n_parts", BD_CUDA_MAX_PARTS}, PLANES, {"has_columns", 1}}},
    {"gradient", 5, {ROWS_M, COLUMNS("N"), COLUMNS("K"), TENANTS_T, PLANES}},
    {"extract", 3, {{"N", INT32_MAX}, {"K", INT32_MAX}, {"form", BD_SCALE_RANK1}}},
    {"fit", 2, {{"N", INT32_MAX}, {"K", INT32_MAX}}},
    {"multiply", 0, {{NULL, 0}}},
};

static size_t
workspace_bytes(int operation, const int64_t *n)
{
    switch (operation) {
        case 0:
            return bd_cuda_plan_bytes(n[0], n[1]);
        case 1:
            return bd_cuda_linear_workspace_bytes(n[0], n[1], n[2], (int)n[3], (int)n[4],
                                                  (int)n[5]);
        case 2:
            return bd_cuda_gradient_workspace_bytes(n[0], n[1], n[2], n[3], (int)n[4]);
        case 3:
            return bd_cuda_extract_workspace_bytes(n[0], n[1], (bd_scale_form)n[2]);
        case 4:
            return bd_cuda_fit_workspace_bytes(n[0], n[1]);
        default:
            return BD_BLAS_WORKSPACE_BYTES;
    }
}

PyDoc_STRVAR(
    workspace_doc,
    "cuda_workspace_bytes($module, operation, /, *sizes)\n--\n\n"
    "plan M, T; linear M, K, T, n_parts, planes, has_columns; gradient M, N, K, T, planes;\n"
    "extract N, K, form (0 tensor, 1 row, 2 rank1); fit N, K; multiply.");

static PyObject *
py_cuda_workspace_bytes(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    static const int n_operations = sizeof operations / sizeof *operations;
    int64_t n[6] = {0};
    int at = 0;
    if (check_n_arguments("cuda_workspace_bytes", nargs, 1, 7) < 0) {
        return NULL;
    }
    while (at < n_operations &&
           !(PyUnicode_Check(args[0]) &&
             PyUnicode_CompareWithASCIIString(args[0], operations[at].name) == 0)) {
        at++;
    }
    if (at == n_operations) {
        PyErr_Format(PyExc_ValueError,
                     "operation: expected plan, linear, gradient, extract, fit or multiply, got %R",
                     args[0]);
        return NULL;
    }
    const int n_sizes = operations[at].n_sizes;
    if (check_n_arguments("cuda_workspace_bytes", nargs, n_sizes + 1, n_sizes + 1) < 0) {
        return NULL;
    }
    for (int i = 0; i < n_sizes; i++) {
        const size_limit *limit = &operations[at].sizes[i];
        if (parse_int(args[i + 1], limit->name, 0, limit->most, &n[i]) < 0) {
            return NULL;
        }
    }
    return PyLong_FromSize_t(workspace_bytes(at, n));
}

/* ---- plan ---- */

PyDoc_STRVAR(plan_doc,
             "cuda_plan($module, plan, tenant_ids, T, /)\n--\n\n"
             "Groups the rows of a batch; ids out of range lose theirs, which become NaN.");

typedef struct {
    const int64_t *ids;
    int64_t M, T;
    void *plan;
} planning;

static int
acquire_planning(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    static const int64_t any[] = {ANY_SIZE};
    planning *job = given;
    if (parse_int(args[2], "T", 1, BD_CUDA_MAX_TENANTS, &job->T) < 0) {
        return -1;
    }
    job->ids =
        cuda_block(state, call, args[1], "tenant_ids", TENSOR_INPUT, kDLInt, 64, 8, "[M]", 1, any);
    if (job->ids == NULL) {
        return -1;
    }
    job->M = call->tensors[0].shape[0];
    if (job->M > BD_CUDA_MAX_ROWS) {
        PyErr_Format(PyExc_ValueError, "tenant_ids: expected at most %d rows, got %lld",
                     BD_CUDA_MAX_ROWS, (long long)job->M);
        return -1;
    }
    job->plan = cuda_scratch(state, call, args[0], "plan", TENSOR_OUTPUT,
                             bd_cuda_plan_bytes(job->M, job->T));
    return job->plan == NULL ? -1 : 0;
}

static bd_status
launch_planning(cuda_call *call, void *given)
{
    const planning *job = given;
    return bd_cuda_plan(&call->ctx, job->ids, job->M, job->T, job->plan);
}

static PyObject *
py_cuda_plan(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function plan = {"cuda_plan", 3, acquire_planning, launch_planning};
    planning job = {0};
    return cuda_run(module, &plan, args, nargs, &job);
}

/* ---- linear ---- */

/* (out, product or None, bias or None, deltas) */
static int
acquire_part(module_state *state, cuda_call *call, PyObject *object, int add, int64_t M, int64_t K,
             const cuda_deltas **deltas, bd_cuda_part *part)
{
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 4) {
        PyErr_Format(PyExc_TypeError, "parts: expected (out, product, bias, deltas), got %.80s",
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *out = PyTuple_GET_ITEM(object, 0), *product = PyTuple_GET_ITEM(object, 1),
             *bias = PyTuple_GET_ITEM(object, 2);
    *deltas = cuda_deltas_view(state, call, PyTuple_GET_ITEM(object, 3), "deltas");
    if (*deltas == NULL) {
        return -1;
    }
    if ((*deltas)->K != K) {
        PyErr_Format(PyExc_ValueError, "deltas: expected K = %lld of x, got %lld", (long long)K,
                     (long long)(*deltas)->K);
        return -1;
    }
    const int64_t N = (*deltas)->N;
    const bd_matrix *y = cuda_matrix(state, call, out, "out", TENSOR_OUTPUT, "[M, N]", M, N);
    if (y == NULL) {
        return -1;
    }
    *part = (bd_cuda_part){.deltas = (*deltas)->tensors[0].data, .N = N, .add = add, .y = *y};
    if (product != Py_None) {
        const bd_matrix *made =
            cuda_matrix(state, call, product, "product", TENSOR_INPUT, "[M, N]", M, N);
        if (made == NULL ||
            check_dtype(&call->tensors[call->n_tensors - 1], "product", kDLFloat, 32) < 0) {
            return -1;
        }
        part->product = made->data;
        part->product_stride = made->row_stride;
    }
    return bias == Py_None
               ? 0
               : cuda_vector(state, call, bias, "bias", N, &part->bias, &part->bias_dtype);
}

static int
acquire_parts(module_state *state, cuda_call *call, PyObject *parts, int add,
              bd_cuda_linear_args *job)
{
    const Py_ssize_t n_parts = PyTuple_Check(parts) ? PyTuple_GET_SIZE(parts) : 0;
    if (n_parts < 1 || n_parts > BD_CUDA_MAX_PARTS) {
        PyErr_Format(PyExc_ValueError, "parts: expected a tuple of 1 .. %d, got %R",
                     BD_CUDA_MAX_PARTS, parts);
        return -1;
    }
    job->n_parts = (int)n_parts;
    job->max_planes = 1;
    for (int i = 0; i < job->n_parts; i++) {
        const cuda_deltas *deltas = NULL;
        if (acquire_part(state, call, PyTuple_GET_ITEM(parts, i), add, job->x->n_rows,
                         job->x->n_columns, &deltas, &job->parts[i]) < 0) {
            return -1;
        }
        if (i > 0 && deltas->T != job->n_deltas) {
            PyErr_Format(PyExc_ValueError, "deltas: expected %lld slots in every part, got %lld",
                         (long long)job->n_deltas, (long long)deltas->T);
            return -1;
        }
        job->n_deltas = deltas->T;
        job->has_columns |= deltas->has_columns;
        job->max_planes =
            deltas->max_planes > job->max_planes ? deltas->max_planes : job->max_planes;
    }
    return 0;
}

PyDoc_STRVAR(linear_doc,
             "cuda_linear($module, x, parts, plan, max_rows, add, workspace, /)\n--\n\n"
             "out = delta terms + product + bias of every part (out, product, bias, deltas); with\n"
             "add, out += delta terms. max_rows: the most rows a tenant has, M where not known.");

static int
acquire_linear(module_state *state, cuda_call *call, PyObject *const *args, void *given)
{
    bd_cuda_linear_args *job = given;
    int add = 0;
    if (parse_bool(args[4], "add", &add) < 0 ||
        parse_int(args[3], "max_rows", 0, INT32_MAX, &job->max_rows) < 0) {
        return -1;
    }
    job->x = cuda_matrix(state, call, args[0], "x", TENSOR_INPUT, "[M, K]", ANY_SIZE, ANY_SIZE);
    if (job->x == NULL || cuda_check_size(job->x, "x") < 0 ||
        acquire_parts(state, call, args[1], add, job) < 0) {
        return -1;
    }
    const int64_t M = job->x->n_rows;
    job->plan = cuda_scratch(state, call, args[2], "plan", TENSOR_INPUT,
                             bd_cuda_plan_bytes(M, job->n_deltas));
    if (job->plan == NULL) {
        return -1;
    }
    job->workspace = cuda_scratch(
        state, call, args[5], "workspace", TENSOR_OUTPUT,
        bd_cuda_linear_workspace_bytes(M, job->x->n_columns, job->n_deltas, job->n_parts,
                                       job->max_planes, job->has_columns));
    return job->workspace == NULL ? -1 : 0;
}

static bd_status
launch_linear(cuda_call *call, void *job)
{
    return bd_cuda_linear(&call->ctx, job);
}

static PyObject *
py_cuda_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const cuda_function linear = {"cuda_linear", 6, acquire_linear, launch_linear};
    bd_cuda_linear_args job = {0};
    return cuda_run(module, &linear, args, nargs, &job);
}

PyMethodDef cuda_product_functions[] = {
    {"cuda_workspace_bytes", (PyCFunction)(void (*)(void))py_cuda_workspace_bytes, METH_FASTCALL,
     workspace_doc},
    {"cuda_plan", (PyCFunction)(void (*)(void))py_cuda_plan, METH_FASTCALL, plan_doc},
    {"cuda_linear", (PyCFunction)(void (*)(void))py_cuda_linear, METH_FASTCALL, linear_doc},
    {NULL, NULL, 0, NULL},
};

#endif
