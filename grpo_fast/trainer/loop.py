"""The run: data, rollouts, updates, evaluation, checkpoints, in an order that lets a killed run continue exactly.

    prompts -> completions -> rewards -> advantages -> steps_per_generation x num_iterations optimiser steps

Everything random comes from seeds derived of (seed, purpose, number), so what a step does depends on the state that a
checkpoint holds and on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo_fast.trainer.batch import Experience
from grpo_fast.trainer.checkpoint import Checkpoint, RngState, load_checkpoint, save_checkpoint
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.data import Example, PromptSampler, fitting, load_examples, prompt_limit
from grpo_fast.trainer.determinism import check_sampling, determinism
from grpo_fast.trainer.errors import CheckpointError, Interrupted, NonFiniteError
from grpo_fast.trainer.evaluate import check_success_reward, evaluate
from grpo_fast.trainer.experience import collect, derive_seed, rollout_metrics, samples, to_experience
from grpo_fast.trainer.files import write_whole
from grpo_fast.trainer.interrupts import Interrupts
from grpo_fast.trainer.logging import RunLogger
from grpo_fast.trainer.model import Policy, export, load_policy, pick_device
from grpo_fast.trainer.recipe import as_dict, differences, to_yaml
from grpo_fast.trainer.rewards import RewardSet, build_rewards
from grpo_fast.trainer.rollout import HFRollout, RolloutEngine
from grpo_fast.trainer.run_dir import CONFIG_FILE, MODEL_DIR, begin, find_start, remove_replaced, save_bad_batch
from grpo_fast.trainer.step import NonFiniteUpdate, Updater
from grpo_fast.trainer.throughput import finish, throughput_metrics


@dataclass(frozen=True)
class RunSummary:
    """What `train` returns; everything else is in the files of `output_dir`.

    Attributes:
        step: optimiser steps done in all. seconds: this process took, loading included. train_seconds: the steps alone.
    """

    output_dir: Path
    step: int
    seconds: float
    train_seconds: float


def train(config: TrainConfig, *, engine: RolloutEngine | None = None) -> RunSummary:
    """Run the recipe to its end, or continue it (`resume`).

    Args:
        engine: samples the completions (also the held-out ones) instead of Hugging Face's generate.

    Raises:
        UserError: anything the user can mend (`errors.py`).
        Interrupted: SIGINT or SIGTERM came; the state after the last completed step was saved.
    """
    with determinism(config):  # before the first product, which the model's loading has
        return _train(config, engine)


def _train(config: TrainConfig, engine: RolloutEngine | None) -> RunSummary:
    started = time.perf_counter()
    if engine is None:
        check_sampling(config, pick_device(config.device))
    resume_from = find_start(config)
    rewards = build_rewards(config.rewards)
    check_success_reward(config, rewards)
    data = Data(load_examples(config.data, "train"), load_examples(config.data, "eval"))
    rewards.check_columns(data.train[0].columns)
    updater = make_updater(config)
    data, notes = data.fitting(config, updater.policy)
    run = Run(config, updater, rewards, data, engine)
    if resume_from is not None:
        run.restore(load_checkpoint(resume_from))
    # Nothing was touched so far: whatever was wrong has been said by now.
    run.execute(begin(Path(config.output_dir), resume_from, run.counters.step) + notes)
    return RunSummary(Path(config.output_dir), run.counters.step, time.perf_counter() - started, run.train_seconds)


def make_updater(config: TrainConfig) -> Updater:
    """The policy, its reference if the loss needs one, and their optimiser."""
    torch.manual_seed(derive_seed(config.seed, "model"))  # new weights of LoRA
    policy = load_policy(config.model, pick_device(config.device))
    needs_reference = config.loss.beta != 0 and not policy.is_lora
    reference = load_policy(config.model, policy.device, trainable=False) if needs_reference else None
    return Updater(policy, config, reference)


@dataclass(frozen=True)
class Data:
    """Training and held-out examples."""

    train: Sequence[Example]
    held_out: Sequence[Example]

    def fitting(self, config: TrainConfig, policy: Policy) -> tuple[Data, list[str]]:
        """Those whose prompts the policy can take, and lines about the others.

        Raises:
            DataError: there are such others, and nobody said to leave them out.
        """
        limit = prompt_limit(config, policy.model)
        train, notes = fitting(self.train, policy.tokenizer, config, limit, "training set")
        held_out, more = fitting(self.held_out, policy.tokenizer, config, limit, "held-out set")
        return Data(train, held_out), notes + more


@dataclass
class Counters:
    """Where the run is; all of it is in a checkpoint.

    Attributes:
        step: optimiser steps done. rollouts: rollouts sampled. num_tokens: prompt and completion tokens so far.
        used: steps that the current experience has served. evaluated: step of the last evaluation, -1 for none.
    """

    step: int = 0
    rollouts: int = 0
    num_tokens: int = 0
    used: int = 0
    evaluated: int = -1


@dataclass(frozen=True)
class _Position:
    """What a checkpoint holds besides weights and moments, as it was when the last step (or evaluation) was done."""

    counters: Counters
    sampler: dict[str, int]
    experience: Experience | None
    rng: RngState


@dataclass
class _Step:
    """What is known of a step while it runs."""

    counters: Counters
    experience: Experience
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """A run's state and its loop; made by `train`."""

    def __init__(
        self, config: TrainConfig, updater: Updater, rewards: RewardSet, data: Data, engine: RolloutEngine | None = None
    ) -> None:
        self.counters = Counters()
        self.train_seconds = 0.0
        self._config, self._updater, self._rewards, self._data = config, updater, rewards, data
        self._policy: Policy = updater.policy
        self._engine = engine or HFRollout(self._policy, config.rollout, supports=config.records_support)
        self._eval_engine = engine or HFRollout(self._policy, config.rollout, temperature=config.eval.temperature)
        self._sampler = PromptSampler(len(data.train), config.data.seed)
        self._output_dir = Path(config.output_dir)
        self._experience: Experience | None = None
        self._interrupts = Interrupts()
        self._saved, self._saved_at = -1, time.monotonic()
        self._notes: list[str] = []
        self._position = self._take_position()

    def execute(self, notes: Sequence[str] = ()) -> None:
        """Train from the current step to `max_steps`; evaluate, save and export as configured.

        Args:
            notes: lines to show at the start.
        """
        config = self._config
        write_whole(self._output_dir / CONFIG_FILE, to_yaml(config).encode())
        values = as_dict(config)
        with (
            self._interrupts,
            RunLogger(self._output_dir, config.logging, config.max_steps, self.counters.step, run_config=values) as log,
        ):
            for line in (self._describe(), *self._notes, *notes):
                log.message(line)
            try:
                self._loop(log)
            except KeyboardInterrupt:
                # The signals of an impatient user wait until the state is safe.
                with contextlib.suppress(KeyboardInterrupt), self._interrupts.shield():
                    if self._position.counters.step > 0:
                        self._save(log)
                raise Interrupted(self._position.counters.step, "resume=auto") from None
            except Exception:
                # Also a reward function that raised: hours of training must not go with it.
                if self._position.counters.step > max(self._saved, 0):
                    with contextlib.suppress(OSError, RuntimeError):
                        self._save(log)
                raise

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it is of another model, data set or data order.
        """
        state = checkpoint.state
        try:
            self._updater.optimizer.load_tensors(checkpoint.trainer)
            self._sampler.load_state_dict(state["sampler"])
            self.counters = Counters(**state["counters"])
            self._updater.optimizer.go_to(self.counters.step)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"resume: the checkpoint does not fit this recipe: {error}") from error
        if checkpoint.experience is not None:
            self._experience = Experience.from_tensors(checkpoint.experience)
            shape = (self._experience.num_generations, self._experience.num_completions)
            expected = (self._config.rollout.num_generations, self._rollout_size)
            if shape != expected:
                raise CheckpointError(
                    f"resume: the checkpoint is in the middle of a rollout of {shape[1]} completions in groups of "
                    f"{shape[0]}; this recipe's have {expected[1]} in groups of {expected[0]}"
                )
        checkpoint.rng.restore()
        self._saved = self.counters.step
        self._position = self._take_position()
        self._notes = [f"continuing after step {self.counters.step}", *differences(state["config"], self._config)]

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _loop(self, log: RunLogger) -> None:
        config = self._config
        if config.eval.eval_on_start and self.counters.step == 0:
            self._evaluate(log)
        elif self._eval_is_due() and self.counters.evaluated < self.counters.step:
            self._evaluate(log)  # the run was stopped between the step and its evaluation
        while self.counters.step < config.max_steps:
            started = time.perf_counter()
            self._take_step(log)
            self.train_seconds += time.perf_counter() - started
            if self._eval_is_due():
                self._evaluate(log)
            if self._save_is_due():
                with self._interrupts.shield():
                    self._save(log)
        with self._interrupts.shield():
            if self._saved != self.counters.step:
                self._save(log)
            if config.export_final:
                lora = config.model.lora
                export(
                    self._policy, self._output_dir / MODEL_DIR, adapter=lora is not None and lora.export == "adapter"
                )
            if config.overwrite:
                remove_replaced(self._output_dir)

    def _take_step(self, log: RunLogger) -> None:
        started = time.perf_counter()
        step = self._next_rollout()
        completions = self._minibatches()[step.counters.used % self._config.steps_per_generation]
        update_started = time.perf_counter()
        try:
            step.metrics |= self._updater.gradients(step.experience, completions)
        except NonFiniteUpdate as problem:
            raise self._stop_on(problem, step, completions) from None
        step.counters.step += 1
        step.counters.used += 1
        with self._interrupts.shield():
            self._updater.apply()
            self.counters, self._experience = step.counters, step.experience
            self._position = self._take_position()
            finish(self._policy.device)  # AdamW is launched only
            done = time.perf_counter()
            step.seconds["update"] = step.seconds.pop("prepare", 0.0) + done - update_started
            self._log_step(log, step, completions, done - started)

    def _next_rollout(self) -> _Step:
        """The experience that the next step trains on: the current one, or a new one when that is used up."""
        config, counters = self._config, dataclasses.replace(self.counters)
        if self._experience is not None and counters.used < config.steps_per_generation * config.num_iterations:
            return _Step(counters, self._experience)
        indices = self._sampler.next(config.prompts_per_step * config.steps_per_generation)
        rollout = collect(
            self._engine,
            self._rewards,
            [self._data.train[index] for index in indices],
            self._policy.tokenizer,
            config,
            num_generations=config.rollout.num_generations,
            seed=derive_seed(config.seed, "rollout", counters.rollouts),
        )
        counters.rollouts += 1
        counters.num_tokens += rollout.num_tokens()
        counters.used = 0
        started = time.perf_counter()
        experience = to_experience(rollout, config)
        self._updater.prepare(experience, self._minibatches())
        seconds = rollout.seconds | {"prepare": time.perf_counter() - started}
        return _Step(counters, experience, rollout_metrics(rollout), seconds, samples(rollout, experience.advantages))

    def _minibatches(self) -> list[range]:
        """The completions of each optimiser step of a rollout: whole groups."""
        size = self._config.completions_per_step
        return [range(start, start + size) for start in range(0, self._rollout_size, size)]

    @property
    def _rollout_size(self) -> int:
        return self._config.completions_per_step * self._config.steps_per_generation

    def _log_step(self, log: RunLogger, step: _Step, completions: Sequence[int], seconds: float) -> None:
        metrics = step.metrics
        flops = metrics.pop("update_flops", 0.0)
        metrics |= {"num_tokens": float(step.counters.num_tokens), "epoch": self._sampler.epoch}
        metrics |= throughput_metrics(
            self._policy.device,
            seconds=step.seconds,
            step_time=seconds,
            num_tokens=sum(len(step.experience.span(number)) for number in completions),
            flops=flops,
        )
        log.step(step.counters.step, metrics)
        if step.samples and (step.counters.step - 1) % self._config.logging.log_completions_steps == 0:
            log.samples(step.counters.step, step.samples)

    def _eval_is_due(self) -> bool:
        step, options = self.counters.step, self._config.eval
        if step == self._config.max_steps and options.eval_on_end:
            return True
        return options.eval_steps is not None and step > 0 and step % options.eval_steps == 0

    def _evaluate(self, log: RunLogger) -> None:
        if not self._data.held_out:
            return
        metrics = evaluate(self._eval_engine, self._rewards, self._data.held_out, self._policy.tokenizer, self._config)
        with self._interrupts.shield():
            self.counters.evaluated = self.counters.step
            self._position = self._take_position()
            log.eval(self.counters.step, metrics)

    # ---- state ------------------------------------------------------------------------------------------------------

    def _take_position(self) -> _Position:
        return _Position(
            counters=dataclasses.replace(self.counters),
            sampler=self._sampler.state_dict(),
            experience=self._experience,
            rng=RngState.take(),
        )

    def _save_is_due(self) -> bool:
        steps, minutes = self._config.save_steps, self._config.save_minutes
        if steps is not None and self.counters.step % steps == 0:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _save(self, log: RunLogger) -> None:
        """A checkpoint of the last position. Weights and moments are as they were then: only `apply` changes them."""
        started = time.monotonic()
        position = self._position
        served = self._config.steps_per_generation * self._config.num_iterations
        in_use = position.experience is not None and position.counters.used < served
        checkpoint = Checkpoint(
            step=position.counters.step,
            trainer=self._updater.optimizer.tensors(),
            experience=position.experience.tensors() if in_use and position.experience is not None else None,
            rng=position.rng,
            state={
                "counters": dataclasses.asdict(position.counters),
                "sampler": position.sampler,
                "config": as_dict(self._config),
            },
        )
        path = save_checkpoint(self._output_dir, checkpoint, keep=self._config.save_total_limit)
        self._saved, self._saved_at = position.counters.step, time.monotonic()
        size = sum(file.stat().st_size for file in path.iterdir())
        log.message(f"{path.name}: {size / 2**20:.0f} MiB in {self._saved_at - started:.1f} s")

    def _stop_on(self, problem: NonFiniteUpdate, step: _Step, completions: Sequence[int]) -> NonFiniteError:
        number = step.counters.step + 1
        folder = save_bad_batch(
            self._output_dir,
            number,
            str(problem),
            step.experience,
            completions,
            step.metrics | problem.metrics,
            self._policy.tokenizer,
        )
        return NonFiniteError(
            f"step {number}: {problem}; nothing was applied, the batch is in {folder} and the run can go on from "
            f"step {number - 1} (resume=auto), say with a lower learning_rate"
        )

    def _describe(self) -> str:
        config, policy = self._config, self._policy
        kind = "LoRA" if policy.is_lora else "float32 masters" if config.model.master_weights else "no masters"
        weights = f"{config.model.dtype}, {kind}" if config.model.dtype != "float32" or policy.is_lora else "float32"
        return (
            f"{config.model.path}: {policy.num_parameters / 1e6:.1f}M parameters ({weights}) on {policy.device}, "
            f"{policy.attention} attention; {len(self._data.train)} training and {len(self._data.held_out)} held-out "
            f"prompts; {config.prompts_per_step} prompts x {config.rollout.num_generations} completions a step"
        )
