"""Calibration of a packed delta: layer by layer like the whole model, resumed, guarded, small in memory."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import save_file

import bitdelta
from bitdelta import activations, demo
from bitdelta.array import to_float32
from bitdelta.checkpoint import open_checkpoint
from bitdelta.cli import main
from bitdelta.delta import Delta
from bitdelta.fitting import output_errors

torch = pytest.importorskip("torch", reason="torch is part of the test extra")
transformers = pytest.importorskip("transformers", reason="transformers is part of the test extra")

VOCABULARY = 96
DECODERS = ("llama", "mistral", "qwen2", "gpt2")


def config(kind, layers=2, tied=False, hidden=32):
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    grouped = {"num_key_value_heads": 2, "tie_word_embeddings": tied}
    return {
        "llama": lambda: transformers.LlamaConfig(**common, **grouped),
        "mistral": lambda: transformers.MistralConfig(**common, **grouped, sliding_window=8),
        "qwen2": lambda: transformers.Qwen2Config(**common, **grouped),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=64
        ),
        "bert": lambda: transformers.BertConfig(**common),
        "mixtral": lambda: transformers.MixtralConfig(**common, **grouped, num_local_experts=4),
        "llama4": lambda: transformers.Llama4TextConfig(
            **common,
            **grouped,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=4,
            interleave_moe_layer_step=1,
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(**common, **grouped, head_dim=8, num_local_experts=4),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
            **common, **grouped, num_experts=6, moe_intermediate_size=40, shared_expert_intermediate_size=40
        ),
    }[kind]()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """kind -> a folder with base, fine-tune and the delta between them."""
    made = {}

    def make(kind, planes=1, **options):
        key = json.dumps([kind, planes, options])
        if key not in made:
            root = tmp_path_factory.mktemp(kind)
            save_pair(root, config(kind, **options))
            bitdelta.compress(root / "base", root / "finetuned", root / "delta", planes=planes)
            made[key] = root
        return made[key]

    return make


def save_pair(root, config, step=0.02):
    kind = "MaskedLM" if config.model_type == "bert" else "CausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).to(torch.bfloat16)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_table = "embed" in name or "wte" in name or "wpe" in name
            parameter += (0.2 if is_table else 1) * step * torch.randn_like(parameter)
    model.save_pretrained(root / "finetuned")


def tokens(rows=24, length=32):
    return np.random.default_rng(1).integers(0, VOCABULARY, (rows, length))


def calibrated(root, out, **options):
    options = {"length": 32, **options}
    return bitdelta.calibrate(root / "base", root / "finetuned", root / "delta", tokens(), out, **options)


def logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens())).logits.numpy()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", DECODERS)
def test_layers_one_by_one_see_what_the_whole_model_sees(pairs, monkeypatch, kind):
    monkeypatch.setattr(activations, "BATCH_TOKENS", 256)  # several batches, the last ones smaller
    checkpoint = open_checkpoint(pairs(kind) / "finetuned")
    wanted = dict.fromkeys(checkpoint)
    rows = tokens(22)
    whole = {
        weight.name: weight
        for part in activations.Whole(checkpoint, rows, 3).collect(wanted, most=20000)
        for weight in part
    }
    streamed = activations.Streamed(checkpoint, rows, 3)
    streamed.embed()
    found = []
    for i in range(len(streamed.layers)):
        found += streamed.run(i, wanted, lambda name: np.array(to_float32(checkpoint[name].array())), True)
    found += streamed.head(wanted)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert len({weight.name for weight in found}) == len(found) >= len(whole)
    for weight in found:
        same = whole.get(weight.name)
        if same is None:
            assert kind == "gpt2" and weight.name.endswith("wte.weight")  # tied: the head's inputs
            continue
        assert weight.is_turned == same.is_turned == (kind == "gpt2" and ".h." in weight.name)
        for a, b in zip(weight.collected[0].held_out, same.collected[0].held_out, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
        hessian = same.collected[0].hessian
        np.testing.assert_allclose(weight.collected[0].hessian, hessian, atol=1e-4 * np.abs(hessian).max())


def test_weights_that_read_the_same_input_share_it(pairs):
    checkpoint = open_checkpoint(pairs("llama") / "finetuned")
    streamed = activations.Streamed(checkpoint, tokens(), 3)
    streamed.embed()
    wanted = dict.fromkeys(checkpoint)
    found = streamed.run(0, wanted, lambda name: np.array(to_float32(checkpoint[name].array())), True)
    groups = {}
    for weight in found:
        groups.setdefault(id(weight.collected[0]), set()).add(weight.name.split(".")[-2])
    assert sorted(map(sorted, groups.values())) == [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]


def merged_errors(root, tmp_path):
    """The logit MSE of the delta that was given, and of the calibrated one at tmp_path / "out"."""
    errors = []
    for delta in (root / "delta", tmp_path / "out"):
        merged = tmp_path / f"merged-{delta.name}"
        bitdelta.merge(root / "base", delta, merged)
        errors.append(np.square(logits(merged) - logits(root / "finetuned")).mean())
    return errors


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("inputs", ["finetuned", "compressed"])
def test_the_model_comes_closer_to_the_fine_tune(pairs, tmp_path, kind, inputs):
    root = pairs(kind)
    report = calibrated(root, tmp_path / "out", inputs=inputs)
    assert report["mode"] == "layer by layer" and report["fitted"] >= 8
    assert all(tensor["after"] <= tensor["before"] for tensor in report["tensors"])
    assert bitdelta.verify(tmp_path / "out", root / "base", root / "finetuned")["ok"]
    before, after = merged_errors(root, tmp_path)
    assert after < 0.9 * before


def test_layers_of_the_compressed_model_see_its_own_outputs(pairs, tmp_path):
    """The first layer's inputs are the same; from the second on they differ."""
    root = pairs("llama")
    found = []
    for inputs in ("finetuned", "compressed"):
        calibrated(root, tmp_path / inputs, inputs=inputs)
        found.append(bitdelta.load(tmp_path / inputs))
    for i in (0, 1):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        assert np.array_equal(found[0][name].sign, found[1][name].sign) == (i == 0)


def test_report_has_the_error_on_the_rows_held_out(pairs, tmp_path):
    root = pairs("llama")
    report = calibrated(root, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    base, finetuned = open_checkpoint(root / "base"), open_checkpoint(root / "finetuned")
    model = activations.Whole(finetuned, tokens(), 3)
    weight = next(model.collect({name: None}))[0]
    d = to_float32(finetuned[name].array()) - to_float32(base[name].array())
    told = next(tensor for tensor in report["tensors"] if tensor["name"] == name)
    for folder, key in ((root / "delta", "before"), (tmp_path / "out", "after")):
        delta = bitdelta.load(folder)[name]
        (wrong,), total = output_errors(d, [delta], np.concatenate(weight.collected[0].held_out))
        assert told[key] == pytest.approx((wrong / total) ** 0.5, rel=1e-3)
    entry = bitdelta.load(tmp_path / "out").entries[name]
    assert (entry["output_error_before"], entry["output_error"]) == (told["before"], told["after"])


def test_fitting_scales_keeps_the_signs(pairs, tmp_path):
    root = pairs("llama")
    report = calibrated(root, tmp_path / "out", fit="scales")
    before, after = bitdelta.load(root / "delta"), bitdelta.load(tmp_path / "out")
    assert report["fit"] == "scales" and report["fitted"] > 0
    for name in (tensor["name"] for tensor in report["tensors"]):
        assert np.mean(before[name].sign == after[name].sign) > 0.95  # rows may turn over
    assert list(after) == list(before)


def test_what_gains_nothing_is_kept_and_named(pairs, tmp_path, monkeypatch):
    root, spoiled = pairs("llama"), "model.layers.0.self_attn.o_proj.weight"
    module = sys.modules["bitdelta.calibrate"]
    original, calls = module.fit_weight, []

    def worse(before, after, *rest):
        delta = original(before, after, *rest)
        calls.append(delta.shape)
        if before.shape == (32, 32) and calls.count((32, 32)) == 1:  # the first: q_proj or so
            return Delta(delta.sign, delta.scale * 5, None, delta.shape)
        return delta

    monkeypatch.setattr(module, "fit_weight", worse)
    report = calibrated(root, tmp_path / "out")
    kept = [name for name in report["kept"] if ".layers." in name]
    assert len(kept) == 1 and kept[0].startswith("model.layers.0.self_attn") and kept[0] != spoiled
    told = next(tensor for tensor in report["tensors"] if tensor["name"] == kept[0])
    assert told["after"] == told["before"]
    assert np.array_equal(
        bitdelta.load(root / "delta")[kept[0]].sign, bitdelta.load(tmp_path / "out")[kept[0]].sign
    )


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_are_fitted(pairs, tmp_path, tied):
    root = pairs("llama", planes=2, tied=tied, hidden=64)
    report = calibrated(root, tmp_path / "out")
    after = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert after["model.embed_tokens.weight"]["after"] < after["model.embed_tokens.weight"]["before"]
    assert ("lm_head.weight" in after) != tied
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(report["kept"])


def test_other_models_are_loaded_whole(pairs, tmp_path):
    root = pairs("bert")
    report = calibrated(root, tmp_path / "out")
    assert report["mode"].startswith("whole model in memory: BertForMaskedLM is not a decoder")
    assert report["fitted"] >= 12 and report["output_error"] < 0.9 * report["output_error_before"]
    with pytest.raises(bitdelta.Error, match="inputs: compressed needs a model that runs layer by layer"):
        calibrated(root, tmp_path / "other", inputs="compressed")
    assert not (tmp_path / "other").exists()


def stacked(root):
    """The same pair with its experts in the checkpoint as in memory: [E, N, K]."""
    out = root / "stacked"
    if not out.exists():
        for kind in ("base", "finetuned"):
            model = transformers.AutoModelForCausalLM.from_pretrained(root / kind, dtype=torch.bfloat16)
            (out / kind).mkdir(parents=True)
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            save_file(state, out / kind / "model.safetensors", metadata={"format": "pt"})
            shutil.copy(root / kind / "config.json", out / kind)
        bitdelta.compress(out / "base", out / "finetuned", out / "delta")
    return out


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_an_expert_sees_the_rows_routed_to_it(pairs, kind):
    checkpoint = open_checkpoint(pairs(kind) / "finetuned")
    wanted, rows = dict.fromkeys(checkpoint), tokens(8)
    streamed = activations.Streamed(checkpoint, rows, 2)
    streamed.embed()
    found = streamed.run(0, wanted, lambda name: np.array(to_float32(checkpoint[name].array())), True)
    whole = activations.Whole(checkpoint, rows, 2)
    for weight in [weight for part in whole.collect(wanted) for weight in part]:
        same = next((other for other in found if other.name == weight.name), None)
        if same is not None and ".experts." in weight.name:
            expected = weight.collected[0].inputs().hessian
            assert np.allclose(
                same.collected[0].inputs().hessian, expected, atol=1e-4 * np.abs(expected).max()
            )
    seen = {}
    model = transformers.AutoModelForCausalLM.from_pretrained(pairs(kind) / "finetuned", dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], index=args[1]))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(rows[:-2]))
    x, index = seen["x"].numpy(), seen["index"].numpy()
    n_checked = 0
    for weight in found:
        if weight.name.endswith((".w1.weight", ".w3.weight", "gate_proj.weight", "up_proj.weight")):
            if ".experts." in weight.name:
                mine = x[(index == int(weight.name.split(".experts.")[1].split(".")[0])).any(axis=1)]
                assert weight.collected[0].n_rows == len(mine)
                got = weight.collected[0].inputs().hessian
                assert np.allclose(got, mine.T @ mine, atol=1e-4 * np.abs(got).max())
                n_checked += 1
    assert n_checked == 2 * len(experts.down_proj)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("inputs", ["finetuned", "compressed"])
def test_experts_are_fitted(pairs, tmp_path, kind, is_stacked, inputs):
    root = stacked(pairs(kind)) if is_stacked else pairs(kind)
    report = calibrated(root, tmp_path / "out", inputs=inputs)
    assert report["mode"] == "layer by layer"
    expert = {t["name"]: t for t in report["tensors"] if ".experts." in t["name"]}
    wanted = [name for name, e in bitdelta.load(root / "delta").entries.items() if ".experts." in name]
    assert wanted and set(expert) | set(report["kept"]) >= set(wanted)
    assert sum(t["after"] < t["before"] for t in expert.values()) > 0.7 * len(wanted)
    assert bitdelta.verify(tmp_path / "out", root / "base", root / "finetuned")["ok"]
    before, after = merged_errors(root, tmp_path)
    assert after < 0.9 * before


def test_an_expert_that_no_row_reaches_keeps_its_signs_and_is_named(pairs, tmp_path):
    root = stacked(pairs("qwen2_moe"))
    few = np.full((9, 2), 7)  # one token: few experts
    report = bitdelta.calibrate(root / "base", root / "finetuned", root / "delta", few, tmp_path / "out")
    kept = report["kept_experts"]
    before, after = bitdelta.load(root / "delta"), bitdelta.load(tmp_path / "out")
    stacks = [name for name, entry in before.entries.items() if len(entry["shape"]) == 3]
    assert set(kept) == set(stacks) and all(0 < len(experts) for experts in kept.values())
    assert any(len(kept[name]) < 6 for name in stacks)
    for name in stacks:
        for e in range(6):
            same = np.array_equal(before[name][e].sign, after[name][e].sign) and np.array_equal(
                before[name][e].scale, after[name][e].scale
            )
            assert same == (e in kept[name])


@pytest.mark.parametrize("kind", ["llama4", "gpt_oss"])
def test_stacks_that_are_not_multiplied_row_by_row_keep_their_signs_and_are_named(pairs, tmp_path, kind):
    """With the inputs first, and in one product for all experts: not a linear layer's inputs. The rest is fitted."""
    root = pairs(kind)
    report = calibrated(root, tmp_path / "out")
    before, after = bitdelta.load(root / "delta"), bitdelta.load(tmp_path / "out")
    stacks = [name for name, entry in before.entries.items() if len(entry["shape"]) == 3]
    assert report["mode"] == "layer by layer" and len(stacks) == 4 and set(stacks) <= set(report["kept"])
    assert report["kept_experts"] == {name: [0, 1, 2, 3] for name in stacks}
    for name in stacks:
        for old, new in zip(before[name], after[name], strict=True):
            assert np.array_equal(old.sign, new.sign) and np.array_equal(old.scale, new.scale)
    assert report["fitted"] >= 9 and report["output_error"] < 0.9 * report["output_error_before"]
    assert bitdelta.verify(tmp_path / "out", root / "base", root / "finetuned")["ok"]


@pytest.mark.parametrize("scale", ["tensor", "rank1"])
def test_other_forms(pairs, tmp_path, scale):
    root = pairs("llama")
    for kind in ("base", "finetuned"):
        (tmp_path / kind).symlink_to(root / kind)
    bitdelta.compress(root / "base", root / "finetuned", tmp_path / "delta", scale=scale)
    report = calibrated(tmp_path, tmp_path / "out")
    assert report["fitted"] >= 14
    name = "model.layers.0.mlp.up_proj.weight"
    assert bitdelta.load(tmp_path / "out")[name].form == scale


def test_nan_in_activations_names_the_layer(pairs, tmp_path):
    root = pairs("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "finetuned", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:] = float("nan")
    model.save_pretrained(tmp_path / "finetuned")
    (tmp_path / "base").symlink_to(root / "base")
    bitdelta.compress(root / "base", tmp_path / "finetuned", tmp_path / "delta")
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.\w_proj\.weight: NaN or Inf in the activations"
    ):
        calibrated(tmp_path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "finetuned"]


def test_another_fine_tune_is_refused(pairs, tmp_path):
    root, other = pairs("llama"), pairs("llama", layers=3)
    with pytest.raises(bitdelta.BaseMismatchError, match="no such tensor"):
        bitdelta.calibrate(
            other / "base", pairs("gpt2") / "finetuned", other / "delta", tokens(), tmp_path / "o"
        )
    with pytest.raises(bitdelta.BaseMismatchError, match="has other values|no such tensor"):
        bitdelta.calibrate(
            pairs("qwen2") / "base", root / "finetuned", root / "delta", tokens(), tmp_path / "o"
        )


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("fit", "bits", "fit: expected"),
        ("inputs", "base", "inputs: expected"),
        ("rounds", 0, "rounds: expected 1 to 100"),
    ],
)
def test_options_out_of_range_are_named(pairs, tmp_path, option, value, text):
    with pytest.raises(ValueError, match=text):
        calibrated(pairs("llama"), tmp_path / "out", **{option: value})


def test_a_token_that_the_model_does_not_know_is_named(pairs, tmp_path):
    for kind in ("llama", "bert"):
        root = pairs(kind)
        with pytest.raises(
            ValueError, match=f"text: token {VOCABULARY} is not in the vocabulary of the model"
        ):
            bitdelta.calibrate(
                root / "base", root / "finetuned", root / "delta", tokens() + 1, tmp_path / "out", length=32
            )
    assert not list(tmp_path.iterdir())


def test_one_row_of_text_is_too_little(pairs, tmp_path):
    root = pairs("llama")
    with pytest.raises(ValueError, match="text: 32 tokens are too few"):
        bitdelta.calibrate(root / "base", root / "finetuned", root / "delta", tokens(1), tmp_path / "out")


SCRIPT = """
import sys, numpy as np, bitdelta
from pathlib import Path
root, out, inputs = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
tokens = np.random.default_rng(1).integers(0, 96, (24, 32))
module = sys.modules["bitdelta.calibrate"]
original, done = module.State.save, []
def save(self, i, hidden):
    original(self, i, hidden)
    print("layer", i, flush=True)
    if len(sys.argv) > 4 and i == int(sys.argv[4]):
        import time; time.sleep(60)
module.State.save = save
bitdelta.set_num_threads(1)
bitdelta.calibrate(root / "base", root / "finetuned", root / "delta", tokens, out, inputs=inputs, length=32)
print("done", flush=True)
whole = out.parent / "whole"  # the same without a break
bitdelta.calibrate(root / "base", root / "finetuned", root / "delta", tokens, whole, inputs=inputs, length=32)
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("inputs", ["finetuned", "compressed"])
def test_a_killed_run_goes_on_where_it_was(pairs, tmp_path, inputs):
    root = pairs("llama", layers=3)
    process = start(root, tmp_path / "out", inputs, 2)
    while "layer 2" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    second = start(root, tmp_path / "out", inputs)
    said = second.communicate(timeout=300)[0].split("\n")
    assert said[:3] == ["layer 3", "done", "layer 1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_compress_with_text_calibrates(pairs, tmp_path, capsys):
    root = pairs("llama")
    folders = root / "base", root / "finetuned"
    report = bitdelta.compress(*folders, tmp_path / "out", text=tokens(16, 16), progress=True)
    assert "calibrate: 100%" in capsys.readouterr().err
    assert report["calibration"]["fitted"] > 0 and report["out"] == str(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(bitdelta.Error, match="calibration needs its tokenizer"):
        bitdelta.compress(root / "base", root / "finetuned", tmp_path / "other", text=tmp_path / "none.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_command_takes_a_file(tmp_path, capsys):
    root = demo.models(demo.small()[0], cache=tmp_path / "models")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    base, finetuned, delta = str(root / "base"), str(root / "code"), str(tmp_path / "delta")
    bitdelta.compress(base, finetuned, delta)
    options = ["--text", str(tmp_path / "text.txt"), "--tokens", "512", "--length", "16", "--json"]
    capsys.readouterr()
    assert main(["calibrate", base, finetuned, delta, "--out", str(tmp_path / "out"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 512 and report["fitted"] > 0
    assert bitdelta.verify(tmp_path / "out", base, finetuned)["ok"]


MEMORY = """
import resource, sys, threading, time, numpy as np, torch, transformers, bitdelta
from pathlib import Path
threading.stack_size(1 << 20)
root, out = Path(sys.argv[1]), Path(sys.argv[2])
bitdelta.set_num_threads(1)
torch.set_num_threads(1)
def bytes_of(what):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(what))
import accelerate, bitdelta.activations
tokens = np.random.default_rng(1).integers(0, 96, (16, 16))
root_small = Path(sys.argv[3])  # everything imported and warm before the measurement
small = tokens[:4]
bitdelta.calibrate(root_small / "base", root_small / "finetuned", root_small / "delta", small, out / "warm", length=16)
before, peak, stop = bytes_of("RssAnon"), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.01):
        peak = max(peak, bytes_of("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
limit = bytes_of("VmData") + int(sys.argv[4])  # what it may allocate from here on
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
report = bitdelta.calibrate(
    root / "base", root / "finetuned", root / "delta", tokens, out / "large", length=16, fit="scales"
)
stop.set()
watcher.join()
assert report["mode"] == "layer by layer"
try:
    transformers.AutoModelForCausalLM.from_pretrained(root / "finetuned", dtype=torch.float32)
except (MemoryError, RuntimeError) as error:  # the limit is one that the model does not fit
    print(type(error).__name__, peak - before)
"""


def test_a_model_larger_than_the_memory_allowed_is_calibrated_layer_by_layer(pairs, tmp_path):
    deep, small = pairs("llama", layers=24, hidden=256, tied=True), pairs("llama")
    size = 2 * os.path.getsize(deep / "finetuned" / "model.safetensors")  # in fp32
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, deep, tmp_path, small, str(int(0.6 * size))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # Small freed arrays go back to the system at once, as large ones do: what malloc keeps is not counted.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 0.35 * size
