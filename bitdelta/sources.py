"""From a folder to a tenant, and from a config to the class of transformers that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .checkpoint_model import read_config
from .errors import BaseMismatchError, Error
from .header import read_json
from .packfile import Packfile, load
from .quantized import quantized_modules
from .site import Site
from .tenant import Tenant, changes_of
from .tenant_config import Own, difference, end_tokens, own_parts


def model_class(config: dict[str, Any]) -> Any:
    """The class that config.json names; AutoModelForCausalLM where it names none, or code that comes with it.

    Raises:
        bitdelta.Error: transformers has no such class.
    """
    import transformers

    names = config.get("architectures") or ()
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    if names and "auto_map" not in config:
        raise Error(f"config.json: transformers {transformers.__version__} has no {names[0]}")
    return transformers.AutoModelForCausalLM


def tenant_from(name: str, root: Path, site: Site, base: Checkpoint, allow_base: str | None) -> Tenant:
    """The tenant of a packed delta's folder, or of a PEFT LoRA adapter's."""
    if allow_base not in (None, "quantized"):
        raise ValueError(f"allow_base: expected 'quantized' or None, got {allow_base!r}")
    if (root / "adapter_config.json").is_file():
        from .lora import lora_tenant

        return lora_tenant(name, root, site)
    packfile = load(root)
    if allow_base is None:
        packfile.check_base(base)
    else:
        _check_quantized(packfile, site, base)
    return _packed(name, packfile, site, base)


def _check_quantized(packfile: Packfile, site: Site, base: Checkpoint) -> None:
    """The base has the id or the values of the one that the delta was made from, and is quantised where that was."""
    made_from = packfile.config.get("base", {})
    has_id = base.id is not None and made_from.get("id") == base.id
    has_values = made_from.get("fingerprint") == base.identity or all(
        packfile.has_base(name, base) for name in packfile.entries
    )
    if not has_id and not has_values:
        raise BaseMismatchError(
            f"{packfile.root} was made from {made_from.get('id') or made_from.get('name')}, the base is "
            f"{base.id or base.root}; where the base is quantised, their Hub ids or all their files must be the same"
        )
    if packfile.quantized is not None and not quantized_modules(site.model):
        raise BaseMismatchError(
            f"{packfile.root} was made over a base quantised by {packfile.quantized}, and this model's is not quantised"
        )


def _packed(name: str, packfile: Packfile, site: Site, base: Checkpoint) -> Tenant:
    files = packfile.files()
    changed: dict[str, Any] = {}
    own: dict[str, Any] = {}
    parts = Own()
    is_tied = False
    if "config.json" in files:
        own = read_json(files["config.json"])
        finetuned = read_config(files["config.json"])
        changed = difference(read_config(base.files["config.json"]), finetuned)
        parts = own_parts(site.model, finetuned, changed, str(packfile.root))
        is_tied = bool(finetuned.tie_word_embeddings)
    changes = changes_of(packfile, base, site, is_tied)
    head = changes.get(f"{site.head}.weight")
    generation = None
    if "generation_config.json" in files:
        generation = read_json(files["generation_config.json"])
    eos, pad = end_tokens(generation, own, getattr(site.model, "generation_config", None))
    return Tenant(
        name=name,
        kind="delta",
        changes=changes,
        vocabulary=site.vocabulary if head is None else int(head.shape[0]),
        eos=eos,
        pad=pad,
        generation=generation,
        modules=parts.modules,
        settings=parts.settings,
        config=changed,
        by_module=site.by_module(changes),
    )
