"""What a GPU runs, with every backend: losses against float64, plans, chunks, memory, bits, waits, streams, graphs.

The same functions run on the stand-in (tests/places.py) as far as they make sense there, so that they are known to work
before there is a GPU; tests/test_stand_in.py has the whole matrix there. compute-sanitizer is a part of `make gpu`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.backends.base import get_backend
from grpo_fast.loss import HeadConfig, LossConfig, grpo_loss, token_logprobs
from grpo_fast.losses import LOSSES
from grpo_fast.objectives import slope_scope
from grpo_fast.ops.call import row_budget
from grpo_fast.reference import reference_logprobs
from tests.cases import OBJECTIVES, TOLERANCES, Case, assert_close, make_case, objective_kwargs, objective_rows, rel_rms
from tests.places import GPU_PLACES, PLACES, STAND_IN, TILE, Place, place_of
from tests.test_loss import eager, head_options, legal_plans, oracle, run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LENGTHS = (7, 1, 30, 0, 5, 25)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
on_gpus = pytest.mark.parametrize("place", GPU_PLACES, indirect=True)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return place_of(request.param)


def everywhere(count: int, step: int) -> Any:
    """(place, number) for all numbers below `count` on GPUs, each `step`th on the stand-in."""
    pairs = [
        pytest.param(where.values[0], number, id=f"{where.id}-{number}", marks=where.marks)
        for where in PLACES
        for number in range(0, count, step if where is STAND_IN else 1)
    ]
    return pytest.mark.parametrize(("place", "number"), pairs, indirect=["place"])


# -- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A case with what float64 and plain arithmetic in its dtype say: computed once for all backends and plans."""

    case: Case
    config: LossConfig
    loss: Tensor
    logprobs: Tensor
    gradients: dict[str, Tensor]
    plain_loss: Tensor
    plain: dict[str, Tensor]

    def check(self, place: Place, plan: str, **options: Any) -> Any:
        """Run the loss in several chunks and compare."""
        case, vocab = self.case, self.case.weight.shape[0]
        rows = 48 if plan == "resident" else 32  # the first must hold the longest sequence
        size = options.pop("workspace_bytes", None) or place.workspace(vocab, case.weight.dtype, rows=rows)
        with place.on(tile_rows=TILE, row_stream=options.pop("row_stream", None)):
            out, actual = run(case, self.config, plan=plan, backend=place.backend, workspace_bytes=size, **options)
        assert out.plan == plan or plan == "auto"
        assert_close(f"{plan} loss", out.loss, self.loss, eager=self.plain_loss)
        for name, gradient in self.gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient, eager=self.plain[name])
        error = (out.logprobs - self.logprobs)[out.computed].square().mean().sqrt()
        assert error <= TOLERANCES[torch.float32].logprob_nats  # unrounded, whatever the operands are
        return out


def judged(case: Case, config: LossConfig) -> Judged:
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    return Judged(
        case, config, expected.loss.detach(), expected.logprobs.detach(), gradients, plain_loss.detach(), plain
    )


@cache
def objective_case(number: int, dtype: torch.dtype, device: torch.device) -> Judged:
    case = make_case(
        1, LENGTHS, dtype=dtype, bias=True, zero_advantages=0.3, softcap=20.0, temperature=0.9, device=device
    )
    return judged(case, LossConfig(**OBJECTIVES[number].values[0], temperature=0.9))


@dtypes
@everywhere(len(OBJECTIVES), 26)
def test_objectives(place: Place, number: int, dtype: torch.dtype) -> None:
    """All of the matrix, in every plan that serves each."""
    found = objective_case(number, dtype, place.device)
    for plan in legal_plans(found.config):
        found.check(place, plan, row_stream=number % 2 == 1)
    found.check(place, "auto", workspace_bytes=2**28)


def token_local() -> list[dict[str, Any]]:
    """The matrix again, each row without what couples tokens, so that it reaches the fused row function.

    Only 6 of its 78 rows do as they stand: they take the sequence level, masks and corrections in turn.
    """
    local = {"strunc": "ttrunc", "smask": "tmask"}
    rows = {
        (loss_type, kl, local.get(correction, correction), extra)
        for loss_type, _, kl, correction, _, extra in objective_rows()
        if LOSSES[loss_type].couples == "nothing"
    }
    return [objective_kwargs(loss, "token", kl, correct, "nomask", extra) for loss, kl, correct, extra in sorted(rows)]


TOKEN_LOCAL = token_local()


def test_every_token_local_objective_is_among_them() -> None:
    assert len(TOKEN_LOCAL) >= 50
    assert len({kwargs["loss_type"] for kwargs in TOKEN_LOCAL}) == 11
    assert not any((slope_scope(LossConfig(**kwargs), has_old=True) != "row") for kwargs in TOKEN_LOCAL)


@cache
def local_case(number: int, dtype: torch.dtype, device: torch.device) -> Judged:
    case = make_case(4, LENGTHS, dtype=dtype, bias=True, missing_sampling=0.2, temperature=1.2, device=device)
    return judged(case, LossConfig(**TOKEN_LOCAL[number], temperature=1.2))


@dtypes
@everywhere(len(TOKEN_LOCAL), 16)
def test_fused_objectives(place: Place, number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, objective and dx in one kernel, for every term, KL, correction and bonus."""
    engine, chunks = get_backend(place.backend), []
    name = "fused_objective" if hasattr(engine, "fused_objective") else "objective_rows"
    original = getattr(type(engine), name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        chunks.append(args[1].logits.shape[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(type(engine), name, counted)
    local_case(number, dtype, place.device).check(place, "single_pass")
    assert len(chunks) >= 2


@dtypes
@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "lean", "frozen_head"])
def test_every_plan_in_several_chunks(place: Place, plan: str, dtype: torch.dtype) -> None:
    """Weight gradient returned and added to `main_grad`; no gradient of the head; few rows a chunk, and all in one."""
    config = LossConfig(beta=0.1, entropy_coef=0.02)
    case = make_case(2, LENGTHS, bias=True, vocab=203, dtype=dtype, logit_scale=0.7, device=place.device)
    found = judged(case, config)
    size = place.workspace(203, dtype, rows=48 if plan == "resident" else 32)
    with place.on(tile_rows=TILE):
        held = row_budget(place.backend, 203, 32, dtype, place.device, size)
    assert (held.chunk_rows if plan == "resident" else held.rows_at_once) < 68 or plan == "lean"
    if plan == "frozen_head":
        hidden = case.hidden.clone().requires_grad_()
        with place.on(tile_rows=TILE):
            out = grpo_loss(
                hidden, case.weight, case.targets, case.advantages, bias=case.bias, config=config, plan=plan,
                backend=place.backend, workspace_bytes=size, **head_options(case), **case.policy_inputs(config),
            )  # fmt: skip
            out.loss.backward()
        assert hidden.grad is not None
        assert_close("grad hidden", hidden.grad, found.gradients["hidden"], eager=found.plain["hidden"])
        return
    for bytes_ in (size, 2**28):
        found.check(place, plan, workspace_bytes=bytes_)
    buffer, leaves = torch.ones(case.weight.shape, device=place.device), case.leaves()
    with place.on(tile_rows=TILE):
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], case.targets, case.advantages, bias=leaves["bias"], config=config,
            main_grad=buffer, plan=plan, backend=place.backend, workspace_bytes=size, **head_options(case),
            **case.policy_inputs(config),
        )  # fmt: skip
        out.loss.backward()
    assert leaves["weight"].grad is None
    # float32 sums on top of ones
    assert rel_rms(buffer - 1, found.gradients["weight"]) <= max(TOLERANCES[dtype].floor, 4e-5)


@dtypes
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_per_token_temperature(place: Place, plan: str, dtype: torch.dtype) -> None:
    """Several chunks: each must take its own rows' temperatures."""
    case = make_case(5, LENGTHS, vocab=211, dtype=dtype, softcap=25.0, device=place.device)
    temperature = torch.linspace(0.6, 1.7, case.targets.numel(), device=place.device)
    config = LossConfig(entropy_coef=0.05)
    expected, gradients = oracle(case, config, temperature=temperature.double())
    with place.on(tile_rows=TILE):
        out, actual = run(
            case, config, plan=plan, temperature=temperature, backend=place.backend,
            workspace_bytes=place.workspace(211, dtype, rows=32),
        )  # fmt: skip
    assert rel_rms(out.loss, expected.loss) <= 1e-4
    for name, gradient in gradients.items():
        assert rel_rms(actual[name], gradient) <= 2 * TOLERANCES[dtype].floor, name


@cache
def vocabulary_case(vocab: int, dtype: torch.dtype, device: torch.device) -> Judged:
    case = make_case(3, lengths=(50, 90, 20, 70), hidden_size=64, vocab=vocab, dtype=dtype, device=device)
    return judged(case, LossConfig(entropy_coef=0.01, beta=0.05))


VOCABS = (1000, 32000, 50257, 151669, 256000)


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
@dtypes
@everywhere(len(VOCABS), len(VOCABS))
def test_real_vocabularies(place: Place, number: int, dtype: torch.dtype, plan: str) -> None:
    vocabulary_case(VOCABS[number], dtype, place.device).check(place, plan, workspace_bytes=2**29)


@dtypes
@pytest.mark.parametrize("width", [64, 576])
@everywhere(len(VOCABS), len(VOCABS))
def test_fused_forward(place: Place, number: int, width: int, dtype: torch.dtype) -> None:
    """The plan that never writes a logit, through the copy engine's tiles where the device has them."""
    if not get_backend(place.backend).has_fused_forward:
        pytest.skip(f"{place.backend} has no fused forward")
    if place.stand_in and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 products are wrong")
    case = make_case(8, (50, 90, 20, 71), width, VOCABS[number], dtype, bias=True, softcap=30.0, device=place.device)
    temperature = torch.linspace(0.7, 1.4, case.targets.numel(), device=place.device)
    head = HeadConfig(softcap=30.0)
    assert case.bias is not None
    exact = reference_logprobs(
        case.hidden.double(), case.weight.double(), case.targets, bias=case.bias.double(), head=head,
        temperature=temperature.double(),
    )  # fmt: skip
    with torch.no_grad(), place.on():
        out = token_logprobs(
            case.hidden, case.weight, case.targets, bias=case.bias, head=head, temperature=temperature,
            backend=place.backend, plan="fused_forward",
        )  # fmt: skip
    assert out.entropy is not None
    bound = 1e-4 if dtype == torch.float32 else TOLERANCES[dtype].logprob_nats / 10
    for actual, expected in zip((out.logprobs, out.entropy), exact, strict=True):
        assert (actual - expected).square().mean().sqrt() <= bound


def test_nothing_to_learn(place: Place) -> None:
    """Masked altogether, or ignored targets: a differentiable zero. A target out of range: counted, no crash."""
    case = make_case(6, LENGTHS, dtype=torch.bfloat16, device=place.device)
    given: dict[str, Any] = {"backend": place.backend, "cu_seqlens": case.cu_seqlens}
    for change in ({"loss_mask": torch.zeros_like(case.loss_mask)}, {"targets": torch.full_like(case.targets, -100)}):
        leaves = case.leaves()
        arguments = {"targets": case.targets} | given | change
        with place.on():
            out = grpo_loss(leaves["hidden"], leaves["weight"], advantages=case.advantages, **arguments)
            out.loss.backward()
        assert out.loss == 0
        assert leaves["weight"].grad is not None
        assert not leaves["weight"].grad.any()
    targets = case.targets.clone()
    targets[3] = 97
    with place.on():
        out = grpo_loss(case.hidden, case.weight, targets, case.advantages, **given)
        assert out.metrics.as_dict()["bad_rows"] == 1


def test_float32_stays_float32_where_tf32_is_allowed(place: Place) -> None:
    switch = torch.backends.cuda.matmul
    found = judged(make_case(9, LENGTHS, hidden_size=64, vocab=203, logit_std=4.0, device=place.device), LossConfig())
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        for plan in ("single_pass", "recompute", "lean"):
            found.check(place, plan)
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


def test_logprobs_are_unrounded(place: Place) -> None:
    vocab = 1000 if place.stand_in else 32000
    case = make_case(3, dtype=torch.bfloat16, vocab=vocab, hidden_size=256, device=place.device)
    with torch.no_grad(), place.on():
        out = token_logprobs(case.hidden, case.weight, case.targets, backend=place.backend)
    error = (out.logprobs - case.logprobs).square().mean().sqrt()
    assert error <= TOLERANCES[torch.bfloat16].logprob_nats / 10


# -- bits, memory, waits ----------------------------------------------------------------------------------------------


class Big:
    """Inputs of a real shape, or of one that only looks like it on the stand-in, made on the device."""

    def __init__(self, place: Place, tokens: int, width: int, vocab: int, sequences: int = 32) -> None:
        if place.stand_in:
            tokens, width, vocab, sequences = 96, 32, 203, 8
        device, self.place = place.device, place
        generator = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(tokens, width, device=device, generator=generator).bfloat16().requires_grad_()
        weight = torch.randn(vocab, width, device=device, generator=generator) * (3 / width**0.5)
        self.weight = weight.bfloat16().requires_grad_()
        self.targets = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
        self.advantages = torch.randn(sequences, device=device, generator=generator)
        self.cu_seqlens = torch.arange(sequences + 1, device=device) * (tokens // sequences)

    def step(self, **options: Any) -> tuple[Any, Tensor, Tensor]:
        """(result, gradients of hidden and weight) of one loss."""
        self.hidden.grad = self.weight.grad = None
        given = {"backend": self.place.backend} | options
        out = grpo_loss(self.hidden, self.weight, self.targets, self.advantages, cu_seqlens=self.cu_seqlens, **given)
        out.loss.backward()
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return out, self.hidden.grad, self.weight.grad


@pytest.mark.parametrize("gib", [0.5, 1, 2.5])
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean", "resident"])
def test_real_shape_memory_and_bits(place: Place, plan: str, gib: float) -> None:
    """T = 4096, V = 151936: within the cap by the allocator's count, first ratio exactly 1, bitwise repeatable."""
    big = Big(place, 4096, 1024, 151936)
    (tokens, width), vocab = big.hidden.shape, big.weight.shape[0]
    size = place.workspace(vocab, torch.bfloat16, rows=48) if place.stand_in else int(gib * 2**30)
    level = "token" if plan == "single_pass" else "sequence"
    results = []
    with place.on(tile_rows=TILE if place.stand_in else None):
        with torch.no_grad():
            options: dict[str, Any] = {"backend": place.backend, "workspace_bytes": size}
            old = token_logprobs(big.hidden, big.weight, big.targets, **options).logprobs
        for _ in range(2):
            if not place.stand_in:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            config = LossConfig(importance_sampling_level=level)
            out, *gradients = big.step(old_logprobs=old, config=config, plan=plan, workspace_bytes=size)
            if not place.stand_in:
                torch.cuda.synchronize()
                extra = torch.cuda.max_memory_allocated() - before
                assert extra <= size + vocab * width * (4 + 2 * 2) + tokens * width * 20
            results.append((out.loss.detach().clone(), *(g.clone() for g in gradients)))
    assert torch.equal(out.logprobs, old)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_stream_or_two_the_same_bits(place: Place) -> None:
    """And again, which a race would not survive."""
    big = Big(place, 4096, 256, 32000)
    size = place.workspace(203, torch.bfloat16, rows=96) if place.stand_in else 2**29
    results = []
    for row_stream in (False, True, True, True):
        with place.on(tile_rows=TILE if place.stand_in else None, row_stream=row_stream):
            out, *gradients = big.step(config=LossConfig(entropy_coef=0.01), workspace_bytes=size)
            results.append([out.loss.detach().clone(), *(g.clone() for g in gradients)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("ours", ["triton", "cuda"])
def test_backends_agree_at_full_shape(ours: str) -> None:
    place = place_of(("cuda", ours))
    big = Big(place, 4096, 2048, 128256)
    config = LossConfig(entropy_coef=0.01)
    theirs = [t.clone() for t in big.step(backend="torch", config=config)[1:]]
    found = big.step(config=config)[1:]
    assert all(rel_rms(a, b) <= 4e-3 for a, b in zip(found, theirs, strict=True))


def test_more_than_two_to_the_31_logits(place: Place) -> None:
    """One buffer of dx holds T V = 2.5e9 entries: the last rows are those of a call on them alone, bit for bit.

    With the same workspace, hence the same tiles.
    """
    big = Big(place, 16384, 64, 151936)
    tokens = big.hidden.shape[0]
    size = place.workspace(203, torch.bfloat16, rows=96) if place.stand_in else 13 * 2**30
    last = int(big.cu_seqlens[-2])
    tail = slice(last, tokens)
    hidden = big.hidden[tail].detach().requires_grad_()
    with place.on(tile_rows=TILE if place.stand_in else None):
        out, grad_hidden, _ = big.step(workspace_bytes=size)
        alone = grpo_loss(
            hidden, big.weight.detach(), big.targets[tail], big.advantages[-1:], backend=place.backend,
            cu_seqlens=torch.tensor([0, tokens - last], device=place.device), normalizer=float(tokens),
            workspace_bytes=size, plan="single_pass",
        )  # fmt: skip
        alone.loss.backward()
    assert torch.equal(out.logprobs[tail], alone.logprobs)
    assert hidden.grad is not None
    assert rel_rms(grad_hidden[tail], hidden.grad) <= 4e-3


def test_waits(place: Place) -> None:
    """A packed call waits for the device once, to count its rows; one that needs every row never."""
    case = make_case(2, dtype=torch.bfloat16, vocab=1000, device=place.device)
    for config, given, most in (
        (LossConfig(entropy_coef=0.1), {"ignore_index": None}, 0),
        (LossConfig(), {}, 1),
        (LossConfig(entropy_coef=0.1), {"loss_mask": case.loss_mask}, 1),
    ):
        leaves = case.leaves()
        for _ in range(2):  # the first compiles
            with place.on() as waits:
                out = grpo_loss(
                    leaves["hidden"], leaves["weight"], case.targets, case.advantages, cu_seqlens=case.cu_seqlens,
                    config=config, backend=place.backend, **given,
                )  # fmt: skip
                out.loss.backward()
        assert len(waits.names) <= most, (config, given, waits.names)


# -- streams, graphs, compilers, cards --------------------------------------------------------------------------------


@on_gpus
@pytest.mark.parametrize("row_stream", [False, True], ids=["one-stream", "two-streams"])
def test_graph_capture(place: Place, row_stream: bool) -> None:
    """A captured step, replayed on new inputs, does what the step does."""
    big = Big(place, 4096, 256, 32000)
    # With `ignore_index` the rows would have to be counted, on the host.
    options: dict[str, Any] = {"config": LossConfig(beta=0.1), "workspace_bytes": 2**29, "ignore_index": None}
    ref = torch.full((4096,), -3.0, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with place.on(row_stream=row_stream):
        with torch.cuda.stream(side):
            for _ in range(2):
                big.step(ref_logprobs=ref, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, *gradients = big.step(ref_logprobs=ref, **options)
        with torch.no_grad():
            big.hidden.copy_(torch.randn_like(big.hidden))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [out.loss.detach().clone(), *(g.clone() for g in gradients)]
        fresh, *expected = big.step(ref_logprobs=ref, **options)
    assert all(torch.equal(a, b) for a, b in zip(replayed, (fresh.loss.detach(), *expected), strict=True))


@on_gpus
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(place: Place, mode: str) -> None:
    """With a mask, whose rows are counted inside an operator: that one stays out of the compiler's graphs."""
    big = Big(place, 512, 64, 1000)
    mask = torch.arange(512, device="cuda") % 3 > 0

    def loss(hidden: Tensor) -> Tensor:
        out = grpo_loss(
            hidden * 2, big.weight, big.targets, big.advantages, cu_seqlens=big.cu_seqlens, loss_mask=mask,
            backend=place.backend,
        )  # fmt: skip
        return out.loss

    plain = loss(big.hidden)
    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for _ in range(3):
        assert torch.equal(plain, compiled(big.hidden))


@on_gpus
@pytest.mark.parametrize("row_stream", [False, True], ids=["one-stream", "two-streams"])
def test_two_callers_streams(place: Place, row_stream: bool) -> None:
    """Steps on two streams at once do not disturb each other."""
    steps = [Big(place, 2048, 256, 32000), Big(place, 2048, 256, 32000)]
    with place.on(row_stream=row_stream):
        expected = [t.clone() for t in steps[0].step()[1:]]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        for _ in range(3):
            results = []
            for big, stream in zip(steps, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(big.step()[1:])
            torch.cuda.synchronize()
            for result in results:
                assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@on_gpus
def test_the_other_card(place: Place) -> None:
    """Tensors on cuda:1 while cuda:0 is current: the same bits, and nothing lands on cuda:0."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    config = LossConfig(beta=0.1, entropy_coef=0.1)
    results = []
    first = make_case(1, LENGTHS, dtype=torch.bfloat16, vocab=1003, device="cuda:0")
    for device in ("cuda:0", "cuda:1"):
        case = first.map(lambda v, d=device: v.to(d))
        assert torch.cuda.current_device() == 0
        for plan in ("single_pass", "recompute", "lean", "resident"):
            out, gradients = run(case, config, plan=plan, backend=place.backend, workspace_bytes=2**28)
            assert all(g.device == torch.device(device) for g in gradients.values())
            results.append([out.loss.detach().cpu(), *(g.cpu() for g in gradients.values())])
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- the trainer ------------------------------------------------------------------------------------------------------


def test_three_steps_of_the_trainer(place: Place, tmp_path: Path) -> None:
    """A tiny model learns for three steps, twice, with equal results to the last bit where that is promised."""
    pytest.importorskip("transformers")
    tiny = pytest.importorskip("tests.tiny")
    loop = pytest.importorskip("grpo_fast.trainer.loop")
    runs = []
    with place.on():
        for name in ("one", "two"):
            config = tiny.configured(
                tmp_path, output_dir=str(tmp_path / name), device=str(place.device), max_steps=3,
                backend=place.backend, full_determinism=not place.stand_in,
            )  # fmt: skip
            loop.train(config)
            runs.append(tmp_path / name)
    rows = tiny.rows(runs[0])
    assert len([row for row in rows if "loss" in row]) == 3
    assert all(torch.tensor(row["loss"]).isfinite() for row in rows if "loss" in row)
    assert tiny.comparable(runs[0]) == tiny.comparable(runs[1])


def test_the_fixture_finds_the_device(place: Place) -> None:
    """A case is made where it is used."""
    case = make_case(0, LENGTHS, device=place.device)
    assert {t.device.type for t in (case.hidden, case.targets, case.logprobs)} == {place.device.type}
    assert replace(case, bias=None).bias is None
