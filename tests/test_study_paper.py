"""The paper's tables: what they hold, the plan, what is missing, and their rows run on the tiny pair."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_lm_eval import QUESTIONS, TASK

from bitdelta.cli import main
from bitdelta.errors import Error
from bitdelta.study import paper, paper_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from bitdelta import training

    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(training.prose()[-60_000:])
    return str(path)


@pytest.fixture
def models(tiny_pair, text):
    return {
        "base": str(tiny_pair.base),
        "finetuned": str(tiny_pair.finetuned),
        "text": text,
        "steps": 3,
        "use_lm_eval": False,
    }


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(paper_run, "N_TOKENS", 1024)


def rows_of(report):
    return {row["label"]: row["measured"] for row in report["rows"]}


def test_tables_name_tasks_and_methods_that_exist():
    from bitdelta.study.quantize import METHODS

    for number, table in paper.TABLES.items():
        assert set(table.tasks) <= set(paper.TASKS), number
        assert len({row.label for row in table.rows}) == len(table.rows), number
        for row in table.rows:
            assert row.method in ("base", "finetuned", "initial", "distilled", "svd", "size")
            assert row.quantized in ("", *METHODS) and (row.rank > 0) == (row.method == "svd")
            assert row.base and (row.finetuned or number == 7)
            known = {*paper.TASKS, "MT-Bench", "adjusted average", "distillation loss"}
            assert set(row.reported) <= (known if row.method != "size" else {"GB", "delta GB", "factor"})


def test_a_dry_run_prints_plan_and_figures_and_loads_nothing(capsys, monkeypatch):
    monkeypatch.setattr(paper_run, "_resolve", None)
    assert main(["study", "paper", "--table", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in (
        "(49.97)",
        "lmsys/vicuna-7b-v1.5",
        "distilled 200 steps of 4 x 128 tokens",
        "gsm8k, 5 shots",
        "allenai/c4:en",
        "17 fine-tunes",
    ):
        assert words in out
    assert main(["study", "paper", "--table", "9", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["planes"] for row in report["rows"]][2:] == list(range(1, 9))


def test_missing_models_are_named_together(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Error) as caught:
        paper_run.run(1)
    for words in (paper.LLAMA, paper.CHAT, "HF_HUB_OFFLINE", "--finetuned", "--dry-run"):
        assert words in str(caught.value)
    with pytest.raises(Error, match="does not publish its fine-tune"):
        paper_run.run(7)


def test_an_unknown_table_and_options_of_other_studies_are_refused(capsys):
    assert main(["study", "paper"]) == 2
    assert "expected one of 1, 2, 5, 6, 7, 8, 9, 10" in capsys.readouterr().err
    assert main(["study", "scales", "--dry-run"]) == 2
    assert "are of paper alone" in capsys.readouterr().err


def test_own_models_run_through_a_table(models):
    report = paper_run.run(1, **models)
    rows = rows_of(report)
    assert rows["Llama 2-7B Chat"]["logit_mse"] == 0 and rows["Llama 2-7B"]["logit_mse"] > 0.5
    assert rows["BitDelta"]["logit_mse"] < rows["BitDelta-Initial"]["logit_mse"] < 0.5
    assert rows["BitDelta"]["distillation loss"] > 0
    # of at most 64 singular values, 128 are all of them, rounded nowhere
    assert rows["SVD, r = 128"]["logit_mse"] < 1e-6 < rows["SVD, r = 16"]["logit_mse"]
    text = "\n".join(paper_run.describe(report))
    assert "measured (the paper's)" in text and "SVD, r = 16" in text


def test_sizes_are_measured_in_one_unit(models, tiny_pair):
    report = paper_run.run(5, **models)
    for row in report["rows"]:
        measured = row["measured"]
        assert measured["factor"] == pytest.approx(measured["GB"] / measured["delta GB"], rel=1e-6)
        size = (tiny_pair.finetuned / "model.safetensors").stat().st_size
        assert measured["GB"] == pytest.approx(size / 1e9, rel=0.05)


def test_a_model_over_its_own_quantised_self_is_nearer_than_that(models, monkeypatch):
    rows = tuple(
        paper.Row(label, paper.CHAT, paper.CHAT, method, quantized="INT4 RTN")
        for label, method in (("broken", "finetuned"), ("repaired", "initial"))
    )
    monkeypatch.setitem(paper_run.TABLES, 6, paper.Table("own", rows))
    found = rows_of(paper_run.run(6, **models))
    assert 0 < found["repaired"]["logit_mse"] < 0.5 * found["broken"]["logit_mse"]


def test_lm_eval_scores_the_rows(models, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install 'lm_eval[hf]' to run it")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one_bit.yaml").write_text(TASK.format(questions=questions))
    rows = tuple(paper.Row(method, paper.LLAMA, paper.CHAT, method) for method in ("base", "finetuned"))
    monkeypatch.setitem(paper_run.TABLES, 6, paper.Table("own", rows, ("ours",)))
    models |= {"use_lm_eval": True, "task_folder": tmp_path / "tasks"}
    found = rows_of(paper_run.run(6, **models, tasks={"ours": paper.Task("one_bit", 0, "acc")}))
    for scores in found.values():
        assert scores["ours"] in (0, 25, 50, 75, 100) and "logit_mse" in scores
    with pytest.raises(Error, match="lm_eval: nothing: "):
        paper_run.run(6, **models, tasks={"ours": paper.Task("nothing", 0, "acc")})


def test_without_lm_eval_the_error_says_how_to_go_on(models, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(Error, match=r"lm_eval is missing .*--no-lm-eval"):
        paper_run.run(2, **models | {"use_lm_eval": True})
