"""TRL's options, model kinds and subclasses under grpo-fast's trainer: TRL's numbers, or a refusal that says why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_fast.config import LossConfig
from tests.trl_loss import trl_missing, trl_policy_loss

pytestmark = pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))
pytest.importorskip("datasets")

from tests import tiny, trl_runs  # noqa: E402

OFF_POLICY = {"num_iterations": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(scope="module")
def classes() -> tuple[Any, Any]:
    from trl import GRPOTrainer

    from grpo_fast.integrations.trl import GRPOTrainer as Ours

    return GRPOTrainer, Ours


# -- what a rollout may bring, without tools or a server --------------------------------------------------------------


def with_tools(trainer: Any) -> None:
    """Every third token was said by a tool."""
    generate = trainer._generate

    def answer(prompts: Any) -> Any:
        result = list(generate(prompts))
        result[2] = [[int((i + j) % 3 != 0) for j in range(len(ids))] for i, ids in enumerate(result[1])]
        return tuple(result)

    trainer._generate = answer


def with_engine(trainer: Any) -> None:
    """A rollout engine that knows most log-probabilities, its own."""
    generate, trainer.use_vllm = trainer._generate, True

    def answer(prompts: Any) -> Any:
        trainer.use_vllm = False
        result = list(generate(prompts))
        trainer.use_vllm = True
        gen = torch.Generator().manual_seed(5)
        noise = [0.3 * torch.randn(len(ids), generator=gen) for ids in result[1]]
        result[4] = [[None if j % 7 == 5 else x - 4.4 for j, x in enumerate(row.tolist())] for row in noise]
        return tuple(result)

    trainer._generate = answer


def with_both(trainer: Any) -> None:
    with_engine(trainer)
    with_tools(trainer)


def experts(folder: Path) -> dict[str, Any]:
    import transformers as hf

    shape = tiny._SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    return _saved(hf.MixtralForCausalLM(hf.MixtralConfig(**shape)), folder / "experts")


def capped(folder: Path) -> dict[str, Any]:
    return _saved(tiny.model("gemma2", final_logit_softcapping=2.0), folder / "capped")


def _saved(model: Any, path: Path) -> dict[str, Any]:
    """Saved, as TRL loads the reference model by its name."""
    model.save_pretrained(path)
    model.config._name_or_path = str(path)
    return {"model": model.train()}


def prompt_tuning(folder: Path) -> dict[str, Any]:
    from peft import PromptTuningConfig

    return {"peft": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}


def evaluation(folder: Path) -> dict[str, Any]:
    from datasets import Dataset

    return {"eval_dataset": Dataset.from_list([{"prompt": prompt} for prompt in trl_runs.PROMPTS[:3]])}


def plain(folder: Path) -> dict[str, Any]:
    return {}


ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 4.28, "entropy_coef": 0.01, "entropy_coef_delta": 0.02}
ACCUMULATION = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 3}
Make = Callable[[Path], dict[str, Any]]
CASES: dict[str, tuple[dict[str, Any], Make, Callable[[Any], None] | None]] = {
    "temperature": ({"temperature": 0.7, "pad_to_multiple_of": 8, **OFF_POLICY}, plain, None),
    "cispo-default": ({"loss_type": "cispo", **OFF_POLICY}, plain, None),  # TRL bounds it by epsilon, 0.2
    "delta": ({"delta": 1.1, "epsilon_high": 0.3, **OFF_POLICY}, plain, None),
    "steps-per-generation": ({"steps_per_generation": 4, **ACCUMULATION, "max_steps": 4}, plain, None),
    "entropy-bonus": ({"entropy_coef": 0.05, "top_entropy_quantile": 0.5, **ACCUMULATION}, plain, None),
    "entropy-bonus-of-all": ({"entropy_coef": 0.05, **ACCUMULATION}, plain, None),
    "adaptive-entropy": ({**ADAPTIVE, **ACCUMULATION, "max_steps": 5}, plain, None),
    "off-policy-mask": ({"off_policy_mask_threshold": 0.01, **OFF_POLICY}, plain, None),
    "rewards": ({"reward_funcs": [trl_runs.letters, trl_runs.vowels], "reward_weights": [0.5, 2.0]}, plain, None),
    "sync-reference": ({"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3}, plain, None),
    "uncorrected-kl": ({"beta": 0.1, "use_bias_correction_kl": False, **OFF_POLICY}, plain, None),
    "evaluation": ({**EVALUATION, "beta": 0.1, "entropy_coef": 0.1}, evaluation, None),
    "tools": ({"beta": 0.1, "mask_truncated_completions": True, **OFF_POLICY}, plain, with_tools),
    "engine-sequence-mask": ({"vllm_importance_sampling_clip_max": 1.5, **OFF_POLICY}, plain, with_engine),
    "engine-token-truncate": (
        {"vllm_importance_sampling_mode": "token_truncate", **OFF_POLICY},
        plain,
        with_both,
    ),
    "engine-vespo": ({"loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask"}, plain, with_engine),
    "engine-uncorrected": (
        {"vllm_importance_sampling_correction": False, "off_policy_mask_threshold": 0.05, **OFF_POLICY},
        plain,
        with_engine,
    ),
    "router-loss": ({"router_aux_loss_coef": 0.2, "beta": 0.1}, experts, None),
    "soft-cap": ({"beta": 0.1}, capped, None),
    "prompt-tuning": ({"beta": 0.1}, prompt_tuning, None),
    "checkpointing": ({"gradient_checkpointing": True}, plain, None),
}


@pytest.mark.parametrize("name", CASES)
def test_as_trl(folder: Path, classes: tuple[Any, Any], name: str) -> None:
    options, make, prepare = CASES[name]
    logs = []
    for cls in classes:
        trainer = trl_runs.trainer_of(cls, folder, **options, **make(folder))
        if prepare is not None:
            prepare(trainer)
        logs.append(trl_runs.train(trainer))
    assert not trl_runs.differences(logs[1], logs[0], 1e-3)
    assert trainer.grpo_fast.depth == "loss"
    assert any(row.get("grad_norm") for row in logs[0])


@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, {"bf16": True, "cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}],
)
def test_mixed_precision(folder: Path, classes: tuple[Any, Any], options: dict[str, Any]) -> None:
    """Autocast is in force at the head unless it is cast to float32; TRL rounds its logits, hence 1 %."""
    logs = [trl_runs.train(trl_runs.trainer_of(cls, folder, max_steps=1, **options)) for cls in classes]
    assert not trl_runs.differences(logs[1], logs[0], 1e-2)


def test_resume(folder: Path, classes: tuple[Any, Any], tmp_path: Path) -> None:
    """A run of ours goes on from its own checkpoint as it would have gone on."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "beta": 0.1, "shuffle_dataset": False}
    path = trl_runs.saved_model(folder)
    whole = trl_runs.train(trl_runs.trainer_of(classes[1], tmp_path, model=path, **options))
    rest = trl_runs.trainer_of(classes[1], tmp_path, model=path, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    last = next(row for row in reversed(rest.state.log_history) if "loss" in row)
    for name in ("loss", "grad_norm", "kl", "num_tokens", "step"):
        assert last[name] == pytest.approx(whole[2][name], rel=1e-5)


# -- subclasses and existing trainers ---------------------------------------------------------------------------------


def own_loss(base: Any) -> Any:
    class OwnLoss(base):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            return 2 * super()._compute_loss(model, inputs)

    return OwnLoss


def own_scoring(base: Any) -> Any:
    class OwnScoring(base):
        calls = 0

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    return OwnScoring


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that went through `token_logprobs`."""
    from grpo_fast.integrations import lm_head

    seen: list[tuple[int, ...]] = []
    token_logprobs = lm_head.token_logprobs

    def watched(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(hidden.shape))
        return token_logprobs(hidden, *args, **kwargs)

    monkeypatch.setattr(lm_head, "token_logprobs", watched)
    return seen


@pytest.mark.parametrize("make", [own_loss, own_scoring])
@pytest.mark.parametrize("how", ["instance", "class", "derived"])
def test_subclasses_keep_what_they_override(
    folder: Path, classes: tuple[Any, Any], scored: list[Any], make: Callable[[Any], Any], how: str
) -> None:
    from grpo_fast.integrations.trl import accelerate_trainer

    theirs = trl_runs.train(trl_runs.trainer_of(make(classes[0]), folder, beta=0.1))
    cls = make(classes[1] if how == "derived" else classes[0])
    trainer = trl_runs.trainer_of(accelerate_trainer(cls) if how == "class" else cls, folder, beta=0.1)
    if how == "instance":
        assert accelerate_trainer(trainer) is trainer
    assert isinstance(trainer, cls)
    assert type(trainer).__name__ == cls.__name__
    ours = trl_runs.train(trainer)
    assert not trl_runs.differences(ours, theirs, 1e-3)
    assert trainer.grpo_fast.depth == "logprobs"
    assert "has its own" in trainer.grpo_fast.reason
    assert len(scored) == 4  # reference and policy of two steps
    assert getattr(trainer, "calls", 4) == 4


def test_an_existing_trainer_gets_the_fused_loss(folder: Path, classes: tuple[Any, Any]) -> None:
    from grpo_fast.integrations.trl import accelerate_trainer

    theirs = trl_runs.train(trl_runs.trainer_of(classes[0], folder))
    trainer = accelerate_trainer(trl_runs.trainer_of(classes[0], folder), backend="torch")
    assert accelerate_trainer(trainer) is trainer
    assert not trl_runs.differences(trl_runs.train(trainer), theirs, 1e-3)
    assert trainer.grpo_fast.policy.last.backend == "torch"
    assert trainer.grpo_fast.depth == "loss"


def test_a_trainer_that_has_trained(folder: Path, classes: tuple[Any, Any]) -> None:
    """accelerate has wrapped its model's forward in autocast by then."""
    from grpo_fast.integrations.trl import accelerate_trainer

    trainer = trl_runs.trainer_of(classes[0], folder, bf16=True, max_steps=1)
    trainer.train()
    trainer = accelerate_trainer(trainer)
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.grpo_fast.policy.last.plan == "single_pass"
    lm = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    ids = torch.tensor([[5, 6, 7]])
    assert lm(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.isfinite().all()


def test_options_that_the_loss_does_not_take_stay_with_trl(folder: Path, classes: tuple[Any, Any], caplog: Any) -> None:
    options = {"epsilon": 1.5, **OFF_POLICY}
    theirs = trl_runs.train(trl_runs.trainer_of(classes[0], folder, **options))
    with caplog.at_level(logging.INFO, logger="grpo_fast"):
        trainer = trl_runs.trainer_of(classes[1], folder, **options)
    assert "depth 'logprobs'" in caplog.text
    assert "epsilon" in caplog.text
    assert trainer.grpo_fast.depth == "logprobs"
    assert not trl_runs.differences(trl_runs.train(trainer), theirs, 1e-3)


def test_methods_work_unbound(monkeypatch: pytest.MonkeyPatch, classes: tuple[Any, Any]) -> None:
    """On a stand-in for a trainer, as tests of TRL do."""
    gen = torch.Generator().manual_seed(0)
    config, mask = LossConfig(loss_type="grpo"), torch.ones(3, 5, dtype=torch.long)
    logprobs, entropies, old = (torch.randn(3, 5, generator=gen) for _ in range(3))
    given = config, logprobs, entropies, mask, torch.randn(3, generator=gen)
    theirs = trl_policy_loss(*given, old=old)
    monkeypatch.setattr("trl.GRPOTrainer", classes[1])
    ours = trl_policy_loss(*given, old=old)
    assert theirs[0].item() == ours[0].item() != 0
    assert theirs[1] == ours[1]


def test_refusals(folder: Path, classes: tuple[Any, Any]) -> None:
    from grpo_fast.integrations.trl import Acceleration, accelerate_trainer

    with pytest.raises(ValueError, match=r"trainer: expected a trl\.GRPOTrainer"):
        accelerate_trainer(object())
    with pytest.raises(ValueError, match="use_liger_kernel: expected False"):
        Acceleration(SimpleNamespace(use_liger_kernel=True), backend="auto", workspace_bytes=None)
    with pytest.raises(ValueError, match="backend"):
        trl_runs.train(accelerate_trainer(trl_runs.trainer_of(classes[0], folder), backend="none such"))
