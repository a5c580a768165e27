/* tensor_dlpack.c - views by DLPack: the C exchange API of the type, then __dlpack__ with a versioned
 * or a legacy capsule.
 *
 * The exchange API makes no checks (torch's hands out data of tensors that need gradients or whose
 * values are lazily negated), so they are made here. A capsule is renamed to used_* once everything
 * about it is understood; from then on the view's release calls the deleter, before that its own
 * destructor does. */
#include "tensor.h"

#define LEGACY "dltensor"
#define LEGACY_USED "used_dltensor"
#define VERSIONED "dltensor_versioned"
#define VERSIONED_USED "used_dltensor_versioned"
#define EXCHANGE "dlpack_exchange_api"

#define MAX_DEVICE_TYPE 1000 /* DLPack 1.3 ends at 18 */

/* Says the pending error again with the argument's name, when it is about this tensor. */
static void
name_error(const char *name)
{
    if (!PyErr_Occurred()) { /* a table whose function failed without a word */
        PyErr_Format(PyExc_BufferError, "%s: its DLPack export failed", name);
        return;
    }
    if (!PyErr_ExceptionMatches(PyExc_BufferError) && !PyErr_ExceptionMatches(PyExc_RuntimeError) &&
        !PyErr_ExceptionMatches(PyExc_ValueError) && !PyErr_ExceptionMatches(PyExc_TypeError)) {
        return;
    }
    PyObject *error = save_exception();
    PyErr_Format(PyExc_BufferError, "%s: its DLPack export failed: %S", name, error);
    Py_XDECREF(error);
}

/* Is memory on this device what the mode asks for? */
static int
check_device(const char *name, int mode, int device_type)
{
    const int wants_gpu = (mode & TENSOR_GPU) != 0 && BITDELTA_CUDA_KIND == 1;
    if (wants_gpu ? device_type == kDLCUDA : device_type == kDLCPU || device_type == kDLCUDAHost) {
        return 0;
    }
    const char *kind = device_type == kDLCPU           ? "CPU"
                       : device_type == kDLCUDA        ? "CUDA"
                       : device_type == kDLCUDAHost    ? "pinned CPU"
                       : device_type == kDLCUDAManaged ? "managed CUDA"
                       : device_type == kDLROCM        ? "ROCm"
                       : device_type == kDLMetal       ? "Metal"
                                                       : "foreign";
    raise_device_error("%s: expected %s memory, got %s memory (DLPack device type %d)", name,
                       wants_gpu ? "CUDA" : "CPU", kind, device_type);
    return -1;
}

int
tensor_from_dltensor(const DLTensor *source, const char *name, tensor *out)
{
    if (check_device(name, out->mode, (int)source->device.device_type) < 0) {
        return -1;
    }
    if (source->dtype.lanes != 1) {
        PyErr_Format(PyExc_TypeError, "%s: expected one number an element, got %d lanes", name,
                     source->dtype.lanes);
        return -1;
    }
    if (source->ndim < 0 || source->ndim > TENSOR_MAX_NDIM ||
        (source->ndim > 0 && source->shape == NULL)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a shape of at most %d dimensions, got %d",
                     name, TENSOR_MAX_NDIM, source->ndim);
        return -1;
    }
    out->device = (int)source->device.device_id;
    out->dtype = source->dtype;
    out->ndim = source->ndim;
    int64_t stride = 1, n_elements = 1;
    for (int i = source->ndim - 1; i >= 0; i--) {
        int64_t size = source->shape[i];
        int64_t given = source->strides == NULL ? stride : source->strides[i]; /* NULL: compact */
        out->shape[i] = size;
        out->strides[i] = size > 1 ? given : 1;
        if (size < 0 || __builtin_mul_overflow(stride, size > 1 ? size : 1, &stride)) {
            PyErr_Format(PyExc_ValueError, "%s: a size of %lld in dimension %d is out of range",
                         name, (long long)size, i);
            return -1;
        }
        n_elements *= size;
    }
    if (source->data == NULL && n_elements > 0) {
        PyErr_Format(PyExc_BufferError, "%s: expected memory, got a tensor without data", name);
        return -1;
    }
    out->data = source->data == NULL ? NULL : (char *)source->data + source->byte_offset;
    return 0;
}

/* ---- the exchange API ---- */

/* The table of a type, NULL when it has none; -1 on error. */
static int
look_up_exchange(module_state *state, PyTypeObject *type, const DLPackExchangeAPI **api)
{
    *api = NULL;
    PyObject *capsule = PyObject_GetAttr((PyObject *)type, state->str_exchange_api);
    if (capsule == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear(); /* most types have none */
        return 0;
    }
    if (PyCapsule_IsValid(capsule, EXCHANGE)) {
        const DLPackExchangeAPIHeader *header = PyCapsule_GetPointer(capsule, EXCHANGE);
        while (header != NULL && header->version.major != DLPACK_MAJOR_VERSION) {
            header = header->prev_api;
        }
        *api = (const DLPackExchangeAPI *)header;
    }
    Py_DECREF(capsule);
    return 0;
}

static int
find_exchange(module_state *state, PyTypeObject *type, const DLPackExchangeAPI **api)
{
    int is_known = 0;
    STATE_LOCK(state);
    for (int i = 0; i < state->n_exchange && !is_known; i++) {
        if (state->exchange[i].type == type) {
            *api = state->exchange[i].api;
            is_known = 1;
        }
    }
    STATE_UNLOCK(state);
    if (is_known) {
        return 0;
    }
    if (look_up_exchange(state, type, api) < 0) {
        return -1;
    }
    if (*api == NULL) {
        return 0; /* not remembered: the places are for tensor types */
    }
    STATE_LOCK(state);
    if (state->n_exchange < N_CACHED_TYPES) {
        Py_INCREF(type);
        state->exchange[state->n_exchange++] = (exchange_entry){.type = type, .api = *api};
    }
    STATE_UNLOCK(state);
    return 0;
}

/* Whether object.NAME, or object.NAME(), is true; 0 when there is no such attribute; -1 on error. */
static int
is_attribute_true(PyObject *object, PyObject *name, int is_method)
{
    PyObject *value =
        is_method ? PyObject_CallMethodNoArgs(object, name) : PyObject_GetAttr(object, name);
    if (value == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear(); /* not torch: nothing to ask */
        return 0;
    }
    int is_true = PyObject_IsTrue(value);
    Py_DECREF(value);
    return is_true;
}

/* What torch's exchange table does not check. */
static int
check_lazy_tensor(module_state *state, PyObject *object, const char *name)
{
    const struct {
        PyObject *attribute;
        int is_method;
        const char *message;
    } questions[] = {
        {state->str_requires_grad, 0, "%s: expected a tensor without gradient; use %s.detach()"},
        {state->str_is_neg, 1,
         "%s: expected plain memory, got a lazily negated tensor; use %s.resolve_neg()"},
        {state->str_is_conj, 1,
         "%s: expected plain memory, got a lazily conjugated tensor; use %s.resolve_conj()"},
    };
    for (size_t i = 0; i < sizeof questions / sizeof *questions; i++) {
        int is_true = is_attribute_true(object, questions[i].attribute, questions[i].is_method);
        if (is_true < 0) {
            return -1;
        }
        if (is_true) {
            PyErr_Format(PyExc_BufferError, questions[i].message, name, name);
            return -1;
        }
    }
    return 0;
}

static int
take_versioned(DLManagedTensorVersioned *managed, const char *name, tensor *out)
{
    if (managed->version.major != DLPACK_MAJOR_VERSION) {
        PyErr_Format(PyExc_BufferError, "%s: expected DLPack version %d, got %d.%d", name,
                     DLPACK_MAJOR_VERSION, (int)managed->version.major,
                     (int)managed->version.minor);
        return -1;
    }
    out->is_readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
    return tensor_from_dltensor(&managed->dl_tensor, name, out);
}

/* The stream on which the producer works now: what is launched there needs no synchronisation. */
static int
ask_stream(const DLPackExchangeAPI *api, const char *name, tensor *out)
{
    if ((out->mode & TENSOR_GPU) == 0 || BITDELTA_CUDA_KIND != 1) {
        return 0;
    }
    if (api->current_work_stream(kDLCUDA, out->device, &out->stream) != 0) {
        name_error(name);
        return -1;
    }
    return 0;
}

static int
acquire_exchange(const DLPackExchangeAPI *api, PyObject *object, const char *name, int mode,
                 tensor *out)
{
    if ((mode & (TENSOR_OUTPUT | TENSOR_KEEP)) == 0 &&
        api->dltensor_from_py_object_no_sync != NULL) {
        DLTensor view = {0};
        if (api->dltensor_from_py_object_no_sync(object, &view) != 0) {
            name_error(name);
            return -1;
        }
        return tensor_from_dltensor(&view, name, out) < 0 ? -1 : ask_stream(api, name, out);
    }
    /* Only this form says whether the memory is read-only, and holds the memory itself. */
    DLManagedTensorVersioned *managed = NULL;
    if (api->managed_tensor_from_py_object_no_sync(object, &managed) != 0 || managed == NULL) {
        name_error(name);
        return -1;
    }
    out->versioned = managed;
    return take_versioned(managed, name, out) < 0 ? -1 : ask_stream(api, name, out);
}

/* ---- __dlpack__ ---- */

/* The device type of object.__dlpack_device__(), or -1 with an exception. */
static int
ask_device(module_state *state, PyObject *object, const char *name)
{
    PyObject *device = PyObject_CallMethodNoArgs(object, state->str_dlpack_device);
    if (device == NULL) {
        name_error(name);
        return -1;
    }
    long type = -1;
    if (PyTuple_Check(device) && PyTuple_GET_SIZE(device) == 2) {
        type = PyLong_AsLong(PyTuple_GET_ITEM(device, 0)); /* an int or an IntEnum */
        if (type == -1 && PyErr_Occurred()) {
            PyErr_Clear(); /* said below */
        }
    }
    if (type < 0 || type > MAX_DEVICE_TYPE) {
        PyErr_Format(PyExc_BufferError, "%s: expected (type, id) of __dlpack_device__, got %R",
                     name, device);
    }
    Py_DECREF(device);
    return type < 0 || type > MAX_DEVICE_TYPE ? -1 : (int)type;
}

/* The capsule; producers older than max_version answer TypeError to it and are asked again. */
static PyObject *
ask_capsule(module_state *state, PyObject *object)
{
    PyObject *arguments[] = {object, state->max_version};
    PyObject *capsule =
        PyObject_VectorcallMethod(state->str_dlpack, arguments, 1, state->max_version_kwnames);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); /* a producer from before versions knows no max_version */
        capsule = PyObject_CallMethodNoArgs(object, state->str_dlpack);
    }
    return capsule;
}

static int
take_capsule(PyObject *capsule, const char *name, tensor *out)
{
    if (PyCapsule_IsValid(capsule, VERSIONED)) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, VERSIONED);
        if (take_versioned(managed, name, out) < 0 ||
            PyCapsule_SetName(capsule, VERSIONED_USED) < 0) {
            return -1;
        }
        out->versioned = managed;
        return 0;
    }
    if (PyCapsule_IsValid(capsule, LEGACY)) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, LEGACY);
        if (tensor_from_dltensor(&managed->dl_tensor, name, out) < 0 ||
            PyCapsule_SetName(capsule, LEGACY_USED) < 0) {
            return -1;
        }
        out->legacy = managed;
        return 0;
    }
    PyErr_Format(PyExc_BufferError, "%s: expected a DLPack capsule of __dlpack__, got %R", name,
                 capsule);
    return -1;
}

static int
acquire_capsule(module_state *state, PyObject *object, const char *name, tensor *out)
{
    int device_type = ask_device(state, object, name);
    if (device_type < 0 || check_device(name, out->mode, device_type) < 0) {
        return -1;
    }
    if (device_type == kDLCUDA) {
        raise_device_error(
            "%s: expected a tensor that tells its stream (as torch's do since 2.10), "
            "got a %.80s",
            name, Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *capsule = ask_capsule(state, object);
    if (capsule == NULL) {
        name_error(name);
        return -1;
    }
    int status = take_capsule(capsule, name, out);
    PyObject *pending =
        save_exception(); /* the destructor of a capsule not taken may run anything */
    Py_DECREF(capsule);
    restore_exception(pending);
    return status;
}

int
tensor_acquire_dlpack(module_state *state, PyObject *object, const char *name, int mode,
                      tensor *out)
{
    if (PyType_Check(object)) {
        return 1; /* a class is no tensor, whatever its instances can do */
    }
    const DLPackExchangeAPI *api = NULL;
    if (find_exchange(state, Py_TYPE(object), &api) < 0) {
        return -1;
    }
    if (api != NULL) {
        return check_lazy_tensor(state, object, name) < 0
                   ? -1
                   : acquire_exchange(api, object, name, mode, out);
    }
    PyObject *method = PyObject_GetAttr((PyObject *)Py_TYPE(object), state->str_dlpack);
    if (method == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear(); /* does not speak DLPack */
        return 1;
    }
    Py_DECREF(method);
    return acquire_capsule(state, object, name, out);
}
