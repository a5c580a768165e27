"""`bench cuda` without a GPU: its cases, rooflines, goals and table; what it says where no GPU is."""

import json

import pytest

from bitdelta import _C, bench
from bitdelta.bench import cuda, cuda_cases, cuda_goals
from bitdelta.bench.cuda_cases import DELTA, EXTRACTION, HOST, NAMES, OURS, PREFILL, TRAINING, WHOLE, Problem
from bitdelta.cli import main
from bitdelta.errors import DeviceError


def test_without_a_gpu_one_line_says_what_is_missing(capsys):
    if _C.cuda_missing() is None and not _C.cuda_is_emulated():
        pytest.skip("a GPU can be used here")
    assert main(["bench", "cuda", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bitdelta: error: bench cuda needs a GPU: ")
    assert captured.err.count("\n") == 1
    with pytest.raises(DeviceError):
        bench.run_cuda()


@pytest.mark.parametrize("options", [["--seconds", "144"], ["--model", "--seconds", "48"], ["--quick"]])
def test_options_are_known_where_no_gpu_is(capsys, options):
    if _C.cuda_missing() is None and not _C.cuda_is_emulated():
        pytest.skip("a GPU can be used here")
    assert main(["bench", "cuda", "--json", *options]) == 2
    assert "bench cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "emulated, missing, said", [(True, None, "run on the CPU"), (False, "no driver", "no driver")]
)
def test_each_thing_that_is_missing_is_named(monkeypatch, emulated, missing, said):
    monkeypatch.setattr(_C, "cuda_missing", lambda: missing)
    monkeypatch.setattr(_C, "cuda_is_emulated", lambda: emulated)
    with pytest.raises(DeviceError, match=said):
        cuda.require()


def test_a_gpu_that_pytorch_does_not_see_is_named(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(_C, "cuda_missing", lambda: None)
    monkeypatch.setattr(_C, "cuda_is_emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"PyTorch .* sees none"):
        cuda.require()


@pytest.mark.parametrize(
    "model, millions, n_layers",
    [("7B", 202.4, 32), ("8B", 218.1, 32), ("13B", 317.2, 40), ("70B", 855.6, 80)],
)
def test_layers_have_the_parameters_of_their_models(model, millions, n_layers):
    assert [each.name for each in cuda_cases.LAYERS[model]] == list(NAMES)
    count = sum(each.N * each.K for each in cuda_cases.LAYERS[model])
    assert round(count / 1e6, 1) == millions
    for each in cuda_cases.LAYERS[model]:
        assert all(width % 16 == 0 for width in each.widths) and each.K % 256 == 0


def test_bytes_of_the_layer_of_sixteen_tenants_are_those_of_the_roofline():
    found = [
        each for each in cuda_cases.problems() if (each.kind, each.model, each.tenants) == (WHOLE, "7B", 16)
    ]
    layer = [each for each in found if each.rows == 1 and each.mix == cuda_cases.EVEN]
    assert sorted(each.name for each in layer) == sorted(NAMES)
    base, bits = (sum(getattr(each, name) for each in layer) for name in ("base_bytes", "delta_bytes"))
    assert base == 404_750_336
    scales = 16 * 4 * sum(each.linear.N for each in layer)
    assert bits == base + scales  # 16 tenants of a sixteenth
    assert 188 < cuda_cases.roofline(base + bits, 0, 4.3e12, 790e12) * 1e6 < 190


def test_problems_are_distinct_and_fit_their_kernels():
    problems = cuda_cases.problems()
    assert len(set(problems)) == len(problems)
    assert {each.kind for each in problems} == {DELTA, WHOLE, PREFILL, TRAINING}
    assert {each.planes for each in problems} == {1, 2, 4}
    assert {each.tenants for each in problems if each.kind == WHOLE} >= {1, 2, 4, 8, 16, 32, 64}
    assert {each.mix for each in problems} == {
        cuda_cases.EVEN,
        cuda_cases.ZIPF,
        cuda_cases.QUARTER_BASE,
        cuda_cases.MIXED,
    }
    for each in [*problems, *cuda_cases.tiny()]:
        ids = each.ids()
        assert -1 <= min(ids) and max(ids) < each.tenants <= 4096
        assert each.mix != cuda_cases.EVEN or sorted(set(ids)) == list(range(each.tenants))


def test_ids_of_the_mixes():
    assert cuda_cases.zipf(64, 16).count(0) > 2 * cuda_cases.zipf(64, 16).count(1)
    assert len(cuda_cases.zipf(64, 16)) == 64
    quarter = Problem(WHOLE, "7B", "o", 16, 1, cuda_cases.QUARTER_BASE).ids()
    assert quarter.count(-1) == 4 and quarter[:4] == [0, 1, 2, -1]
    mixed = Problem(PREFILL, "7B", "o", 33, 1024, cuda_cases.MIXED).ids()
    assert mixed.count(0) == 1024 and sorted(mixed[1024:]) == list(range(1, 33))


@pytest.mark.parametrize("size, count", [(1, 256), (33_600_000, 12), (180_000_000, 3), (10**10, 3)])
def test_sets_are_at_least_three_and_beyond_any_cache(size, count):
    assert cuda_cases.n_sets(size) == count
    assert count >= 3 and (count * size >= 400_000_000 or count == cuda_cases.MAX_SETS)


def test_a_roofline_is_of_bytes_or_of_operations():
    assert cuda_cases.roofline(4_000, 10, 1e3, 1e3) == 4
    assert cuda_cases.roofline(4_000, 10_000, 1e3, 1e3) == 10


# ---- goals ----


def row(kind, name, tenants, rows, by, microseconds, **more):
    found = {"kind": kind, "model": "7B", "linear": name, "tenants": tenants, "rows": rows, "by": by}
    found |= {
        "mix": cuda_cases.EVEN,
        "planes": 1,
        "columns": False,
        "microseconds": microseconds,
        "spread": 0.01,
    }
    return found | more


def rows_that_meet_all():
    """A layer of 200 us against a roofline of 170, and whatever else the goals ask for."""
    rows = []
    for name in NAMES:
        rows.append(row(WHOLE, name, 16, 1, OURS, 50.0, roofline_microseconds=42.5))
        rows += [
            row(WHOLE, name, 16, 1, by, time)
            for by, time in zip(cuda_cases.DENSE, (400, 500, 350), strict=True)
        ]
        rows += [row(WHOLE, name, 64, 1, OURS, 100.0), row(WHOLE, name, 64, 1, cuda_cases.BMM, 1100.0)]
        rows.append(row(DELTA, name, 16, 1, OURS, 10.0, share=0.9, bits_bytes=90_000_000))
        rows += [
            row(DELTA, name, 16, 1, cuda_cases.ORIGINAL, 90.0),
            row(DELTA, name, 16, 1, cuda_cases.TUNED, 15.0),
        ]
        rows += [row(WHOLE, name, 1, 1, OURS, 42.0), row(WHOLE, name, 1, 1, cuda_cases.CUBLAS, 40.0)]
        for by, time in ((OURS, 200.0), (cuda_cases.MERGED, 120.0), (cuda_cases.CUBLAS, 100.0)):
            rows.append(row(PREFILL, name, 1, 2048, by, time))
        rows += [
            row(TRAINING, name, 1, 512, OURS, 220.0),
            row(TRAINING, name, 1, 512, cuda_cases.CUBLAS, 100.0),
        ]
    rows.append(row(DELTA, "gate_up", 8, 8, OURS, 30.0, share=0.7, bits_bytes=90_000_000))
    rows.append(
        {"kind": EXTRACTION, "by": OURS, "N": 4096, "K": 4096, "dtype": "bfloat16", "copy_share": 0.9}
    )
    rows[-1] |= {"microseconds": 20.0, "spread": 0.01}
    rows.append({"kind": HOST, "case": "the extension", "by": OURS, "microseconds": 4.0, "spread": 0.01})
    model = {"kind": cuda_cases.MODEL, "case": "16 tenants", "by": OURS, "microseconds": 1e4, "spread": 0.01}
    return [*rows, model | {"added_share": 0.07}]


EXPECTED = {
    "delta only, 1 row a tenant, >= 50 MB of bits": 0.9,
    "delta only, 8 rows a tenant": 0.7,
    "base + 16 tenants, Llama-2-7B layer": 0.85,
    "against the best dense alternative, 16 tenants": 7.0,
    "against the best dense alternative, 64 tenants": 11.0,
    "against the original's Triton kernel, 16 tenants": 9.0,
    "against the tuned Triton W1A16, 16 tenants": 1.5,
    "1 tenant, time added to a 7B linear": 2.0,
    "prefill 2048 rows, one tenant, merged": 100 / 120,
    "prefill 2048 rows, one tenant, exact": 0.5,
    "dX + scale gradient, 512 rows": 2.2,
    "extraction": 0.9,
    "host overhead of an eager call without the dispatcher": 4.0,
    "whole model: memory added by a tenant": 0.07,
}


def test_goals_are_computed_from_the_rows():
    goals = {goal["case"]: goal for goal in cuda_goals.judge(rows_that_meet_all())}
    assert {case: pytest.approx(value) for case, value in EXPECTED.items()} == {
        case: goal["value"] for case, goal in goals.items()
    }
    assert all(goal["met"] for goal in goals.values())


def test_a_goal_is_missed_where_a_figure_falls_short():
    rows = rows_that_meet_all()
    rows.append(row(DELTA, "down", 4, 1, OURS, 10.0, share=0.5, bits_bytes=60_000_000))
    rows.append(row(DELTA, "o", 4, 1, OURS, 10.0, share=0.1, bits_bytes=10_000_000))  # too few bits to count
    goals = {goal["case"]: goal for goal in cuda_goals.judge(rows)}
    missed = [case for case, goal in goals.items() if goal["met"] is False]
    assert missed == ["delta only, 1 row a tenant, >= 50 MB of bits"]
    assert goals[missed[0]]["text"] == "50% of read bandwidth"


@pytest.mark.parametrize("kind", [DELTA, WHOLE, PREFILL, TRAINING, EXTRACTION, HOST, cuda_cases.MODEL])
def test_a_goal_whose_rows_are_missing_is_not_measured(kind):
    rows = [each for each in rows_that_meet_all() if each["kind"] != kind]
    goals = cuda_goals.judge(rows)
    missing = [goal for goal in goals if goal["value"] is None]
    assert missing and all(goal["met"] is None and goal["text"] == "not measured" for goal in missing)
    assert all(goal["met"] for goal in goals if goal["value"] is not None)


def test_one_linear_that_is_missing_leaves_the_layer_unmeasured():
    rows = [each for each in rows_that_meet_all() if each.get("linear") != "down" or each["kind"] != WHOLE]
    values = {goal["case"]: goal["value"] for goal in cuda_goals.judge(rows)}
    assert values["base + 16 tenants, Llama-2-7B layer"] is None
    assert values["1 tenant, time added to a 7B linear"] is None


def test_a_quick_run_judges_nothing():
    assert {goal["met"] for goal in cuda_goals.judge(rows_that_meet_all(), quick=True)} == {None}


def test_ratios_are_times_over_ours_of_the_same_problem():
    found = cuda_goals.with_ratios(rows_that_meet_all())
    ratios = {(each["linear"], each["by"]): each["ratio"] for each in found if each["kind"] == DELTA}
    assert ratios["qkv", cuda_cases.ORIGINAL] == 9 and ratios["qkv", OURS] == 1


def report_of(rows):
    machine = {"gpu": "A GPU", "processors": 132, "memory_gb": 141.0, "driver": "580", "bitdelta": "0.1.0"}
    machine |= {"build": "90a by nvcc 13.0", "torch": "2.11", "triton": None}
    report = {"suite": "cuda", "quick": False, "machine": machine, "rows": cuda_goals.with_ratios(rows)}
    report |= {"goals": cuda_goals.judge(rows), "not_measured": ["a case: the time was over"], "seconds": 1.5}
    report["limits"] = {"read": 4.4e12, "reader": "torch.sum", "copy": 4.3e12, "rate": 790e12}
    return report | {"failed": ["another: Error: 3 of 4 values differ"]}


def test_the_report_can_be_read_and_is_json():
    report = report_of(rows_that_meet_all())
    text = "\n".join(bench.describe(report))
    for word in (
        "A GPU",
        "4,400 GB/s",
        "7B gate_up 16 tenants x 1 row",
        "met",
        "not measured: a case",
        "failed: another",
    ):
        assert word in text
    assert "missed" not in text
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_every_goal_has_a_row_in_the_readme():
    text = (cuda_cases_root() / "README.md").read_text(encoding="utf-8")
    for goal in cuda_goals.GOALS:
        assert goal.case in text


def cuda_cases_root():
    from pathlib import Path

    return Path(__file__).parent.parent
