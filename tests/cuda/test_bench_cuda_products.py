"""What `bench cuda` runs and checks, at tiny sizes on whatever device is there: correctness alone, nothing is timed."""

import json
import time
from dataclasses import replace

import pytest
import torch

import bitdelta
from bitdelta import _C, cuda, cuda_memory
from bitdelta.bench import cuda as bench_cuda
from bitdelta.bench import (
    cuda_cases,
    cuda_check,
    cuda_goals,
    cuda_limits,
    cuda_measure,
    cuda_model,
    cuda_timing,
    describe,
    run_cuda,
)
from bitdelta.bench.cuda import Bench
from bitdelta.bench.cuda_cases import DELTA, PREFILL, TRAINING
from bitdelta.bench.cuda_data import Batch, Data, batches, plan_of
from bitdelta.bench.timing import Sample


@pytest.fixture(scope="module")
def data(device):
    return Data(1 << 20, 4 << 20, device.name)


@pytest.mark.parametrize("problem", cuda_cases.tiny(), ids=str)
def test_each_problem_passes_its_check(data, problem):
    first, *rest = batches(data, problem)[:2]
    if problem.kind == TRAINING:
        dy = data.rows(len(problem.ids()), problem.linear.N)
        found = cuda.gradients(dy, first.x, first.parts[0].table, first.plan, True, True, False)
        ids = torch.tensor(problem.ids())
        cuda_check.gradients(first.parts[0], first.x, dy, ids, found[0], found[1])
        found[1][0, 0, 3] += 1
        with pytest.raises(bitdelta.Error, match="the gradient of row scales: 1 of 32 values differ"):
            cuda_check.gradients(first.parts[0], first.x, dy, ids, found[0], found[1])
        return
    for batch in (first, *rest):
        cuda_check.products(batch)
        assert not batch.out.isnan().any()
    assert not torch.equal(first.x, rest[0].x)
    assert not torch.equal(first.parts[0].signs.view(torch.int32), rest[0].parts[0].signs.view(torch.int32))


def test_a_wrong_bit_fails_the_check(data, monkeypatch):
    problem = cuda_cases.tiny()[0]
    batch = Batch(data, problem, plan_of(problem, data.device), 0)
    original = _C.cuda_linear

    def wrong(*arguments):
        original(*arguments)
        batch.out[0, 0] += 1

    monkeypatch.setattr(_C, "cuda_linear", wrong)
    with pytest.raises(bitdelta.Error, match=r"part 0 of .*: 1 of \d+ values differ from the CPU's bits"):
        cuda_check.products(batch)


def test_extraction_passes_its_check(data):
    base, finetuned = (data.weights.cut(i << 17, (64, 512), torch.bfloat16) for i in range(2))
    sign = torch.empty((1, 4, 16, 16), dtype=torch.int32, device=data.device).view(torch.uint32)
    scale = torch.empty((1, 64), dtype=torch.float32, device=data.device)
    bad = torch.empty(1, dtype=torch.int64, device=data.device)
    workspace = cuda_memory.scratch(scale, _C.cuda_workspace_bytes("extract", 64, 512, 1))
    _C.cuda_extract(base, finetuned, 1, 1, sign, scale, None, bad, workspace)
    assert int(bad[0]) == -1
    cuda_check.extraction(base, finetuned, sign, scale)
    sign.view(torch.int32)[0, 3, 15, 0] ^= 1
    with pytest.raises(bitdelta.Error, match="the signs: 1 of"):
        cuda_check.extraction(base, finetuned, sign, scale)


class Untimed(Bench):
    """Makes every call once instead of timing it."""

    def __init__(self, data):
        super().__init__({"not_measured": [], "failed": []}, False, time.perf_counter() + 600, print)
        self.data, self.limits = data, {"read": 1e12, "copy": 1e12, "rate": 1e15}

    def samples(self, calls):
        for call in calls[:2]:
            call()
        return Sample(1e-6, 1e-6, 1e-6, 2), Sample(2e-6, 2e-6, 2e-6, 2)

    def host_sample(self, call):
        call()
        return Sample(1e-6, 1e-6, 1e-6, 1)


@pytest.mark.parametrize("problem", cuda_cases.tiny(), ids=str)
def test_each_problem_gives_its_rows(data, problem):
    bench = Untimed(data)
    rows = list(bench.part("a case", lambda: cuda_measure.product(bench, problem)))
    assert bench.report["failed"] == []
    assert rows[0]["by"] == cuda_cases.OURS and rows[0]["sets"] >= 3
    made = {row["by"] for row in rows}
    assert (cuda_cases.CUBLAS in made) == (problem.kind in (TRAINING, PREFILL) or problem.tenants == 1)
    is_merged = problem.kind == PREFILL and problem.tenants == 1
    assert ({cuda_cases.EXPANDED, cuda_cases.MERGED} <= made) == is_merged
    assert len(cuda_goals.with_ratios(rows)) == len(rows)
    for row in rows:
        assert {
            "samples",
            "spread",
            "eager_microseconds",
            "bytes_per_second",
            "roofline_microseconds",
        } <= set(row)
        assert row["share"] == pytest.approx(row["bytes"] / 1e-6 / 1e12)
        assert cuda_goals.cells(row)[0].startswith("tiny ")


def test_host_calls_and_extraction_give_their_rows(data, monkeypatch):
    bench = Untimed(data)
    monkeypatch.setattr(cuda_cases, "SHAPES", ((256, 512), (512, 256)))
    monkeypatch.setattr(cuda_cases, "MIN_BYTES", 1)
    monkeypatch.setenv("BITDELTA_DEVICE", "emulated")
    rows = list(bench.part("host", lambda: cuda_measure.host(bench)))
    rows += list(bench.part("extraction", lambda: cuda_measure.extraction(bench)))
    assert bench.report["failed"] == []
    assert [row["kind"] for row in rows] == [cuda_cases.HOST] * 3 + [cuda_cases.EXTRACTION] * 4
    assert all(cuda_goals.cells(row) for row in rows)


def test_a_mixed_models_logits_are_those_of_its_merged_models(data, monkeypatch):
    cuda_model.check(data.device)
    monkeypatch.setattr(cuda_model.Tenants, "merged", lambda tenants, t: tenants.base)
    with pytest.raises(bitdelta.Error, match="tenant 0's logits: an error of"):
        cuda_model.check(data.device)


@pytest.fixture
def pretended(device, monkeypatch):
    """A whole run at tiny sizes, whose calls are made once and take no time."""
    if device.name == "cuda":
        pytest.skip("a GPU runs the bench itself")
    one = Sample(1e-6, 1e-6, 1e-6, 1)

    def untimed(calls, seconds):
        for call in calls[:1]:
            call()
        return one

    monkeypatch.setattr(cuda_timing, "replayed", untimed)
    monkeypatch.setattr(cuda_timing, "eager", lambda calls, seconds: one)
    monkeypatch.setattr(cuda_limits, "replayed", untimed)
    monkeypatch.setattr(cuda_timing, "host", lambda call: untimed([call], 1))
    for name, value in (("READ_BYTES", 1 << 16), ("SQUARE", 64), ("WARM_SECONDS", 0)):
        monkeypatch.setattr(cuda_limits, name, value)
    monkeypatch.setattr(cuda_cases, "LAYERS", dict.fromkeys(cuda_cases.LAYERS, cuda_cases.LAYERS["tiny"]))
    monkeypatch.setattr(cuda_cases, "MIN_BYTES", 1)
    monkeypatch.setattr(cuda_cases, "SHAPES", ((256, 512),))
    facts = {
        "gpu": "none",
        "processors": 2,
        "memory_gb": 1.0,
        "driver": "none",
        "bitdelta": "0",
        "build": "emulated",
    }
    monkeypatch.setattr(bench_cuda, "machine", lambda: {**facts, "torch": torch.__version__, "triton": None})
    monkeypatch.setattr(bench_cuda, "require", lambda: None)
    for name, value in (("DEVICE", "cpu"), ("BITS_BYTES", 1 << 23), ("WEIGHT_BYTES", 1 << 25)):
        monkeypatch.setattr(bench_cuda, name, value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 26, 1 << 26))
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setenv("BITDELTA_DEVICE", "emulated")


def test_a_whole_run_gives_every_goal_but_those_of_triton_and_whole_models(pretended, monkeypatch):
    small = {2048: 20, 1024: 18, 512: 17, 128: 16}  # rows, which the emulation multiplies slowly
    every = [replace(each, rows=small.get(each.rows, each.rows)) for each in cuda_cases.problems()]
    few = [
        each for each in every if each.model == "7B" and each.mix == cuda_cases.EVEN and each.tenants <= 16
    ]
    monkeypatch.setattr(cuda_cases, "problems", lambda: [each for each in few if each.planes == 1])
    monkeypatch.setattr(cuda_goals, "PREFILL_ROWS", 20)
    monkeypatch.setattr(cuda_goals, "TRAINING_ROWS", 17)
    report = run_cuda(quick=False, seconds=3000, log=lambda line: None)
    assert [line for line in report["failed"] if "riton" not in line] == []
    missing = {goal["case"] for goal in report["goals"] if goal["value"] is None}
    assert {case for case in missing if "Triton" not in case} == {
        "against the best dense alternative, 64 tenants",
        "whole model: memory added by a tenant",
        "delta only, 1 row a tenant, >= 50 MB of bits",
        "delta only, 8 rows a tenant",
    }
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert "16 tenants x 1 row" in "\n".join(describe(report))


def test_a_run_of_whole_models_gives_its_rows(pretended):
    report = run_cuda(quick=True, model=True, log=lambda line: None)
    assert report["failed"] == report["not_measured"] == []
    found = [(row["tenants"], row["by"]) for row in report["rows"]]
    assert found == [(n, by) for by in (cuda_cases.OURS, cuda_model.SEPARATE) for n in (1, 2, 4)]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert "4 tenants" in "\n".join(describe(report))


def test_a_run_without_time_measures_the_limits_alone(pretended):
    report = run_cuda(seconds=0, log=lambda line: None)
    assert report["rows"] == [] and report["limits"]["read"] > 0
    assert len(report["not_measured"]) == 3 + len(cuda_cases.problems())


def test_a_gpu_that_was_lost_ends_the_run(data, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")
        yield

    bench = Untimed(data)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: next(lost()))
    assert list(bench.part("a", lost)) == [] == list(bench.part("b", lost))
    assert [line.partition(":")[0] for line in bench.report["failed"]] == [
        "a",
        "after a the GPU cannot be used",
    ]
    assert bench.report["not_measured"] == ["b: the time was over"]


def test_what_fails_is_listed_and_the_rest_goes_on(data):
    bench = Untimed(data)

    def broken():
        yield {"kind": "first"}
        raise RuntimeError("of a kind\nnobody expected")

    def too_large():
        raise MemoryError("three sets are too many")
        yield

    assert list(bench.part("a", broken)) == [{"kind": "first"}]
    assert list(bench.part("b", too_large)) == []
    bench.deadline = 0
    assert list(bench.part("c", broken)) == []
    assert bench.report["failed"] == ["a: RuntimeError: of a kind nobody expected"]
    assert bench.report["not_measured"] == ["b: three sets are too many", "c: the time was over"]


def test_sets_that_do_not_fit_are_refused(data):
    problem = cuda_cases.Problem(DELTA, "7B", "o", 1, 1)
    with pytest.raises(ValueError, match="at most a third of the pools"):
        batches(data, problem)
