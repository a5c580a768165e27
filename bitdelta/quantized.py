"""The weights that a quantised base computes with, as a checkpoint: what a delta over that base is taken from.

    W[:, k] = what the quantised module makes of the unit vector k      so any library's module will do
    delta   = finetuned - W                                             repairs the quantisation error too

`dequantize` writes a folder of plain weights with the base's names and files, and `dequantized.json`, which says whose
weights these are. A delta taken from the folder remembers that; `DeltaModel.load_delta` loads it over the same base,
quantised, with allow_base="quantized". `compress(quantized_base=...)` does both steps. The quantised model is in
memory as a whole, one weight of it dequantised at a time. Needs PyTorch, transformers and the library that quantises.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import DEQUANTIZED, Checkpoint, open_checkpoint
from .errors import Error
from .folder import PendingFolder, refuse_existing, refuse_inside

if TYPE_CHECKING:
    import torch

METHODS = ("int8", "bnb-int8", "bnb-nf4", "stored")
SHARD_BYTES = 1 << 30  # in memory, until a file is written
UNITS = 256  # unit vectors at a time


def dequantize(
    base: str | os.PathLike[str],
    method: Any,
    out_dir: str | os.PathLike[str],
    dtype: str = "auto",
    device_map: Any = None,
) -> dict[str, Any]:
    """Writes what `base`, quantised, computes with, as a plain checkpoint.

    Args:
        base: a checkpoint, a folder or Hub id.
        method: "int8" (torchao, weights only), "bnb-int8", "bnb-nf4" (bitsandbytes): quantise the base on loading;
            "stored": its files are quantised; or a quantization config of transformers.
        out_dir: the folder to write; it must not exist.
        dtype: what the model is loaded in; "auto": the checkpoint's.
        device_map: of accelerate, for methods that need a device.

    Returns:
        A dict that JSON can hold: the names of the `quantized` tensors, and how many are `plain`.

    Raises:
        ValueError: a method that is not known.
        bitdelta.Error: the library is missing, the model does not load, or nothing in it is quantised.
        FileExistsError, OSError: `out_dir` exists or cannot be written.
    """
    refuse_existing(Path(out_dir))
    source = open_checkpoint(base)
    refuse_inside(out_dir, source.root)
    name, config = _method(method)
    if (name == "stored") != bool(source.config.get("quantization_config")):
        has = "is" if name != "stored" else "is not"
        raise ValueError(f"quantized_base: {name!r}, and {source.root} {has} quantised; see METHODS")
    model = _load(source, config, dtype, device_map)
    modules = quantized_modules(model)
    if not modules:
        raise Error(f"{source.root}: {name} quantises nothing in {type(model).__name__}")
    known = _names(model, modules, source)
    folder = PendingFolder(out_dir)
    try:
        folder.clear()
        plain = _plain(source, known)
        tensors = _tensors(model, source, plain, known)
        _write(folder.path, tensors)
        _write_files(folder.path, source, name)
        folder.publish()
    finally:
        folder.discard()
    return {"out": str(out_dir), "method": name, "quantized": list(known), "plain": len(plain)}


@contextmanager
def dequantized(base: str | os.PathLike[str], method: Any, out_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder beside `out_dir` for as long as that is made; one that a kill left is used again."""
    target = Path(os.path.abspath(out_dir))
    folder = target.parent / f".{target.name}.dequantized"
    wanted = _mark(open_checkpoint(base), _method(method)[0])
    mark = folder / DEQUANTIZED
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        dequantize(base, method, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quantized_modules(model: Any) -> dict[str, Any]:
    """Path -> module, of those that multiply with a weight that is not a plain tensor of floats."""
    import torch

    found = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_plain = isinstance(weight, torch.Tensor) and (
            type(weight) in (torch.Tensor, torch.nn.Parameter)
            and type(weight.data) is torch.Tensor
            and weight.is_floating_point()
        )
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not is_plain:
            found[path] = module
    return found


def weight_of(module: Any, dtype: Any, device: Any = "cpu") -> torch.Tensor:
    """[N, K]: what a quantised module multiplies with, in `dtype`, without its bias."""
    import torch

    n, k = module.out_features, module.in_features
    out = torch.empty(n, k, dtype=dtype)
    bias = getattr(module, "bias", None)
    if bias is not None:
        module.bias = None
    try:
        with torch.no_grad():
            for begin in range(0, k, UNITS):
                units = torch.eye(min(UNITS, k - begin), k - begin, dtype=dtype)
                rows = torch.nn.functional.pad(units, (begin, 0)).to(device)
                out[:, begin : begin + UNITS] = module(rows).T.to(out.dtype).cpu()
    finally:
        if bias is not None:
            module.bias = bias
    return out


def _method(method: Any) -> tuple[str, Any]:
    """A name for the delta's config, and transformers' quantization config, or None."""
    if not isinstance(method, str):
        if not hasattr(method, "quant_method"):
            raise ValueError(
                f"quantized_base: expected one of {', '.join(METHODS)} or a quantization config of transformers, got "
                f"{type(method).__name__}"
            )
        return str(getattr(method.quant_method, "value", method.quant_method)), method
    if method not in METHODS:
        raise ValueError(f"quantized_base: expected one of {', '.join(METHODS)}, got {method!r}")
    try:
        return method, _config(method)
    except ImportError as error:
        raise Error(f"quantized_base: {method} needs a library that is not there: {error}") from error


def _config(method: str) -> Any:
    import transformers

    if method == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if method == "stored":
        return None
    import bitsandbytes  # noqa: F401 - for the error where it is missing

    if method == "bnb-int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _load(source: Checkpoint, config: Any, dtype: str, device_map: Any) -> Any:
    from .merged_model import quiet
    from .sources import model_class

    options = {} if config is None else {"quantization_config": config}
    if type(config).__name__ == "BitsAndBytesConfig" and device_map is None:
        device_map = {"": "cpu"}  # it asks for a GPU otherwise
    try:
        with quiet():
            kind = model_class(source.config)
            return kind.from_pretrained(source.root, dtype=dtype, device_map=device_map, **options).eval()
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise Error(f"{source.root}: transformers does not load it quantised: {text}") from error


def _names(model: Any, modules: dict[str, Any], source: Checkpoint) -> dict[str, Any]:
    """Checkpoint name of a weight -> its quantised module. A base that is quantised itself has names of its own."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    found = {}
    for path, module in modules.items():
        name = f"{path}.weight"
        candidates = (name, name.removeprefix(prefix), prefix + name)
        found[next((candidate for candidate in candidates if candidate in source), name)] = module
    return found


def _plain(source: Checkpoint, known: dict[str, Any]) -> list[str]:
    """The base's tensors that are no part of a quantised weight; of tied ones the first."""
    parts = {name.removesuffix("weight") for name in known}
    found = []
    for name in source:
        owner = next((part for part in parts if name.startswith(part)), None)
        if name not in source.aliases and (owner is None or name == f"{owner}bias"):
            found.append(name)
    return found


def _tensors(
    model: Any, source: Checkpoint, plain: list[str], known: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    from .change import as_torch

    for name in plain:
        yield name, as_torch(source[name].array())
    for name, module in known.items():
        yield name, weight_of(module, model.dtype, model.device)


def _write(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Files of SHARD_BYTES, and an index of them."""
    from safetensors.torch import save_file

    part: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    size = total = number = 0

    def flush() -> None:
        nonlocal part, size, number
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
        part, size = {}, 0

    for name, tensor in tensors:
        part[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD_BYTES:
            flush()
    if part:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_files(folder: Path, source: Checkpoint, method: str) -> None:
    for name, path in source.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    if "quantization_config" in source.config:
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    mark = json.dumps(_mark(source, method), indent=2) + "\n"
    (folder / DEQUANTIZED).write_text(mark, encoding="utf-8")


def _mark(source: Checkpoint, method: str) -> dict[str, str | None]:
    return {**source.origin, "quantized": method, "fingerprint": source.identity}
