"""Recipes of `grpo-fast train`, installed as `grpo_fast.recipes` so that they are found without the repository."""
