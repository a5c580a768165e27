"""The build: what the sdist holds, that it builds alone, what `python -m bitdelta` prints or asks for."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bitdelta import _C

ROOT = Path(__file__).parent.parent
IGNORED = shutil.ignore_patterns(
    "__pycache__", "*.so", "*.egg-info", "build", "dist", ".git", ".*_cache", ".hypothesis"
)


def run(*command, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist of a clean copy of this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=IGNORED)
    command = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    done = run("-c", command, cwd=folder / "tree")
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = folder.glob("bitdelta-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_holds_the_sources(sdist):
    wanted = [
        path for folder in ("csrc", "kernels", "bitdelta", "tests") for path in (ROOT / folder).rglob("*")
    ]
    top = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.py")
    wanted += [ROOT / name for name in top]
    ends = {
        ".c",
        ".h",
        ".cu",
        ".cuh",
        ".py",
        ".pyi",
        ".typed",
        ".sh",
        ".md",
        ".toml",
        ".safetensors",
        ".json",
        ".cff",
        "",
    }
    names = {path.relative_to(ROOT) for path in wanted if path.is_file() and path.suffix in ends}
    names = {
        name
        for name in names
        if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    }
    assert sorted(str(name) for name in names if not (sdist / name).is_file()) == []


def test_the_sdist_holds_no_build_products(sdist):
    found = [path for path in sdist.rglob("*") if path.suffix in (".so", ".pyc", ".o")]
    assert found == []


@pytest.mark.skipif(
    _C.build_info()["sanitize"], reason="builds without the sanitizers, which are preloaded here"
)
def test_the_sdist_installs_and_runs_elsewhere(sdist, tmp_path):
    target = tmp_path / "installed"
    done = run(
        "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "--target", target, sdist,
        cwd=tmp_path, BITDELTA_CUDA="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"py.typed", "_C.pyi"} <= {path.name for path in (target / "bitdelta").iterdir()}
    done = run("-m", "bitdelta", cwd=tmp_path, PYTHONPATH=str(target), BITDELTA_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert str(target) in lines["bitdelta"]
    assert lines["threads"] == "3 (from BITDELTA_NUM_THREADS=3)"
    assert lines["cuda"] == "not built: BITDELTA_CUDA=0"


def test_the_diagnosis_names_everything():
    done = run(
        "-m", "bitdelta", cwd=ROOT, PYTHONPATH=str(ROOT), BITDELTA_ISA="generic", BITDELTA_NUM_THREADS=""
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert {"bitdelta", "python", "numpy", "torch", "cpu", "compiler", "isa", "threads", "cuda"} <= set(lines)
    assert lines["isa"].startswith("generic (here: ")
    assert "BITDELTA_ISA=generic" in lines["isa"]
    assert "from the affinity mask" in lines["threads"]
    assert "-std=c11" in lines["compiler"]


def fake_nvcc(folder, says):
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{says}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


RELEASE = 'echo "Cuda compilation tools, release {}, V0"'


@pytest.mark.parametrize(
    "says, archs, reason",
    [
        (RELEASE.format("11.8"), "", "nvcc is 11.8; kernels need 12.0"),
        ("exit 1", "", "nvcc --version says no release"),
        (RELEASE.format("13.0"), "", "libcudart_static.a was not found below "),
        (RELEASE.format("13.0"), "90a 70", "BITDELTA_CUDA_ARCHS: expected all, 80, "),
        (RELEASE.format("12.4"), "100f", "BITDELTA_CUDA_ARCHS: 100f needs nvcc 12.9, this is 12.4"),
    ],
)
def test_a_build_that_insists_on_cuda_says_what_is_missing(sdist, tmp_path, says, archs, reason):
    environment = {"CUDACXX": fake_nvcc(tmp_path, says), "BITDELTA_CUDA_ARCHS": archs}
    done = run("setup.py", "build_ext", cwd=sdist, BITDELTA_CUDA="1", **environment)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("bitdelta: BITDELTA_CUDA=1, but cuda: not built: "), done.stderr
    assert reason in last


@pytest.mark.parametrize("archs", ["90a 70", "100f"])
def test_targets_that_were_asked_for_and_cannot_be_had_stop_any_build(sdist, tmp_path, archs):
    nvcc = fake_nvcc(tmp_path, RELEASE.format("12.4"))
    done = run("setup.py", "--version", cwd=sdist, BITDELTA_CUDA="", CUDACXX=nvcc, BITDELTA_CUDA_ARCHS=archs)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("bitdelta: BITDELTA_CUDA_ARCHS: ")


@pytest.mark.parametrize(
    "setting, about",
    [("", "nvcc is 11.8; kernels need 12.0"), ("0", "BITDELTA_CUDA=0")],
)
def test_a_build_without_kernels_says_so_in_one_line(sdist, tmp_path, setting, about):
    nvcc = fake_nvcc(tmp_path, RELEASE.format("11.8"))
    command = "setup.py", "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"
    done = run(
        *command, cwd=sdist, BITDELTA_CUDA=setting, CUDACXX=nvcc, CC="false"
    )  # the notice is all we want
    assert [line for line in done.stderr.splitlines() if "cuda" in line and "error" not in line] == [
        f"bitdelta: cuda: not built: {about}"
    ]


@pytest.fixture
def toolchain(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    for name in ("BITDELTA_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("toolchain")


def test_where_no_nvcc_is_the_places_are_named(toolchain, monkeypatch):
    asked = []
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    monkeypatch.setattr(shutil, "which", asked.append)
    with pytest.raises(toolchain.ToolError, match=r"nvcc was not found \(CUDACXX, CUDA_HOME, PATH"):
        toolchain.find_nvcc()
    assert asked == ["/opt/cuda/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]


@pytest.mark.parametrize(
    "shown, asked, targets",
    [
        (None, "", ("80", "90a", "90+PTX")),
        ("9.0\n9.0\n", "", ("90a",)),
        ("10.3\n8.0\n7.0\n", "", ("100f", "80")),
        ("7.0\n", "", ("80", "90a", "90+PTX")),
        ("9.0\n", "86, 120f", ("86", "120f")),
        ("9.0\n", "all", ("80", "86", "89", "90a", "100f", "120f", "90+PTX")),
    ],
)
def test_targets_are_those_asked_for_or_of_the_visible_gpus(
    toolchain, monkeypatch, tmp_path, shown, asked, targets
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BITDELTA_CUDA_ARCHS", asked)
    if shown is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{shown}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert toolchain.wanted_archs((13, 0)) == targets
    assert {target.removesuffix("+PTX") for target in targets} <= set(toolchain.TARGETS)


def test_a_visible_gpu_that_nvcc_does_not_know_is_no_wrong_setting(toolchain, monkeypatch):
    monkeypatch.setattr(toolchain, "visible_archs", lambda: ("100f",))
    with pytest.raises(toolchain.ToolError, match="the visible GPU: 100f needs nvcc 12.9") as caught:
        toolchain.wanted_archs((12, 4))
    assert not isinstance(caught.value, toolchain.SettingError)


def test_a_build_with_an_unknown_kind_of_cuda_says_which_there_are(sdist):
    done = run("setup.py", "build_ext", cwd=sdist, BITDELTA_CUDA="yes")
    assert done.stderr.splitlines()[-1] == "bitdelta: BITDELTA_CUDA: expected 0, 1 or emulate, got 'yes'"


def test_a_kernel_that_does_not_compile_is_named(sdist, tmp_path):
    says = f'case "$*" in *--version*) {RELEASE.format("13.0")};; *dryrun*) echo "#$ TOP={tmp_path}" >&2;;'
    nvcc = fake_nvcc(tmp_path, f'{says} *) echo "line 7: no" >&2; exit 2;; esac')
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    done = run(
        "setup.py", "build_ext", "--build-temp", tmp_path / "temp", cwd=sdist, CUDACXX=nvcc, PATH="/usr/bin:/bin"
    )  # fmt: skip
    assert done.returncode != 0
    assert "line 7: no" in done.stderr
    assert "refused kernels/" in done.stderr.splitlines()[-1]


def test_the_build_never_imports_torch(sdist, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run("setup.py", "--version", cwd=sdist, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
