"""The command line: documents on stdout, everything else on stderr, exit statuses, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bitdelta.cli import main
from bitdelta.cli_parts import summary


def checkpoint(folder, seed, layers=2, width=256):
    rng = np.random.default_rng(seed)
    start = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for name in ("q_proj", "up_proj"):
            weight = start.normal(size=(width, width)) + (
                rng.normal(scale=0.02, size=(width, width)) if seed else 0
            )
            tensors[f"model.layers.{layer}.{name}.weight"] = weight.astype(np.float32)
        tensors[f"model.layers.{layer}.norm.weight"] = np.full(width, 1 + seed, np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": width}))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    base, finetuned = checkpoint(root / "base", 0), checkpoint(root / "finetuned", 1)
    assert main(["compress", base, finetuned, "--out", str(root / "delta")]) == 0
    return base, finetuned, str(root / "delta")


def document(capsys):
    """The one JSON document on stdout."""
    captured = capsys.readouterr()
    return json.loads(captured.out)


def refused(capsys, arguments, words, status=2):
    """Exit status 2, nothing on stdout, one line on stderr without a traceback."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_help_lists_the_commands_of_this_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in (
        "compress",
        "calibrate",
        "distill",
        "generate",
        "info",
        "verify",
        "merge",
        "import-diff",
        "bench",
        "demo",
        "study",
    ):
        assert command in text
    assert "serve" not in text


def test_no_command_shows_the_help_on_stderr(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Commands:" in captured.err


def test_version(capsys):
    import bitdelta

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == bitdelta.__version__


def test_compress_prints_a_report_and_json_is_one_document(tmp_path, capsys, folders):
    base, finetuned, _ = folders
    assert main(["compress", base, finetuned, "--out", str(tmp_path / "text"), "--planes", "2"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert (
        main(["compress", base, finetuned, "--out", str(tmp_path / "json"), "--scale", "rank1", "--json"])
        == 0
    )
    assert isinstance(document(capsys), dict)
    assert (tmp_path / "json" / "delta_config.json").is_file()


def test_dry_run_estimates_and_writes_nothing(tmp_path, capsys, folders):
    base, finetuned, delta = folders
    assert main(["compress", base, finetuned, "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    assert document(capsys)
    assert main(["merge", base, delta, "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    assert document(capsys)["dry_run"] is True
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_merge_refuses_another_base(tmp_path, capsys, folders):
    other = checkpoint(tmp_path / "other", 3)
    refused(capsys, ["merge", other, folders[2], "--out", str(tmp_path / "out"), "--dry-run"], "other values")


def test_info_counts_every_parameter_once_and_states_the_unit(capsys, folders):
    base, finetuned, delta = folders
    assert main(["info", delta, "--json"]) == 0
    report = document(capsys)
    weights = load_file(os.path.join(finetuned, "model.safetensors"))
    assert report["parameters"] == sum(weight.size for weight in weights.values())
    assert sum(form["share"] for form in report["forms"].values()) == pytest.approx(1)
    assert {tensor["name"] for tensor in report["tensors"]} == set(weights)
    assert report["finetuned_bytes"] == sum(weight.nbytes for weight in weights.values())
    assert report["bytes"] == sum(e.stat().st_size for e in os.scandir(delta) if e.name.startswith("delta_"))
    assert report["factor"] == pytest.approx(report["finetuned_bytes"] / report["bytes"])
    assert "bytes" in report["unit"]
    assert report["forms"]["row"]["parameters"] == 4 * 256 * 256
    assert main(["info", delta]) == 0
    text = capsys.readouterr().out
    assert "model.layers.1.up_proj.weight" in text and "factor" in text


def test_verify_answers_by_its_exit_status(tmp_path, capsys, folders):
    base, finetuned, delta = folders
    assert main(["verify", delta, "--base", base, "--finetuned", finetuned, "--json"]) == 0
    assert document(capsys)["ok"] is True
    other = checkpoint(tmp_path / "other", 3)
    status = main(["verify", delta, "--base", other, "--json"])
    captured = capsys.readouterr()
    assert status == 1 and json.loads(captured.out)["ok"] is False


def test_verify_gives_each_reason_a_line(tmp_path, capsys, folders):
    other = checkpoint(tmp_path / "other", 3)
    assert main(["verify", folders[2], "--base", other]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("NOT GOOD") and lines[1].endswith("made from another base")


def test_every_figure_of_a_summary_has_its_unit():
    report = {"bytes": 2_000_000, "read_bytes": 5, "seconds": 0.5, "gb_per_second": 1.25, "factor": 2.0}
    report |= {"unit": "factor = a / b", "reasons": [f"reason {i}" for i in range(10)]}
    first, *rest = summary(report, "wrote", "there")
    assert first == "wrote there" and rest[:8] == [f"  reason {i}" for i in range(8)]
    assert "2 more" in rest[8]
    assert [line.split(maxsplit=1) for line in rest[9:]] == [
        ["size", "2,000,000 bytes (2.00 MB)"],
        ["read", "5 bytes"],
        ["time", "0.50 s"],
        ["speed", "1.25 GB/s"],
        ["factor", "2 (a / b)"],
    ]


def test_merge_writes_the_fine_tune_back(tmp_path, capsys, folders):
    base, finetuned, delta = folders
    assert main(["merge", base, delta, "--out", str(tmp_path / "merged"), "--json"]) == 0
    document(capsys)
    merged, target = ({}, load_file(os.path.join(finetuned, "model.safetensors")))
    for path in (tmp_path / "merged").glob("*.safetensors"):
        merged.update(load_file(path))
    start = load_file(os.path.join(base, "model.safetensors"))
    assert set(merged) == set(target)
    for name, weight in target.items():
        assert np.abs(merged[name] - weight).mean() <= 0.7 * np.abs(start[name] - weight).mean()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress"],
        ["unknown"],
        ["info", "--nonsense", "x"],
        ["compress", "a", "b", "--out", "c", "--planes", "9"],
        ["compress", "a", "b", "--out", "c", "--scale", "column"],
    ],
    ids=" ".join,
)
def test_wrong_use_is_status_2(capsys, arguments):
    refused(capsys, arguments, "error:")


def test_wrong_use_names_the_help(capsys):
    refused(capsys, ["compress", "BASE"], "see bitdelta compress --help")
    refused(capsys, ["frobnicate"], "see bitdelta --help")


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, folders):
    base, finetuned, delta = folders
    refused(capsys, ["info", str(tmp_path)], "delta_config.json")
    refused(capsys, ["info", str(tmp_path / "missing")], "missing")
    refused(capsys, ["compress", base, str(tmp_path), "--out", str(tmp_path / "out")], str(tmp_path))
    refused(capsys, ["merge", base, str(tmp_path), "--out", str(tmp_path / "out")], "delta_config.json")
    (tmp_path / "x.pt").write_bytes(b"\x80\x02}.")
    refused(
        capsys,
        ["import-diff", str(tmp_path / "x.pt"), "--base", base, "--out", str(tmp_path / "out")],
        "x.pt",
    )
    assert not (tmp_path / "out").exists()


def test_json_errors_leave_stdout_empty(tmp_path, capsys):
    refused(capsys, ["info", str(tmp_path / "missing"), "--json"], "missing")


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["info", str(tmp_path / "missing"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_calibration_names_what_it_lacks(tmp_path, capsys, folders):
    pytest.importorskip("transformers")
    base, finetuned, _ = folders
    (tmp_path / "text").write_text("x")
    refused(
        capsys,
        ["compress", base, finetuned, "--out", str(tmp_path / "o"), "--text", str(tmp_path / "text")],
        "calibration needs its tokenizer",
    )
    refused(capsys, ["compress", base, finetuned, "--out", str(tmp_path / "o"), "--budget", "2"], "budget")


def test_an_existing_target_is_not_touched(tmp_path, capsys, folders):
    base, finetuned, delta = folders
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    refused(capsys, ["compress", base, finetuned, "--out", str(tmp_path / "out")], "out")
    refused(capsys, ["merge", base, delta, "--out", str(tmp_path / "out")], "out")
    refused(capsys, ["merge", base, delta, "--out", str(tmp_path / "out"), "--dry-run"], "exists")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_an_internal_error_says_so(monkeypatch, capsys, tmp_path):
    import bitdelta.info

    monkeypatch.setattr(bitdelta.info, "info", lambda path: {}["surprise"])
    refused(capsys, ["info", str(tmp_path)], "internal error: KeyError")


def test_interrupting_is_status_130(monkeypatch, capsys, tmp_path):
    import bitdelta.info

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(bitdelta.info, "info", interrupt)
    refused(capsys, ["info", str(tmp_path)], "interrupted", status=130)


def command(*arguments):
    return [sys.executable, "-c", "import sys; from bitdelta.cli import main; sys.exit(main())", *arguments]


def test_ctrl_c_during_compress_leaves_no_folder_that_looks_whole(tmp_path):
    base = checkpoint(tmp_path / "base", 0, layers=12, width=1024)
    finetuned = checkpoint(tmp_path / "finetuned", 1, layers=12, width=1024)
    arguments = command(
        "compress", base, finetuned, "--out", str(tmp_path / "delta"), "--planes", "8", "--scale", "rank1"
    )
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    # interrupted as soon as something of it is on the disk
    while time.monotonic() < deadline and process.poll() is None and len(os.listdir(tmp_path)) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    if process.returncode == 0:
        pytest.skip("the command had finished before the signal came")
    assert process.returncode == 130
    assert not (tmp_path / "delta").exists()


def test_a_reader_that_leaves_is_no_error(folders):
    process = subprocess.Popen(command("info", folders[2]), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert b"Traceback" not in errors


def test_importing_the_command_line_imports_no_torch():
    code = (
        "import sys, bitdelta.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_info_counts_a_tied_tensor_once(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    for seed, name in enumerate(("base", "finetuned")):
        weight = torch.randn(64, 256) + seed
        (tmp_path / name).mkdir()
        both = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
        torch.save(both, tmp_path / name / "pytorch_model.bin")
    base, finetuned, delta = (str(tmp_path / name) for name in ("base", "finetuned", "delta"))
    assert main(["compress", base, finetuned, "--out", delta, "--json"]) == 0
    compressed = document(capsys)
    assert main(["info", delta, "--json"]) == 0
    report = document(capsys)
    assert report["parameters"] == compressed["parameters"] == 64 * 256
    assert report["forms"]["tied"]["parameters"] == 0 and report["forms"]["row"]["share"] == 1
