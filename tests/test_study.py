"""The studies on their tiny models, and what of the field's claims holds on a small transformer."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from bitdelta import study
from bitdelta.cli import main
from bitdelta.study import budget, table
from bitdelta.study.pair import SIZES, make_pair
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
    assert "study: expected one of budget, " in capsys.readouterr().err
    assert main(["study", "scales", "--size", "huge"]) == 2
    assert "size: expected one of small, tiny, got 'huge'" in capsys.readouterr().err


def test_a_budget_errs_no_more_than_uniform_planes_of_its_bytes(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "UNIFORM", ((1, "row"), (2, "row")))
    rows = table.rows_of([dict(budget.rows(Trial(tiny_pair, tmp_path)))])
    bits = [row["about"]["bits"]["mean"] for row in rows[1:]]
    assert bits[1] <= bits[0] < bits[3] <= bits[2]
    judged = budget.judge(rows)
    assert len(judged) == 2 and all(line.startswith("holds:") for line in judged), judged
