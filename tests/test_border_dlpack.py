"""The border and other producers of tensors: torch, and whatever speaks DLPack, well or badly."""

import gc
import sys

import numpy as np
import pytest
import torch
from border_calls import K, L, M, N, P, S, call, ones
from dlpack_producer import (
    CUDA,
    READ_ONLY,
    Producer,
    aligned,
    make_exchange_class,
    values,
)

import bitdelta
from bitdelta import _C


def refuses(tensor, *words):
    with pytest.raises(BufferError) as caught:
        call("linear", x=tensor)
    assert [word for word in ("x: ", *words) if word not in str(caught.value)] == [], str(caught.value)


def test_torch_with_gradient_is_refused():
    refuses(torch.ones(M, K, requires_grad=True), "x.detach()")
    refuses(torch.nn.Parameter(torch.ones(M, K)), "x.detach()")
    refuses(torch.ones(M, K, requires_grad=True) * 2, "x.detach()")


def test_torch_lazily_negated_is_refused():
    negated = torch.view_as_complex(torch.ones(M, K, 2)).conj().imag
    assert negated.is_neg()
    refuses(negated, "x.resolve_neg()")


def test_torch_lazily_conjugated_is_refused():
    refuses(torch.view_as_complex(torch.ones(M, K, 2)).conj(), "x.resolve_conj()")


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_torch_without_strides_is_refused(layout):
    refuses(getattr(torch.eye(40), layout)())


def test_torch_without_memory_is_refused():
    with pytest.raises((BufferError, bitdelta.DeviceError), match="x: "):
        call("linear", x=torch.ones(M, K, device="meta"))


def test_torch_fake_tensor_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(M, K)
    refuses(fake)


def test_torch_dtypes_are_named():
    for dtype in (torch.float64, torch.int32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"x: .*got {str(dtype).removeprefix('torch.')}"):
            call("linear", x=torch.ones(M, K, dtype=dtype))


def test_a_delta_keeps_the_memory_of_torch_tensors():
    sign = torch.from_numpy(aligned((P, S, L, 16), np.uint32))
    delta = _C.Delta(sign, torch.ones(P, N), None, (N, K))
    del sign
    gc.collect()
    out = ones(N, K)
    _C.expand(out, None, delta, 0, N)
    assert (out == -2).all()


@pytest.mark.parametrize("protocol", ["legacy", "versioned"])
def test_the_deleter_runs_once_after_success(protocol):
    x = Producer(values(M, K), protocol)
    call("linear", x=x)
    gc.collect()
    assert (x.exported, x.deleted) == (1, 1)


@pytest.mark.parametrize("protocol", ["legacy", "versioned"])
@pytest.mark.parametrize("changes", [{"lanes": 2}, {"ndim": 9}, {"dtype": (0, 32, 1)}, {"data": None}])
def test_the_deleter_runs_once_after_a_refusal(protocol, changes):
    x = Producer(values(M, K), protocol, **changes)
    with pytest.raises((TypeError, ValueError, BufferError)):
        call("linear", x=x)
    gc.collect()
    assert (x.exported, x.deleted) == (1, 1)


def test_the_deleter_runs_once_for_an_unknown_major_version():
    x = Producer(values(M, K), version=(2, 0))
    with pytest.raises(BufferError, match="version"):
        call("linear", x=x)
    gc.collect()
    assert (x.exported, x.deleted) == (1, 1)


def test_a_foreign_device_is_refused_before_it_exports():
    x = Producer(values(M, K), device=CUDA)
    with pytest.raises(bitdelta.DeviceError, match="x: expected CPU memory, got CUDA memory"):
        call("linear", x=x)
    assert x.exported == 0


def test_a_delta_keeps_its_export_until_it_goes():
    scale = Producer(ones(P, N))
    delta = _C.Delta(aligned((P, S, L, 16), np.uint32), scale, None, (N, K))
    assert (scale.exported, scale.deleted) == (1, 0)
    del delta
    assert scale.deleted == 1


def test_the_exchange_api_is_used_without_a_capsule():
    cls = make_exchange_class()
    call("linear", x=cls(values(M, K)))
    assert (cls.views, cls.exports) == (1, 0)


def test_the_exchange_api_tells_that_an_output_is_read_only():
    cls = make_exchange_class()
    with pytest.raises(BufferError, match="out: expected writable memory"):
        call("linear", out=cls(ones(M, N), flags=READ_ONLY))
    assert (cls.exports, cls.deleted) == (1, 1)


@pytest.mark.parametrize("has_view", [True, False], ids=["view", "export"])
def test_a_failing_exchange_is_an_error(has_view):
    with pytest.raises(BufferError, match="x: its DLPack export failed"):
        call("linear", x=make_exchange_class(has_view=has_view, fails=True)(values(M, K)))


def test_an_exchange_api_of_another_major_version_is_not_used():
    cls = make_exchange_class(version=(7, 0))
    with pytest.raises(TypeError, match="x: expected a NumPy array or another tensor"):
        call("linear", x=cls(values(M, K)))


class Odd:
    """A producer of what is no capsule."""

    def __init__(self, capsule, device=(1, 0)):
        self.capsule, self.device = capsule, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **keywords):
        if isinstance(self.capsule, BaseException):
            raise self.capsule
        return self.capsule


def used_capsule():
    x = torch.ones(M, K)
    capsule = torch.utils.dlpack.to_dlpack(x)
    torch.utils.dlpack.from_dlpack(capsule)
    return capsule


@pytest.mark.parametrize(
    ("odd", "exception", "words"),
    [
        (lambda: Odd(None), BufferError, "x: expected a DLPack capsule of __dlpack__, got None"),
        (lambda: Odd(used_capsule()), BufferError, "x: expected a DLPack capsule"),
        (lambda: Odd(sys.modules["datetime"].datetime_CAPI), BufferError, "x: expected a DLPack capsule"),
        (lambda: Odd(BufferError("no")), BufferError, "x: its DLPack export failed: no"),
        (lambda: Odd(TypeError("no")), BufferError, "x: its DLPack export failed: no"),
        (lambda: Odd(KeyboardInterrupt()), KeyboardInterrupt, None),
        (
            lambda: Odd(None, device=None),
            BufferError,
            "x: expected .type, id. of __dlpack_device__, got None",
        ),
        (lambda: Odd(None, device=("cpu", 0)), BufferError, "x: expected .type, id."),
        (lambda: Odd(None, device=(10**30, 0)), BufferError, "x: expected .type, id."),
    ],
)
def test_odd_producers_are_refused(odd, exception, words):
    import datetime  # noqa: F401 - its capsule

    with pytest.raises(exception, match=words):
        call("linear", x=odd())
