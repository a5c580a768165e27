"""Distillation trains scales and nothing else, lowers the held-out loss, and survives kills."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from folders import same_bits

import bitdelta
from bitdelta import Error
from bitdelta.checkpoint import open_checkpoint
from bitdelta.cli import main
from bitdelta.rewrite import rewrite

distillation = importlib.import_module("bitdelta.distillation")
student = importlib.import_module("bitdelta.student")
teacher = importlib.import_module("bitdelta.teacher")

VOCABULARY = 96


def llama(**changes):
    about = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**about | changes)


def make_pair(folder, kind, config, size=0.02, dtype=torch.float32):
    """A random base, and a fine-tune of which signs and row scales are exact: so the best scales are known."""
    torch.manual_seed(1)
    config.architectures = [kind.__name__]
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.float().parameters():
            rows = size * (0.5 + torch.rand(len(parameter), *[1] * (parameter.dim() - 1)))
            parameter.add_(rows * torch.randn_like(parameter).sign())
    model.to(dtype).save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def make_delta(pair, out, spoilt=True, **options):
    """Compressed; then every scale of a linear made wrong by up to a factor of two."""
    bitdelta.compress(*pair, out.with_name("exact"), **options)
    rng = np.random.default_rng(2)

    def spoil(name, value):
        if "embed" in name or not isinstance(value, bitdelta.Delta):
            return value
        factor = np.exp2(
            rng.uniform(-1, 1, value.scale.shape if value.form != "tensor" else (value.planes, 1))
        )
        return replace(value, scale=(value.scale * factor).astype(np.float32))

    rewrite(bitdelta.load(out.with_name("exact")), open_checkpoint(pair[0]), out, spoil)
    return out


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, (60, 16))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("llama"), *llama())


@pytest.fixture(scope="module")
def delta(pair, tmp_path_factory):
    return make_delta(pair, tmp_path_factory.mktemp("delta") / "row")


SHORT = {"steps": 12, "batch_size": 4, "length": 16, "lr": 0.05}


def scales(folder):
    packfile = bitdelta.load(folder)
    return {key: tensor.array() for key, tensor in packfile.tensors.items() if ".scale" in key}


def logits(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits


@pytest.fixture(scope="module")
def distilled(pair, delta, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "out"
    report = bitdelta.distill(*pair, delta, tokens, out, **SHORT | {"steps": 60})
    return out, report


def test_lowers_the_loss_on_rows_never_trained_on(distilled):
    _, report = distilled
    assert report["held_out_after"] < 0.1 * report["held_out_before"]
    assert report["loss_after"] < 0.2 * report["loss_before"] and len(report["curve"]) == 60
    assert report["target"] == "logits" and report["kept"] == "distilled scales"
    json.dumps(report, allow_nan=False)


def test_the_merged_result_is_as_close_as_the_report_says(pair, delta, distilled, tokens, tmp_path):
    out, report = distilled
    wanted = logits(pair[1], tokens)
    errors = []
    for i, folder in enumerate((delta, out)):
        bitdelta.merge(pair[0], folder, tmp_path / str(i))
        errors.append((logits(tmp_path / str(i), tokens) - wanted)[-5:].square().mean().item())
    assert errors[0] == pytest.approx(report["held_out_before"], rel=0.1)
    assert errors[1] == pytest.approx(report["held_out_after"], rel=0.1)


def test_only_scales_change_and_they_stay_positive(delta, distilled):
    out, _ = distilled
    old, new = bitdelta.load(delta), bitdelta.load(out)
    assert list(old) == list(new) and old.config["files"] == new.config["files"]
    for key, tensor in old.tensors.items():
        after = new.tensors[key].array()
        if ".scale" in key and "embed" not in key:
            assert (after > 0).all() and (after != tensor.array()).any()
        else:
            assert same_bits(tensor.array(), after)


def test_the_scales_come_back_to_the_right_ones(delta, distilled):
    out, _ = distilled
    right, wrong, found = (scales(folder) for folder in (delta.with_name("exact"), delta, out))

    def error(some):
        return np.mean([np.abs(np.log(some[key] / right[key])).mean() for key in right if "embed" not in key])

    assert error(found) < 0.5 * error(wrong)


def same_files(a, b):
    return (a / "delta_model.safetensors").read_bytes() == (b / "delta_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def short(pair, delta, tokens, tmp_path_factory):
    """A run that nothing interrupts and no option changes."""
    out = tmp_path_factory.mktemp("short") / "out"
    return out, bitdelta.distill(*pair, delta, tokens, out, **SHORT)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(pair, delta, tokens, short, tmp_path, monkeypatch):
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


def test_a_state_of_other_settings_is_not_taken(pair, delta, tokens, short, tmp_path, monkeypatch):
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
    [
        {"batch_size": 2, "accumulate": 2},
        {"checkpointing": True},
        {"device_map": "auto"},
    ],
    ids=["accumulated", "checkpointed", "placed"],
)
def test_an_option_of_how_does_not_change_the_result(pair, delta, tokens, short, tmp_path, options):
    close(bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | options), short[1])


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


def test_the_cached_answers_are_used_again(pair, delta, tokens, short, tmp_path, monkeypatch):
    bitdelta.distill(*pair, delta, tokens, tmp_path / "a", cache=tmp_path / "cache", **SHORT)
    assert (next((tmp_path / "cache").iterdir()) / "about.json").is_file()
    monkeypatch.setattr(teacher, "load_teacher", None)
    bitdelta.distill(*pair, delta, tokens, tmp_path / "b", cache=tmp_path / "cache", **SHORT)
    assert same_files(tmp_path / "a", tmp_path / "b") and same_files(tmp_path / "a", short[0])


def test_autocast_computes_in_bf16_and_still_learns(pair, delta, tokens, short, tmp_path):
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT, autocast=True)
    assert report["curve"] != short[1]["curve"]
    close(report, short[1], rel=0.3)


@pytest.mark.parametrize("options", [{"loss": "kl"}, {"loss": "kl", "top_k": 8}], ids=str)
def test_other_losses_fall_too(pair, delta, tokens, tmp_path, options):
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | options)
    assert report["held_out_after"] < 0.7 * report["held_out_before"]
    assert report["held_out_mse_after"] < report["held_out_mse_before"]


@pytest.mark.parametrize("options", [{"scale": "tensor"}, {"scale": "rank1"}, {"planes": 2}], ids=str)
def test_every_form_is_trained_and_keeps_its_form(pair, tokens, tmp_path, options):
    delta = make_delta(pair, tmp_path / "delta", **options)
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | {"steps": 20})
    assert report["held_out_after"] < 0.7 * report["held_out_before"]
    old, new = bitdelta.load(delta), bitdelta.load(tmp_path / "out")
    for name, entry in old.entries.items():
        after = new.entries[name]
        assert (entry["form"], entry.get("planes")) == (after["form"], after.get("planes"))
        if entry["form"] == "rank1" and name not in report["not_trained"]:
            assert new[name].column.mean(1) == pytest.approx(1, abs=1e-5)


def test_padding_counts_for_nothing(pair, delta, tmp_path):
    rng = np.random.default_rng(3)
    rows = rng.integers(0, VOCABULARY, (30, 16))
    padded = np.pad(rows[:, :10], ((0, 0), (0, 6)), constant_values=-1)
    reports = [
        bitdelta.distill(*pair, delta, tokens, tmp_path / str(i), **SHORT)
        for i, tokens in enumerate((rows[:, :10], padded))
    ]
    close(*reports)


def test_a_scale_of_zero_and_its_row_stay(pair, tokens, tmp_path):
    def no_row(name, value):
        if name != "lm_head.weight":
            return value
        scale = value.scale.copy()
        scale[:, 3] = 0
        return replace(value, scale=scale)

    exact = make_delta(pair, tmp_path / "spoilt")
    rewrite(bitdelta.load(exact), open_checkpoint(pair[0]), tmp_path / "delta", no_row)
    bitdelta.distill(*pair, tmp_path / "delta", tokens, tmp_path / "out", **SHORT)
    scale = bitdelta.load(tmp_path / "out")["lm_head.weight"].scale
    assert scale[0, 3] == 0 and (np.delete(scale, 3, 1) > 0).all()


def test_where_the_held_out_loss_rises_the_old_scales_are_kept(pair, delta, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "_factor", lambda step, steps: -1)  # uphill
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT)
    assert report["held_out_after"] > report["held_out_before"] and "rose" in report["kept"]
    assert all(same_bits(value, scales(delta)[key]) for key, value in scales(tmp_path / "out").items())


CASES = {
    "tied": llama(tie_word_embeddings=True),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    ),
    "bert": (
        transformers.BertModel,
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
    ),
    "classifier": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=3,
        ),
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=5.0,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_architectures(case, tokens, tmp_path):
    pair = make_pair(tmp_path, *CASES[case], dtype=torch.bfloat16 if case == "gpt2" else torch.float32)
    delta = make_delta(pair, tmp_path / "delta")
    options = SHORT | {"steps": 30, "cache": tmp_path / "cache"}
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **options)
    assert report["held_out_after"] < 0.7 * report["held_out_before"]
    assert report["target"] == ("final hidden states" if case == "bert" else "logits")
    about = json.loads(next((tmp_path / "cache").rglob("about.json")).read_text())
    assert about["kind"] == {"bert": "states", "classifier": "logits"}.get(case, "hidden")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", ["row", "rank1"])
def test_the_product_for_other_devices_is_the_same(transposed, scale):
    torch.manual_seed(0)
    base, tuned = (torch.randn(20, 40) * size for size in (1, 0.1))
    delta = bitdelta.extract(base, base + tuned, planes=2, scale=scale)
    linear = student.DeltaLinear(base, torch.randn(40 if transposed else 20), delta, transposed=transposed)
    x = torch.randn(7, 20 if transposed else 40)
    results = []
    for multiply in (student._multiply, student._multiply_dense):
        y = multiply(linear, x, *linear.scales())
        y.square().sum().backward()
        results.append([y, *(parameter.grad.clone() for parameter in (linear.row_log,))])
        linear.zero_grad()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_the_command(pair, delta, tmp_path, capsys):
    arguments = ["distill", *map(str, (*pair, delta)), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "2", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "no tokenizer" in captured.err


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps: expected 1"),
        ({"loss": "l1"}, ValueError, "loss: expected 'mse' or 'kl'"),
        ({"lr": float("nan")}, ValueError, "lr: expected a number"),
        ({"top_k": 0}, ValueError, "top_k: expected 1"),
        ({"shard": True}, ValueError, "shard: expected several processes"),
        ({"text": np.zeros((1, 4), np.int64)}, ValueError, "expected at least 2 rows of tokens, got 1"),
        ({"lr": 1e30}, Error, "step 1: the loss is .*; a lower lr may help"),
    ],
    ids=["steps", "loss", "lr", "top-k", "shard", "text", "infinite"],
)
def test_bad_options_are_refused_by_name(pair, delta, tokens, tmp_path, options, error, words):
    options = SHORT | {"text": tokens} | options
    with pytest.raises(error, match=words):
        bitdelta.distill(*pair, delta, options.pop("text"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


WORKER = """
import json, os, sys
import numpy as np, torch
torch.set_num_threads(1)
import bitdelta
base, tuned, delta, tokens, out, options = sys.argv[1:]
report = bitdelta.distill(base, tuned, delta, np.load(tokens), out, **json.loads(options))
if os.environ["RANK"] == "0":
    print(json.dumps(report))
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
    assert report["curve"] == pytest.approx(short[1]["curve"], rel=1e-3)
    assert not list(tmp_path.glob(".out*"))
