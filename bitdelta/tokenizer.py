"""The tokenizer in a checkpoint's folder, as transformers loads it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .errors import Error

FILES = ("tokenizer*", "vocab*", "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece*", "*.spm")


def load_tokenizer(folder: Path, where: Path | None = None) -> Any:
    """The folder's own, or None where it has none; `where`: what an error names instead.

    Raises:
        bitdelta.Error: transformers does not load it.
    """
    from transformers import AutoTokenizer

    if not any(fnmatch(path.name, pattern) for path in folder.iterdir() for pattern in FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of transformers, of the library below it, of what that needs
        reason = " ".join(str(error).split())[:200]
        raise Error(f"{where or folder}: transformers does not load its tokenizer: {reason}") from error
