"""The random configurations of tests/test_random.py, through the triton backend under the interpreter."""

from tests.test_random import pytest_generate_tests, test_random_case  # noqa: F401
