"""Plausible slips, one at a time, in a copy of the sources: which test sees each?

    python tests/mutants.py                  all of them; exit code 1 if one survives, or if its text is gone
    python tests/mutants.py --list           their names
    python tests/mutants.py NAME ...         some of them

The work tree is never touched: package, kernels and tests are copied to a temporary directory, where the mutant's
`before` (which must occur once) becomes `after` and its tests run until the first fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANDOM = "tests/test_random.py"
MANY = f"{RANDOM} --random-cases 2000"
RANKS = "tests/test_edges.py::test_quantiles_and_metrics_span_ranks"


@dataclass(frozen=True)
class Mutant:
    """`before` becomes `after` in `file`; `tests` (pytest's arguments, separated by spaces) should notice."""

    name: str
    file: str
    before: str
    after: str
    tests: str = RANDOM


SUPPORTS = "tests/test_support.py::"
EDGES = "tests/test_support_edges.py::"
PLANS = f"{SUPPORTS}test_every_plan_and_dtype"

MUTANTS = (
    # Five that 884 tests once let through together.
    Mutant("idle-rows-of-later-chunks", "grpo_fast/ops/passes.py", "kept + index.start if", "kept if"),
    Mutant(
        "temperature-of-first-chunk",
        "grpo_fast/backends/base.py",
        "self.temperature[rows])",
        "self.temperature[: len(self.temperature[rows])])",
    ),
    Mutant(
        "temperature-tensor-ignored",
        "grpo_fast/loss.py",
        "config.temperature if temperature is None else temperature\n    check",
        "config.temperature\n    check",
    ),
    Mutant("all-reduce-sign", "grpo_fast/metrics.py", "torch.cat([-mins, maxs])", "torch.cat([mins, maxs])", RANKS),
    Mutant("approx-kl", "grpo_fast/metrics.py", "drift.exp() - drift - 1", "drift.exp() + drift - 1"),
    # Metrics.
    Mutant(
        "all-reduce-extremes-of-one-rank",
        "grpo_fast/metrics.py",
        "[sums, -extremes[:num_mins], extremes[num_mins:]]",
        "[sums, mins, maxs]",
        RANKS,
    ),
    Mutant("merge-takes-largest-minimum", "grpo_fast/metrics.py", "mins.amin(0)", "mins.amax(0)"),
    Mutant(
        "merge-means-of-losses",
        "grpo_fast/metrics.py",
        "(value * count.clamp(min=1), count)",
        "(value, count)",
    ),
    Mutant(
        "clip-ratio-before-delta",
        "grpo_fast/objectives.py",
        "clip_ratio=inputs.capped_ratio.detach()",
        "clip_ratio=ratio.detach()",
    ),
    Mutant(
        "low-clip-of-any-advantage",
        "grpo_fast/metrics.py",
        "(ratio < 1 - config.epsilon) & (advantages < 0)",
        "(ratio < 1 - config.epsilon)",
    ),
    Mutant(
        "bad-rows-by-value-alone",
        "grpo_fast/metrics.py",
        "entropy, terms.policy, terms.ratio, tokens.advantages]",
        "entropy]",
    ),
    Mutant(
        "kl-over-computed",
        "grpo_fast/metrics.py",
        "expand_as(logprobs), computed), num_computed)",
        "expand_as(logprobs), computed), num_tokens)",
    ),
    # Objectives and aggregation.
    Mutant("quantile-rounds-down", "grpo_fast/objectives.py", "position.ceil()", "position.floor()"),
    Mutant(
        "gmpo-clips-both-sides-above",
        "grpo_fast/losses.py",
        "sequence_advantage < 0, lower",
        "sequence_advantage < 0, upper",
    ),
    Mutant("sapo-temperature-of-zero", "grpo_fast/losses.py", "tau * (c.ratio - 1)", "tau * c.ratio"),
    Mutant(
        "off-policy-strict",
        "grpo_fast/objectives.py",
        "(tokens.advantages >= 0) | (sequence_drift",
        "(tokens.advantages <= 0) | (sequence_drift",
    ),
    Mutant("importance-on-kl", "grpo_fast/objectives.py", "kl = kl * ratio\n", "kl = kl * ratio.detach()\n"),
    Mutant(
        "unknown-sampling-is-far",
        "grpo_fast/losses.py",
        "torch.where(behaviour.isnan(), current, behaviour)",
        "behaviour.nan_to_num(nan=0.0)",
    ),
    Mutant("gspo-token-flows-to-mean", "grpo_fast/objectives.py", "spread(mean.detach())", "spread(mean)"),
    Mutant(
        "sapo-sequence-mean-forgotten",
        "grpo_fast/losses.py",
        'arXiv:2511.20347",\n        aggregation="sequence_mean"',
        'arXiv:2511.20347",\n        aggregation="sequence_sum"',
    ),
    Mutant(
        "vespo-token-local",
        "grpo_fast/losses.py",
        'couples="clamped_sequence"',
        'couples="nothing"',
    ),
    Mutant(
        "dppo-skips-zero-advantages",
        "grpo_fast/losses.py",
        'beside_advantage="dppo_log_ratio_coef"',
        "beside_advantage=None",
    ),
    # Rows.
    Mutant(
        "vespo-rows-of-zero-weight",
        "grpo_fast/inputs.py",
        'is not None and "importance" not in config.record.reads:',
        "is not None:",
        MANY,
    ),
    Mutant(
        "half-a-sequence",
        "grpo_fast/inputs.py",
        "spread(tokens.segments.sum(live) > 0)",
        "spread(tokens.segments.sum(live) > 1)",
    ),
    # Passes, chunks, plans.
    Mutant("rows-of-whole-batch", "grpo_fast/ops/passes.py", "weights[call.rows]", "weights[: call.rows.numel()]"),
    Mutant(
        "parts-segments-shifted",
        "grpo_fast/objectives.py",
        "bisect_right(ends, start), bisect_right",
        "bisect_left(ends, start), bisect_right",
    ),
    Mutant("chunk-from-zero", "grpo_fast/ops/passes.py", "call.rows[start:stop], out", "call.rows[:n], out"),
    Mutant(
        "float16-scale-not-removed-from-bias",
        "grpo_fast/ops/passes.py",
        "unscaled(self.bias, self.scale)",
        "unscaled(self.bias, 1.0)",
    ),
    Mutant(
        "float16-scale-of-one-slope",
        "grpo_fast/ops/passes.py",
        "g * scale, None if e is None else e * scale",
        "g * scale, e",
    ),
    Mutant("lean-overwrites-hidden", "grpo_fast/ops/lean.py", "accumulate=start > 0", "accumulate=False"),
    Mutant(
        "lean-block-of-first-bias",
        "grpo_fast/backends/base.py",
        "bias=self.bias[start:stop]",
        "bias=self.bias[: stop - start]",
    ),
    Mutant("softcap-slope-without-temperature", "grpo_fast/backends/torch.py", "capped.mul_(temperature)", "pass"),
    Mutant(
        "resident-above-the-workspace",
        "grpo_fast/ops/passes.py",
        "if stop + count - start > chunk_rows:",
        "if stop - start >= chunk_rows:",
    ),
    Mutant("main-grad-overwritten", "grpo_fast/ops/lean.py", "out if accumulate else None)", "None)"),
    Mutant("upstream-ignored", "grpo_fast/ops/operators.py", "if unit:\n", "if True:\n"),
    # Supports.
    Mutant(
        "empty-supports-have-no-word",
        "grpo_fast/ops/support.py",
        "whole = (sizes == 0) | (sizes >= vocab)",
        "whole = sizes >= vocab",
        PLANS,
    ),
    Mutant(
        "one-word-is-the-target",
        "grpo_fast/ops/support.py",
        "((sizes == 1) & (places[rows] == 0))",
        "(sizes == 1)",
        f"{EDGES}test_a_target_outside_its_support_on_a_gpu",
    ),
    Mutant(
        "missing-targets-are-first",
        "grpo_fast/packing.py",
        "places.new_full((num_rows + 1,), -1)",
        "places.new_full((num_rows + 1,), 0)",
        f"{EDGES}test_a_target_outside_its_support_on_a_gpu",
    ),
    Mutant(
        "places-of-first-rows",
        "grpo_fast/ops/support.py",
        "Supported(of, places[rows], longest",
        "Supported(of, places, longest",
        PLANS,
    ),
    Mutant(
        "part-rows-from-the-first",
        "grpo_fast/ops/support.py",
        "self.of.rows[first:last] - start",
        "self.of.rows[first:last] - self.of.rows[0]",
        PLANS,
    ),
    Mutant(
        "block-target-of-the-vocabulary",
        "grpo_fast/ops/support.py",
        "of.offsets), targets - start)",
        "of.offsets), targets)",
        PLANS,
    ),
    Mutant(
        "bias-of-other-words",
        "grpo_fast/ops/support.py",
        "bias=transform.bias[self.of.ids]",
        "bias=transform.bias[self.of.ids.flip(0)]",
        PLANS,
    ),
    Mutant(
        "masked-dx-over-logits",
        "grpo_fast/ops/passes.py",
        "self.dx.zero_()[of.rows",
        "self.dx[of.rows",
        PLANS,
    ),
    Mutant(
        "first-masked-rows-again",
        "grpo_fast/ops/passes.py",
        "part(cut - call.num_whole,",
        "part(0,",
        PLANS,
    ),
    Mutant(
        "main-grad-without-sparse-rows",
        "grpo_fast/ops/passes.py",
        "weight if main_grad is None else main_grad, bias)",
        "weight, bias)",
        f"{SUPPORTS}test_main_grad",
    ),
    Mutant(
        "sparse-alone-is-not-zeroed",
        "grpo_fast/ops/passes.py",
        "call.grad_dtype).zero_()",
        "call.grad_dtype)",
        PLANS,
    ),
    Mutant(
        "sparse-slopes-of-first-rows",
        "grpo_fast/ops/sparse.py",
        "slopes.part(self.index)",
        "slopes.part(slice(0, self.index.numel()))",
        PLANS,
    ),
    Mutant(
        "sparse-weights-of-first-rows",
        "grpo_fast/ops/sparse.py",
        "weights[self.index]",
        "weights[: self.index.numel()]",
        PLANS,
    ),
    Mutant(
        "sparse-temperature-of-first-rows",
        "grpo_fast/ops/sparse.py",
        "call.temperature[index] if",
        "call.temperature[: index.numel()] if",
        f"{SUPPORTS}test_a_temperature_for_each_row",
    ),
    Mutant(
        "sparse-sum-overwrites",
        "grpo_fast/backends/torch.py",
        "sums.add_(out[ids])",
        "sums",
        PLANS,
    ),
    Mutant(
        "sums-of-the-last-block",
        "grpo_fast/backends/torch.py",
        "sums[first:last] += torch",
        "sums[first:last] = torch",
        f"{SUPPORTS}test_blocks_cut_rows_and_sums",
    ),
    Mutant(
        "padding-counts",
        "grpo_fast/backends/torch.py",
        "~dense.valid[rows], -torch.inf)",
        "~dense.valid[rows], -9.0)",
        PLANS,
    ),
    Mutant(
        "masked-targets-must-be-there",
        "grpo_fast/packing.py",
        "missing = missing if mask is None else missing & mask",
        "pass",
        "tests/test_packing.py",
    ),
    Mutant(
        "negative-rows-of-a-support",
        "grpo_fast/packing.py",
        "self.offsets[:-1][rows]",
        "self.offsets[rows]",
        "tests/test_packing.py",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants; none: all")
    parser.add_argument("--list", action="store_true", help="say their names and files")
    options = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = set(options.names) - known.keys()
    if unknown:
        parser.error(f"expected names of mutants (see --list); got {', '.join(sorted(unknown))}")
    chosen = [known[name] for name in options.names] or list(MUTANTS)
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:40} {mutant.file}")
        return 0
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        for mutant in chosen:
            start, copy = time.monotonic(), Path(folder) / mutant.name
            verdict = obstacle(mutant) or run(mutant, copy)
            shutil.rmtree(copy, ignore_errors=True)
            survivors += not verdict.startswith("killed")
            print(f"{mutant.name:40} {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return survivors > 0


def obstacle(mutant: Mutant) -> str | None:
    """Why the mutant does not apply to the sources as they are, or None."""
    count = (ROOT / mutant.file).read_text().count(mutant.before)
    return None if count == 1 else f"DOES NOT APPLY: its text stands {count} times in {mutant.file}"


def run(mutant: Mutant, copy: Path) -> str:
    """Mutate a copy and run the tests there; "killed by ..." or "SURVIVED"."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for source, target in (("grpo_fast", "grpo_fast"), ("kernels", "grpo_fast/kernels"), ("tests", "tests")):
        # grpo_fast.kernels is kernels/ by a mapping of the installation: inside the copy's package it is the copy's.
        shutil.copytree(ROOT / source, copy / target, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "kernels").symlink_to(copy / "grpo_fast" / "kernels")
    path = copy / mutant.file
    path.write_text(path.read_text().replace(mutant.before, mutant.after))
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *mutant.tests.split()]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode == 1 and failed:
        return f"killed by {failed[1].removeprefix('tests/')}"
    return "SURVIVED" if result.returncode == 0 else f"FAILED TO RUN: {(result.stdout + result.stderr)[-500:]}"


if __name__ == "__main__":
    sys.exit(main())
