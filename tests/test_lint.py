"""Linters, formatters and types, as part of the one test command."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ["bitdelta", "kernels", "tests", "setup.py"]
C = sorted(
    path
    for pattern in ("csrc/*.[ch]", "kernels/*.h", "kernels/*.cpp", "kernels/**/*.cu", "tests/cuda/*.cu")
    for path in ROOT.glob(pattern)
)


def passes(tool, *arguments):
    """Runs a tool that the extra [test] installs, in the repository."""
    own = Path(sysconfig.get_path("scripts")) / tool
    found = str(own) if own.is_file() else shutil.which(tool)
    assert found, f"{tool} is missing: pip install -e '.[torch,plot,test]'"
    done = subprocess.run([found, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{tool} {' '.join(arguments[:2])}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing():
    passes("ruff", "check", "--no-cache", *PYTHON)


def test_python_is_formatted():
    passes("ruff", "format", "--no-cache", "--check", *PYTHON)


def test_types_hold(tmp_path):
    passes("mypy", "--cache-dir", str(tmp_path), "--python-executable", sys.executable)


@pytest.mark.parametrize("path", C, ids=lambda path: path.name)
def test_c_is_formatted(path):
    passes("clang-format", "--dry-run", "-Werror", str(path))
