"""What float64 says of a step at its measured shape: some rows, some columns of the weight's gradient.

Legend: T tokens, H hidden size, V vocabulary.

    all rows    log-probabilities, entropies and lse in float32 (IEEE), blocks of rows at a time: they give every row's
                g = d loss / d logprob and e = d loss / d entropy, by autograd through the plain objective
    some rows   log-probability, entropy, d loss / d hidden in float64, by blocks of the vocabulary
    some columns  d loss / d weight of that many vocabulary entries in float64, over all T rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines import Outcome
from benchmarks.baselines.implementations import eager_loss
from benchmarks.cases import Batch
from benchmarks.oracle import FLOORS, Errors, complaint, rms

ROWS, COLUMNS = 48, 64
ROW_BLOCK, VOCAB_BLOCK = 512, 8192


class Exact:
    """The reference of a packed batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.hidden, self.weight = batch.hidden.detach(), batch.weight.detach()
        tokens, vocab = self.hidden.shape[0], self.weight.shape[0]
        device = self.hidden.device
        self.rows = torch.linspace(0, tokens - 1, min(ROWS, tokens), device=device).round().long().unique()
        # Columns that are targets have a gradient of their own; the rest gets the softmax's.
        drawn = torch.linspace(0, vocab - 1, min(COLUMNS, vocab), device=device).round().long()
        self.columns = torch.cat([drawn, batch.targets[self.rows]]).unique()
        self.lse, logprobs, entropy = self._all_rows()
        self.g, self.e, self.loss = self._slopes(logprobs, entropy)
        self.entropies = entropy.double()
        self.exact_logprobs, self.exact_entropy, self.grad_hidden = self._some_rows()
        self.grad_weight = self._some_columns()

    def _cap(self, products: Tensor) -> Tensor:
        cap = self.batch.head.softcap
        return products if cap is None else cap * torch.tanh(products / cap)

    def _all_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        columns = self.weight.float().T
        parts = []
        for hidden, targets in zip(self.hidden.split(ROW_BLOCK), self.batch.targets.split(ROW_BLOCK), strict=True):
            z = self._cap(hidden.float() @ columns)
            lse = z.logsumexp(-1)
            entropy = lse - (z.softmax(-1) * z).sum(-1)
            parts.append((lse, z.gather(1, targets[:, None])[:, 0] - lse, entropy))
        lse, logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return lse.double(), logprobs, entropy

    def _slopes(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, float]:
        if not self.batch.case.scenario.gradient:
            return torch.zeros_like(self.lse), torch.zeros_like(self.lse), float("nan")
        p, h = logprobs.requires_grad_(), entropy.requires_grad_()
        loss = eager_loss(self.batch, p, h)
        g, e = torch.autograd.grad(loss, (p, h), allow_unused=True, materialize_grads=True)
        entropy.requires_grad_(False)
        return g.double(), e.double(), float(loss.detach())

    def _slope_of_products(self, z: Tensor, one_hot: Tensor, rows: Tensor | slice) -> Tensor:
        """d loss / d product `[r, v]` of logits z in float64."""
        log_p = z - self.lse[rows, None]
        g, e = self.g[rows, None], self.e[rows, None]
        dz = g * (one_hot - log_p.exp()) - e * log_p.exp() * (log_p + self.entropies[rows, None])
        cap = self.batch.head.softcap
        return dz if cap is None else dz * (1 - (z / cap) ** 2)

    def _some_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden, targets = self.hidden[self.rows].double(), self.batch.targets[self.rows]
        z = self._cap(torch.cat([hidden @ block.double().T for block in self.weight.split(VOCAB_BLOCK)], dim=1))
        lse = z.logsumexp(-1)
        self.lse[self.rows] = lse
        one_hot = torch.zeros_like(z).scatter_(1, targets[:, None], 1.0)
        entropy = lse - (z.softmax(-1) * z).sum(-1)
        self.entropies[self.rows] = entropy
        dx = self._slope_of_products(z, one_hot, self.rows)
        grad = torch.zeros_like(hidden)
        for dx_block, block in zip(dx.split(VOCAB_BLOCK, 1), self.weight.split(VOCAB_BLOCK), strict=True):
            grad += dx_block @ block.double()
        return z.gather(1, targets[:, None])[:, 0] - lse, entropy, grad

    def _some_columns(self) -> Tensor:
        weight = self.weight[self.columns].double()
        grad = torch.zeros_like(weight)
        for start in range(0, self.hidden.shape[0], ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            hidden = self.hidden[rows].double()
            one_hot = (self.batch.targets[rows, None] == self.columns).double()
            grad += self._slope_of_products(self._cap(hidden @ weight.T), one_hot, rows).T @ hidden
        return grad

    def errors(self, outcome: Outcome, grad_hidden: Tensor | None, grad_weight: Tensor | None) -> Errors:
        """RMS in nats of log-probabilities and entropies, relative RMS of gradients, on the rows and columns.

        Rows that were not computed (they have no gradient) are left out of the former.
        """
        found: Errors = {}
        computed = None if outcome.computed is None else outcome.computed[self.rows]
        for name, exact in (("logprobs", self.exact_logprobs), ("entropy", self.exact_entropy)):
            values = getattr(outcome, name)
            if values is not None:
                difference = values.detach()[self.rows].double() - exact
                found[name] = rms(difference if computed is None else difference[computed])
        pairs = (("grad_hidden", grad_hidden, self.rows, self.grad_hidden),
                 ("grad_weight", grad_weight, self.columns, self.grad_weight))  # fmt: skip
        for name, grad, index, exact in pairs:
            if grad is not None:
                found[name] = rms(grad[index].double() - exact) / rms(exact)
        return found

    def check(self, outcome: Outcome, batch: Batch) -> tuple[Errors, str | None]:
        """(errors, complaint) of this library's step on `batch`: the project's own bounds, no allowance for eager."""
        gradients = batch.case.scenario.gradient
        grad_weight = batch.weight.grad if gradients and batch.case.scenario.trains_head else None
        errors = self.errors(outcome, batch.hidden.grad if gradients else None, grad_weight)
        expected = {"logprobs", "entropy"} | ({"grad_hidden"} if gradients else set())
        missing = expected - set(errors)
        return errors, f"left no {', '.join(sorted(missing))}" if missing else complaint(errors, FLOORS)
