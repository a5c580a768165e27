"""How a distillation runs: killed and continued, accumulated, checkpointed, in bf16, in two processes, as a command."""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from distill_pairs import SHORT, delta, pair, same_files, tokens  # noqa: F401 - some are fixtures

import bitdelta
from bitdelta import demo
from bitdelta.cli import main

distillation = importlib.import_module("bitdelta.distillation")
teacher = importlib.import_module("bitdelta.teacher")


@pytest.fixture(scope="module")
def short(pair, delta, tokens, tmp_path_factory):
    """A run that nothing interrupts and no option changes."""
    out = tmp_path_factory.mktemp("short") / "out"
    return out, bitdelta.distill(*pair, delta, tokens, out, **SHORT)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A pair with a tokenizer, its delta, and a text and a jsonl file."""
    folder = tmp_path_factory.mktemp("written")
    root = demo.models(demo.small()[0], folder)
    bitdelta.compress(root / "base", root / "code", folder / "delta")
    lines = [f"def name_{i}(self):\n    return self.value[{i % 7}] + {i * i}" for i in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder, [str(root / "base"), str(root / "code"), str(folder / "delta")]


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(written, tmp_path, capsys):
    folder, models = written
    command = [
        "distill",
        *models,
        "--text",
        str(folder / "text.txt"),
        "--steps",
        "60",
        "--length",
        "32",
        "--json",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitdelta.cli", *command, "--out", str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(bitdelta.__file__))},
    )
    state = tmp_path / ".killed.distill" / "state.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed").exists()
    reports = []
    for name in ("killed", "whole"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["resumed_at"] in (20, 40) and reports[1]["resumed_at"] == 0
    assert reports[0]["curve"] == reports[1]["curve"]
    assert same_files(tmp_path / "killed", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_an_interrupted_run_goes_on_without_the_fine_tune(pair, delta, tokens, short, tmp_path, monkeypatch):
    real = distillation._step

    def die(student, rows, settings, group, step):
        if step == 7:
            raise KeyboardInterrupt
        return real(student, rows, settings, group, step)

    monkeypatch.setattr(distillation, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT, save_every=3)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(distillation, "_step", real)
    monkeypatch.setattr(teacher, "load_teacher", None)  # its answers are on the disk
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT, save_every=3)
    assert report["resumed_at"] == 6 and report["curve"] == short[1]["curve"]
    assert same_files(tmp_path / "out", short[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_state_of_another_seed_is_not_taken(pair, delta, tokens, short, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "rewrite", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | {"seed": 1}, save_every=3)
    monkeypatch.undo()
    assert bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT)["resumed_at"] == 0
    assert same_files(tmp_path / "out", short[0])


def close(report, other, rel=1e-3):
    assert report["curve"] == pytest.approx(other["curve"], rel=rel)
    assert report["held_out_after"] == pytest.approx(other["held_out_after"], rel=rel)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 2, "accumulate": 2}, {"checkpointing": True}],
    ids=["accumulated", "checkpointed"],
)
def test_an_option_of_how_does_not_change_the_result(pair, delta, tokens, short, tmp_path, options):
    close(bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | options), short[1])


@pytest.mark.parametrize(
    "given", ["auto", {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"}], ids=str
)
def test_accelerate_places_the_modules(pair, delta, tokens, short, tmp_path, monkeypatch, given):
    import accelerate

    maps, real = [], accelerate.dispatch_model
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, map: maps.append(map) or real(model, map))
    close(bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT, device_map=given), short[1])
    [found] = maps
    assert found == (given if given != "auto" else {"": "cpu"})


def test_checkpointing_computes_the_layers_twice(pair, delta, tokens, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = []
    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(x) or real(self, x))
    counts = []
    for checkpointing in (False, True):
        calls.clear()
        options = SHORT | {"steps": 2, "checkpointing": checkpointing}
        bitdelta.distill(*pair, delta, tokens, tmp_path / str(checkpointing), **options)
        counts.append(len(calls))
    assert counts[1] == counts[0] + 2 * 2  # steps, layers


def test_autocast_computes_in_bf16_and_still_learns(pair, delta, tokens, short, tmp_path):
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT, autocast=True)
    assert report["curve"] != short[1]["curve"]
    close(report, short[1], rel=0.3)


def test_the_two_models_are_never_in_memory_together(pair, delta, tokens, tmp_path, monkeypatch):
    seen = []
    real_teacher, real_student = teacher.load_teacher, distillation.load_student

    def load_teacher(*arguments):
        model = real_teacher(*arguments)
        seen.append(weakref.ref(model))
        return model

    def load_student(*arguments):
        gc.collect()
        assert len(seen) == 1 and seen[0]() is None
        return real_student(*arguments)

    monkeypatch.setattr(teacher, "load_teacher", load_teacher)
    monkeypatch.setattr(distillation, "load_student", load_student)
    bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | {"steps": 1})
    assert len(seen) == 1


def test_the_cached_answers_are_used_again(pair, delta, tokens, short, tmp_path, monkeypatch):
    bitdelta.distill(*pair, delta, tokens, tmp_path / "a", cache=tmp_path / "cache", **SHORT)
    assert (next((tmp_path / "cache").iterdir()) / "about.json").is_file()
    monkeypatch.setattr(teacher, "load_teacher", None)
    bitdelta.distill(*pair, delta, tokens, tmp_path / "b", cache=tmp_path / "cache", **SHORT)
    assert same_files(tmp_path / "a", tmp_path / "b") and same_files(tmp_path / "a", short[0])


def test_documents_of_jsonl_are_rows_and_a_bar_shows_the_loss(written, tmp_path, capsys):
    folder, models = written
    report = bitdelta.distill(
        *models, folder / "text.jsonl", tmp_path / "out", steps=2, length=64, pack=False, progress=True
    )
    assert report["rows"] == 8 and "distill: 100%" in (shown := capsys.readouterr().err) and "loss " in shown


def test_a_fine_tune_without_a_tokenizer_needs_tokens(pair, delta, tmp_path, capsys):
    arguments = ["distill", *map(str, (*pair, delta)), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "2", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "no tokenizer" in captured.err


WORKER = """
import json, os, sys
import numpy as np, torch
torch.set_num_threads(1)
import bitdelta
from bitdelta import distillation
base, tuned, delta, tokens, out, options = sys.argv[1:]
train, held = distillation._train, []
def count(student, *rest):
    frozen = [p for p in student.model.parameters() if not p.requires_grad]
    here = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in frozen)
    held.append(here / sum(p.numel() for p in frozen))
    return train(student, *rest)
distillation._train = count
report = bitdelta.distill(base, tuned, delta, np.load(tokens), out, **json.loads(options))
if os.environ["RANK"] == "0":
    print(json.dumps({**report, "held": held[0]}))
"""


@pytest.mark.parametrize("shard", [False, True], ids=["copied", "sharded"])
def test_two_processes_do_what_one_does(pair, delta, tokens, short, tmp_path, shard):
    (tmp_path / "worker.py").write_text(WORKER)
    np.save(tmp_path / "tokens.npy", tokens)
    files = [*pair, delta, tmp_path / "tokens.npy", tmp_path / "out"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "worker.py"), *map(str, files), json.dumps(SHORT | {"shard": shard})]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(bitdelta.__file__))}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["processes"] == 2
    assert report["held"] < 0.6 if shard else report["held"] == 1  # of the frozen weights, by the first
    assert report["curve"] == pytest.approx(short[1]["curve"], rel=1e-3)
    assert not list(tmp_path.glob(".out*"))
