"""Distillation trains scales and nothing else, and lowers the held-out loss: of every form, kind of model and loss."""

import importlib
import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from distill_pairs import (  # noqa: F401 - some are fixtures
    SHORT,
    VOCABULARY,
    assert_only_scales_differ,
    delta,
    make_delta,
    make_pair,
    pair,
    same_files,
    scales,
    tokens,
)
from models import llama_config

import bitdelta
from bitdelta import Error
from bitdelta.checkpoint import open_checkpoint
from bitdelta.rewrite import rewrite

distillation = importlib.import_module("bitdelta.distillation")
trained = importlib.import_module("bitdelta.trained")


@pytest.fixture(scope="module")
def distilled(pair, delta, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "out"
    report = bitdelta.distill(*pair, delta, tokens, out, **SHORT | {"steps": 60})
    return out, report


def logits(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits


def test_lowers_the_loss_on_rows_never_trained_on(distilled):
    _, report = distilled
    assert report["held_out_after"] < 0.1 * report["held_out_before"]
    assert report["loss_after"] < 0.2 * report["loss_before"] and len(report["curve"]) == 60
    assert report["target"] == "logits" and report["kept"] == "distilled scales"
    assert report["not_trained"] == [] and report["tensors"] == 2 * 7 + 2
    json.dumps(report, allow_nan=False)


def test_steps_and_the_held_out_loss_are_logged(pair, delta, tokens, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "bitdelta"):
        bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | {"steps": 2})
    said = "\n".join(caplog.messages)
    assert "distill: step 2 of 2, loss " in said and "distill: held-out loss " in said
    assert f"wrote {tmp_path / 'out'}" in said


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
    assert_only_scales_differ(delta, distilled[0])


def test_the_scales_come_back_to_the_right_ones(delta, distilled):
    right, wrong, found = (scales(folder) for folder in (delta.with_name("exact"), delta, distilled[0]))

    def error(some, part):
        return np.mean([np.abs(np.log(some[key] / right[key])).mean() for key in right if part in key])

    for part in ("layers", "lm_head", "embed_tokens"):
        assert error(found, part) < 0.6 * error(wrong, part)


@pytest.mark.parametrize("options", [{"loss": "kl"}, {"loss": "kl", "top_k": 8}, {"top_k": 8}], ids=str)
def test_other_losses_fall_too(pair, delta, tokens, tmp_path, options):
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | options)
    assert report["held_out_after"] < 0.7 * report["held_out_before"]
    assert report["held_out_mse_after"] < report["held_out_mse_before"]


def test_the_losses_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator)
    assert torch.equal(
        distillation.difference(student, teacher, "mse"), (student - teacher).square().sum() / 7
    )
    kl = torch.nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="sum")
    torch.testing.assert_close(distillation.difference(student, teacher, "kl"), kl)
    value, best = teacher.max(1)
    chosen = student.gather(1, best[:, None])[:, 0]
    torch.testing.assert_close(
        distillation.difference(student, teacher, "mse", top_k=1), (chosen - value).square().sum()
    )


@pytest.mark.parametrize("options", [{"scale": "tensor"}, {"scale": "rank1"}, {"planes": 2}], ids=str)
def test_every_form_is_trained_and_keeps_its_form(pair, tokens, tmp_path, options):
    delta = make_delta(pair, tmp_path / "delta", **options)
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT | {"steps": 20})
    assert report["held_out_after"] < 0.7 * report["held_out_before"]
    old, new = bitdelta.load(delta), bitdelta.load(tmp_path / "out")
    for name, entry in old.entries.items():
        after = new.entries[name]
        assert (entry["form"], entry.get("planes")) == (after["form"], after.get("planes"))
        if entry["form"] == "rank1":
            assert new[name].column.mean(1) == pytest.approx(1, abs=1e-5)


def test_padding_counts_for_nothing(pair, delta, tmp_path):
    rows = np.random.default_rng(3).integers(0, VOCABULARY, (30, 16))
    padded = np.pad(rows[:, :10], ((0, 0), (0, 6)), constant_values=-1)
    reports = [
        bitdelta.distill(*pair, delta, tokens, tmp_path / str(i), **SHORT)
        for i, tokens in enumerate((rows[:, :10], padded))
    ]
    for key in ("curve", "held_out_after"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-3)


def test_a_scale_of_zero_and_its_row_stay(pair, tokens, tmp_path):
    def no_row(name, value):
        if name != "lm_head.weight":
            return value
        scale = value.scale.copy()
        scale[:, 3] = 0
        return replace(value, scale=scale)

    spoilt = make_delta(pair, tmp_path / "spoilt")
    rewrite(bitdelta.load(spoilt), open_checkpoint(pair[0]), tmp_path / "delta", no_row)
    bitdelta.distill(*pair, tmp_path / "delta", tokens, tmp_path / "out", **SHORT)
    scale = bitdelta.load(tmp_path / "out")["lm_head.weight"].scale
    assert scale[0, 3] == 0 and (np.delete(scale, 3, 1) > 0).all()


def test_where_the_held_out_loss_rises_the_old_scales_are_kept(pair, delta, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "_factor", lambda step, steps: -1)  # uphill
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **SHORT)
    assert report["held_out_after"] > report["held_out_before"] and "rose" in report["kept"]
    assert same_files(tmp_path / "out", delta)


def test_weight_decay_pulls_scales_to_where_they_began(pair, delta, tokens, tmp_path):
    bitdelta.distill(*pair, delta, tokens, tmp_path / "free", **SHORT)
    bitdelta.distill(*pair, delta, tokens, tmp_path / "pulled", **SHORT, weight_decay=5.0)
    began, free, pulled = (scales(folder) for folder in (delta, tmp_path / "free", tmp_path / "pulled"))

    def moved(some):
        return np.mean([np.abs(np.log(some[key] / began[key])).mean() for key in began])

    assert moved(pulled) < 0.8 * moved(free)


def test_the_rate_warms_up_and_falls_as_a_cosine_to_zero():
    factors = [distillation._factor(step, 200) for step in range(200)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)], rel=0.01)
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[100] == pytest.approx(0.5) and factors[-1] < 1e-3
    assert factors[150] == pytest.approx(0.5 + 0.5 * math.cos(0.75 * math.pi))


def test_every_epoch_has_all_rows_in_an_order_that_the_seed_decides():
    def order(seed):
        settings = distillation.Settings(batch_size=4, seed=seed, accumulate=2)
        return np.concatenate(
            [rows for step in range(5) for rows in distillation._batches(20, settings, step)]
        )

    rows = order(0)
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20)) and list(rows[:20]) != list(rows[20:])
    assert list(order(0)) == list(rows) != list(order(1))


def config(kind, **about):
    return kind(vocab_size=VOCABULARY, **about)


SMALL_BERT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip
CASES = {
    "tied": (transformers.LlamaForCausalLM, llama_config(tie_word_embeddings=True)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        config(transformers.GPT2Config, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    ),
    "bert": (transformers.BertModel, config(transformers.BertConfig, **SMALL_BERT)),
    "classifier": (
        transformers.BertForSequenceClassification,
        config(transformers.BertConfig, num_labels=3, **SMALL_BERT),
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        config(
            transformers.T5Config,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        config(
            transformers.Gemma3TextConfig,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=5.0,
            **SMALL_BERT,
        ),
    ),
}
TIED = ("tied", "gpt2", "t5", "gemma3")


@pytest.mark.parametrize("case", CASES)
def test_other_architectures(case, tokens, tmp_path):
    pair = make_pair(tmp_path, *CASES[case], dtype=torch.bfloat16 if case == "gpt2" else torch.float32)
    delta = make_delta(pair, tmp_path / "delta")
    options = SHORT | {"steps": 30, "cache": tmp_path / "cache"}
    report = bitdelta.distill(*pair, delta, tokens, tmp_path / "out", **options)
    assert report["held_out_after"] < 0.7 * report["held_out_before"]
    assert report["target"] == ("final hidden states" if case == "bert" else "logits")
    assert report["not_trained"] == []
    about = json.loads(next((tmp_path / "cache").rglob("about.json")).read_text())
    assert about["kind"] == {"bert": "states", "classifier": "logits"}.get(case, "hidden")


@pytest.mark.parametrize("case", TIED)
def test_before_training_the_student_is_the_merged_model(case, tokens, tmp_path):
    """Its embeddings and its tied head from the same scales, which get the gradients of both."""
    pair = make_pair(tmp_path, *CASES[case])
    bitdelta.compress(*pair, tmp_path / "delta")
    bitdelta.merge(pair[0], tmp_path / "delta", tmp_path / "merged")
    packfile = bitdelta.load(tmp_path / "delta")
    student = importlib.import_module("bitdelta.student").load_student(open_checkpoint(pair[0]), packfile)
    kind, _ = CASES[case]
    inputs = {"input_ids": torch.from_numpy(tokens[:4])}
    if case == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    wanted = kind.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(**inputs).logits
    found = student.model(**inputs).logits
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert student.model.get_output_embeddings().row_log is student.model.get_input_embeddings().table.row_log
    assert len({id(parameter) for parameter in student.parameters().values()}) == len(student.parameters())
    found.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters().values())


def test_added_tokens_have_rows_of_their_own(tokens, tmp_path):
    pair = make_pair(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(pair[1])
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    delta = make_delta((pair[0], tmp_path / "grown"), tmp_path / "delta")
    rows = np.where(tokens % 9 == 0, VOCABULARY + tokens % 3, tokens)
    report = bitdelta.distill(pair[0], tmp_path / "grown", delta, rows, tmp_path / "out", **SHORT)
    assert report["held_out_after"] < 0.7 * report["held_out_before"]
    assert_only_scales_differ(delta, tmp_path / "out")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", ["row", "rank1"])
def test_the_product_for_other_devices_is_the_same(transposed, scale):
    torch.manual_seed(0)
    base, tuned = (torch.randn(20, 40) * size for size in (1, 0.1))
    delta = bitdelta.extract(base, base + tuned, planes=2, scale=scale)
    linear = trained.DeltaLinear(base, torch.randn(40 if transposed else 20), delta, transposed=transposed)
    x = torch.randn(7, 20 if transposed else 40)
    results = []
    for multiply in (trained._multiply, trained._multiply_dense):
        y = multiply(linear, x, *linear.scales())
        y.square().sum().backward()
        results.append([y, *(parameter.grad.clone() for parameter in (linear.row_log,))])
        linear.zero_grad()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", ["row", "rank1"])
def test_an_embedding_is_rows_of_the_expanded_table(scale):
    torch.manual_seed(0)
    base = torch.randn(20, 40)
    delta = bitdelta.extract(base, base + 0.1 * torch.randn(20, 40), planes=2, scale=scale)
    added = torch.randn(2, 40)
    table = torch.cat([torch.from_numpy(np.asarray(delta.expand(base.numpy()))), added])
    embedding = trained.DeltaEmbedding(trained.DeltaLinear(base, None, delta, added), 3.0)
    tokens = torch.tensor([[0, 19, 20, 7], [21, 7, 16, 1]])
    found = embedding(tokens)
    torch.testing.assert_close(found, 3.0 * table[tokens], rtol=1e-6, atol=1e-6)
    found.sum().backward()
    used = embedding.table.row_log.grad.abs().sum(0).nonzero()[:, 0].tolist()
    assert used == [0, 1, 7, 16, 19]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps: expected 1"),
        ({"loss": "l1"}, ValueError, "loss: expected 'mse' or 'kl'"),
        ({"lr": float("nan")}, ValueError, "lr: expected a number"),
        ({"top_k": 0}, ValueError, "top_k: expected 1"),
        ({"seed": -1}, ValueError, "seed: expected 0"),
        ({"lr": "fast"}, ValueError, "lr: expected a number from 1e-12, got 'fast'"),
        ({"device_map": "gpu"}, ValueError, "device_map: expected 'auto' or a dict, .*, got 'gpu'"),
        (
            {"text": np.full((4, 4), VOCABULARY)},
            ValueError,
            f"text: token {VOCABULARY} is not in the vocabulary",
        ),
        ({"shard": True}, ValueError, "shard: expected several processes"),
        ({"text": np.zeros((1, 4), np.int64)}, ValueError, "expected at least 2 rows of tokens, got 1"),
        ({"lr": 1e30}, Error, "step 1: the loss is .*; a lower lr may help"),
    ],
    ids=["steps", "loss", "lr", "top-k", "seed", "rate", "place", "word", "shard", "text", "infinite"],
)
def test_bad_options_are_refused_by_name(pair, delta, tokens, tmp_path, options, error, words):
    options = SHORT | {"text": tokens} | options
    with pytest.raises(error, match=words):
        bitdelta.distill(*pair, delta, options.pop("text"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
