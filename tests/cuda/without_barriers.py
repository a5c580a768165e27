"""Removes one barrier, or one wait for copies, of the kernels at a time, and tells whether their tests notice.

python tests/cuda/without_barriers.py [FILE ...]        some 15 s each; ends with 1 when one went unnoticed
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STATEMENT = re.compile(r"^\s*(__syncthreads\(\)|__syncwarp\(\)|bd_copy_async_wait<.*>\(\));")
TESTS = sorted(str(path.relative_to(ROOT)) for path in Path(__file__).parent.glob("test_*_kernels.py"))


def places(names):
    """(file, line number, statement) of what may be removed."""
    for path in sorted((ROOT / "kernels").iterdir()):
        if path.suffix in (".cu", ".h") and not path.name.startswith("emulation"):
            if not names or path.name in names:
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    match = STATEMENT.match(line)
                    if match:
                        yield path.name, number, match[1]


def verdict(tree, name, number):
    """What the first test that fails says, or None; the kernels of `tree` are as they were afterwards."""
    path = tree / "kernels" / name
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    lines[number - 1] = STATEMENT.sub("", lines[number - 1])
    path.write_text("".join(lines), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    path.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return None
    said = re.findall(r"^E\s+(.*)$", done.stdout, re.MULTILINE)
    return said[0][:150] if said else done.stdout[-500:]


def main():
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("bitdelta", "csrc", "kernels", "tests", "pyproject.toml"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)
        for name, number, statement in places(sys.argv[1:]):
            found = verdict(tree, name, number)
            print(f"{name}:{number}: {statement}: {found or 'UNNOTICED'}", flush=True)
            unnoticed += [name] * (found is None)
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
