"""What the tests of single kernels rest on: memory of the host that a GPU may use."""

import ctypes

import pytest
from kernel_calls import PAGE, OnGpu, build_for_gpu, pages, toolchain


@pytest.mark.parametrize(
    "extents, expected",
    [
        ([], []),
        ([(PAGE, 1)], [(PAGE, PAGE)]),
        ([(PAGE + 5, PAGE)], [(PAGE, 2 * PAGE)]),
        ([(3 * PAGE, 8), (PAGE, 8)], [(PAGE, PAGE), (3 * PAGE, PAGE)]),
        ([(PAGE + 100, 8), (PAGE + 50, 20), (PAGE + 4090, 10)], [(PAGE, 2 * PAGE)]),
        ([(PAGE, PAGE), (2 * PAGE, 1)], [(PAGE, 2 * PAGE)]),
        ([(PAGE, 10 * PAGE), (2 * PAGE, 1)], [(PAGE, 10 * PAGE)]),
    ],
)
def test_pages_cover_memory_once(extents, expected):
    assert pages(extents) == expected


def test_a_library_for_all_targets_has_the_functions_and_says_where_no_gpu_is(tmp_path, monkeypatch):
    monkeypatch.setenv("BITDELTA_CUDA_ARCHS", "all")
    try:
        archs = toolchain.wanted_archs(toolchain.nvcc_version(toolchain.find_nvcc()))
    except toolchain.ToolError as error:
        pytest.skip(str(error))
    path = build_for_gpu(tmp_path, archs, ("plan.cu", "device.cu"))
    held = path.read_bytes()
    for name in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100f", "sm_120f", "compute_90"):
        assert name.encode() in held, name
    library = ctypes.CDLL(str(path))
    for name in ("bd_cuda_plan", "bd_cuda_plan_bytes", "bd_gpu_enter", "test_pin", "test_unpin", "test_wait"):
        assert hasattr(library, name)
    if toolchain.visible_archs():
        pytest.skip("a GPU is here")
    with pytest.raises(RuntimeError, match="the GPU: "):
        OnGpu(path)
