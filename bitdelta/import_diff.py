"""Converts a `diff.pt` of the original BitDelta project into a packfile.

    MODULE.mask    int32 [K/32, N]   bit i of word w = input row 32 w + i, 1 means +; of MODULE.weight [N, K]
    MODULE.coeff   float32 []        the one scale of that weight
    MODULE.A, .B   [K, r], [r, N]    low-rank: weight += (A B)^T; stored whole, as base + (A B)^T
    NAME           any               a tensor of the fine-tune, stored whole

The masks' words are ours; only their order changes: word w of output row n goes to line w of strip n/16.
The file says nothing about its base, so names and shapes are checked against the base that the caller gives.

Source: FasterDecoding/BitDelta, bitdelta/diff.py and bitdelta/binary_gemm_kernel.py (formats only).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .array import aligned_empty, from_float32, to_float32
from .checkpoint import Checkpoint, Tensor, open_checkpoint
from .delta import Delta
from .errors import BaseMismatchError, FormatError
from .forms import VOCABULARY
from .torchfile import open_torch_file

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def import_diff(
    diff_pt: str | os.PathLike[str], base_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Writes the packfile `out_dir` that holds what `diff_pt` changes in `base_dir`.

    Args:
        diff_pt: a file written by the original project's `save_diff`; never unpickled.
        base_dir: the base checkpoint, a folder or Hub id.
        out_dir: the packfile to write; it must not exist.

    Returns:
        A dict that JSON can hold: `out`, and how many tensors are `packed`, `whole`, `lowrank` and `same`.

    Raises:
        bitdelta.FormatError: not such a file, or parts of it that do not belong together.
        bitdelta.BaseMismatchError: names or shapes that the base does not have.
    """
    tensors = open_torch_file(diff_pt)
    base = open_checkpoint(base_dir)
    masks, lowrank, whole = _sort(tensors, base, Path(diff_pt))
    report = {
        "out": str(out_dir),
        "packed": len(masks),
        "whole": len(whole),
        "lowrank": len(lowrank),
        "same": len(set(base) - set(masks) - set(lowrank) - set(whole)),
    }
    _write(base, contents(base, tensors, masks, lowrank, whole), _config(base, tensors), Path(out_dir))
    return report


def contents(
    base: Checkpoint,
    tensors: dict[str, Tensor],
    masks: dict[str, str],
    lowrank: dict[str, str],
    whole: list[str],
) -> Iterator[tuple[str, Delta | np.ndarray | None]]:
    """What becomes of every tensor of the base, in order: a Delta, a whole tensor, or None (the same)."""
    kept = set(whole)
    for name in base:
        if name in masks:
            module = masks[name]
            yield name, delta(tensors[module + ".mask"], tensors[module + ".coeff"])
        elif name in lowrank:
            yield name, _lowrank(tensors, lowrank[name], base[name])
        elif name in kept:
            yield name, tensors[name].array()
        else:
            yield name, None


def strips(mask: np.ndarray) -> np.ndarray:
    """mask int32 [K/32, N] -> sign uint32 [1, ceil(N/16), 8 ceil(K/256), 16], padded with zero bits."""
    words, n = mask.shape
    sign = aligned_empty((1, -(-n // 16), 8 * -(-words // 8), 16), np.uint32)
    sign[...] = 0
    source = np.ascontiguousarray(mask).view(np.uint32)
    for strip in range(sign.shape[1]):
        columns = source[:, 16 * strip : 16 * strip + 16]
        sign[0, strip, :words, : columns.shape[1]] = columns
    return sign


def delta(mask: Tensor, coeff: Tensor) -> Delta:
    """One mask and its scale as a Delta of form 'tensor'."""
    words, n = mask.shape
    scale = np.full((1, n), np.asarray(to_float32(coeff.array())).reshape(()), np.float32)
    return Delta(sign=strips(mask.array()), scale=scale, column=None, shape=(n, 32 * words), form="tensor")


def _sort(
    tensors: dict[str, Tensor], base: Checkpoint, path: Path
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Weight name -> module of masks and of low-rank pairs, and the names of the whole tensors; checked."""
    masks: dict[str, str] = {}
    lowrank: dict[str, str] = {}
    whole: list[str] = []
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "mask":
            weight = _weight(base, module, name, path)
            _check_mask(tensors, module, base[weight].shape, path)
            masks[weight] = module
        elif part == "A" and module + ".B" in tensors:
            weight = _weight(base, module, name, path)
            _check_lowrank(tensors, module, base[weight].shape, path)
            lowrank[weight] = module
        elif part == "coeff" and module + ".mask" in tensors or part == "B" and module + ".A" in tensors:
            continue
        elif part in ("coeff", "A", "B") and name not in base:
            partner = {"coeff": "mask", "A": "B", "B": "A"}[part]
            raise FormatError(f"{path}: {name} without {module}.{partner}")
        else:
            _check_whole(tensor, base, name, path)
            whole.append(name)
    twice = sorted((set(masks) & set(lowrank)) | ((set(masks) | set(lowrank)) & set(whole)))
    if twice:
        raise FormatError(f"{path}: {twice[0]} is given in two forms")
    if not masks and not lowrank:
        raise FormatError(f"{path}: no NAME.mask in it; not a diff.pt of the original project")
    return masks, lowrank, whole


def _weight(base: Checkpoint, module: str, name: str, path: Path) -> str:
    weight = module + ".weight"
    if weight not in base:
        raise BaseMismatchError(
            f"{path}: {name}: the base {base.root} has no {weight}; is it the right base?"
        )
    if len(base[weight].shape) != 2 or base[weight].dtype not in DTYPES:
        raise BaseMismatchError(f"{path}: {name}: {weight} of the base is not a matrix of floats")
    return weight


def _check_mask(tensors: dict[str, Tensor], module: str, shape: tuple[int, ...], path: Path) -> None:
    mask, coeff = tensors[module + ".mask"], tensors.get(module + ".coeff")
    n, k = shape
    if coeff is None:
        raise FormatError(f"{path}: {module}.mask without {module}.coeff")
    if mask.dtype != "I32" or len(mask.shape) != 2:
        raise FormatError(
            f"{path}: {module}.mask: expected int32 [K/32, N], got {mask.dtype} {list(mask.shape)}"
        )
    if k % 32 or mask.shape != (k // 32, n):
        raise BaseMismatchError(
            f"{path}: {module}.mask: expected [K/32, N] = [{k}/32, {n}] as in the base, "
            f"got {list(mask.shape)}"
        )
    if coeff.dtype not in DTYPES or coeff.shape not in ((), (1,)):
        raise FormatError(
            f"{path}: {module}.coeff: expected one float, got {coeff.dtype} {list(coeff.shape)}"
        )
    if not np.isfinite(np.asarray(to_float32(coeff.array()))).all():
        raise FormatError(f"{path}: {module}.coeff is NaN or Inf")


def _check_lowrank(tensors: dict[str, Tensor], module: str, shape: tuple[int, ...], path: Path) -> None:
    a, b = tensors[module + ".A"], tensors[module + ".B"]
    n, k = shape
    if a.dtype not in DTYPES or b.dtype not in DTYPES or len(a.shape) != 2 or len(b.shape) != 2:
        raise FormatError(f"{path}: {module}.A and .B: expected two matrices of floats")
    if (a.shape[0], b.shape[1]) != (k, n) or a.shape[1] != b.shape[0]:
        raise BaseMismatchError(
            f"{path}: {module}.A, .B: expected [{k}, r], [r, {n}] as in the base, "
            f"got {list(a.shape)}, {list(b.shape)}"
        )


def _check_whole(tensor: Tensor, base: Checkpoint, name: str, path: Path) -> None:
    if name not in base:
        raise BaseMismatchError(f"{path}: {name} is not in the base {base.root}; is it the right base?")
    shape = base[name].shape
    # a grown vocabulary changes the first dimension of embeddings and head; nothing else may change
    grown = (
        len(shape) == 2
        and len(tensor.shape) == 2
        and tensor.shape[1] == shape[1]
        and name.endswith(VOCABULARY)
    )
    if tensor.shape != shape and not grown:
        raise BaseMismatchError(
            f"{path}: {name}: expected {list(shape)} as in the base, got {list(tensor.shape)}"
        )


def _config(base: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fine-tune's config: the base's, with the vocabulary that the embeddings or the head have now."""
    rows = {tensor.shape[0] for name, tensor in tensors.items() if name in base and name.endswith(VOCABULARY)}
    if len(rows) > 1:
        raise FormatError(f"the embeddings and the head have different vocabularies: {sorted(rows)}")
    return {**base.config, "vocab_size": rows.pop()} if rows else dict(base.config)


def _write(
    base: Checkpoint,
    items: Iterator[tuple[str, Delta | np.ndarray | None]],
    config: dict[str, Any],
    out_dir: Path,
) -> None:
    """Hands the tensors to the writer one by one; the folder appears as a whole, at the end."""
    from .packfile_writer import PackfileWriter

    with PackfileWriter(out_dir, base, config=config) as writer:
        for name, value in items:
            writer.add(name, value)


def _lowrank(tensors: dict[str, Tensor], module: str, weight: Tensor) -> np.ndarray:
    """base + (A B)^T in the base's dtype."""
    a, b = to_float32(tensors[module + ".A"].array()), to_float32(tensors[module + ".B"].array())
    return from_float32(to_float32(weight.array()) + (a @ b).T, DTYPES[weight.dtype])
