"""A DeltaModel on disk, and a tenant written into the base's own weights.

OUT/bitdelta_model.json    base: id or folder, revision; deltas: name -> sub-folder
OUT/delta-I/               the tenant's packed delta or LoRA adapter, as it was loaded
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import Error, FormatError
from .folder import PendingFolder, refuse_existing, refuse_inside
from .header import read_json
from .hub import SAVED, TENANT, resolve
from .layout import inside
from .tenant_config import set_key

if TYPE_CHECKING:
    from .model import DeltaModel

VERSION = 1


@dataclass(frozen=True)
class Saved:
    base: str
    revision: str | None
    deltas: dict[str, Path]


def save(model: DeltaModel, out_dir: Path) -> None:
    """Writes the folder; it appears whole or not at all."""
    refuse_existing(out_dir)
    base = model.base
    refuse_inside(out_dir, base.root, *model.folders.values())
    folders = {name: f"{TENANT}{i}" for i, name in enumerate(model.deltas)}
    about = {
        "format_version": VERSION,
        "base": base.id or str(base.root.resolve()),
        "revision": base.revision,
        "deltas": folders,
    }
    folder = PendingFolder(out_dir)
    try:
        folder.clear()
        for name, sub in folders.items():
            shutil.copytree(model.folders[name], folder.path / sub)
        (folder.path / SAVED).write_text(
            json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        folder.publish()
    finally:
        folder.discard()


def read_saved(source: str | os.PathLike[str], revision: str | None) -> Saved | None:
    """What `save` wrote, or None where the source is something else."""
    root = resolve(source, revision).root
    if not (root / SAVED).is_file():
        return None
    about = read_json(root / SAVED)
    base, revision, deltas = (about.get(key) for key in ("base", "revision", "deltas"))
    if (
        about.get("format_version") != VERSION
        or not isinstance(base, str)
        or not isinstance(revision, str | None)
        or not isinstance(deltas, dict)
        or not all(isinstance(sub, str) for sub in deltas.values())
    ):
        raise FormatError(f"{root / SAVED}: expected format_version {VERSION}, base, revision and deltas")
    return Saved(base, revision, {name: inside(root, sub) for name, sub in deltas.items()})


def push(model: DeltaModel, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Uploads the folder that `save` writes; returns its address."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model")
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "model")
    return str(getattr(found, "repo_url", None) or found)


def merge_into(model: DeltaModel, name: str | None) -> Any:
    """The base model with a tenant's weights and settings; without a name, the base itself."""
    site, base = model.site, model.model
    if name is not None:
        with model.pool.use([name]) as (tenant,), torch.no_grad():
            tenant.wait()
            for parameter in tenant.changes:
                _refuse_quantised(parameter, site.parameters[parameter])
            if tenant.vocabulary is not None and tenant.vocabulary != site.vocabulary:
                base.resize_token_embeddings(tenant.vocabulary, mean_resizing=False)
            done: set[int] = set()
            for parameter, change in tenant.changes.items():
                _replace(base, parameter, change, site.parameters[parameter], done)
            for path, own in tenant.modules.items():
                base.set_submodule(path, own)
            for path, settings in tenant.settings.items():
                vars(base.get_submodule(path)).update(settings)
            for key, value in tenant.config.items():
                set_key(base.config, key, value)
            if tenant.vocabulary is not None:
                base.config.get_text_config().vocab_size = tenant.vocabulary
            base.generation_config.eos_token_id = list(tenant.eos) or None
            base.generation_config.pad_token_id = tenant.pad
    for wrapped in model.wrapped:
        for method, found in list(vars(wrapped.module).items()):
            if found is wrapped:
                object.__delattr__(wrapped.module, method)
    for other in model.deltas:
        model.pool.unload(other)
    model.sources.clear()
    model.folders.clear()
    return base


def _refuse_quantised(name: str, parameter: torch.Tensor) -> None:
    if type(parameter) not in (torch.Tensor, nn.Parameter, nn.Buffer) or not parameter.is_floating_point():
        raise Error(f"{name}: a quantised weight; merge into the base before it is quantised: bitdelta merge")


def _replace(base: Any, parameter: str, change: Any, before: torch.Tensor, done: set[int]) -> None:
    path, _, leaf = parameter.rpartition(".")
    module = base.get_submodule(path)
    value = change.expand(before)
    target = getattr(module, leaf)
    if target.shape == value.shape:
        if id(target) not in done:
            target.copy_(value)
            done.add(id(target))
    elif isinstance(target, nn.Parameter):
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
