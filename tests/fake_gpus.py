"""GPUs that are not there: PyTorch's fake tensors on them have shapes and a device, and no values.

What mixes devices, or asks for a value and so would wait for a GPU, is an error. `product` of two fakes is a fake.
"""

import ctypes
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bitdelta import cuda_memory, linear_forward, ops, transfer

CUDA, META = 1, 14  # c10::DeviceType
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry


def _without_cuda():
    """A PyTorch built without CUDA cannot index a fake tensor of a GPU until that device has a guard; meta's does."""
    if torch.version.cuda is None:
        (library,) = (Path(torch.__file__).parent / "lib").glob("libc10.*")
        guards = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(library)), GUARDS)
        guards[CUDA] = guards[META]


class FakeGpus:
    """Fake GPUs, while `mode` is entered."""

    def __init__(self):
        _without_cuda()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def put(self, tensor, device):
        """A tensor of the host, or of another fake GPU, on a fake GPU."""
        with self.mode:
            fake = tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)
            return fake.to(device)

    def lane(self, device):
        return None if device.type == "cpu" else FakeLane(self, device)


class FakeLane:
    """A Lane (transfer.py) to a fake GPU."""

    def __init__(self, gpus, device):
        self.gpus, self.device = gpus, device

    def pinned(self, n_bytes):
        return torch.empty(n_bytes, dtype=torch.uint8)

    def copy(self, host, bounds):
        return torch.empty(len(host), dtype=torch.uint8, device=self.device), list(bounds[1:])

    def use(self, block, event):
        assert block.device == self.device

    def is_done(self, event):
        return True

    def finish(self, event):
        pass


@contextmanager
def fake_gpus(monkeypatch):
    """FakeGpus that models and operators take for GPUs."""
    gpus = FakeGpus()

    def bring(load, original=transfer.Load.bring):
        with gpus.mode:
            return original(load)

    monkeypatch.setattr(cuda_memory, "EMULATED", False)
    monkeypatch.setattr(transfer.Load, "bring", bring)
    monkeypatch.setattr(transfer, "new_lane", gpus.lane)
    monkeypatch.setattr(ops, "on_device", gpus.put)  # fakes cannot be pinned
    monkeypatch.setattr(linear_forward, "PLAIN", (*linear_forward.PLAIN, FakeTensor))
    yield gpus
