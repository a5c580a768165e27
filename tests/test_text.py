"""Text from every source becomes rows of tokens: seeded, whole, with the tokenizer's special tokens."""

import json
import sys
import types

import numpy as np
import pytest

from bitdelta import Error, FormatError
from bitdelta.text import documents, load_rows, load_tokens


class Tokenizer:
    """One token a character; what transformers' tokenizers have that is used here."""

    eos_token_id, pad_token_id, chat_template = 0, 3, None

    def __init__(self, before=(), after=()):
        self.before, self.after = list(before), list(after)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(character) for character in text]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


def text_of(row):
    return "".join(map(chr, row))


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines):
        path = tmp_path / "text.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
        return path

    return write


def test_the_built_in_text_is_prose_and_the_seed_decides_the_rows():
    tokens = load_tokens(None, Tokenizer(), 1000, 50)
    assert tokens.shape == (20, 50) and tokens.dtype == np.int64
    assert (tokens == load_tokens(None, Tokenizer(), 1000, 50)).all()
    assert (tokens != load_tokens(None, Tokenizer(), 1000, 50, seed=1)).any()
    assert " the " in text_of(tokens.ravel())


def test_rows_of_a_file_are_its_windows_each_once(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(103)))
    rows = load_tokens(path, Tokenizer(), 10_000, 10)
    assert sorted(map(text_of, rows)) == sorted(path.read_text()[at : at + 10] for at in range(0, 100, 10))
    assert load_tokens(str(path), Tokenizer(), 30, 10).shape == (3, 10)


def test_documents_of_jsonl_are_joined_by_the_end_token(jsonl):
    path = jsonl("ab", {"text": "cd"}, {"content": "ef"}, {"prompt": "g", "completion": "h"})
    [row] = load_tokens(path, Tokenizer(), 11, 11)
    assert text_of(row) == "ab\0cd\0ef\0gh"


def test_messages_go_through_the_chat_template(jsonl):
    path = jsonl({"messages": [{"role": "user", "content": "hi"}]})
    assert list(documents(path)) == ["user: hi"]
    tokenizer = Tokenizer()
    tokenizer.chat_template = "a template"
    tokenizer.apply_chat_template = lambda messages, tokenize: f"<{messages[0]['content']}>"
    assert list(documents(path, tokenizer)) == ["<hi>"]


def test_a_document_a_row_is_padded_and_masked(jsonl):
    tokens, mask = load_rows(jsonl("abc", "abcdefgh", ""), Tokenizer(), 5, 5, pack=False)
    assert sorted(mask.sum(1)) == [3, 5]
    for row, is_text in zip(tokens, mask, strict=True):
        assert "abcde".startswith(text_of(row[is_text])) and (row[~is_text] == Tokenizer.pad_token_id).all()


def test_paragraphs_are_the_documents_of_plain_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo\n\nthree")
    tokens, mask = load_rows(path, Tokenizer(), 9, 5, pack=False)
    assert sorted(text_of(row[is_text]) for row, is_text in zip(tokens, mask, strict=True)) == [
        "one",
        "three",
        "two",
    ]


@pytest.mark.parametrize(("before", "after"), [((1,), ()), ((1,), (2,))], ids=["bos", "cls-sep"])
def test_every_row_has_the_special_tokens(before, after):
    tokens, mask = load_rows(None, Tokenizer(before, after), 4, 16)
    assert mask.all() and (tokens[:, 0] == 1).all()
    assert not after or (tokens[:, -1] == 2).all()
    with pytest.raises(ValueError, match="length: 1 leaves no room"):
        load_tokens(None, Tokenizer(before, after), 4, 1)


def test_a_large_file_is_read_as_far_as_needed(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text(("x" * 99 + "\n") * 100_000)
    read = []

    class Counting(Tokenizer):
        def __call__(self, text, **options):
            read.append(len(text))
            return super().__call__(text, **options)

    load_tokens(path, Counting(), 1000, 100)
    assert 0 < sum(read) < 200_000


def test_a_dataset_is_streamed_through_datasets(monkeypatch):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return ({"text": f"row {i}", "url": ""} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_tokens("allenai/c4:en@validation", Tokenizer(), 100, 10).shape == (10, 10)
    load_tokens("someone/some-text", Tokenizer(), 100, 10)
    assert calls == [("allenai/c4", "en", "validation", True), ("someone/some-text", None, "train", True)]


def test_without_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Error, match="pip install datasets"):
        load_tokens("allenai/c4", Tokenizer(), 100, 10)


def test_an_array_is_taken_as_it_is_and_negative_tokens_are_padding():
    tokens, mask = load_rows(np.array([[5, 6, 7], [8, -1, -1]]), None, 10, 3)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    with pytest.raises(ValueError, match=r"expected tokens \[rows, length\], got \[3\]"):
        load_tokens(np.arange(3), None)
    with pytest.raises(TypeError, match="float64"):
        load_tokens(np.ones((2, 2)), None)


def test_bad_text_is_refused_by_name(tmp_path, jsonl):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        load_tokens(tmp_path / "absent.txt", Tokenizer())
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        load_tokens("absent.txt", Tokenizer())
    short = tmp_path / "short.txt"
    short.write_text("abc")
    with pytest.raises(ValueError, match="shorter than one row of 128 tokens"):
        load_tokens(short, Tokenizer())
    with pytest.raises(FormatError, match=r"text\.jsonl:2: expected a string or an object.*with a, b"):
        load_tokens(jsonl("x", {"a": 1, "b": 2}), Tokenizer())
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "x"}\n{"te')
    with pytest.raises(FormatError, match=r"broken\.jsonl:2: not JSON"):
        load_tokens(broken, Tokenizer())
    with pytest.raises(Error, match="no tokenizer"):
        load_tokens(None, None)
    broken.write_bytes(b'"\xff"')
    with pytest.raises(FormatError, match=r"broken\.jsonl: not UTF-8"):
        load_tokens(broken, Tokenizer())
    with pytest.raises(ValueError, match="text: expected tokens .rows, length.: "):
        load_tokens([[1, 2], [3]], None)
    with pytest.raises(ValueError, match="text: expected rows without padding, got negative tokens in row 1"):
        load_tokens(np.array([[1, 2], [3, -1]]), None)
    with pytest.raises(ValueError, match=r"text: every token of \[2, 2\] is padding"):
        load_rows(np.full((2, 2), -1), None, 2, 2)
    for seed, error in ((-1, ValueError), ("x", TypeError)):
        with pytest.raises(error, match="seed: expected "):
            load_tokens(short, Tokenizer(), seed=seed)
