/* py_linear.c - linear, linear_add and linear_transposed: arguments to views, views to the core.
 *
 * M rows, T deltas of one shape [N, K]; tenant_ids [M] names each row's delta, -1 none. */
#include "module.h"

#include <string.h>

#include "tensor.h"

typedef struct {
    tensor y, x, weight, product, bias;
    bd_matrix y_matrix, x_matrix, weight_matrix, product_matrix;
    PyObject *delta_objects; /* tuple, strong: nobody can take a Delta away meanwhile */
    bd_delta *deltas;        /* [T] */
    int64_t *tenant_ids;     /* [M], a checked copy */
    int64_t T;
} product_call;

static void
release_call(product_call *call)
{
    tensor_release(&call->y);
    tensor_release(&call->x);
    tensor_release(&call->weight);
    tensor_release(&call->product);
    tensor_release(&call->bias);
    Py_CLEAR(call->delta_objects);
    PyMem_Free(call->deltas);
    PyMem_Free(call->tenant_ids);
}

static int
acquire_matrix(module_state *state, PyObject *object, const char *name, int mode,
               const char *letters, int64_t n_rows, int64_t n_columns, tensor *view,
               bd_matrix *matrix)
{
    if (tensor_acquire(state, object, name, mode, view) < 0) {
        return -1;
    }
    return tensor_to_matrix(view, name, letters, n_rows, n_columns, matrix);
}

/* ---- deltas and tenant_ids ---- */

/* All of shape [N, K]. */
static int
acquire_deltas(module_state *state, PyObject *sequence, int64_t N, int64_t K, product_call *call)
{
    if (!PySequence_Check(sequence) || PyUnicode_Check(sequence)) {
        PyErr_Format(PyExc_TypeError, "deltas: expected a sequence of bitdelta._C.Delta, got %.80s",
                     Py_TYPE(sequence)->tp_name);
        return -1;
    }
    call->delta_objects = PySequence_Tuple(sequence);
    if (call->delta_objects == NULL) {
        return -1;
    }
    call->T = PyTuple_GET_SIZE(call->delta_objects);
    call->deltas = PyMem_New(bd_delta, (size_t)call->T + 1);
    if (call->deltas == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t t = 0; t < call->T; t++) {
        const bd_delta *delta =
            delta_view(state, PyTuple_GET_ITEM(call->delta_objects, t), "deltas");
        if (delta == NULL) {
            return -1;
        }
        call->deltas[t] = *delta;
        if (delta->N != N || delta->K != K) {
            PyErr_Format(PyExc_ValueError,
                         "deltas: expected shape [N, K] = [%lld, %lld], got [%lld, %lld] at %lld",
                         (long long)N, (long long)K, (long long)delta->N, (long long)delta->K,
                         (long long)t);
            return -1;
        }
    }
    return 0;
}

static int
check_tenant_ids(const product_call *call, int64_t M)
{
    for (int64_t m = 0; m < M; m++) {
        int64_t id = call->tenant_ids[m];
        if (id < -1 || id >= call->T) {
            PyErr_Format(PyExc_ValueError, "tenant_ids: expected -1 .. %lld, got %lld at row %lld",
                         (long long)(call->T - 1), (long long)id, (long long)m);
            return -1;
        }
    }
    return 0;
}

static int
copy_id_tensor(const tensor *view, int64_t M, int64_t *out)
{
    int is_int32 = view->dtype.code == kDLInt && view->dtype.bits == 32;
    if ((!is_int32 && check_dtype(view, "tenant_ids", kDLInt, 64) < 0) ||
        check_shape(view, "tenant_ids", "[M]", 1, &M) < 0) {
        return -1;
    }
    const int64_t size = is_int32 ? 4 : 8;
    for (int64_t m = 0; m < M; m++) {
        const char *from = (const char *)view->data + m * view->strides[0] * size;
        int32_t narrow = 0;
        if (size == 8) {
            memcpy(&out[m], from, sizeof *out);
        } else {
            memcpy(&narrow, from, sizeof narrow);
            out[m] = narrow;
        }
    }
    return 0;
}

static int
copy_id_sequence(PyObject *sequence, int64_t M, int64_t *out)
{
    PyObject *items = NULL;
    Py_ssize_t n_items = PySequence_Size(sequence); /* a range may be too long for a tuple */
    if (n_items == M) {
        items = PySequence_Tuple(sequence);
        n_items =
            items == NULL ? -1 : PyTuple_GET_SIZE(items); /* a subclass may say another size */
    }
    int status = n_items == M ? 0 : -1;
    if (n_items >= 0 && n_items != M) {
        PyErr_Format(PyExc_ValueError, "tenant_ids: expected [M] = [%lld], got [%zd]", (long long)M,
                     n_items);
    }
    for (int64_t m = 0; m < M && status == 0; m++) {
        PyObject *item = PyTuple_GET_ITEM(items, m); /* borrowed */
        status = parse_int(item, "tenant_ids", INT64_MIN, INT64_MAX, &out[m]);
    }
    Py_XDECREF(items);
    return status;
}

static int
acquire_tenant_ids(module_state *state, PyObject *object, int64_t M, product_call *call)
{
    call->tenant_ids = PyMem_New(int64_t, (size_t)M + 1);
    if (call->tenant_ids == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    int status = 0;
    if (PyList_Check(object) || PyTuple_Check(object) || PyRange_Check(object)) {
        status = copy_id_sequence(object, M, call->tenant_ids);
    } else {
        tensor view = {0};
        status = tensor_acquire(state, object, "tenant_ids", TENSOR_INPUT, &view);
        if (status == 0) {
            status = copy_id_tensor(&view, M, call->tenant_ids);
        }
        tensor_release(&view);
    }
    return status < 0 ? -1 : check_tenant_ids(call, M);
}

static int
check_deltas_apart(const bd_matrix *y, const char *name, const product_call *call)
{
    for (int64_t t = 0; t < call->T; t++) {
        if (check_delta_apart(y, name, &call->deltas[t], "deltas") < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- linear ---- */

static int
acquire_bias(module_state *state, PyObject *object, int64_t N, product_call *call,
             bd_linear_args *args)
{
    if (tensor_acquire(state, object, "bias", TENSOR_INPUT, &call->bias) < 0 ||
        check_shape(&call->bias, "bias", "[N]", 1, &N) < 0) {
        return -1;
    }
    tensor row = call->bias; /* borrowed: [1, N] */
    row.ndim = 2;
    row.shape[0] = 1;
    row.shape[1] = N;
    row.strides[0] = N;
    row.strides[1] = call->bias.strides[0];
    bd_matrix matrix = {0};
    if (tensor_to_matrix(&row, "bias", "[1, N]", 1, N, &matrix) < 0) {
        return -1;
    }
    args->bias = matrix.data;
    args->bias_dtype = matrix.dtype;
    return check_overlap(&call->y_matrix, "out", &matrix, "bias");
}

static int
acquire_base_product(module_state *state, PyObject *weight, PyObject *product, product_call *call,
                     bd_linear_args *args)
{
    int64_t M = call->x_matrix.n_rows, N = call->y_matrix.n_columns, K = call->x_matrix.n_columns;
    if (weight != Py_None && product != Py_None) {
        PyErr_SetString(PyExc_ValueError, "product: expected None beside a weight, got both");
        return -1;
    }
    if (weight != Py_None) {
        args->weight = &call->weight_matrix;
        if (acquire_matrix(state, weight, "weight", TENSOR_INPUT, "[N, K]", N, K, &call->weight,
                           &call->weight_matrix) < 0) {
            return -1;
        }
        return check_overlap(&call->y_matrix, "out", &call->weight_matrix, "weight");
    }
    if (product != Py_None) {
        args->product = &call->product_matrix;
        if (acquire_matrix(state, product, "product", TENSOR_INPUT, "[M, N]", M, N, &call->product,
                           &call->product_matrix) < 0 ||
            check_dtype(&call->product, "product", kDLFloat, 32) < 0) {
            return -1;
        }
        return check_overlap(&call->y_matrix, "out", &call->product_matrix, "product");
    }
    return 0;
}

/* y and x, their shapes [M, N] and [M, K], then what depends on those. */
static int
acquire_rows(module_state *state, PyObject *y, const char *y_name, PyObject *x, PyObject *deltas,
             PyObject *tenant_ids, product_call *call)
{
    if (acquire_matrix(state, x, "x", TENSOR_INPUT, "[M, K]", ANY_SIZE, ANY_SIZE, &call->x,
                       &call->x_matrix) < 0 ||
        acquire_matrix(state, y, y_name, TENSOR_OUTPUT, "[M, N]", call->x_matrix.n_rows, ANY_SIZE,
                       &call->y, &call->y_matrix) < 0) {
        return -1;
    }
    int64_t N = call->y_matrix.n_columns, K = call->x_matrix.n_columns;
    if (N < 1 || K < 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected N and K of at least 1, got %lld and %lld",
                     N < 1 ? y_name : "x", (long long)N, (long long)K);
        return -1;
    }
    if (check_overlap(&call->y_matrix, y_name, &call->x_matrix, "x") < 0 ||
        acquire_deltas(state, deltas, N, K, call) < 0 ||
        check_deltas_apart(&call->y_matrix, y_name, call) < 0) {
        return -1;
    }
    return acquire_tenant_ids(state, tenant_ids, call->x_matrix.n_rows, call);
}

static PyObject *
run_linear(module_state *state, product_call *call, bd_linear_args *args)
{
    args->x = &call->x_matrix;
    args->y = &call->y_matrix;
    args->deltas = call->deltas;
    args->n_deltas = call->T;
    args->tenant_ids = call->tenant_ids;
    bd_context ctx = {0};
    bd_status status = BD_OK;
    context_enter(state, &ctx);
    Py_BEGIN_ALLOW_THREADS
        if (call->x_matrix.n_rows > 0) {
            status = bd_linear(&ctx, args);
        }
        context_leave(&ctx);
    Py_END_ALLOW_THREADS
    return return_status(status);
}

static int
parse_precision(PyObject *object, bd_precision *precision)
{
    if (!PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "precision: expected str, got %.80s",
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    if (PyUnicode_CompareWithASCIIString(object, "fixed16") == 0) {
        *precision = BD_FIXED16;
        return 0;
    }
    if (PyUnicode_CompareWithASCIIString(object, "float32") == 0) {
        *precision = BD_FLOAT32;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "precision: expected 'fixed16' or 'float32', got %R", object);
    return -1;
}

PyDoc_STRVAR(
    linear_doc,
    "linear($module, out, x, weight, product, bias, deltas, tenant_ids, precision, /)\n--\n\n"
    "out = the rows' delta terms + x weight^T (or product, or nothing) + bias.");

static PyObject *
py_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    product_call call = {0};
    bd_linear_args core = {0};
    PyObject *result = NULL;
    if (check_n_arguments("linear", nargs, 8, 8) < 0 ||
        parse_precision(args[7], &core.precision) < 0) {
        return NULL;
    }
    if (acquire_rows(state, args[0], "out", args[1], args[5], args[6], &call) == 0 &&
        acquire_base_product(state, args[2], args[3], &call, &core) == 0 &&
        (args[4] == Py_None ||
         acquire_bias(state, args[4], call.y_matrix.n_columns, &call, &core) == 0)) {
        result = run_linear(state, &call, &core);
    }
    release_call(&call);
    return result;
}

PyDoc_STRVAR(linear_add_doc,
             "linear_add($module, y, x, deltas, tenant_ids, /)\n--\n\n"
             "y += the rows' delta terms; rows of -1 stay as they are.");

static PyObject *
py_linear_add(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    product_call call = {0};
    bd_linear_args core = {.add = 1, .precision = BD_FIXED16};
    PyObject *result = NULL;
    if (check_n_arguments("linear_add", nargs, 4, 4) < 0) {
        return NULL;
    }
    if (acquire_rows(state, args[0], "y", args[1], args[2], args[3], &call) == 0) {
        result = run_linear(state, &call, &core);
    }
    release_call(&call);
    return result;
}

PyDoc_STRVAR(linear_transposed_doc,
             "linear_transposed($module, out, dy, deltas, tenant_ids, /)\n--\n\n"
             "out = the rows' delta terms of dy [M, N], over n: [M, K]; rows of -1 are zero.");

static PyObject *
py_linear_transposed(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    product_call call = {0};
    PyObject *result = NULL;
    if (check_n_arguments("linear_transposed", nargs, 4, 4) < 0) {
        return NULL;
    }
    if (acquire_matrix(state, args[1], "dy", TENSOR_INPUT, "[M, N]", ANY_SIZE, ANY_SIZE, &call.x,
                       &call.x_matrix) < 0 ||
        acquire_matrix(state, args[0], "out", TENSOR_OUTPUT, "[M, K]", call.x_matrix.n_rows,
                       ANY_SIZE, &call.y, &call.y_matrix) < 0) {
        goto done;
    }
    int64_t M = call.x_matrix.n_rows, N = call.x_matrix.n_columns, K = call.y_matrix.n_columns;
    if (N < 1 || K < 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected N and K of at least 1, got %lld and %lld",
                     N < 1 ? "dy" : "out", (long long)N, (long long)K);
        goto done;
    }
    if (check_overlap(&call.y_matrix, "out", &call.x_matrix, "dy") < 0 ||
        acquire_deltas(state, args[2], N, K, &call) < 0 ||
        check_deltas_apart(&call.y_matrix, "out", &call) < 0 ||
        acquire_tenant_ids(state, args[3], M, &call) < 0) {
        goto done;
    }
    bd_context ctx = {0};
    bd_status status = BD_OK;
    context_enter(state, &ctx);
    Py_BEGIN_ALLOW_THREADS
        if (M > 0) {
            status = bd_linear_transposed(&ctx, &call.x_matrix, call.deltas, call.T,
                                          call.tenant_ids, &call.y_matrix);
        }
        context_leave(&ctx);
    Py_END_ALLOW_THREADS
    result = return_status(status);

done:
    release_call(&call);
    return result;
}

PyMethodDef product_functions[] = {
    {"linear", (PyCFunction)(void (*)(void))py_linear, METH_FASTCALL, linear_doc},
    {"linear_add", (PyCFunction)(void (*)(void))py_linear_add, METH_FASTCALL, linear_add_doc},
    {"linear_transposed", (PyCFunction)(void (*)(void))py_linear_transposed, METH_FASTCALL,
     linear_transposed_doc},
    {NULL, NULL, 0, NULL},
};
