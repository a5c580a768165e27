"""The peers of `bench cuda` against plain sums, on the CPU: what is timed on a GPU is what is checked here.

Triton's kernels run through its interpreter, in a process of its own, as it is chosen when triton is imported.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

import bitdelta
from bitdelta.bench import cuda_cases, cuda_peers, cuda_timing
from bitdelta.bench.cuda_cases import (
    BMM,
    DELTA,
    DENSE,
    FOUR_STEPS,
    GROUPED,
    LORA,
    MM,
    ORIGINAL,
    RANKS,
    TUNED,
    WHOLE,
    Problem,
)
from bitdelta.bench.cuda_data import Data, Pool


@pytest.fixture(scope="module")
def data():
    return Data(1 << 21, 1 << 23, "cpu")


WHOLE_PROBLEM, DELTA_PROBLEM = Problem(WHOLE, "tiny", "qkv", 3, 2), Problem(DELTA, "tiny", "qkv", 3, 1)


@pytest.mark.parametrize("name", DENSE)
def test_dense_peers_multiply_each_tenant_by_its_weight(data, name):
    peer = cuda_peers.dense(data, WHOLE_PROBLEM, name)
    peer.check()
    assert len(peer.calls) >= 3
    assert peer.n_bytes == 3 * WHOLE_PROBLEM.base_bytes + WHOLE_PROBLEM.row_bytes
    for call in peer.calls[:4]:
        call()


@pytest.mark.parametrize("name", [MM, BMM, GROUPED])
def test_a_wrong_dense_product_fails_its_check(data, name, monkeypatch):
    peer = cuda_peers.dense(data, WHOLE_PROBLEM, name)
    data.weights.words[-1:] ^= 1  # not of the first set
    original = cuda_peers.cuda_check.close
    monkeypatch.setattr(cuda_peers.cuda_check, "close", lambda got, *rest: original(1.1 * got, *rest))
    with pytest.raises(bitdelta.Error, match="an error of 1.0e-01"):
        peer.check()


@pytest.mark.parametrize("rank", RANKS)
def test_lora_is_base_and_two_products(data, rank):
    peer = cuda_peers.lora(data, WHOLE_PROBLEM, rank)
    peer.check()
    assert peer.name == LORA.format(rank)


def test_peers_are_those_of_the_kind():
    assert [name for name, _ in cuda_peers.peers(WHOLE_PROBLEM, 1)] == [
        *DENSE,
        FOUR_STEPS,
        *(LORA.format(r) for r in RANKS),
    ]
    assert [name for name, _ in cuda_peers.peers(DELTA_PROBLEM, 1)] == [ORIGINAL, TUNED]


def test_a_peer_that_does_not_fit_says_how_much_it_needs(data):
    with pytest.raises(MemoryError, match="three sets of 1.6 GB are more than the 0.0 GB"):
        cuda_peers.dense(data, Problem(WHOLE, "7B", "qkv", 16, 1), MM)


def test_a_pool_is_random_and_its_weights_are_finite():
    pool = Pool(1 << 16, "cpu", as_weights=True)
    weights = pool.cut(0, (1 << 15,), torch.bfloat16).float()
    assert weights.isfinite().all()
    assert 2**-7 <= weights.abs().min() and weights.abs().max() < 2**-3
    assert abs(float(weights.sign().mean())) < 0.05
    ones = sum(int((Pool(1 << 16, "cpu").words >> bit & 1).sum()) for bit in range(32))
    assert abs(ones / (1 << 19) - 0.5) < 0.01
    with pytest.raises(ValueError, match="at: expected a multiple of 64 up to"):
        pool.cut(32, (4,))
    with pytest.raises(ValueError, match="at: expected"):
        pool.cut(1 << 16, (4,))


class Clock:
    """Events of a GPU whose calls take a second, and every further pass a tenth more."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_a_sample_is_the_time_of_a_pass_over_all_sets(monkeypatch):
    passes = []

    def run():
        passes.append(len(passes))
        Clock.now += 4 * (1 + 0.1 * len(passes))

    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda_timing, "n_samples", lambda once, seconds: 5)
    monkeypatch.setattr(cuda_timing, "MOST_WARM", 4)
    sample = cuda_timing.timed(run, 4, 1.0)
    assert len(passes) == 3 + 4 + 5  # the first tell how many samples fit, and warm up
    assert sample.calls == 5 and sample.median == pytest.approx(1 + 0.1 * 10)
    assert (sample.low, sample.high) == (pytest.approx(1.9), pytest.approx(2.1))


@pytest.mark.parametrize(
    "once, seconds, count", [(1e-4, 1.0, 100), (0.05, 1.0, 20), (1.0, 1.0, 10), (0.0, 1.0, 100)]
)
def test_samples_are_a_hundred_or_as_many_as_fit(once, seconds, count):
    assert cuda_timing.n_samples(once, seconds) == count


def test_calls_of_a_list_each_take_their_item():
    found = []
    for call in cuda_timing.each(found.append, range(3)):
        call()
    assert found == [0, 1, 2]


PROGRAM = """
import json, torch
from bitdelta.bench import cuda_peers, cuda_triton
from bitdelta.bench.cuda_cases import DELTA, ORIGINAL, TUNED, WHOLE, Problem
from bitdelta.bench.cuda_data import Data

data, done = Data(1 << 21, 1 << 22, "cpu"), []
for rows in (1, 3):
    problem = Problem(DELTA, "tiny", "down", 2, rows)
    N, K = problem.linear.N, problem.linear.K
    for name, kind in ((ORIGINAL, cuda_triton.Original), (TUNED, cuda_triton.Tuned)):
        for tile in kind.tiles(rows, N, K):
            # the interpreter has no products of bf16
            cuda_peers.triton_peer(data, problem, name, tile, torch.float16).check()
            done.append(repr(tile))
problem = Problem(WHOLE, "tiny", "down", 2, 3)
cuda_peers.four_steps(data, problem, cuda_triton.Original()).check()
x, parts = torch.randn(100_000), torch.zeros(16)
cuda_triton.summed(x, parts)
print(json.dumps([done, abs(float(parts.sum() - x.sum())) < 0.1]))
"""


@pytest.mark.timeout(900)
def test_triton_kernels_give_the_products_of_their_bits():
    pytest.importorskip(
        "triton", minversion="3.7", reason="needs Triton 3.7, whose interpreter knows NumPy 2.4"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    done, is_sum = json.loads(run.stdout)
    assert is_sum
    assert len(done) > 30 and sum(tile.startswith("Original") for tile in done) == 8
    assert cuda_cases.TUNED == TUNED
