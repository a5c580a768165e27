"""A budget of bits: the choice, what it rests on, and packed deltas made by it."""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import bitdelta
from bitdelta.budget import Candidate, choose, too_large
from bitdelta.card import model_card
from bitdelta.cli import main
from bitdelta.forms import packable
from bitdelta.info import describe, info

torch = pytest.importorskip("torch", reason="torch is part of the test extra")
transformers = pytest.importorskip("transformers", reason="transformers is part of the test extra")

from bitdelta import activations, sensitivity  # noqa: E402
from bitdelta.checkpoint import open_checkpoint  # noqa: E402

VOCABULARY = 96
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (32, 16))


def save_pair(root, config, sizes, kind="CausalLM"):
    """A random base and fine-tune; `sizes`: part of a name -> size of its change."""
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = next((size for part, size in sizes.items() if part in name), 0.002)
            parameter += size * torch.randn_like(parameter)
    model.save_pretrained(root / "finetuned")
    return root


def llama(**about):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaConfig(**settings | about)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Deltas of very different weight: those of layer 0 are large, of layer 1 small; one tensor is unchanged."""
    sizes = {"k_proj": 0.0, "layers.0": 0.01, "layers.1": 0.001, "lm_head": 0.003}
    return save_pair(tmp_path_factory.mktemp("pair"), llama(), sizes)


@pytest.fixture(scope="module")
def packed(pair, tmp_path_factory):
    """budget -> report and folder."""
    made = {}

    def make(bits):
        if bits not in made:
            out = tmp_path_factory.mktemp("packed") / "delta"
            made[bits] = compressed(pair, out, bits), out
        return made[bits]

    return make


def compressed(root, out, bits, **options):
    return bitdelta.compress(root / "base", root / "finetuned", out, text=TOKENS, budget=bits, **options)


def logit_error(root, delta, tmp_path):
    """Mean squared, on tokens that calibration has not seen."""
    bitdelta.merge(root / "base", delta, tmp_path / f"merged-{delta.name}")
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, VOCABULARY, (16, 32)))
    logits = []
    for folder in (tmp_path / f"merged-{delta.name}", root / "finetuned"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            logits.append(model(input_ids=tokens).logits)
    return float((logits[0] - logits[1]).square().mean())


def spent(delta):
    """Bits per parameter, counted from the files' tensors."""
    packfile = bitdelta.load(delta)
    counted = {name: e for name, e in packfile.entries.items() if len(e["shape"]) == 2}
    size = sum(
        tensor.nbytes
        for key, tensor in packfile.tensors.items()
        for name in counted
        if key.startswith(f"{name}.s")
    )
    return 8 * size / sum(map(packable, counted.values()))


def random_tensors(rng, count):
    tensors = {}
    for i in range(count):
        n, effect = int(rng.integers(50, 500)), float(10 ** rng.uniform(-2, 1))
        tensors[str(i)] = [Candidate("same", 0, 0, effect)] + [
            Candidate(form, p, p * (n + more), effect * 4.0**-p * float(rng.uniform(0.5, 1)))
            for p in range(1, 4)
            for form, more in (("tensor", 0), ("row", n // 16), ("rank1", n // 8))
        ]
    return tensors


@pytest.mark.parametrize("seed", range(8))
def test_choice_is_near_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    tensors, most = random_tensors(rng, 4), int(rng.integers(400, 2500))
    fits = [c for c in itertools.product(*tensors.values()) if sum(each.nbytes for each in c) <= most]
    best = min(sum(each.error for each in c) for c in fits)
    found = choose(tensors, most)
    assert list(found) == list(tensors)
    assert sum(c.nbytes for c in found.values()) <= most
    assert best <= sum(c.error for c in found.values()) <= 1.15 * best


def test_many_tensors_use_up_the_budget_and_more_never_hurts():
    tensors = random_tensors(np.random.default_rng(0), 300)
    errors = []
    for most in (20_000, 50_000, 100_000, 200_000):
        found = choose(tensors, most)
        size = sum(c.nbytes for c in found.values())
        assert most - 60 <= size <= most  # the smallest step is a few bytes larger than that at most
        errors.append(sum(c.error for c in found.values()))
    assert errors == sorted(errors, reverse=True)


def test_too_few_bytes_are_refused():
    tensors = {"a": [Candidate("row", 1, 100, 1.0)], "b": [Candidate("row", 1, 50, 1.0)]}
    with pytest.raises(ValueError, match="budget: the smallest forms take 150 bytes, it allows 149"):
        choose(tensors, 149)
    assert choose({}, 0) == {}


def test_too_large_is_what_keeps_a_tenth_of_an_average_effect():
    effects = {"a": 1.0, "b": 3.0}
    assert too_large(effects, {"a": 0.21, "b": 0.19}) == ["a"]
    assert too_large(effects, effects) == ["a", "b"]
    assert too_large({}, {}) == []


def test_sensitivity_predicts_what_noise_does_to_the_logits(pair, tmp_path):
    checkpoint = open_checkpoint(pair / "finetuned")
    streamed = activations.Streamed(checkpoint, TOKENS, 0)
    found = sensitivity.measure_streamed(streamed, tmp_path, 0)
    found.save(tmp_path / "found.npz")
    found = sensitivity.Sensitivity.load(tmp_path / "found.npz")
    model = transformers.AutoModelForCausalLM.from_pretrained(pair / "finetuned", dtype=torch.float32)
    tokens = torch.from_numpy(TOKENS)
    names = (
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
        "model.embed_tokens",
    )
    with torch.inference_mode():
        before = model(input_ids=tokens).logits
        for name in names:
            size = 0.0

            def noise(module, args, out):
                nonlocal size
                e = 1e-3 * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
                size = float(e.square().mean())
                return out + e

            hook = model.get_submodule(name).register_forward_hook(noise)
            after = model(input_ids=tokens).logits
            hook.remove()
            weight = found.weight(f"{name}.weight", is_table="embed" in name)
            predicted = size * weight.sum()
            assert predicted == pytest.approx(float((after - before).square().mean()), rel=0.1)
    assert not list(tmp_path.glob("probe-*"))


def test_layer_by_layer_the_sensitivity_is_that_of_the_whole_model(pair, tmp_path):
    checkpoint = open_checkpoint(pair / "finetuned")
    streamed = sensitivity.measure_streamed(activations.Streamed(checkpoint, TOKENS, 0), tmp_path, 0)
    whole = sensitivity.measure_whole(activations.Whole(checkpoint, TOKENS, 0), 0)
    for name, tensor in checkpoint.items():
        if len(tensor.shape) == 2:
            is_table = "embed" in name
            a, b = (found.weight(name, is_table) for found in (streamed, whole))
            assert a.sum() == pytest.approx(b.sum(), rel=0.1)  # other random signs
    shares = streamed.shares("model.embed_tokens.weight", VOCABULARY)
    assert np.allclose(shares, np.bincount(TOKENS.reshape(-1), minlength=VOCABULARY) / TOKENS.size)


@pytest.mark.parametrize("bits", [0.5, 1.06, 1.5, 2, 3])
def test_a_budget_is_kept_and_used(packed, bits):
    report, out = packed(bits)
    assert 0.96 * bits <= spent(out) <= bits
    assert report["budget"]["bits_per_parameter"] == pytest.approx(spent(out), rel=1e-5)
    assert report["budget"]["bits"] == bits and report["budget"] == bitdelta.load(out).budget


def test_bits_go_where_they_matter(packed):
    report, out = packed(1.5)
    entries = bitdelta.load(out).entries
    planes = {name: entry.get("planes", 0) for name, entry in entries.items() if len(entry["shape"]) == 2}
    large, small = ([planes[name] for name in planes if f"layers.{i}.mlp" in name] for i in (0, 1))
    assert min(large) > max(small)
    unchanged = entries["model.layers.0.self_attn.k_proj.weight"]
    assert (unchanged["form"], unchanged["bytes"], unchanged["effect"]) == ("same", 0, 0)
    assert "relative_error" not in unchanged
    assert report["budget"]["left"] < 0.1 * report["budget"]["effect"]


@pytest.mark.parametrize(("planes", "scale"), [(1, "row"), (2, "rank1"), (3, "tensor")])
def test_a_budget_errs_less_than_uniform_planes_of_its_bytes(pair, packed, tmp_path, planes, scale):
    uniform = tmp_path / "uniform"
    bitdelta.compress(pair / "base", pair / "finetuned", uniform, planes=planes, scale=scale, text=TOKENS)
    report = compressed(pair, tmp_path / "budget", spent(uniform))
    assert spent(tmp_path / "budget") <= spent(uniform)
    assert report["budget"]["too_large"] == []
    assert logit_error(pair, tmp_path / "budget", tmp_path) < 0.7 * logit_error(pair, uniform, tmp_path)


def test_more_bits_err_less(pair, packed, tmp_path):
    errors = []
    for bits in (0.5, 1.06, 1.5, 2, 3):
        (tmp_path / str(bits)).mkdir()
        errors.append(logit_error(pair, packed(bits)[1], tmp_path / str(bits)))
    assert errors == sorted(errors, reverse=True)


def test_what_is_left_as_in_the_base_says_so(pair, packed, tmp_path):
    report, out = packed(0.5)
    packfile = bitdelta.load(out)
    left = [
        name for name, e in packfile.entries.items() if e["form"] == "same" and e.get("relative_error") == 1
    ]
    assert left and all(packfile[name] is None for name in left)
    assert all(packfile.entries[name]["output_error"] == 1 for name in left)
    told = info(out)
    assert [tensor["name"] for tensor in told["tensors"] if tensor["form"] == "left"] == left
    assert told["forms"]["left"]["parameters"] == sum(packable(packfile.entries[name]) for name in left)
    text = "\n".join(describe(told))
    assert "left as in the base" in text and "budget: 0.5 bits" in text
    assert "left as in the base" in (out / "README.md").read_text()
    found = bitdelta.verify(out, pair / "base", pair / "finetuned")
    assert found["ok"] and all(found["errors"][name] == 1 for name in left)
    assert found["relative_error"] > 0.1
    bitdelta.merge(pair / "base", out, tmp_path / "merged")
    merged, base = open_checkpoint(tmp_path / "merged"), open_checkpoint(pair / "base")
    assert np.array_equal(merged[left[0]].array(), base[left[0]].array())


def test_a_delta_that_is_too_large_is_named_everywhere(tmp_path, caplog, capsys):
    large = "model.layers.1.mlp.down_proj.weight"
    root = save_pair(tmp_path, llama(), {"layers.1.mlp.down_proj": 0.3})
    (tmp_path / "text.npy").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="bitdelta"):
        report = compressed(root, tmp_path / "out", 0.5)
    assert large in report["budget"]["too_large"]
    assert any(large in record.message and "too large" in record.message for record in caplog.records)
    config = json.loads((tmp_path / "out" / "delta_config.json").read_text())
    assert config["budget"] == report["budget"]
    assert f"too large for the budget: {large}" in (tmp_path / "out" / "README.md").read_text()
    assert main(["info", str(tmp_path / "out")]) == 0
    assert f"too large for the budget: {large}" in capsys.readouterr().out


def test_distillation_keeps_the_record_and_what_is_left(pair, packed, tmp_path):
    report, out = packed(0.5)
    bitdelta.distill(
        pair / "base", pair / "finetuned", out, TOKENS, tmp_path / "out", steps=1, batch_size=2, length=16
    )
    before, after = bitdelta.load(out), bitdelta.load(tmp_path / "out")
    assert after.budget == report["budget"]
    left = [name for name, entry in before.entries.items() if "planes" not in entry and "effect" in entry]
    assert left and all(before.entries[name] == after.entries[name] for name in left)


def test_tied_embeddings_count_once(tmp_path):
    root = save_pair(tmp_path, llama(tie_word_embeddings=True), {})
    compressed(root, tmp_path / "out", 1.5)
    assert 1.4 <= spent(tmp_path / "out") <= 1.5
    entry = bitdelta.load(tmp_path / "out").entries["model.embed_tokens.weight"]
    assert entry["form"] == "row" and entry["effect"] > 0


def test_other_models_are_measured_whole(tmp_path):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    root = save_pair(tmp_path, config, {}, kind="MaskedLM")
    report = compressed(root, tmp_path / "out", 2)
    assert 1.9 <= report["budget"]["bits_per_parameter"] <= 2
    entries = bitdelta.load(tmp_path / "out").entries
    assert all(entries[name]["effect"] > 0 for name in entries if "planes" in entries[name])


def test_weights_of_unknown_layers_are_estimated(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=64,
    )
    root = save_pair(tmp_path, config, {})
    report = compressed(root, tmp_path / "out", 2.5)
    assert 2.3 <= report["budget"]["bits_per_parameter"] <= 2.5
    entries = bitdelta.load(tmp_path / "out").entries
    experts = [entry for name, entry in entries.items() if "experts" in name]
    assert experts and all(entry["effect"] > 0 and 0 < entry["output_error"] < 1 for entry in experts)


@pytest.mark.parametrize("bits", [0, -1, 17, float("nan"), True, "2"])
def test_budgets_out_of_range_are_refused(pair, tmp_path, bits):
    with pytest.raises(ValueError, match="budget: expected bits per parameter"):
        compressed(pair, tmp_path / "out", bits)


def test_a_budget_needs_text_and_chooses_alone(pair, tmp_path, capsys):
    arguments = ["compress", str(pair / "base"), str(pair / "finetuned"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--budget", "1.5"]) == 2
    assert "budget: needs text" in capsys.readouterr().err
    for option in ({"planes": 2}, {"scale": "rank1"}):
        with pytest.raises(ValueError, match="budget: chooses planes and scales"):
            compressed(pair, tmp_path / "out", 2, **option)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_estimates_the_size(pair, packed, tmp_path):
    report = compressed(pair, tmp_path / "out", 2, dry_run=True)
    assert report["bytes"] == pytest.approx(packed(2)[0]["bytes"], rel=0.1)
    assert not list(tmp_path.iterdir())


def test_nan_in_a_weight_names_it(pair, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(pair / "finetuned")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "finetuned")
    (tmp_path / "base").symlink_to(pair / "base")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        compressed(tmp_path, tmp_path / "out", 1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "finetuned"]


def test_nan_in_activations_names_the_layer(pair, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(pair / "finetuned")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[:] = float("nan")
    model.save_pretrained(tmp_path / "finetuned")
    (tmp_path / "base").symlink_to(pair / "base")
    with pytest.raises(ValueError, match=r"layers\.1\.\w+\.\w+\.weight: NaN or Inf in the activations"):
        compressed(tmp_path, tmp_path / "out", 1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "finetuned"]


def test_a_card_of_a_hostile_name_stays_a_card(packed):
    config = bitdelta.load(packed(0.5)[1]).config
    config = {**config, "budget": {**config["budget"], "too_large": ["x`\n# y"]}}
    assert "\n# y" not in model_card(config, 1)


SCRIPT = """
import sys, numpy as np, bitdelta
from pathlib import Path
root, out, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
tokens = np.random.default_rng(1).integers(0, 96, (32, 16))
from bitdelta import hidden
original = hidden.State.save
def save(self, i, states):
    original(self, i, states)
    print(self.folder.name.rpartition(".")[2], i, flush=True)
    if f"{self.folder.name.rpartition('.')[2]} {i}" == stop:
        import time; time.sleep(60)
hidden.State.save = save
bitdelta.compress(root / "base", root / "finetuned", out, text=tokens, budget=1.5)
print("done")
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "BITDELTA_NUM_THREADS": "1"},
    )


def test_a_killed_run_goes_on_where_it_was(pair, tmp_path):
    process = start(pair, tmp_path / "out", "budget 1")
    while "budget 1" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    said = start(pair, tmp_path / "out", "").communicate(timeout=300)[0].split("\n")
    assert said[:4] == ["budget 2", "activations 1", "activations 2", "done"]
    whole = start(pair, tmp_path / "whole", "").communicate(timeout=300)[0]
    assert whole.startswith("budget 1\nbudget 2\nactivations 1\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
