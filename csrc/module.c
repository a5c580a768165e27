/* module.c - bitdelta._C: state, threads, instruction sets, what this build is. */
#include "module.h"

#include <stdarg.h>
#include <stdlib.h>

#include "tensor.h"

#ifndef BITDELTA_CUDA
#define BITDELTA_CUDA "not built"
#endif
#ifndef BITDELTA_FLAGS
#define BITDELTA_FLAGS "unknown"
#endif
#ifndef BITDELTA_SANITIZE
#define BITDELTA_SANITIZE 0
#endif

#define MAX_THREADS 1024 /* more is a mistake: a pool is one machine's cores */

void
context_enter(module_state *state, bd_context *ctx)
{
    STATE_LOCK(state);
    ctx->pool = state->pool;
    ctx->kernels = state->kernels;
    bd_pool_retain(ctx->pool);
    STATE_UNLOCK(state);
}

void
context_leave(bd_context *ctx)
{
    bd_pool_release(ctx->pool);
}

PyObject *
save_exception(void)
{
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type = NULL, *value = NULL, *traceback = NULL;
    PyErr_Fetch(&type, &value, &traceback);
    if (type != NULL) {
        PyErr_NormalizeException(&type, &value, &traceback);
        if (traceback != NULL) {
            PyException_SetTraceback(value, traceback);
        }
    }
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
#endif
}

void
restore_exception(PyObject *exception)
{
    if (exception == NULL) {
        return;
    }
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(exception);
#else
    PyObject *type = (PyObject *)Py_TYPE(exception);
    Py_INCREF(type);
    PyErr_Restore(type, exception, PyException_GetTraceback(exception));
#endif
}

PyObject *
return_status(bd_status status)
{
    switch (status) {
        case BD_OK:
            Py_RETURN_NONE;
        case BD_ERR_MEMORY:
            return PyErr_NoMemory();
        case BD_ERR_NONFINITE:
            PyErr_SetString(PyExc_ValueError, "NaN or Inf where finite numbers are needed");
            return NULL;
        case BD_ERR_ARGUMENT:
        case BD_ERR_CUDA: /* the CUDA functions say it themselves */
            break;
    }
    PyErr_SetString(PyExc_ValueError, "the core refused these arguments");
    return NULL;
}

void
raise_device_error(const char *format, ...)
{
    PyObject *errors = PyImport_ImportModule("bitdelta.errors");
    PyObject *error = errors == NULL ? NULL : PyObject_GetAttrString(errors, "DeviceError");
    if (error != NULL) {
        va_list arguments;
        va_start(arguments, format);
        PyErr_FormatV(error, format, arguments);
        va_end(arguments);
    }
    Py_XDECREF(errors);
    Py_XDECREF(error);
}

int
check_n_arguments(const char *function, Py_ssize_t nargs, Py_ssize_t least, Py_ssize_t most)
{
    if (nargs >= least && nargs <= most) {
        return 0;
    }
    if (least == most) {
        PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", function, least,
                     nargs);
    } else {
        PyErr_Format(PyExc_TypeError, "%s: expected %zd to %zd arguments, got %zd", function, least,
                     most, nargs);
    }
    return -1;
}

int
parse_int(PyObject *object, const char *name, int64_t least, int64_t most, int64_t *out)
{
    if (!PyIndex_Check(object) || PyBool_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an int, got %.80s", name,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *number = PyNumber_Index(object);
    if (number == NULL) {
        return -1;
    }
    int overflow = 0;
    *out = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow != 0 || *out < least || *out > most) {
        PyErr_Format(PyExc_ValueError, "%s: expected %lld .. %lld, got %S", name, (long long)least,
                     (long long)most, number);
    }
    Py_DECREF(number);
    return PyErr_Occurred() ? -1 : 0;
}

int
parse_bool(PyObject *object, const char *name, int *out)
{
    if (!PyBool_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a bool, got %.80s", name,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    *out = object == Py_True;
    return 0;
}

/* ---- threads ---- */

PyDoc_STRVAR(set_num_threads_doc,
             "set_num_threads($module, n, /)\n--\n\n"
             "Replaces the pool; calls that run finish on the old one.");

static PyObject *
py_set_num_threads(PyObject *module, PyObject *argument)
{
    module_state *state = get_state(module);
    int64_t n_threads = 0;
    if (parse_int(argument, "n", 1, MAX_THREADS, &n_threads) < 0) {
        return NULL;
    }
    STATE_LOCK(state);
    int is_same = bd_pool_size(state->pool) == (int)n_threads;
    STATE_UNLOCK(state);
    if (is_same) {
        Py_RETURN_NONE;
    }
    bd_pool *pool = NULL, *old = NULL;
    if (n_threads > 1 && (pool = bd_pool_create((int)n_threads)) == NULL) {
        return PyErr_NoMemory();
    }
    STATE_LOCK(state);
    old = state->pool;
    state->pool = pool;
    STATE_UNLOCK(state);
    Py_BEGIN_ALLOW_THREADS /* the last release joins the threads */
        bd_pool_release(old);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(get_num_threads_doc,
             "get_num_threads($module, /)\n--\n\nThreads that a call may use.");

static PyObject *
py_get_num_threads(PyObject *module, PyObject *Py_UNUSED(none))
{
    module_state *state = get_state(module);
    STATE_LOCK(state);
    int n_threads = bd_pool_size(state->pool);
    STATE_UNLOCK(state);
    return PyLong_FromLong(n_threads);
}

/* ---- instruction sets ---- */

/* Makes `name` (NULL: the best) the kernels of later calls; -1 with `exception` when it cannot. */
static int
choose_isa(module_state *state, const char *name, const char *source, PyObject *exception)
{
    const bd_kernels *kernels = bd_select_kernels(name);
    if (kernels != NULL) {
        STATE_LOCK(state);
        state->kernels = kernels;
        STATE_UNLOCK(state);
        return 0;
    }
    PyObject *known = PyUnicode_FromString(bd_available_isas()[0]);
    for (const char *const *isa = bd_available_isas() + 1; known != NULL && *isa != NULL; isa++) {
        Py_SETREF(known, PyUnicode_FromFormat("%U, %s", known, *isa));
    }
    if (known != NULL) {
        PyErr_Format(exception, "%s: expected one of %U on this machine, got '%s'", source, known,
                     name == NULL ? "" : name);
        Py_DECREF(known);
    }
    return -1;
}

PyDoc_STRVAR(isa_doc, "isa($module, /)\n--\n\nThe instruction set in use.");

static PyObject *
py_isa(PyObject *module, PyObject *Py_UNUSED(none))
{
    module_state *state = get_state(module);
    STATE_LOCK(state);
    const bd_kernels *kernels = state->kernels;
    STATE_UNLOCK(state);
    return PyUnicode_FromString(kernels->isa);
}

PyDoc_STRVAR(isas_doc, "isas($module, /)\n--\n\nNames that set_isa accepts here, best first.");

static PyObject *
py_isas(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    const char *const *names = bd_available_isas();
    Py_ssize_t n_names = 0;
    while (names[n_names] != NULL) {
        n_names++;
    }
    PyObject *result = PyTuple_New(n_names);
    for (Py_ssize_t i = 0; result != NULL && i < n_names; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL) {
            Py_CLEAR(result);
        } else {
            PyTuple_SET_ITEM(result, i, name); /* steals */
        }
    }
    return result;
}

PyDoc_STRVAR(set_isa_doc,
             "set_isa($module, name, /)\n--\n\nUses another instruction set from here on.");

static PyObject *
py_set_isa(PyObject *module, PyObject *argument)
{
    if (!PyUnicode_Check(argument)) {
        PyErr_Format(PyExc_TypeError, "name: expected str, got %.80s", Py_TYPE(argument)->tp_name);
        return NULL;
    }
    const char *name = PyUnicode_AsUTF8(argument);
    if (name == NULL || choose_isa(get_state(module), name, "isa", PyExc_ValueError) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(build_info_doc, "build_info($module, /)\n--\n\nHow this extension was compiled.");

static PyObject *
py_build_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
#if defined(__clang__)
    const char *compiler = __VERSION__; /* begins with its name */
#else
    const char *compiler = "GCC " __VERSION__;
#endif
    return Py_BuildValue("{s:s, s:s, s:s, s:O, s:s}", "compiler", compiler, "flags", BITDELTA_FLAGS,
                         "cuda", BITDELTA_CUDA, "sanitize", BITDELTA_SANITIZE ? Py_True : Py_False,
                         "python", PY_VERSION);
}

static PyMethodDef module_functions[] = {
    {"set_num_threads", py_set_num_threads, METH_O, set_num_threads_doc},
    {"get_num_threads", py_get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"isa", py_isa, METH_NOARGS, isa_doc},
    {"isas", py_isas, METH_NOARGS, isas_doc},
    {"set_isa", py_set_isa, METH_O, set_isa_doc},
    {"build_info", py_build_info, METH_NOARGS, build_info_doc},
    {NULL, NULL, 0, NULL},
};

/* ---- the module ---- */

static int
intern_names(module_state *state)
{
    const struct {
        PyObject **place;
        const char *text;
    } names[] = {
        {&state->str_exchange_api, "__dlpack_c_exchange_api__"},
        {&state->str_dlpack, "__dlpack__"},
        {&state->str_dlpack_device, "__dlpack_device__"},
        {&state->str_requires_grad, "requires_grad"},
        {&state->str_is_neg, "is_neg"},
        {&state->str_is_conj, "is_conj"},
        {&state->str_bitdelta_dtype, "__bitdelta_dtype__"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if ((*names[i].place = PyUnicode_InternFromString(names[i].text)) == NULL) {
            return -1;
        }
    }
    state->max_version_kwnames = Py_BuildValue("(s)", "max_version");
    state->max_version = Py_BuildValue("(ii)", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
    return state->max_version_kwnames == NULL || state->max_version == NULL ? -1 : 0;
}

static int
module_exec(PyObject *module)
{
    module_state *state = get_state(module);
    const char *isa = getenv("BITDELTA_ISA");
    if (tensor_import() < 0 || intern_names(state) < 0 ||
        choose_isa(state, isa != NULL && *isa != '\0' ? isa : NULL, "BITDELTA_ISA",
                   PyExc_ImportError) < 0) {
        return -1;
    }
    state->delta_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &delta_spec, NULL);
    if (state->delta_type == NULL || PyModule_AddType(module, state->delta_type) < 0 ||
        PyModule_AddFunctions(module, delta_functions) < 0 ||
        PyModule_AddFunctions(module, calibrate_functions) < 0 ||
        PyModule_AddFunctions(module, product_functions) < 0 ||
        PyModule_AddFunctions(module, byte_functions) < 0 ||
        PyModule_AddFunctions(module, cuda_functions) < 0) {
        return -1;
    }
#if BITDELTA_CUDA_KIND
    state->cuda_deltas_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(module, &cuda_deltas_spec, NULL);
    if (state->cuda_deltas_type == NULL || PyModule_AddType(module, state->cuda_deltas_type) < 0 ||
        PyModule_AddFunctions(module, cuda_product_functions) < 0 ||
        PyModule_AddFunctions(module, cuda_gradient_functions) < 0 ||
        PyModule_AddFunctions(module, cuda_blas_functions) < 0 ||
        PyModule_AddFunctions(module, cuda_calibrate_functions) < 0 ||
        PyModule_AddFunctions(module, cuda_delta_functions) < 0) {
        return -1;
    }
#endif
    return PyModule_AddIntConstant(module, "STREAM_ROWS", BD_STREAM_ROWS);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = get_state(module);
    Py_VISIT(state->delta_type);
    Py_VISIT(state->cuda_deltas_type);
    for (int i = 0; i < state->n_exchange; i++) {
        Py_VISIT(state->exchange[i].type);
    }
    return 0; /* the rest are strings and tuples of them */
}

static int
module_clear(PyObject *module)
{
    module_state *state = get_state(module);
    Py_CLEAR(state->delta_type);
    Py_CLEAR(state->cuda_deltas_type);
    while (state->n_exchange > 0) {
        state->n_exchange--;
        Py_CLEAR(state->exchange[state->n_exchange].type);
    }
    return 0;
}

static void
module_free(void *module)
{
    module_state *state = get_state((PyObject *)module);
    if (state != NULL) {
        module_clear((PyObject *)module);
        Py_CLEAR(state->str_exchange_api);
        Py_CLEAR(state->str_dlpack);
        Py_CLEAR(state->str_dlpack_device);
        Py_CLEAR(state->str_requires_grad);
        Py_CLEAR(state->str_is_neg);
        Py_CLEAR(state->str_is_conj);
        Py_CLEAR(state->str_bitdelta_dtype);
        Py_CLEAR(state->max_version_kwnames);
        Py_CLEAR(state->max_version);
        bd_pool_release(state->pool);
        state->pool = NULL;
        bd_blas_close(state->blas);
        state->blas = NULL;
    }
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* as NumPy */
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bitdelta._C",
    .m_doc = "The arithmetic core; private. Arguments are positional and strict: see _C.pyi.",
    .m_size = sizeof(module_state),
    .m_methods = module_functions,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__C(void)
{
    return PyModuleDef_Init(&module_def);
}
