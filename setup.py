"""Which directories become which packages; everything else about the distribution is in pyproject.toml.

`kernels/` and `recipes/` stand at the top of the repository and are installed inside `grpo_fast`: a top-level `kernels`
would collide with Hugging Face's package of that name.
"""

from setuptools import setup

setup(
    packages=["grpo_fast", "grpo_fast.ops", "grpo_fast.trainer", "grpo_fast.kernels", "grpo_fast.recipes"],
    package_dir={"grpo_fast.kernels": "kernels", "grpo_fast.recipes": "recipes"},
    package_data={"grpo_fast": ["py.typed"], "grpo_fast.recipes": ["*.yaml"]},
    include_package_data=False,
)
