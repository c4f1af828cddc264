"""The branches that a GPU takes, taken without one (tests/stand_in.py), against the float64 oracle.

Backend `torch` here; tests/interpreted/test_stand_in.py runs the same with `triton`, whose kernels are interpreted.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast import devices
from grpo_fast.backends.base import get_backend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.loss import grpo_loss, token_logprobs
from grpo_fast.objectives import needs_every_row, slope_scope
from grpo_fast.ops.call import row_budget
from grpo_fast.ops.row_stream import RowStream
from tests.cases import INTERPRETED, OBJECTIVES, TOLERANCES, Case, assert_close, make_case, padded, rel_rms
from tests.stand_in import StandIn, Unordered, gpu, stand_in  # noqa: F401 - a fixture
from tests.test_loss import eager, legal_plans, oracle, run

BACKEND = "triton" if INTERPRETED else "torch"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU = torch.device("cpu")
LENGTHS = (7, 1, 17, 0, 5, 9)
TILE = 16
# Triton's interpreter cuts bf16 off where a GPU rounds it.
HALF_FLOOR = TOLERANCES[torch.bfloat16].floor * (2 if INTERPRETED else 1)


def workspace(vocab: int, dtype: torch.dtype, *, rows: int) -> int:
    """Bytes for one tile of logits and `rows` rows of dx beside it, or over logits where dx is never beside them."""
    engine = get_backend(BACKEND)
    pitch = engine.row_pitch(vocab)
    with stand_in():
        scratch = engine.scratch_bytes(vocab, dtype, CPU)
    return scratch + (TILE * pitch * 4 + rows * pitch * dtype.itemsize if engine.stages_dx else rows * pitch * 4)


def check(case: Case, config: LossConfig, plan: str, **options: Any) -> StandIn:
    """A whole step on the stand-in, within what the dtype allows of the oracle."""
    bf16_loss, plain = eager(replace(case, targets=case.targets.clamp(min=0)), config)
    expected, gradients = oracle(case, config)
    with stand_in(tile_rows=TILE, row_stream=options.pop("row_stream", False)) as device:
        out, actual = run(case, config, plan=plan, backend=BACKEND, **options)
    assert out.plan == plan
    assert_close(f"{plan} loss", out.loss, expected.loss, eager=bf16_loss)
    for name, gradient in gradients.items():
        assert_close(f"{plan} grad {name}", actual[name], gradient, eager=plain[name])
    error = (out.logprobs - expected.logprobs)[out.computed].square().mean().sqrt()
    assert error <= TOLERANCES[torch.float32].logprob_nats  # unrounded, whatever the operands are
    assert len(device.waits) <= 1, device.waits
    return device


@pytest.mark.parametrize("number", range(0, len(OBJECTIVES), 3 if INTERPRETED else 1))
def test_every_objective(number: int) -> None:
    """78 objectives, every plan that serves them; dtypes, layouts and streams take turns; several chunks."""
    config = LossConfig(**OBJECTIVES[number].values[0], temperature=0.9)
    dtype = DTYPES[number % 3]
    case = make_case(1, LENGTHS, bias=True, softcap=20.0, temperature=0.9, zero_advantages=0.3, dtype=dtype)
    if number % 2:
        case = padded(case, fill_target=-100, fill_logprob=float("nan"))
    plans = legal_plans(config)
    for plan in plans if not INTERPRETED else [plans[number % len(plans)]]:
        rows = 32 if plan == "resident" else 16  # resident must hold the longest sequence
        check(case, config, plan, workspace_bytes=workspace(97, torch.float32, rows=rows), row_stream=number % 4 > 1)


@pytest.mark.parametrize("rows", [16, 64], ids=["chunks", "one-chunk"])
@pytest.mark.parametrize("with_main_grad", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
def test_every_plan(dtype: torch.dtype, plan: str, with_main_grad: bool, rows: int) -> None:
    """Every storage, plan, number of chunks; the weight's gradient returned or added to a buffer."""
    config = LossConfig(beta=0.1, entropy_coef=0.02)
    case = make_case(2, LENGTHS, bias=True, vocab=203, dtype=dtype, logit_scale=0.7)
    # resident must hold the longest sequence, over the logits: where dx has a place of its own that counts, too
    both = plan == "resident" and rows == 16 and not (INTERPRETED and dtype == torch.float32)
    budget = workspace(203, dtype, rows=32 if both else rows)
    with stand_in(tile_rows=TILE):
        held = row_budget(BACKEND, 203, 32, dtype, CPU, budget)
    at_once = held.chunk_rows if plan == "resident" else held.rows_at_once
    assert (at_once < 33) == (rows == 16) or plan == "lean"
    if not with_main_grad:
        check(case, config, plan, workspace_bytes=budget)
        return
    expected, gradients = oracle(case, config)
    buffer, leaves = torch.ones(case.weight.shape), case.leaves()
    with stand_in(tile_rows=TILE):
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], case.targets, case.advantages, bias=leaves["bias"],
            head=HeadConfig(logit_scale=0.7), config=config, main_grad=buffer, plan=plan, backend=BACKEND,
            workspace_bytes=budget, **case.policy_inputs(config),
        )  # fmt: skip
        out.loss.backward()
    assert leaves["weight"].grad is None
    # float32 sums on top of ones
    assert rel_rms(buffer - 1, gradients["weight"]) <= (HALF_FLOOR if dtype == torch.bfloat16 else 1e-3)
    bound = HALF_FLOOR if dtype == torch.bfloat16 else TOLERANCES[dtype].floor
    assert rel_rms(leaves["hidden"].grad, gradients["hidden"]) <= bound
    assert rel_rms(out.loss, expected.loss) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
def test_frozen_head(dtype: torch.dtype) -> None:
    for kwargs in (p.values[0] for p in OBJECTIVES[:: 39 if INTERPRETED else 13]):
        config = LossConfig(**kwargs)
        case = make_case(6, LENGTHS, bias=True, softcap=15.0, dtype=dtype)
        hidden = case.hidden.clone().requires_grad_()
        with stand_in(tile_rows=TILE, row_stream=True):
            out = grpo_loss(
                hidden, case.weight, case.targets, case.advantages, bias=case.bias, head=HeadConfig(softcap=15.0),
                config=config, plan="frozen_head", backend=BACKEND, **case.policy_inputs(config),
                workspace_bytes=workspace(97, torch.float32, rows=32),
            )  # fmt: skip
            out.loss.backward()
        expected = oracle(case, config)[1]["hidden"]
        assert_close(str(kwargs), hidden.grad, expected, eager=eager(case, config)[1]["hidden"])


def test_two_chunks_of_bf16_without_main_grad_were_the_worst_bug() -> None:
    """A1: a float32 result of 16-bit operands is no plain `mm`: this is what the library says to one."""
    halves = torch.randn(4, 4).bfloat16()
    with stand_in(), pytest.raises(RuntimeError, match="out tensor to have dtype"):
        torch.mm(halves, halves, out=torch.empty(4, 4))


def test_views_and_padded_strides() -> None:
    """Operands that are parts of larger tensors, in every direction."""
    config = LossConfig(entropy_coef=0.02)
    case = make_case(3, LENGTHS, vocab=101, dtype=torch.bfloat16)
    expected, gradients = oracle(case, config)
    num_tokens, width = case.hidden.shape
    wide = torch.randn(num_tokens, 2 * width + 3).bfloat16()
    wide[:, 3 : 3 + width] = case.hidden
    tall = torch.randn(width, 130).bfloat16()
    tall[:, 7:108] = case.weight.t()
    hidden, weight = wide[:, 3 : 3 + width].requires_grad_(), tall[:, 7:108].t().requires_grad_()
    targets = torch.stack([case.targets, case.targets], 1)[:, 0]
    with stand_in(tile_rows=TILE):
        out = grpo_loss(
            hidden, weight, targets, case.advantages, config=config, backend=BACKEND,
            workspace_bytes=workspace(101, torch.bfloat16, rows=32), **case.policy_inputs(config),
        )  # fmt: skip
        out.loss.backward()
    assert rel_rms(hidden.grad, gradients["hidden"]) <= HALF_FLOOR
    assert rel_rms(weight.grad, gradients["weight"]) <= HALF_FLOOR
    assert rel_rms(out.loss, expected.loss) <= 1e-5


@pytest.mark.parametrize("row_stream", [False, True])
def test_first_ratio_is_one_and_bits_repeat(row_stream: bool) -> None:
    """Old and current passes agree to the bit, rows left out or not; so do two steps."""
    case = make_case(4, (22, 9, 15, 6), dtype=torch.bfloat16, vocab=203)
    case.advantages[1] = 0.0
    options = {"backend": BACKEND, "workspace_bytes": workspace(203, torch.float32, rows=48)}
    with stand_in(tile_rows=TILE, row_stream=row_stream):
        with torch.no_grad():
            old = token_logprobs(case.hidden, case.weight, case.targets, **options).logprobs
        results = []
        for _ in range(2):
            leaves = case.leaves()
            out = grpo_loss(
                leaves["hidden"], leaves["weight"], case.targets, case.advantages, cu_seqlens=case.cu_seqlens,
                old_logprobs=old, **options,
            )  # fmt: skip
            out.loss.backward()
            results.append((out.loss.detach(), leaves["hidden"].grad, leaves["weight"].grad))
    assert 0 < int(out.computed.sum()) < 52
    assert torch.equal(out.logprobs[out.computed], old[out.computed])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_scaled_loss_and_backward_twice(factor: float) -> None:
    """What the host cannot know to be 1 scales the gradients; a kept graph gives the same again."""
    case = make_case(5, LENGTHS, dtype=torch.bfloat16)
    gradients = oracle(case, LossConfig())[1]
    leaves = case.leaves()
    with stand_in(tile_rows=TILE):
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], case.targets, case.advantages, backend=BACKEND,
            **case.policy_inputs(LossConfig()),
        )  # fmt: skip
        loss = out.loss * factor
        inputs = list(leaves.values())
        first = [g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
        second = torch.autograd.grad(loss, inputs)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    for name, one, other in zip(leaves, first, second, strict=True):
        assert rel_rms(one, factor * gradients[name]) <= HALF_FLOOR
        assert rel_rms(other, factor * gradients[name]) <= HALF_FLOOR


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_sharpest_of_many_temperatures_does_not_overflow(plan: str) -> None:
    """Row temperatures 2^17 apart: float16's scale is that of the sharpest, or its dx is infinite."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 16).half(), torch.randn(40, 16).half()
    targets, temperature = torch.arange(8), torch.tensor([128.0, 2.0**-10] * 4)
    hidden[1::2] *= 2.0**-11  # or one word of a sharp row would have all of the probability
    exact_hidden, exact_weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    z = exact_hidden @ exact_weight.T / temperature.double()[:, None]
    (-torch.log_softmax(z, -1)[torch.arange(8), targets].mean()).backward()  # the ratio is 1
    ours, buffer = hidden.clone().requires_grad_(), torch.zeros(40, 16)
    with stand_in():
        out = grpo_loss(
            ours, weight.clone().requires_grad_(), targets, torch.ones(1), temperature=temperature, plan=plan,
            backend=BACKEND, main_grad=buffer,
        )  # fmt: skip
        out.loss.backward()
    bound = TOLERANCES[torch.float16].floor
    assert rel_rms(buffer, exact_weight.grad) <= bound
    assert rel_rms(ours.grad, exact_hidden.grad) <= bound


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_a_biass_sum_is_beyond_float16(plan: str) -> None:
    """Ratios of e^9 in 32 rows: a column's scaled dx adds up to more than 65504, in float32 until it is unscaled."""
    hidden = torch.zeros(32, 4, dtype=torch.float16, requires_grad=True)
    weight, bias = (torch.zeros(shape, dtype=torch.float16, requires_grad=True) for shape in ((8, 4), (8,)))
    with stand_in():
        out = grpo_loss(
            hidden, weight, torch.zeros(32, dtype=torch.int64), -torch.ones(1), bias=bias, plan=plan, backend=BACKEND,
            old_logprobs=torch.full((32,), -9.0 - math.log(8)), normalizer=32.0,
        )  # fmt: skip
        out.loss.backward()
    # loss = mean of the ratios; all eight words are as likely
    expected = math.exp(9.0) * torch.tensor([0.875] + [-0.125] * 7)
    torch.testing.assert_close(bias.grad.float(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("plan", ["recompute", "lean"])
def test_a_biass_sum_of_more_rows_than_float16_counts(plan: str) -> None:
    """Where the slopes are known the scale brings the largest to 1: of 150,000 rows the sum is beyond 65504 still."""
    rows = 150_000
    hidden = torch.zeros(rows, 4, dtype=torch.float16, requires_grad=True)
    weight, bias = (torch.zeros(shape, dtype=torch.float16, requires_grad=True) for shape in ((8, 4), (8,)))
    with stand_in():
        out = grpo_loss(
            hidden, weight, torch.zeros(rows, dtype=torch.int64), torch.ones(1), bias=bias, plan=plan, backend="torch"
        )
        out.loss.backward()
    torch.testing.assert_close(bias.grad.float(), torch.tensor([-0.875] + [0.125] * 7), rtol=2e-3, atol=0)


def test_dppos_regulariser_alone_sets_float16s_scale() -> None:
    """Advantages of 0 say nothing of what the regulariser's gradient needs: of weights of 1e-7 it would be lost."""
    case = make_case(5, LENGTHS, dtype=torch.float16)
    case.advantages.zero_()
    config = LossConfig(loss_type="dppo", dppo_log_ratio_coef=0.1)
    buffers = []
    for each, device in ((case.double(), nullcontext()), (case, stand_in())):
        buffers.append(torch.zeros_like(each.weight, dtype=torch.promote_types(each.weight.dtype, torch.float32)))
        leaves = each.leaves()
        with device:
            out = grpo_loss(
                leaves["hidden"], leaves["weight"], each.targets, each.advantages, config=config, normalizer=1e7,
                plan="single_pass", main_grad=buffers[-1], backend=BACKEND, **each.policy_inputs(config),
            )  # fmt: skip
            out.loss.backward()
    assert buffers[0].abs().sum() > 0
    assert rel_rms(buffers[1], buffers[0]) <= TOLERANCES[torch.float16].floor


def test_main_grad_refuses_a_scaled_loss_on_the_device() -> None:
    case = make_case(5, LENGTHS)
    leaves = case.leaves()
    with stand_in():
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], case.targets, case.advantages, cu_seqlens=case.cu_seqlens,
            main_grad=torch.zeros_like(case.weight), backend=BACKEND,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="main_grad: expected backward with gradient 1"):
            (out.loss * 0.5).backward()


def test_waits() -> None:
    """A packed call waits once, to count its rows; one that needs every row never."""
    case = make_case(7, LENGTHS, dtype=torch.bfloat16)
    for config, given, waits in (
        (LossConfig(), {}, 1),
        (LossConfig(entropy_coef=0.1), {"ignore_index": None}, 0),
        (LossConfig(entropy_coef=0.1), {}, 1),  # to leave out what is ignored
        (LossConfig(entropy_coef=0.1), {"ignore_index": None, "loss_mask": case.loss_mask}, 1),
        (LossConfig(importance_sampling_level="sequence"), {"plan": "resident"}, 1),  # sequences' rows
        (LossConfig(importance_sampling_level="sequence", entropy_coef=0.1), {"ignore_index": None}, 1),
    ):
        leaves = case.leaves()
        with stand_in(tile_rows=TILE) as device:
            out = grpo_loss(
                leaves["hidden"], leaves["weight"], case.targets, case.advantages, cu_seqlens=case.cu_seqlens,
                config=config, backend=BACKEND, **given,
            )  # fmt: skip
            out.loss.backward()
        assert len(device.waits) <= waits, (config.loss_type, given, device.waits)
        assert needs_every_row(config) or (slope_scope(config, has_old=False) != "row") or len(device.waits) == 1


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_the_scale_of_float16_is_the_larger_slopes(plan: str) -> None:
    """B2: an entropy bonus beside advantages of next to nothing, where dx is float16 itself."""
    case = make_case(1, dtype=torch.float16)
    case.advantages.fill_(1e-8)
    check(case, LossConfig(entropy_coef=5.0), plan, workspace_bytes=workspace(97, torch.float16, rows=48))


def test_tokens_are_gathered_once_a_call() -> None:
    """A12: not once a tile: the host of a small head has no time for it."""
    case = make_case(7, (22, 21, 14), dtype=torch.bfloat16)
    config = LossConfig(beta=0.1, importance_sampling_mode="token_truncate")
    counts = []
    for rows in (16, 64):
        with stand_in(tile_rows=TILE) as device:
            run(case, config, backend=BACKEND, workspace_bytes=workspace(97, torch.bfloat16, rows=rows))
        counts.append(device.operators["index.Tensor"])
    assert counts[0] == counts[1] > 0


def test_ignored_targets() -> None:
    """-100 among the targets, no mask: masked, on the device as elsewhere."""
    case = make_case(8, LENGTHS, dtype=torch.bfloat16, masked_fraction=0.3)
    config = LossConfig(entropy_coef=0.05)
    expected, gradients = oracle(case, config)
    targets = torch.where(case.loss_mask, case.targets, -100)
    with stand_in(tile_rows=TILE):
        out, actual = run(replace(case, targets=targets), config, loss_mask=None, backend=BACKEND, workspace_bytes=None)
    assert torch.equal(out.computed, case.loss_mask)
    assert rel_rms(out.loss, expected.loss) <= 1e-5
    assert all(rel_rms(actual[n], gradients[n]) <= HALF_FLOOR for n in gradients)


@pytest.fixture
def tf32() -> Iterator[None]:
    """The process allows TF32 in the place of float32."""
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    yield
    assert switch.fp32_precision == "tf32"
    switch.fp32_precision = before


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_float32_stays_float32_where_tf32_is_allowed(plan: str, tf32: None) -> None:
    """A5: products of float32 heads keep their bits, and the process's switch is left alone."""
    case = make_case(9, LENGTHS, hidden_size=64, vocab=203, logit_std=4.0)
    with stand_in():
        a, b = torch.randn(8, 64), torch.randn(64, 8)
        assert 1e-4 < rel_rms(a @ b, a.double() @ b.double()) < 1e-3  # what the stand-in does to others' products
    check(case, LossConfig(entropy_coef=0.02), plan, workspace_bytes=workspace(203, torch.float32, rows=32))


def test_debug_mode_checks_values_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(5, LENGTHS)
    targets = case.targets.clone()
    targets[3] = 97
    given: dict[str, Any] = {"cu_seqlens": case.cu_seqlens, "backend": BACKEND}
    with stand_in():
        out = grpo_loss(case.hidden, case.weight, targets, case.advantages, **given)
        assert out.metrics.as_dict()["bad_rows"] == 1  # B6: no word has that number
        monkeypatch.setenv("GRPO_FAST_DEBUG", "1")
        with pytest.raises(ValueError, match=r"targets: .*got 97 at \[3\]"):
            grpo_loss(case.hidden, case.weight, targets, case.advantages, **given)


# -- streams ----------------------------------------------------------------------------------------------------------


def stepped(case: Case, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    return run(case, LossConfig(), backend=BACKEND, workspace_bytes=workspace(203, torch.bfloat16, rows=96), **options)


MISTAKES = {
    "a row function before its product": ("after_product", lambda self: self.streams.stream(self.stream)),
    "a product over logits in use": ("before_product", lambda self, buffer: None),
    "backward products before the row functions": ("join", lambda self: None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_unordered_streams_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if BACKEND == "torch":
        monkeypatch.setattr(type(get_backend("torch")), "stages_dx", True)  # two buffers want dx beside them
    case = make_case(10, (40, 33), vocab=203, dtype=torch.bfloat16, masked_fraction=0.0)
    with stand_in(tile_rows=TILE, row_stream=True) as device:
        stepped(case)
    assert len(device.streams.made) == 1
    monkeypatch.setattr(RowStream, *MISTAKES[mistake])
    with pytest.raises(Unordered), stand_in(tile_rows=TILE, row_stream=True):
        stepped(case)


def test_memory_of_another_stream_is_seen() -> None:
    def uses_it_elsewhere() -> None:
        with stand_in() as device:
            side = device.streams.Stream()
            values = torch.ones(8)
            side.wait_stream(device.streams.current)
            with device.streams.stream(side):
                values.add_(1)
            del values
            gc.collect()

    with pytest.raises(Unordered, match="went back to its own stream's pool"):
        uses_it_elsewhere()


def test_an_error_in_a_row_function_leaves_the_callers_stream_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """A8."""
    if BACKEND == "torch":
        monkeypatch.setattr(type(get_backend("torch")), "stages_dx", True)
    case = make_case(10, (64, 33), vocab=203, dtype=torch.bfloat16)

    def fails(*args: Any, **kwargs: Any) -> Any:
        assert device.streams.current is not caller
        raise RuntimeError("in the row function")

    monkeypatch.setattr(type(get_backend(BACKEND)), "objective_rows", fails)
    with stand_in(tile_rows=TILE, row_stream=True) as device:
        caller = device.streams.current
        with pytest.raises(RuntimeError, match="in the row function"):
            stepped(case)
        assert device.streams.current is caller


@pytest.mark.parametrize("row_stream", [False, True])
@pytest.mark.parametrize("spare", [0, 1, 97, 1000])
def test_two_buffers_are_both_of_the_workspace(row_stream: bool, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = get_backend(BACKEND)
    monkeypatch.setattr(type(engine), "stages_dx", True)
    pitch = engine.row_pitch(203)
    with stand_in(tile_rows=TILE, row_stream=row_stream):
        scratch = engine.scratch_bytes(203, torch.bfloat16, CPU)
        total = scratch + 8 * TILE * pitch * 4 + spare
        held = row_budget(BACKEND, 203, 32, torch.bfloat16, CPU, total)
    assert held.num_buffers == 1 + row_stream
    used = held.num_buffers * held.tile_rows * pitch * 4 + held.staged_rows * pitch * 2
    assert used <= total - scratch < used + held.tile_rows * pitch * 2


def test_passes_share_a_stream() -> None:
    """B12: one second stream a device, as each has memory of its own."""
    with stand_in() as device:
        first, second = RowStream(CPU, 2), RowStream(CPU, 2)
        assert first.stream is second.stream
        assert len(device.streams.made) == 1
    with stand_in():
        assert RowStream(CPU, 2).stream is not first.stream


def test_the_stand_in_leaves_nothing_behind() -> None:
    before = devices.TRAITS["cpu"]
    with stand_in():
        assert devices.TRAITS["cpu"] is not before
    assert devices.TRAITS["cpu"] is before
    with pytest.raises(NotImplementedError):
        torch.ops.aten.mm.dtype_out(
            torch.ones(2, 2).half(), torch.ones(2, 2).half(), torch.float32, out=torch.ones(2, 2)
        )
