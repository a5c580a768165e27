"""Tenants on their way to GPUs: packed in pinned memory, copied on a stream of their own, ahead of use.

    Parcel    a tenant in the host's memory: a pinned block for each GPU that has modules of the model, what is used
              first at its beginning
    Lane      the copies to one GPU, on a stream that does nothing else; a block is copied in pieces
    Arrival   a piece: the stream that uses it waits for it on the GPU, and for no other; the host waits for nothing

A block is its tenant's until the tenant is gone and every stream that used it has come past the last use: the
allocator is told of each (record_stream). Parameters of the CPU stay where they are, and so does a tenant of a model
that is on the CPU alone: there is nothing to bring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import torch

from .change import Change
from .cuda_memory import refuse_capture
from .site import Site
from .tenant import Tenant

T: TypeAlias = torch.Tensor

PIECE_BYTES = 64 << 20  # 1.2 ms at 55 GB/s (PCIe 5 x16): so long waits who uses the first bytes
ALIGNMENT = 256  # of every tensor in a block: more than the 64 bytes of signs, as CUDA's own allocations


class Lane(Protocol):
    """Copies to one device. An event is whatever the lane says when a copy has landed."""

    def pinned(self, n_bytes: int) -> T:
        """A block of the host, uint8 [n_bytes], that can be copied from while the host does something else."""
        raise NotImplementedError

    def copy(self, host: T, bounds: Sequence[int]) -> tuple[T, list[Any]]:
        """Begins to copy a block, piece by piece from bound to bound. A block of the device, an event per piece."""
        raise NotImplementedError

    def use(self, block: T, event: Any) -> None:
        """The calling thread's stream waits for the event; the block is not reused before it has come past this."""
        raise NotImplementedError

    def is_done(self, event: Any) -> bool:
        raise NotImplementedError

    def finish(self, event: Any) -> None:
        """Waits for the event on the host."""
        raise NotImplementedError


class CudaLane:
    """A Lane to a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def pinned(self, n_bytes: int) -> T:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, host: T, bounds: Sequence[int]) -> tuple[T, list[Any]]:
        refuse_capture("delta_names: expected resident deltas")
        events = []
        with torch.cuda.stream(
            self.stream
        ):  # the block is this stream's, so that it is free before it is written
            block = torch.empty(len(host), dtype=torch.uint8, device=self.device)
            for begin, end in pairwise(bounds):
                block[begin:end].copy_(host[begin:end], non_blocking=True)
                events.append(torch.cuda.Event())
                events[-1].record(self.stream)
        return block, events

    def use(self, block: T, event: Any) -> None:
        refuse_capture("delta_names: expected deltas of a call before")
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        block.record_stream(stream)

    def is_done(self, event: Any) -> bool:
        return bool(event.query())

    def finish(self, event: Any) -> None:
        event.synchronize()


def new_lane(device: torch.device) -> Lane | None:
    """None where nothing has to be brought."""
    return CudaLane(device) if device.type == "cuda" else None


@dataclass(frozen=True, eq=False)
class Arrival:
    """A piece of a block on its device."""

    lane: Lane
    block: T
    event: Any

    def use(self) -> None:
        self.lane.use(self.block, self.event)

    @property
    def is_here(self) -> bool:
        return self.lane.is_done(self.event)

    def finish(self) -> None:
        self.lane.finish(self.event)


class Load:
    """What goes to one device: the block, and where its pieces end."""

    def __init__(self, lane: Lane, changes: dict[str, Change]) -> None:
        """changes: in the order of their use; parameters that share one name the same object."""
        self.lane = lane
        sizes: dict[int, int] = {}
        for change in changes.values():
            if id(change) not in sizes:
                sizes[id(change)] = _size(change)
        self.host = lane.pinned(sum(sizes.values()))
        self.changes: dict[str, Change] = {}  # of views of the block
        self.piece: dict[str, int] = {}
        self.bounds = [0]
        packed: dict[int, tuple[Change, int]] = {}
        at = 0
        for name, change in changes.items():
            if id(change) not in packed:
                if at - self.bounds[-1] >= PIECE_BYTES:
                    self.bounds.append(at)
                packed[id(change)] = _packed(change, self.host, at), len(self.bounds) - 1
                at += sizes[id(change)]
            self.changes[name], self.piece[name] = packed[id(change)]
        if at > self.bounds[-1]:
            self.bounds.append(at)

    def bring(self) -> tuple[dict[str, Change], dict[str, Arrival]]:
        """The changes on the device, and when each will be there; those without tensors are there already."""
        block, events = self.lane.copy(self.host, self.bounds)
        arrivals = [Arrival(self.lane, block, event) for event in events]
        start, moved = self.host.data_ptr(), {}

        def move(tensor: T) -> T:
            begin = tensor.data_ptr() - start
            return _view(block, begin, tensor)

        for change in self.changes.values():
            if id(change) not in moved:
                moved[id(change)] = change.moved(move)
        found = {name: moved[id(change)] for name, change in self.changes.items()}
        return found, {name: arrivals[piece] for name, piece in self.piece.items() if piece < len(arrivals)}


def _size(change: Change) -> int:
    """Bytes of a change in a block."""
    sizes: list[int] = []

    def measure(tensor: T) -> T:
        sizes.append(-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT)
        return tensor

    change.moved(measure)
    return sum(sizes)


def _packed(change: Change, block: T, at: int) -> Change:
    """The change with its tensors copied into a block, from `at` on."""

    def pack(tensor: T) -> T:
        nonlocal at
        view = _view(block, at, tensor).copy_(tensor)
        at += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return view

    return change.moved(pack)


def _view(block: T, begin: int, like: T) -> T:
    return block[begin : begin + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


class Parcel:
    """A tenant of a model that is on GPUs, in the host's memory."""

    def __init__(self, tenant: Tenant, site: Site, lane_of: Callable[[torch.device], Lane | None]) -> None:
        self.site = site
        order = {name: i for i, name in enumerate(site.parameters)}
        by_lane: dict[int, tuple[Lane, dict[str, Change]]] = {}
        self.stay: dict[str, Change] = {}
        for name in sorted(tenant.changes, key=lambda name: order.get(name, len(order))):
            lane = lane_of(site.device(name))
            if lane is None:
                self.stay[name] = tenant.changes[name]
            else:
                by_lane.setdefault(id(lane), (lane, {}))[1][name] = tenant.changes[name]
        self.loads = [Load(lane, changes) for lane, changes in by_lane.values()]
        changes = dict(self.stay)
        for load in self.loads:
            changes |= load.changes
        # what the loads have packed is held once, there
        self.tenant = replace(tenant, changes=changes, by_module={}, modules=site.placed(tenant.modules))

    def bring(self) -> Tenant:
        """The tenant where it is used; its parameters arrive while the host goes on."""
        changes = dict(self.stay)
        arrivals: dict[str, Arrival] = {}
        for load in self.loads:
            own, there = load.bring()
            changes |= own
            arrivals |= there
        by_path: dict[str, list[Arrival]] = {}
        for name, arrival in arrivals.items():
            found = by_path.setdefault(self.site.owner(name)[0], [])
            if arrival not in found:
                found.append(arrival)
        return replace(self.tenant, changes=changes, by_module=self.site.by_module(changes), arrivals=by_path)


class Lanes:
    """The lanes to a model's devices, made when needed."""

    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lane | None] = {}

    def of(self, device: torch.device) -> Lane | None:
        if device not in self._lanes:
            self._lanes[device] = new_lane(device)
        return self._lanes[device]

    def staged(self, tenant: Tenant, site: Site) -> Tenant | Parcel:
        """What brings the tenant to its place as often as asked."""
        if all(self.of(site.device(name)) is None for name in tenant.changes):
            return tenant
        return Parcel(tenant, site, self.of)
