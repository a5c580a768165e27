"""The GPU of the tests: a real one by torch, or the emulation, where its memory is NumPy's."""

import numpy as np
import pytest

from bitdelta import _C


class Emulated:
    def put(self, array):
        return np.ascontiguousarray(array)

    def get(self, array):
        return array


class Gpu:
    def put(self, array):
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).cuda()

    def get(self, tensor):
        return tensor.cpu().numpy()


@pytest.fixture(scope="session")
def device():
    """Puts NumPy arrays where kernels find them (`put`), and gets them back (`get`)."""
    if _C.cuda_missing() is not None:
        pytest.skip(_C.cuda_missing())
    return Emulated() if _C.cuda_is_emulated() else Gpu()
