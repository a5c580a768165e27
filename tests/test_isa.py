"""Instruction sets: which are found and chosen, and that each computes what plain C does, bit for bit."""

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE, bits, pair, tensor

import bitdelta
from bitdelta import _C, reference
from bitdelta.array import aligned_empty, to_float32
from bitdelta.delta import Delta

ROOT = Path(__file__).parent.parent
EMULATED = ("avx512-emulated", "amx-emulated")
ALL = ("amx", "avx512", "avx2", "neon", "generic", *EMULATED)

# N and K with and without padding, of one and of several strips and blocks; M for each product of each set: one row,
# the most that share look-ups, one tile of rows, two tiles (one padded), and more than a segment of the driver.
SHAPES = [
    (1, 1, 1),
    (16, 256, 2),
    (33, 300, 3),
    (47, 2000, 4),
    (5, 257, 5),
    (100, 1025, 16),
    (64, 513, 17),
    (31, 96, 75),
]


def in_child(isa, code="from bitdelta import _C; print(_C.isa())"):
    environment = {**os.environ, "BITDELTA_ISA": isa, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def compare():
    """compare(function): function() under every set, each against the generic set's."""
    before = _C.isa()

    def each(function):
        _C.set_isa("generic")
        expected = function()
        for name in _C.isas():
            _C.set_isa(name)
            yield name, expected, function()

    yield each
    _C.set_isa(before)


def random_delta(rng, n, k, planes, has_column):
    sign = aligned_empty((planes, -(-n // 16), 8 * -(-k // 256), 16), "uint32")
    for p in range(planes):
        sign[p] = reference.pack(rng.integers(0, 2, (n, k)).astype(bool))
    column = rng.uniform(0.5, 2, (planes, k)).astype(np.float32) if has_column else None
    return Delta(
        sign,
        rng.uniform(0, 0.1, (planes, n)).astype(np.float32),
        column,
        (n, k),
        "rank1" if has_column else "row",
    )


# ---- names -------------------------------------------------------------------------------------------------------


def test_names_are_known_and_the_best_comes_first():
    names = _C.isas()
    assert sorted(names, key=ALL.index) == list(names)
    assert names[0] not in EMULATED


def test_generic_and_the_emulations_are_there_on_every_machine():
    assert set(_C.isas()) >= {"generic", *EMULATED}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel's own list of features is Linux's")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the features' names are those of x86-64")
def test_sets_are_those_that_the_kernel_reports():
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    needed = {"avx2": {"avx2", "fma", "f16c"}}
    needed["avx512"] = needed["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed["amx"] = needed["avx512"] | {"amx_tile", "amx_int8"}
    assert {name for name in needed if needed[name] <= flags} == set(_C.isas()) & needed.keys()


def test_the_best_set_is_the_default():
    assert in_child("").stdout.split() == [_C.isas()[0]]


@pytest.mark.parametrize("name", _C.isas())
def test_a_set_is_chosen_by_the_environment(name):
    assert in_child(name).stdout.split() == [name]


@pytest.mark.parametrize("name", ["sse9", "AVX2", " generic", *(set(ALL) - set(_C.isas()))])
def test_a_set_that_is_not_there_is_refused_with_those_that_are(name):
    done = in_child(name)
    assert done.returncode != 0
    assert (
        f"ImportError: BITDELTA_ISA: expected one of {', '.join(_C.isas())} on this machine, got '{name}'"
        in done.stderr
    )
    with pytest.raises(ValueError, match=f"isa: expected one of generic|{name}"):
        _C.set_isa(name)


# ---- the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_terms_have_the_bits_of_the_generic_set(rng, compare, shape, dtype):
    n, k, m = shape
    deltas = [random_delta(rng, n, k, 1, True), random_delta(rng, n, k, 2, False)]
    x = tensor(rng.normal(size=(m, k)) * 10.0 ** rng.integers(-3, 4, (m, 1)), dtype)
    for ids in (np.zeros(m, int), rng.integers(-1, 2, m)):
        for name, expected, y in compare(lambda ids=ids: bitdelta.linear(x, None, deltas, ids)):
            np.testing.assert_array_equal(bits(y), bits(expected), name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_products_have_the_bits_of_the_generic_set(rng, compare, shape):
    n, k, m = shape
    deltas = [random_delta(rng, n, k, 2, True), random_delta(rng, n, k, 1, False)]
    dy, ids = tensor(rng.normal(size=(m, n))), rng.integers(-1, 2, m)
    for name, expected, g in compare(lambda: bitdelta.linear_transposed(dy, deltas, ids)):
        np.testing.assert_array_equal(bits(g), bits(expected), name)


def test_sums_at_the_ends_of_int16_and_int32_are_exact(rng, compare):
    """u = +-the largest gives q = -32768 and 32767; all of one sign, their sums come near 2^31."""
    n, k, m = 17, 65535, 6
    delta = random_delta(rng, n, k, 1, False)
    signs = rng.integers(0, 2, (n, k)).astype(bool)
    signs[0], signs[1] = True, False
    delta.sign[0] = reference.pack(signs)
    x = np.repeat(np.float32([[1], [-1]]), k, 1)[rng.integers(0, 2, m)]
    x[1] *= rng.choice(np.float32([-1, 1]), k)
    for name, expected, y in compare(lambda: bitdelta.linear(x, None, [delta], np.zeros(m, int))):
        np.testing.assert_array_equal(bits(y), bits(expected), name)


ODD_VALUES = {
    "zeros": [0.0, -0.0],
    "denormals": [1e-45, -1e-40, 3e-39],
    "around the least exponent": [2.0**-97, -(2.0**-96), 2.0**-112, 3 * 2.0**-112],
    "the largest": [3.4028235e38, -3.4028235e38, 1e30],
    "ties": [1.0, 2.0**-16, -(2.0**-16), 3 * 2.0**-16, 5 * 2.0**-16],
    "outliers": [1000.0, 1e-3, -2e-4],
    "an infinity": [1.0, np.inf],
    "a NaN": [1.0, np.nan],
}


@pytest.mark.parametrize("values", ODD_VALUES.values(), ids=ODD_VALUES)
@pytest.mark.parametrize("has_column", [False, True], ids=["row", "rank1"])
def test_odd_values_are_quantized_alike(rng, compare, values, has_column):
    delta = random_delta(rng, 20, 300, 1, has_column)
    x = rng.choice(np.float32(values), (3, 300))
    x[:, -1] = values[-1]
    for name, expected, y in compare(lambda: bitdelta.linear(x, None, [delta], [0, 0, 0])):
        np.testing.assert_array_equal(bits(y), bits(expected), name)


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (17, 256), (5, 1000)], ids=str)
@pytest.mark.parametrize("form", ["tensor", "row", "rank1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extraction_and_expansion_have_the_bits_of_the_generic_set(rng, compare, shape, form, dtype):
    base, finetuned = pair(rng, *shape, dtype)
    for other in DTYPES:
        tuned = tensor(to_float32(finetuned), other)
        for name, expected, delta in compare(lambda tuned=tuned: bitdelta.extract(base, tuned, 3, form)):
            for field in ("sign", "scale", "column"):
                assert np.array_equal(getattr(delta, field), getattr(expected, field)), (name, field)
        for name, expected, merged in compare(lambda delta=delta: delta.expand(base)):
            np.testing.assert_array_equal(bits(merged), bits(expected), name)


@pytest.mark.parametrize("m", [1, 4, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_base_products_of_every_set_are_near_the_generic_ones(rng, compare, m, dtype):
    x, weight = tensor(rng.normal(size=(m, 1003)), dtype), tensor(rng.normal(size=(29, 1003)), dtype)
    for name, expected, y in compare(lambda: bitdelta.linear(x, weight, [], np.full(m, -1))):
        error = np.abs(to_float32(y) - to_float32(expected)).max(1)
        assert (error <= TOLERANCE[dtype] * np.abs(to_float32(expected)).max(1)).all(), name


# ---- what only C sees --------------------------------------------------------------------------------------------


def build_probe(folder, compiler, *flags):
    border = ("module", "py_", "tensor", "cuda_")
    sources = [path for path in sorted((ROOT / "csrc").glob("*.c")) if not path.name.startswith(border)]
    command = [compiler, "-std=c11", "-O0", "-I", ROOT / "csrc", *flags, "-o", folder / "probe"]
    command += [ROOT / "tests" / "isa_probe.c", *sources, "-pthread", "-lm"]
    # Without the sanitizers' library, which neither the compiler nor a trap gets on with.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(command, check=True, env=environment)
    return folder / "probe", environment


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Runs isa_probe.c."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler, which this test needs to build tests/isa_probe.c")
    flags = ["-march=x86-64-v2"] if platform.machine() == "x86_64" else []
    program, environment = build_probe(tmp_path_factory.mktemp("isa"), compiler, *flags)
    return lambda *words: subprocess.run(
        [program, *words], env=environment, capture_output=True, text=True, check=False
    )


DELTA_ENTRIES = {"extract_row", "residual_row", "expand_row", "to_float32"}
LINEAR_ENTRIES = {"quantize", "stream_rows", "transposed_strip"}
REPLACED = {"generic": set(), "neon": {"stream_rows"}}


def test_every_set_replaces_the_generic_entries(probe):
    done = probe("tables")
    assert done.returncode == 0
    tables = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert tuple(tables) == _C.isas()
    for name, entries in tables.items():
        replaced = {entry for entry in entries if "<=" not in entry}
        assert replaced >= REPLACED.get(name, DELTA_ENTRIES | LINEAR_ENTRIES), name


def test_products_are_ordered_by_rows_and_the_last_takes_any_number(probe):
    for line in probe("tables").stdout.splitlines():
        most = [int(entry.split("<=")[1]) for entry in line.split() if "<=" in entry]
        assert sorted(set(most)) == most, line
        assert most[-1] == 2**63 - 1, line


def test_amx_multiplies_many_rows_and_look_ups_few(probe):
    table = probe("tables").stdout.split("amx-emulated", 1)[1].split()
    assert table[:2] == ["lut<=3", f"tiles<={2**63 - 1}"]


def test_look_ups_replace_tiles_where_the_system_refuses_them(probe):
    assert probe("refused").returncode == 0


def test_emulated_tiles_multiply_by_the_formula(probe):
    assert probe("dot").returncode == 0


@pytest.mark.parametrize("how", ["right", "unconfigured", "released", "shapes", "same", "unknown"])
def test_emulated_tiles_trap_when_wrongly_used(probe, how):
    assert probe("tiles", how).returncode in ([0] if how == "right" else [-signal.SIGILL, -signal.SIGTRAP])


@pytest.mark.parametrize("how", ["right", "unaligned"])
def test_emulated_registers_trap_when_loaded_unaligned(probe, how):
    assert probe("registers", how).returncode in (
        [0] if how == "right" else [-signal.SIGILL, -signal.SIGTRAP]
    )


@pytest.mark.parametrize("what", ["products", "streams"])
def test_every_table_multiplies_like_the_generic_one(probe, what):
    assert probe(what).returncode == 0


def test_arm64_multiplies_like_its_generic_table(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-gcc or no qemu-aarch64, on which arm64 runs here")
    program, environment = build_probe(tmp_path, compiler, "-static")
    for what in ("tables", "products", "streams"):
        done = subprocess.run(
            [emulator, program, what], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, what
        assert what != "tables" or done.stdout.startswith("neon lut")
