/* py_cuda.c - whether GPUs can be used, and DeviceError where one cannot. */
#include "module.h"

#ifndef BITDELTA_CUDA
#define BITDELTA_CUDA "not built"
#endif
#ifndef BITDELTA_CUDA_KIND
#define BITDELTA_CUDA_KIND 0 /* 0: no kernels, 1: a GPU's, 2: emulated on the CPU */
#endif

#if BITDELTA_CUDA_KIND

#include "cuda_device.h"

static const char *
missing(void)
{
    return bd_gpu_missing();
}

#else

static const char *
missing(void)
{
    return "this build of bitdelta has no CUDA kernels (" BITDELTA_CUDA ")";
}

#endif

PyDoc_STRVAR(cuda_missing_doc,
             "cuda_missing($module, /)\n--\n\n"
             "None when a GPU can be used, else what is missing. The first call loads the driver.");

static PyObject *
py_cuda_missing(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    const char *text = NULL;
    Py_BEGIN_ALLOW_THREADS /* the driver takes its time */
        text = missing();
    Py_END_ALLOW_THREADS
    if (text == NULL) {
        Py_RETURN_NONE;
    }
    return PyUnicode_FromString(text);
}

PyDoc_STRVAR(cuda_is_emulated_doc,
             "cuda_is_emulated($module, /)\n--\n\n"
             "True when the kernels run on the CPU and take tensors in its memory.");

static PyObject *
py_cuda_is_emulated(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(BITDELTA_CUDA_KIND == 2);
}

PyMethodDef cuda_functions[] = {
    {"cuda_missing", py_cuda_missing, METH_NOARGS, cuda_missing_doc},
    {"cuda_is_emulated", py_cuda_is_emulated, METH_NOARGS, cuda_is_emulated_doc},
    {NULL, NULL, 0, NULL},
};
