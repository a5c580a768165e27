"""The plan of a first visit to a GPU: it names what is there, fits its time, and goes on after a failure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitdelta import _C

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "kernels"))
import first_visit  # noqa: E402
from first_visit import Step  # noqa: E402

SCRIPT = ROOT / "kernels" / "first_visit.py"


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--dry-run", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.partition(",")[0] for line in run.stdout.splitlines()]
    assert names == [step.name for step in first_visit.plan("x")]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"]])
def test_other_arguments_show_how_it_is_used(arguments):
    run = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and "--dry-run OUT" in run.stderr and run.stdout == ""


def test_the_steps_name_files_that_exist_and_leave_few():
    steps = first_visit.plan("x")
    for step in steps:
        for word in step.command:
            path = word.removeprefix("--ignore=").partition("::")[0]
            if "/" in path and not path.startswith(("/", "x")):
                assert (ROOT / path).is_file() or (ROOT / path).is_dir(), path
    assert len({step.output for step in steps} | {"summary.json", "progress.log"}) <= 8
    until_bench = sum(step.seconds for step in steps[:6])
    assert until_bench < first_visit.SECONDS  # even if every step before it is stopped, the bench begins
    assert (
        sum(step.seconds for step in steps[3:8]) < first_visit.SECONDS
    )  # as builds take a third of what they may


# all but the one that collects the whole folder, which takes long
OF_TESTS = ["suite of single kernels", "memcheck", "racecheck", "synccheck"]


@pytest.mark.parametrize("name", OF_TESTS)
def test_tests_that_a_step_selects_exist(name):
    command = next(step.command for step in first_visit.plan("x") if step.name == name)
    command = [*command[command.index("-m") - 1 :], "--collect-only"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    chosen = [line for line in run.stdout.splitlines() if "::" in line]
    assert run.returncode == 0 and chosen, run.stdout
    assert not any("emulated" in line for line in chosen)


@pytest.mark.parametrize("name", ["bench", "whole models"])
def test_the_bench_is_called_as_it_wants(name):
    if _C.cuda_missing() is None and not _C.cuda_is_emulated():
        pytest.skip("a GPU would run it")
    command = next(step.command for step in first_visit.plan("x") if step.name == name)
    command = [word.replace(first_visit.TO_END_IN_TIME, "5") for word in command]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2 and run.stdout == ""
    assert "bench cuda needs a GPU" in run.stderr


def step(name, code, seconds=60, output="some.log", **variables):
    return Step(name, seconds, output, [sys.executable, "-c", code], variables)


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path):
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
    steps = [
        step("fails", "raise SystemExit(3)"),
        step("hangs", hang, seconds=first_visit.SHORTEST),
        Step("missing", 60, "some.log", ["no-such-tool"]),
        step("json", "import sys; print('{}'); print('said', file=sys.stderr)", output="a.json"),
        step("variable", "import os; print(os.environ['NAME'])", NAME="its value"),
        Step("told", 50, "some.log", [sys.executable, "-c", "print('has', {seconds})"]),
    ]
    ended = first_visit.run(steps, tmp_path)
    assert [each["ended"] for each in ended] == [
        "exit status 3",
        "stopped after 5 s",
        "no-such-tool was not found",
        "ok",
        "ok",
        "ok",
    ]
    assert json.loads((tmp_path / "summary.json").read_text()) == ended
    assert [each["said"] for each in ended[3:]] == ["said", "its value", "has 40"]
    assert (tmp_path / "a.json").read_text() == "{}\n"
    assert "said" in (tmp_path / "progress.log").read_text()
    assert "its value" in (tmp_path / "some.log").read_text()
    assert "has 40" in (tmp_path / "some.log").read_text()


def test_no_step_begins_after_the_time(tmp_path):
    steps = [step("first", "pass"), step("second", "pass")]
    assert [each["ended"] for each in first_visit.run(steps, tmp_path, seconds=1)] == ["no time was left"] * 2


def test_the_tables_are_shown_of_what_was_measured(tmp_path, capsys):
    (tmp_path / "model.json").write_text('{"suite": "cu')
    first_visit.show(tmp_path)
    assert capsys.readouterr().out == "bench.json: no report\n\nmodel.json: no report\n\n"
    machine = {
        "gpu": "A GPU",
        "processors": 1,
        "memory_gb": 1.0,
        "driver": "1",
        "bitdelta": "0",
        "build": "x",
    }
    report = {
        "suite": "cuda",
        "quick": True,
        "machine": machine | {"torch": "2", "triton": None},
        "seconds": 1,
    }
    (tmp_path / "bench.json").write_text(json.dumps(report | {"rows": [], "goals": []}))
    first_visit.show(tmp_path)
    assert "A GPU" in capsys.readouterr().out
