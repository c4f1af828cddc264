"""The `cuda` backend without a GPU: its Python over the kernels in an emulator (csrc/tests/emulated_cuda.cpp).

What a GPU alone can show is in test_gpu_cuda.py; what nvcc can, in test_cuda_build.py.
"""

from __future__ import annotations

import sysconfig
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.step import objective_rows_of, statistics_of
from grpo_fast.advantages import group_advantages
from grpo_fast.backends import base as table
from grpo_fast.backends import cuda as cuda_backend
from grpo_fast.backends.base import RowChunk, RowObjective, RowSlopes, Transform, get_backend, resolve_backend
from grpo_fast.backends.cuda import CudaBackend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.loss import grpo_loss, token_logprobs
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens
from tests.cases import OBJECTIVES, assert_close, make_case, rel_rms
from tests.cuda_groups import check_token_rows
from tests.test_csrc import CSRC, WARNINGS, compiler, load_module
from tests.test_csrc import run as shell
from tests.test_loss import eager, legal_plans, oracle, run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (5, 1, 6, 0, 4)
CLUSTERS, STREAMING = 0, 1  # what the emulated devices are


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """grpo_fast._cuda with the emulator in the place of the GPU."""
    pybind11 = pytest.importorskip("pybind11")
    path = tmp_path_factory.mktemp("emulated") / "_cuda.so"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = [*WARNINGS, "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden", *includes]
    sources = ["bindings_cuda.cpp", "tests/emulated_cuda.cpp"]
    command = [compiler(), *flags, '-DGRPO_FAST_ARCHITECTURES="emulated"', *sources, "-o", str(path)]
    shell(command, cwd=CSRC)
    return load_module("emulated._cuda", path)


@pytest.fixture(params=[CLUSTERS, STREAMING], ids=["clusters", "streaming"])
def native(emulated: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cuda backend on CPU tensors, on either emulated device."""
    monkeypatch.setattr(cuda_backend, "_cuda", emulated)
    monkeypatch.setattr(cuda_backend, "_queue", lambda tensor: {"device": request.param, "stream": 0})
    monkeypatch.setattr(CudaBackend, "why_unavailable", lambda self, device: None)
    return emulated


@pytest.mark.parametrize("kwargs", OBJECTIVES[::17])
def test_objectives(kwargs: dict[str, Any], native: Any) -> None:
    """Loss and every gradient within 1e-5 (float32) of the oracle."""
    config = LossConfig(**kwargs, temperature=0.9)
    case = make_case(1, LENGTHS, bias=True, softcap=20.0, temperature=0.9, zero_advantages=0.3)
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    for plan in legal_plans(config)[-2:]:
        out, actual = run(case, config, plan=plan, backend="cuda")
        assert_close(f"{plan} loss", out.loss, expected.loss, eager=plain_loss)
        for name, gradient in gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient, eager=plain[name])


def test_fused_rows_and_first_ratio(native: Any) -> None:
    case = make_case(3, (5, 1, 6), vocab=1003)
    config = LossConfig(entropy_coef=0.05, beta=0.1)
    expected, gradients = oracle(case, config)
    out, actual = run(case, config, plan="single_pass", backend="cuda")
    assert_close("loss", out.loss, expected.loss)
    for name, gradient in gradients.items():
        assert_close(f"grad {name}", actual[name], gradient)
    with torch.no_grad():
        old = token_logprobs(case.hidden, case.weight, case.targets, backend="cuda").logprobs
    given = case.policy_inputs(LossConfig()) | {"old_logprobs": old}
    leaves = case.leaves()
    again = grpo_loss(leaves["hidden"], leaves["weight"], case.targets, case.advantages, backend="cuda", **given)
    assert torch.equal(again.logprobs[again.computed], old[again.computed])


def row_inputs(vocab: int, pitch: int) -> tuple[Tensor, Tensor, Transform]:
    generator = torch.Generator().manual_seed(vocab)
    buffer = torch.full((6, pitch), torch.nan)
    buffer[:, :vocab] = 3 * torch.randn(6, vocab, generator=generator)
    temperature = 0.5 + torch.rand(6, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    transform = Transform(HeadConfig(logit_scale=0.8, softcap=12.0), bias, temperature)
    return buffer[:, :vocab], torch.randint(0, vocab, (6,), generator=generator), transform


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "pitch"), [(97, 128), (1000, 1024), (253, 253), (5, 7)])
def test_dx_apart_and_over_the_logits(vocab: int, pitch: int, dtype: torch.dtype, native: Any) -> None:
    cuda, torch_backend = get_backend("cuda"), get_backend("torch")
    logits, targets, transform = row_inputs(vocab, pitch)
    exact = Transform(transform.head, transform.bias.double(), transform.temperature.double())
    expected = statistics_of(torch_backend, RowChunk(logits.double(), targets, exact))
    rows = RowChunk(logits, targets, transform)
    found = statistics_of(cuda, rows)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5
    g, e = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.0, 1.0]), torch.tensor([0.0, 0.1, 0.0, -0.2, 0.3, 0.0])
    given = (found[2], found[1], g, e)
    wide = torch_backend.gradient(
        RowChunk(logits.double(), targets, exact), RowSlopes(*(t.double() for t in given)), dtype=torch.float64
    )
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    apart = torch.full((6, pitch + 3), torch.nan, dtype=dtype)[:, :vocab]
    result = cuda.gradient(rows, RowSlopes(*given), dtype=dtype, out=apart)
    assert result.data_ptr() == apart.data_ptr()
    assert rel_rms(apart, wide) <= bound
    over = cuda.gradient(rows, RowSlopes(*given), dtype=dtype)
    assert over.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    assert over.dtype == dtype
    assert torch.equal(over, apart)
    assert not over[2].any()


def test_scaled_rows_from_numbers_on_the_device(native: Any) -> None:
    """The entropy's gradient comes from a count that the host does not know."""
    logits, targets, transform = row_inputs(1000, 1024)
    mask = torch.ones(6, dtype=torch.bool)
    tokens = Tokens(torch.ones(6), mask, Segments(torch.tensor([0, 6]), 6), mask.sum())
    config, weights = LossConfig(entropy_coef=0.1), torch.full((6,), 1 / 6)
    results = []
    objective = RowObjective(tokens, weights, config, torch.tensor(8.0))
    for name in ("torch", "cuda"):
        rows = RowChunk(logits.clone(), targets, transform)
        dx, (logprobs, entropy, live) = objective_rows_of(get_backend(name), rows, objective, dtype=torch.float32)
        results.append((dx, logprobs, entropy))
        assert live.all()
    for one, other in zip(*results, strict=True):
        assert rel_rms(other, one) <= 2e-6


def test_float64_is_torchs(native: Any) -> None:
    case = make_case(2, LENGTHS, dtype=torch.float64, bias=True)
    config = LossConfig()
    expected, gradients = oracle(case, config)
    for plan in legal_plans(config):
        out, actual = run(case, config, plan=plan, backend="cuda")
        assert_close(f"{plan} loss", out.loss, expected.loss)
        for name, gradient in gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient)


def test_bad_places_for_dx_are_refused(native: Any) -> None:
    logits, targets, transform = row_inputs(97, 128)
    zeros = torch.zeros(6)
    low = logits.view(torch.bfloat16)[:, :97]
    with pytest.raises(ValueError, match="dx: expected memory apart from the logits, or rows 192 bytes into theirs"):
        get_backend("cuda").gradient(
            RowChunk(logits, targets, transform), RowSlopes(zeros, zeros, zeros, None), dtype=torch.bfloat16, out=low
        )


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none", "leave_one_out"])
def test_advantages(scale: str, emulated: Any) -> None:
    rewards = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    rewards[3, 0] = rewards[5] = torch.nan
    ids = torch.tensor([0, 1, 2] * 8)
    order, offsets = ids.argsort(stable=True), torch.tensor([0, 8, 16, 24])
    weights, out = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.empty(24)
    emulated.group_advantages(
        emulated.DType.float32,
        rewards=rewards.data_ptr(),
        num_completions=24,
        num_rewards=2,
        weights=weights.data_ptr(),
        group_size=0,
        order=order.data_ptr(),
        offsets=offsets.data_ptr(),
        num_groups=3,
        scale=getattr(emulated.AdvantageScale, scale),
        aggregation=emulated.RewardAggregation.sum_then_normalize,
        out=out.data_ptr(),
        device=CLUSTERS,
        stream=0,
    )
    assert rel_rms(out, group_advantages(rewards, group_ids=ids, scale=scale, weights=[0.5, 2.0])) <= 1e-6


def test_token_rows(emulated: Any) -> None:
    case = make_case(5, zero_advantages=0.4)
    check_token_rows(emulated, case, "grpo", {"device": CLUSTERS, "stream": 0})


# -- where it is not --------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = get_backend("cuda")
    assert "run on NVIDIA GPUs" in str(cuda.why_unavailable(CPU))
    monkeypatch.setattr(cuda_backend, "_cuda", None)
    monkeypatch.setattr(cuda_backend, "_missing", "No module named 'grpo_fast._cuda'")
    with pytest.raises(ValueError, match=r"'cuda' is not available on cuda: grpo_fast._cuda is not built .*nvcc"):
        resolve_backend("cuda", CUDA)
    monkeypatch.setattr(cuda_backend, "_cuda", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in str(cuda.why_unavailable(CUDA))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "needs compute capability 8.0 or higher; this device has 7.5" in str(cuda.why_unavailable(CUDA))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.why_unavailable(CUDA) is None


@pytest.mark.usefixtures("native")
def test_auto_does_not_take_it_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_announced", set())
    assert resolve_backend("auto", CPU) != "cuda"
    assert resolve_backend("cuda", CPU) == "cuda"
