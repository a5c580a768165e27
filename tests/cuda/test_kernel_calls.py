"""What the tests of single kernels rest on: memory of the host that a GPU may use."""

import pytest
from kernel_calls import PAGE, pages


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
