"""Every notebook runs from top to bottom on the CPU, is named in README, and has no outputs in it."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="PyTorch or transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 240  # the longest that a cell may take


def names(paths):
    return [path.stem for path in paths]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of trained models for all notebooks."""
    return tmp_path_factory.mktemp("cache")


def run(notebook, folder, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def figures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_it_runs_and_draws(path, tmp_path, monkeypatch, cache):
    done = run(nbformat.read(path, as_version=4), tmp_path, monkeypatch, cache)
    assert figures(done)
    assert not list(tmp_path.iterdir()), "files are left beside the notebook"


def test_a_cell_that_raises_is_found(tmp_path, monkeypatch, cache):
    cells = [nbformat.v4.new_code_cell("assert False, 'found'")]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="found"):
        run(nbformat.v4.new_notebook(cells=cells), tmp_path, monkeypatch, cache)


def test_a_progress_bar_is_shown_without_warnings(tmp_path, monkeypatch, cache):
    source = "from bitdelta.progress import progress_bar\nwith progress_bar('compress', 3, True) as bar: bar.update(3)"
    cell = nbformat.v4.new_code_cell(source)
    run(nbformat.v4.new_notebook(cells=[cell]), tmp_path, monkeypatch, cache)
    text = "".join(output.get("text", "") + str(output.get("data", "")) for output in cell.outputs)
    assert "compress" in text and "Warning" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_no_outputs_are_kept_and_prose_comes_first(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_readme_names_all_of_them_and_no_other():
    import re

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert NOTEBOOKS
    assert sorted(set(re.findall(r"notebooks/([a-z_]+)\.ipynb", readme))) == names(NOTEBOOKS)
