"""`token_rows`: native code gives what the definition does, bit for bit, and takes what it is meant to take.

Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.backends import cpu as cpu_backend
from grpo_fast.config import LossConfig
from grpo_fast.inputs import TokenInputs, token_inputs
from grpo_fast.loss import policy_loss
from tests.cases import Case, make_case

needs_native = pytest.mark.skipif(cpu_backend.native() is None, reason="grpo_fast._C is not built")

CONFIGS = [
    {"loss_type": "grpo"},
    {"loss_type": "sapo", "beta": 0.1},
    {"loss_type": "luspo", "importance_sampling_mode": "token_mask"},
    {"loss_type": "dr_grpo", "max_completion_length": 24, "importance_sampling_mode": "sequence_mask"},
    {"loss_type": "dapo"},
]


def inputs_of(case: Case, config: LossConfig, normalizer: Tensor | float | None, *, masked: bool) -> TokenInputs:
    given = case.policy_inputs(config) | ({} if masked else {"loss_mask": None})
    return token_inputs(
        case.logprobs, tuple(case.targets.shape), case.advantages, config=config, normalizer=normalizer, **given
    )


def listed(inputs: TokenInputs) -> Tensor:
    """The active rows that native code listed."""
    assert inputs.active is not None
    assert inputs.active.listed is not None
    rows, count = inputs.active.listed
    return rows[: int(count)]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kwargs", CONFIGS)
def test_native_is_the_definition(kwargs: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LossConfig(**kwargs)
    for masked, token_advantages, normalizer in product((True, False), (True, False), (None, 3.7, torch.tensor(41))):
        case = make_case(5, dtype=dtype, zero_advantages=0.4, token_advantages=token_advantages)
        native = inputs_of(case, config, normalizer, masked=masked)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_backend, "_C", None)
            plain = inputs_of(case, config, normalizer, masked=masked)
        assert torch.equal(native.weights, plain.weights)
        assert torch.equal(native.tokens.advantages, plain.tokens.advantages)
        assert native.weights.dtype == native.tokens.advantages.dtype == dtype
        if plain.active is None:
            assert native.active is None
            assert not masked
            continue
        assert plain.active.listed is None
        assert native.active is not None
        assert torch.equal(native.active.mask, plain.active.mask)
        assert torch.equal(listed(native), plain.active.mask.nonzero()[:, 0])
        assert listed(native).numel() > 0
    assert native.weights.max() > 0


@needs_native
def test_coupled_objectives_have_torchs_operators() -> None:
    case = make_case(6)
    for kwargs in ({"loss_type": "vespo"}, {"importance_sampling_level": "sequence"}):
        inputs = inputs_of(case, LossConfig(**kwargs), None, masked=True)
        assert inputs.active is not None
        assert inputs.active.listed is None


@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        (0, "normalizer: expected a finite number > 0; got 0.0"),
        (float("nan"), "normalizer: expected a finite number > 0; got nan"),
        (torch.tensor(-2), "normalizer: expected a finite number > 0; got -2.0"),
        (torch.ones(3), r"normalizer: expected one number; got shape \[3\]"),
    ],
)
def test_bad_normalizers(normalizer: Tensor | float, message: str) -> None:
    case = make_case(7)
    with pytest.raises(ValueError, match=message):
        policy_loss(case.logprobs, case.advantages, cu_seqlens=case.cu_seqlens, normalizer=normalizer)
