"""The tenants over one base: what each one changes, and which of them are resident.

    Tenant       parameter of the model -> what it becomes (change.py); vocabulary, end and padding tokens
    TenantPool   known by name; loaded when used, the least recently used evicted, never one that is pinned, runs, or
                 is on its way to a GPU

On the CPU signs stay in the file's memory map; only what is stored whole is copied when a tenant is loaded. For a
model on GPUs a tenant is read into pinned memory and brought from there (transfer.py); the pool may keep it there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from .change import Change, Converted, Packed, Stack, Whole, as_torch
from .delta import Delta
from .errors import BaseMismatchError, Error

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .mapping import Conversion, Places
    from .packfile import Packfile
    from .site import Site
    from .transfer import Arrival, Parcel


class UnknownTenantError(Error, KeyError):
    """No tenant has this name."""

    __str__ = Exception.__str__  # KeyError's shows the quotes of the text


def unknown(name: str, names: Iterable[str]) -> UnknownTenantError:
    return UnknownTenantError(f"{name}: no such delta; loaded: {', '.join(names) or 'none'}")


@dataclass(frozen=True, eq=False)
class Tenant:
    """One fine-tune over the base of a model.

    Attributes:
        name: what a batch calls it.
        kind: "delta" or "lora".
        changes: parameter of the model -> what it becomes.
        modules: modules of its own, by path (rotary embeddings, activations).
        settings: attributes of modules that differ (epsilons), by path.
        config: what its config.json changes: key -> value.
        vocabulary: how many logits it has.
        eos, pad: its end and padding tokens.
        generation: its generation_config.json; None: the base's.
    """

    name: str
    kind: str
    changes: dict[str, Change]
    vocabulary: int | None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    generation: dict[str, Any] | None = None
    modules: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, float]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    by_module: dict[str, dict[str, Change]] = field(default_factory=dict)
    arrivals: dict[str, list[Arrival]] = field(default_factory=dict)  # on GPUs, by module

    def bring(self) -> Tenant:
        """A tenant of the CPU is where it is used; a Parcel's has to come."""
        return self

    def wait(self, path: str | None = None) -> None:
        """The calling thread's stream waits for the parameters of a module; None: for all."""
        paths = self.arrivals if path is None else (path,)
        for path in paths:
            for arrival in self.arrivals.get(path, ()):
                arrival.use()

    @property
    def is_here(self) -> bool:
        """Whether all of it has arrived."""
        return all(arrival.is_here for own in self.arrivals.values() for arrival in own)

    def finish(self) -> None:
        """Waits on the host until all of it has arrived."""
        for own in self.arrivals.values():
            for arrival in own:
                arrival.finish()

    def of(self, path: str) -> dict[str, Change]:
        """Parameter within a module -> what it becomes."""
        return self.by_module.get(path, {})

    @cached_property
    def nbytes(self) -> int:
        """Bytes of signs, scales and whole tensors; tied ones count once."""
        return sum(
            change.nbytes for change in {id(change): change for change in self.changes.values()}.values()
        )


def changes_of(packfile: Packfile, base: Checkpoint, site: Site, is_tied: bool = False) -> dict[str, Change]:
    """What a packed delta makes of the model's parameters; `is_tied`: its head is its embeddings.

    Raises:
        bitdelta.BaseMismatchError: a tensor that the model does not have, or that the fine-tune lacks.
    """
    changes: dict[str, Change] = {}
    mapped = site.mapping.map(packfile)
    for name in mapped.unknown:
        if packfile[name] is not None and name not in base and not site.ignores(name):
            raise BaseMismatchError(f"{name}: {packfile.root} has it, the model has no such parameter")
    for name, parameter in mapped.parameters.items():
        change = _change(packfile, name)
        if change is not None:
            changes[parameter] = change
    for conversion in mapped.conversions:
        changes.update(_converted(packfile, base, conversion))
    site.share(changes, set(mapped.parameters.values()))
    if is_tied:
        site.tie_head(changes)
    for name, parameter in site.mapping.map(packfile.config.get("absent", [])).parameters.items():
        if parameter not in changes and not site.is_tied(parameter):
            raise BaseMismatchError(
                f"{name}: the model needs it, the fine-tune {packfile.root} does not have it"
            )
    for parameter, change in changes.items():
        site.check(parameter, change, str(packfile.root))
    return changes


def _change(packfile: Packfile, name: str) -> Change | None:
    value = packfile[name]
    if value is None:
        return None
    if isinstance(value, Delta):
        rows = packfile.rows(name)
        return Packed(value, None if rows is None else as_torch(rows))
    if isinstance(value, tuple):
        return Stack.of(value)
    return Whole(as_torch(value))


def _converted(packfile: Packfile, base: Checkpoint, conversion: Conversion) -> dict[str, Change]:
    """The parameters that a conversion of changed tensors makes."""
    changed = {name: _change(packfile, name) for name in conversion.names}
    if not any(changed.values()):
        return {}
    shapes = {name: tuple(packfile.entries[name]["shape"]) for name in conversion.names}
    places = conversion.places(shapes)
    if places is not None:
        return {target: _stack(parts, changed, shapes) for target, parts in places.items()}

    def tensor(name: str) -> Any:
        change = changed[name]
        if isinstance(change, Whole):
            return change.tensor
        before = as_torch(base[name].array())
        return before if change is None else change.expand(before)

    def empty(name: str) -> Any:
        import torch

        return torch.empty(packfile.entries[name]["shape"], device="meta")

    nbytes = sum(change.nbytes for change in changed.values() if change is not None)
    return {
        target: Converted(partial(_run, conversion, tensor, target), tuple(made.shape), nbytes)
        for target, made in conversion.run(empty).items()
    }


def _stack(places: Places, changed: dict[str, Change | None], shapes: dict[str, tuple[int, ...]]) -> Stack:
    bounds = tuple((begin, end) for _, begin, end in places[0])
    parts: Any = tuple(tuple(changed[name] for name, _, _ in matrix) for matrix in places)
    return Stack(bounds, parts, shapes[places[0][0][0]][1])


def _run(conversion: Conversion, tensor: Callable[[str], Any], target: str) -> Any:
    return conversion.run(tensor)[target]


@dataclass
class _Entry:
    make: Callable[[], Tenant | Parcel]
    host: Tenant | Parcel | None = None  # what brings the tenant, where it is kept
    tenant: Tenant | None = None
    users: int = 0
    is_pinned: bool = False
    loading: threading.Lock = field(default_factory=threading.Lock)


class TenantPool:
    """Tenants by name. Those in use by a batch and those pinned stay; others may go when there is no room.

    Args:
        max_resident: how many are loaded at once; None: all.
        host_resident: how many are kept in the host's memory, whether resident or not, so that they come back without
            their folder; None: all.
    """

    def __init__(self, max_resident: int | None = None, host_resident: int | None = 0) -> None:
        for name, number, least in (("max_resident", max_resident, 1), ("host_resident", host_resident, 0)):
            if number is not None and (type(number) is not int or number < least):
                raise ValueError(f"{name}: expected a number from {least}, got {number!r}")
        self.max_resident, self.host_resident = max_resident, host_resident
        self.n_reads = self.n_loads = self.n_evictions = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def load(self, name: str, make: Callable[[], Tenant | Parcel], pin: bool = False) -> Tenant:
        """Adds a tenant and loads it; an error leaves the pool as it was. `make` reads it from its folder."""
        entry = _Entry(make, is_pinned=pin)
        with self._lock:
            if name in self._entries:
                raise ValueError(f"{name}: a delta of this name is loaded; unload it first")
            self._entries[name] = entry
        try:
            tenant = self._acquire(name)
        except BaseException:
            with self._lock:
                self._entries.pop(name, None)
            raise
        self._release(name)
        return tenant

    def prefetch(self, name: str) -> None:
        """Loads a tenant that a batch will use; on a GPU it arrives while the host goes on.

        Raises:
            UnknownTenantError: there is none of this name.
            bitdelta.Error: there is no room beside those that are pinned, in use or on their way.
        """
        self._acquire(name, may_wait=False)
        self._release(name)

    def reset(self) -> None:
        """Nothing is resident any more, here or on the host: the model is somewhere else. Error where a batch runs."""
        with self._lock:
            busy = [name for name, entry in self._entries.items() if entry.users]
            if busy:
                raise Error(f"{busy[0]}: a batch is running with it; move the model when that is done")
            for entry in self._entries.values():
                entry.host = entry.tenant = None

    def unload(self, name: str) -> None:
        """Forgets a tenant.

        Raises:
            UnknownTenantError: there is none of this name.
            bitdelta.Error: a batch runs with it.
        """
        with self._lock:
            entry = self._known(name)
            if entry.users:
                raise Error(f"{name}: a batch is running with it; unload it when that is done")
            del self._entries[name]

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keeps a tenant resident whatever else is loaded, or (False) no longer."""
        with self._lock:
            self._known(name).is_pinned = pinned

    @property
    def names(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    @property
    def resident(self) -> list[Tenant]:
        """Those in memory, the least recently used first."""
        with self._lock:
            return [entry.tenant for entry in self._entries.values() if entry.tenant is not None]

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[list[Tenant]]:
        """Loads what is not resident and keeps all of them until the end of the block."""
        with self._lock:
            for name in names:
                self._known(name)
        held: list[str] = []
        try:
            tenants = []
            for name in names:
                tenants.append(self._acquire(name))
                held.append(name)
            yield tenants
        finally:
            for name in held:
                self._release(name)

    def _known(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise unknown(name, self._entries)
        return entry

    def _acquire(self, name: str, may_wait: bool = True) -> Tenant:
        with self._lock:
            entry = self._known(name)
            entry.users += 1
            self._entries.move_to_end(name)
        try:
            with entry.loading:
                if entry.tenant is None:
                    with self._lock:
                        self._make_room(name, may_wait)
                    if entry.host is None:
                        entry.host = entry.make()
                        self.n_reads += 1
                    entry.tenant = entry.host.bring()
                    self.n_loads += 1
                with self._lock:
                    self._trim_host()
                return entry.tenant
        except BaseException:
            self._release(name)
            raise

    def _release(self, name: str) -> None:
        with self._lock:
            self._entries[name].users -= 1

    def _trim_host(self) -> None:
        """Leaves the most recently used of those in the host's memory."""
        if self.host_resident is not None:
            kept = [entry for entry in self._entries.values() if entry.host is not None]
            for entry in kept[: max(0, len(kept) - self.host_resident)]:
                entry.host = None

    def _make_room(self, name: str, may_wait: bool) -> None:
        """Evicts until one more fits; those that load now count. One on its way goes last, when it has arrived."""
        if self.max_resident is None:
            return
        resident = [
            (other, entry)
            for other, entry in self._entries.items()
            if other != name and (entry.tenant is not None or entry.loading.locked())
        ]
        excess = len(resident) + 1 - self.max_resident
        if excess <= 0:
            return
        idle = [entry for _, entry in resident if not entry.users and not entry.is_pinned]
        coming = [entry for entry in idle if entry.tenant is not None and not entry.tenant.is_here]
        idle = [entry for entry in idle if entry not in coming] + (coming if may_wait else [])
        if excess > len(idle):
            busy = [other for other, entry in resident if entry not in idle]
            raise Error(
                f"{name}: no room: max_resident is {self.max_resident}, and these are pinned or in use"
                f"{' or on their way' if coming and not may_wait else ''}: {', '.join(busy)}"
            )
        for entry in idle[:excess]:
            if entry in coming and entry.tenant is not None:
                entry.tenant.finish()
            entry.tenant = None
            self.n_evictions += 1
