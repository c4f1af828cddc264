"""The tokens that TRL's sampler could choose: recorded while transformers generates, or told by a rollout function.

One `Support` a completion, on the host, a row a token. In TRL's batches they are a list under "support", which it
shuffles, splits and buffers as it does any column. Legend: B completions, C their padded length, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grpo_fast.packing import Support, offsets_of, size_metrics

logger = logging.getLogger("grpo_fast")

COLUMN = "support"
_TRUNCATING = {f"{name}LogitsWarper" for name in ("TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta")}


class Recorder:
    """A logits processor that only looks: the tokens of finite score, at each step of one generation."""

    def __init__(self) -> None:
        self.steps: list[Support] = []
        self.lengths: list[int] = []
        self.sequences: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(Support.from_mask(scores.isfinite()).to("cpu"))
        self.lengths.append(input_ids.shape[1])
        self.sequences = input_ids
        return scores

    def supports(self, completions: list[list[int]]) -> list[Support] | None:
        """Of each completion; None where what was generated step by step is something else (beams, drafts)."""
        count, longest = len(completions), max(map(len, completions), default=0)
        consecutive = all(length == self.lengths[0] + step for step, length in enumerate(self.lengths))
        if len(self.steps) < longest or not consecutive or any(step.num_rows != count for step in self.steps):
            return None
        if self.sequences is not None:  # before the last step
            said = self.sequences[:, self.lengths[0] :].tolist()
            shortest = [min(len(row), len(ids)) for row, ids in zip(said, completions, strict=True)]
            if any(row[:n] != ids[:n] for row, ids, n in zip(said, completions, shortest, strict=True)):
                return None
        steps = Support.cat(self.steps)  # row s B + b is step s of completion b
        return [steps[torch.arange(len(ids)) * count + row] for row, ids in enumerate(completions)]


@contextmanager
def recorded(lm: Any) -> Iterator[Recorder]:
    """What the model's `generate` keeps of the vocabulary in this block; nothing where its options do not truncate."""
    recorder, prepare = Recorder(), lm._get_logits_processor

    def with_recorder(*args: Any, **kwargs: Any) -> Any:
        processors = prepare(*args, **kwargs)
        if any(type(processor).__name__ in _TRUNCATING for processor in processors):
            processors.append(recorder)  # last: what `generate(logits_processor=)` is given runs before the warpers
        return processors

    lm._get_logits_processor = with_recorder
    try:
        yield recorder
    finally:
        del lm._get_logits_processor


class Supports:
    """Of the batch that a trainer generates, scores or learns from; `current`, or None."""

    def __init__(self) -> None:
        self.current: list[Support] | None = None
        self._turns: list[tuple[list[list[int]], list[Support] | None]] = []
        self._warned = False

    def clear(self) -> None:
        self.current, self._turns = None, []

    def add_turn(self, completions: list[list[int]], recorder: Recorder) -> None:
        """One generation: of whole completions, or of what comes after a tool's answer."""
        if recorder.steps:
            self._turns.append(([list(ids) for ids in completions], recorder.supports(completions)))

    def settle(self, completions: list[list[int]], told: Sequence[Any] | None) -> None:
        """Decide on `current`, now that the completions are known.

        Args:
            told: what a rollout function returned under "support", an entry a completion (`support_of`).

        Raises:
            ValueError: `told` does not fit the completions.
        """
        turns, self._turns = self._turns, []
        if told is not None:
            if len(told) != len(completions):
                raise ValueError(f"support: expected {len(completions)} entries, one a completion; got {len(told)}")
            self.current = [support_of(one, len(ids)) for one, ids in zip(told, completions, strict=True)]
        elif turns:
            said, supports = turns[0]  # with further ones, completions hold tools' answers, if not the same tokens
            if supports is not None and said == [list(ids) for ids in completions]:
                self.current = supports
            elif not self._warned:
                self._warned = True
                logger.warning(
                    "support: what the sampler kept could not be matched to the completions (several turns, beams, or "
                    "completions that were changed); such batches are scored over the whole vocabulary"
                )


def support_of(told: Any, length: int) -> Support:
    """The support of one completion of `length` tokens, as engines tell it.

    Args:
        told: a `Support` of `length` rows; a list of `length` lists of token ids; a bool mask `[n, V]` or ids `[n, K]`
            padded with -1, of which the first `length` rows count; or None. An empty list, a row without any token
            and None stand for the whole vocabulary.

    Raises:
        ValueError: something else, another number of rows, or as `Support`.
    """
    if told is None:
        return Support.whole(length)
    if isinstance(told, Support):
        found = told
    elif isinstance(told, Tensor):
        found = (Support.from_mask if told.dtype == torch.bool else Support.from_padded)(told[:length])
    else:
        found = _of_lists(told)
    if found.num_rows != length:
        raise ValueError(f"support: expected {length} rows, one a token of the completion; got {found.num_rows}")
    return found.on_host()


def _of_lists(told: Any) -> Support:
    try:
        rows = [[] if row is None else list(row) for row in told]
        ids = torch.tensor([token for row in rows for token in row] or [0])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"support: expected a Support, a bool mask [n, V], ids [n, K] or a list of lists of ids; got {told!r:.80}"
        ) from error
    sizes = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return Support(ids[: int(sizes.sum())], offsets_of(sizes))


def padded(supports: list[Support], length: int) -> Support:
    """Rows `[B, C]`, flattened; those of the padding are empty.

    Raises:
        ValueError: a completion of more than C tokens.
    """
    longest = max(support.num_rows for support in supports)
    if longest > length:
        raise ValueError(f"support: expected at most {length} rows a completion; got {longest}")
    return Support.cat([part for support in supports for part in (support, Support.whole(length - support.num_rows))])


def measures(supports: list[Support], vocab: int) -> dict[str, float]:
    """For the log, of one rank's generation."""
    return size_metrics(Support.cat(supports).sizes_in(vocab))
