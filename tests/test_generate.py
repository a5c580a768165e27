"""`bitdelta generate`: prompts of several tenants in one batch, each with its tenant's own tokenizer and ends."""

import json
import shutil

import pytest
import torch
import transformers
from models import llama_config, make, merged
from tokenizers import Tokenizer, models, pre_tokenizers

from bitdelta.cli import main
from bitdelta.errors import Error
from bitdelta.model import DeltaModel
from bitdelta.prompts import answer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer(extra=()):
    words = ["<pad>", "<s>", "</s>", "<unk>", *LETTERS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    found.add_tokens(list(extra))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tenant 1 has a token more, `<tool>`."""

    def change(model, i):
        if i == 1:
            model.resize_token_embeddings(31, mean_resizing=False)
            tokenizer(["<tool>"]).save_pretrained(root / "fine-1")
        else:
            tokenizer().save_pretrained(root / "fine-0")
        return model

    root = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    config = llama_config(vocab_size=30)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    return make(root, config, change=change, keep_base=True)


def test_the_command_answers_all_prompts_in_one_batch(folders, capsys):
    arguments = ["generate", str(folders / "base"), "--max-new-tokens", "8", "--json"]
    arguments += ["--delta", f"one={folders / 'delta-0'}", "--delta", f"two={folders / 'delta-1'}"]
    arguments += ["--prompt", "one:hello", "--prompt", ":a", "--prompt", "two:ab<tool>c"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["delta"] for row in report["rows"]] == ["one", "__base__", "two"]
    assert report["tokens"] == sum(row["tokens"] for row in report["rows"])
    for row, who in zip(report["rows"], [0, None, 1], strict=True):
        own = tokenizer(["<tool>"] if who == 1 else ())
        ids = own(row["prompt"], return_tensors="pt")["input_ids"]
        assert own.unk_token_id not in ids
        wanted = merged(folders, who).generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert row["text"] == own.decode(wanted, skip_special_tokens=True)
        assert row["tokens"] == len(wanted)


def test_sampling_depends_on_the_seed_alone(folders):
    prompts = [("one", "abc"), (None, "abc")]
    deltas = {"one": folders / "delta-0"}
    runs = [
        [row["text"] for row in answer(folders / "base", deltas, prompts, 12, 1.5, seed)["rows"]]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_wrong_use_is_one_line_that_names_it(folders, capsys):
    base = str(folders / "base")
    assert main(["generate", base, "--prompt", "nobody:hi"]) == 2
    assert "nobody: no such delta; loaded: none" in capsys.readouterr().err
    assert main(["generate", base, "--prompt", "hi"]) == 2
    assert "--prompt: expected NAME:TEXT, got 'hi'" in capsys.readouterr().err
    assert main(["generate", base, "--delta", "x", "--prompt", ":hi"]) == 2
    assert "--delta: expected NAME=DELTA, got 'x'" in capsys.readouterr().err
    twice = ["--delta", f"x={folders / 'delta-0'}", "--delta", f"x={folders / 'delta-1'}"]
    assert main(["generate", base, *twice, "--prompt", "x:hi"]) == 2
    assert "--delta: two are called x" in capsys.readouterr().err
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        answer(base, {}, [])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompts": ["hi"]}, ValueError, "prompts: expected .name or None, text., got 'hi'"),
        ({"prompts": [(None, 5)]}, ValueError, "prompts: expected "),
        ({"deltas": ["x"]}, TypeError, "deltas: expected name -> folder, got list"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected 1"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a number from 0, got nan"),
        ({"temperature": "hot"}, ValueError, "temperature: expected a number from 0, got 'hot'"),
        ({"seed": 1 << 70}, ValueError, "seed: expected "),
        ({"prompts": [("nobody", "hi")]}, Error, "nobody: no such delta; loaded: none"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_before_anything_is_loaded(arguments, error, words):
    with pytest.raises(error, match=words):
        answer(**{"base": "/nowhere", "deltas": {}, "prompts": [(None, "hi")]} | arguments)


def test_a_base_without_a_tokenizer_or_with_a_broken_one_is_named_in_one_line(folders, tmp_path, capsys):
    shutil.copytree(folders / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    for words in ("transformers does not load its tokenizer: ", "no tokenizer in it"):
        assert main(["generate", str(tmp_path / "base"), "--prompt", ":hi"]) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'base'}: {words}" in said and said.count("\n") == 1
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "base" / file).unlink(missing_ok=True)


def test_a_model_without_prompts_keeps_its_batches(folders):
    model = DeltaModel.from_pretrained(folders / "base")
    with pytest.raises(ValueError, match="expected a tensor among the inputs"):
        model.generate(max_new_tokens=3)
    ids = torch.tensor([[4, 5]])
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= 4
