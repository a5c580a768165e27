"""The demonstration in tiny settings: it trains once, keeps the models, measures, and repeats itself."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from bitdelta import demo
from bitdelta.cli import main


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def report(cache):
    settings, evaluation = demo.small()
    return demo.run(settings, evaluation, cache=cache)


def test_reports_every_fine_tune_with_its_four_models(report):
    assert set(report["finetunes"]) == set(demo.TASKS)
    for result in report["finetunes"].values():
        assert [row["model"] for row in result["rows"]] == ["base", "fine-tune", "1 bit", "2 bits"]
        base, finetuned, one, two = result["rows"]
        assert all(row["perplexity"] > 1 and isinstance(row["sample"], str) for row in result["rows"])
        assert one["bytes"] < two["bytes"] < finetuned["bytes"]
    json.dumps(report, allow_nan=False)


def test_the_report_can_be_read(report):
    text = "\n".join(demo.describe(report))
    for word in (*demo.TASKS, "base", "fine-tune", "1 bit", "2 bits", "perplexity"):
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


def test_the_command_prints_one_document(cache, report, capsys):
    assert main(["demo", "--small", "--cache", str(cache), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["finetunes"].keys() == demo.TASKS.keys()


def test_an_interrupted_training_leaves_no_models(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupt)
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
