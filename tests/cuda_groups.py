"""csrc/group_cuda.cu's token rows against the plain ones, in the emulator or on a device."""

from __future__ import annotations

from typing import Any

import torch

from grpo_fast.config import LossConfig
from grpo_fast.losses import Segments
from grpo_fast.objectives import token_weights
from tests.cases import Case, rel_rms

AGGREGATIONS = {"grpo": "sequence_mean", "luspo": "sequence_sum", "dapo": "token_mean"}


def check_token_rows(native: Any, case: Case, loss_type: str, queue: dict[str, int]) -> None:
    """Weights, advantages and active rows of a packed case, by `_cuda` or its emulation on that device and stream."""
    device = case.advantages.device
    num_tokens, num_sequences = case.targets.numel(), case.advantages.numel()
    weights, spread = (torch.full((num_tokens,), torch.nan, device=device) for _ in range(2))
    active = torch.empty(num_tokens, dtype=torch.bool, device=device)
    sizes = (num_tokens, 1, 2 * num_sequences)
    rows, count, counts = (torch.empty(n, dtype=torch.int64, device=device) for n in sizes)
    assert case.cu_seqlens is not None
    native.token_rows(
        cu_seqlens=case.cu_seqlens.data_ptr(),
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        mask=case.loss_mask.data_ptr(),
        advantages=case.advantages.data_ptr(),
        advantages_per_token=False,
        importance=0,
        aggregation=getattr(native.TokenAggregation, AGGREGATIONS[loss_type]),
        normalizer=0,
        normalizer_value=float("nan"),
        every_row=False,
        weights=weights.data_ptr(),
        token_advantages=spread.data_ptr(),
        active=active.data_ptr(),
        rows=rows.data_ptr(),
        num_active=count.data_ptr(),
        counts=counts.data_ptr(),
        **queue,
    )
    segments = Segments(case.cu_seqlens, num_tokens)
    expected = segments.spread(case.advantages) * case.loss_mask
    wanted = token_weights(LossConfig(loss_type=loss_type), case.loss_mask, segments, None, torch.float32)
    assert rel_rms(weights, wanted) <= 1e-6
    assert torch.equal(spread, expected)
    assert torch.equal(active, expected != 0)
    assert torch.equal(rows[: int(count)], expected.nonzero()[:, 0])
