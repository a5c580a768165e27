"""The emulation that kernels are tested on: right kernels give what plain loops give, wrong ones are found."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "kernels"))
import toolchain  # noqa: E402

BD_ERR_CUDA = 4


class Emulation:
    """Kernels of emulation_kernels.cu, called with NumPy arrays that are lent for the call."""

    def __init__(self, library):
        self.library = library
        library.bd_gpu_message.restype = ctypes.c_char_p

    def run(self, name, *arguments, inputs=()):
        """Runs a launcher; None, or the message of the failure. Arrays in `inputs` are not writable."""
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        loans = [
            (array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes), all(array is not i for i in inputs))
            for array in arrays
        ]  # fmt: skip
        for loan in loans:
            assert self.library.bd_gpu_lend(*loan) == 0
        converted = [
            argument.ctypes.data_as(ctypes.c_void_p) if isinstance(argument, np.ndarray) else argument
            for argument in arguments
        ]
        try:
            status = getattr(self.library, name)(*converted)
        finally:
            for loan in loans:
                self.library.bd_gpu_take_back(*loan)
        assert status in (0, BD_ERR_CUDA)
        return self.library.bd_gpu_message().decode() if status else None


@pytest.fixture(scope="module", params=["c++", "clang++", "ucontext"])
def emulation(request, tmp_path_factory):
    compiler = "c++" if request.param == "ucontext" else request.param
    if compiler == "clang++" and not shutil.which(compiler):
        pytest.skip("clang++ is not installed")
    folder = tmp_path_factory.mktemp(request.param.replace("+", "p"))
    sources = [*toolchain.emulation_sources(), "tests/cuda/emulation_kernels.cu"]
    runs = []
    for source in sources:
        command = toolchain.emulation_command([compiler], ROOT / source, folder / f"{Path(source).name}.o")
        extra = ["-Werror", *(["-DBD_UCONTEXT"] if request.param == "ucontext" else [])]
        runs.append(subprocess.Popen([*command, *extra], stderr=subprocess.PIPE, text=True))
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors[-3000:]
    library = folder / "emulation.so"
    link = [compiler, "-shared", *map(str, sorted(folder.glob("*.o"))), "-o", str(library), "-pthread"]
    subprocess.run(link, check=True)
    return Emulation(ctypes.CDLL(str(library)))


@pytest.fixture(params=["ascending", "descending"])
def order(request, monkeypatch):
    monkeypatch.setenv("BITDELTA_EMULATION_ORDER", request.param)


def words(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def plain_product(kind, A, B):
    """The product as int32, from the bits or bytes of the words."""
    if kind == "b1":
        left, right = (np.unpackbits(x.view(np.uint8), axis=-1) for x in (A, B))
    else:
        left, right = A.view(np.uint8), B.view(np.int8)
    return left.astype(np.int32) @ right.astype(np.int32).T


@pytest.mark.parametrize("kind", ["b1", "u8s8"])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_tensor_core_products_are_those_of_plain_loops(emulation, kind, n_steps):
    rng = np.random.default_rng(0)
    A, B, C = words(rng, 16, 8 * n_steps), words(rng, 8, 8 * n_steps), np.zeros((16, 8), np.int32)
    assert emulation.run("run_product", kind == "b1", A, B, C, n_steps, 0, inputs=(A, B)) is None
    assert np.array_equal(C, plain_product(kind, A, B))


@pytest.mark.parametrize("kind", ["b1", "u8s8"])
def test_a_wrong_fragment_register_changes_the_product(emulation, kind):
    rng = np.random.default_rng(0)
    A, B, C = words(rng, 16, 8), words(rng, 8, 8), np.zeros((16, 8), np.int32)
    assert emulation.run("run_product", kind == "b1", A, B, C, 1, 1) is None
    assert not np.array_equal(C, plain_product(kind, A, B))


def test_the_host_takes_b1_products_where_the_table_of_targets_has_them(emulation):
    for capability, target in toolchain.OF_CAPABILITY.items():
        has_b1 = emulation.library.has_b1(int(capability.replace(".", "")))
        assert has_b1 == (toolchain.TARGETS[target] == "b1"), capability


@pytest.mark.parametrize("call", ["atomicAdd(sum, 1)", "atomicMin(sum, 1)"])
@pytest.mark.parametrize("kind", ["int", "float", "double"])
def test_atomics_of_floats_whose_sums_have_no_order_do_not_compile(tmp_path, kind, call):
    source = tmp_path / "atomic.cu"
    source.write_text(f'#include "gpu.h"\n__global__ void add({kind} *sum) {{ {call}; }}\n')
    command = toolchain.emulation_command(["c++"], source, tmp_path / "atomic.o")
    done = subprocess.run([*command, "-Wno-unused-function"], capture_output=True, text=True)
    assert (done.returncode == 0) == (kind == "int"), done.stderr
    assert kind == "int" or "static assertion failed" in done.stderr


@pytest.mark.parametrize("n, block", [(512, 64), (1023, 128), (97, 32), (5, 256)])
def test_barriers_shuffles_ballots_atomics_and_copies(emulation, order, n, block):
    numbers = np.random.default_rng(n).integers(-1000, 1000, n, dtype=np.int32)
    n_blocks = -(-n // (4 * block))
    storage = np.zeros(n + 4, np.int32)
    start = (-storage.ctypes.data % 16) // 4  # copies of 16 bytes need an aligned source
    aligned = storage[start : start + n]
    aligned[:] = numbers
    out = np.zeros(n + n_blocks, np.int32)
    assert emulation.run("run_prefix_sums", aligned, out, n, block, inputs=(aligned,)) is None
    for i in range(n_blocks):
        part = numbers[4 * block * i : 4 * block * (i + 1)]
        assert np.array_equal(out[4 * block * i :][: len(part)], np.cumsum(part))
        assert out[n + i] == np.count_nonzero(part % 2)


def test_shuffles_read_the_lane_they_name(emulation, order):
    value = np.random.default_rng(0).integers(0, 2**63, 32, dtype=np.uint64)
    out = np.zeros((5, 32), np.uint64)
    assert emulation.run("run_shuffles", value, out, inputs=(value,)) is None
    lane = np.arange(32)
    begin = lane & ~7
    assert np.array_equal(out[0], value[begin + np.where(lane % 2 == 0, 2, 3)])
    assert np.array_equal(out[1], value[lane ^ 6])
    assert np.array_equal(out[2], value[np.where(lane + 2 < begin + 8, lane + 2, lane)])
    assert np.array_equal(out[3], value[np.where(lane - 2 >= begin, lane - 2, lane)])
    assert np.array_equal(out[4], np.where(lane % 2 == 0, 0, 3))  # lane 5 is odd, lane 6 is even


def test_blocks_that_fence_may_read_each_other(emulation, order):
    numbers = np.arange(1, 9, dtype=np.int32)
    parts, counter, out = np.zeros(8, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32)
    assert emulation.run("run_sum", numbers, parts, counter, out, 8, inputs=(numbers,)) is None
    expected = 0
    for number in numbers:
        expected = expected * 3 + number
    assert (out[0], counter[0]) == (expected, 8)


MISUSES = {
    1: "race: it (reads|writes) byte .* of shared memory, which thread .* (wrote|read), without a barrier",
    2: "race: it (reads|writes) byte .* of shared memory, which thread .* (wrote|read), without a barrier",
    3: "race: it writes byte .* of shared memory, which thread .* wrote, without a barrier",
    4: "race: it (reads|writes) byte .* of shared memory, which thread .* (wrote|read), without a barrier",
    5: "race: it (reads|writes)",
    6: "uninitialised: byte 0 of shared memory",
    7: r"divergence: thread \(0, 0, 0\) waits at __syncthreads .*, thread \(40, 0, 0\) has returned",
    8: "divergent barrier: it is at __syncthreads of emulation_kernels.cu:",
    9: r"__shfl_sync: mask 0xffffffff names lane 7, which has returned",
    10: "__shfl_sync: lane 0 reads lane 20, which the mask 0x0000ffff leaves out",
    11: "__ballot_sync: mask 0x0000ffff leaves out the lane that calls, 16",
    12: "divergence: .* waits at __ballot_sync for lanes 0xffffffff .*, .* waits at __shfl_sync",
    13: "unwaited copy: byte 0 of shared memory",
    14: "unwaited copy: byte 0 of shared memory",
    15: "(race|unwaited copy): ",
    16: "unwaited copy: it returns with 1 asynchronous copies under way",
    17: "race: it writes byte .* of shared memory, which thread .* read",
    18: "bd_copy_async16: shared % 16 = 0, global % 16 = 4, 16 bytes",
    19: "out of bounds: 4 bytes at byte 1024 of shared memory, which has 1024",
    20: "out of bounds: it reads 4 bytes at byte 1024 of a global buffer of 1024",
    21: "out of bounds: it writes 4 bytes at byte -4 of a global buffer of 1024",
    22: "it writes 4 bytes at byte 0 of a global buffer that is an input",
    23: "misaligned: an address that its type does not allow .emulation_kernels.cu:",
    24: "out of bounds: an index beyond its array .emulation_kernels.cu:",
    25: "a shift by the width or more .emulation_kernels.cu:",
    26: "signed overflow of a sum .emulation_kernels.cu:",
    27: "a float beyond the integer it becomes",
    30: "bd_mma_b1: mask 0xffffffff names lane 16, which|divergence|has returned",
    31: "out of bounds: it writes 4 bytes of memory that is not the GPU's",
    32: "out of bounds: it reads 4 bytes of memory that is not the GPU's",
    33: "race: it updates byte 0 of a global buffer, which thread .* wrote",
    34: "__ldg of shared memory",
}


def misuse(emulation, which, n_blocks=1):
    memory = np.zeros(3 * 1024 + 64, np.uint8)  # between the two arrays lies what belongs to neither
    start = -memory.ctypes.data % 64
    given = memory[start : start + 1024].view(np.int32)
    out = memory[start + 2048 : start + 3072].view(np.int32)
    given[:] = np.arange(256)
    return emulation.run("run_misuse", which, n_blocks, given, out, inputs=(given,)), out


@pytest.mark.parametrize("which", MISUSES)
def test_a_misuse_is_found_and_named(emulation, which):
    message, _ = misuse(emulation, which)
    assert message is not None
    assert message.startswith("kernel misuse<which>, block (0, 0, 0)"), message
    assert re.search(MISUSES[which], message), message


def test_the_same_kernel_without_a_misuse_passes(emulation, order):
    for n_blocks in (1, 3):
        message, out = misuse(emulation, 0, 1)
        assert message is None, n_blocks
        assert np.array_equal(out[:64], (np.arange(64) + 1 + np.arange(64) % 4)[::-1])


@pytest.mark.parametrize("which", [28, 29])
def test_blocks_that_share_a_byte_without_an_order_are_found(emulation, order, which):
    assert misuse(emulation, which, 1)[0] is None
    found = misuse(emulation, which, 2)[0]
    assert re.search("which another block (wrote|read), without fences and atomics between", found), found


@pytest.mark.parametrize(
    "grid, block, shared, said",
    [(0, 32, 0, "of nothing"), (1, 0, 0, "of nothing"), (1, 1025, 0, "1024 threads"), (1, 32, 101377, "99 KB")],
)  # fmt: skip
def test_an_impossible_launch_is_refused(emulation, grid, block, shared, said):
    assert said in emulation.run("run_nothing", grid, block, shared, 1)


def test_a_failed_launch_leaves_the_next_one_alone(emulation):
    assert misuse(emulation, 1)[0] is not None
    assert misuse(emulation, 0)[0] is None
    assert emulation.run("run_nothing", 2, 1024, 101376, 3) is None
