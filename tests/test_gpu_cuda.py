"""The `cuda` backend's kernels on a GPU: every vocabulary, stride and dtype against float64, bits, graphs, errors.

The losses through this backend are in test_gpu.py. With NVIDIA's tools, the same tests under a memory and race checker:

    compute-sanitizer --tool memcheck  python -m pytest -m gpu tests/test_gpu_cuda.py -k "small or groups"
    compute-sanitizer --tool racecheck python -m pytest -m gpu tests/test_gpu_cuda.py -k "small or groups"
    compute-sanitizer --tool synccheck python -m pytest -m gpu tests/test_gpu_cuda.py -k "small or groups"
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_fast.advantages import group_advantages
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.objectives import Tokens
from grpo_fast.ops import cuda_backend
from grpo_fast.ops.backend import RowChunk, RowObjective, RowSlopes, Transform, get_backend
from grpo_fast.packing import Segments
from tests.cases import make_case, rel_rms
from tests.cuda_groups import check_token_rows

DEVICE = torch.device("cuda")


def _obstacle() -> str | None:
    return "needs a CUDA device" if not torch.cuda.is_available() else get_backend("cuda").why_unavailable(DEVICE)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_obstacle() is not None, reason=str(_obstacle()))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
ROWS = 40
PLAIN = Transform(HeadConfig(), None, 1.0)
SMALL = [1, 2, 7, 97, 1000, 4099]
LARGE = [32000, 50257, 128256, 151669, 151936, 256000, 600001]  # the last in no cluster


def chunk(vocab: int, pitch: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(vocab)
    buffer = torch.full((rows, pitch), torch.nan, device=DEVICE)
    buffer[:, :vocab] = 3 * torch.randn(rows, vocab, generator=generator, device=DEVICE)
    return buffer[:, :vocab], torch.randint(0, vocab, (rows,), generator=generator, device=DEVICE)


def exact(logits: Tensor, targets: Tensor, g: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse, dx) in float64, by autograd."""
    z = logits.double().requires_grad_()
    log_p = torch.log_softmax(z, -1)
    logprobs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (g.double() * logprobs + e.double() * entropy).sum().backward()
    assert z.grad is not None
    return logprobs.detach(), entropy.detach(), z.detach().logsumexp(-1), z.grad


def check_rows(vocab: int, pitch: int, dtype: torch.dtype) -> None:
    cuda = get_backend("cuda")
    logits, targets = chunk(vocab, pitch)
    g, e = torch.linspace(-1, 1, ROWS, device=DEVICE), torch.linspace(0.3, -0.1, ROWS, device=DEVICE)
    g[3] = e[3] = 0.0
    *statistics, expected = exact(logits, targets, g, e)
    rows = RowChunk(logits, targets, PLAIN)
    found = cuda.statistics(rows)
    for name, one, other in zip(("logprobs", "entropy", "lse"), found, statistics, strict=True):
        assert (one - other).abs().max() <= 1e-5, name
    apart = torch.full((ROWS, pitch), torch.nan, dtype=dtype, device=DEVICE)
    slopes = RowSlopes(found[2], found[1], g, e)
    cuda.gradient(rows, slopes, dtype=dtype, out=apart[:, :vocab])
    if vocab > 1:
        assert rel_rms(apart[:, :vocab], expected) <= BOUNDS[dtype]
    assert apart[:, vocab:].isnan().all()
    before = logits.clone()
    assert torch.equal(cuda.gradient(rows, slopes, dtype=dtype), apart[:, :vocab])
    logits.copy_(before)
    check_fused(logits, targets, dtype, found)


def check_fused(logits: Tensor, targets: Tensor, dtype: torch.dtype, statistics: tuple[Tensor, ...]) -> None:
    """dx of the objective in and out of place: the gradient's for the objective's slope; the statistics' own bits."""
    cuda = get_backend("cuda")
    mask = torch.ones(ROWS, dtype=torch.bool, device=DEVICE)
    segments = Segments(torch.tensor([0, ROWS], device=DEVICE), ROWS)
    tokens = Tokens(torch.linspace(-1, 1, ROWS, device=DEVICE), mask, segments, mask.sum())
    config, weights = LossConfig(loss_type="reinforce", entropy_coef=0.1), torch.full((ROWS,), 0.5, device=DEVICE)
    out = torch.full_like(logits, torch.nan, dtype=dtype)
    objective = RowObjective(tokens, weights, config, 2.0)
    rows = RowChunk(logits, targets, PLAIN)
    before = logits.clone()
    places = (out, out.clone(), None)
    results = [cuda.objective_rows(rows, objective, dtype=dtype, out=place) for place in places]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    dx, logprobs, entropy, live = results[0]
    assert torch.equal(logprobs, statistics[0])
    assert torch.equal(entropy, statistics[1])
    assert live.all()
    slopes = -tokens.advantages * weights * 2.0, torch.full_like(weights, -0.1 / ROWS * 2.0)
    if logits.shape[1] > 1:
        assert rel_rms(dx, exact(before, targets, *slopes)[3]) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SMALL)
def test_small_rows(vocab: int, dtype: torch.dtype) -> None:
    for pitch in (-(-vocab // 64) * 64, vocab, vocab + 3):
        check_rows(vocab, pitch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", LARGE)
def test_large_rows(vocab: int, dtype: torch.dtype) -> None:
    check_rows(vocab, -(-vocab // 64) * 64, dtype)


def test_rows_are_the_same_bits_anywhere() -> None:
    """Other neighbours, other strides, more rows than clusters are resident, twice."""
    cuda = get_backend("cuda")
    logits, targets = chunk(50257, 50304, rows=700)
    whole = cuda.statistics(RowChunk(logits, targets, PLAIN))
    order = torch.randperm(700, device=DEVICE)
    tight = logits[order].contiguous()  # rows that do not begin on 16 bytes
    for rows in (logits[order], tight):
        again = cuda.statistics(RowChunk(rows, targets[order], PLAIN))
        assert all(torch.equal(a[order], b) for a, b in zip(whole, again, strict=True))


def test_transformed_rows() -> None:
    cuda, plain = get_backend("cuda"), get_backend("torch")
    logits, targets = chunk(5003, 5056)
    bias = torch.randn(5003, device=DEVICE)
    temperature = torch.linspace(0.5, 1.5, ROWS, device=DEVICE)
    transform = Transform(HeadConfig(logit_scale=0.7, softcap=10.0), bias, temperature)
    wide = Transform(transform.head, bias.double(), temperature.double())
    rows, wide_rows = RowChunk(logits, targets, transform), RowChunk(logits.double(), targets, wide)
    found, expected = cuda.statistics(rows), plain.statistics(wide_rows)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5
    g = torch.linspace(-1, 1, ROWS, device=DEVICE)
    wide_slopes = RowSlopes(found[2].double(), found[1].double(), g.double(), None)
    theirs = plain.gradient(wide_rows, wide_slopes, dtype=torch.float64)
    ours = cuda.gradient(rows, RowSlopes(found[2], found[1], g, None), dtype=torch.bfloat16)
    assert rel_rms(ours, theirs) <= BOUNDS[torch.bfloat16]


def test_small_graph_of_all_passes() -> None:
    """Captured, then replayed on other logits."""
    cuda = get_backend("cuda")
    logits, targets = chunk(32000, 32000)
    g = torch.ones(ROWS, device=DEVICE)
    out = torch.empty(ROWS, 32000, dtype=torch.bfloat16, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        rows = RowChunk(logits, targets, PLAIN)
        found = cuda.statistics(rows)
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


def test_launches_are_what_the_file_says() -> None:
    native, major = cuda_backend.native(), torch.cuda.get_device_capability()[0]
    launch = native.row_launch(0, 151936)
    if major in (9, 10):
        assert (launch["ranks"], launch["threads"], launch["stages"]) == (8, 512, 1)
        assert native.row_launch(0, 50257)["stages"] == 2
    if major == 8:
        assert launch["ranks"] == 0
    assert native.row_launch(0, 10**6)["ranks"] == 0


def test_errors_name_the_kernel_and_its_shape() -> None:
    rows = cuda_backend.NativeRows(cuda_backend.native(), RowChunk(*chunk(97, 128), PLAIN)).native
    nowhere = dict.fromkeys(("logprobs", "entropy", "lse", "stream"), 0)
    with pytest.raises(RuntimeError, match=r"row_statistics of \[40, 97\]: cudaSetDevice: cudaErrorInvalidDevice"):
        cuda_backend.native().row_statistics(rows, **nowhere, device=99)
    torch.zeros(1, device=DEVICE).add_(1).item()  # nothing is left behind


@pytest.mark.parametrize("scale", ["group", "batch", "none", "leave_one_out"])
def test_groups(scale: str) -> None:
    native = cuda_backend.native()
    rewards = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0))
    rewards[5] = rewards[17, 0] = torch.nan
    expected = group_advantages(rewards, group_size=16, scale=scale, weights=[0.5, 2.0, 1.0])
    on_device, out = rewards.to(DEVICE), torch.full((4096,), torch.nan, device=DEVICE)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, device=DEVICE)
    native.group_advantages(
        native.DType.float32,
        rewards=on_device.data_ptr(),
        num_completions=4096,
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
def test_groups_of_tokens(loss_type: str) -> None:
    case = make_case(5, lengths=(700, 0, 1, 5000, 33, 256), zero_advantages=0.4, device=DEVICE)
    check_token_rows(cuda_backend.native(), case, loss_type, cuda_backend._queue(case.advantages))
