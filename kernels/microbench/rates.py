"""Builds rates.cu for the visible GPU, runs it, and prints its JSON with the instructions of its loops.

python kernels/microbench/rates.py [OUT.json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import resources  # noqa: E402
import toolchain  # noqa: E402

SOURCE = HERE / "rates.cu"
OPCODES = resources.OPCODES | {"b1 of a warp group": (0xDF2,), "shf": (0x219,), "imad": (0x224,)}


def build(nvcc: str, arch: str, program: Path) -> None:
    """Compiles the program for one target."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *toolchain.NVCC_FLAGS, target, "-Werror=all-warnings", str(SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise toolchain.ToolError(f"nvcc refused {SOURCE}:\n{done.stderr}")


def loops(nvcc: str, arch: str) -> dict[str, dict[str, int]]:
    """Instructions of each kernel on the target, from the cubin."""
    found = resources.measure(nvcc, SOURCE, arch, OPCODES)
    return {name: numbers for name, numbers in found.items() if "rate" in name}


def run() -> dict[str, Any]:
    """What the GPU does in a clock, and what its loops are made of."""
    nvcc = toolchain.find_nvcc()
    archs = toolchain.visible_archs()
    if not archs:
        raise toolchain.ToolError("nvidia-smi shows no GPU that the kernels know")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "rates"
        build(nvcc, archs[0], program)
        done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise toolchain.ToolError(f"rates.cu failed: {done.stderr.strip()}")
    report: dict[str, Any] = json.loads(done.stdout)
    return {**report, "target": archs[0], "instructions": loops(nvcc, archs[0])}


def main() -> int:
    try:
        report = run()
    except toolchain.ToolError as error:
        print(f"microbench: {error}", file=sys.stderr)
        return 2
    text = json.dumps(report, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
