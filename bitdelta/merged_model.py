"""A model of transformers with the weights base + delta, made tensor by tensor, nothing written to the disk.

    model, tokenizer = load_model("llama", "llama-math-delta")

For what wants a plain model of one fine-tune: evaluation, lm_eval, export. Many fine-tunes at once are `DeltaModel`'s.
Needs PyTorch and transformers.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .array import as_bfloat16
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint_model import read_config
from .delta import Delta
from .devices import torch_device
from .errors import Error, FormatError
from .merge import tensor_bytes, travelling_files
from .packfile import Packfile, load
from .tokenizer import load_tokenizer

logger = logging.getLogger("bitdelta")
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def load_model(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[Any, Any]:
    """The base, or base + delta, as transformers' own model, ready to be evaluated.

    Args:
        base: a checkpoint, a folder or Hub id.
        delta: a packed delta of it, a folder or Hub id; None: the base itself.
        dtype: of the parameters: "float32", "bfloat16", "float16", or "auto" (the checkpoint's).
        device: where to put it.

    Returns:
        The model, in eval mode, and its tokenizer, or None where the folders have none.

    Raises:
        bitdelta.BaseMismatchError: the delta was made from another base.
        bitdelta.FormatError: weights that do not fill the model.
        bitdelta.Error: transformers has no such model.
        ValueError: another dtype; bitdelta.DeviceError: no such device.
    """
    check_dtype(dtype)
    torch_device(device)
    checkpoint = open_checkpoint(base)
    if delta is None:
        return _load(checkpoint.root, checkpoint.root, None, dtype, device)
    packfile = load(delta)
    packfile.check_base(checkpoint)
    with tempfile.TemporaryDirectory(prefix="bitdelta-model-") as folder:  # configuration and tokenizer only
        for name, path in travelling_files(packfile, checkpoint).items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, Path(folder) / name)
        return _load(None, Path(folder), dict(merged_tensors(packfile, checkpoint)), dtype, device)


def check_dtype(dtype: str) -> None:
    """Raises ValueError for what `load_model` cannot give."""
    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or auto, got {str(dtype)[:80]!r}")


def merged_tensors(packfile: Packfile, base: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of the fine-tune, as `bitdelta merge` would write it; tied ones are one."""
    made: dict[str, torch.Tensor] = {}
    for name, entry in packfile.entries.items():
        source = entry.get("tied_to", name)
        if source not in made:
            made[source] = _merged(packfile, base, source)
        yield name, made[source]


def _merged(packfile: Packfile, base: Checkpoint, name: str) -> torch.Tensor:
    entry = packfile.entries[name]
    if entry["dtype"] not in TORCH_DTYPES:
        raise Error(f"{name}: {entry['dtype']} is no dtype that a model can be loaded with")
    out = torch.empty(entry["shape"], dtype=TORCH_DTYPES[entry["dtype"]])
    flat = out.reshape(-1).view(torch.uint8).numpy()
    value = packfile[name]
    if isinstance(value, Delta) and not entry.get("rows"):
        kind = flat.view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry["dtype"]])
        matrix = kind.reshape(value.shape)
        value.expand(base[name].array(), out=as_bfloat16(matrix) if entry["dtype"] == "BF16" else matrix)
        base[name].release()
        return out
    at = 0
    buffer = np.empty(len(flat), np.uint8)
    for piece in tensor_bytes(packfile, base, name, buffer):
        flat[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return out


def _load(
    weights: Path | None, folder: Path, tensors: dict[str, torch.Tensor] | None, dtype: str, device: str
) -> tuple[Any, Any]:
    import transformers

    with quiet():
        config = read_config(folder)
        kind = model_class(config)
        model, about = kind.from_pretrained(
            weights,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
        )
        if about["missing_keys"]:
            missing = sorted(about["missing_keys"])
            raise FormatError(
                f"{missing[0]}: {kind.__name__} needs it and the weights have none ({len(missing)} missing)"
            )
        if weights is None and (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        try:
            tokenizer = load_tokenizer(folder)
        except Error as error:  # tokens may do without
            logger.warning("%s", error)
            tokenizer = None
    return model.to(device).eval(), tokenizer


def model_class(config: Any) -> Any:
    """The class that the configuration names; code that travels with a checkpoint is not run."""
    import transformers

    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise Error(f"{name}: transformers {transformers.__version__} has no such model")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its messages and progress bars."""
    from transformers.utils import logging

    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()
