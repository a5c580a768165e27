"""What the README shows works as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bitdelta

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def readme():
    return README.read_text(encoding="utf-8")


def test_the_python_example_runs(readme):
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(examples) == 1 and sum(map(bool, examples[0].splitlines())) <= 10
    done = subprocess.run(
        [sys.executable, "-c", examples[0]], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with BASE, FINETUNED and text.txt: a small Llama and its fine-tune on source code."""
    pytest.importorskip("transformers", reason="PyTorch or transformers is not installed")
    from bitdelta import demo, demo_models

    root, (settings, _) = tmp_path_factory.mktemp("readme"), demo.small()
    trained = demo_models.models(settings, cache=root / "cache", log=lambda line: None)
    (root / "BASE").symlink_to(trained / "base")
    (root / "FINETUNED").symlink_to(trained / "code")
    (root / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return root


def blocks(readme, after):
    """The indented blocks behind this text, one string each."""
    found = re.findall(r"(?:^ {4}.*\n)+", readme.partition(after)[2], re.MULTILINE)
    return [re.sub("^ {4}", "", block, flags=re.MULTILINE) for block in found]


def test_the_commands_of_the_quickstart_run(readme, folder, monkeypatch, capsys):
    from bitdelta.cli import main

    monkeypatch.chdir(folder)
    lines = blocks(readme, "on the command line:")[0].splitlines()
    assert [line.split()[1] for line in lines] == ["compress", "eval", "generate", "merge"]
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, (line, capsys.readouterr().err)
    assert (folder / "FOLDER" / "model.safetensors").is_file()


def test_the_calls_of_the_quickstart_run(readme, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {"base_dir": "BASE", "finetuned_dir": "FINETUNED", "delta_dir": "d", "better_dir": "better"}
    names |= {"out_dir": "distilled", "merged_dir": "merged", "bitdelta": bitdelta}
    lines = blocks(readme, "or in Python:")[0].splitlines()
    assert len(lines) == 6
    for line in lines:
        exec(line, names)
    assert bitdelta.verify("better", "BASE")["ok"] and bitdelta.verify("distilled", "BASE")["ok"]


def test_many_fine_tunes_in_one_model_run(readme, folder, monkeypatch):
    import torch

    monkeypatch.chdir(folder)
    (folder / "llama").symlink_to(folder / "BASE")
    (folder / "me").mkdir()
    for delta in ("llama-math-delta", "me/llama-law-delta"):
        bitdelta.compress("BASE", "FINETUNED", folder / delta)
    ids = torch.ones(3, 4, dtype=torch.int64)
    names = {"bitdelta": bitdelta, "batch": {"input_ids": ids, "attention_mask": ids}}
    exec(blocks(readme, "## Many fine-tunes in one model")[0], names)
    assert names["model"].deltas == ["math", "law"]


def test_every_command_in_the_table_exists_and_the_other_way_round(readme):
    from typer.main import get_command

    from bitdelta.cli import app

    assert set(re.findall(r"^\| `bitdelta ([a-z-]+)", readme, re.MULTILINE)) == set(get_command(app).commands)


def test_the_options_it_names_exist(readme):
    from typer.main import get_command

    from bitdelta.cli import app

    known = {"--help", "--version"}
    for command in get_command(app).commands.values():
        known |= {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= known


def test_the_two_commands_are_there(readme):
    assert "pip install '.[torch]' && bitdelta demo" in readme
    assert "pip install -e '.[torch,plot,test]' && pytest" in readme


def test_every_measured_row_at_the_top_names_a_command_that_exists(readme):
    from typer.main import get_command

    from bitdelta.cli import app

    top = readme.partition("\n## ")[0]
    rows = [line for line in top.splitlines() if line.startswith("| ") and "reproduced by" not in line]
    commands = [re.search(r"`bitdelta ([a-z-]+)[^`]*` \|$", row) for row in rows]
    assert rows and all(commands)
    assert {command[1] for command in commands} <= set(get_command(app).commands)
