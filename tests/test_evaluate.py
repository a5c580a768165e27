"""`evaluate` and `bitdelta eval`: the metrics against plain PyTorch, models alone in memory, requirements, refusals."""

import gc
import json
import math
import shutil
import weakref

import numpy as np
import pytest
import torch
import transformers

import bitdelta
from bitdelta import answers, refusals, requirement
from bitdelta.cli import main
from bitdelta.errors import BaseMismatchError, Error, FormatError
from bitdelta.evaluate import describe, evaluate, score
from bitdelta.merged_model import load_model

WORDS = 120


def llama(seed, base=None, **options):
    """A tiny Llama; with a base, a fine-tune of it."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
        "initializer_range": 0.2,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **options}))
    return model if base is None else changed(model, base)


def changed(model, base):
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [letter for letter in alphabet if letter.isascii() or letter in "ĠĊ"][: WORDS - 1]
    made = Tokenizer(
        models.BPE(vocab={"<|end|>": 0, **{a: i + 1 for i, a in enumerate(alphabet)}}, merges=[])
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base, finetuned, delta (1 plane), delta4 (4 planes), text."""
    root = tmp_path_factory.mktemp("eval")
    base = llama(0)
    for name, model in (("base", base), ("finetuned", llama(1, base))):
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    for name, planes in (("delta", 1), ("delta4", 4)):
        bitdelta.compress(root / "base", root / "finetuned", root / name, planes=planes)
    (root / "text.txt").write_text("It is a truth universally acknowledged, that one bit is enough. " * 20)
    (root / "text.jsonl").write_text('{"text": "%s"}\n' % ("a line of text " * 30) * 3)
    return root


@pytest.fixture(scope="module")
def report(folders):
    deltas = {"one": folders / "delta", "four": folders / "delta4"}
    return evaluate(
        folders / "base",
        deltas,
        folders / "finetuned",
        folders / "text.txt",
        n_tokens=256,
        length=32,
        batch_size=3,
    )


def logits_of(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=tokens).logits.double()


def test_the_merged_model_is_the_one_that_merge_writes(folders, tmp_path):
    bitdelta.merge(folders / "base", folders / "delta", tmp_path / "merged")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    model, words = load_model(folders / "base", folders / "delta")
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert words("bit")["input_ids"] == tokenizer()("bit")["input_ids"] and not model.training


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_models_with_added_tokens_and_other_dtypes(tmp_path, dtype, tied):
    base = llama(0, tie_word_embeddings=tied)
    finetuned = llama(1, base, tie_word_embeddings=tied)
    finetuned.resize_token_embeddings(WORDS + 3)
    for name, model in (("base", base), ("finetuned", finetuned)):
        model.to(getattr(torch, dtype)).save_pretrained(tmp_path / name)
    bitdelta.compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta")
    bitdelta.merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    model, words = load_model(tmp_path / "base", tmp_path / "delta", dtype="auto")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert words is None and model.dtype == getattr(torch, dtype) and model.config.vocab_size == WORDS + 3
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_mixture_of_experts_is_converted_as_transformers_does(tmp_path):
    settings = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings))
    finetuned = changed(transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings)), base)
    for name, model in (("base", base), ("finetuned", finetuned)):
        model.save_pretrained(tmp_path / name)
    bitdelta.compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta", planes=8)
    model, _ = load_model(tmp_path / "base", tmp_path / "delta")
    for name, value in finetuned.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=0.01)


def test_metrics_are_those_of_plain_pytorch(folders, report, tmp_path):
    from bitdelta.text import load_rows

    tokens = torch.from_numpy(load_rows(folders / "text.txt", tokenizer(), 8, 32, 0)[0])
    bitdelta.merge(folders / "base", folders / "delta", tmp_path / "merged")
    teacher, student = logits_of(folders / "finetuned", tokens), logits_of(tmp_path / "merged", tokens)
    scores = report["tenants"]["one"]
    loss = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert scores["tokens"] == 256
    assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert scores["logit_mse"] == pytest.approx(float((teacher - student).square().mean()), rel=1e-4)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    assert scores["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert scores["top1"] == pytest.approx(float((teacher.argmax(-1) == student.argmax(-1)).double().mean()))
    loss = torch.nn.functional.cross_entropy(teacher[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert scores["finetuned"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert scores["recovered"] == pytest.approx(1 - scores["logit_mse"] / scores["base"]["logit_mse"])


def test_more_planes_are_nearer_and_the_base_is_farthest(report):
    one, four = report["tenants"]["one"], report["tenants"]["four"]
    assert four["kl"] < one["kl"] < one["base"]["kl"] and four["logit_mse"] < one["logit_mse"]
    assert four["base"] == one["base"] and four["finetuned"] == one["finetuned"]
    json.dumps(report, allow_nan=False)


def test_the_fine_tune_against_itself_has_no_error(folders):
    found = evaluate(
        folders / "finetuned", (), folders / "finetuned", folders / "text.txt", n_tokens=64, length=32
    )
    scores = found["tenants"]["base"]
    assert scores["top1"] == 1 and scores["logit_mse"] < 1e-9 and abs(scores["kl"]) < 1e-9


def test_without_a_fine_tune_there_are_perplexities_only(folders):
    found = evaluate(
        folders / "base", [folders / "delta"], text=folders / "text.jsonl", n_tokens=128, length=32
    )
    scores = found["tenants"]["delta"]
    assert set(scores) == {"perplexity", "tokens", "delta", "base"} and set(scores["base"]) == {"perplexity"}
    assert scores["perplexity"] != scores["base"]["perplexity"]


def test_padding_is_not_measured(folders):
    tokens = np.arange(1, 33).reshape(2, 16)
    padded = np.concatenate([tokens, np.full((2, 7), -1)], 1)
    arguments = folders / "base", [folders / "delta"], folders / "finetuned"
    plain, masked = (evaluate(*arguments, rows)["tenants"]["delta"] for rows in (tokens, padded))
    assert masked["tokens"] == plain["tokens"] == 32
    for metric in ("perplexity", "logit_mse", "kl", "top1"):
        assert masked[metric] == pytest.approx(plain[metric], rel=1e-4)


def test_teacher_and_student_are_never_in_memory_together(folders, monkeypatch):
    alive, most = [], []
    module = __import__("sys").modules["bitdelta.evaluate"]

    def counting(*arguments):
        gc.collect()
        most.append(sum(model() is not None for model in alive))
        model, words = load_model(*arguments)
        alive.append(weakref.ref(model))
        return model, words

    monkeypatch.setattr(module, "load_model", counting)
    evaluate(folders / "base", [folders / "delta"], folders / "finetuned", folders / "text.txt", 64, 32)
    assert most == [0, 0, 0]


@pytest.mark.parametrize("capped", [False, True], ids=["hidden", "logits"])
def test_the_teacher_is_kept_small_where_its_head_is_linear(tmp_path, capped):
    model = llama(0).eval()
    if capped:
        model.lm_head.register_forward_hook(lambda module, inputs, out: torch.tanh(out))
    sample = answers.Sample(np.arange(96).reshape(3, 32), np.ones((3, 32), bool))
    teacher = answers.record(model, sample, tmp_path, 2)
    assert teacher.rows.shape == (3, 32, WORDS if capped else 32) and (teacher.head is None) == capped
    with torch.inference_mode():
        expected = model(input_ids=sample.tokens).logits
    assert all(torch.allclose(teacher(i), expected[i], rtol=1e-4, atol=1e-5) for i in range(3))


def test_words_that_only_the_fine_tune_has_leave_the_base_out(tmp_path):
    base = llama(0)
    finetuned = llama(1, base)
    finetuned.resize_token_embeddings(WORDS + 8)
    for name, model in (("base", base), ("finetuned", finetuned)):
        model.save_pretrained(tmp_path / name)
    bitdelta.compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta")
    tokens = np.arange(WORDS - 8, WORDS + 8).reshape(1, 16)
    scores = evaluate(tmp_path / "base", [tmp_path / "delta"], tmp_path / "finetuned", tokens)["tenants"][
        "delta"
    ]
    assert scores["base"]["perplexity"] is None and scores["kl"] > 0 and "recovered" not in scores
    scores = evaluate(tmp_path / "base", [tmp_path / "delta"], tmp_path / "finetuned", tokens - 8)["tenants"][
        "delta"
    ]
    assert scores["base"]["kl"] > scores["kl"] > 0


SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "metrics"),
    [
        ("BertModel", SMALL, {"hidden_mse"}),
        ("BertForSequenceClassification", SMALL, {"logit_mse", "kl", "top1"}),
        ("BertForMaskedLM", SMALL, {"logit_mse", "kl", "top1"}),
        (
            "T5ForConditionalGeneration",
            {
                "vocab_size": WORDS,
                "d_model": 32,
                "d_kv": 16,
                "d_ff": 48,
                "num_layers": 1,
                "num_heads": 2,
                "decoder_start_token_id": 0,
            },
            {"perplexity", "logit_mse", "kl", "top1"},
        ),
    ],
)
def test_models_other_than_causal_ones(tmp_path, kind, settings, metrics):
    torch.manual_seed(0)
    made = getattr(transformers, kind)
    base = made(made.config_class(**settings))
    finetuned = changed(made(made.config_class(**settings)), base)
    for name, model in (("base", base), ("finetuned", finetuned)):
        model.save_pretrained(tmp_path / name)
    bitdelta.compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta", planes=3)
    tokens = np.arange(1, 33).reshape(2, 16)
    scores = evaluate(tmp_path / "base", [tmp_path / "delta"], tmp_path / "finetuned", tokens)["tenants"][
        "delta"
    ]
    assert metrics <= set(scores) and ("perplexity" in scores) == ("perplexity" in metrics)
    error = "logit_mse" if "logit_mse" in metrics else "hidden_mse"
    assert 0 < scores[error] < scores["base"][error]


def test_a_model_that_answers_nan_has_no_value(folders):
    model, _ = load_model(folders / "base")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    sample = answers.Sample(np.ones((1, 8), np.int64), np.ones((1, 8), bool))
    assert score(model, sample) == {"perplexity": None}


# wrong input


def test_a_delta_of_another_base_is_refused(folders):
    with pytest.raises(BaseMismatchError):
        evaluate(folders / "finetuned", [folders / "delta"], text=folders / "text.txt")


def test_wrong_names_and_sizes_are_refused(folders):
    base, delta = folders / "base", folders / "delta"
    with pytest.raises(ValueError, match="deltas: two are called delta"):
        evaluate(base, [delta, delta])
    with pytest.raises(ValueError, match="finetuned: other is the name of no delta"):
        evaluate(base, [delta], {"other": base})
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(base, [delta], batch_size=0)
    with pytest.raises(ValueError, match="length"):
        evaluate(base, [delta], length=1)
    with pytest.raises(FileNotFoundError):
        evaluate(base, [delta], text=folders / "nothing.txt")
    with pytest.raises(ValueError, match="n_tokens: expected 1"):
        evaluate(base, [delta], n_tokens=-5)
    with pytest.raises(TypeError, match="deltas: expected packed deltas, by name or in a list, got int"):
        evaluate(base, 5)
    for wrong in ("int4", 5):
        with pytest.raises(ValueError, match=f"dtype: expected float32, .* or auto, got '{wrong}'"):
            evaluate(base, [delta], dtype=wrong)
    for wrong in ("nonsense", 5):
        with pytest.raises(ValueError, match="device: expected a name such as 'cpu'"):
            load_model(base, device=wrong)
    tokens = np.full((2, 8), WORDS)
    with pytest.raises(
        ValueError, match=f"text: token {WORDS} is not in the vocabulary of the model, .* {WORDS} tokens"
    ):
        evaluate(base, [delta], folders / "finetuned", tokens)
    with pytest.raises(TypeError, match="expected a folder or a Hub id, got NoneType"):
        load_model(None)


def test_a_config_or_a_tokenizer_that_does_not_load_is_named_with_its_folder(folders, tmp_path, caplog):
    for name in ("config", "tokenizer"):
        shutil.copytree(folders / "finetuned", tmp_path / name)
        (tmp_path / name / f"{name}.json").write_text('{"model_type": "frobnicate"}')
    with pytest.raises(Error, match=f"^{tmp_path / 'config'}: transformers cannot read it: .*frobnicate"):
        load_model(tmp_path / "config")
    assert load_model(tmp_path / "tokenizer")[1] is None
    assert f"{tmp_path / 'tokenizer'}: transformers does not load its tokenizer" in caplog.text


def test_weights_that_do_not_fill_the_model_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    tokenizer().save_pretrained(tmp_path)
    llama(0).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    tensors = load_file(folders / "base" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="model.norm.weight"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForPoetry"]}))
    with pytest.raises(Error, match="LlamaForPoetry"):
        load_model(tmp_path)


# requirements


def report_of(**scores):
    return {"tenants": {"a": scores, "b": {**scores, "kl": 0.5}}}


def test_requirements_hold_for_every_tenant_or_the_named_one():
    report = report_of(kl=0.1, top1=0.9, perplexity=None)
    assert [found["met"] for found in requirement.check(report, ["kl<=0.1"])] == [True, False]
    assert [found["met"] for found in requirement.check(report, ["b: kl < 0.5", "a:top1>=0.9"])] == [
        False,
        True,
    ]
    assert not any(found["met"] for found in requirement.check(report, ["perplexity>0"]))


@pytest.mark.parametrize(
    "text", ["kl", "kl=0.1", "kl<=", "kl<=much", "kl<=nan", "loss<=1", "c:kl<=1", "logit_mse<1"]
)
def test_requirements_that_cannot_be_checked_are_refused(text):
    with pytest.raises(ValueError, match="require: "):
        requirement.check(report_of(kl=0.1), [text])


# refusals


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I cannot help with that.", True),
        ("I’m sorry, but no.", True),
        ("As an AI, I have no opinion", True),
        ("Sure. Here is how.", False),
        ("x" * 200 + "I cannot help", False),
        ("", False),
    ],
)
def test_refusals_are_known_by_their_opening(answer, refused):
    assert refusals.is_refusal(answer) == refused


def test_prompts_come_from_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    chat = [{"role": "user", "content": "four"}]
    lines = ["three", {"messages": chat}, {"prompt": "five"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert refusals.read_prompts(tmp_path / "a.txt") == ["one", "two"]
    assert refusals.read_prompts(tmp_path / "a.jsonl") == ["three", chat, "five"]
    for text in ("", '{"question": "?"}', "{", "[]"):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(FormatError, match="b.jsonl"):
            refusals.read_prompts(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'"\xff"')
    with pytest.raises(FormatError, match="b.jsonl: not UTF-8"):
        refusals.read_prompts(tmp_path / "b.jsonl")


def test_a_chat_template_is_applied():
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}> "
    assert words.decode(refusals.encode(words, "hi")[0]) == "user: hi > "
    words.chat_template = None
    assert words.decode(refusals.encode(words, "hi")[0]) == "hi"


def test_refusals_are_compared_before_and_after(folders, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("bit\nscale\nsign\n")
    said = {}

    def scripted(model, words, prompt, max_new_tokens):
        key = float(model.lm_head.weight.detach()[0, 0])  # which model it is
        said.setdefault(key, len(said))
        return "I cannot." if (said[key], prompt) in {(0, "bit"), (0, "sign"), (1, "bit")} else "Sure."

    monkeypatch.setattr(refusals, "answer", scripted)
    found = evaluate(
        folders / "base", [folders / "delta"], folders / "finetuned", folders / "text.txt", 64, 32,
        refusals=tmp_path / "prompts.txt",
    )  # fmt: skip
    scores = found["tenants"]["delta"]
    assert (scores["finetuned"]["refused"], scores["refused"], scores["base"]["refused"]) == (2, 1, 0)
    assert scores["prompts"] == 3 and scores["refusal_agreement"] == pytest.approx(2 / 3)
    assert "refused" in "\n".join(describe(found))


def test_answers_are_greedy_and_end(folders):
    model, words = load_model(folders / "base", folders / "delta")
    first, again = (refusals.answer(model, words, "one bit", 5) for _ in range(2))
    assert first == again and len(words(first)["input_ids"]) <= 6


# the command


def command(folders, *more):
    return [
        "eval", str(folders / "base"), "--delta", f"one={folders / 'delta'}", "--finetuned", str(folders / "finetuned"),
        "--text", str(folders / "text.txt"), "--tokens", "64", "--length", "32", *more,
    ]  # fmt: skip


def test_the_command_prints_a_table_or_one_document(folders, capsys):
    assert main(command(folders)) == 0
    text = capsys.readouterr().out
    assert "one: 64 tokens" in text and "base + delta" in text and "perplexity" in text
    assert main(command(folders, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["tenants"]["one"]["kl"] > 0


def test_the_command_counts_refusals(folders, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('"one"\n{"prompt": "two"}\n')
    assert (
        main(
            command(
                folders, "--refusals", str(tmp_path / "prompts.jsonl"), "--require", "refusal_agreement>=1"
            )
        )
        == 0
    )
    assert "refusal agreement" in capsys.readouterr().out


def test_a_requirement_that_is_not_met_exits_with_1(folders, capsys):
    assert main(command(folders, "--require", "kl<=100", "--require", "one:top1>=0")) == 0
    assert "one: kl<=100 met: " in capsys.readouterr().out
    assert main(command(folders, "--require", "kl<=100", "--require", "kl<=0", "--json")) == 1
    results = json.loads(capsys.readouterr().out)
    assert [result["met"] for result in results["required"]] == [True, False]


def test_wrong_use_exits_with_2_before_any_model_is_loaded(folders, capsys, monkeypatch):
    monkeypatch.setattr(__import__("sys").modules["bitdelta.evaluate"], "load_model", None)
    assert main(command(folders, "--require", "kl==0")) == 2
    assert "require: " in capsys.readouterr().err
    assert main([*command(folders), "--delta", f"one={folders / 'delta4'}"]) == 2
    assert "two are called one" in capsys.readouterr().err
