"""Losses on supports through the triton backend, whose kernels are interpreted: random cases, and what is refused."""

from tests.test_support_edges import test_a_target_outside_its_support_on_a_gpu  # noqa: F401
from tests.test_support_random import pytest_generate_tests, test_random_case_on_a_support  # noqa: F401
