"""What an example is: a prompt and the columns beside it. Tables and tasks make them, prompts and rewards read them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

Messages = list[dict[str, str]]
Prompt = str | Messages

RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
"""Keyword arguments that every reward function gets from the trainer, so no column may be called like that."""


@dataclass(frozen=True)
class Example:
    """One prompt and what the reward functions may know about it."""

    prompt: Prompt
    columns: dict[str, Any]


class LazyExamples(Sequence[Example]):
    """Examples made on access by `_example(index)`, `0 <= index < len`."""

    _size: int

    def _example(self, index: int) -> Example:
        raise NotImplementedError

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._example(range(self._size)[index])


class Subset(LazyExamples):
    """Some of the examples, by number."""

    def __init__(self, examples: Sequence[Example], numbers: Sequence[int]) -> None:
        self._examples, self._numbers, self._size = examples, numbers, len(numbers)

    def _example(self, index: int) -> Example:
        return self._examples[self._numbers[index]]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?` for an error message, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
