/* py_delta.c - the type Delta, and extract and expand.
 *
 * A Delta is checked once, when it is made, and holds the memory of its tensors from then on. */
#include "module.h"

#include <string.h>

#include "tensor.h"

#define LINE_BYTES 64 /* signs are read by aligned lines */

typedef struct {
    PyObject_HEAD bd_delta view;
    tensor sign, scale, column; /* own what the view points into */
} delta_object;

/* The size of the planes in bytes fits int64, and so do all offsets into them. */
static int
check_sizes(int64_t N, int64_t K)
{
    int64_t n = 0;
    if (N < 1 || K < 1) {
        PyErr_Format(PyExc_ValueError, "shape: expected (N, K) of at least 1, got (%lld, %lld)",
                     (long long)N, (long long)K);
        return -1;
    }
    if (N > INT64_MAX - BD_STRIP_ROWS || K > INT64_MAX / 8 ||
        __builtin_mul_overflow(bd_n_strips(N), bd_n_lines(K), &n) ||
        __builtin_mul_overflow(n, (int64_t)(LINE_BYTES * BD_MAX_PLANES), &n)) {
        PyErr_Format(PyExc_ValueError, "shape: the size in bytes of (%lld, %lld) overflows",
                     (long long)N, (long long)K);
        return -1;
    }
    return 0;
}

static int
acquire_sign(module_state *state, PyObject *object, int mode, int64_t P, int64_t N, int64_t K,
             tensor *out)
{
    const int64_t shape[] = {P, bd_n_strips(N), bd_n_lines(K), BD_STRIP_ROWS};
    if (tensor_acquire(state, object, "sign", mode, out) < 0 ||
        check_dtype(out, "sign", kDLUInt, 32) < 0 ||
        check_shape(out, "sign", "[P, S, L, 16]", 4, shape) < 0) {
        return -1;
    }
    return check_contiguous(out, "sign", LINE_BYTES);
}

static int
acquire_floats(module_state *state, PyObject *object, const char *name, const char *letters,
               int mode, int ndim, const int64_t *shape, tensor *out)
{
    if (tensor_acquire(state, object, name, mode, out) < 0 ||
        check_dtype(out, name, kDLFloat, 32) < 0 ||
        check_shape(out, name, letters, ndim, shape) < 0) {
        return -1;
    }
    return check_contiguous(out, name, (int64_t)sizeof(float));
}

/* ---- Delta ---- */

static void
delta_dealloc(delta_object *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    tensor_release(&self->sign);
    tensor_release(&self->scale);
    tensor_release(&self->column);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static int
delta_traverse(delta_object *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->sign.owner);
    Py_VISIT(self->scale.owner);
    Py_VISIT(self->column.owner);
    return 0; /* no clear: a Delta never changes, and its memory may be in use without the GIL */
}

static int
delta_fill(module_state *state, delta_object *self, PyObject *sign, PyObject *scale,
           PyObject *column, int64_t N, int64_t K)
{
    if (check_sizes(N, K) < 0 ||
        acquire_sign(state, sign, TENSOR_KEEP, ANY_SIZE, N, K, &self->sign) < 0) {
        return -1;
    }
    int64_t P = self->sign.shape[0];
    if (P < 1 || P > BD_MAX_PLANES) {
        PyErr_Format(PyExc_ValueError, "sign: expected 1 .. %d planes, got %lld", BD_MAX_PLANES,
                     (long long)P);
        return -1;
    }
    const int64_t row_shape[] = {P, N}, column_shape[] = {P, K};
    if (acquire_floats(state, scale, "scale", "[P, N]", TENSOR_KEEP, 2, row_shape, &self->scale) <
        0) {
        return -1;
    }
    if (column != Py_None && acquire_floats(state, column, "column", "[P, K]", TENSOR_KEEP, 2,
                                            column_shape, &self->column) < 0) {
        return -1;
    }
    self->view = (bd_delta){.sign = self->sign.data,
                            .row = self->scale.data,
                            .column = self->column.data,
                            .N = N,
                            .K = K,
                            .P = (int)P};
    return 0;
}

PyDoc_STRVAR(
    delta_doc,
    "Delta(sign, scale, column, shape, /)\n--\n\n"
    "A checked view of one delta: sign uint32 [P, S, L, 16], scale fp32 [P, N], column fp32\n"
    "[P, K] or None, shape (N, K). Holds the memory; copies nothing.");

static PyObject *
delta_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *sign = NULL, *scale = NULL, *column = NULL, *n_rows = NULL, *n_columns = NULL;
    int64_t N = 0, K = 0;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "Delta: expected positional arguments only");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOO(OO):Delta", &sign, &scale, &column, &n_rows, &n_columns) ||
        parse_int(n_rows, "shape", 1, INT64_MAX, &N) < 0 ||
        parse_int(n_columns, "shape", 1, INT64_MAX, &K) < 0) {
        return NULL;
    }
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL) {
        return NULL;
    }
    delta_object *self = (delta_object *)type->tp_alloc(type, 0);
    if (self != NULL && delta_fill(state, self, sign, scale, column, N, K) < 0) {
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static PyObject *
delta_get_planes(delta_object *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(self->view.P);
}

static PyObject *
delta_get_shape(delta_object *self, void *Py_UNUSED(closure))
{
    return Py_BuildValue("(LL)", (long long)self->view.N, (long long)self->view.K);
}

static PyGetSetDef delta_getset[] = {
    {"planes", (getter)(void (*)(void))delta_get_planes, NULL, "P", NULL},
    {"shape", (getter)(void (*)(void))delta_get_shape, NULL, "(N, K)", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot delta_slots[] = {
    {Py_tp_doc, (void *)delta_doc},         {Py_tp_new, (void *)delta_new},
    {Py_tp_dealloc, (void *)delta_dealloc}, {Py_tp_traverse, (void *)delta_traverse},
    {Py_tp_getset, delta_getset},           {0, NULL},
};

PyType_Spec delta_spec = {
    .name = "bitdelta._C.Delta",
    .basicsize = sizeof(delta_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = delta_slots,
};

const bd_delta *
delta_view(module_state *state, PyObject *object, const char *name)
{
    if (!Py_IS_TYPE(object, state->delta_type)) {
        PyErr_Format(PyExc_TypeError, "%s: expected bitdelta._C.Delta, got %.80s", name,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    return &((delta_object *)object)->view;
}

int
check_delta_apart(const bd_matrix *output, const char *output_name, const bd_delta *delta,
                  const char *name)
{
    const int64_t P = delta->P, words = bd_plane_words(delta->N, delta->K);
    const bd_matrix parts[] = {
        {(void *)(uintptr_t)delta->sign, BD_F32, P, words, words},
        {(void *)(uintptr_t)delta->row, BD_F32, P, delta->N, delta->N},
        {(void *)(uintptr_t)delta->column, BD_F32, delta->column == NULL ? 0 : P, delta->K,
         delta->K},
    };
    for (int i = 0; i < 3; i++) {
        if (check_overlap(output, output_name, &parts[i], name) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- extract ---- */

typedef struct {
    tensor base, finetuned, sign, scale, column;
    bd_matrix base_matrix, finetuned_matrix;
    bd_scale_form form;
    int P;
} extraction;

static int
parse_form(PyObject *object, bd_scale_form *form)
{
    static const char *const names[] = {
        [BD_SCALE_TENSOR] = "tensor", [BD_SCALE_ROW] = "row", [BD_SCALE_RANK1] = "rank1"};
    if (!PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "form: expected str, got %.80s", Py_TYPE(object)->tp_name);
        return -1;
    }
    for (int i = 0; i < 3; i++) {
        if (PyUnicode_CompareWithASCIIString(object, names[i]) == 0) {
            *form = (bd_scale_form)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "form: expected 'tensor', 'row' or 'rank1', got %R", object);
    return -1;
}

/* The outputs; shapes by form. */
static int
acquire_outputs(module_state *state, PyObject *sign, PyObject *scale, PyObject *column,
                extraction *job)
{
    int64_t P = job->P, N = job->base_matrix.n_rows, K = job->base_matrix.n_columns;
    const int64_t row_shape[] = {P, N}, column_shape[] = {P, K};
    int is_tensor = job->form == BD_SCALE_TENSOR;
    if (acquire_sign(state, sign, TENSOR_OUTPUT, P, N, K, &job->sign) < 0 ||
        acquire_floats(state, scale, "scale", is_tensor ? "[P]" : "[P, N]", TENSOR_OUTPUT,
                       is_tensor ? 1 : 2, row_shape, &job->scale) < 0) {
        return -1;
    }
    if (job->form == BD_SCALE_RANK1) {
        return acquire_floats(state, column, "column", "[P, K]", TENSOR_OUTPUT, 2, column_shape,
                              &job->column);
    }
    if (column != Py_None) {
        PyErr_Format(PyExc_ValueError, "column: expected None unless form is 'rank1', got %.80s",
                     Py_TYPE(column)->tp_name);
        return -1;
    }
    return 0;
}

static int
check_outputs_apart(const extraction *job)
{
    static const char *const names[] = {"sign", "scale", "column"};
    const bd_matrix outputs[] = {tensor_extent(&job->sign), tensor_extent(&job->scale),
                                 tensor_extent(&job->column)};
    for (int i = 0; i < 3; i++) {
        if (check_overlap(&outputs[i], names[i], &job->base_matrix, "base") < 0 ||
            check_overlap(&outputs[i], names[i], &job->finetuned_matrix, "finetuned") < 0) {
            return -1;
        }
        for (int j = 0; j < i; j++) {
            if (check_overlap(&outputs[i], names[i], &outputs[j], names[j]) < 0) {
                return -1;
            }
        }
    }
    return 0;
}

static int
extraction_acquire(module_state *state, PyObject *const *args, extraction *job)
{
    int64_t planes = 0;
    if (parse_int(args[2], "planes", 1, BD_MAX_PLANES, &planes) < 0 ||
        parse_form(args[3], &job->form) < 0) {
        return -1;
    }
    job->P = (int)planes;
    if (tensor_acquire(state, args[0], "base", TENSOR_INPUT, &job->base) < 0 ||
        tensor_to_matrix(&job->base, "base", "[N, K]", ANY_SIZE, ANY_SIZE, &job->base_matrix) < 0 ||
        check_nonempty(&job->base_matrix, "base", "[N, K]") < 0 ||
        check_sizes(job->base_matrix.n_rows, job->base_matrix.n_columns) < 0) {
        return -1;
    }
    if (tensor_acquire(state, args[1], "finetuned", TENSOR_INPUT, &job->finetuned) < 0 ||
        tensor_to_matrix(&job->finetuned, "finetuned", "[N, K]", job->base_matrix.n_rows,
                         job->base_matrix.n_columns, &job->finetuned_matrix) < 0) {
        return -1;
    }
    if (acquire_outputs(state, args[4], args[5], args[6], job) < 0) {
        return -1;
    }
    return check_outputs_apart(job);
}

static void
raise_nonfinite(const bd_position *bad)
{
    const char *what = bad->in_base == 1 ? "base: expected finite weights, got NaN or Inf"
                       : bad->in_base == 0
                           ? "finetuned: expected finite weights, got NaN or Inf"
                           : "finetuned - base: expected differences within fp32, got one beyond";
    PyErr_Format(PyExc_ValueError, "%s at [%lld, %lld]", what, (long long)bad->row,
                 (long long)bad->column);
}

PyDoc_STRVAR(
    extract_doc,
    "extract($module, base, finetuned, planes, form, sign, scale, column, checksum, /)\n--\n\n"
    "Writes sign, scale and column of finetuned - base; returns base's CRC-32C or None.");

static PyObject *
py_extract(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    extraction job = {0};
    PyObject *result = NULL;
    if (check_n_arguments("extract", nargs, 8, 8) < 0) {
        return NULL;
    }
    int checksum = 0;
    if (parse_bool(args[7], "checksum", &checksum) < 0 ||
        extraction_acquire(state, args, &job) < 0) {
        goto done;
    }
    bd_context ctx = {0};
    bd_position bad = {0};
    uint32_t crc = 0;
    bd_status status = BD_OK;
    context_enter(state, &ctx);
    Py_BEGIN_ALLOW_THREADS
        status = bd_extract(&ctx, &job.base_matrix, &job.finetuned_matrix, job.P, job.form,
                            job.sign.data, job.scale.data, job.column.data, checksum ? &crc : NULL,
                            &bad);
        context_leave(&ctx);
    Py_END_ALLOW_THREADS
    if (status == BD_ERR_NONFINITE) {
        raise_nonfinite(&bad);
    } else if (status != BD_OK || !checksum) {
        result = return_status(status);
    } else {
        result = PyLong_FromUnsignedLong(crc);
    }

done:
    tensor_release(&job.base);
    tensor_release(&job.finetuned);
    tensor_release(&job.sign);
    tensor_release(&job.scale);
    tensor_release(&job.column);
    return result;
}

/* ---- expand ---- */

/* Whether out is base itself, all of it: the one overlap that expand allows. */
static int
is_in_place(const bd_matrix *out, const bd_matrix *base)
{
    return out->data == base->data && out->dtype == base->dtype &&
           out->row_stride == base->row_stride && out->n_rows == base->n_rows;
}

PyDoc_STRVAR(
    expand_doc,
    "expand($module, out, base, delta, row_begin, row_end, /)\n--\n\n"
    "out = round(base + delta), rows row_begin .. row_end - 1; base may be None, or be out.");

static PyObject *
py_expand(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    tensor out = {0}, base = {0};
    bd_matrix out_matrix = {0}, base_matrix = {0};
    int64_t begin = 0, end = 0;
    PyObject *result = NULL;
    if (check_n_arguments("expand", nargs, 5, 5) < 0) {
        return NULL;
    }
    const bd_delta *delta = delta_view(state, args[2], "delta");
    if (delta == NULL || parse_int(args[3], "row_begin", 0, delta->N, &begin) < 0 ||
        parse_int(args[4], "row_end", begin, delta->N, &end) < 0) {
        return NULL;
    }
    if (tensor_acquire(state, args[0], "out", TENSOR_OUTPUT, &out) < 0 ||
        tensor_to_matrix(&out, "out", "[row_end - row_begin, K]", end - begin, delta->K,
                         &out_matrix) < 0 ||
        check_delta_apart(&out_matrix, "out", delta, "delta") < 0) {
        goto done;
    }
    if (args[1] != Py_None) {
        if (tensor_acquire(state, args[1], "base", TENSOR_INPUT, &base) < 0 ||
            tensor_to_matrix(&base, "base", "[N, K]", delta->N, delta->K, &base_matrix) < 0) {
            goto done;
        }
        if (!is_in_place(&out_matrix, &base_matrix) &&
            check_overlap(&out_matrix, "out", &base_matrix, "base") < 0) {
            goto done;
        }
    }
    bd_context ctx = {0};
    bd_status status = BD_OK;
    context_enter(state, &ctx);
    Py_BEGIN_ALLOW_THREADS
        if (begin < end) {
            status = bd_expand(&ctx, args[1] == Py_None ? NULL : &base_matrix, delta, begin, end,
                               &out_matrix);
        }
        context_leave(&ctx);
    Py_END_ALLOW_THREADS
    result = return_status(status);

done:
    tensor_release(&out);
    tensor_release(&base);
    return result;
}

PyMethodDef delta_functions[] = {
    {"extract", (PyCFunction)(void (*)(void))py_extract, METH_FASTCALL, extract_doc},
    {"expand", (PyCFunction)(void (*)(void))py_expand, METH_FASTCALL, expand_doc},
    {NULL, NULL, 0, NULL},
};
