"""What `bench cuda` runs and checks, at tiny sizes on whatever device is there: correctness alone, nothing is timed."""

import time

import pytest
import torch

import bitdelta
from bitdelta import _C, cuda
from bitdelta.bench import cuda_cases, cuda_check, cuda_goals, cuda_measure, cuda_model
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
    workspace = cuda._scratch(scale, _C.cuda_workspace_bytes("extract", 64, 512, 1))
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
