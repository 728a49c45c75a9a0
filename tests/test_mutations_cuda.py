"""Errors planted in the CUDA C++ kernels are caught by tests that run them on the CPU; test_mutations.py says how."""

import pytest
from cuda_on_cpu import runner
from test_mutations import of_backends, tree  # noqa: F401  the fixture


def has_cuda_headers():
    try:
        runner.cuda_headers()
    except runner.BuildError:
        return False
    return True


def pytest_generate_tests(metafunc):
    if "mutant" in metafunc.fixturenames:
        metafunc.parametrize("mutant", of_backends(metafunc.config, "cuda"), ids=lambda mutant: mutant.name)


def test_a_planted_error_is_caught(mutant, tree):  # noqa: F811
    if not has_cuda_headers():
        pytest.skip("there are no CUDA headers on this machine")
    tree.must_pass(mutant)
    tree.must_fail(mutant)
