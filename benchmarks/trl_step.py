"""A TRL training step with and without grpo-fast: time and memory of the update, and of the loss part alone.

    python benchmarks/trl_step.py --out step.json                                   SmolLM2-135M, 2048 tokens
    python benchmarks/trl_step.py --out step.json --model folder --completions 2 --length 8 --rounds 1      does it run?

The update is `_compute_loss` and the backward of one micro-batch, without the optimiser. For the loss part the backbone
is taken away: it returns states that are ready, so that what remains is the LM head, the loss, its metrics and their
backward into states and weights. All contenders take the same batch in one process and in turn; each loss is compared
with TRL's before anything is timed. Memory is what a run takes beyond what was there before it, gradients included.

Contenders: TRL's trainer; grpo-fast (the fused loss); grpo-fast kept to log-probabilities, TRL's loss on top.
Weights: `autocast`, float32 weights under bfloat16 autocast (TRL's default), or `bfloat16`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import PeakMemory, machine_facts, timed
from trl_setup import CONTENDERS, build, fixed_batch, model_path, remove_folder

MODES = ("update", "loss part")
WEIGHTS: dict[str, dict[str, Any]] = {
    "autocast": {"bf16": True},
    "bfloat16": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
    "float32": {"bf16": False},
}
# TRL rounds logits to bfloat16: its losses differ by that much.
TOLERANCE = {"autocast": 3e-2, "bfloat16": 3e-2, "float32": 1e-4}


@contextmanager
def ready_states(lm: Any, kept: dict[str, Any]) -> Iterator[None]:
    """The backbone gives the states of its first call again, as a leaf that requires a gradient; `kept` holds them."""
    backbone = lm.base_model
    forward = backbone.forward

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if "states" not in kept:
            with torch.no_grad():
                kept["states"] = forward(*args, **kwargs).last_hidden_state.detach()
        states = kept["states"].requires_grad_()
        states.grad = None
        return SimpleNamespace(last_hidden_state=states)

    backbone.forward = stand_in
    try:
        yield
    finally:
        del backbone.forward


def step_of(trainer: Any, batch: dict[str, Any]) -> Callable[[], float]:
    """One micro-batch's loss and backward; returns the loss."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    def step() -> float:
        trainer.model.zero_grad(set_to_none=True)
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.item()

    return step


def measure(steps: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each run, contenders in turn, after one run that is not timed; memory of one run more."""
    memory = PeakMemory()
    losses = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step)[1])
    rows = []
    for name, step in steps.items():
        memory.start()
        step()
        row = {"contender": name, "loss": losses[name], "seconds": seconds[name], "peak_bytes": memory.stop()}
        rows.append(row | {"median_seconds": statistics.median(seconds[name])})
    return rows


def run(weights: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All contenders and modes with one kind of weights."""
    path = model_path(given.model)
    options = {"per_device_train_batch_size": given.completions, "num_generations": given.completions}
    options |= {"max_completion_length": given.length, "loss_type": given.loss_type, **WEIGHTS[weights]}
    options |= {"gradient_checkpointing": False, "beta": 0.0}
    trainers = {name: build(name, path, lora=given.lora, **options) for name in CONTENDERS}
    vocab = trainers["trl"].model.config.get_text_config().vocab_size
    batch = fixed_batch(trainers["trl"], given.completions, given.length, given.prompt, vocab)
    rows = []
    for mode in MODES:
        steps: dict[str, Callable[[], float]] = {}
        for name, trainer in trainers.items():
            step = step_of(trainer, batch)
            steps[name] = step if mode == "update" else _without_backbone(trainer, step)
        found = measure(steps, given.rounds)
        for row in found:
            difference = abs(row["loss"] - found[0]["loss"])
            if not difference <= TOLERANCE[weights] * max(abs(found[0]["loss"]), 1e-2):
                raise SystemExit(
                    f"{weights}, {mode}: {row['contender']} has loss {row['loss']}, not {found[0]['loss']}"
                )
            row["faster_than_trl"] = found[0]["median_seconds"] / row["median_seconds"]
            rows.append({"weights": weights, "mode": mode, **row})
            print(
                f"{weights:<9} {mode:<9} {row['contender']:<19} {row['median_seconds']:8.3f} s "
                f"{row['faster_than_trl']:6.2f} x  {(row['peak_bytes'] or 0) / 2**20:8.0f} MiB",
                flush=True,
            )
    for trainer in trainers.values():
        remove_folder(trainer)
    return rows


def _without_backbone(trainer: Any, step: Callable[[], float]) -> Callable[[], float]:
    base = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    kept: dict[str, Any] = {}

    def alone() -> float:
        with ready_states(base, kept):
            return step()

    return alone


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the raw file."""
    parser = argparse.ArgumentParser(description="A TRL step with and without grpo-fast.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a folder; default SmolLM2-135M")
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss-type", default="dapo")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--weights", nargs="*", choices=list(WEIGHTS), default=["autocast", "bfloat16"])
    given = parser.parse_args(argv)
    packages = ("torch", "transformers", "trl", "accelerate")
    result = {
        "machine": machine_facts(),
        "versions": {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "settings": {name: str(value) for name, value in vars(given).items()},
        "tokens": given.completions * given.length,
        "rows": [row for weights in given.weights for row in run(weights, given)],
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
