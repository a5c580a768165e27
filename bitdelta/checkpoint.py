"""Opens a model's checkpoint: tensors by name, memory-mapped where they lie, and the files that travel with them.

    FOLDER/model.safetensors                       or model.safetensors.index.json and its shards
    FOLDER/pytorch_model.bin                       or pytorch_model.bin.index.json and its shards
    FOLDER/config.json, tokenizer files, ...       `Checkpoint.files`

Opening reads headers and indices only. `layout.py` says which files count, `header.py` and `torchfile.py` read their
headers, `tensor.py` maps the values. Nothing is unpickled and no code of the checkpoint is run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import FormatError
from .header import read_json, read_safetensors
from .layout import Weights, contained, find_weights
from .tensor import DTYPES, FLOATS, Tensor, file_size
from .torchfile import open_torch_file

__all__ = ["DTYPES", "FLOATS", "TRAVEL", "Checkpoint", "Tensor", "open_checkpoint", "travels"]

# Files that make a folder of weights a model that transformers loads; a closed list, so that nothing private travels.
TRAVEL = (
    "config.json",  # architecture
    "generation_config.json",  # EOS, padding, sampling defaults
    "tokenizer*",  # tokenizer.json, tokenizer_config.json, tokenizer.model, tokenizer.model.v3
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",  # BPE and WordPiece
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",  # SentencePiece under its other names
    "sentencepiece*.model",
    "*.spm",
    "chat_template.*",  # .jinja, older .json
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",  # images, video and sound
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "configuration_*.py",  # code that config.json's auto_map names; it travels as text, bitdelta never runs it
    "modeling_*.py",
    "tokenization_*.py",
    "processing_*.py",
    "image_processing_*.py",
    "LICENSE*",  # terms bind whoever passes weights on
    "NOTICE*",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")  # never travel, whatever their name
DEQUANTIZED = "dequantized.json"  # of a folder that `bitdelta.quantized` wrote: whose weights it has


class Checkpoint(Mapping[str, Tensor]):
    """A model's tensors by name, in the order in which they lie in its files.

    Attributes:
        root: the folder.
        id, revision: the Hub's name and commit, where known, else None.
        weights: the files that hold the tensors.
    """

    def __init__(
        self,
        root: Path,
        tensors: dict[str, Tensor],
        weights: list[Path],
        id: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.root = root
        self.id = id
        self.revision = revision
        self.weights = weights
        self._tensors = tensors
        self._fingerprints: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.root)!r}, {len(self)} tensors, {self.nbytes:,} bytes)"

    def fingerprint(self, name: str) -> str:
        """The tensor's fingerprint, read once: many deltas of one base are compared with it."""
        if name not in self._fingerprints:
            self._fingerprints[name] = self[name].fingerprint()
        return self._fingerprints[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; tied ones count once."""
        return sum(tensor.nbytes for name, tensor in self._tensors.items() if name not in self.aliases)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Tied tensors that the file stores once: name -> the first name with the same bytes and shape."""
        first: dict[tuple[Any, ...], str] = {}
        found = {}
        for name, tensor in self._tensors.items():
            place = (tensor.path, tensor.offset, tensor.dtype, tensor.shape)
            if tensor.nbytes and first.setdefault(place, name) != name:
                found[name] = first[place]
        return found

    @cached_property
    def origin(self) -> dict[str, str | None]:
        """What a delta says of its base: id, revision, name; of dequantised weights, whose, how and a fingerprint."""
        path = self.root / DEQUANTIZED
        if not path.is_file():
            return {"id": self.id, "revision": self.revision, "name": self.root.resolve().name}
        mark = read_json(contained(self.root, DEQUANTIZED))
        fields = ("id", "revision", "name", "quantized", "fingerprint")
        if set(mark) != set(fields) or not all(isinstance(value, str | None) for value in mark.values()):
            raise FormatError(f"{path}: expected texts for {', '.join(fields)}, got {', '.join(mark)[:200]}")
        return {field: mark[field] for field in fields}

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the names and fingerprints of all tensors."""
        lines = (f"{name} {self.fingerprint(name)}\n" for name in sorted(self))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; {} where there is none."""
        path = self.files.get("config.json")
        return {} if path is None else read_json(path)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files of `TRAVEL` that the folder has: name -> path. Never weights, READMEs or training state."""
        names = sorted(path.name for path in self.root.iterdir())
        templates = self.root / "additional_chat_templates"
        if "additional_chat_templates" in names and templates.is_dir():
            names += sorted(f"{templates.name}/{path.name}" for path in templates.iterdir())
        found = {}
        for name in names:
            if travels(name) and not (self.root / name).is_dir():
                path = contained(self.root, name)
                if path.stat().st_size:  # some tokenizers write an empty merges.txt
                    file_size(path)
                found[name] = path
        return found


def travels(name: str) -> bool:
    """Whether a file of this name belongs to `Checkpoint.files`."""
    return any(fnmatch(name, pattern) for pattern in TRAVEL) and not name.endswith(WEIGHTS)


def open_checkpoint(source: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
        source: a folder, or a Hugging Face Hub id (`NAME` or `NAME@REVISION`), from huggingface_hub's cache.
        revision: the Hub revision, instead of `@REVISION`.

    Raises:
        bitdelta.FormatError: a format that is not read (the message names the command that converts it), or files
            that are damaged, missing, or lead outside the folder.
        bitdelta.Error: neither a folder nor a Hub id that can be had.

    Example:
        >>> base = open_checkpoint("llama")  # doctest: +SKIP
        >>> base["model.norm.weight"].array()  # doctest: +SKIP
    """
    from .hub import resolve

    found = resolve(source, revision)
    weights = find_weights(found.root)
    tensors = _read(weights)
    if not any(tensor.nbytes for tensor in tensors.values()):
        raise FormatError(
            f"{weights.files[0]}: every tensor is empty; a DeepSpeed ZeRO-3 placeholder? Convert the training state: "
            f"python -m deepspeed.utils.zero_to_fp32 {found.root} OUT --safe_serialization"
        )
    return Checkpoint(found.root, tensors, weights.files, found.id, found.revision)


def _read(weights: Weights) -> dict[str, Tensor]:
    """The tensors of all files; what index and files say must agree."""
    tensors: dict[str, Tensor] = {}
    for path in weights.files:
        for name, tensor in _read_file(path).items():
            if name in tensors:
                raise FormatError(f"{path}: {name} is in {tensors[name].path.name} too")
            tensors[name] = tensor
    for name, file in weights.weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise FormatError(
                f"{weights.index}: {name} is not in {file}; index and shards do not belong together"
            )
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    file_size(path)  # names empty files and LFS pointers
    return open_torch_file(path)
