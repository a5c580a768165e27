"""What kernels cost on each target, from the compiler alone: no spills, and the tensor core products they need."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "kernels"))
sys.path.insert(0, str(ROOT / "kernels" / "microbench"))
import rates  # noqa: E402
import resources  # noqa: E402
import toolchain  # noqa: E402

TABLE = json.loads(resources.TABLE.read_text(encoding="utf-8")) if resources.TABLE.is_file() else {}


@pytest.fixture(scope="module")
def nvcc():
    try:
        found = toolchain.find_nvcc()
        toolchain.wanted_archs(toolchain.nvcc_version(found))
    except toolchain.ToolError as error:
        pytest.skip(str(error))
    return found


@pytest.fixture(scope="module")
def measured(nvcc):
    return resources.measure_all(nvcc, toolchain.kernel_sources())


def test_the_table_has_every_target_and_file():
    assert list(TABLE["targets"]) == list(toolchain.TARGETS)
    files = {
        Path(source).name
        for source in toolchain.kernel_sources()
        if re.search(r"^__global__", (ROOT / source).read_text(encoding="utf-8"), re.MULTILINE)
    }
    for kernels in TABLE["targets"].values():
        assert {name.partition(":")[0] for name in kernels} == files, "python kernels/resources.py --write"


def test_no_kernel_of_the_table_breaks_the_rules():
    assert resources.faults(TABLE["targets"]) == []


@pytest.mark.timeout(3600)  # compiles all kernels for all targets
def test_no_kernel_as_compiled_now_breaks_the_rules(measured):
    assert resources.faults(measured) == []


def test_the_table_is_what_this_nvcc_gives(nvcc, measured):
    version = "{}.{}".format(*toolchain.nvcc_version(nvcc))
    if version != TABLE["nvcc"]:
        pytest.skip(f"the table is of nvcc {TABLE['nvcc']}, this is {version}")
    assert measured == TABLE["targets"], "python kernels/resources.py --write"


@pytest.mark.parametrize("target", toolchain.TARGETS)
def test_opcodes_are_counted_where_their_number_is_known(nvcc, target):
    found = resources.measure(nvcc, Path(__file__).parent / "opcodes.cu", target)
    has_b1 = toolchain.TARGETS[target] == "b1"
    kernels = {name.partition("(")[0]: numbers for name, numbers in found.items()}
    assert {kind: kernels["five_b1"][kind] for kind in ("b1", "int8", "half")} == {
        "b1": 5 * has_b1,
        "int8": 0,
        "half": 0,
    }
    assert {kind: kernels["three_int8"][kind] for kind in ("b1", "int8", "half")} == {
        "b1": 0,
        "int8": 3,
        "half": 0,
    }
    assert kernels["nine_lop3"]["lop3"] == 9


@pytest.mark.parametrize("target", ["80", "90a", "100f"])
def test_the_loops_of_the_rates_are_made_of_what_they_measure(nvcc, target):
    found = rates.loops(nvcc, target)
    assert len(found) == 13
    has_b1, has_groups = toolchain.TARGETS[target] == "b1", target == "90a"
    assert all(numbers["stack"] == numbers["spill_stores"] == 0 for numbers in found.values())
    for kind, name, is_there in (("b1", "b1", has_b1), ("int8", "int8", True), ("half", "half", True)):
        assert {each: numbers[kind] for each, numbers in found.items() if numbers[kind]} == (
            {f"mma_rate<{name}>": 8} if is_there else {}
        )
    groups = {each: numbers["b1 of a warp group"] for each, numbers in found.items()}
    assert {each: count for each, count in groups.items() if count} == (
        {f"group_rate<{columns}>": 16 for columns in (8, 16, 32, 64)} if has_groups else {}
    )
    for kinds, wanted in ((1, {"lop3"}), (2, {"shf"}), (4, {"imad"}), (7, {"lop3", "shf", "imad"})):
        numbers = found[f"alu_rate<{kinds}>"]
        assert {kind for kind in ("lop3", "shf", "imad") if numbers[kind] >= 128} == wanted


def test_without_a_gpu_the_rates_say_so(nvcc, monkeypatch, capsys):
    monkeypatch.setattr(toolchain, "visible_archs", lambda: ())
    monkeypatch.setattr(sys, "argv", ["rates.py"])
    assert rates.main() == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "nvidia-smi shows no GPU" in captured.err


GOOD = {"registers": 32, "stack": 0, "spill_stores": 0, "spill_loads": 0, "static_shared": 0}
GOOD |= {"instructions": 99, "b1": 0, "int8": 0, "half": 0, "lop3": 1}


@pytest.mark.parametrize(
    "target, name, numbers, fault",
    [
        ("80", "a.cu:other", {}, None),
        ("80", "a.cu:multiply_few<unsigned int>", {"b1": 4}, None),
        ("100f", "a.cu:multiply_few<unsigned int>", {}, None),
        ("90a", "a.cu:other", {"spill_stores": 8}, "a.cu:other on 90a uses local memory"),
        ("90a", "a.cu:other", {"stack": 8}, "a.cu:other on 90a uses local memory"),
        ("100f", "a.cu:multiply_many<int>", {"int8": 8}, None),
        ("90a", "a.cu:multiply_few<int>", {}, "a.cu:multiply_few<int> on 90a has 0 b1 products"),
        ("100f", "a.cu:multiply_few<int>", {"int8": 8}, "a.cu:multiply_few<int> on 100f has 8 int8 products"),
        ("100f", "a.cu:multiply_many<int>", {}, "a.cu:multiply_many<int> on 100f has 0 int8 products"),
        ("80", "a.cu:other", {"half": 2}, "a.cu:other on 80 has 2 half products"),
    ],
)
def test_a_broken_rule_is_named(target, name, numbers, fault):
    found = resources.faults({target: {name: {**GOOD, **numbers}}})
    assert [each[: len(fault or "")] for each in found] == [fault] * bool(fault)
