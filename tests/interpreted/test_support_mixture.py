"""Losses on supports from end to end with the triton backend: mixtures of every kind of row, against masked logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.backends.triton import TritonBackend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.loss import grpo_loss, policy_loss, token_logprobs
from grpo_fast.packing import Support
from tests.cases import TOLERANCES, Case, make_case, rel_rms
from tests.stand_in import stand_in

V = 97
SHARE = 8  # rows of up to 12 tokens are sparse
SIZES = (2, 0, 1, 12, 13, 60, 5, V, 3)
LENGTHS = (7, 1, 17, 0, 5, 9)


@pytest.fixture(autouse=True)
def _some_rows_are_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "sparse_share", lambda self, dtype, device: SHARE)


def mixture(case: Case) -> tuple[Support, Tensor]:
    """Sizes take turns, every target is in its support; and the same as a mask `[T, V]`."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for token, target in enumerate(case.targets.tolist()):
        others = torch.randperm(V, generator=generator)
        kept = others[others != target][: max(SIZES[token % len(SIZES)] - 1, 0)]
        whole = SIZES[token % len(SIZES)] == 0
        rows.append(torch.empty(0, dtype=torch.int64) if whole else torch.cat([kept, torch.tensor([target])]))
    sizes = torch.tensor([row.numel() for row in rows])
    support = Support(torch.cat(rows), torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]))
    mask = torch.zeros(case.targets.numel(), V, dtype=torch.bool)
    mask[support.rows_of_ids(), support.token_ids] = True
    mask[sizes == 0] = True
    return support, mask


def masked(case: Case, mask: Tensor, config: LossConfig) -> tuple[Any, dict[str, Tensor]]:
    """The float64 result by logits that are -inf outside the supports, and its gradients."""
    case = case.double()
    leaves = case.leaves()
    logits = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    logits = case.head.softcap * torch.tanh(logits * case.head.logit_scale / case.head.softcap)
    log_p = torch.log_softmax((logits / config.temperature).masked_fill(~mask, -torch.inf), -1)
    logprobs = log_p.gather(-1, case.targets[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p.masked_fill(~mask, 0.0)).sum(-1)
    out = policy_loss(logprobs, case.advantages, entropy=entropy, config=config, **case.policy_inputs(config))
    out.loss.backward()
    return (out.loss.detach(), logprobs.detach()), {name: leaf.grad for name, leaf in leaves.items()}


def run(case: Case, support: Support, config: LossConfig, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    leaves = case.leaves()
    head = HeadConfig(logit_scale=case.head.logit_scale, softcap=case.head.softcap)
    out = grpo_loss(
        leaves["hidden"],
        leaves["weight"],
        case.targets,
        case.advantages,
        bias=leaves["bias"],
        head=head,
        config=config,
        support=support,
        backend="triton",
        **(case.policy_inputs(config) | options),
    )
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def drawn(dtype: torch.dtype = torch.float32) -> Case:
    return make_case(3, LENGTHS, vocab=V, dtype=dtype, bias=True, softcap=20.0, temperature=0.9, zero_advantages=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ("single_pass", {}),
        ("single_pass", {"entropy_coef": 0.1, "beta": 0.1}),
        ("recompute", {"importance_sampling_level": "sequence"}),
        ("lean", {"entropy_coef": 0.1}),
    ],
)
def test_a_mixture(plan: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    config, case = LossConfig(**options, temperature=0.9), drawn(dtype)
    support, mask = mixture(case)
    assert {int(size) for size in support.sizes} == set(SIZES)
    (loss, logprobs), expected = masked(case, mask, config)
    with stand_in(tile_rows=16) as device:
        out, actual = run(case, support, config, plan=plan)
    if plan == "single_pass":
        assert "_sparse_objective_kernel" in device.launches
        assert len(device.waits) <= 3, device.waits  # to count the rows, and those of each kind
    else:
        assert {"_sparse_logits_kernel", "_sparse_grad_hidden_kernel", "_row_gradient_kernel"} <= {*device.launches}
    assert "_sparse_weight_kernel" in device.launches
    assert abs(out.loss - loss) <= 1e-5 * abs(loss)
    assert (out.logprobs - logprobs)[out.computed].abs().max() <= 2e-5
    bound = max(TOLERANCES[dtype].floor, 1e-5)
    for name, gradient in expected.items():
        assert rel_rms(actual[name], gradient) <= bound, name


def test_the_first_ratio_is_one_and_bits_repeat() -> None:
    """Of every kind of row, whatever other rows are computed with it."""
    case = drawn(torch.float16)
    support, _ = mixture(case)
    head = HeadConfig(logit_scale=case.head.logit_scale, softcap=case.head.softcap)
    options = {"bias": case.bias, "head": head, "backend": "triton", "support": support}
    old = token_logprobs(case.hidden, case.weight, case.targets, temperature=0.9, **options).logprobs
    config = LossConfig(temperature=0.9)
    steps = [run(replace(case, old_logprobs=old), support, config) for _ in range(2)]
    out = steps[0][0]
    assert 0 < int(out.computed.sum()) < case.targets.numel()
    assert torch.equal(out.logprobs[out.computed], old[out.computed])
    for name, gradient in steps[0][1].items():
        assert torch.equal(gradient, steps[1][1][name]), name
    few = torch.tensor([2, 0, 13, 6, 5, 4])
    part = token_logprobs(
        case.hidden[few], case.weight, case.targets[few], temperature=0.9, **(options | {"support": support[few]})
    )
    assert torch.equal(part.logprobs, old[few])
