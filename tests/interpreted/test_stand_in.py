"""The branches that a GPU takes, with the triton backend, whose kernels are interpreted: see tests/test_stand_in.py."""

from tests.test_stand_in import *  # noqa: F403
from tests.test_stand_in import tf32  # noqa: F401 - a fixture
