"""The studies of fine-tunes, each on its tiny model: what they are, and what of the claims holds by a wide margin."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from bitdelta import training
from bitdelta.study import continued, dpo, full, lora, table
from bitdelta.study.ladder import change
from bitdelta.study.pair import FULL, SIZES, make_pair
from bitdelta.study.trial import Trial

STEPS = 25  # of a distillation: enough to lower the error


def trial_of(module, folder, scratch):
    pair = make_pair(SIZES["tiny"], 0, folder, getattr(module, "TUNE", FULL))
    return Trial(pair, scratch, STEPS)


def rows_of(module, folder, scratch):
    return dict(module.rows(trial_of(module, folder, scratch)))


def mse(rows, label, text="prose"):
    return rows[label][text]["logit_mse"]


@pytest.fixture(scope="module")
def trial(study_folder, tmp_path_factory):
    return trial_of(full, study_folder, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def full_rows(trial):
    return dict(full.rows(trial))


def assert_climbs(rows):
    """Every step of the ladder comes nearer to the fine-tune than the one before it."""
    for text in ("code", "prose"):
        assert mse(rows, "base", text) > 3 * mse(rows, "tensor, initial", text)
        assert mse(rows, "tensor, initial", text) > 2 * mse(rows, "tensor, distilled", text)
        assert mse(rows, "row, initial", text) > 3 * mse(rows, "row, fitted", text)
        assert mse(rows, "row, fitted", text) > mse(rows, "row, fitted, distilled", text)
        assert mse(rows, "row, fitted, distilled", text) < 0.7 * mse(rows, "tensor, distilled", text)


def test_a_full_fine_tune_is_recovered_step_by_step(full_rows):
    assert_climbs(full_rows)
    for label in list(full_rows)[2:]:
        assert full_rows[label]["code"]["recovered"] > 0.9, label


def test_the_change_is_the_norm_of_the_linears_differences(trial, full_rows):
    pair, names = trial.pair, [name for name, _ in _linears(training.load(trial.pair.base))]
    base, tuned = (training.load(folder).state_dict() for folder in (pair.base, pair.finetuned))
    squares = [
        (sum((tuned[n] - base[n]).square().sum().item() for n in names)),
        (sum(base[n].square().sum().item() for n in names)),
    ]
    assert change(trial) == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert full_rows["fine-tune"]["about"] == {"change": change(trial)}


def _linears(model):
    from bitdelta.study.quantize import linears

    return [(f"{name}.weight", module) for name, module in linears(model)]


def test_a_lora_is_exact_as_an_adapter_and_recovered_as_a_delta(study_folder, tmp_path):
    trial = trial_of(lora, study_folder, tmp_path)
    rows = dict(lora.rows(trial))
    for text in ("code", "prose"):
        assert mse(rows, "base", text) > 3 * mse(rows, "row, initial", text)
        assert mse(rows, "row, fitted, distilled", text) < 0.8 * mse(rows, "row, initial", text)
    adapter = rows[f"adapter of rank {lora.RANK}"]
    assert adapter["code"]["logit_mse"] < 0.1 * mse(rows, "row, fitted, distilled", "code")
    weights = _linears(training.load(trial.pair.base))
    sizes = [2 * lora.RANK * sum(module.weight.shape) for _, module in weights]
    assert adapter["about"]["bytes"] == sum(sizes)


def test_continued_training_changes_more_and_is_harder_to_recover(study_folder, full_rows, tmp_path):
    rows = rows_of(continued, study_folder, tmp_path)
    assert rows["fine-tune"]["about"]["change"] > 1.5 * full_rows["fine-tune"]["about"]["change"]
    assert mse(rows, "tensor, initial") > 2 * mse(full_rows, "tensor, initial")
    for text in ("code", "prose"):
        assert mse(rows, "row, fitted", text) < 0.7 * mse(rows, "row, initial", text)
        assert mse(rows, "tensor, distilled", text) < 0.8 * mse(rows, "tensor, initial", text)


def test_rows_worse_than_the_base_are_named():
    def row(label, recovered, error):
        return {"label": label, "code": {"recovered": {"values": recovered}, "logit_mse": {"values": error}}}

    rows = [row("base", [0, 0], [1, 1]), row("fine-tune", [1, 1], [0, 0])]
    rows += [row("bad", [-0.1, 0.2], [1.5, 2]), row("good", [0.9, 0.9], [0.1, 0.2])]
    assert list(continued.judge(rows)) == [
        "bad: worse than the base on 1 of 2 seeds by loss, on 2 by logit MSE"
    ]


@pytest.fixture(scope="module")
def dpo_rows(study_folder, tmp_path_factory):
    return rows_of(dpo, study_folder, tmp_path_factory.mktemp("dpo"))


def test_a_dpo_fine_tune_keeps_its_preference(dpo_rows):
    preference = {label: scores["preference"] for label, scores in dpo_rows.items()}
    accuracy = {label: scores["accuracy"] for label, scores in preference.items()}
    assert accuracy["base"] < 0.3 and accuracy["fine-tune"] > accuracy["before DPO"] + 0.2
    assert preference["base"]["recovered"] == 0 and preference["fine-tune"]["recovered"] == 1
    assert preference["row, fitted, distilled"]["recovered"] > 0.8
    assert accuracy["row, fitted, distilled"] > accuracy["before DPO"] + 0.15
    for text in ("code", "prose"):
        assert mse(dpo_rows, "tensor, initial", text) > 2 * mse(dpo_rows, "tensor, distilled", text)
        assert mse(dpo_rows, "row, initial", text) > 2 * mse(dpo_rows, "row, fitted", text)


def test_the_table_of_dpo_has_columns_of_its_own(dpo_rows):
    rows = table.rows_of([dpo_rows])
    json.dumps(rows, allow_nan=False)
    text = "\n".join(table.lines(rows, dpo.TITLE, dpo.COLUMNS))
    assert "prefers chosen %" in text and "row, fitted, distilled" in text and "before DPO" in text


def test_margins_are_those_of_the_answers_alone():
    vocabulary, generator = 11, torch.Generator().manual_seed(0)
    table = torch.randn(vocabulary, vocabulary, generator=generator)

    class Bigram:
        def __call__(self, input_ids, use_cache):
            return type("Output", (), {"logits": table[input_ids]})

    chosen, rejected = torch.randint(0, vocabulary, (2, 3, 8), generator=generator)
    found = dpo.margins(Bigram(), chosen, rejected)
    scores = table.log_softmax(-1)
    for i in range(3):
        wanted = [sum(scores[row[k - 1], row[k]] for k in range(4, 8)) for row in (chosen[i], rejected[i])]
        assert found[i].item() == pytest.approx((wanted[0] - wanted[1]).item(), rel=1e-4, abs=1e-5)


def test_the_dpo_loss_falls_with_the_margin_over_the_reference():
    zero = torch.zeros(4)
    assert dpo.dpo_loss(zero, zero).item() == pytest.approx(0.693147, rel=1e-5)
    assert dpo.dpo_loss(zero + 5, zero) < dpo.dpo_loss(zero, zero) < dpo.dpo_loss(zero, zero + 5)
    assert dpo.dpo_loss(zero + 7, zero + 7) == dpo.dpo_loss(zero, zero)


def test_pairs_share_their_prompt_and_differ_in_their_answer():
    prose, code = torch.arange(0, 200), torch.arange(1000, 1200)
    with training.seeded(3):
        chosen, rejected = dpo.sample(prose, code, 5, 20)
    assert chosen.shape == rejected.shape == (5, 20)
    assert (chosen[:, :10] == rejected[:, :10]).all() and (chosen[:, 10:] >= 1000).all()
    assert (rejected.diff(dim=1) == 1).all()
