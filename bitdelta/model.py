"""A model of transformers in which every row of a batch may belong to another fine-tune of it.

    model = DeltaModel.from_pretrained("llama")
    model.load_delta("math", "llama-math-delta")             # a packed delta, or a PEFT LoRA folder
    model.generate(**batch, delta_names=["math", None])      # None or "__base__": the base

The base's weights are there once. A tenant adds its signs, which on the CPU stay in the file's memory map, and what its
delta stores whole. Batches may run in several threads at once.

On GPUs (`device_map="cuda"` or "auto", or `.to("cuda")`) what a tenant changes is on the device of the module that it
changes. Of more tenants than `max_resident` the others wait in pinned memory (`host_resident`) and come on a stream of
their own: `prefetch` a tenant before its batch, and the batch waits for nothing but what it is about to use.

A decode step over a static cache can be captured into a CUDA graph: open `model.batch(names, n_rows)`, run the step
once, then capture it inside the same batch. The graph is good as long as that batch is open. What waits for the GPU and
so cannot be captured: that first run, `generate`'s own loop, experts of which some are whole or not in bf16, tables of
positions given in one dimension.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .batch import Batch, current
from .checkpoint import Checkpoint, open_checkpoint
from .hub import resolve
from .linear_forward import LinearForward
from .modules import install
from .site import Site
from .sources import tenant_from
from .tenant import Tenant, TenantPool, unknown
from .transfer import Lanes, Parcel
from .wrapped import Wrapped

logger = logging.getLogger("bitdelta")
BASE = "__base__"  # as in PEFT
INPUTS = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_features",
    "input_values",
)  # fmt: skip


class DeltaModel(nn.Module):  # type: ignore[misc]
    """A base model of transformers and its tenants.

    Args:
        model: of transformers; its modules get another `forward`, its parameters need no gradients any more.
        base: the folder or Hub id that it was loaded from.
        max_resident: how many tenants are in memory, or on the GPUs, at once; None: all.
        prefill: "exact", or "merged": where every tenant of a batch has 128 tokens or more at once, linears expand
            round(base + delta) by panels: prompts take some 2/3 of the time, and are rounded once more, as in a
            merged model.
        host_resident: how many tenants the host keeps in (pinned) memory beside those, so that one comes back without
            being read from its folder; None: all.
    """

    def __init__(
        self,
        model: Any,
        base: str | os.PathLike[str],
        max_resident: int | None = None,
        prefill: str = "exact",
        host_resident: int | None = 0,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
        if prefill not in ("exact", "merged"):
            raise ValueError(f"prefill: expected 'exact' or 'merged', got {prefill!r}")
        super().__init__()
        self.prefill = prefill
        self.model = model
        self.base: Checkpoint = open_checkpoint(base)
        self.site = Site(model)
        self.pool = TenantPool(max_resident, host_resident)
        self.lanes = Lanes()
        self.active: str | None = None
        self.wrapped: list[Wrapped] = []
        self.sources: dict[str, str] = {}  # as the caller named them
        self.folders: dict[str, Path] = {}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.register_forward_pre_hook(_note_rows, with_kwargs=True)
        if getattr(model.config, "is_encoder_decoder", False):  # generate runs its encoder by itself
            model.get_encoder().register_forward_pre_hook(_note_rows, with_kwargs=True)

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str],
        max_resident: int | None = None,
        revision: str | None = None,
        prefill: str = "exact",
        host_resident: int | None = 0,
        **options: Any,
    ) -> DeltaModel:
        """Loads the base.

        Args:
            base: a checkpoint, a folder or Hub id, or a folder that `save_pretrained` wrote.
            revision: the Hub revision.
            max_resident, prefill, host_resident: see the class.
            options: for transformers' own from_pretrained (dtype, device_map, quantization_config, ...).
        """
        from .saved import read_saved
        from .sources import model_class

        saved = read_saved(base, revision)
        source = saved.base if saved else base
        checkpoint = open_checkpoint(source, saved.revision if saved else revision)
        model = model_class(checkpoint.config).from_pretrained(checkpoint.root, **options).eval()
        found = cls(model, checkpoint.root, max_resident, prefill, host_resident)
        for name, path in saved.deltas.items() if saved else ():
            found.load_delta(name, path)
        return found

    def load_delta(
        self,
        name: str,
        path: str | os.PathLike[str],
        revision: str | None = None,
        pin: bool = False,
        allow_base: str | None = None,
    ) -> None:
        """Adds a tenant; batches that run are not disturbed.

        Args:
            name: what batches call it.
            path: a packed delta or a PEFT LoRA adapter, a folder or Hub id.
            revision: the Hub revision.
            pin: never evict it.
            allow_base: "quantized": the base's files are quantised, so that fingerprints cannot be compared.

        Raises:
            bitdelta.BaseMismatchError: the delta of another base, or one that cannot run beside other rows.
            bitdelta.FormatError: not a packed delta.
            ValueError: the name is taken.
        """
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"name: expected a name other than {BASE!r}, got {name!r}")

        # found once: where an evicted tenant comes from does not depend on the working directory or on the Hub's news
        folder = resolve(path, revision).root.absolute()

        def make() -> Tenant | Parcel:
            tenant = tenant_from(name, folder, self.site, self.base, allow_base)
            self._install(tenant)
            return self.lanes.staged(tenant, self.site)

        self.pool.load(name, make, pin)
        logger.info("%s: loaded from %s", name, path)
        self.sources[name] = f"{path}@{revision}" if revision else os.fspath(path)
        self.folders[name] = folder
        self._size_vocabulary()

    def unload_delta(self, name: str) -> None:
        """Forgets a tenant. Error where a batch runs with it."""
        self.pool.unload(name)
        logger.info("%s: unloaded", name)
        self.sources.pop(name, None)
        self.folders.pop(name, None)
        if self.active == name:
            self.active = None
        self._size_vocabulary()

    def set_delta(self, name: str | None) -> None:
        """Sets the tenant of rows that name none; None or "__base__": the base."""
        name = None if name == BASE else name
        if name is not None and name not in self.pool.names:
            raise unknown(name, self.pool.names)
        self.active = name

    def pin_delta(self, name: str, pinned: bool = True) -> None:
        """Keeps a tenant in memory whatever else is loaded, or (False) no longer."""
        self.pool.pin(name, pinned)

    def prefetch(self, name: str) -> None:
        """Brings a tenant into memory for a batch to come; on a GPU it arrives while other batches run.

        Reads its folder first where neither the GPU nor the host has it.

        Raises:
            KeyError: there is none of this name.
            bitdelta.Error: no room beside tenants that are pinned, in use or on their way.
        """
        self.pool.prefetch(name)

    @property
    def deltas(self) -> list[str]:
        """The tenants' names."""
        return list(self.sources)

    def source(self, name: str) -> str:
        """The folder or Hub id that a tenant was loaded from."""
        if name not in self.sources:
            raise unknown(name, self.sources)
        return self.sources[name]

    def forward(
        self, *args: Any, delta_names: str | Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """The model's forward; `delta_names`: per row a tenant, None or "__base__". One name is for all rows."""
        names = kwargs.pop("adapter_names", None) if delta_names is None else delta_names
        with self.batch(names, _count_rows(args, kwargs)):
            return self.model(*args, **kwargs)

    def generate(
        self, *args: Any, delta_names: str | Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """The model's generate; rows of different tenants may end with different tokens."""
        from .generate import generate

        names = kwargs.pop("adapter_names", None) if delta_names is None else delta_names
        return generate(self, names, *args, **kwargs)

    @contextmanager
    def batch(self, names: str | Sequence[str | None] | None, n_rows: int) -> Iterator[Batch]:
        """Runs the block's calls of `self.model` with these tenants, which stay resident meanwhile."""
        rows = self._names(names, n_rows)
        order = {name: i for i, name in enumerate(self.sources)}  # the same for the same tenants in any rows
        distinct = sorted({name for name in rows if name is not None}, key=lambda name: order.get(name, -1))
        with self.pool.use(distinct) as tenants:
            index: dict[str | None, int] = {name: i for i, name in enumerate(distinct)}
            index[None] = -1
            ids = np.array([index[name] for name in rows], np.int64)
            batch = Batch(tenants, ids, self.vocabulary, self.prefill)
            token = current.set(batch)
            try:
                yield batch
            finally:
                current.reset(token)

    @property
    def vocabulary(self) -> int | None:
        """How many logits a row has: the most that any resident tenant has."""
        sizes = [tenant.vocabulary for tenant in self.pool.resident if tenant.vocabulary is not None]
        return None if self.site.vocabulary is None else max([self.site.vocabulary, *sizes])

    def _names(self, names: str | Sequence[str | None] | None, n_rows: int) -> list[str | None]:
        if names is None or isinstance(names, str):
            names = [self.active if names is None else names] * n_rows
        try:
            names = list(names)
        except TypeError:
            kind = type(names).__name__
            raise TypeError(f"delta_names: expected a name or a list of names, got {kind}") from None
        if len(names) != n_rows:
            raise ValueError(f"delta_names: expected {n_rows} names, one per row, got {len(names)}")
        wrong = next((name for name in names if not isinstance(name, str | None)), None)
        if wrong is not None:
            raise TypeError(f"delta_names: expected names, or None for the base, got {str(wrong)[:80]!r}")
        return [None if name == BASE else name for name in names]

    def _install(self, tenant: Tenant) -> None:
        for path in (*tenant.by_module, *tenant.modules, *tenant.settings):
            for wrapped in install(self.model, path):
                self.wrapped.append(wrapped)
        for wrapped in self.wrapped:
            if isinstance(wrapped, LinearForward):
                wrapped.is_head = wrapped.path == self.site.head

    def _size_vocabulary(self) -> None:
        """Tells the model how many logits it returns; beam search and losses ask its config."""
        if self.site.vocabulary is not None and hasattr(self.model.config, "get_text_config"):
            self.model.config.get_text_config().vocab_size = self.vocabulary

    def _apply(self, fn: Any, recurse: bool = True) -> DeltaModel:
        """What .to and its like come down to: tenants follow the model at their next use."""
        before = self.site.devices
        super()._apply(fn, recurse)
        if self.site.devices != before:
            self.pool.reset()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def __repr__(self) -> str:
        base = str(self.base.root)
        return f"DeltaModel({type(self.model).__name__}, base={base!r}, deltas={self.deltas})"

    def _repr_html_(self) -> str:
        from .display import panel, size

        resident = {tenant.name: tenant for tenant in self.pool.resident}
        parameters = sum(parameter.nbytes for parameter in self.model.parameters())
        facts = {
            "base": str(self.base.root),
            "its parameters": size(parameters),
            "resident deltas": f"{len(resident)}, {size(sum(tenant.nbytes for tenant in resident.values()))}",
        }
        rows = []
        for name, source in self.sources.items():
            tenant = resident.get(name)
            rows.append(
                [name, source, *((tenant.kind, size(tenant.nbytes)) if tenant else ("", "not resident"))]
            )
        title = f"DeltaModel of {type(self.model).__name__}"
        return panel(title, facts, ("delta", "from", "kind", "in memory"), rows)

    def coverage(self, name: str) -> dict[str, Any]:
        """How a tenant's parameters run beside other rows; see `bitdelta.coverage`."""
        from .coverage import coverage

        with self.pool.use([name]) as (tenant,):
            return coverage(self.site, tenant)

    def merge_and_unload(self, name: str | None = None) -> Any:
        """The plain model of transformers with one tenant's weights in place; this object is of no use afterwards."""
        from .saved import merge_into

        return merge_into(self, name or self.active)

    def save_pretrained(self, out_dir: str | os.PathLike[str]) -> None:
        """Writes the tenants' folders and the name of the base, for `from_pretrained`."""
        from .saved import save

        save(self, Path(out_dir))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes; options are huggingface_hub's (private, token, ...)."""
        from .saved import push

        return push(self, repo_id, **options)


def _count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """B, of the first input that is a tensor."""
    for value in (*(kwargs.get(name) for name in INPUTS), *args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim:
            return len(value)
    raise ValueError("expected a tensor among the inputs, such as input_ids")


def _note_rows(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    batch = current.get()
    if batch is not None:
        name = "decoder_input_ids" if kwargs.get("decoder_input_ids") is not None else None
        batch.rows = len(kwargs[name]) if name else _count_rows(args, kwargs)
