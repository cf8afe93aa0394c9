"""What the tests of the CPU code share: running each test with numba's kernels and with ATen alone."""

import pytest
from hypothesis import settings

from longact_kernels.cpu import native

# A first example may compile a kernel.
relaxed = settings(deadline=None, max_examples=40)


@pytest.fixture(params=["numba", "aten"], scope="module", autouse=True)
def form(request):
    if request.param == "numba" and not native.available():
        pytest.skip("numba is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: request.param == "numba")
        yield request.param
