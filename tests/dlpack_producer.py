"""A DLPack producer made by hand, so that the border meets every capsule a real one might hand out, and worse.

The structures are those of dlpack.h 1.3. `deleted` counts the deleter's calls: exactly one per export is right.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

import numpy as np

CPU, CUDA, CUDA_HOST = 1, 2, 3
CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
BFLOAT16 = (4, 16, 1)
READ_ONLY = 1

Deleter = ctypes.CFUNCTYPE(None, c_void_p)
Destructor = ctypes.PYFUNCTYPE(None, c_void_p)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class Legacy(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", c_void_p), ("deleter", Deleter))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", Deleter),
        ("flags", c_uint64),
        ("tensor", Tensor),
    )


_python = ctypes.PyDLL(None)  # not ctypes.pythonapi, whose functions other modules give other types
_new = _python.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (c_void_p, c_char_p, Destructor)
_is_valid = _python.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = c_int, (c_void_p, c_char_p)
_alive = []  # what C may still point to, until the process ends


def fill(tensor, array, dtype=None, strides=None, offset=0, device=CPU, **changes):
    """Describes a NumPy array in a Tensor; strides "none" leaves them NULL."""
    code, bits, lanes = dtype or (CODES[array.dtype.kind], array.itemsize * 8, 1)
    shape = changes.pop("shape", array.shape)
    steps = [step // array.itemsize for step in array.strides] if strides is None else strides
    arrays = [(c_int64 * len(shape))(*shape), None if strides == "none" else (c_int64 * len(steps))(*steps)]
    _alive.extend([array, arrays])
    tensor.data, tensor.byte_offset = array.ctypes.data - offset, offset
    tensor.device_type, tensor.ndim = device, len(shape)
    tensor.code, tensor.bits, tensor.lanes = code, bits, lanes
    tensor.shape = ctypes.cast(arrays[0], POINTER(c_int64))
    tensor.strides = ctypes.cast(arrays[1], POINTER(c_int64)) if arrays[1] is not None else None
    for name, value in changes.items():
        setattr(tensor, name, value)


class Producer:
    """Exports an array by __dlpack__; `protocol` is what it understands: "legacy", "old" (a versioned capsule only
    when asked without arguments never happens: it knows no max_version), or "versioned"."""

    def __init__(self, array, protocol="versioned", flags=0, version=(1, 3), device=CPU, **changes):
        self.array, self.protocol, self.flags, self.version, self.device = (
            array,
            protocol,
            flags,
            version,
            device,
        )
        self.changes = changes
        self.exported = self.deleted = 0
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack_device__(self):
        return (self.device, 0)

    def __dlpack__(self, **keywords):
        if self.protocol == "legacy" and keywords:
            raise TypeError("unexpected keyword argument 'max_version'")
        name = b"dltensor" if self.protocol == "legacy" else b"dltensor_versioned"
        managed = Legacy() if self.protocol == "legacy" else Versioned()
        if self.protocol != "legacy":
            managed.major, managed.minor = self.version
            managed.flags = self.flags
        fill(managed.tensor, self.array, device=self.device, **self.changes)

        def delete(_pointer):
            self.deleted += 1

        managed.deleter = Deleter(delete)

        def destroy(capsule):
            if _is_valid(capsule, name):  # nobody took it
                delete(None)

        destructor = Destructor(destroy)
        buffer = ctypes.create_string_buffer(name)
        _alive.extend([managed, destructor, buffer])
        self.exported += 1
        return _new(ctypes.addressof(managed), ctypes.cast(buffer, c_char_p), destructor)


# ---- the C exchange API ----

Allocate = c_void_p
FromObject = ctypes.PYFUNCTYPE(c_int, ctypes.py_object, POINTER(c_void_p))
ViewObject = ctypes.PYFUNCTYPE(c_int, ctypes.py_object, POINTER(Tensor))


class Exchange(ctypes.Structure):
    _fields_ = (
        ("major", c_uint32),
        ("minor", c_uint32),
        ("previous", c_void_p),
        ("allocator", c_void_p),
        ("from_object", FromObject),
        ("to_object", c_void_p),
        ("view_object", ViewObject),
        ("stream", c_void_p),
    )


def make_exchange_class(has_view=True, version=(1, 3), fails=False):
    """A new class whose instances are seen by the C exchange API alone; it counts `views`, `exports`, `deleted`."""

    class Exchanged:
        views = exports = deleted = 0

        def __init__(self, array, flags=0, **changes):
            self.array, self.flags, self.changes = array, flags, changes

    def view(instance, out):
        Exchanged.views += 1
        if fails:
            return -1
        fill(out.contents, instance.array, **instance.changes)
        return 0

    def export(instance, out):
        Exchanged.exports += 1
        if fails:
            return -1
        managed = Versioned(major=version[0], minor=version[1], flags=instance.flags)
        fill(managed.tensor, instance.array, **instance.changes)

        def delete(_pointer):
            Exchanged.deleted += 1

        managed.deleter = Deleter(delete)
        _alive.append(managed)
        out[0] = ctypes.addressof(managed)
        return 0

    table = Exchange(
        major=version[0],
        minor=version[1],
        from_object=FromObject(export),
        view_object=ViewObject(view) if has_view else ViewObject(),
    )
    name = ctypes.create_string_buffer(b"dlpack_exchange_api")
    _alive.extend([table, name])
    Exchanged.__dlpack_c_exchange_api__ = _new(
        ctypes.addressof(table), ctypes.cast(name, c_char_p), Destructor()
    )
    return Exchanged


def aligned(shape, dtype, offset=0):
    """Zeros whose address is `offset` bytes beyond a multiple of 64."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(n_bytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def values(*shape):
    """Small whole numbers: exact in every dtype."""
    return (np.arange(np.prod(shape)) % 64).reshape(shape).astype(np.float32)
