"""The bench in its quick form: it checks, it measures every row of the goals, it tells what it could not."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import bitdelta
from bitdelta import _C, bench
from bitdelta.bench import check, files, goals, limits, machine, process, strips, timing
from bitdelta.bench.data import QUICK, Data
from bitdelta.cli import main
from bitdelta.errors import Error
from bitdelta.table import table


@pytest.fixture(scope="module")
def report():
    messages = []
    found = bench.run("cpu", quick=True, log=messages.append)
    assert "every bit equal" in "\n".join(messages)
    return found


def test_every_case_of_the_goals_is_measured_or_named(report):
    kinds = {row["kind"] for row in report["rows"]}
    missing = set() if os.path.exists("/proc/self/maps") else {"load", "memory"}
    if report["limits"][-1]["read"] is None:
        missing.add("swap cold")
    if importlib.util.find_spec("torch") is None:
        missing.add("overhead")
    assert kinds == set(goals.NAMES) - missing
    assert all(any(goals.NAMES[kind] in line for line in report["not_measured"]) for kind in missing)
    assert {row["rows"] for row in report["rows"] if row["kind"] == "delta"} == {1, 4, 16, 64}
    assert {row["threads"] for row in report["rows"] if "threads" in row} == {1, machine.cores()}
    timed = {row["variant"] for row in report["rows"] if row["kind"] == "delta" and row["rows"] == 1}
    assert timed == {name for name in _C.isas() if "emulated" not in name}
    assert "amx" in timed or any("no AMX" in line for line in report["not_measured"])


def test_rows_hold_positive_figures_and_ratios_to_the_best_dense_product(report):
    for row in report["rows"]:
        assert all(
            row[key] > 0 for key in ("microseconds", "bytes_per_second", "share", "ratio") if row.get(key)
        )
        if row["kind"] == "dense":
            assert row["ratio"] >= 1
    json.dumps(report, allow_nan=False)


def test_the_limits_of_memory_arithmetic_and_disk_come_first(report):
    *memory, disk = report["limits"]
    assert [limit["threads"] for limit in memory] == sorted({1, machine.cores()})
    assert all(limit["bandwidth"] > 0 and limit["flops"] > 0 for limit in memory)
    assert disk["write"] > 0 and (disk["read"] is None or disk["read"] > 0)
    text = list(bench.describe(report))
    place = next(i for i, line in enumerate(text) if line.startswith("limits, "))
    assert place < next(i for i, line in enumerate(text) if "dense product" in line)


def test_every_timed_case_is_checked_on_the_weights_it_is_timed_with(report):
    timed = sum("threads" in row for row in report["rows"])
    assert report["checked_cases"] == timed > 0
    assert f"{timed} timed cases" in "\n".join(bench.describe(report))


def test_a_swap_reads_every_byte_of_the_delta(report):
    swaps = {row["kind"]: row for row in report["rows"] if row["kind"].startswith("swap")}
    assert swaps["swap"]["calls"] == files.SWAPS
    for row in swaps.values():
        assert row["bytes_per_second"] * row["microseconds"] / 1e6 > 0 and row["share"] > 0


def test_a_load_copies_nothing(report):
    assert [row["bytes"] for row in report["rows"] if row["kind"] == "load"] in ([0], [])


def test_what_pytorch_adds_to_a_call_is_measured(report):
    pytest.importorskip("torch")
    [row] = [row for row in report["rows"] if row["kind"] == "overhead"]
    assert row["goal"] == "<= 10 us" and row["calls"] >= 600 and row["met"] is None  # a quick run's
    assert goals.judge({"kind": "overhead", "microseconds": 9.0}, machine.describe())["met"] is True
    late = goals.judge({"kind": "overhead", "microseconds": 11.0}, machine.describe())
    assert late["met"] is False and "11 us, goal <= 10 us" in goals.summary([late])[1]
    assert any("bitdelta.ops.linear" in line for line in goals.not_measured([], {"torch": None}))


def test_the_report_can_be_read(report):
    text = "\n".join(bench.describe(report))
    for word in (
        "us",
        "GB/s",
        "of read",
        "goal",
        "16 tenants",
        "merged",
        "loading a packfile",
        "mean nothing",
    ):
        assert word in text


def test_goals_follow_the_machine():
    intel, zen5 = {"vendor": "GenuineIntel", "family": 6}, {"vendor": "AuthenticAMD", "family": 26}
    row = {"kind": "delta", "rows": 1, "variant": "avx512", "threads": 1, "ratio": 1 / 9}
    assert goals.judge(row, intel)["met"] is False and goals.judge(row, zen5)["met"] is True
    assert goals.judge({**row, "variant": "avx2"}, intel)["goal"] == "<= 1/8"
    assert goals.judge({**row, "threads": 2}, intel)["goal"] == "<= 1/10"
    assert goals.judge({**row, "variant": "generic"}, intel)["goal"] is None
    many = {**row, "rows": 16, "variant": "amx"}
    assert goals.judge(many, intel)["goal"] == "<= 1/6"
    assert goals.judge({**many, "variant": "avx2"}, intel)["goal"] == "<= 1/2"
    extract = {"kind": "extract", "rows": None, "variant": "avx512", "threads": 1, "share": 0.85}
    assert goals.judge(extract, intel)["met"] is False
    assert goals.judge({**extract, "variant": "avx2"}, intel)["met"] is True
    judged = goals.judge({**extract, "shape": (16, 256), "bandwidth": 1e9}, intel)
    assert "0 of 1 goals met" in goals.summary([judged])[0] and "85%" in goals.summary([judged])[1]


def test_a_kernel_that_differs_is_named(monkeypatch):
    monkeypatch.setattr(check, "_same_bits", lambda got, expected: False)
    with pytest.raises(Error, match="extract 48x512 bfloat16 1 planes row differs"):
        check.kernels(lambda line: None)


def test_a_strip_that_is_off_is_named(rng):
    data = Data(QUICK)
    x, weights, deltas, ids = (
        data.rows(2, 256),
        data.weights(48, 256),
        data.deltas(48, 256)[:1],
        np.zeros(2, int),
    )
    for rows in strips.row_strips(48):
        whole = bitdelta.linear(x, None, deltas, ids)
        assert (
            whole[:, rows].tobytes()
            == bitdelta.linear(x, None, [strips.rows_of(deltas[0], rows)], ids).tobytes()
        )
    strips.exact("product", whole, x, deltas, ids)
    wrong = whole.bits.copy()
    wrong[1, 47] ^= 1  # the last bit of the last strip
    with pytest.raises(Error, match="product: differs"):
        strips.exact("product", bitdelta.as_bfloat16(wrong), x, deltas, ids)
    y = bitdelta.linear(x, weights[0], deltas, ids)
    strips.close("sum", y, x, weights[:1], deltas, ids)
    for left_out in (np.array([0, -1]), np.array([-1, 0])):
        with pytest.raises(Error, match="sum: .* away from the product in fp64"):
            strips.close("sum", bitdelta.linear(x, weights[0], deltas, left_out), x, weights[:1], deltas, ids)
    dy = data.rows(1, 48)
    g = bitdelta.linear_transposed(dy, deltas, ids[:1])
    assert g.tobytes() == bitdelta.linear_transposed(dy, [strips.columns_of(deltas[0])], ids[:1]).tobytes()


def test_cases_are_verified_by_what_turn_0_gives():
    def check(found):
        if found != 1:
            raise Error("off")

    assert timing.Case(lambda turn: turn + 1, 0, _C.isa(), check).verify() is True
    assert timing.Case(lambda turn: None, 0, _C.isa()).verify() is False
    with pytest.raises(Error, match="off"):
        timing.Case(lambda turn: turn, 0, _C.isa(), check).verify()


def test_files_of_the_disk_are_read_from_it_or_not_measured(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    if not limits.evict(path):
        pytest.skip("the page cache keeps files of this folder")
    path.read_bytes()
    with path.open("rb") as file:  # it is in the cache now, and evict would find it there
        assert os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1


def test_one_linear_is_timed_against_size_and_tenants(capsys):
    assert main(["bench", "latency", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["kind"], row["rank"], row["size"], row["tenants"]): row for row in found["rows"]}
    kinds = [("naive", None), ("deltas", None), ("lora", 16), ("lora", 128)]
    assert set(rows) == {(*kind, size, count) for kind in kinds for size in (256, 512) for count in (1, 3)}
    assert found["checked_cases"] == len(rows)
    for (_, _, size, count), row in rows.items():
        assert row["speed"] == pytest.approx(
            rows["naive", None, size, count]["microseconds"] / row["microseconds"]
        )
    text = "\n".join(bench.describe(found))
    for word in ("limits, ", "LoRA r=128 ms", "against naive", "naive by ", "timed cases"):
        assert word in text


def test_checking_leaves_the_instruction_set_as_it_was():
    before = _C.isa()
    with check.isa("generic"):
        assert _C.isa() == "generic"
    assert _C.isa() == before


def test_cases_are_interleaved_and_rotate():
    seen = []
    cases = {
        "a": timing.Case(lambda turn: seen.append(("a", turn)), 1, _C.isa()),
        "b": timing.Case(lambda turn: seen.append(("b", turn)), 1, _C.isa()),
    }
    samples = timing.interleaved(cases, 0.0, min_rounds=3)  # no time: the least number of rounds
    assert samples["a"].calls == samples["b"].calls == 3 * timing.BURST
    assert [turn for name, turn in seen if name == "a"] == list(range(1, 3 + 3 * (timing.BURST + 1)))
    names = "".join(name for name, _ in seen[4:])
    assert names == "aaaabbbb" * 3


def test_reading_folds_every_byte():
    data = np.frombuffer(np.random.default_rng(0).bytes((5 << 20) + 3), np.uint8)
    padded = np.zeros(len(data) + 5, np.uint8)
    padded[: len(data)] = data
    assert _C.read(data) == int(np.bitwise_xor.reduce(padded.view("<u8")))
    assert _C.read(b"") == 0
    with pytest.raises(BufferError):
        _C.read(data[::2])


def test_the_checkpoints_are_read_by_safetensors(tmp_path):
    from safetensors import safe_open

    shapes = dict(files._shapes(*files.QUICK))
    n_bytes, largest = files.write_pair(tmp_path, shapes)
    assert (
        n_bytes == 2 * sum(2 * int(np.prod(shape)) for shape in shapes.values()) and largest == 2 * 512 * 256
    )
    for folder in ("base", "finetuned"):
        with safe_open(tmp_path / folder / "model.safetensors", "np") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes
    assert files.read_maps(str(tmp_path / "base"), str(tmp_path / "finetuned")) > 0


def test_the_command_prints_one_document(capsys):
    assert main(["bench", "io", "--quick", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert {row["kind"] for row in found["rows"]} >= {"maps", "compress", "swap"}
    assert "verified the delta" in captured.err and found["limits"][-1]["write"] > 0


def test_a_measurement_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Error, match="status 1"):
        process.run("products", 1, True, lambda line: None)


def test_tables_are_plain_or_rich():
    columns, rows = ("name", ">n"), [["a", "1"], ["long", "22"]]
    assert list(table(columns, rows, "title", pretty=False)) == ["title", "name   n", "a      1", "long  22"]
    pretty = "\n".join(table(columns, rows, "title", pretty=True))
    assert "long" in pretty and "\x1b[" in pretty
    code = (
        "import sys; sys.modules['rich'] = None; from bitdelta.table import table; "
        "print(*table(('a',), [['b']], pretty=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "a b\n"


def test_decoding_for_many_tenants_is_measured_against_merged_models_and_lora(capsys):
    pytest.importorskip("transformers", reason="torch or transformers is not installed")
    assert main(["bench", "model", "--quick", "--tenants", "3", "--layers", "1", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "greedy tokens of 4 rows against merged models: all equal" in captured.err
    rows = {(row["kind"], row["rank"], row["tenants"]): row for row in found["rows"] if "speed" in row}
    kinds = [("merged", None), ("deltas", None), ("base rows", None), ("plain", None), ("peft", 16)]
    kinds += [("lora", rank) for rank in (16, 64, 128)]
    assert set(rows) == {(*kind, count) for kind in kinds for count in (1, 2, 3)}
    for (_, _, count), row in rows.items():
        assert row["tokens_per_second"] == pytest.approx(1e6 * count / row["microseconds"])
    base, delta = rows["merged", None, 1]["bytes"], rows["deltas", None, 1]["bytes"]
    assert rows["merged", None, 3]["bytes"] == 3 * base
    assert 0 < rows["deltas", None, 3]["bytes"] - base == 3 * (delta - base) < 3 * base / 12
    assert found["limits"]["bandwidth"] > 0 and found["limits"]["flops"] > 0
    assert len(found["goals"]) == 5 and all(goal["met"] is None for goal in found["goals"])
    text = "\n".join(bench.describe(found))
    for word in ("merged models in turn", "LoRA r=64, one batch", "by PEFT", "GFLOP/s", "goal >= 4"):
        assert word in text
    assert main(["bench", "model", "--shape", "llama-9"]) == 2
    assert "shape: expected one of llama-2-7b" in capsys.readouterr().err


def test_logits_that_are_not_those_of_the_adapter_alone_are_named():
    torch = pytest.importorskip("torch", reason="torch or transformers is not installed")
    pytest.importorskip("transformers", reason="torch or transformers is not installed")
    from bitdelta.bench import model

    model._near("PEFT row 2", torch.ones(3), torch.ones(3))
    with pytest.raises(Error, match="PEFT row 2: logits 0.5 of their norm away"):
        model._near("PEFT row 2", torch.ones(3), 2 * torch.ones(3))


def test_calibration_is_timed_against_distillation(capsys):
    pytest.importorskip("transformers", reason="torch or transformers is not installed")
    assert main(["bench", "calibrate", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layers = [row for row in found["rows"] if row["kind"] == "layer"]
    assert [(row["N"], row["K"]) for row in layers] == [(96, 64), (64, 96)]
    for row in layers:
        parts = sum(row[part] for part in ("inputs", "factor", "fit", "held_out"))
        assert row["seconds"] == pytest.approx(parts) and row["error"] < 1
        steps = 100 * row["step_seconds"] + 32 * row["teacher_seconds"]
        assert row["ratio"] == pytest.approx(parts / steps) and row["met"] is None
    model = found["rows"][-1]
    assert model["kind"] == "model" and model["ratio"] > 0 and found["checks"] >= 8 * len(_C.isas())
    text = "\n".join(bench.describe(found))
    assert "[64, 96]" in text and "100 steps" in text and "--quick" in text


@pytest.mark.parametrize(("tenants", "verdicts"), [(4, [None, None]), (16, [True, False])])
def test_goals_of_many_tenants_are_judged_with_sixteen(tenants, verdicts):
    from bitdelta.bench import model_goals

    rows = [
        {"kind": "merged", "tenants": tenants, "bytes": 59, "speed": 1.0},
        {"kind": "deltas", "tenants": tenants, "bytes": 10, "speed": 4.0},
        {"kind": "base rows", "tenants": tenants, "bytes": 1, "speed": 0.9},
        {"kind": "load", "times": 2.9},
        {"kind": "beside", "times": 1.2},
    ]
    found = model_goals.goals(rows, quick=False)
    assert [goal["met"] for goal in found] == [*verdicts, False, True, False]
    assert all(goal["met"] is None for goal in model_goals.goals(rows, quick=True))
