"""tests/test_gpu.py on the stand-in with interpreted Triton kernels: what the torch backend there cannot show."""

from tests.test_gpu import place, test_fused_forward, test_fused_objectives, test_nothing_to_learn  # noqa: F401
