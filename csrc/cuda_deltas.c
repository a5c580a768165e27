/* cuda_deltas.c - the type CudaDeltas: tenants' deltas of one weight, and their table on the GPU. */
#include "module.h"

#if BITDELTA_CUDA_KIND

#include "cuda_call.h"

#define N_PARTS 3 /* sign, scale, column */

static size_t
lent_bytes(const tensor *view)
{
    return (size_t)tensor_n_bytes(view);
}

static void
deltas_dealloc(cuda_deltas *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    for (int64_t i = 0; i < self->n_lent; i++) {
        bd_gpu_take_back(self->tensors[i].data, lent_bytes(&self->tensors[i]), 0);
    }
    for (int64_t i = 0; i < self->n_tensors; i++) {
        tensor_release(&self->tensors[i]);
    }
    PyMem_Free(self->tensors);
    PyMem_Free(self->slots);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static int
deltas_traverse(cuda_deltas *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    for (int64_t i = 0; i < self->n_tensors; i++) {
        Py_VISIT(self->tensors[i].owner);
    }
    return 0; /* no clear: as Delta */
}

/* The next tensor, compact, on the GPU of the table; NULL with an exception. */
static tensor *
next_tensor(module_state *state, cuda_deltas *self, PyObject *object, const char *name, int mode,
            int64_t alignment, const char *letters, int ndim, const int64_t *shape,
            DLDataTypeCode code, int bits)
{
    tensor *view = &self->tensors[self->n_tensors];
    if (tensor_acquire(state, object, name, mode | TENSOR_GPU | TENSOR_KEEP, view) < 0) {
        return NULL;
    }
    self->n_tensors++;
    if (check_dtype(view, name, code, bits) < 0 ||
        check_shape(view, name, letters, ndim, shape) < 0 ||
        check_contiguous(view, name, alignment) < 0) {
        return NULL;
    }
    if (view->device != self->tensors[0].device) {
        raise_device_error("%s: expected memory of GPU %d, as the table, got GPU %d", name,
                           self->tensors[0].device, view->device);
        return NULL;
    }
    return view;
}

static int
fill_slot(module_state *state, cuda_deltas *self, PyObject *parts, bd_cuda_delta *slot)
{
    *slot = (bd_cuda_delta){.P = -1};
    if (parts == Py_None) {
        return 0; /* an empty slot */
    }
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) != N_PARTS) {
        PyErr_Format(PyExc_TypeError, "deltas: expected (sign, scale, column) or None, got %.80s",
                     Py_TYPE(parts)->tp_name);
        return -1;
    }
    const int64_t sign_shape[] = {ANY_SIZE, bd_n_strips(self->N), bd_n_lines(self->K),
                                  BD_STRIP_ROWS};
    const tensor *sign = next_tensor(state, self, PyTuple_GET_ITEM(parts, 0), "sign", 0, 64,
                                     "[P, S, L, 16]", 4, sign_shape, kDLUInt, 32);
    if (sign == NULL) {
        return -1;
    }
    const int64_t P = sign->shape[0];
    if (P < 1 || P > BD_MAX_PLANES) {
        PyErr_Format(PyExc_ValueError, "sign: expected 1 .. %d planes, got %lld", BD_MAX_PLANES,
                     (long long)P);
        return -1;
    }
    const int64_t row_shape[] = {P, self->N}, column_shape[] = {P, self->K};
    const tensor *row = next_tensor(state, self, PyTuple_GET_ITEM(parts, 1), "scale", 0, 4,
                                    "[P, N]", 2, row_shape, kDLFloat, 32);
    const tensor *column = NULL;
    PyObject *given = PyTuple_GET_ITEM(parts, 2);
    if (row == NULL ||
        (given != Py_None && (column = next_tensor(state, self, given, "column", 0, 4, "[P, K]", 2,
                                                   column_shape, kDLFloat, 32)) == NULL)) {
        return -1;
    }
    *slot = (bd_cuda_delta){sign->data, row->data, column == NULL ? NULL : column->data, P};
    self->max_planes = P > self->max_planes ? (int)P : self->max_planes;
    self->has_columns |= column != NULL;
    return 0;
}

/* Lends everything to emulated kernels for as long as this lives, and writes the table. */
static int
put_table(cuda_deltas *self)
{
    const tensor *table = &self->tensors[0];
    bd_cuda_context ctx;
    int before = 0;
    bd_status status = BD_OK;
    if (bd_gpu_is_captured(table->stream)) {
        raise_device_error(
            "deltas: their table is written and waited for, which cannot happen while "
            "the stream is captured: make it before");
        return -1;
    }
    while (status == BD_OK && self->n_lent < self->n_tensors) {
        const tensor *view = &self->tensors[self->n_lent];
        status = bd_gpu_lend(view->data, lent_bytes(view), 0);
        self->n_lent += status == BD_OK;
    }
    Py_BEGIN_ALLOW_THREADS
        if (status == BD_OK) {
            status = bd_gpu_enter(table->device, &before, &ctx.capability, &ctx.n_processors);
        }
        if (status == BD_OK) {
            status = bd_gpu_put(table->data, self->slots, (size_t)self->T * sizeof *self->slots,
                                table->stream);
            bd_gpu_leave(before);
        }
    Py_END_ALLOW_THREADS
    PyObject *none = cuda_return_status(status);
    Py_XDECREF(none);
    return none == NULL ? -1 : 0;
}

static int
fill(module_state *state, cuda_deltas *self, PyObject *table, PyObject *deltas)
{
    self->T = PyTuple_GET_SIZE(deltas);
    if (self->T < 1 || self->T > BD_CUDA_MAX_TENANTS) {
        PyErr_Format(PyExc_ValueError, "deltas: expected 1 .. %d slots, got %lld",
                     BD_CUDA_MAX_TENANTS, (long long)self->T);
        return -1;
    }
    const size_t T = (size_t)self->T;
    const int64_t table_shape[] = {self->T, (int64_t)(sizeof(bd_cuda_delta) / sizeof(int64_t))};
    self->slots = PyMem_New(bd_cuda_delta, T);
    self->tensors = PyMem_Calloc(N_PARTS * T + 1, sizeof(tensor));
    if (self->slots == NULL || self->tensors == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    int status = next_tensor(state, self, table, "table", TENSOR_OUTPUT, 16, "[T, 4]", 2,
                             table_shape, kDLInt, 64) == NULL
                     ? -1
                     : 0;
    for (int64_t t = 0; t < self->T && status == 0; t++) {
        status = fill_slot(state, self, PyTuple_GET_ITEM(deltas, t), &self->slots[t]);
    }
    return status == 0 ? put_table(self) : -1;
}

PyDoc_STRVAR(
    deltas_doc,
    "CudaDeltas(table, deltas, shape, /)\n--\n\n"
    "Deltas of one shape (N, K) on a GPU: a tuple of (sign, scale, column or None), None an\n"
    "empty slot. Writes where they are to table, int64 [T, 4], and holds all of them.");

static PyObject *
deltas_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *table = NULL, *deltas = NULL, *n_rows = NULL, *n_columns = NULL;
    int64_t N = 0, K = 0;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "CudaDeltas: expected positional arguments only");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OO!(OO):CudaDeltas", &table, &PyTuple_Type, &deltas, &n_rows,
                          &n_columns) ||
        parse_int(n_rows, "shape", 1, BD_CUDA_MAX_COLUMNS, &N) < 0 ||
        parse_int(n_columns, "shape", 1, BD_CUDA_MAX_COLUMNS, &K) < 0 || cuda_require() < 0) {
        return NULL;
    }
    module_state *state = PyType_GetModuleState(type);
    cuda_deltas *self = state == NULL ? NULL : (cuda_deltas *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->N = N;
        self->K = K;
        self->max_planes = 1;
        if (fill(state, self, table, deltas) < 0) {
            Py_CLEAR(self);
        }
    }
    return (PyObject *)self;
}

static PyObject *
deltas_get_shape(cuda_deltas *self, void *Py_UNUSED(closure))
{
    return Py_BuildValue("(LL)", (long long)self->N, (long long)self->K);
}

static PyObject *
deltas_get_planes(cuda_deltas *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(self->max_planes);
}

static PyObject *
deltas_get_has_columns(cuda_deltas *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->has_columns);
}

static Py_ssize_t
deltas_length(cuda_deltas *self)
{
    return (Py_ssize_t)self->T;
}

static PyGetSetDef deltas_getset[] = {
    {"shape", (getter)(void (*)(void))deltas_get_shape, NULL, "(N, K)", NULL},
    {"planes", (getter)(void (*)(void))deltas_get_planes, NULL, "The most of a slot", NULL},
    {"has_columns", (getter)(void (*)(void))deltas_get_has_columns, NULL, "Any slot's", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot deltas_slots[] = {
    {Py_tp_doc, (void *)deltas_doc},
    {Py_tp_new, (void *)deltas_new},
    {Py_tp_dealloc, (void *)deltas_dealloc},
    {Py_tp_traverse, (void *)deltas_traverse},
    {Py_tp_getset, deltas_getset},
    {Py_sq_length, (void *)deltas_length},
    {0, NULL},
};

PyType_Spec cuda_deltas_spec = {
    .name = "bitdelta._C.CudaDeltas",
    .basicsize = sizeof(cuda_deltas),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = deltas_slots,
};

const cuda_deltas *
cuda_deltas_view(module_state *state, const cuda_call *call, PyObject *object, const char *name)
{
    if (!Py_IS_TYPE(object, state->cuda_deltas_type)) {
        PyErr_Format(PyExc_TypeError, "%s: expected bitdelta._C.CudaDeltas, got %.80s", name,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    const cuda_deltas *deltas = (const cuda_deltas *)object;
    if (deltas->tensors[0].device != call->tensors[0].device) {
        raise_device_error("%s: expected memory of GPU %d, as the tensors before it, got GPU %d",
                           name, call->tensors[0].device, deltas->tensors[0].device);
        return NULL;
    }
    return deltas;
}

#endif
