/* py_bytes.c - to_float32 and the checksums: what looks at elements or bytes, not at deltas. */
#include "module.h"

#include "tensor.h"

/* A vector [n] is the matrix [n, 1], so that its stride may be any; a matrix stays as it is. */
static void
vector_as_column(tensor *view)
{
    if (view->ndim == 1) {
        view->ndim = 2;
        view->shape[1] = 1;
        view->strides[1] = 1;
    }
}

PyDoc_STRVAR(
    to_float32_doc,
    "to_float32($module, out, matrix, name='matrix', /)\n--\n\n"
    "out (fp32, contiguous, same shape) = matrix of fp32, fp16 or bf16; one or two dimensions.");

static PyObject *
py_to_float32(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    module_state *state = get_state(module);
    tensor out = {0}, matrix = {0};
    bd_matrix out_matrix = {0}, source = {0};
    PyObject *result = NULL;
    if (check_n_arguments("to_float32", nargs, 2, 3) < 0) {
        return NULL;
    }
    const char *name = nargs == 3 ? PyUnicode_AsUTF8(args[2]) : "matrix"; /* for messages */
    if (name == NULL || tensor_acquire(state, args[1], name, TENSOR_INPUT, &matrix) < 0) {
        return NULL;
    }
    if (tensor_acquire(state, args[0], "out", TENSOR_OUTPUT, &out) < 0 ||
        check_dtype(&out, "out", kDLFloat, 32) < 0 ||
        check_contiguous(&out, "out", (int64_t)sizeof(float)) < 0 ||
        check_shape(&out, "out", "matrix.shape", matrix.ndim, matrix.shape) < 0) {
        goto done;
    }
    vector_as_column(&matrix);
    vector_as_column(&out);
    if (tensor_to_matrix(&matrix, name, "[n_rows, n_columns]", ANY_SIZE, ANY_SIZE, &source) < 0 ||
        tensor_to_matrix(&out, "out", "[n_rows, n_columns]", source.n_rows, source.n_columns,
                         &out_matrix) < 0 ||
        check_overlap(&out_matrix, "out", &source, name) < 0) {
        goto done;
    }
    bd_context ctx = {0};
    bd_status status = BD_OK;
    context_enter(state, &ctx);
    Py_BEGIN_ALLOW_THREADS
        if (source.n_rows > 0 && source.n_columns > 0) {
            status = bd_to_float32(&ctx, &source, out_matrix.data);
        }
        context_leave(&ctx);
    Py_END_ALLOW_THREADS
    result = return_status(status);

done:
    tensor_release(&out);
    tensor_release(&matrix);
    return result;
}

PyDoc_STRVAR(crc32c_doc,
             "crc32c($module, buffer, value=0, /)\n--\n\n"
             "CRC-32C of contiguous memory, continuing from value.");

/* A view of contiguous memory of whole bytes; 0, or -1 with an exception and an empty view. */
static int
acquire_bytes(PyObject *module, PyObject *object, tensor *view)
{
    if (tensor_acquire(get_state(module), object, "buffer", TENSOR_INPUT, view) < 0) {
        return -1;
    }
    if (view->dtype.bits % 8 != 0) {
        PyErr_Format(PyExc_TypeError, "buffer: expected whole bytes, got elements of %d bits",
                     view->dtype.bits);
    } else if (check_contiguous(view, "buffer", 1) == 0) {
        return 0;
    }
    tensor_release(view);
    return -1;
}

static PyObject *
py_crc32c(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    tensor view = {0};
    int64_t value = 0;
    uint32_t crc = 0;
    if (check_n_arguments("crc32c", nargs, 1, 2) < 0 ||
        (nargs == 2 && parse_int(args[1], "value", 0, UINT32_MAX, &value) < 0) ||
        acquire_bytes(module, args[0], &view) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        crc = bd_crc32c((uint32_t)value, view.data, (size_t)tensor_n_bytes(&view));
    Py_END_ALLOW_THREADS
    tensor_release(&view);
    return PyLong_FromUnsignedLong(crc);
}

PyDoc_STRVAR(
    read_doc,
    "read($module, buffer, /)\n--\n\n"
    "Reads contiguous memory with all threads; returns the exclusive or of its 64-bit words.");

static PyObject *
py_read(PyObject *module, PyObject *buffer)
{
    tensor view = {0};
    bd_context ctx = {0};
    uint64_t folded = 0;
    if (acquire_bytes(module, buffer, &view) < 0) {
        return NULL;
    }
    context_enter(get_state(module), &ctx);
    Py_BEGIN_ALLOW_THREADS
        folded = bd_read(&ctx, view.data, (size_t)tensor_n_bytes(&view));
        context_leave(&ctx);
    Py_END_ALLOW_THREADS
    tensor_release(&view);
    return PyLong_FromUnsignedLongLong(folded);
}

PyDoc_STRVAR(crc32c_combine_doc,
             "crc32c_combine($module, a, b, n_bytes_b, /)\n--\n\n"
             "CRC-32C of A followed by B, from those of A and of B.");

static PyObject *
py_crc32c_combine(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int64_t a = 0, b = 0, n_bytes = 0;
    if (check_n_arguments("crc32c_combine", nargs, 3, 3) < 0 ||
        parse_int(args[0], "a", 0, UINT32_MAX, &a) < 0 ||
        parse_int(args[1], "b", 0, UINT32_MAX, &b) < 0 ||
        parse_int(args[2], "n_bytes_b", 0, INT64_MAX, &n_bytes) < 0) {
        return NULL;
    }
    return PyLong_FromUnsignedLong(bd_crc32c_combine((uint32_t)a, (uint32_t)b, (uint64_t)n_bytes));
}

PyMethodDef byte_functions[] = {
    {"to_float32", (PyCFunction)(void (*)(void))py_to_float32, METH_FASTCALL, to_float32_doc},
    {"crc32c", (PyCFunction)(void (*)(void))py_crc32c, METH_FASTCALL, crc32c_doc},
    {"crc32c_combine", (PyCFunction)(void (*)(void))py_crc32c_combine, METH_FASTCALL,
     crc32c_combine_doc},
    {"read", py_read, METH_O, read_doc},
    {NULL, NULL, 0, NULL},
};
