"""What the README shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
