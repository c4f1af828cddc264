"""One run of the race, in a process of its own: a contender trains on a recipe with one seed.

    python benchmarks/race_contenders.py grpo-fast 0 --recipe recipes/demo.yaml --record run.jsonl --stop-at 0.7

The first line of the record says what ran; each further line is a step. Time starts when everything is loaded and the
first step begins, for both contenders; what a step logs is part of it. A step's rollout is prompts to completions
(prefill, decoding, sampling); the update is the rest of it (rewards and logging are milliseconds).

Both get the same model files, prompts in the same order, reward function and hyperparameters (`race_setup.py`). The
trainers themselves are as installed: timing wraps bound methods of the instance and changes nothing that they do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from race_report import WINDOW, first_reached
from race_setup import (
    MICRO_BATCH,
    hyperparameters,
    ordered_examples,
    race_config,
    trl_arguments,
    trl_prompt,
    trl_reward,
)

from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.data import load_examples
from grpo_fast.trainer.recipe import as_dict
from grpo_fast.trainer.rewards import build_rewards

# ---- the record -----------------------------------------------------------------------------------------------------


class Record:
    """Lines of a run, written as they come.

    Args:
        stop_at: the run may end `WINDOW` steps after the mean of its last `WINDOW` rewards reached it.
    """

    def __init__(self, path: Path, name: str, stop_at: float) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
        self._name, self._stop_at = name, stop_at
        self._rewards: list[float] = []
        self._rollout: dict[str, Any] = {}
        self._rollout_seconds = self._started = self._last = 0.0

    def begin(self, **facts: Any) -> None:
        """Everything is loaded: the clock starts."""
        self._write({"loaded_rss_bytes": peak_rss_bytes(), **facts})
        self._started = self._last = time.perf_counter()

    def note(self, **facts: Any) -> None:
        """Keep something with the next step's line."""
        self._rollout |= facts

    def rollout(self, seconds: float, prompt_ids: Sequence[Sequence[int]], completion_lengths: Sequence[int]) -> None:
        """A rollout took `seconds`. `prompt_ids`: one a group."""
        self._rollout_seconds += seconds
        repeats = len(completion_lengths) // len(prompt_ids)
        self._rollout |= {
            "prompt_tokens": repeats * sum(map(len, prompt_ids)),
            "completion_tokens": sum(completion_lengths),
            "prompts": hashlib.sha256(json.dumps([list(ids) for ids in prompt_ids]).encode()).hexdigest()[:16],
        }

    def step(self, reward: float) -> bool:
        """A step has ended; returns whether the run may end."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._rewards.append(reward)
        row = {
            "step": len(self._rewards),
            "seconds": now - self._started,
            "reward": reward,
            "step_seconds": seconds,
            "rollout_seconds": self._rollout_seconds,
            "update_seconds": seconds - self._rollout_seconds,
            **self._rollout,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        self._rollout_seconds, self._rollout = 0.0, {}
        self._write(row)
        split = f"{row['rollout_seconds']:.1f} s rollout + {row['update_seconds']:.1f} s update"
        print(f"{self._name}  step {row['step']:>3}  {row['seconds']:7.1f} s  reward {reward:.3f}  {split}", flush=True)
        reached = first_reached(self._rewards, self._stop_at)
        return reached is not None and len(self._rewards) >= reached + WINDOW

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def peak_rss_bytes() -> int:
    """The most memory that this process held so far (VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def facts(*packages: str) -> dict[str, Any]:
    """Versions, and how torch sees the machine."""
    import torch

    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


# ---- the contenders -------------------------------------------------------------------------------------------------


class RaceOver(BaseException):
    """The run has done its steps. Not an Exception, upon which a run would save a checkpoint."""


def run_grpo_fast(config: TrainConfig, record: Record) -> None:
    """The loop of `grpo-fast train`."""
    from grpo_fast.trainer.loop import Data, Run, make_updater
    from grpo_fast.trainer.plot import read_metrics

    rewards = build_rewards(config.rewards)
    updater = make_updater(config)
    run = Run(config, updater, rewards, Data(load_examples(config.data, "train"), ()))
    take_step, generate = run._take_step, run._engine.generate
    metrics = Path(config.output_dir) / "metrics.jsonl"

    def timed_generate(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        completions = generate(prompt_ids, *args, **kwargs)
        lengths = [len(completion.token_ids) for completion in completions]
        record.rollout(time.perf_counter() - started, prompt_ids, lengths)
        return completions

    def recorded_step(*args: Any) -> None:
        take_step(*args)
        rows = read_metrics(metrics)
        if record.step(rows[-1]["reward"]) or len(rows) == config.max_steps:
            raise RaceOver

    run._engine.generate = timed_generate  # type: ignore[method-assign]
    run._take_step = recorded_step  # type: ignore[method-assign]
    about = facts("torch", "transformers", "numpy")
    record.begin(**about, settings=as_dict(config), eos_token_ids=sorted(updater.policy.eos_token_ids))
    try:
        run.execute()
    except RaceOver:
        return


def run_trl(config: TrainConfig, record: Record, micro_batch: int = MICRO_BATCH) -> None:
    """TRL's GRPOTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo_fast.trainer import smollm2

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            record.begin(**about, eos_token_ids=sorted(trainer.eos_token_ids))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "reward" in logs and record.step(logs["reward"]):  # the last log is a summary of the run
                control.should_training_stop = True

    examples = ordered_examples(config)
    rows = [{"prompt": trl_prompt(example, config), "example": number} for number, example in enumerate(examples)]
    path = smollm2.smollm2_path() if config.model.path == smollm2.NAME else config.model.path
    settings = trl_arguments(config, micro_batch)
    arguments = GRPOConfig(**settings)
    about = facts("torch", "transformers", "numpy", "trl", "accelerate")
    about |= {"settings": settings, "hyperparameters": hyperparameters(config, arguments)}
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
        reward_funcs=trl_reward(build_rewards(config.rewards), examples),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    generate, forwards = trainer._generate, _watch_forwards(trainer.model.base_model)

    def timed_generate(prompts: list[Any]) -> Any:
        started = time.perf_counter()
        result = generate(prompts)
        if forwards:
            record.note(decode=[forwards[0], forwards[-1]])
            forwards.clear()
        prompt_ids, completion_ids = result[:2]
        seconds = time.perf_counter() - started
        record.rollout(seconds, prompt_ids[:: config.rollout.num_generations], [len(ids) for ids in completion_ids])
        return result

    trainer._generate = timed_generate
    trainer.train()


def _watch_forwards(backbone: Any) -> list[dict[str, Any]]:
    """How the first rollout's forwards ran: tokens a sequence (1 with the cache), and in which dtype."""
    import torch

    seen: list[dict[str, Any]] = []

    def look(module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # the first update
            handle.remove()
            return
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else module.dtype
        tokens = (inputs[0] if inputs else keywords["input_ids"]).shape[1]
        seen.append({"tokens": tokens, "dtype": str(dtype), "cache": keywords.get("past_key_values") is not None})

    handle = backbone.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def main(argv: Sequence[str] | None = None) -> None:
    """Run one contender with one seed."""
    parser = argparse.ArgumentParser(description="One run of the race.")
    parser.add_argument("contender", choices=("grpo-fast", "trl"))
    parser.add_argument("seed", type=int)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--stop-at", type=float, required=True)
    parser.add_argument("--max-steps", type=int, required=True)
    parser.add_argument("--trl-micro-batch", type=int, default=MICRO_BATCH)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    record = Record(given.record, f"{given.contender:<9} seed {given.seed}", given.stop_at)
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        config = race_config(given.recipe, given.set, seed=given.seed, max_steps=given.max_steps, output_dir=folder)
        if given.contender == "trl":
            run_trl(config, record, given.trl_micro_batch)
        else:
            run_grpo_fast(config, record)


if __name__ == "__main__":
    main()
