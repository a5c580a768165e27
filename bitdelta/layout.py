"""Which files of a folder hold the weights, and which formats are refused with the command that converts them.

The order is transformers': model.safetensors, its index, pytorch_model.bin, its index; then the one other file of
either kind. Every file must lie inside the folder, or inside the Hub cache's repository that the folder belongs to
(its snapshots are links to ../../blobs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from .errors import FormatError
from .header import read_json

PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NOT_WEIGHTS = (  # files of these kinds that are no model's weights
    "adapter_model*",
    "delta_model*",
    "training_args.bin",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "random_states*",
    "rng_state*",
    "custom_checkpoint*",
)


@dataclass(frozen=True)
class Weights:
    """The files that hold a checkpoint's weights and, of a sharded one, its index: tensor name -> file name."""

    files: list[Path]
    index: Path | None = None
    weight_map: dict[str, str] = field(default_factory=dict)


def find_weights(root: Path) -> Weights:
    """The weights of the checkpoint in the folder `root`.

    Raises:
        FormatError: none, several candidates, a format that is not read, a bad index, files that lead elsewhere.
    """
    names = _names(root)
    chosen = next((name for name in PREFERRED if name in names), None) or _only_other(root, names)
    if chosen is None:
        raise FormatError(_why_none(root, names))
    path = contained(root, chosen)
    if not chosen.endswith(".index.json"):
        return Weights([path])
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map: expected an object of tensor name -> file name")
    kind = ".safetensors" if ".safetensors" in chosen else ".bin"
    for tensor, name in weight_map.items():
        if not tensor.isprintable():
            raise FormatError(f"{path}: expected a printable name, got {tensor[:200]!r}")
        if not _is_plain_name(name) or not name.endswith(kind):
            raise FormatError(
                f"{path}: {tensor[:200]}: expected the name of a {kind} file in this folder, got {str(name)[:200]!r}"
            )
    shards = dict.fromkeys(weight_map.values())  # each once, in the index's order
    return Weights([contained(root, name) for name in shards], path, weight_map)


def contained(root: Path, name: str) -> Path:
    """root/name, when that is a file which lies where it seems to lie."""
    path = inside(root, name)
    if not path.exists():
        raise FormatError(f"{path}: missing; the download or copy is not complete")
    return path


def inside(root: Path, name: str) -> Path:
    """root/name, there or not, unless it is a link that leads outside the folder."""
    path = root / name
    try:
        real, limit = path.resolve(), _limit(root.resolve())
        path.exists()
    except (OSError, RuntimeError) as error:  # a link that leads to itself, a name beyond the system's limit
        raise FormatError(f"{path}: {error}") from error
    if not real.is_relative_to(limit):
        raise FormatError(f"{path}: a link that leads outside {limit}, to {real}; put the file itself there")
    return path


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and "\\" not in name and name.isprintable()


def _limit(root: Path) -> Path:
    """Where links of `root` may lead: root, or the Hub cache's repository around it."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and (repository / "blobs").is_dir():
            return repository
    return root


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_symlink() or not path.is_dir())


def _only_other(root: Path, names: list[str]) -> str | None:
    """The one index, else the one file, that has another name than the usual; safetensors first."""
    usable = [name for name in names if not any(fnmatch(name, pattern) for pattern in NOT_WEIGHTS)]
    for kind in (".safetensors", ".bin"):
        for ending in (kind + ".index.json", kind):
            found = [name for name in usable if name.endswith(ending)]
            if len(found) == 1:
                return found[0]
            if found:
                raise FormatError(
                    f"{root}: expected model{kind} or one index of shards, got {len(found)} *{ending} files: "
                    f"{', '.join(found[:3])}{' ...' if len(found) > 3 else ''}; the index is missing?"
                )
    return None


def _why_none(root: Path, names: list[str]) -> str:
    """What the folder holds instead of weights that are read, and the command that converts it."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    for folder in (root, *folders):
        inside = sorted(path.name for path in folder.iterdir())
        if ".metadata" in inside and any(name.endswith(".distcp") for name in inside):
            return (
                f"{root}: a PyTorch distributed checkpoint (DCP), not read; convert it: "
                f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt; "
                "of accelerate or transformers with FSDP: "
                f"accelerate merge-weights {folder} OUT"
            )
        if _matches(
            inside, "zero_to_fp32.py", "*_optim_states.pt", "mp_rank_*_model_states.pt", "zero_pp_rank_*"
        ):
            where = folder.parent if folder.name.startswith("global_step") else folder
            return (
                f"{root}: a DeepSpeed ZeRO checkpoint, not read; convert it: "
                f"python -m deepspeed.utils.zero_to_fp32 {where} OUT --safe_serialization"
            )
    everything = [*names, *(folder.name for folder in folders)]
    for patterns, kind, advice in _OTHERS:
        found = _matches(everything, *patterns)
        if found:
            return f"{root}: {kind} ({found}), not read; {advice.format(root=root)}"
    return f"{root}: no weights: expected {', '.join(PREFERRED)}" + (
        f"; it holds {', '.join(everything[:5])}{' ...' if len(everything) > 5 else ''}"
        if everything
        else ", it is empty"
    )


def _matches(names: list[str], *patterns: str) -> str | None:
    return next((name for name in names if any(fnmatch(name, pattern) for pattern in patterns)), None)


_OTHERS = (
    (
        ("delta_config.json", "delta_model*"),
        "a packed delta, not a checkpoint",
        "bitdelta merge BASE {root} --out DIR makes one",
    ),
    (
        ("adapter_config.json", "adapter_model*"),
        "a PEFT adapter, not a full checkpoint",
        "load it with peft and save merge_and_unload()",
    ),
    (
        ("latest_checkpointed_iteration.txt", "mp_rank_*", "iter_0*", "*.nemo"),
        "a Megatron or NeMo checkpoint",
        "export it to Hugging Face format with Megatron's tools/checkpoint/convert.py or NeMo's exporters",
    ),
    (
        ("global_step*",),
        "a DeepSpeed ZeRO checkpoint",
        "convert it: python -m deepspeed.utils.zero_to_fp32 {root} OUT --safe_serialization",
    ),
    (("*.gguf", "*.ggml"), "a GGUF file, quantised", "use the checkpoint that it was made from"),
    (
        ("consolidated.*.pth", "consolidated*.pth"),
        "Meta's own Llama format",
        "convert it with transformers/models/llama/convert_llama_weights_to_hf.py",
    ),
    (
        ("*.pth", "*.pt", "*.ckpt"),
        "a PyTorch file of unknown content",
        "load it in its own project and save with model.save_pretrained(OUT)",
    ),
    (
        ("*.msgpack",),
        "Flax weights",
        "convert it: from_pretrained({root!r}, from_flax=True) of transformers 4",
    ),
    (
        ("*.h5", "*.ckpt.index"),
        "TensorFlow weights",
        "convert it: from_pretrained({root!r}, from_tf=True) of transformers 4",
    ),
    (
        ("*.npz", "*.onnx", "*.ot", "*.mlpackage"),
        "a format of another framework",
        "use the PyTorch checkpoint",
    ),
)
