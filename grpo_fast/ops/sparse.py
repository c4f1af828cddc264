"""Rows on small supports: all of them at once, by gathered rows of the weight instead of products.

Legend: T tokens, m sparse rows, N ids of their supports, H hidden size, V vocabulary; dx is the loss's gradient in the
raw products. Memory: O(N) numbers and O(m H), whatever V is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from grpo_fast.backends.base import (
    ObjectiveResults,
    RowChunk,
    RowIds,
    RowObjective,
    RowSlopes,
    RowStatistics,
    Transform,
)
from grpo_fast.config import LossConfig
from grpo_fast.objectives import Tokens
from grpo_fast.ops.call import HeadCall
from grpo_fast.ops.support import Supported


@dataclass
class SparseRows:
    """The sparse rows of a call.

    Attributes:
        call: whose they are. index: `[m]` int64, their numbers among the T. hidden: `[m, H]`. of: their ids.
        chunk: their raw products `[N]`, yet to be computed, and what belongs to them.
    """

    call: HeadCall
    index: Tensor
    hidden: Tensor
    of: RowIds
    chunk: RowChunk

    @staticmethod
    def among(call: HeadCall, index: Tensor, rows: Supported) -> SparseRows:
        """Those of `call` with the numbers `index`."""
        everything = index.numel() == call.hidden.shape[0]
        hidden = call.hidden if everything else call.hidden[index]
        logits = hidden.new_empty(rows.of.ids.numel(), dtype=call.accumulator)
        temperature = call.temperature[index] if isinstance(call.temperature, Tensor) else call.temperature
        return SparseRows(
            call, index, hidden, rows.of, rows.chunk(logits, Transform(call.head, call.bias, temperature))
        )

    def statistics(self) -> RowStatistics:
        """Products and statistics."""
        found = RowStatistics(*(self._new() for _ in range(3)))
        self.call.engine.sparse_logits(self.hidden, self.call.weight, self.of, self.chunk.logits)
        self.call.engine.statistics(self.chunk, found)
        return found

    def gradients(self, slopes: RowSlopes, *, wants_hidden: bool) -> SparseGradients:
        """From slopes `[m]` and the products, over which dx goes."""
        call, hidden = self.call, self._new_hidden(wants_hidden)
        dx = call.engine.gradient(self.chunk, slopes, dtype=call.accumulator)
        if hidden is not None:
            call.engine.sparse_grad_hidden(dx, call.weight, self.of, hidden)
        return SparseGradients(self, dx, hidden)

    def backward(self, slopes: RowSlopes, *, wants_hidden: bool) -> SparseGradients:
        """From the slopes of all T tokens, computing the products again."""
        self.call.engine.sparse_logits(self.hidden, self.call.weight, self.of, self.chunk.logits)
        return self.gradients(slopes.part(self.index), wants_hidden=wants_hidden)

    def objective(
        self, tokens: Tokens, weights: Tensor, config: LossConfig, *, wants_hidden: bool
    ) -> tuple[ObjectiveResults, SparseGradients]:
        """All in one pass; tokens and weights are those of all T."""
        call, hidden = self.call, self._new_hidden(wants_hidden)
        own = RowObjective(tokens.rows(self.index, None), weights[self.index], config)
        results = ObjectiveResults(self._new(), self._new(), self._new().bool())
        dx = call.engine.sparse_objective(self.hidden, call.weight, self.of, self.chunk, own, results, hidden)
        return results, SparseGradients(self, dx, hidden)

    def _new(self) -> Tensor:
        return self.hidden.new_empty(self.index.numel(), dtype=self.call.accumulator)

    def _new_hidden(self, wanted: bool) -> Tensor | None:
        return self.hidden.new_empty(self.hidden.shape, dtype=self.call.grad_dtype) if wanted else None


class SparseGradients(NamedTuple):
    """Of `rows`: dx `[N]`, and dHidden `[m, H]` or None."""

    rows: SparseRows
    dx: Tensor
    hidden: Tensor | None

    def add_to(self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        """Into `[T, H]`, where these rows are zero, into `[V, H]` and into `[V]`, at the ids that occur."""
        rows, engine = self.rows, self.rows.call.engine
        if hidden is not None and self.hidden is not None:
            hidden.index_copy_(0, rows.index, self.hidden)
        if weight is not None:
            engine.sparse_grad_weight(self.dx, rows.hidden, rows.of, weight)
        if bias is not None:  # a column of the weight, for hidden states of one
            ones = rows.hidden.new_ones(rows.hidden.shape[0], 1)
            engine.sparse_grad_weight(self.dx, ones, rows.of, bias[:, None])
