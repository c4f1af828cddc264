"""Row kernels against device-to-device copies of equal bytes, in the same contest.

Legend: R rows of a launch, V vocabulary.

| kernel | bytes a logit |
|---|---|
| statistics | 4 read |
| gradient, objective | 4 read, 2 written (bf16 dx in memory of its own) |

Result of `<backend>-V<vocab>-R<rows>`: {kernel: times, bytes, copy (times of the copy), fraction (copy / kernel),
gigabytes_per_second, copy_gigabytes_per_second, errors}. An action goes through several tiles of different memory, more
than the L2 cache holds; kernels are queued behind others, so that launching them is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OLD_DRIFT
from benchmarks.gpu.contest import Entry
from benchmarks.gpu.parts import Context, Task
from benchmarks.gpu.step import objective_rows_of, statistics_of
from grpo_fast.backends.base import RowChunk, RowObjective, RowSlopes, Transform, get_backend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens

BYTES = {"statistics": (4, 0), "gradient": (4, 2), "objective": (4, 2)}
BOUNDS = {"logprobs": 1e-4, "entropy": 1e-4, "gradient": 4e-3, "objective": 4e-3}
CHECKED_ROWS = 16
PLAIN = Transform(HeadConfig(), None, 1.0)


def tasks(context: Context) -> Iterable[Task]:
    for vocab in context.shapes.vocabs:
        for backend in context.backends("triton", "cuda", slow=True):
            for rows in context.shapes.tile_rows[:1] if context.device.slow else context.shapes.tile_rows:
                yield Task(f"{backend}-V{vocab}-R{rows}", 15, _task(context, backend, vocab, rows))


def _task(context: Context, backend: str, vocab: int, rows: int) -> Callable[[], dict[str, Any]]:
    return lambda: kernels(context, backend, vocab, rows)


def objective_of(logprobs: Tensor, config: LossConfig) -> RowObjective:
    """An objective of tokens with these log-probabilities: old ones near them, hardly a token is clipped."""
    rows, device = len(logprobs), logprobs.device
    generator = torch.Generator(device).manual_seed(rows)

    def normal() -> Tensor:
        return torch.randn(rows, generator=generator, device=device)

    mask = torch.ones(rows, dtype=torch.bool, device=device)
    segments = Segments(torch.tensor([0, rows], device=device), rows)
    tokens = Tokens(normal(), mask, segments, mask.sum(), old_logprobs=logprobs + OLD_DRIFT * normal())
    return RowObjective(tokens, torch.full((rows,), 1 / rows, device=device), config)


def kernels(context: Context, backend: str, vocab: int, rows: int) -> dict[str, Any]:
    engine, device = get_backend(backend), context.device.torch
    pitch, generator = engine.row_pitch(vocab), torch.Generator(context.device.torch).manual_seed(vocab)
    num_tiles = max(context.shapes.kernel_rows // rows, 2)
    # Values are drawn with the context's spread of logits; the padding is never read.
    tiles = [torch.empty(rows, pitch, device=device)[:, :vocab] for _ in range(num_tiles)]
    for tile in tiles:
        tile.copy_(torch.randn(rows, vocab, generator=generator, device=device) * 2.5)
    targets = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    chunks = [RowChunk(tile, targets, PLAIN) for tile in tiles]
    outs = [torch.empty(rows, pitch, dtype=torch.bfloat16, device=device)[:, :vocab] for _ in range(num_tiles)]
    config = LossConfig(entropy_coef=0.01)
    objectives = [objective_of(statistics_of(engine, chunk)[0], config) for chunk in chunks]
    g, e = torch.linspace(-1, 1, rows, device=device), torch.linspace(0.3, -0.1, rows, device=device)
    logprobs, entropy, lse = statistics_of(engine, chunks[0])
    slopes = RowSlopes(lse, entropy, g, e)
    errors = _errors(engine, chunks[0], (logprobs, entropy), slopes, objectives[0], outs[0])
    calls: dict[str, Callable[[RowChunk, Tensor, RowObjective], Any]] = {
        "statistics": lambda chunk, out, _: statistics_of(engine, chunk),
        "gradient": lambda chunk, out, _: engine.gradient(chunk, slopes, dtype=torch.bfloat16, out=out),
        "objective": lambda chunk, out, own: objective_rows_of(engine, chunk, own, dtype=torch.bfloat16, out=out),
    }

    def sweep(call: Callable[[RowChunk, Tensor, RowObjective], Any]) -> Callable[[], None]:
        def action() -> None:
            for chunk, out, own in zip(chunks, outs, objectives, strict=True):
                call(chunk, out, own)

        return action

    entries = [Entry(name, sweep(call)) for name, call in calls.items()]
    # A copy of n bytes reads n and writes n.
    sizes = {name: rows * vocab * sum(BYTES[name]) for name in calls}
    for half in sorted({size // 2 for size in sizes.values()}):
        source = [torch.randint(-128, 127, (half,), dtype=torch.int8, device=device) for _ in range(num_tiles)]
        into = [torch.empty_like(one) for one in source]
        entries.append(Entry(f"copy {half}", _copies(source, into)))
    cold = 2 * num_tiles * min(sizes.values()) < 4 * (context.device.facts()["l2_bytes"] or 2**26)
    measured = context.contest(entries, queued=True, cold=cold)
    found: dict[str, Any] = {"rows": rows, "vocab": vocab, "tiles": num_tiles, "cold": cold}
    for name in calls:
        copy, total = measured[f"copy {sizes[name] // 2}"], num_tiles * sizes[name]
        found[name] = {**measured[name], "bytes": total, "copy": copy, "errors": errors[name]}
        if "median" in measured[name] and "median" in copy:
            found[name] |= {
                "fraction": copy["median"] / measured[name]["median"],
                "gigabytes_per_second": total / measured[name]["median"] / 1e9,
                "copy_gigabytes_per_second": total / copy["median"] / 1e9,
            }
    return found


def _copies(source: list[Tensor], into: list[Tensor]) -> Callable[[], None]:
    def action() -> None:
        for one, other in zip(source, into, strict=True):
            other.copy_(one)

    return action


def _errors(
    engine: Any,
    chunk: RowChunk,
    statistics: tuple[Tensor, Tensor],
    slopes: RowSlopes,
    objective: RowObjective,
    out: Tensor,
) -> dict[str, dict[str, float]]:
    """Of some rows, against float64; raises where a kernel is wrong, which is then not timed."""
    n = min(CHECKED_ROWS, chunk.logits.shape[0])
    z = chunk.logits[:n].double().requires_grad_()
    log_p = torch.log_softmax(z, -1)
    logprobs = log_p.gather(1, chunk.targets[:n, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    pairs = zip(("logprobs", "entropy"), statistics, (logprobs, entropy), strict=True)
    found = {name: float((values[:n] - exact.detach()).abs().max()) for name, values, exact in pairs}
    assert slopes.e is not None
    total = (slopes.g[:n] * logprobs + slopes.e[:n] * entropy).sum()
    (expected,) = torch.autograd.grad(total, z, retain_graph=True)
    out.fill_(float("nan"))
    engine.gradient(chunk, slopes, dtype=torch.bfloat16, out=out)
    found["gradient"] = _relative(out[:n], expected)
    tokens, weights = objective.tokens, objective.weights[:n]
    config = objective.config
    assert tokens.old_logprobs is not None
    ratio = (logprobs - tokens.old_logprobs[:n]).exp()
    advantages = tokens.advantages[:n]
    clipped = ratio.clamp(1 - config.epsilon, 1 + config.upper_epsilon)
    loss = -(torch.minimum(ratio * advantages, clipped * advantages) * weights).sum()
    loss = loss - config.entropy_coef * entropy.sum() / chunk.logits.shape[0]
    (expected,) = torch.autograd.grad(loss, z)
    out.fill_(float("nan"))
    objective_rows_of(engine, chunk, objective, dtype=torch.bfloat16, out=out)
    found["objective"] = _relative(out[:n], expected)
    wrong = {name: error for name, error in found.items() if not error <= BOUNDS[name]}
    if wrong or not bool(out.isfinite().all()):
        raise RuntimeError(f"wrong against float64: {wrong or 'dx is not finite everywhere'}")
    statistic = {name: found[name] for name in ("logprobs", "entropy")}
    return {"statistics": statistic, **{name: {name: found[name]} for name in ("gradient", "objective")}}


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
