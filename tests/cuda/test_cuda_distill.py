"""Distillation on GPU tensors: the losses and the scales of the CPU, through the gradient kernels."""

import numpy as np
import pytest
from distill_pairs import VOCABULARY, assert_only_scales_differ, make_delta, make_pair, scales
from models import llama_config

import bitdelta
from bitdelta import _C

SHORT = {"steps": 3, "batch_size": 2, "length": 8, "lr": 0.05}


@pytest.mark.parametrize("options", [{"scale": "rank1"}, {"scale": "row"}], ids=["rank1", "row"])
def test_a_distillation_on_the_gpu_gives_the_scales_of_the_cpu(device, monkeypatch, tmp_path, options):
    pair = make_pair(tmp_path, config=llama_config(num_hidden_layers=1))
    delta = make_delta(pair, tmp_path / "delta", **options)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (12, 8))
    expected = bitdelta.distill(*pair, delta, tokens, tmp_path / "cpu", **SHORT)
    calls = []
    for name in ("cuda_linear", "cuda_row_gradient", "cuda_linear_transposed"):
        original = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    monkeypatch.setenv("BITDELTA_DEVICE", "emulated")
    where = "cpu" if _C.cuda_is_emulated() else "cuda"
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "gpu", device=where, **SHORT)
    assert {"cuda_linear", "cuda_row_gradient", "cuda_linear_transposed"} == set(calls)
    assert report["kept"] == expected["kept"] == "distilled scales"
    assert np.allclose(report["curve"], expected["curve"], rtol=1e-4)
    assert_only_scales_differ(delta, tmp_path / "gpu")
    before, wanted, found = (scales(folder) for folder in (delta, tmp_path / "cpu", tmp_path / "gpu"))
    for key, scale in wanted.items():
        step = np.abs(scale - before[key]).max()  # how far the training went
        assert step > 0 and np.abs(found[key] - scale).max() <= 1e-2 * step, key
