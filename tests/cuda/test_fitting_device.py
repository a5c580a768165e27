"""Fits on a GPU: the steps have the bits of the core, and what comes of them is as good as on the CPU."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bits, pair

import bitdelta
from bitdelta import _C, reference
from bitdelta.array import aligned_empty, to_float32
from bitdelta.devices import torch_device
from bitdelta.fitting import fit, output_errors
from bitdelta.fitting_device import HOST, Gpu, place
from bitdelta.inputs import Inputs

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_calibrate import config, save_pair, tokens

N, K = 40, 70
F32 = np.float32


@pytest.fixture
def on(device):
    return Gpu(torch_device(device.name))


def hessian_of(rng, n_rows=3 * K, k=K):
    x = (rng.normal(size=(n_rows, k)) * np.exp(rng.normal(size=k))).astype(F32)
    return x, x.T @ x


def random_signs(rng, planes, n=N, k=K):
    sign = aligned_empty((planes, -(-n // 16), 8 * -(-k // 256), 16), np.uint32)
    sign[...] = [reference.pack(rng.random((n, k)) < 0.5) for _ in range(planes)]
    return sign


@pytest.mark.parametrize("has_column", [False, True])
def test_every_step_has_the_bits_of_the_core(on, rng, has_column):
    planes = 2
    sign, d = random_signs(rng, planes), rng.normal(scale=0.03, size=(N, K)).astype(F32)
    scale = rng.uniform(0.01, 0.03, (planes, N)).astype(F32)
    column = rng.uniform(0.5, 2, (planes, K)).astype(F32) if has_column else None
    for rows in (slice(0, N), slice(16, 32), slice(32, N)):
        expected = HOST.expand(sign, scale, column, (N, K), rows)
        assert np.array_equal(bits(on.get(on.expand(sign, scale, column, (N, K), rows))), bits(expected))
    factor, order = (0.3 * rng.normal(size=(K, K))).astype(F32), rng.permutation(K)
    expected = HOST.fit_signs(d, factor, order, scale, column)
    assert np.array_equal(on.fit_signs(on.put(d), on.put(factor), order, scale, column), expected)
    hessian = hessian_of(rng)[1]
    pull, sign = d @ hessian, HOST.fit_signs(d, None, order, scale, column)
    mine, moved = on.put(pull.copy()), HOST.fit_signs(d, None, order, scale, column)
    HOST.sweep(pull, hessian, scale, column, sign)
    on.sweep(mine, on.put(hessian), scale, column, moved)
    assert np.array_equal(moved, sign)
    assert np.array_equal(bits(on.get(mine)), bits(pull))


def test_what_is_summed_in_floats_is_near(on, rng):
    x, hessian = hessian_of(rng)
    host, there = Inputs(hessian), Inputs(on.put(hessian), on)
    assert np.array_equal(there.order, host.order)
    assert np.array_equal(bits(on.get(there.damped)), bits(host.damped))
    lower = np.tril_indices(K, -1)
    assert np.allclose(on.get(there.factor)[lower], host.factor[lower], rtol=1e-3, atol=1e-4)
    a, b = (rng.normal(size=(N, K)).astype(F32) for _ in range(2))
    assert np.allclose(on.get(there.weigh(on.put(a))), host.weigh(a), rtol=1e-4, atol=1e-2)
    for name in ("dots", "column_dots"):
        expected = getattr(HOST, name)(a, b)
        assert np.allclose(getattr(on, name)(on.put(a), on.put(b)), expected, rtol=1e-12)
    assert np.allclose(on.solve(there.damped, a[0]), HOST.solve(host.damped, a[0]), rtol=1e-2, atol=1e-5)
    with pytest.raises(np.linalg.LinAlgError):
        on.factorise(on.put(-hessian))
    with pytest.raises(np.linalg.LinAlgError):
        on.solve(on.zeros(K, K), a[0])
    with pytest.raises(ValueError, match="inputs: NaN or Inf"):
        Inputs(on.put(np.full((K, K), np.nan, F32)), on)


def test_a_factor_that_fp32_cannot_have_gets_more_damping(on):
    hessian = np.ones((K, K), F32)
    hessian[0, 0] = 1e12
    host, there = Inputs(hessian), Inputs(on.put(hessian), on)
    lower = np.tril_indices(K, -1)
    assert np.isfinite(on.get(there.factor)[lower]).all()
    assert np.allclose(on.get(there.factor)[lower], host.factor[lower], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("planes, scale", [(1, "row"), (2, "row"), (2, "rank1"), (1, "tensor")])
def test_a_fit_is_as_good_as_on_the_cpu(on, rng, planes, scale, is_turned):
    base, finetuned = pair(rng, N, K)
    x, hessian = hessian_of(rng, k=N if is_turned else K)
    deltas = [
        fit(base, finetuned, inputs, planes, scale, rounds=2, is_turned=is_turned)
        for inputs in (Inputs(hessian), Inputs(on.put(hessian), on))
    ]
    d = to_float32(finetuned) - to_float32(base)
    plain = bitdelta.extract(base, finetuned, planes, scale)
    (*errors, least), whole = output_errors(d, [*deltas, plain], x, is_turned)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[1] < 0.95 * least
    assert np.unpackbits((deltas[0].sign ^ deltas[1].sign).view(np.uint8)).mean() < 0.03
    on_gpu, total = output_errors(d, deltas, x, is_turned, on)
    assert on_gpu == pytest.approx(errors, rel=1e-4)
    assert total == pytest.approx(whole, rel=1e-4)


# ---- calibrate ----


def test_a_whole_calibration_runs_there(device, tmp_path, monkeypatch):
    save_pair(tmp_path, config("llama", layers=1))
    folders = tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta"
    bitdelta.compress(*folders)
    options = {"length": 32, "rounds": 1}
    expected = bitdelta.calibrate(*folders, tokens(), tmp_path / "host", **options)
    calls = []
    for name in ("cuda_fit_signs", "cuda_sweep", "cuda_expand"):
        original = getattr(_C, name)
        monkeypatch.setattr(
            _C, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    for name in ("fit_signs", "sweep"):
        monkeypatch.setattr(_C, name, lambda *a: pytest.fail("the CPU's"))
    monkeypatch.setenv("BITDELTA_DEVICE", "emulated")
    report = bitdelta.calibrate(*folders, tokens(), tmp_path / "there", device=device.name, **options)
    assert set(calls) == {"cuda_fit_signs", "cuda_sweep", "cuda_expand"}
    assert report["device"] == str(torch_device(device.name))
    assert [t["name"] for t in report["tensors"]] == [t["name"] for t in expected["tensors"]]
    assert report["output_error"] == pytest.approx(expected["output_error"], rel=0.01)
    assert report["output_error"] < 0.95 * report["output_error_before"]
    for got, want in zip(report["tensors"], expected["tensors"], strict=True):
        assert got["before"] == pytest.approx(want["before"], rel=1e-4)
        assert got["after"] == pytest.approx(want["after"], rel=0.02)
    assert bitdelta.verify(tmp_path / "there", tmp_path / "base")["ok"]


def test_experts_and_whole_models_run_there(device, tmp_path, monkeypatch):
    monkeypatch.setenv("BITDELTA_DEVICE", "emulated")
    for kind in ("mixtral", "bert"):
        root = tmp_path / kind
        save_pair(root, config(kind, layers=1))
        folders = root / "base", root / "finetuned", root / "delta"
        bitdelta.compress(*folders)
        report = bitdelta.calibrate(
            *folders, tokens(16), root / "out", length=32, rounds=1, fit="scales", device=device.name
        )
        assert report["fitted"] > 0
        assert report["output_error"] < report["output_error_before"]
        assert report["mode"].startswith("whole model" if kind == "bert" else "layer by layer")


def test_a_budget_is_measured_there(device, tmp_path, monkeypatch):
    save_pair(tmp_path, config("llama", layers=1))
    text, options = tokens(8), {"budget": 2.5, "fit": "scales"}
    found = []
    for where in (None, device.name):
        if where is not None:
            monkeypatch.setenv("BITDELTA_DEVICE", "emulated")
        out = tmp_path / f"out-{where}"
        found.append(
            bitdelta.compress(
                tmp_path / "base", tmp_path / "finetuned", out, text=text, device=where, **options
            )
        )
    host, there = (report["budget"] for report in found)
    assert there["effect"] == pytest.approx(host["effect"], rel=1e-3)
    assert there["left"] == pytest.approx(host["left"], rel=0.05)
    assert there["bytes"] == pytest.approx(host["bytes"], rel=0.02)


def test_a_gpu_that_is_not_there_stops_everything_before_it_begins(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU can be used here")
    folders = [str(tmp_path / name) for name in ("base", "finetuned", "delta", "out")]
    with pytest.raises(bitdelta.DeviceError, match="device cuda: "):
        bitdelta.calibrate(*folders[:3], None, folders[3], device="cuda")
    with pytest.raises(bitdelta.DeviceError, match="device cuda: "):
        bitdelta.compress(*folders[:3], text=[[1, 2]], device="cuda")
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got meta"):
        bitdelta.calibrate(*folders[:3], None, folders[3], device="meta")
    with pytest.raises(ValueError, match="device: 'cuda' is for calibrating on a text"):
        bitdelta.compress(*folders[:3], device="cuda")
    from bitdelta.cli import main

    for command in (["calibrate", *folders[:3]], ["compress", *folders[:2], "--text", folders[2]]):
        assert main([*command, "--out", folders[3], "--device", "cuda", "--json"]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("bitdelta: error: device cuda: ")
    assert not list(tmp_path.iterdir())


def test_a_place_for_other_devices_does_not_exist():
    assert place(torch.device("cpu")) is HOST
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got meta"):
        place(torch.device("meta"))
