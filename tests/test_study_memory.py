"""The study of memory: what it sees of a process, and its rows on a tiny model."""

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
if not Path("/proc/self/clear_refs").exists():
    pytest.skip("memory is read from /proc", allow_module_level=True)

import numpy as np

from bitdelta import study
from bitdelta.errors import Error
from bitdelta.study import memory


def test_sizes_are_its_own():
    with pytest.raises(ValueError, match="size: expected one of small, tiny, got 'wide'"):
        study.run("memory", size="wide")


def test_the_status_of_a_process_is_read_in_bytes():
    before = memory._status(os.getpid())
    kept = np.ones(1 << 27, np.uint8)  # more than malloc keeps for later
    after = memory._status(os.getpid())
    assert after["RssAnon"] - before["RssAnon"] == pytest.approx(kept.nbytes, rel=0.2)
    assert memory._status(1 << 30) == {}


CHILD = """
import sys, time, numpy as np
print("ready", flush=True)
sys.stdin.readline()
kept = np.ones(96 << 20, np.uint8)
time.sleep(0.1)
del kept
print(0.25, flush=True)
sys.stdin.readline()
"""


def test_a_peak_that_is_over_before_the_end_is_seen(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    real = memory.subprocess.Popen
    monkeypatch.setattr(
        memory.subprocess, "Popen", lambda command, **kw: real([sys.executable, tmp_path / "child.py"], **kw)
    )
    found = memory._watch("distill", tmp_path)
    assert found["seconds"] == 0.25
    assert found["peak"] == pytest.approx(96 << 20, rel=0.1)
    assert found["private"] == pytest.approx(96 << 20, rel=0.1)


def test_a_case_that_fails_says_why(tmp_path):
    with pytest.raises(Error, match=r"compress did not start: .*tokens.npy"):
        memory._watch("compress", tmp_path)


def test_every_case_is_measured(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")  # what is freed goes back: malloc keeps nothing
    cases = ("compress", "teacher", "distill, checkpointing")
    monkeypatch.setattr(memory, "CASES", {case: memory.CASES[case] for case in cases})
    report = study.run("memory", [0], "tiny")
    json.dumps(report, allow_nan=False)
    rows = {row["label"].split(": ")[1]: row["memory"] for row in report["rows"]}
    assert list(rows) == list(cases)
    assert all(row["peak"]["mean"] > 0 and row["seconds"]["mean"] > 0 for row in rows.values())
    private = [rows[case]["private"]["mean"] for case in cases]
    assert private[0] < private[2] < private[1]  # the teacher's child trains a step without checkpoints
    assert "private MB" in "\n".join(study.describe(report))
