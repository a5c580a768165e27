"""Finds the folder that a user means: one on this disk, or a Hugging Face Hub id in huggingface_hub's cache.

    NAME, OWNER/NAME, OWNER/NAME@REVISION      REVISION = branch, tag or commit; main by default

A folder wins over an id of the same name. Downloads, the cache, tokens and HF_HUB_OFFLINE are huggingface_hub's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import Error

SAVED, TENANT = (
    "bitdelta_model.json",
    "delta-",
)  # what DeltaModel.save_pretrained writes: a file, and sub-folders
_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Small files, and one kind of weights; files in sub-folders (original/, onnx/, checkpoint-500/) are not wanted.
_SMALL = ["*.json", "*.txt", "*.model*", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "README.md"]
_SAFETENSORS = [*_SMALL, "*.safetensors"]
_TORCH = [*_SMALL, "*.bin"]
_IGNORED = [
    *(f"*/*.{kind}" for kind in ("json", "txt", "model*", "py", "md", "safetensors", "bin")),
    *(
        "consolidated*",
        "training_args.bin",
        "optimizer*",
        "scheduler*",
        "adapter_model*.bin",
        "trainer_state.json",
    ),
]


@dataclass(frozen=True)
class Found:
    """A folder and, where it is the Hub's, its id and the commit."""

    root: Path
    id: str | None = None
    revision: str | None = None


def resolve(source: str | os.PathLike[str], revision: str | None = None) -> Found:
    """The folder of `source`.

    Args:
        source: a folder or a Hub id.
        revision: instead of `@REVISION` in the id.

    Raises:
        bitdelta.Error: neither a folder nor an id that huggingface_hub can give.
        TypeError: not a path or text.
    """
    text = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(f"expected a folder or a Hub id, got {type(source).__name__}")
    path = Path(os.path.expanduser(text))
    if text and path.is_dir():
        if revision is not None:
            raise Error(f"{text}: a folder; the revision {revision!r} is for Hub ids")
        return _describe(path)
    if text and path.exists():
        raise Error(f"{text}: a file; give the folder that holds it")
    name, at, after = text.partition("@")
    if at and revision is not None and after != revision:
        raise Error(f"{text}: two revisions: {after!r} and {revision!r}")
    if isinstance(source, Path) or not _ID.fullmatch(name) or (at and not after):
        raise Error(
            f"{text}: no such folder, and not a Hub id (NAME, OWNER/NAME or OWNER/NAME@REVISION) either"
        )
    return _describe(_download(text, name, revision or after or None), name)


def _describe(root: Path, id: str | None = None) -> Found:
    """Id and commit from the cache's layout: models--OWNER--NAME/snapshots/COMMIT."""
    real = root.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        commit = real.name if _COMMIT.fullmatch(real.name) else None
        return Found(root, id or repository.name.removeprefix("models--").replace("--", "/"), commit)
    return Found(root, id)


def _download(text: str, name: str, revision: str | None) -> Path:
    """The snapshot's folder: safetensors, or where there are none, PyTorch's files; of a saved model its deltas too."""
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise Error(
            f"{text}: no such folder; to read it as a Hub id, install huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        for patterns in (_SAFETENSORS, _TORCH):
            root = Path(
                snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED)
            )
            if any(root.glob("*.safetensors")):
                break
        if (root / SAVED).is_file():
            snapshot_download(name, revision=root.name, allow_patterns=f"{TENANT}*/*")
        return root
    except Exception as error:  # its own errors, those of its HTTP library, OSError, ValueError
        where = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub did not give it"
        reason = " ".join(str(error).split())[:300]
        raise Error(f"{text}: no such folder, and as a Hub id: {where}: {reason}") from error
