"""The studies on their tiny models, and what of the field's claims holds on a small transformer."""

import json
from importlib import import_module

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from bitdelta import study, training
from bitdelta.cli import main
from bitdelta.study import budget, goals, original, planes, svd, table
from bitdelta.study.directions import directions, spread
from bitdelta.study.gradient import replace_linears
from bitdelta.study.pair import BYTES, SIZES, make_pair
from bitdelta.study.trial import Trial


@pytest.fixture(scope="module")
def trial(tiny_pair, tmp_path_factory):
    """The deltas of this file: what two tests ask for is made once."""
    return Trial(tiny_pair, tmp_path_factory.mktemp("trial"))


def test_a_pair_is_trained_once_and_the_same_again(tiny_pair, study_folder, tmp_path):
    messages = []
    again = make_pair(SIZES["tiny"], 0, study_folder, log=messages.append)
    assert (again.base, again.finetuned) == (tiny_pair.base, tiny_pair.finetuned) and not messages
    elsewhere = make_pair(SIZES["tiny"], 0, tmp_path, log=messages.append)
    assert messages
    for mine, other in ((elsewhere.base, tiny_pair.base), (elsewhere.finetuned, tiny_pair.finetuned)):
        assert (mine / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_nothing_measured_is_calibrated_on(tiny_pair):
    seen = {tuple(row) for row in tiny_pair.calibration}
    for tokens in tiny_pair.measured.values():
        assert tokens.size == tiny_pair.size.measured_tokens
        assert not seen & {tuple(row) for row in tokens}


def test_the_base_recovers_nothing_and_the_fine_tune_everything(trial):
    for text in ("code", "prose"):
        assert trial.measure.base[text]["recovered"] == 0 and trial.measure.finetuned[text]["recovered"] == 1
        assert trial.measure.finetuned[text]["logit_mse"] == 0 and trial.measure.finetuned[text]["top1"] == 1
        assert trial.measure.base[text]["logit_mse"] > 0.1
    assert trial.measure.finetuned["code"]["perplexity"] < 0.8 * trial.measure.base["code"]["perplexity"]


def test_rows_have_mean_and_spread_over_seeds():
    rows = table.rows_of([{"a": {"code": {"logit_mse": value}}} for value in (1.0, 3.0)])
    assert rows == [
        {"label": "a", "code": {"logit_mse": {"mean": 2, "spread": np.sqrt(2), "values": [1, 3]}}}
    ]
    assert "2.00 +- 1.4" in "\n".join(table.lines(rows, "title"))
    with pytest.raises(ValueError, match="finite"):
        table.rows_of([{"a": {"code": {"logit_mse": float("nan")}}}])


def test_the_command_lists_the_studies_and_refuses_others(capsys):
    assert main(["study", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["studies"]) == set(study.STUDIES)
    assert main(["study", "nothing"]) == 2
    assert "study: expected one of goals, scales, " in capsys.readouterr().err
    assert main(["study", "scales", "--size", "huge"]) == 2
    assert "size: expected one of small, wide, bytes, tiny, got 'huge'" in capsys.readouterr().err


def test_a_budget_errs_no_more_than_uniform_planes_of_its_bytes(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "UNIFORM", ((1, "row"), (2, "row")))
    rows = table.rows_of([dict(budget.rows(Trial(tiny_pair, tmp_path)))])
    bits = [row["about"]["bits"]["mean"] for row in rows[1:]]
    assert bits[1] <= bits[0] < bits[3] <= bits[2]
    judged = budget.judge(rows)
    assert len(judged) == 2 and all(line.startswith("holds:") for line in judged), judged


@pytest.fixture(scope="module")
def scores(trial):
    """Study -> label -> scores, of every study on the same tiny pair."""
    return {
        name: dict(import_module(f"bitdelta.study.{name}").rows(trial))
        for name in ("goals", "scales", "svd", "planes")
    }


def error(scores, text="code"):
    return scores[text]["logit_mse"]


def test_every_row_of_every_study_is_measured(scores):
    for name, rows in scores.items():
        assert len(rows) > 5, name
        table.rows_of([rows])


@pytest.mark.parametrize("text", ("code", "prose"))
def test_distillation_lowers_the_error_and_more_scales_lower_it_further(scores, text):
    rows = {label: error(row, text) for label, row in scores["scales"].items() if "," in label}
    for scale in ("tensor", "row", "rank1"):
        assert rows[f"{scale}, distilled"] < rows[f"{scale}, initial"]
    assert rows["tensor, initial"] > 4 * rows["tensor, distilled"]
    assert rows["rank1, distilled"] < rows["row, distilled"] < rows["tensor, distilled"]


def test_one_bit_recovers_more_than_low_ranks_of_equal_bytes(scores):
    low, bits = scores["svd"]["SVD, distilled"], scores["svd"]["1 bit tensor, distilled"]
    for metric in ("recovered", "top1"):
        assert bits["code"][metric] > low["code"][metric]


@pytest.mark.parametrize("kind", ("one after the other", "fitted together"))
@pytest.mark.parametrize("text", ("code", "prose"))
def test_every_further_plane_lowers_the_error(scores, kind, text):
    rows = scores["planes"]
    errors = [
        error(rows["0, linears of the base"], text),
        *(error(rows[f"{p}, {kind}"], text) for p in planes.PLANES),
    ]
    assert errors == sorted(errors, reverse=True)


def test_further_planes_lower_the_error_after_distillation(trial):
    found = [trial.score(trial.distilled(trial.plain(planes))) for planes in (1, 2, 4)]
    assert error(found[0]) > error(found[1]) > error(found[2])


def test_random_signs_recover_nothing(trial, scores):
    """Signs carry the fine-tune, not the size of the change: 0.2 points above no planes at most."""
    import torch

    class Coin(original.SignLinear):
        def __init__(self, weight, finetuned):
            super().__init__(weight, finetuned)
            self.sign = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, -1.0, 1.0)

    generator, model = torch.Generator().manual_seed(0), training.load(trial.pair.finetuned)
    replace_linears(model, Coin, training.load(trial.pair.base))
    none = scores["planes"]["0, linears of the base"]["code"]["recovered"]
    assert trial.measure.model(model)["code"]["recovered"] <= none + 0.002


def test_calibrating_on_other_text_costs_little(trial, tiny_pair, tmp_path):
    """Of one scale a matrix: on prose, code or random tokens within 1.5 points of recovery of one another."""
    shape = tiny_pair.calibration.shape
    plain = trial.plain(1, "tensor")
    texts = {
        "code": tiny_pair.rows(training.code(), tiny_pair.size.measured_tokens, shape[0] * shape[1]),
        "noise": np.random.default_rng(0).integers(0, len(tiny_pair.tokenizer), shape),
    }
    prose = trial.score(trial.distilled(plain))["code"]["recovered"]
    found = {name: trial.score(trial.distilled(plain, tokens=tokens)) for name, tokens in texts.items()}
    recovered = [prose, *(scores["code"]["recovered"] for scores in found.values())]
    assert min(recovered) > max(recovered) - 0.015


def test_scales_from_512_tokens_come_near_distillation(trial):
    """Least squares of each row's scale on activations, without gradients: within 5 points of recovery."""
    quick = trial.score(trial.fitted(1, "row", fit="scales", tokens=512))["code"]["recovered"]
    assert quick > trial.score(trial.distilled(trial.plain()))["code"]["recovered"] - 0.05


def test_the_original_recipe_trains_everything_and_drops_the_planes_part_of_dx(trial):
    import torch

    model = original.compressed(trial.pair)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"model.embed_tokens.weight", "model.norm.weight"} < names
    assert sum(name.endswith("proj.scale") for name in names) == 7 * trial.pair.size.layers
    assert not any(name.endswith("proj.weight") for name in names)
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, linear.weight.shape[1], requires_grad=True)
    y = linear(x)
    dense = linear.weight + linear.scale * linear.sign
    torch.testing.assert_close(y, x @ dense.T)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.ones_like(y) @ linear.weight)


def test_the_rank_of_equal_bytes():
    assert svd.equal_rank(4096, 4096) == 129  # 128 for the signs, one more for the scales
    assert 2 * svd.equal_rank(256, 768) * (256 + 768) <= 256 * 768 / 8 + 4 * 256


def test_a_vocabulary_without_merges_is_the_bytes():
    text = "for i in range(3):  # \N{GREEK SMALL LETTER PI}\n"
    tokenizer = training.train_tokenizer(BYTES, [text] * 9)
    assert len(tokenizer) == BYTES
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("initial", (0.02, 0.2))
def test_a_new_model_has_the_deviation_asked_for(tiny_pair, initial):
    model = training.new_llama(tiny_pair.tokenizer, 64, 128, 1, 4, 2, initial)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(initial, rel=0.1), name


def test_directions_are_counted_by_their_power():
    import torch

    assert spread(torch.eye(50)) == pytest.approx({"even": 1, "most": 48 / 50})
    one = torch.zeros(40, 40)
    one[3, 3] = 7
    assert spread(one) == pytest.approx({"even": 1 / 40, "most": 1 / 40})
    assert spread(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx({"even": 16 / 20, "most": 1})


def test_directions_are_those_of_the_inputs_of_the_linears(tiny_pair, monkeypatch):
    from bitdelta.study import directions as module

    seen = []

    def record(total):
        seen.append(total)
        return spread(total)

    monkeypatch.setattr(module, "spread", record)
    found = directions(tiny_pair)
    assert len(seen) == 7 * tiny_pair.size.layers
    assert 0 < found["even"] < found["most"] < 1
    # the first linears read the normed embeddings
    import torch

    model, tokens = training.load(tiny_pair.finetuned), torch.from_numpy(tiny_pair.calibration)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens)).flatten(0, 1)
    torch.testing.assert_close(seen[0].float(), x.T @ x, rtol=1e-3, atol=1e-1)


def test_goals_say_when_the_best_rate_is_at_an_end():
    def row(rate, code, prose):
        return {
            "label": f"{goals.RECIPE}{rate}",
            **{text: {"logit_mse": {"values": v}} for text, v in (("code", code), ("prose", prose))},
        }

    rows = [row("0.1", [3, 3], [1, 3]), row("0.3", [1, 2], [2, 2]), row("1", [2, 3], [3, 1])]
    assert list(goals.judge([{"label": "base"}, *rows])) == [
        "best learning rate on code: 0.3, 0.3",
        "best learning rate on prose: 0.1, 1; AT AN END of those tried: 2",
    ]


def test_goals_compare_seed_by_seed():
    def scores(code, prose):
        return {"code": {"logit_mse": code}, "prose": {"logit_mse": prose}}

    seeds = [{"a": scores(a, a), "b": scores(4.0, 9 * 4.0)} for a in (1.0, 2.0)]
    rows = table.rows_of(seeds)
    (met,) = table.judge(rows, [table.Goal("a", "b", 0.4)])
    assert met["met"] and met["ratios"]["code"]["values"] == [0.25, 0.5]
    (missed,) = table.judge(rows, [table.Goal("b", "a", 0.4)])
    assert not missed["met"]
    text = "\n".join(table.verdicts([met, missed]))
    assert "0.4x" in text and "met" in text and "missed" in text


def test_the_command_prints_a_study(study_folder, tiny_pair, capsys):
    arguments = ["study", "signs", "--size", "tiny", "--seed", "0", "--folder", str(study_folder)]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["seeds"] == [0] and report["size"]["hidden"] == 64
    errors = {row["label"]: row["code"]["logit_mse"]["mean"] for row in report["rows"]}
    assert (
        errors["fitted, row, 3 rounds"]
        < errors["sign(d), row, least squares"]
        < errors["sign(d), row, mean |d|"]
    )
    assert "training" not in captured.err  # the session's pair
    assert "signs" in "\n".join(study.describe(report))
