"""The studies of quantised models on the tiny pair, and the quantisers alone."""

import importlib.util

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from bitdelta import training
from bitdelta.errors import Error
from bitdelta.study import quantize, quantized, repair
from bitdelta.study.trial import Trial

STEPS = 10


@pytest.fixture(scope="module")
def trial(tiny_pair, tmp_path_factory):
    return Trial(tiny_pair, tmp_path_factory.mktemp("quantized"), STEPS)


@pytest.fixture(autouse=True)
def without_gptq(monkeypatch):
    """Its package takes minutes to import and compile; a test of its own runs it where it is installed."""
    monkeypatch.setattr(quantize, "methods", lambda: ["INT8 RTN", "INT4 RTN"])
    for module in (quantized, repair):
        monkeypatch.setattr(module, "methods", quantize.methods)


def mse(rows, label, text="prose"):
    return rows[label][text]["logit_mse"]


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 16)])
def test_rounding_errs_by_half_a_step_at_most(bits, group):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    found = quantize.round_to_nearest(weight, bits, group)
    most = 2 ** (bits - 1) - 1
    parts = weight.reshape(6, -1, group or 64)
    step = parts.abs().amax(-1, keepdim=True) / most
    error = (found.reshape(parts.shape) - parts).abs()
    assert (error <= 0.5001 * step).all() and (error > 0.2 * step).any()
    levels = (found.reshape(parts.shape) / step).round().abs()
    assert levels.max() == most
    torch.testing.assert_close(quantize.round_to_nearest(found, bits, group), found)


def test_a_row_of_zeros_stays_zero():
    assert (quantize.round_to_nearest(torch.zeros(2, 8), 4) == 0).all()


def test_linears_are_quantised_and_nothing_else(tiny_pair, tmp_path):
    out = quantize.quantize(tiny_pair.base, "INT8 RTN", tiny_pair.calibration, tmp_path / "out")
    before, after = (training.load(folder) for folder in (tiny_pair.base, out))
    names = {f"{name}.weight" for name, _ in quantize.linears(before)}
    state = after.state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(value, state[name]) == (name not in names), name
    for name in names:  # no second rounding by the file
        torch.testing.assert_close(
            state[name], quantize.round_to_nearest(before.state_dict()[name], 8), rtol=0, atol=0
        )


def test_a_group_that_does_not_divide_the_inputs_is_refused(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "GROUP", 48)
    with pytest.raises(Error, match=r"q_proj: 64 inputs are no multiple of 48"):
        quantize.quantize(tiny_pair.base, "INT4 RTN", tiny_pair.calibration, tmp_path / "out")


def test_a_delta_over_a_quantised_base_is_about_as_good(trial):
    rows = dict(quantized.rows(trial))
    for text in ("code", "prose"):
        for method in ("INT8 RTN", "INT4 RTN"):
            assert mse(rows, f"base in {method} + 1 bit, fitted", text) < 0.1 * mse(
                rows, f"base in {method}", text
            )
        plain = mse(rows, "base + 1 bit, fitted", text)
        assert mse(rows, "base in INT8 RTN + 1 bit, fitted", text) < 1.3 * plain
        assert mse(rows, "base in INT4 RTN + 1 bit, fitted", text) > plain
    assert list(quantized.judge([{"label": label} for label in rows])) == [quantize.MISSING]


def test_one_bit_repairs_a_quantised_model(trial):
    rows = dict(repair.rows(trial))
    for method in ("INT8 RTN", "INT4 RTN"):
        broken = rows[method]
        for step, least in (("initial", 0.5), ("fitted", 0.7), ("fitted, distilled", 0.7)):
            repaired = rows[f"{method} + 1 bit, {step}"]
            for text in ("code", "prose"):
                share = 1 - repaired[text]["logit_mse"] / broken[text]["logit_mse"]
                assert repaired["repaired"][text] == pytest.approx(share) and share > least, (method, step)
    assert mse(rows, "INT8 RTN") < 0.1 * mse(rows, "INT4 RTN")
    assert list(repair.judge([{"label": label} for label in rows])) == [quantize.MISSING]


def test_a_failure_of_gptqmodel_is_one_line(tiny_pair, tmp_path):
    missing = tmp_path / "nothing"
    with pytest.raises(Error, match=r"^gptqmodel: status 1: .*(nothing|gptqmodel)"):
        quantize.quantize(missing, "GPTQ", tiny_pair.calibration, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="pip install gptqmodel to run it")
def test_gptq_is_nearer_than_rounding(tiny_pair, tmp_path, trial):
    errors = []
    for method in ("INT4 RTN", "GPTQ"):
        out = quantize.quantize(tiny_pair.base, method, tiny_pair.calibration, tmp_path / method)
        base, found = (training.load(folder) for folder in (tiny_pair.base, out))
        tokens = torch.from_numpy(tiny_pair.measured["prose"])
        with torch.inference_mode():
            errors.append((base(tokens).logits - found(tokens).logits).square().mean().item())
    assert 0 < errors[1] < errors[0]
