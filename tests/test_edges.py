"""Edge rows, bitwise promises, torch.compile, metrics that combine, and every bad input's error."""

from __future__ import annotations

import math
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from grpo_fast.backends.torch import TorchBackend
from grpo_fast.config import IMPORTANCE_SAMPLING_MODES
from grpo_fast.loss import HeadConfig, LossConfig, Metrics, grpo_loss, policy_loss, token_logprobs
from grpo_fast.packing import pack_padded, unpack
from tests.cases import Case, make_case, padded, rel_rms

GSPO = LossConfig(loss_type="grpo", importance_sampling_level="sequence")


def run(case: Case, config: LossConfig = LossConfig(), **options: Any) -> tuple[Any, dict[str, Tensor]]:
    leaves = case.leaves()
    arguments = {"config": config, "bias": leaves.get("bias")} | case.policy_inputs(config) | options
    out = grpo_loss(leaves["hidden"], leaves["weight"], case.targets, case.advantages, **arguments)
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


# -- edge rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LossConfig(), GSPO, LossConfig(beta=0.1, entropy_coef=0.1)])
@pytest.mark.parametrize("plan", ["auto", "recompute", "lean"])
@pytest.mark.parametrize("emptiness", ["no sequences", "empty sequences", "masked", "zero advantages"])
def test_nothing_to_learn_is_a_differentiable_zero(emptiness: str, plan: str, config: LossConfig) -> None:
    lengths = {"no sequences": (), "empty sequences": (0, 0)}.get(emptiness, (4, 3))
    case = make_case(0, lengths=lengths, masked_fraction=1.0 if emptiness == "masked" else 0.0, masked_sequence=False)
    if emptiness == "zero advantages":
        config = LossConfig(loss_type=config.loss_type, importance_sampling_level=config.importance_sampling_level)
        case.advantages.zero_()
    out, gradients = run(case, config, plan=plan)
    assert out.loss.item() == 0.0
    assert all(gradient.abs().sum().item() == 0 for gradient in gradients.values())
    assert all(math.isfinite(value) for value in out.metrics.as_dict().values())
    assert torch.isfinite(out.logprobs).all()


@pytest.mark.parametrize("plan", ["auto", "recompute", "lean"])
def test_huge_logits(plan: str) -> None:
    """Logits of +-1e4 overflow no exponential; the confident and the hopeless token are both exact."""
    hidden = torch.tensor([[100.0, 0.0], [100.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 1.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    out = grpo_loss(hidden, weight, targets, torch.ones(3), config=LossConfig(entropy_coef=0.1), plan=plan)
    out.loss.backward()
    assert out.logprobs[:2].tolist() == [0.0, -20000.0]
    assert out.logprobs[2].item() == pytest.approx(1 - math.log(math.e + 2), rel=1e-6)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_forbidden_tokens_by_bias() -> None:
    """A bias of -inf takes tokens out of the vocabulary: entropies and gradients are those of the smaller one."""
    case = make_case(1, dtype=torch.float64, bias=True)
    targets = case.targets.clamp(max=89)
    bias = case.bias.clone()
    bias[90:] = -torch.inf
    config = LossConfig(entropy_coef=0.1)
    results = []
    for weight, b in ((case.weight, bias), (case.weight[:90], bias[:90])):
        hidden, w = case.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = grpo_loss(hidden, w, targets, case.advantages, cu_seqlens=case.cu_seqlens, bias=b, config=config)
        out.loss.backward()
        results.append((out.loss, out.entropy, hidden.grad, w.grad[:90]))
        assert (w.grad[90:] == 0).all()
    for masked, smaller in zip(*results, strict=True):
        assert rel_rms(masked, smaller) <= 1e-12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_hidden_states_are_counted(bad: float) -> None:
    case = make_case(2, masked_fraction=0.0, masked_sequence=False)
    case.hidden[5, 3] = bad
    out, _ = run(case)
    assert math.isnan(out.loss.item())
    assert out.metrics.as_dict()["bad_rows"] == 1


def test_padding_may_hold_anything() -> None:
    """NaN hidden states, out-of-range targets and NaN logprobs at masked positions change nothing."""
    case = make_case(3)
    clean, clean_grads = run(case)
    dirty, dirty_grads = run(padded(case, fill_hidden=float("nan"), fill_target=-100, fill_logprob=float("nan")))
    assert dirty.loss.item() == pytest.approx(clean.loss.item(), rel=1e-6)
    assert rel_rms(dirty_grads["weight"], clean_grads["weight"]) <= 1e-6


def test_vocabulary_of_one_and_single_tokens() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(1, 4, requires_grad=True)
    zeros = torch.zeros(3, dtype=torch.int64)
    out = grpo_loss(hidden, weight, zeros, torch.ones(3), cu_seqlens=torch.arange(4))
    out.loss.backward()
    assert out.logprobs.tolist() == [0.0] * 3
    assert hidden.grad.abs().max() == 0


# -- promises to the bit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1000, 32003])
def test_first_step_ratio_is_exactly_one(vocab: int, dtype: torch.dtype) -> None:
    """Old logprobs without gradient and current ones in any plan, compaction and packing agree bit for bit."""
    check_first_step_ratio(vocab, dtype, (150, 7, 33, 0, 90, 41))


def check_first_step_ratio(vocab: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    case = make_case(4, lengths, hidden_size=64, vocab=vocab, dtype=dtype, zero_advantages=0.4)
    workspace, rows = 2**28, slice(sum(lengths[:2]), sum(lengths[:3]))
    with torch.no_grad():
        old = token_logprobs(case.hidden, case.weight, case.targets, workspace_bytes=workspace).logprobs
        alone = token_logprobs(case.hidden[rows], case.weight, case.targets[rows], workspace_bytes=workspace)
    assert torch.equal(alone.logprobs, old[rows])
    for plan, config in (
        ("single_pass", LossConfig()),
        ("resident", GSPO),
        ("recompute", GSPO),
        ("lean", LossConfig()),
    ):
        out, _ = run(case, config, plan=plan, old_logprobs=old, workspace_bytes=workspace)
        assert torch.equal(out.logprobs[out.computed], old[out.computed])
        metrics = out.metrics.as_dict()
        assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean", "resident"])
def test_runs_repeat_bit_for_bit(plan: str) -> None:
    case = make_case(5, lengths=(60, 80, 5), vocab=5003, dtype=torch.bfloat16, bias=True)
    config = LossConfig() if plan == "single_pass" else GSPO
    first, first_grads = run(case, config, plan=plan)
    second, second_grads = run(case, config, plan=plan)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean", "frozen_head"])
def test_backward_twice_gives_the_same(plan: str) -> None:
    case = make_case(6)
    leaves = case.leaves()
    weight = case.weight if plan == "frozen_head" else leaves["weight"]
    out = grpo_loss(leaves["hidden"], weight, case.targets, case.advantages, cu_seqlens=case.cu_seqlens, plan=plan)
    first = torch.autograd.grad(out.loss, leaves["hidden"], retain_graph=True)[0].clone()
    second = torch.autograd.grad(out.loss, leaves["hidden"])[0]
    assert torch.equal(first, second)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "lean"])
def test_gradients_of_a_kept_graph_are_the_callers_own(plan: str) -> None:
    """What one backward gave is neither scaled by the next one nor read by it."""
    case = make_case(6)
    leaves = case.leaves()
    inputs = list(leaves.values())
    out = grpo_loss(
        leaves["hidden"], leaves["weight"], case.targets, case.advantages, bias=leaves.get("bias"),
        cu_seqlens=case.cu_seqlens, plan=plan,
    )  # fmt: skip
    first = torch.autograd.grad(out.loss, inputs, retain_graph=True)
    before = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(out.loss, inputs, retain_graph=True)
    for gradient in second:
        gradient.zero_()
    third = torch.autograd.grad(3 * out.loss, inputs)
    for one, copy, scaled in zip(first, before, third, strict=True):
        assert torch.equal(one, copy)
        assert copy.abs().sum() > 0
        torch.testing.assert_close(scaled, 3 * copy)


@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "frozen_head", "none"])
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_every_logits_product_is_of_whole_tiles(plan: str, masked: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's product of fewer rows may take other instructions: the last chunk is padded (Backend.logits)."""
    products, multiply = [], TorchBackend.logits

    def logits(self: TorchBackend, hidden: Tensor, weight: Tensor, out: Tensor, tile_rows: int) -> None:
        products.append((hidden.shape[0], tile_rows))
        multiply(self, hidden, weight, out, tile_rows)

    monkeypatch.setattr(TorchBackend, "logits", logits)
    case = make_case(5, lengths=(40, 3, 90, 0, 62), vocab=300, masked_fraction=masked, masked_sequence=False)
    leaves = case.leaves()
    weight = case.weight if plan in ("frozen_head", "none") else leaves["weight"]
    with torch.set_grad_enabled(plan != "none"):
        out = grpo_loss(
            leaves["hidden"], weight, case.targets, case.advantages, cu_seqlens=case.cu_seqlens, backend="torch",
            loss_mask=case.loss_mask if masked else None, plan="auto" if plan == "none" else plan, ignore_index=None,
            config=LossConfig(all_token_metrics=True),
        )  # fmt: skip
        if plan != "none":
            out.loss.backward()
    assert products
    assert all(rows % tile_rows == 0 for rows, tile_rows in products)


def test_compaction_changes_nothing_but_the_work() -> None:
    """Half the groups at zero advantage: same loss and gradients as with every row computed."""
    case = make_case(7, lengths=(30,) * 8, vocab=3001, masked_sequence=False)
    case.advantages[::2] = 0
    compact, compact_grads = run(case, LossConfig(loss_type="grpo"))
    full, full_grads = run(case, LossConfig(loss_type="grpo", all_token_metrics=True))
    assert compact.computed.sum() < 0.6 * full.computed.sum()
    assert compact.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)
    for name, gradient in full_grads.items():
        assert rel_rms(compact_grads[name], gradient) <= 1e-6
    assert (full.logprobs[full.computed] < 0).all()
    assert (compact.logprobs[~compact.computed] == 0).all()


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(loss_type="sapo", beta=0.1), GSPO])
def test_a_compiled_caller_has_no_graph_break(config: LossConfig) -> None:
    case = make_case(8, bias=True)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = case.policy_inputs(config)
        out = grpo_loss(hidden * 1.5, weight, case.targets, case.advantages, bias=bias, config=config, **inputs)
        plain = token_logprobs(hidden, weight, case.targets, bias=bias)
        return out.loss * 2 + plain.logprobs.mean(), out.logprobs, out.metrics.vector

    results = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        loss, logprobs, metrics = function(*leaves.values())
        loss.backward()
        results.append((loss, logprobs, metrics.nan_to_num(), *(leaf.grad for leaf in leaves.values())))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_parts_merge_to_those_of_the_whole() -> None:
    case = make_case(9, dtype=torch.float64, missing_sampling=0.1)
    config = LossConfig(beta=0.1, importance_sampling_mode="token_mask", entropy_coef=0.01)
    whole = run(case, config)[0].metrics.as_dict()
    bounds, parts = case.cu_seqlens.tolist(), []
    for first, last in ((0, 5), (5, 6), (6, 12)):
        rows = slice(bounds[first], bounds[last])
        tensors = {
            name: value[rows]
            for name, value in case.policy_inputs(config).items()
            if name != "cu_seqlens" and value is not None
        }
        out = grpo_loss(
            case.hidden[rows],
            case.weight,
            case.targets[rows],
            case.advantages[first:last],
            cu_seqlens=case.cu_seqlens[first : last + 1] - bounds[first],
            config=config,
            normalizer=case.loss_mask.sum(),
            **tensors,
        )
        parts.append(out.metrics)
    merged = Metrics.merge(parts).as_dict()
    for name, value in whole.items():
        assert merged[name] == pytest.approx(value, rel=1e-9), name
    assert whole["clip_ratio/region_mean"] > 0
    with pytest.raises(ValueError, match="parts: expected at least one"):
        Metrics.merge([])


def _metrics_of(case: Case, first: int, last: int) -> Metrics:
    """Of sequences `first:last`: clipped, corrected, with a reference."""
    bounds = case.cu_seqlens[first : last + 1]
    rows = slice(int(bounds[0]), int(bounds[-1]))
    return policy_loss(
        case.logprobs[rows],
        case.advantages[first:last],
        entropy=case.entropy[rows],
        cu_seqlens=bounds - bounds[0],
        old_logprobs=case.old_logprobs[rows],
        ref_logprobs=case.ref_logprobs[rows],
        sampling_logprobs=case.sampling_logprobs[rows],
        config=LossConfig(loss_type="grpo", beta=0.1, importance_sampling_mode="token_truncate", entropy_coef=0.01),
    ).metrics


def test_metrics_stand_by_subject() -> None:
    """A mean beside its extrema, whatever their places in the vector are."""
    metrics = _metrics_of(make_case(9, dtype=torch.float64), 0, 12)
    names = (
        "loss entropy approx_kl ratio/min ratio/max active_row_fraction num_active_tokens num_sequences bad_rows kl "
    )
    names += "clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean clip_ratio/high_max clip_ratio/region_mean "
    names += "sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max "
    names += " ".join(f"sampling/importance_sampling_ratio/{part}" for part in ("min", "mean", "max"))
    assert " ".join(metrics.as_dict()) == " ".join(Metrics.merge([metrics] * 2).as_dict()) == names


def _rank(rank: int, port: int, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    case = make_case(10, dtype=torch.float64, masked_sequence=False)
    rows = slice(0, 40) if rank == 0 else slice(40, 86)
    out = policy_loss(
        case.logprobs[rows],
        torch.ones(rows.stop - rows.start, dtype=torch.float64),
        entropy=case.entropy[rows],
        config=LossConfig(top_entropy_quantile=0.3, loss_type="reinforce"),
        normalizer=1.0,
    )
    metrics = out.metrics.all_reduce().as_dict()
    sequences = (0, 6) if rank == 0 else (6, 12)
    everything = _metrics_of(case, *sequences).all_reduce().as_dict()
    results.put((rank, out.loss.item(), metrics["entropy"], metrics["loss"], everything))
    torch.distributed.destroy_process_group()


def test_quantiles_and_metrics_span_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes: the entropy quantile is that of all tokens, the metrics are those of the whole."""
    # They import this module by name, and some installed packages bring a top-level `tests` of their own.
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    got = sorted(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    case = make_case(10, dtype=torch.float64, masked_sequence=False)
    whole = policy_loss(
        case.logprobs,
        torch.ones(86, dtype=torch.float64),
        entropy=case.entropy,
        config=LossConfig(top_entropy_quantile=0.3, loss_type="reinforce"),
        normalizer=1.0,
    )
    assert got[0][1] + got[1][1] == pytest.approx(whole.loss.item(), rel=1e-12)
    assert got[0][2] == got[1][2] == pytest.approx(whole.metrics.as_dict()["entropy"], rel=1e-12)
    assert got[0][3] == pytest.approx(whole.loss.item(), rel=1e-12)
    undivided = _metrics_of(case, 0, 12).as_dict()
    assert undivided["clip_ratio/low_mean"] > 0
    for rank in got:
        assert rank[4] == pytest.approx(undivided, rel=1e-12)


# -- packing ----------------------------------------------------------------------------------------------------------


def test_pack_and_unpack() -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    values = torch.arange(9.0).reshape(3, 3)
    batch = pack_padded(mask, values=values, wide=values[..., None].expand(3, 3, 2))
    assert batch["values"].tolist() == [1, 2, 6, 8]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert batch["wide"].shape == (4, 2)
    assert torch.equal(unpack(batch["values"], batch, fill=-1), torch.where(mask == 1, values, -1))
    with pytest.raises(ValueError, match="values: expected 4 rows"):
        unpack(values, batch)
    with pytest.raises(ValueError, match=r"mask: expected shape \[sequences, length\]; got \[3\]"):
        pack_padded(mask[0], values=values)
    with pytest.raises(ValueError, match=r"other: expected leading dimensions \[3, 3\]; got \[2, 3\]"):
        pack_padded(mask, other=values[:2])
    with pytest.raises(ValueError, match="tensors: expected at least one"):
        pack_padded(mask)


# -- bad input --------------------------------------------------------------------------------------------------------

LONG = torch.int64
BAD_LOSS_INPUTS: list[tuple[str, dict[str, Any], str]] = [
    ("hidden list", {"hidden": [1.0]}, r"hidden: expected a tensor \[\.\.\., H\]; got list"),
    ("hidden dtype", {"hidden": torch.zeros(6, 4, dtype=LONG)}, "hidden: expected dtype float32"),
    ("hidden rank", {"hidden": torch.zeros(1, 1, 6, 4)}, r"hidden: expected \[T, H\] .*got shape \[1, 1, 6, 4\]"),
    ("weight rank", {"weight": torch.zeros(9)}, r"weight: expected a tensor \[V, H\]; got shape \[9\]"),
    ("weight width", {"weight": torch.zeros(9, 5)}, r"weight: expected \[V, 4\] .*got \[9, 5\]"),
    ("weight dtype", {"weight": torch.zeros(9, 4).bfloat16()}, "weight: expected dtype float32; got bfloat16"),
    ("weight device", {"weight": torch.zeros(9, 4, device="meta")}, "weight: expected device cpu.*got meta"),
    ("empty vocabulary", {"weight": torch.zeros(0, 4)}, "weight: expected a vocabulary of at least 1"),
    ("bias", {"bias": torch.zeros(8)}, r"bias: expected shape \[9\] \(vocabulary\); got \[8\]"),
    ("targets shape", {"targets": torch.zeros(5, dtype=LONG)}, r"targets: expected shape \[6\].*got \[5\]"),
    ("targets dtype", {"targets": torch.zeros(6)}, "targets: expected dtype int64 or int32; got torch.float32"),
    ("targets high", {"targets": torch.tensor([0, 1, 9, 0, 0, 0])}, r"targets: .* in \[0, 9\) .*got 9 at \[2\]"),
    ("targets low", {"targets": torch.tensor([0, 1, -1, 0, 0, 0])}, r"got -1 at \[2\]"),
    ("none ignored", {"targets": torch.tensor([0, 1, -100, 0, 0, 0]), "ignore_index": None}, r"got -100 at \[2\]"),
    ("advantages", {"advantages": torch.zeros(3)}, r"advantages: expected shape \[2\] \(one a sequence\) or \[6\]"),
    ("advantages none", {"advantages": None}, "advantages: expected a tensor; got NoneType"),
    ("cu_seqlens end", {"cu_seqlens": torch.tensor([0, 2, 5])}, r"cu_seqlens: expected 0 = .* T = 6; got \[0, 2, 5\]"),
    ("cu_seqlens start", {"cu_seqlens": torch.tensor([1, 2, 6])}, "cu_seqlens: expected 0 ="),
    ("cu_seqlens falling", {"cu_seqlens": torch.tensor([0, 7, 6])}, "cu_seqlens: expected 0 ="),
    ("cu_seqlens dtype", {"cu_seqlens": torch.tensor([0.0, 2, 6])}, "cu_seqlens: expected dtype int32 or int64"),
    ("cu_seqlens rank", {"cu_seqlens": torch.zeros(1, 3, dtype=LONG)}, r"cu_seqlens: expected a tensor \[S\+1\]"),
    ("mask shape", {"loss_mask": torch.ones(5, dtype=LONG)}, r"loss_mask: expected shape \[6\]"),
    ("mask dtype", {"loss_mask": torch.ones(6, dtype=torch.complex64)}, "loss_mask: expected bool, integers, or zeros"),
    ("mask of weights", {"loss_mask": torch.full((6,), 0.5)}, "loss_mask: expected only zeros and ones .*got 0.5"),
    ("old shape", {"old_logprobs": torch.zeros(2, 3)}, r"old_logprobs: expected shape \[6\].*got \[2, 3\]"),
    ("no ref", {"config": LossConfig(beta=0.1)}, "ref_logprobs: expected a tensor, as beta is 0.1; got None"),
    (
        "no sampling",
        {"config": LossConfig(importance_sampling_mode="token_mask")},
        "sampling_logprobs: expected a tensor, as importance_sampling_mode is 'token_mask'; got None",
    ),
    ("backend", {"backend": "tpu"}, "backend: expected auto or one of triton, cpu, torch.*got 'tpu'"),
    ("plan", {"plan": "fast"}, "plan: expected auto or one of single_pass.*got 'fast'"),
    ("plan coupled", {"plan": "single_pass", "config": GSPO}, "plan: 'single_pass' cannot serve this call"),
    ("plan frozen", {"plan": "frozen_head"}, "plan: 'frozen_head' cannot serve .*weight or bias needs a gradient"),
    ("workspace", {"workspace_bytes": 10}, "workspace_bytes: expected at least .*got 10"),
    (
        "workspace float",
        {"workspace_bytes": 1e9},
        r"workspace_bytes: expected an integer .* or None; got float 1000000000",
    ),
    ("config dict", {"config": {"beta": 0.1}}, "config: expected a LossConfig; got dict"),
    ("config of a head", {"config": HeadConfig()}, "config: expected a LossConfig; got HeadConfig"),
    ("config type", {"config": LossConfig}, "config: expected a LossConfig; got the type LossConfig"),
    ("ignore_index", {"ignore_index": "pad"}, "ignore_index: expected an integer of 64 bits or None; got str 'pad'"),
    ("ignore_index float", {"ignore_index": 1.5}, "ignore_index: expected an integer .*; got float 1.5"),
    ("ignore_index high", {"ignore_index": 2**63}, "ignore_index: expected an integer of 64 bits"),
    ("normalizer word", {"normalizer": "6"}, "normalizer: expected a number; got str '6'"),
    ("normalizer list", {"normalizer": [6.0]}, "normalizer: expected a number; got list"),
    ("normalizer array", {"normalizer": numpy.ones(2)}, "normalizer: expected a number; got ndarray"),
    ("normalizer complex", {"entropy_normalizer": torch.tensor(4j)}, "entropy_normalizer: expected one number; got"),
    (
        "old integers",
        {"old_logprobs": torch.zeros(6, dtype=LONG)},
        "old_logprobs: expected a floating-point dtype; got",
    ),
    (
        "ref complex",
        {"ref_logprobs": torch.zeros(6) * 1j},
        "ref_logprobs: expected a floating-point dtype; got torch.c",
    ),
    (
        "advantages complex",
        {"advantages": torch.zeros(2) * 1j},
        "advantages: expected real numbers; got torch.complex64",
    ),
    ("advantages array", {"advantages": numpy.ones(2)}, "advantages: expected a tensor; got ndarray"),
    ("temperature infinite", {"temperature": torch.full((6,), math.inf)}, "temperature: expected finite numbers > 0"),
    ("temperature word", {"temperature": "hot"}, "temperature: expected a number; got str 'hot'"),
    ("temperature array", {"temperature": numpy.ones(6)}, "temperature: expected a number; got ndarray"),
    (
        "temperature complex",
        {"temperature": torch.ones(6) * 1j},
        "temperature: expected real numbers; got torch.complex",
    ),
    (
        "main_grad leaf",
        {"main_grad": torch.zeros(9, 4, requires_grad=True)},
        "main_grad: .* got requires_grad True and",
    ),
    ("temperature", {"temperature": torch.zeros(6)}, "temperature: expected finite numbers > 0"),
    ("temperature shape", {"temperature": torch.ones(2)}, r"temperature: expected shape \[6\]"),
    ("main_grad shape", {"main_grad": torch.zeros(4, 9)}, r"main_grad: expected shape \[9, 4\]"),
    ("main_grad dtype", {"main_grad": torch.zeros(9, 4).bfloat16()}, "main_grad: expected dtype float32"),
]


@pytest.mark.parametrize(("changes", "message"), [pytest.param(c, m, id=i) for i, c, m in BAD_LOSS_INPUTS])
def test_bad_loss_input(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.randn(6, 4, requires_grad=True),
        "weight": torch.randn(9, 4, requires_grad=True),
        "targets": torch.arange(6),
        "advantages": torch.ones(2),
        "cu_seqlens": torch.tensor([0, 2, 6]),
    }
    grpo_loss(**arguments)  # good as it is
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(arguments | changes))


def test_bad_padded_and_policy_input() -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(9, 4)
    targets = torch.zeros(2, 3, dtype=LONG)
    with pytest.raises(ValueError, match="cu_seqlens: expected None in the padded layout"):
        grpo_loss(hidden, weight, targets, torch.ones(2), cu_seqlens=torch.tensor([0, 3, 6]))
    with pytest.raises(ValueError, match=r"advantages: expected shape \[2\] .*or \[2, 3\]"):
        grpo_loss(hidden, weight, targets, torch.ones(3))
    with pytest.raises(ValueError, match=r"logprobs: expected a floating-point tensor \[T\]"):
        policy_loss(torch.zeros(3, dtype=LONG), torch.ones(1))
    with pytest.raises(ValueError, match="entropy: expected a tensor, as entropy_coef"):
        policy_loss(torch.zeros(3), torch.ones(1), config=LossConfig(entropy_coef=0.1))
    with pytest.raises(ValueError, match=r"entropy: expected shape \[3\]"):
        policy_loss(torch.zeros(3), torch.ones(1), entropy=torch.zeros(2))
    with pytest.raises(ValueError, match="plan: 'single_pass' cannot serve"):
        token_logprobs(hidden.requires_grad_(), weight, targets, plan="single_pass")


def test_main_grad_refuses_a_scaled_loss() -> None:
    case = make_case(11)
    leaves = case.leaves()
    buffer = torch.zeros(case.weight.shape)
    out = grpo_loss(leaves["hidden"], leaves["weight"], case.targets, torch.ones(86), main_grad=buffer)
    with pytest.raises(ValueError, match=r"main_grad: expected backward with gradient 1 .*got gradient 0\.5"):
        (out.loss * 0.5).backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "gpro"}, "loss_type: expected one of grpo, .*got 'gpro'"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level: expected one of"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3"),
        ({"importance_sampling_mode": "mask"}, f"expected one of {IMPORTANCE_SAMPLING_MODES[0]}"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0; got 0.0"),
        ({"temperature": "hot"}, "temperature: expected a finite number"),
        ({"epsilon": -0.1}, "epsilon: expected a finite number >= 0"),
        ({"delta": 0}, "delta: expected .*or None; got 0"),
        ({"beta": math.nan}, "beta: expected a finite number"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile: expected .* <= 1"),
        ({"loss_type": "dr_grpo"}, "max_completion_length: dr_grpo divides by it"),
        ({"loss_type": "cispo"}, "epsilon_high: expected a number, as cispo bounds the ratio by it"),
        ({"loss_type": "vespo", "importance_sampling_mode": "sequence_mask"}, "importance_sampling_mode: vespo"),
        ({"importance_sampling_clip_min": 4.0}, "importance_sampling_clip_min: expected at most"),
    ],
)
def test_bad_loss_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes)


def test_bad_head_config() -> None:
    with pytest.raises(ValueError, match="softcap: expected a finite number > 0 or None; got 0"):
        HeadConfig(softcap=0)
    with pytest.raises(ValueError, match="logit_scale: expected a number other than 0"):
        HeadConfig(logit_scale=0.0)
    with pytest.raises(TypeError):
        LossConfig("grpo")  # keyword-only
