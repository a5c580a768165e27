/* tensor.c - views of NumPy arrays and buffers, and the order in which the protocols are tried. */
#include "tensor.h"

#include <limits.h>
#include <string.h>

/* The only file that uses NumPy's C API; 1.26 is the oldest NumPy at run time. */
#define NPY_NO_DEPRECATED_API NPY_1_25_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#include <numpy/arrayobject.h>

#define KINDS "a NumPy array or another tensor (DLPack, buffer protocol)"

int
tensor_import(void)
{
    import_array1(-1);
    return 0;
}

void
tensor_release(tensor *view)
{
    if (view->buffer.obj != NULL) {
        PyBuffer_Release(&view->buffer);
    }
    if (view->legacy != NULL || view->versioned != NULL) {
        PyObject *pending = save_exception(); /* a deleter may run anything */
        if (view->legacy != NULL && view->legacy->deleter != NULL) {
            view->legacy->deleter(view->legacy);
        }
        if (view->versioned != NULL && view->versioned->deleter != NULL) {
            view->versioned->deleter(view->versioned);
        }
        restore_exception(pending);
    }
    Py_XDECREF(view->owner);
    *view = (tensor){0};
}

/* Byte strides to elements. A dimension of at most one element has no stride: it gets 1. */
static int
set_dimension(tensor *out, const char *name, int i, Py_ssize_t size, Py_ssize_t stride_bytes)
{
    Py_ssize_t item = out->dtype.bits / 8;
    out->shape[i] = size;
    if (size > 1 && stride_bytes % item != 0) {
        PyErr_Format(PyExc_BufferError,
                     "%s: expected strides that are multiples of %zd bytes, got %zd", name, item,
                     stride_bytes);
        return -1;
    }
    out->strides[i] = size > 1 ? stride_bytes / item : 1;
    return 0;
}

static int
check_ndim_limit(const char *name, int ndim)
{
    if (ndim <= TENSOR_MAX_NDIM) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected at most %d dimensions, got %d", name,
                 TENSOR_MAX_NDIM, ndim);
    return -1;
}

static DLDataType
make_dtype(DLDataTypeCode code, Py_ssize_t bytes)
{
    return (DLDataType){.code = (uint8_t)code, .bits = (uint8_t)(bytes * 8), .lanes = 1};
}

/* ---- NumPy ---- */

/* 1 when the class of the array says that its uint16 are bf16 bits; -1 on error. */
static int
is_said_to_be_bfloat16(module_state *state, PyObject *array)
{
    if (PyArray_CheckExact(array) || PyArray_TYPE((PyArrayObject *)array) != NPY_UINT16) {
        return 0;
    }
    PyObject *said = PyObject_GetAttr((PyObject *)Py_TYPE(array), state->str_bitdelta_dtype);
    if (said == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear(); /* an ordinary subclass */
        return 0;
    }
    int is = PyUnicode_Check(said) && PyUnicode_CompareWithASCIIString(said, "bfloat16") == 0;
    Py_DECREF(said);
    return is;
}

static int
is_ml_bfloat16(PyArray_Descr *descr)
{
    const char *name = descr->typeobj->tp_name, *dot = strrchr(name, '.');
    return strcmp(dot == NULL ? name : dot + 1, "bfloat16") == 0;
}

/* The dtype of an array as a DLPack dtype; code kDLOpaqueHandle for what has none. */
static int
numpy_dtype(module_state *state, PyArrayObject *array, const char *name, DLDataType *dtype)
{
    PyArray_Descr *descr = PyArray_DESCR(array);
    Py_ssize_t bytes = PyArray_ITEMSIZE(array);
    if (!PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s: expected this machine's byte order, got dtype %R", name,
                     (PyObject *)descr);
        return -1;
    }
    int is_bfloat16 = is_said_to_be_bfloat16(state, (PyObject *)array);
    if (is_bfloat16 < 0) {
        return -1;
    }
    DLDataTypeCode code = kDLOpaqueHandle;
    if (is_bfloat16 || (bytes == 2 && descr->type_num >= NPY_USERDEF && is_ml_bfloat16(descr))) {
        code = kDLBfloat;
    } else if (PyTypeNum_ISFLOAT(descr->type_num)) {
        code = kDLFloat;
    } else if (PyTypeNum_ISUNSIGNED(descr->type_num)) {
        code = kDLUInt;
    } else if (PyTypeNum_ISSIGNED(descr->type_num)) {
        code = kDLInt;
    } else if (PyTypeNum_ISCOMPLEX(descr->type_num)) {
        code = kDLComplex;
    } else if (PyTypeNum_ISBOOL(descr->type_num)) {
        code = kDLBool;
    }
    if (code == kDLOpaqueHandle || bytes > 16) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tensor of plain numbers, got dtype %R", name,
                     (PyObject *)descr);
        return -1;
    }
    *dtype = make_dtype(code, bytes);
    return 0;
}

static int
acquire_numpy(module_state *state, PyObject *object, const char *name, tensor *out)
{
    PyArrayObject *array = (PyArrayObject *)object;
    out->ndim = PyArray_NDIM(array);
    if (check_ndim_limit(name, out->ndim) < 0 || numpy_dtype(state, array, name, &out->dtype) < 0) {
        return -1;
    }
    for (int i = 0; i < out->ndim; i++) {
        if (set_dimension(out, name, i, PyArray_DIM(array, i), PyArray_STRIDE(array, i)) < 0) {
            return -1;
        }
    }
    out->data = PyArray_DATA(array);
    out->is_readonly = !PyArray_ISWRITEABLE(array);
    return 0;
}

/* ---- the buffer protocol ---- */

/* One native number of the struct module's alphabet, or -1 with TypeError. */
static int
buffer_dtype(const Py_buffer *buffer, const char *name, DLDataType *dtype)
{
    const char *format = buffer->format == NULL ? "B" : buffer->format, *symbol = format;
    int is_little = 1;
    if (*symbol == '@' || *symbol == '=' || *symbol == '<') {
        symbol++;
    } else if (*symbol == '>' || *symbol == '!') {
        is_little = 0;
        symbol++;
    }
    DLDataTypeCode code = kDLOpaqueHandle;
    if (*symbol != '\0' && symbol[1] == '\0') {
        if (strchr("efd", *symbol) != NULL) {
            code = kDLFloat;
        } else if (strchr("BHILQN", *symbol) != NULL) {
            code = kDLUInt;
        } else if (strchr("bhilqn", *symbol) != NULL) {
            code = kDLInt;
        } else if (*symbol == '?') {
            code = kDLBool;
        }
    }
    if (code == kDLOpaqueHandle || (!is_little && buffer->itemsize > 1) || buffer->itemsize < 1 ||
        buffer->itemsize > 8) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a buffer of native numbers, got the format '%s'", name, format);
        return -1;
    }
    *dtype = make_dtype(code, buffer->itemsize);
    return 0;
}

static int
acquire_buffer(PyObject *object, const char *name, tensor *out)
{
    if (PyObject_GetBuffer(object, &out->buffer, PyBUF_STRIDES | PyBUF_FORMAT) < 0) {
        out->buffer.obj = NULL;
        if (PyErr_ExceptionMatches(PyExc_BufferError)) {
            PyErr_Clear(); /* said again with the argument's name */
            PyErr_Format(PyExc_BufferError, "%s: this %.80s gives no strided buffer", name,
                         Py_TYPE(object)->tp_name);
        }
        return -1;
    }
    out->ndim = out->buffer.ndim;
    if (check_ndim_limit(name, out->ndim) < 0 ||
        buffer_dtype(&out->buffer, name, &out->dtype) < 0) {
        return -1;
    }
    if (out->ndim > 0 && out->buffer.shape == NULL) {
        PyErr_Format(PyExc_BufferError, "%s: this %.80s gives a buffer without a shape", name,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    Py_ssize_t compact = out->buffer.itemsize;
    for (int i = out->ndim - 1; i >= 0; i--) {
        Py_ssize_t size = out->buffer.shape[i];
        /* ctypes leaves the strides out although they were asked for: compact, as ever */
        Py_ssize_t stride = out->buffer.strides == NULL ? compact : out->buffer.strides[i];
        if (set_dimension(out, name, i, size, stride) < 0) {
            return -1;
        }
        compact *= size;
    }
    out->data = out->buffer.buf;
    out->is_readonly = out->buffer.readonly;
    return 0;
}

/* ---- any of them ---- */

static int
acquire_any(module_state *state, PyObject *object, const char *name, int mode, tensor *out)
{
    const int wants_gpu = (mode & TENSOR_GPU) != 0 && BITDELTA_CUDA_KIND == 1;
    if (PyArray_Check(object) && !wants_gpu) {
        return acquire_numpy(state, object, name, out);
    }
    int got = tensor_acquire_dlpack(state, object, name, mode, out);
    if (got <= 0) {
        return got;
    }
    if (wants_gpu) {
        raise_device_error("%s: expected memory of a GPU, got a %.80s", name,
                           Py_TYPE(object)->tp_name);
        return -1;
    }
    if (PyObject_CheckBuffer(object)) {
        return acquire_buffer(object, name, out);
    }
    PyErr_Format(PyExc_TypeError, "%s: expected " KINDS ", got %.80s", name,
                 Py_TYPE(object)->tp_name);
    return -1;
}

int
tensor_acquire(module_state *state, PyObject *object, const char *name, int mode, tensor *out)
{
    *out = (tensor){.mode = mode};
    if (acquire_any(state, object, name, mode, out) < 0) {
        goto fail;
    }
    Py_INCREF(object);
    out->owner = object;
    if ((mode & TENSOR_OUTPUT) != 0 && out->is_readonly) {
        PyErr_Format(PyExc_BufferError, "%s: expected writable memory, got a read-only %.80s", name,
                     Py_TYPE(object)->tp_name);
        goto fail;
    }
    for (int i = 0; i < out->ndim; i++) {
        if (out->shape[i] < 0) {
            PyErr_Format(PyExc_ValueError, "%s: expected sizes >= 0, got %lld in dimension %d",
                         name, (long long)out->shape[i], i);
            goto fail;
        }
    }
    return 0;

fail:
    tensor_release(out);
    return -1;
}
