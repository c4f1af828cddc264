"""Losses on supports through the triton backend, whose kernels are interpreted: see tests/test_support.py."""

from tests.test_support import (  # noqa: F401
    test_every_objective_and_plan,
    test_main_grad,
    test_sparse_masked_and_whole_rows_agree,
    test_token_logprobs,
)
from tests.test_support_edges import (  # noqa: F401
    test_a_target_outside_its_support_on_a_gpu,
    test_on_the_stand_in,
    test_one_word_leaves_nothing_to_learn,
    test_the_first_ratio_is_exactly_one,
    test_the_same_bits_again,
    test_whole_supports_are_none,
)
from tests.test_support_random import pytest_generate_tests, test_random_case_on_a_support  # noqa: F401
