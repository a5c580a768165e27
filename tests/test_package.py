"""The package as a whole: public names, what importing it loads, a tree that is not built, what README links to."""

import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bitdelta

PACKAGE = Path(bitdelta.__file__).parent


def python(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_public_name_is_there_and_documented():
    for name in bitdelta.__all__:
        assert getattr(bitdelta, name).__doc__, name


@pytest.mark.parametrize("name", sorted(path.stem for path in PACKAGE.glob("[a-z]*.py")))
def test_the_examples_in_the_docstrings_run(name):
    tried = doctest.testmod(importlib.import_module(f"bitdelta.{name}"))
    assert tried.failed == 0


@pytest.mark.parametrize(
    "name",
    ["as_bfloat16", "extract", "linear", "linear_add", "linear_transposed", "set_num_threads", "Delta"],
)
def test_what_users_call_has_an_example(name):
    assert ">>> " in getattr(bitdelta, name).__doc__


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bitdelta.nothing


@pytest.mark.parametrize(
    "first", ["", "import bitdelta.compress, bitdelta.merge, bitdelta.verify, bitdelta.linear; "]
)
def test_functions_stay_in_front_of_modules_of_the_same_name(first):
    names = "compress", "merge", "verify", "linear", "import_diff"
    calls = ", ".join(f"callable(bitdelta.{name})" for name in names)
    done = python("-c", f"import bitdelta; {first}print({calls})")
    assert done.stdout.split() == ["True"] * len(names), done.stderr


def test_what_needs_torch_or_matplotlib_is_imported_when_asked_for():
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    done = python(
        "-c", "import bitdelta; print(bitdelta.ops.linear, bitdelta.plot.quality, bitdelta.DeltaModel)"
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bitdelta.nothing  # noqa: B018 - asking is the test
    assert {"DeltaModel", "merged_model", "ops", "plot"} <= set(dir(bitdelta))


def test_importing_loads_nothing_heavy():
    heavy = "torch", "transformers", "huggingface_hub", "typer", "tqdm", "rich", "ml_dtypes"
    done = python("-c", f"import bitdelta, sys; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture
def unbuilt(tmp_path):
    """A copy of the Python files alone."""
    shutil.copytree(PACKAGE, tmp_path / "bitdelta", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return str(tmp_path)


@pytest.mark.parametrize("arguments", [["-c", "import bitdelta"], ["-m", "bitdelta"], ["-m", "bitdelta.cli"]])
def test_a_source_tree_without_the_extension_says_what_to_type(unbuilt, arguments):
    # -S: site-packages may hold an editable install, which would find the built extension
    done = python("-S", *arguments, cwd=unbuilt, PYTHONPATH=unbuilt)
    assert done.returncode and "is not built" in done.stderr and "pip install -e ." in done.stderr


def test_the_diagnosis_names_a_wrong_number_of_threads():
    done = python("-m", "bitdelta", BITDELTA_NUM_THREADS="many")
    assert done.returncode == 0 and "BITDELTA_NUM_THREADS: expected a whole number" in done.stdout, (
        done.stderr
    )


def test_the_links_of_readme_lead_somewhere():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("https://")]
    assert links and [link for link in links if not (PACKAGE.parent / link).exists()] == []


def test_the_citation_is_of_this_version():
    citation = (PACKAGE.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {bitdelta.__version__}" in citation.splitlines()


def test_the_ratios_to_the_original_recipe_in_readme_are_those_of_the_runs():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    names = [
        "sign(d), row least squares, distilled",
        "fitted signs, row, no gradients",
        "fitted, distilled, row",
        "fitted, distilled, rank1",
        "fitted, 2 planes, against 1",
    ]
    for column, size in ((2, "goals"), (4, "goals-wide")):
        path = PACKAGE / "study" / "results" / f"{size}.json"
        goals = json.loads(path.read_text(encoding="utf-8"))["goals"]
        for name, goal in zip(names, goals[:5], strict=True):
            (line,) = (line for line in readme.splitlines() if line.startswith(f"| {name} |"))
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            means = [goal["ratios"][text]["mean"] for text in ("code", "prose")]
            assert cells[column] == " / ".join(f"{mean:.{3 if mean < 0.1 else 2}f}" for mean in means), name
            limit, *verdicts = cells[5].replace(":", ",").split(", ")
            verdict = "met" if goal["met"] else "missed"
            assert (float(limit), verdicts[column // 2 - 1]) == (goal["limit"], verdict), name


def test_the_figures_of_many_tenants_in_readme_are_those_of_the_run():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    report = json.loads((PACKAGE / "bench" / "results" / "model.json").read_text(encoding="utf-8"))
    rows = {
        (row["kind"], row["rank"]): row for row in report["rows"] if "rank" in row and row["tenants"] == 16
    }
    merged = rows["merged", None]["microseconds"]
    for case in (("merged", None), ("deltas", None), ("lora", 16), ("lora", 64), ("lora", 128), ("peft", 16)):
        row, us = rows[case], rows[case]["microseconds"]
        cells = (
            f"{us / 1e3:.0f}",
            f"{row['tokens_per_second']:.1f}",
            f"{merged / us:.2f}",
            f"{row['bytes'] / 1e9:.2f}",
        )
        assert f"| {' | '.join(cells)} |" in readme, case


def test_the_figures_of_one_linear_in_readme_are_those_of_the_run():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    report = json.loads((PACKAGE / "bench" / "results" / "latency.json").read_text(encoding="utf-8"))
    rows = {(row["kind"], row["rank"], row["size"], row["tenants"]): row["speed"] for row in report["rows"]}
    for tenants in (1, 4, 16):
        cells = [
            " / ".join(
                f"{rows[kind, rank, size, tenants]:.2f}"
                for kind, rank in (("deltas", None), ("lora", 128), ("lora", 16))
            )
            for size in (1024, 2048, 4096, 8192)
        ]
        assert f"| {tenants} | {' | '.join(cells)} |" in readme
