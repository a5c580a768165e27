/* tensor_check.c - what arguments must be: dtype, shape, strides, alignment, overlap.
 *
 * Every message names the argument, what it needs and what it got. */
#include "tensor.h"

#include <stdio.h>
#include <string.h>

#define TEXT_BYTES 200 /* eight 20-digit sizes with separators */

static const char *
dtype_text(DLDataType dtype, char text[32])
{
    static const char *const names[] = {
        [kDLInt] = "int",       [kDLUInt] = "uint",       [kDLFloat] = "float",
        [kDLBfloat] = "bfloat", [kDLComplex] = "complex", [kDLBool] = "bool",
    };
    const char *name = dtype.code < sizeof names / sizeof *names ? names[dtype.code] : NULL;
    if (name == NULL) {
        snprintf(text, 32, "DLPack dtype %d of %d bits", dtype.code, dtype.bits);
    } else if (dtype.code == kDLBool) {
        snprintf(text, 32, "%s", name);
    } else {
        snprintf(text, 32, "%s%d", name, dtype.bits);
    }
    return text;
}

/* "[4, 16]"; sizes of ANY_SIZE as "?". */
static const char *
sizes_text(const int64_t *sizes, int n, char text[TEXT_BYTES])
{
    size_t used = (size_t)snprintf(text, TEXT_BYTES, "[");
    for (int i = 0; i < n; i++) {
        const char *comma = i == 0 ? "" : ", ";
        int written = sizes[i] == ANY_SIZE ? snprintf(text + used, TEXT_BYTES - used, "%s?", comma)
                                           : snprintf(text + used, TEXT_BYTES - used, "%s%lld",
                                                      comma, (long long)sizes[i]);
        used += (size_t)written;
    }
    snprintf(text + used, TEXT_BYTES - used, "]");
    return text;
}

int
check_shape(const tensor *view, const char *name, const char *letters, int ndim,
            const int64_t *shape)
{
    char need[TEXT_BYTES], got[TEXT_BYTES];
    int is_right = view->ndim == ndim;
    for (int i = 0; is_right && i < ndim; i++) {
        is_right = shape[i] == ANY_SIZE || shape[i] == view->shape[i];
    }
    if (is_right) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected %s = %s, got %s", name, letters,
                 sizes_text(shape, ndim, need), sizes_text(view->shape, view->ndim, got));
    return -1;
}

int
check_dtype(const tensor *view, const char *name, DLDataTypeCode code, int bits)
{
    DLDataType needed = {.code = (uint8_t)code, .bits = (uint8_t)bits, .lanes = 1};
    char need[32], got[32];
    if (view->dtype.code == needed.code && view->dtype.bits == needed.bits) {
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s", name, dtype_text(needed, need),
                 dtype_text(view->dtype, got));
    return -1;
}

static int
check_alignment(const void *data, const char *name, int64_t alignment)
{
    int64_t off = (int64_t)((uintptr_t)data % (uintptr_t)alignment);
    if (off == 0) {
        return 0;
    }
    PyErr_Format(PyExc_BufferError,
                 "%s: expected memory aligned to %d bytes, got an address %d beyond", name,
                 (int)alignment, (int)off);
    return -1;
}

static int
is_empty(const tensor *view)
{
    int empty = 0;
    for (int i = 0; i < view->ndim; i++) {
        empty |= view->shape[i] == 0;
    }
    return empty;
}

int
check_contiguous(const tensor *view, const char *name, int64_t alignment)
{
    char got[TEXT_BYTES], need[TEXT_BYTES];
    int64_t stride = 1, n_bytes = 0, compact[TENSOR_MAX_NDIM];
    int is_compact = 1;
    for (int i = view->ndim - 1; i >= 0; i--) {
        compact[i] = stride;
        is_compact &= view->shape[i] <= 1 || view->strides[i] == stride;
        if (__builtin_mul_overflow(stride, view->shape[i] > 1 ? view->shape[i] : 1, &stride) ||
            __builtin_mul_overflow(stride, view->dtype.bits / 8, &n_bytes)) {
            PyErr_Format(PyExc_ValueError, "%s: the size in bytes of %s overflows", name,
                         sizes_text(view->shape, view->ndim, got));
            return -1;
        }
    }
    if (!is_compact && !is_empty(view)) {
        PyErr_Format(PyExc_BufferError, "%s: expected contiguous memory, strides %s, got %s", name,
                     sizes_text(compact, view->ndim, need),
                     sizes_text(view->strides, view->ndim, got));
        return -1;
    }
    return check_alignment(view->data, name, alignment);
}

size_t
dtype_size(bd_dtype dtype)
{
    return dtype == BD_F32 ? 4 : 2;
}

static int
to_bd_dtype(const tensor *view, const char *name, bd_dtype *out)
{
    char got[32];
    DLDataType dtype = view->dtype;
    if (dtype.code == kDLFloat && dtype.bits == 32) {
        *out = BD_F32;
    } else if (dtype.code == kDLFloat && dtype.bits == 16) {
        *out = BD_F16;
    } else if (dtype.code == kDLBfloat && dtype.bits == 16) {
        *out = BD_BF16;
    } else {
        PyErr_Format(PyExc_TypeError, "%s: expected float32, float16 or bfloat16, got %s%s", name,
                     dtype_text(dtype, got),
                     dtype.code == kDLUInt && dtype.bits == 16
                         ? " (bf16 bits? use bitdelta.as_bfloat16)"
                         : "");
        return -1;
    }
    return 0;
}

/* Bytes from the first to the end of the last element; -1 when they overflow. */
static int64_t
matrix_bytes(const bd_matrix *matrix)
{
    int64_t n = 0;
    if (matrix->n_rows == 0 || matrix->n_columns == 0) {
        return 0;
    }
    if (__builtin_mul_overflow(matrix->n_rows - 1, matrix->row_stride, &n) ||
        __builtin_add_overflow(n, matrix->n_columns, &n) ||
        __builtin_mul_overflow(n, (int64_t)dtype_size(matrix->dtype), &n) ||
        (uint64_t)n > UINTPTR_MAX - (uintptr_t)matrix->data) {
        return -1;
    }
    return n;
}

int
tensor_to_matrix(const tensor *view, const char *name, const char *letters, int64_t n_rows,
                 int64_t n_columns, bd_matrix *out)
{
    const int64_t shape[] = {n_rows, n_columns};
    char got[TEXT_BYTES];
    if (to_bd_dtype(view, name, &out->dtype) < 0 ||
        check_shape(view, name, letters, 2, shape) < 0) {
        return -1;
    }
    out->data = view->data;
    out->n_rows = view->shape[0];
    out->n_columns = view->shape[1];
    out->row_stride = view->shape[0] > 1 ? view->strides[0] : out->n_columns;
    if (is_empty(view)) {
        out->row_stride = out->n_columns;
        return 0;
    }
    if ((view->shape[1] > 1 && view->strides[1] != 1) || out->row_stride < out->n_columns) {
        const int64_t need[] = {out->n_columns, 1};
        char needed[TEXT_BYTES];
        PyErr_Format(PyExc_BufferError,
                     "%s: expected rows of contiguous columns, strides at least %s, got %s", name,
                     sizes_text(need, 2, needed), sizes_text(view->strides, 2, got));
        return -1;
    }
    if (matrix_bytes(out) < 0) {
        PyErr_Format(PyExc_ValueError, "%s: the size in bytes of %s overflows", name,
                     sizes_text(view->shape, 2, got));
        return -1;
    }
    return check_alignment(view->data, name, (int64_t)dtype_size(out->dtype));
}

int
check_nonempty(const bd_matrix *matrix, const char *name, const char *letters)
{
    if (matrix->n_rows > 0 && matrix->n_columns > 0) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected %s of at least 1, got [%lld, %lld]", name, letters,
                 (long long)matrix->n_rows, (long long)matrix->n_columns);
    return -1;
}

int64_t
tensor_n_bytes(const tensor *view)
{
    int64_t n = view->dtype.bits / 8;
    for (int i = 0; i < view->ndim; i++) {
        n *= view->shape[i];
    }
    return n;
}

bd_matrix
tensor_extent(const tensor *view)
{
    int64_t n_columns = view->data == NULL ? 0 : tensor_n_bytes(view) / 2;
    return (bd_matrix){.data = view->data,
                       .dtype = BD_F16,
                       .n_rows = 1,
                       .n_columns = n_columns,
                       .row_stride = n_columns};
}

/* Rows of the same pitch may lie side by side, as slices of columns of one array do. */
static int
are_side_by_side(const bd_matrix *a, const bd_matrix *b)
{
    uint64_t size_a = dtype_size(a->dtype), size_b = dtype_size(b->dtype);
    uint64_t pitch = (uint64_t)a->row_stride * size_a;
    if (a->n_rows < 2 || b->n_rows < 2 || pitch != (uint64_t)b->row_stride * size_b) {
        return 0;
    }
    uintptr_t start_a = (uintptr_t)a->data, start_b = (uintptr_t)b->data;
    uint64_t offset = start_b >= start_a ? (start_b - start_a) % pitch
                                         : (pitch - (start_a - start_b) % pitch) % pitch;
    return offset >= (uint64_t)a->n_columns * size_a &&
           offset + (uint64_t)b->n_columns * size_b <= pitch;
}

int
check_overlap(const bd_matrix *output, const char *output_name, const bd_matrix *input,
              const char *input_name)
{
    uintptr_t output_start = (uintptr_t)output->data, input_start = (uintptr_t)input->data;
    uintptr_t output_end = output_start + (uintptr_t)matrix_bytes(output);
    uintptr_t input_end = input_start + (uintptr_t)matrix_bytes(input);
    if (output_start == output_end || input_start == input_end || output_end <= input_start ||
        input_end <= output_start || are_side_by_side(output, input)) {
        return 0;
    }
    PyErr_Format(PyExc_BufferError, "%s: expected memory of its own, got some that overlaps %s",
                 output_name, input_name);
    return -1;
}
