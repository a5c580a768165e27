"""The processes that torchrun starts, as far as distillation needs them: who they are, sums over them, sharding.

    torchrun --nproc-per-node 2 --no-python bitdelta distill ...

Every process takes its share of each batch's rows and adds up the gradients of the scales, which are few and which
every process has. The frozen weights are there in every process, memory-mapped from the same file, or with
`shard_weights` split by PyTorch's fully_shard (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class Group:
    """All processes of this run; one where torchrun started none."""

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sums over the processes, in place, in one message through the host's memory."""
        if self.size > 1:
            parts = list(tensors)
            flat = torch.cat([part.detach().reshape(-1).cpu() for part in parts])
            dist.all_reduce(flat)
            for part, new in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(new.view_as(part))


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that torchrun's environment describes; left at the end if it was joined here.

    Args:
        device: of this process. On GPUs the sharded weights travel by NCCL.
    """
    here = dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if here:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # the scales' gradients are few and travel through the host
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield Group()
    finally:
        if here:
            dist.destroy_process_group()


def shard_weights(
    model: Any, layers: Iterable[Any], kept: Iterable[torch.nn.Parameter], group: Group
) -> None:
    """Splits the frozen weights of `layers`, and of what is around them, over the processes; not `kept`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (group.size,))
    ignored = set(kept)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
