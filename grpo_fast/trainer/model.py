"""Models: loading a policy (with LoRA if asked), its reference, its end-of-text tokens, and exporting it."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.head import Head, head_of
from grpo_fast.trainer import smollm2
from grpo_fast.trainer.attention import NAME, attention_set_to, implementations, register
from grpo_fast.trainer.batch import check_packed_attention
from grpo_fast.trainer.config import ModelConfig
from grpo_fast.trainer.errors import ModelError
from grpo_fast.trainer.files import put_in_place, scratch_of

_log = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Policy:
    """A model that can be trained and sampled.

    Attributes:
        model: the causal LM, or peft's wrapper of it.
        generation_config: the model's own, for the export (while training, sampling is the recipe's alone).
        eos_token_ids: tokens that end a completion.
        attention: the implementation of packed attention.
        is_lora: whether only adapters are trained.
    """

    model: Any
    tokenizer: Any
    generation_config: Any
    eos_token_ids: list[int]
    device: torch.device
    attention: str
    is_lora: bool

    @property
    def pad_token_id(self) -> int:
        """What fills up shorter prompts; never attended to."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, adapters included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def head(self) -> Head:
        """The LM head; taken anew every step, as an adapter on the head changes its weight."""
        return head_of(self.model)

    @contextlib.contextmanager
    def packing(self) -> Iterator[None]:
        """Run the body with packed attention."""
        with attention_set_to(self.model, NAME):
            yield

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Run the body with the adapters switched off (LoRA only)."""
        with self.model.disable_adapter():
            yield


def pick_device(name: str) -> torch.device:
    """The device that `device` names; `auto` is a GPU if there is one.

    Raises:
        ModelError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device: {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def load_policy(config: ModelConfig, device: torch.device, *, trainable: bool = True) -> Policy:
    """Load the model and its tokenizer; with `trainable`, ready to be trained (LoRA added, packing checked).

    Raises:
        ModelError: it is not found, cannot be loaded, has no LM head that is understood, or cannot be packed.
    """
    register()
    model, tokenizer = _load(config)
    eos_token_ids = _eos_token_ids(model, tokenizer)
    generation_config = copy.deepcopy(model.generation_config)
    # What the model's authors suggest for sampling (top_k, penalties) must not leak into rollouts.
    model.generation_config = type(generation_config)()
    model.to(device).eval()
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa cannot cap scores
    attention = _choose_attention(model, config, device)
    if trainable:
        if config.lora is not None:
            model = _add_lora(model, config)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.requires_grad_(False)
    try:
        head_of(model)
    except ValueError as error:
        raise ModelError(str(error)) from error
    return Policy(
        model=model,
        tokenizer=tokenizer,
        generation_config=generation_config,
        eos_token_ids=eos_token_ids,
        device=device,
        attention=attention,
        is_lora=trainable and config.lora is not None,
    )


@torch.no_grad()
def load_trained(policy: Policy, weights: dict[str, Tensor]) -> None:
    """Put trained weights (float32 masters) into a freshly loaded trainable policy.

    Raises:
        ModelError: they are another model's.
    """
    own = {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    saved = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != saved:
        odd = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
        raise ModelError(f"checkpoint: its weights are not those of {policy.model.config.model_type} (see {odd[0]})")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def export(policy: Policy, target: Path, *, adapter: bool = False) -> None:
    """Write the model as a Hugging Face folder (safetensors, tokenizer, generation config).

    LoRA is merged into the policy itself, of which there may not be room for another: it cannot be trained any further.
    With `adapter` it is left as it is and written as peft's folder, without the model.

    What stood at `target` is replaced once everything is written.

    Raises:
        ModelError: `adapter` of a model that has none.
    """
    if adapter and not policy.is_lora:
        raise ModelError("model.lora: expected adapters to export; the whole model was trained")
    if policy.is_lora and not adapter:
        policy.model, policy.is_lora = policy.model.merge_and_unload(), False
    model = policy.model
    own_config = model.generation_config
    model.generation_config = policy.generation_config
    scratch = scratch_of(target)
    try:
        model.save_pretrained(scratch)
        policy.tokenizer.save_pretrained(scratch)
        put_in_place(target)
    finally:
        model.generation_config = own_config
        shutil.rmtree(scratch, ignore_errors=True)


def _load(config: ModelConfig) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, local_only = _resolve(config.path)
    options = {"trust_remote_code": config.trust_remote_code, "local_files_only": local_only}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype), use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = ""
        if "trust_remote_code" in str(error):
            first, hint = "it has code of its own", "; if you trust it, set model.trust_remote_code=true"
        raise ModelError(f"model.path: cannot load {config.path}: {first}{hint}") from error
    return model, tokenizer


def _choose_attention(model: Any, config: ModelConfig, device: torch.device) -> str:
    """The first packed attention that gives the states of plain forwards.

    Raises:
        ModelError: none does.
    """
    problems: list[str] = []
    for name in implementations(config.attn_implementation, device, getattr(torch, config.dtype)):
        problem = _attention_problem(model, name, device)
        if problem is None:
            for passed_over in problems:
                _log.warning("%s; %s is used instead", passed_over, name)
            return name
        problems.append(f"packed attention {name} cannot be used: {problem}")
    raise ModelError(problems[-1])


def _attention_problem(model: Any, name: str, device: torch.device) -> str | None:
    """Why a packed attention cannot be used for the model, or None."""
    try:
        check_packed_attention(model, implementation=name, device=device)
    except ModelError as error:
        return str(error)
    # Kernels refuse head sizes and architectures, and other versions arguments, with errors of their own.
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _resolve(path: str) -> tuple[str, bool]:
    """A local folder, or the name of a model on the hub, and whether all of it has to be on this machine."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path: expected a Hugging Face model folder; {path} has no config.json")
        return str(folder), True
    if path.lower() == smollm2.NAME:
        return str(smollm2.smollm2_path()), True
    if folder.exists() or path.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(path):
        raise ModelError(f"model.path: expected a model folder or a hub name; there is no folder {path}")
    return path, _only_in_cache(path)


def _only_in_cache(name: str) -> bool:
    """Whether the hub cannot be asked, so that a model that was downloaded once has to do.

    One quick question: left to itself, transformers asks an unreachable hub for a minute.

    Raises:
        ModelError: the hub has no such model, or it cannot be asked and nothing of the model is in the cache.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    else:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
            return False
        except HfHubHTTPError as error:  # the hub's answer; gated models and those without access have their own
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ModelError(f"model.path: there is no folder {name} here, and the hub answers: {lines[0]}") from error
        except Exception as error:
            why = f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise ModelError(
            f"model.path: cannot load {name}: there is no folder of that name in {Path.cwd()}, no such model in the "
            f"cache {constants.HF_HUB_CACHE}, and {why}"
        )
    return True


def _eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the generation config's and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = list(own) if isinstance(own, (list, tuple)) else [own]
    found = list(dict.fromkeys(token for token in [*ids, tokenizer.eos_token_id] if token is not None))
    if not found:
        raise ModelError("model: expected an end-of-text token in its generation config or tokenizer; got none")
    return found


def _add_lora(model: nn.Module, config: ModelConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError("model.lora: needs the peft package (pip install peft)") from error
    lora = config.lora
    assert lora is not None
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=lora.target_modules or "all-linear",
                modules_to_save=lora.modules_to_save,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ModelError(f"model.lora: {str(error).splitlines()[0]}") from error
