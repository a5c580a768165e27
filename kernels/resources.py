"""Registers, spills, shared memory and opcodes of every kernel on every target, without a GPU.

    python kernels/resources.py [FILE.cu ...]           prints the table and what breaks its rules
    python kernels/resources.py --write [FILE.cu ...]   and writes it to kernels/resources.json

With names of files, only these are compiled, and the rest is as the table has it.

Registers and spills are what ptxas reports. Opcodes are counted in the cubin, an ELF file whose section .text.NAME
holds a kernel's instructions, 16 bytes each, the opcode in the low 12 bits. The numbers below were found by compiling
kernels with a known number of each; a test does it again.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import toolchain

TABLE = toolchain.KERNELS / "resources.json"
OPCODES = {
    "b1": (0x23D,),
    "int8": (0x237,),
    "half": (0x23C,),
    "lop3": (0x212, 0x812, 0xA12),  # with a register, an immediate, a constant
}

# Which tensor core products a kernel is made of; others have none. Where a target lacks b1, such kernels are empty.
PRODUCTS = {
    "multiply_few": "b1",
    "multiply_many": "int8",
    "multiply_transposed": "int8",
    "multiply_for_rows": "int8",
}


def measure(
    nvcc: str, source: str | Path, target: str, opcodes: dict[str, tuple[int, ...]] = OPCODES
) -> dict[str, dict[str, int]]:
    """The kernels of one file on one target, by name with template arguments."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [nvcc, *toolchain.NVCC_FLAGS, f"-gencode=arch=compute_{target},code=sm_{target}"]
        command += ["-Werror=all-warnings", "-cubin", "-Xptxas", "-v", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise toolchain.ToolError(f"nvcc refused {source} for {target}:\n{done.stderr}")
        counts = count_opcodes(cubin.read_bytes(), opcodes)
    found = {}
    for mangled, report in reports(done.stderr).items():
        found[mangled] = {**report, **counts[mangled]}
    return dict(zip(plain_names(list(found)), found.values(), strict=True))


def reports(said: str) -> dict[str, dict[str, int]]:
    """What ptxas -v says of each kernel."""
    found = {}
    for part in re.split(r"Compiling entry function '", said)[1:]:

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        found[part.partition("'")[0]] = {
            "registers": number(r"Used (\d+) registers"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spill_stores": number(r"(\d+) bytes spill stores"),
            "spill_loads": number(r"(\d+) bytes spill loads"),
            "static_shared": number(r"(\d+) bytes smem"),
        }
    return found


def count_opcodes(cubin: bytes, wanted: dict[str, tuple[int, ...]] = OPCODES) -> dict[str, dict[str, int]]:
    """Instructions, and those wanted, of each kernel of a cubin."""
    (table_at,) = struct.unpack_from("<Q", cubin, 40)
    entry_bytes, n_sections, names_index = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table_at + i * entry_bytes) for i in range(n_sections)]
    names_at = sections[names_index][4]
    found = {}
    for name_at, _, _, _, begin, n_bytes in sections:
        name = cubin[names_at + name_at : cubin.index(b"\0", names_at + name_at)].decode()
        if name.startswith(".text."):
            words = struct.iter_unpack("<QQ", cubin[begin : begin + n_bytes])
            opcodes = Counter(low & 0xFFF for low, _ in words)
            counts = {kind: sum(opcodes[number] for number in numbers) for kind, numbers in wanted.items()}
            found[name.removeprefix(".text.")] = {"instructions": n_bytes // 16, **counts}
    return found


def plain_names(mangled: list[str]) -> list[str]:
    """Names as in the source: without namespaces and parameters."""
    command = ["c++filt", "-p", *mangled]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    plain = [re.sub(r"\(anonymous namespace\)::|^void ", "", line) for line in lines if line]
    assert len(set(plain)) == len(mangled), plain
    return plain


def measure_all(nvcc: str, sources: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """{target: {file:kernel: numbers}}"""
    pairs = [(source, target) for source in sources for target in toolchain.TARGETS]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda pair: measure(nvcc, toolchain.ROOT / pair[0], pair[1]), pairs)
        table: dict[str, dict[str, dict[str, int]]] = {target: {} for target in toolchain.TARGETS}
        for (source, target), kernels in zip(pairs, results, strict=True):
            for name, numbers in kernels.items():
                table[target][f"{Path(source).name}:{name}"] = numbers
    return {target: dict(sorted(kernels.items())) for target, kernels in table.items()}


def faults(table: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """What breaks the rules: local memory, and tensor core products that are missing or not expected."""
    found = []
    for target, kernels in table.items():
        has_b1 = toolchain.TARGETS[target] == "b1"
        for name, numbers in kernels.items():
            where = f"{name} on {target}"
            sizes = {key: numbers[key] for key in ("stack", "spill_stores", "spill_loads")}
            if any(sizes.values()):
                found.append(f"{where} uses local memory: {sizes}")
            product = PRODUCTS.get(re.sub(r".*:|<.*", "", name))
            expected = {"b1": has_b1, "int8": True, None: False}[product]
            for kind in ("b1", "int8", "half"):
                if (numbers[kind] > 0) != (expected and kind == product):
                    found.append(f"{where} has {numbers[kind]} {kind} products")
    return found


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new numbers, and the old ones of files that were not compiled and still exist."""
    compiled = {name.partition(":")[0] for kernels in new.values() for name in kernels}
    kept = {Path(source).name for source in toolchain.kernel_sources()} - compiled
    for target, kernels in new.items():
        kernels |= {name: old[target][name] for name in old[target] if name.partition(":")[0] in kept}
        new[target] = dict(sorted(kernels.items()))
    return new


def render(version: str, table: dict[str, dict[str, dict[str, int]]]) -> str:
    """The table as JSON, a kernel a line."""
    lines = []
    for target, kernels in table.items():
        rows = [f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in kernels.items()]
        lines.append(f" {json.dumps(target)}: {{\n" + ",\n".join(rows) + "\n }")
    return f'{{"nvcc": {json.dumps(version)}, "targets": {{\n' + ",\n".join(lines) + "\n}}\n"


def main() -> None:
    nvcc = toolchain.find_nvcc()
    named = [name for name in sys.argv[1:] if name != "--write"]
    sources = [source for source in toolchain.kernel_sources() if not named or Path(source).name in named]
    table = measure_all(nvcc, sources)
    if named:
        table = merge(json.loads(TABLE.read_text(encoding="utf-8"))["targets"], table)
    text = render("{}.{}".format(*toolchain.nvcc_version(nvcc)), table)
    print(text)
    if "--write" in sys.argv:
        TABLE.write_text(text, encoding="utf-8")
    broken = faults(table)
    sys.exit("\n".join(broken) if broken else 0)


if __name__ == "__main__":
    main()
