/* py_calibrate.c - fit_signs and sweep. */
#include "module.h"

#include "tensor.h"

typedef struct {
    tensor d, factor, order, row, column, sign;
    bd_matrix matrix;
    bd_fit_args args;
} fitting;

/* A contiguous input; None is empty where that is allowed. */
static int
acquire(module_state *state, PyObject *object, const char *name, const char *letters, int ndim,
        const int64_t *shape, DLDataTypeCode code, int bits, tensor *out)
{
    if (tensor_acquire(state, object, name, TENSOR_INPUT, out) < 0 ||
        check_dtype(out, name, code, bits) < 0 ||
        check_shape(out, name, letters, ndim, shape) < 0) {
        return -1;
    }
    return check_contiguous(out, name, bits / 8);
}

static int
acquire_d(module_state *state, PyObject *object, fitting *job)
{
    if (tensor_acquire(state, object, "d", TENSOR_INPUT, &job->d) < 0 ||
        check_dtype(&job->d, "d", kDLFloat, 32) < 0 ||
        tensor_to_matrix(&job->d, "d", "[N, K]", ANY_SIZE, ANY_SIZE, &job->matrix) < 0) {
        return -1;
    }
    return check_nonempty(&job->matrix, "d", "[N, K]");
}

/* row, column (or None) and sign: three arguments in a row. */
typedef struct {
    int64_t N, K;
    tensor *row, *column, *sign;
} fitting_scales;

static int
acquire_scales(module_state *state, PyObject *const *args, const fitting_scales *scales)
{
    const int64_t N = scales->N, K = scales->K, row_shape[] = {ANY_SIZE, N};
    if (acquire(state, args[0], "row", "[P, N]", 2, row_shape, kDLFloat, 32, scales->row) < 0) {
        return -1;
    }
    const int64_t P = scales->row->shape[0], column_shape[] = {P, K};
    if (P < 1 || P > BD_MAX_PLANES) {
        PyErr_Format(PyExc_ValueError, "row: expected 1 .. %d planes, got %lld", BD_MAX_PLANES,
                     (long long)P);
        return -1;
    }
    if (args[1] != Py_None && acquire(state, args[1], "column", "[P, K]", 2, column_shape, kDLFloat,
                                      32, scales->column) < 0) {
        return -1;
    }
    const int64_t sign_shape[] = {P, bd_n_strips(N), bd_n_lines(K), BD_STRIP_ROWS};
    if (tensor_acquire(state, args[2], "sign", TENSOR_OUTPUT, scales->sign) < 0 ||
        check_dtype(scales->sign, "sign", kDLUInt, 32) < 0 ||
        check_shape(scales->sign, "sign", "[P, S, L, 16]", 4, sign_shape) < 0) {
        return -1;
    }
    return check_contiguous(scales->sign, "sign", 64);
}

static int
check_apart(const fitting *job)
{
    static const char *const names[] = {"factor", "order", "row", "column"};
    const bd_matrix sign = tensor_extent(&job->sign);
    const bd_matrix inputs[] = {tensor_extent(&job->factor), tensor_extent(&job->order),
                                tensor_extent(&job->row), tensor_extent(&job->column)};
    for (int i = 0; i < 4; i++) {
        if (check_overlap(&sign, "sign", &inputs[i], names[i]) < 0) {
            return -1;
        }
    }
    return check_overlap(&sign, "sign", &job->matrix, "d");
}

static int
fitting_acquire(module_state *state, PyObject *const *args, fitting *job)
{
    if (acquire_d(state, args[0], job) < 0) {
        return -1;
    }
    const int64_t K = job->matrix.n_columns, square[] = {K, K};
    const fitting_scales scales = {job->matrix.n_rows, K, &job->row, &job->column, &job->sign};
    if (args[1] != Py_None &&
        acquire(state, args[1], "factor", "[K, K]", 2, square, kDLFloat, 32, &job->factor) < 0) {
        return -1;
    }
    if (acquire(state, args[2], "order", "[K]", 1, square, kDLInt, 64, &job->order) < 0 ||
        acquire_scales(state, args + 3, &scales) < 0) {
        return -1;
    }
    job->args = (bd_fit_args){.d = &job->matrix,
                              .factor = job->factor.data,
                              .order = job->order.data,
                              .P = (int)job->row.shape[0],
                              .row = job->row.data,
                              .column = job->column.data,
                              .sign = job->sign.data};
    return check_apart(job);
}

PyDoc_STRVAR(fit_signs_doc,
             "fit_signs($module, d, factor, order, row, column, sign, /)\n--\n\n"
             "Writes the signs fitted to the inputs that factor stands for, for given scales.");

static PyObject *
py_fit_signs(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    fitting job = {0};
    PyObject *result = NULL;
    if (check_n_arguments("fit_signs", nargs, 6, 6) < 0) {
        return NULL;
    }
    if (fitting_acquire(state, args, &job) == 0) {
        bd_context ctx = {0};
        bd_status status = BD_OK;
        context_enter(state, &ctx);
        Py_BEGIN_ALLOW_THREADS
            status = bd_fit_signs(&ctx, &job.args);
            context_leave(&ctx);
        Py_END_ALLOW_THREADS
        if (status == BD_ERR_ARGUMENT) {
            PyErr_Format(PyExc_ValueError, "order: expected columns 0 .. %lld",
                         (long long)(job.matrix.n_columns - 1));
        } else {
            result = return_status(status);
        }
    }
    tensor_release(&job.d);
    tensor_release(&job.factor);
    tensor_release(&job.order);
    tensor_release(&job.row);
    tensor_release(&job.column);
    tensor_release(&job.sign);
    return result;
}

/* ---- sweep ------------------------------------------------------------------------------------ */

typedef struct {
    tensor pull, hessian, row, column, sign;
    bd_sweep_args args;
} sweeping;

static int
acquire_hessian(module_state *state, PyObject *object, int64_t K, sweeping *job)
{
    const int64_t shape[] = {K, K};
    if (tensor_acquire(state, object, "hessian", TENSOR_INPUT, &job->hessian) < 0 ||
        check_dtype(&job->hessian, "hessian", kDLFloat, 32) < 0) {
        return -1;
    }
    job->args.is_diagonal = job->hessian.ndim == 1;
    if (check_shape(&job->hessian, "hessian", job->args.is_diagonal ? "[K]" : "[K, K]",
                    job->args.is_diagonal ? 1 : 2, shape) < 0) {
        return -1;
    }
    return check_contiguous(&job->hessian, "hessian", 4);
}

static int
sweeping_acquire(module_state *state, PyObject *const *args, sweeping *job)
{
    static const int64_t any[] = {ANY_SIZE, ANY_SIZE};
    if (tensor_acquire(state, args[0], "pull", TENSOR_OUTPUT, &job->pull) < 0 ||
        check_dtype(&job->pull, "pull", kDLFloat, 32) < 0 ||
        check_shape(&job->pull, "pull", "[N, K]", 2, any) < 0 ||
        check_contiguous(&job->pull, "pull", 4) < 0) {
        return -1;
    }
    const int64_t N = job->pull.shape[0], K = job->pull.shape[1];
    const fitting_scales scales = {N, K, &job->row, &job->column, &job->sign};
    if (acquire_hessian(state, args[1], K, job) < 0 ||
        acquire_scales(state, args + 2, &scales) < 0) {
        return -1;
    }
    job->args.pull = job->pull.data;
    job->args.hessian = job->hessian.data;
    job->args.N = N;
    job->args.K = K;
    job->args.P = (int)job->row.shape[0];
    job->args.row = job->row.data;
    job->args.column = job->column.data;
    job->args.sign = job->sign.data;
    static const char *const names[] = {"hessian", "row", "column"};
    const bd_matrix inputs[] = {tensor_extent(&job->hessian), tensor_extent(&job->row),
                                tensor_extent(&job->column)};
    const bd_matrix sign = tensor_extent(&job->sign), pull = tensor_extent(&job->pull);
    for (int i = 0; i < 3; i++) {
        if (check_overlap(&sign, "sign", &inputs[i], names[i]) < 0 ||
            check_overlap(&pull, "pull", &inputs[i], names[i]) < 0) {
            return -1;
        }
    }
    return check_overlap(&sign, "sign", &pull, "pull");
}

PyDoc_STRVAR(sweep_doc,
             "sweep($module, pull, hessian, row, column, sign, /)\n--\n\n"
             "Moves the signs, column after column, where that lowers the error.");

static PyObject *
py_sweep(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    sweeping job = {0};
    PyObject *result = NULL;
    if (check_n_arguments("sweep", nargs, 5, 5) < 0) {
        return NULL;
    }
    if (sweeping_acquire(state, args, &job) == 0) {
        bd_context ctx = {0};
        bd_status status = BD_OK;
        context_enter(state, &ctx);
        Py_BEGIN_ALLOW_THREADS
            status = bd_sweep(&ctx, &job.args);
            context_leave(&ctx);
        Py_END_ALLOW_THREADS
        result = return_status(status);
    }
    tensor_release(&job.pull);
    tensor_release(&job.hessian);
    tensor_release(&job.row);
    tensor_release(&job.column);
    tensor_release(&job.sign);
    return result;
}

PyMethodDef calibrate_functions[] = {
    {"fit_signs", (PyCFunction)(void (*)(void))py_fit_signs, METH_FASTCALL, fit_signs_doc},
    {"sweep", (PyCFunction)(void (*)(void))py_sweep, METH_FASTCALL, sweep_doc},
    {NULL, NULL, 0, NULL},
};
