import pytest
from cuda_on_cpu import runner


@pytest.fixture(autouse=True, scope="session")
def _headers():
    """The kernels need CUDA's headers, which the CPU-only builds of torch do not bring."""
    try:
        runner.cuda_headers()
    except runner.BuildError:
        pytest.skip("there are no CUDA headers on this machine")
