"""What runs leave behind: their trained policies, and a summary of how they went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_fast.trainer.checkpoint import checkpoint_at, load_weights
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.errors import CheckpointError
from grpo_fast.trainer.model import Policy, load_policy, load_trained, pick_device
from grpo_fast.trainer.plot import read_metrics
from grpo_fast.trainer.recipe import config_from_dict

_ENDS = 5  # steps that the summary averages at each end of a run


def load_saved(path: Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, Policy]:
    """The config and the trained policy of a run (its newest checkpoint) or of a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
        ModelError: the model that it was trained from is gone, or another one.
    """
    checkpoint = checkpoint_at(path)
    if checkpoint is None:
        raise CheckpointError(f"run: expected a checkpoint or a run with checkpoints; got {path}")
    weights, values = load_weights(checkpoint)
    config = config_from_dict(values, overrides)
    policy = load_policy(config.model, pick_device(config.device))
    load_trained(policy, weights)
    return config, policy


def summary(output_dir: Path, train_seconds: float) -> list[str]:
    """Lines that say how a run went and where things are."""
    rows = read_metrics(output_dir / "metrics.jsonl")
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    steps = sum("step_time" in row for row in rows)
    spent = sum(row["step_time"] for row in rows if row.get("step_time"))
    lines = [
        f"{steps} steps in {_duration(spent)}"
        + (f" ({_duration(train_seconds)} of it now)" if train_seconds < 0.9 * spent else "")
    ]
    if rewards:
        count = min(_ENDS, len(rewards))
        first, last = sum(rewards[:count]) / count, sum(rewards[-count:]) / count
        lines.append(f"mean reward: {first:.3f} (first {count} rollouts) -> {last:.3f} (last {count})")
    held_out = [row for row in rows if "eval/reward" in row]
    if held_out:
        names = [name for name in held_out[0] if name.startswith("eval/pass@")] or ["eval/reward"]
        for name in names:
            ends = held_out if len(held_out) == 1 else [held_out[0], held_out[-1]]
            values = " -> ".join(f"{row[name]:.3f} (step {row['step']})" for row in ends)
            lines.append(f"held-out {name.removeprefix('eval/')}: {values}")
    present = [(name, output_dir / name) for name in ("metrics.jsonl", "completions.jsonl", "plot.png", "model")]
    lines += [f"{name:<18} {path}" for name, path in present if path.exists()]
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
