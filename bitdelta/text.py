"""Text to calibrate, distill and evaluate with, as rows of tokens.

    None                    what comes with Python: the documentation of its language, English prose
    FILE                    plain text, read in pieces of a megabyte; FILE.jsonl (also .ndjson): one document a line
    NAME[:CONFIG][@SPLIT]   a dataset of the Hugging Face Hub, streamed through `datasets`, where that is installed
    [rows, length]          an array of token ids, taken as it is

A line of jsonl, or a dataset's row, is a string, or an object with "text" or "content", "messages" (put through the
tokenizer's chat template) or "prompt" with "completion" or "response".

Rows are windows of documents joined by the end-of-text token, or with pack=False one document a row (of plain text,
a paragraph), cut or padded to the length. Every row has the special tokens that the tokenizer puts around a text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import Error, FormatError, whole_number

Source = Any  # None, a path, a dataset's name or an array

TOKENS_READ = 16  # times the tokens asked for, at about 4 characters each: what the windows are drawn from
CHARACTERS = 4
DOCUMENTS = (".jsonl", ".ndjson")
FILES = (*DOCUMENTS, ".json", ".txt", ".md")  # never names of datasets
DATASET = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[^@]+))?")
I64 = NDArray[np.int64]


def load_tokens(text: Source, tokenizer: Any, n_tokens: int = 65536, length: int = 128, seed: int = 0) -> I64:
    """Rows of tokens without padding, drawn from the text at random but for the seed.

    Args:
        text: see the module.
        tokenizer: of transformers; None where text is an array.
        n_tokens: how many to take at most; a short text gives fewer.
        length: tokens of a row.
        seed: decides which rows are drawn, and their order.

    Returns:
        int64 [rows, length].

    Raises:
        ValueError: the text has less than a row.
        bitdelta.FormatError, bitdelta.Error, OSError: it cannot be read.
    """
    n_rows = max(
        1, whole_number(n_tokens, "n_tokens", 1, 1 << 40) // whole_number(length, "length", 1, 1 << 24)
    )
    tokens, mask = load_rows(text, tokenizer, n_rows, length, seed)
    if not mask.all():
        row = int(np.flatnonzero(~mask.all(1))[0])
        raise ValueError(f"text: expected rows without padding, got negative tokens in row {row}")
    return tokens


def load_rows(
    text: Source, tokenizer: Any, n_rows: int, length: int, seed: int = 0, pack: bool = True
) -> tuple[I64, NDArray[np.bool_]]:
    """Rows of tokens, and which of them are text and not padding.

    Args:
        text, tokenizer, length, seed: as of `load_tokens`.
        n_rows: how many to take at most.
        pack: windows of the joined documents; False: a document a row, cut or padded on the right.

    Returns:
        tokens int64 [rows, length], mask bool [rows, length].
    """
    seed = whole_number(seed, "seed", 0, (1 << 63) - 1)
    if not needs_tokenizer(text):
        return _array(text, n_rows)
    before, after = _special_tokens(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"length: {length} leaves no room beside the {length - room} special tokens of a row"
        )
    found = _read(text, tokenizer, TOKENS_READ * CHARACTERS * n_rows * length)
    if not pack and not _has_documents(text):
        found = (part for document in found for part in document.split("\n\n"))
    encoded = (_encode(tokenizer, document) for document in found)
    bodies = list(_windows(encoded, room, tokenizer.eos_token_id) if pack else _pieces(encoded, room))
    if not bodies:
        raise ValueError(f"text: {_name(text)} is shorter than one row of {length} tokens")
    order = np.random.default_rng(seed).permutation(len(bodies))[:n_rows]
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    tokens = np.full((len(order), length), pad, np.int64)
    mask = np.zeros((len(order), length), bool)
    for i, at in enumerate(order):
        row = [*before, *bodies[at], *after]
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def needs_tokenizer(text: Source) -> bool:
    """Whether it is text, and not an array of tokens."""
    return text is None or isinstance(text, (str, os.PathLike))


def documents(text: Source, tokenizer: Any = None) -> Iterator[str]:
    """The text's documents one by one; a plain file is one."""
    if text is None:
        yield built_in()
        return
    path = Path(text)
    if path.is_file():
        if path.suffix in DOCUMENTS:
            for number, line in lines_of(path):
                yield _document(_json(line, path, number), f"{path}:{number}", tokenizer)
        else:
            yield from _chunks(path)
        return
    found = DATASET.fullmatch(str(text))
    if isinstance(text, os.PathLike) or not found or path.suffix in FILES:
        raise FileNotFoundError(f"{text}: no such text file, and not the name of a dataset")
    yield from _dataset(str(text), tokenizer, **found.groupdict())


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, and their numbers from 1.

    Raises:
        bitdelta.FormatError: not UTF-8.
    """
    with open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: not UTF-8: {error}") from None


def built_in() -> str:
    """The documentation of the Python language, about 460 kB."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def refuse_unknown(tokens: I64, model: Any) -> None:
    """Raises ValueError where a token has no place in the model's embeddings."""
    n = len(model.get_input_embeddings().weight)
    if (most := int(tokens.max())) >= n:
        raise ValueError(f"text: token {most} is not in the vocabulary of the model, which has {n} tokens")


def _array(text: Any, n_rows: int) -> tuple[I64, NDArray[np.bool_]]:
    try:
        tokens = np.asarray(text)
    except ValueError as error:
        raise ValueError(f"text: expected tokens [rows, length]: {error}") from None
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"text: expected tokens [rows, length], got {list(tokens.shape)}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"text: expected whole numbers or a path, got an array of {tokens.dtype}")
    tokens = tokens[:n_rows].astype(np.int64)
    mask = tokens >= 0
    if not mask.any():
        raise ValueError(f"text: every token of {list(tokens.shape)} is padding (negative)")
    return np.where(mask, tokens, 0), mask


def _read(text: Source, tokenizer: Any, characters: int) -> Iterator[str]:
    """The documents until there are so many characters."""
    for document in documents(text, tokenizer):
        yield document[:characters]
        characters -= len(document)
        if characters <= 0:
            return


def _chunks(path: Path) -> Iterator[str]:
    """A plain file in pieces of a megabyte, cut at line ends; a file larger than memory is read as far as needed."""
    with open(path, encoding="utf-8", errors="replace") as file:
        while chunk := file.read(1 << 20):
            yield chunk + file.readline()


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise FormatError(f"{path}:{number}: not JSON: {error}") from None


def _document(value: Any, where: str, tokenizer: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        for key in ("text", "content"):
            if isinstance(value.get(key), str):
                return str(value[key])
        if isinstance(value.get("messages"), list):
            return _conversation(value["messages"], where, tokenizer)
        answer = value.get("completion", value.get("response"))
        if isinstance(value.get("prompt"), str) and isinstance(answer, str):
            return str(value["prompt"]) + answer
    keys = f" with {', '.join(map(str, value))[:200]}" if isinstance(value, dict) else ""
    raise FormatError(
        f"{where}: expected a string or an object with text, content, messages or prompt and completion, "
        f"got {type(value).__name__}{keys}"
    )


def _conversation(messages: list[Any], where: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    try:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    except (KeyError, TypeError):
        raise FormatError(f"{where}: messages: expected objects with role and content") from None


def _dataset(text: str, tokenizer: Any, name: str, config: str | None, split: str | None) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise Error(
            f"text: {text} is not a file; for a dataset of the Hugging Face Hub: pip install datasets"
        ) from None
    rows: Iterable[Any] = load_dataset(name, config, split=split or "train", streaming=True)
    for number, row in enumerate(rows):
        yield _document(row, f"{text}[{number}]", tokenizer)


def _encode(tokenizer: Any, document: str) -> list[int]:
    return list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    if tokenizer is None:
        raise Error("text: no tokenizer in the fine-tune's folder; give an array of tokens [rows, length]")
    bare = _encode(tokenizer, "a")
    full = list(tokenizer("a", verbose=False)["input_ids"])
    for at in range(len(full) - len(bare) + 1):
        if bare and full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    return [], []


def _windows(encoded: Iterable[list[int]], room: int, end: int | None) -> Iterator[list[int]]:
    """The documents joined, cut into rows; what is left at the end is dropped."""
    kept: list[int] = []
    for number, ids in enumerate(encoded):
        if number and end is not None:
            kept.append(end)
        kept += ids
        full = len(kept) // room * room
        for at in range(0, full, room):
            yield kept[at : at + room]
        kept = kept[full:]


def _pieces(encoded: Iterable[list[int]], room: int) -> Iterator[list[int]]:
    return (ids[:room] for ids in encoded if ids)


def _has_documents(text: Source) -> bool:
    """Whether the source is a list of documents, not one long text."""
    return text is not None and (Path(text).suffix in DOCUMENTS or not Path(text).is_file())


def _name(text: Source) -> str:
    return "the text built in" if text is None else str(text)
