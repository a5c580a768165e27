"""The demonstration in tiny settings: it trains once, keeps the models, packs, measures and answers."""

import contextlib
import io
import json
import math
import subprocess
import sys

import pytest
import torch

from bitdelta import demo, demo_models
from bitdelta.cli import main


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def report(cache):
    """What the command prints: one document and nothing else."""
    threads, printed = torch.get_num_threads(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--small", "--cache", str(cache), "--json"]) == 0
    assert torch.get_num_threads() == threads
    return json.loads(printed.getvalue())


def test_reports_every_fine_tune_in_every_form(report):
    assert set(report["finetunes"]) == set(demo.TASKS)
    for result in report["finetunes"].values():
        assert [row["model"] for row in result["rows"]] == ["base", "fine-tune", *demo.FORMS]
        base, finetuned, *packed = result["rows"]
        for row in packed:
            assert 1 < finetuned["perplexity"] < row["perplexity"] < base["perplexity"]
            assert row["logit_mse"] < base["logit_mse"] and row["bytes"] < finetuned["bytes"]
            gap = math.log(base["perplexity"]) - math.log(finetuned["perplexity"])
            left = math.log(row["perplexity"]) - math.log(finetuned["perplexity"])
            assert row["recovered"] == pytest.approx(1 - left / gap)


def test_each_step_comes_nearer_to_the_fine_tune(report):
    for result in report["finetunes"].values():
        sign, distilled, fitted, both = (row["logit_mse"] for row in result["rows"][2:])
        assert sign > distilled > both and sign > fitted > both


def test_one_batch_answers_for_the_base_and_all_fine_tunes(report):
    rows = report["batch"]["rows"]
    assert [row["model"] for row in rows] == ["base", "code", "base", "unicode", "base", "shout"]
    assert all(row["answer"] for row in rows)
    assert all(a["prompt"] == b["prompt"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert any(a["answer"] != b["answer"] for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_the_report_can_be_read(report):
    text = "\n".join(demo.describe(report))
    for word in (
        *demo.TASKS,
        *demo.FORMS,
        "base",
        "fine-tune",
        "perplexity",
        "logit MSE",
        "one batch of 6 rows",
    ):
        assert word in text
    assert f"bitdelta compress {report['models']}/base" in text


def test_models_are_cached_and_seeded(cache, report, tmp_path):
    settings, _ = demo.small()
    messages = []
    root = demo.models(settings, cache, messages.append)
    assert str(root) == report["models"] and messages == []
    again = demo.models(settings, tmp_path, messages.append)
    assert again.name == root.name and messages
    for folder in ("base", *demo.TASKS):
        assert (again / folder / "model.safetensors").read_bytes() == (
            root / folder / "model.safetensors"
        ).read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == [root.name]


def test_an_interrupted_training_leaves_no_models(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_models, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.models(demo.small()[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_it_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from bitdelta.cli import main; sys.exit(main(['demo', '--small']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "pip install '.[torch]'" in done.stderr and done.stderr.count("\n") == 1
