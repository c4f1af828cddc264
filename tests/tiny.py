"""Models, tokenizers and recipes small enough to train in a test."""

from __future__ import annotations

import functools
import json
import string
import textwrap
from pathlib import Path
from typing import Any

import torch

from grpo_fast.trainer.checkpoint import checkpoints, load_checkpoint
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.recipe import config_from_dict
from grpo_fast.trainer.throughput import is_measured

SPECIAL = ("<pad>", "<eos>", "<bos>")
CHARACTERS = string.ascii_letters + string.digits + " .,:;!?+-*/=<>()[]{}|_\n"
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
KINDS = ("llama", "qwen3", "mistral", "gemma2", "gemma3")


def tokenizer(*, chat: bool = True) -> Any:
    """One token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    if chat:
        made.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    return made


def model(kind: str = "llama", *, seed: int = 0, scale: float = 0.1, **changes: Any) -> Any:
    """A random model in float32, in eval mode; weights large enough that attention is far from uniform."""
    import transformers as hf

    shape = _SHAPE | changes
    torch.manual_seed(seed)
    if kind == "llama":
        made = hf.LlamaForCausalLM(hf.LlamaConfig(**{"tie_word_embeddings": True, **shape}))
    elif kind == "qwen3":
        made = hf.Qwen3ForCausalLM(hf.Qwen3Config(**shape))
    elif kind == "mistral":
        made = hf.MistralForCausalLM(hf.MistralConfig(**{"sliding_window": 4, **shape}))
    elif kind == "gemma2":
        config = hf.Gemma2Config(**{"sliding_window": 4, "query_pre_attn_scalar": 8, **shape})
        made = hf.Gemma2ForCausalLM(config)
        made.set_attn_implementation("eager")  # caps its scores
    else:
        layers = ["sliding_attention", "full_attention"]
        config = hf.Gemma3TextConfig(
            **{"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": layers, **shape}
        )
        made = hf.Gemma3ForCausalLM(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=scale)
    return made.eval()


@functools.cache
def _saved(kind: str, scale: float) -> tuple[Any, Any]:
    return model(kind, scale=scale), tokenizer()


def save(folder: Path, kind: str = "llama", *, scale: float = 0.1) -> Path:
    """A model folder as from the hub."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    made, words = _saved(kind, scale)
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


REWARD_FILE = textwrap.dedent(
    '''
    """Rewards of the tests; `bomb` sends its own process a signal in the middle of a step."""
    import os, pathlib

    def letters(completions, **columns):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [sum(x in "abcdefghijklmnopqrstuvwxyz" for x in t) / max(len(t), 1) for t in texts]

    def bomb(completions, signal_number, at_call, log, **columns):
        file = pathlib.Path(log)
        calls = len(file.read_text()) + 1 if file.exists() else 1
        file.write_text("x" * calls)
        if calls == at_call:
            os.kill(os.getpid(), signal_number)
        return [0.0] * len(completions)

    def raises(completions, **columns):
        raise KeyError("no such thing")

    def wrong_length(completions, **columns):
        return [1.0]
    '''
)


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of 4 prompts x 4 completions a step whose model, data and rewards lie in `folder`."""
    model_folder, rewards, data = folder / "model", folder / "my_rewards.py", folder / "train.jsonl"
    if not model_folder.exists():
        save(model_folder)
        rewards.write_text(REWARD_FILE)
        data.write_text(
            "".join(f'{{"prompt": "say {word}", "answer": "{n}"}}\n' for n, word in enumerate("abcdefgh" * 2))
        )
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(model_folder), "dtype": "float32"},
        "data": {"train": str(data)},
        "rewards": [{"function": f"{rewards}:letters"}],
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "prompts_per_step": 4,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging": {"progress": False, "plot_steps": 0, "log_completions": False},
        "export_final": False,
        "device": "cpu",
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[name] = value
    return values


def configured(folder: Path, **changes) -> TrainConfig:
    return config_from_dict(recipe(folder, **changes))


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def comparable(output_dir: Path) -> list[dict]:
    """The run's metrics but for those that depend on the machine."""
    return [{k: v for k, v in row.items() if not is_measured(k) and k != "eval/seconds"} for row in rows(output_dir)]


def weights_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoints(output_dir)[-1]).trainer


def assert_same_run(one: Path, other: Path) -> None:
    assert comparable(one) == comparable(other)
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
