"""The `cuda` backend's kernels on a GPU: every vocabulary, stride and dtype against float64, bits, graphs, errors.

The same functions run on a few sizes over the emulator (tests/test_cuda_backend.py), which CI has. The losses through
this backend are in test_gpu.py; `make gpu PART=sanitizers` runs them under NVIDIA's memory and race checkers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.step import objective_rows_of, statistics_of
from grpo_fast.advantages import group_advantages
from grpo_fast.backends import cuda as cuda_backend
from grpo_fast.backends.base import Backend, NativeRows, RowChunk, RowObjective, RowSlopes, Transform, get_backend
from grpo_fast.backends.cuda import CudaBackend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens
from tests.cases import make_case, rel_rms
from tests.cuda_groups import check_token_rows
from tests.test_cuda_backend import emulated  # noqa: F401 - a fixture

CUDA = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
PLAIN = Transform(HeadConfig(), None, 1.0)
SMALL = [1, 2, 7, 97, 1000, 4099]
LARGE = [32000, 50257, 128256, 151669, 151936, 256000, 600001]  # the last in no cluster


@dataclass(frozen=True)
class Kernels:
    """Where the kernels run. `rows` of a chunk; `few`: the emulator, which takes milliseconds a row."""

    device: torch.device
    rows: int
    few: bool

    @property
    def engine(self) -> Backend:
        return get_backend("cuda")

    def chunk(self, vocab: int, pitch: int, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Random logits `[R, V]` in a buffer whose other columns are NaN, and targets."""
        rows = rows or self.rows
        generator = torch.Generator(self.device).manual_seed(vocab)
        buffer = torch.full((rows, pitch), torch.nan, device=self.device)
        buffer[:, :vocab] = 3 * torch.randn(rows, vocab, generator=generator, device=self.device)
        return buffer[:, :vocab], torch.randint(0, vocab, (rows,), generator=generator, device=self.device)


ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[ON_GPU, "emulated"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    if request.param == "emulated":
        monkeypatch.setattr(cuda_backend, "_cuda", request.getfixturevalue("emulated"))
        monkeypatch.setattr(cuda_backend, "_queue", lambda tensor: {"device": 0, "stream": 0})
        monkeypatch.setattr(CudaBackend, "why_unavailable", lambda self, device: None)
        return Kernels(torch.device("cpu"), 6, few=True)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    reason = get_backend("cuda").why_unavailable(CUDA)
    if reason is not None:
        pytest.skip(reason)
    return Kernels(CUDA, 40, few=False)


def sizes(on_gpu: list[Any], emulated_too: int) -> Any:
    """(kernels, size): all sizes on a GPU, the first few over the emulator."""
    pairs = [pytest.param("cuda", size, id=f"cuda-{size}", marks=pytest.mark.gpu) for size in on_gpu]
    pairs += [pytest.param("emulated", size, id=f"emulated-{size}") for size in on_gpu[:emulated_too]]
    return pytest.mark.parametrize(("kernels", "vocab"), pairs, indirect=["kernels"])


on_gpu = pytest.mark.parametrize("kernels", [ON_GPU], indirect=True)


def exact(logits: Tensor, targets: Tensor, g: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse, dx) in float64, by autograd."""
    z = logits.double().requires_grad_()
    log_p = torch.log_softmax(z, -1)
    logprobs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (g.double() * logprobs + e.double() * entropy).sum().backward()
    assert z.grad is not None
    return logprobs.detach(), entropy.detach(), z.detach().logsumexp(-1), z.grad


def check_rows(kernels: Kernels, vocab: int, pitch: int, dtype: torch.dtype) -> None:
    cuda, rows_, device = kernels.engine, kernels.rows, kernels.device
    logits, targets = kernels.chunk(vocab, pitch)
    g, e = torch.linspace(-1, 1, rows_, device=device), torch.linspace(0.3, -0.1, rows_, device=device)
    g[3] = e[3] = 0.0
    *statistics, expected = exact(logits, targets, g, e)
    rows = RowChunk(logits, targets, PLAIN)
    found = statistics_of(cuda, rows)
    for name, one, other in zip(("logprobs", "entropy", "lse"), found, statistics, strict=True):
        assert (one - other).abs().max() <= 1e-5, name
    apart = torch.full((rows_, pitch), torch.nan, dtype=dtype, device=device)
    slopes = RowSlopes(found[2], found[1], g, e)
    cuda.gradient(rows, slopes, dtype=dtype, out=apart[:, :vocab])
    if vocab > 1:
        assert rel_rms(apart[:, :vocab], expected) <= BOUNDS[dtype]
    assert apart[:, vocab:].isnan().all()
    before = logits.clone()
    assert torch.equal(cuda.gradient(rows, slopes, dtype=dtype), apart[:, :vocab])
    logits.copy_(before)
    check_fused(kernels, logits, targets, dtype, found)


def check_fused(
    kernels: Kernels, logits: Tensor, targets: Tensor, dtype: torch.dtype, statistics: tuple[Tensor, ...]
) -> None:
    """dx of the objective in and out of place: the gradient's for the objective's slope; the statistics' own bits."""
    cuda, num_rows, device = kernels.engine, kernels.rows, kernels.device
    mask = torch.ones(num_rows, dtype=torch.bool, device=device)
    segments = Segments(torch.tensor([0, num_rows], device=device), num_rows)
    tokens = Tokens(torch.linspace(-1, 1, num_rows, device=device), mask, segments, mask.sum())
    config = LossConfig(loss_type="reinforce", entropy_coef=0.1)
    weights = torch.full((num_rows,), 0.5, device=device)
    out = torch.full_like(logits, torch.nan, dtype=dtype)
    objective = RowObjective(tokens, weights, config, torch.tensor(2.0, device=device))
    rows = RowChunk(logits, targets, PLAIN)
    before = logits.clone()
    places = (out, out.clone(), None)
    results = [objective_rows_of(cuda, rows, objective, dtype=dtype, out=place) for place in places]
    dx, (logprobs, entropy, live) = results[0]
    for other_dx, others in results[1:]:
        assert torch.equal(dx, other_dx)
        assert all(torch.equal(a, b) for a, b in zip((logprobs, entropy, live), others, strict=True))
    assert torch.equal(logprobs, statistics[0])
    assert torch.equal(entropy, statistics[1])
    assert live.all()
    slopes = -tokens.advantages * weights * 2.0, torch.full_like(weights, -0.1 / num_rows * 2.0)
    if logits.shape[1] > 1:
        assert rel_rms(dx, exact(before, targets, *slopes)[3]) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@sizes(SMALL, len(SMALL))
def test_small_rows(kernels: Kernels, vocab: int, dtype: torch.dtype) -> None:
    for pitch in (-(-vocab // 64) * 64, vocab, vocab + 3):
        check_rows(kernels, vocab, pitch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@sizes(LARGE, 0)
def test_large_rows(kernels: Kernels, vocab: int, dtype: torch.dtype) -> None:
    check_rows(kernels, vocab, -(-vocab // 64) * 64, dtype)


def test_rows_are_the_same_bits_anywhere(kernels: Kernels) -> None:
    """Other neighbours, other strides, more rows than clusters are resident, twice."""
    cuda = kernels.engine
    vocab, pitch, num_rows = (1003, 1024, 24) if kernels.few else (50257, 50304, 700)
    logits, targets = kernels.chunk(vocab, pitch, num_rows)
    whole = statistics_of(cuda, RowChunk(logits, targets, PLAIN))
    order = torch.randperm(num_rows, device=kernels.device)
    tight = logits[order].contiguous()  # rows that do not begin on 16 bytes
    for rows in (logits[order], tight):
        again = statistics_of(cuda, RowChunk(rows, targets[order], PLAIN))
        assert all(torch.equal(a[order], b) for a, b in zip(whole, again, strict=True))


def test_transformed_rows(kernels: Kernels) -> None:
    cuda, plain = kernels.engine, get_backend("torch")
    logits, targets = kernels.chunk(5003, 5056)
    bias = torch.randn(5003, device=kernels.device)
    temperature = torch.linspace(0.5, 1.5, kernels.rows, device=kernels.device)
    transform = Transform(HeadConfig(logit_scale=0.7, softcap=10.0), bias, temperature)
    wide = Transform(transform.head, bias.double(), temperature.double())
    rows, wide_rows = RowChunk(logits, targets, transform), RowChunk(logits.double(), targets, wide)
    found, expected = statistics_of(cuda, rows), statistics_of(plain, wide_rows)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5
    g = torch.linspace(-1, 1, kernels.rows, device=kernels.device)
    wide_slopes = RowSlopes(found[2].double(), found[1].double(), g.double(), None)
    theirs = plain.gradient(wide_rows, wide_slopes, dtype=torch.float64)
    ours = cuda.gradient(rows, RowSlopes(found[2], found[1], g, None), dtype=torch.bfloat16)
    assert rel_rms(ours, theirs) <= BOUNDS[torch.bfloat16]


@on_gpu
def test_small_graph_of_all_passes(kernels: Kernels) -> None:
    """Captured, then replayed on other logits."""
    cuda = kernels.engine
    logits, targets = kernels.chunk(32000, 32000)
    g = torch.ones(kernels.rows, device=CUDA)
    out = torch.empty(kernels.rows, 32000, dtype=torch.bfloat16, device=CUDA)

    def step() -> tuple[Tensor, ...]:
        rows = RowChunk(logits, targets, PLAIN)
        found = statistics_of(cuda, rows)
        slopes = RowSlopes(found[2], found[1], g, None)
        return *found, cuda.gradient(rows, slopes, dtype=out.dtype, out=out)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    logits.mul_(0.5)
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@on_gpu
def test_launches_are_what_the_file_says(kernels: Kernels) -> None:
    native, major = cuda_backend.native(), torch.cuda.get_device_capability()[0]
    launch = native.row_launch(0, 151936)
    if major in (9, 10):
        assert (launch["ranks"], launch["threads"], launch["stages"]) == (8, 512, 1)
        assert native.row_launch(0, 50257)["stages"] == 2
    if major == 8:
        assert launch["ranks"] == 0
    assert native.row_launch(0, 10**6)["ranks"] == 0


@on_gpu
def test_errors_name_the_kernel_and_its_shape(kernels: Kernels) -> None:
    rows = NativeRows(cuda_backend.native(), RowChunk(*kernels.chunk(97, 128), PLAIN)).native
    nowhere = dict.fromkeys(("logprobs", "entropy", "lse", "stream"), 0)
    with pytest.raises(RuntimeError, match=r"row_statistics of \[40, 97\]: cudaSetDevice: cudaErrorInvalidDevice"):
        cuda_backend.native().row_statistics(rows, **nowhere, device=99)
    torch.zeros(1, device=CUDA).add_(1).item()  # nothing is left behind


@pytest.mark.parametrize("scale", ["group", "batch", "none", "leave_one_out"])
def test_groups(kernels: Kernels, scale: str) -> None:
    native, count = cuda_backend.native(), 64 if kernels.few else 4096
    rewards = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    rewards[5] = rewards[17, 0] = torch.nan
    expected = group_advantages(rewards, group_size=16, scale=scale, weights=[0.5, 2.0, 1.0])
    on_device, out = rewards.to(kernels.device), torch.full((count,), torch.nan, device=kernels.device)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, device=kernels.device)
    native.group_advantages(
        native.DType.float32,
        rewards=on_device.data_ptr(),
        num_completions=count,
        num_rewards=3,
        weights=weights.data_ptr(),
        group_size=16,
        order=0,
        offsets=0,
        num_groups=0,
        scale=getattr(native.AdvantageScale, scale),
        aggregation=native.RewardAggregation.sum_then_normalize,
        out=out.data_ptr(),
        **cuda_backend._queue(out),
    )
    assert rel_rms(out.cpu(), expected) <= 1e-6


@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "dapo"])
def test_groups_of_tokens(kernels: Kernels, loss_type: str) -> None:
    lengths = (7, 0, 1, 50, 3, 12) if kernels.few else (700, 0, 1, 5000, 33, 256)
    case = make_case(5, lengths=lengths, zero_advantages=0.4, device=kernels.device)
    check_token_rows(cuda_backend.native(), case, loss_type, cuda_backend._queue(case.advantages))
