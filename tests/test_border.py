"""The border between Python and C: what it takes as a tensor, and what it says of everything else."""

import array
import ctypes
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from border_calls import ARGUMENTS, WRONG, K, L, M, N, P, S, call, make_delta, ones, right
from dlpack_producer import (
    BFLOAT16,
    CUDA_HOST,
    READ_ONLY,
    Producer,
    aligned,
    make_exchange_class,
    values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitdelta
from bitdelta import _C, as_bfloat16
from bitdelta.array import from_float32


@pytest.fixture(autouse=True)
def _same_isa():
    before = _C.isa()
    yield
    _C.set_isa(before)


def read(tensor, shape):
    out = np.full(shape, -1, np.float32)
    _C.to_float32(out, tensor)
    return out


def bf16_bits(x):
    return from_float32(x, "bfloat16").view(np.uint16)


Exchanged, ExchangedWithoutView = make_exchange_class(), make_exchange_class(has_view=False)

KINDS = {
    "numpy fp32": lambda x: x,
    "numpy fp16": lambda x: x.astype(np.float16),
    "ml_dtypes bf16": lambda x: x.astype(ml_dtypes.bfloat16),
    "BFloat16Array": lambda x: as_bfloat16(bf16_bits(x)),
    "numpy read-only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    "numpy rows apart": lambda x: np.hstack([x, x])[:, : x.shape[1]],
    "torch fp32": torch.from_numpy,
    "torch fp16": lambda x: torch.from_numpy(x).half(),
    "torch bf16": lambda x: torch.from_numpy(x).bfloat16(),
    "torch rows apart": lambda x: torch.from_numpy(np.hstack([x, x]))[:, : x.shape[1]],
    "torch parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x), requires_grad=False),
    "torch inference": lambda x: torch.inference_mode()(lambda: torch.from_numpy(x) + 0)(),
    "memoryview fp32": memoryview,
    "memoryview fp16": lambda x: memoryview(x.astype(np.float16)),
    "ctypes": lambda x: (ctypes.c_float * x.shape[1] * x.shape[0]).from_buffer_copy(x),
    "legacy capsule": lambda x: Producer(x, "legacy"),
    "versioned capsule": Producer,
    "later minor version": lambda x: Producer(x, version=(1, 99)),
    "NULL strides": lambda x: Producer(x, strides="none"),
    "byte offset": lambda x: Producer(x, offset=64),
    "pinned memory": lambda x: Producer(x, device=CUDA_HOST),
    "bf16 capsule": lambda x: Producer(bf16_bits(x), dtype=BFLOAT16),
    "read-only capsule": lambda x: Producer(x, flags=READ_ONLY),
    "exchange": Exchanged,
    "exchange without view": ExchangedWithoutView,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_is_read(kind):
    x = values(5, 24)
    assert (read(KINDS[kind](x), x.shape) == x).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_multiplies_alike(kind):
    x = values(M, K)
    expected, out = ones(M, N), ones(M, N)
    call("linear", x=x, out=expected)
    call("linear", x=KINDS[kind](x), out=out)
    assert (out == expected).all()


@pytest.mark.parametrize(
    "kind",
    [
        "numpy fp32", "numpy fp16", "ml_dtypes bf16", "BFloat16Array", "numpy rows apart", "torch fp32", "torch fp16",
        "torch bf16", "torch rows apart", "memoryview fp32", "ctypes", "legacy capsule", "versioned capsule",
        "exchange", "exchange without view",
    ],
)  # fmt: skip
def test_every_writable_kind_is_written(kind):
    out = KINDS[kind](np.zeros((N, K), np.float32))
    call("expand", out=out, base=values(N, K), delta=make_delta())
    assert (read(out, (N, K)) == values(N, K) - 2).all()


def test_array_array_is_a_vector():
    assert (read(array.array("f", [1, 2, 3]), 3) == [1, 2, 3]).all()


def test_a_vector_may_have_any_stride_forward():
    assert (read(values(1, 12)[0, ::3], 4) == [0, 3, 6, 9]).all()


@pytest.mark.parametrize(
    ("function", "argument", "value", "exception", "words"),
    [case[1:] for case in WRONG],
    ids=[case[0] for case in WRONG],
)
def test_wrong_arguments_are_named(function, argument, value, exception, words):
    with pytest.raises(exception) as caught:
        call(function, **{argument: value})
    assert type(caught.value) is exception
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_right_arguments_pass(function):
    call(function)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_the_number_of_arguments_is_checked(function):
    with pytest.raises(TypeError):
        getattr(_C, function)()
    with pytest.raises(TypeError):
        getattr(_C, function)(*[None] * 12)
    with pytest.raises(TypeError):
        getattr(_C, function)(**right(function))


def test_an_output_may_not_overlap_an_input():
    buffer = np.zeros(4000, np.float32)
    x, out = buffer[: M * K].reshape(M, K), buffer[M * K - 1 :][: M * N].reshape(M, N)
    with pytest.raises(BufferError, match="out: expected memory of its own, got some that overlaps x"):
        call("linear", x=x, out=out)
    with pytest.raises(BufferError, match="y: expected memory of its own, got some that overlaps x"):
        call("linear_add", x=x, y=out)
    with pytest.raises(BufferError, match="overlaps weight"):
        call("linear", weight=buffer[: N * K].reshape(N, K), out=buffer[: M * N].reshape(M, N))
    with pytest.raises(BufferError, match="overlaps bias"):
        call("linear", bias=buffer[M * N - 1 :][:N], out=buffer[: M * N].reshape(M, N))
    with pytest.raises(BufferError, match="overlaps product"):
        call("linear", weight=None, product=buffer[: M * N].reshape(M, N), out=buffer[: M * N].reshape(M, N))
    with pytest.raises(BufferError, match="overlaps dy"):
        call("linear_transposed", dy=buffer[: M * N].reshape(M, N), out=buffer[: M * K].reshape(M, K))
    with pytest.raises(BufferError, match="overlaps matrix"):
        call("to_float32", matrix=x, out=x)


def test_an_output_may_not_overlap_a_delta():
    both = ones(N * K)
    scale = both[-P * N :].reshape(P, N)
    delta = _C.Delta(aligned((P, S, L, 16), np.uint32), scale, None, (N, K))
    with pytest.raises(BufferError, match="out: .* overlaps deltas"):
        call("linear", out=scale, x=ones(P, K), deltas=[delta], tenant_ids=[0, 0])
    with pytest.raises(BufferError, match="out: .* overlaps delta"):
        call("expand", out=both[: N * K].reshape(N, K), delta=delta)


def test_outputs_of_extract_lie_apart():
    both = np.zeros(P * N + P * K, np.float32)
    scale, column = both[: P * N].reshape(P, N), both[P * N - 1 :][: P * K].reshape(P, K)
    with pytest.raises(BufferError, match="column: .* overlaps scale"):
        call("extract", scale=scale, column=column)
    weight = aligned((N, K), np.float32)
    with pytest.raises(BufferError, match="sign: .* overlaps base"):
        big = aligned((P * S * L * 16 + N * K,), np.uint32)
        call(
            "extract",
            sign=big[: P * S * L * 16].reshape(P, S, L, 16),
            base=big[: N * K].view(np.float32).reshape(N, K),
        )
    with pytest.raises(BufferError, match="scale: .* overlaps finetuned"):
        call("extract", finetuned=weight, scale=weight.reshape(-1)[: P * N].reshape(P, N))


def test_slices_of_columns_of_one_array_do_not_overlap():
    wide = ones(M, K + N)
    call("linear", x=wide[:, :K], out=wide[:, K:])
    wide = ones(M, K + N)
    call("linear", x=wide[:, N:], out=wide[:, :N])
    with pytest.raises(BufferError, match="overlaps x"):
        call("linear", x=wide[:, :K], out=wide[:, K - 1 : K - 1 + N])


def test_expand_works_in_place_and_on_nothing_between():
    base, expected = values(N, K), ones(N, K)
    delta = make_delta()
    _C.expand(expected, base, delta, 0, N)
    _C.expand(base, base, delta, 0, N)
    assert (base == expected).all()
    with pytest.raises(BufferError, match="out: .* overlaps base"):
        _C.expand(base[:-1], base, delta, 0, N - 1)
    buffer = np.zeros(N * K + 1, np.float32)
    with pytest.raises(BufferError, match="out: .* overlaps base"):
        _C.expand(buffer[1:].reshape(N, K), buffer[:-1].reshape(N, K), delta, 0, N)


def test_no_rows_are_fine():
    call("linear", x=ones(0, K), out=ones(0, N), tenant_ids=[])
    call("linear_add", x=ones(0, K), y=ones(0, N), tenant_ids=np.zeros(0, np.int64))
    call("linear_transposed", dy=ones(0, N), out=ones(0, K), tenant_ids=[])
    call("expand", out=ones(0, K), row_begin=4, row_end=4)
    call("to_float32", matrix=ones(0, K), out=ones(0, K))


def test_no_deltas_leave_the_base_product():
    out = ones(M, N)
    call("linear", out=out, deltas=[], tenant_ids=[-1] * M, bias=None)
    assert (out == K).all()
    with pytest.raises(ValueError, match=r"tenant_ids: expected -1 \.\. -1, got 0 at row 0"):
        call("linear", deltas=[], tenant_ids=[0, 0, 0])


def test_no_base_product_leaves_the_delta_terms():
    out = ones(M, N)
    call("linear", out=out, weight=None, bias=None, tenant_ids=[0, 1, -1])
    assert (out == np.array([[-2 * K], [-2 * K], [0]])).all()


def test_tenant_ids_may_be_any_integers():
    expected = ones(M, N)
    call("linear", out=expected, tenant_ids=[1, 0, -1])
    strided = np.array([1, 9, 0, 9, -1, 9])[::2]
    for ids in (
        (1, 0, -1), np.array([1, 0, -1], np.int32), strided, strided.astype(np.int32), torch.tensor([1, 0, -1]),
        torch.tensor([1, 0, -1], dtype=torch.int32), memoryview(array.array("q", [1, 0, -1])), range(1, -2, -1),
        [np.int64(1), np.int32(0), -1],
    ):  # fmt: skip
        out = ones(M, N)
        call("linear", out=out, tenant_ids=ids)
        assert (out == expected).all()


def test_too_many_tenant_ids_are_refused_unread():
    with pytest.raises(ValueError, match=rf"tenant_ids: expected \[M\] = \[3\], got \[{2**48}\]"):
        call("linear", tenant_ids=range(2**48))  # as a tuple, more than any memory


def test_tenant_ids_that_lie_about_their_number_are_counted():
    class Liar(list):
        def __len__(self):
            return M

    with pytest.raises(ValueError, match=r"tenant_ids: expected \[M\] = \[3\], got \[1\]"):
        call("linear", tenant_ids=Liar([0]))


def test_a_single_row_may_have_any_stride():
    call(
        "linear",
        x=ones(1, 2 * K)[:, :K],
        out=np.lib.stride_tricks.as_strided(ones(1, N), (1, N), (1, 4)),
        tenant_ids=[0],
    )


def test_a_list_that_loses_its_deltas_meanwhile_does_no_harm():
    deltas = [make_delta()]
    x, out = np.ones((64, K), np.float32), ones(64, N)
    stop = threading.Event()

    def change():
        while not stop.is_set():
            deltas[:] = [make_delta()]

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(200):
        _C.linear(out, x, None, None, None, deltas, [0] * 64, "fixed16")
    stop.set()
    thread.join()
    assert (out == -2 * K).all()


def test_delta_is_closed():
    delta = make_delta()
    assert (delta.planes, delta.shape) == (P, (N, K))
    with pytest.raises(AttributeError):
        delta.planes = 3
    with pytest.raises(TypeError):
        _C.Delta.planes = 3
    with pytest.raises(TypeError):
        type("Sub", (_C.Delta,), {})


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=100),
    st.lists(st.integers(-2, 5), max_size=4),
    st.sampled_from([make_delta(), make_delta(4, 300, 1, False), object(), np.ndarray, _C.Delta, _C.linear]),
    st.builds(
        lambda dtype, shape, step: np.zeros([size * abs(step) for size in shape], dtype)[
            tuple(slice(None, None, step) for _ in shape)
        ],
        st.sampled_from(["f4", "f2", "f8", "i4", "i8", "u4", "u2", ">f4", "?", "c8", "U3", "O", "M8[s]"]),
        st.lists(st.sampled_from([0, 1, 2, 3, 16, 20, 40]), max_size=4),
        st.sampled_from([1, 1, 1, 2, -1]),
    ),
    st.builds(
        lambda dtype, shape: torch.zeros(shape, dtype=dtype),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
        st.lists(st.sampled_from([0, 1, 2, 3, 20, 40]), max_size=3),
    ),
    st.builds(
        lambda protocol, flags, changes: Producer(np.zeros((M, K), np.float32), protocol, flags, **changes),
        st.sampled_from(["legacy", "versioned"]),
        st.integers(0, 7),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.tuples(st.integers(0, 20), st.integers(0, 255), st.integers(0, 3)),
                "ndim": st.integers(-2, 2),
                "data": st.none(),
                "device": st.integers(-2, 20),
                "version": st.tuples(st.integers(0, 2), st.integers(0, 9)),
                "strides": st.lists(st.integers(-2, 0), min_size=2, max_size=2) | st.just("none"),
            },
        ),
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_wrong_argument_crashes(data):
    function = data.draw(st.sampled_from(sorted(set(ARGUMENTS) - {"set_num_threads"})))
    names = data.draw(st.lists(st.sampled_from(ARGUMENTS[function]), min_size=1, max_size=3))
    changes = {name: data.draw(ANYTHING, label=name) for name in names}
    try:
        call(function, **changes)
    except (TypeError, ValueError, BufferError, MemoryError, bitdelta.DeviceError) as error:
        assert str(error)
