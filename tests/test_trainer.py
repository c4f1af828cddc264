"""Runs end to end on models of 32 dimensions: they learn, evaluate, export, and protect what they write."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from grpo_fast.trainer.errors import ConfigError, ModelError
from grpo_fast.trainer.evaluate import pass_at_k
from grpo_fast.trainer.loop import train
from grpo_fast.trainer.model import export, load_policy
from grpo_fast.trainer.saved import load_saved, summary
from tests import tiny
from tests.tiny import configured, rows, weights_of


def test_a_run_learns(tmp_path):
    config = configured(tmp_path, max_steps=25, prompts_per_step=4, rollout__num_generations=8, learning_rate=1e-2)
    train(config)
    done = rows(tmp_path / "run")
    assert [row["step"] for row in done] == list(range(1, 26))
    first, last = (sum(row["reward"] for row in part) / 5 for part in (done[:5], done[-5:]))
    assert last > first + 0.3
    expected = {
        "reward", "reward_std", "frac_reward_zero_std", "rewards/letters/mean", "completions/mean_length",
        "completions/clipped_ratio", "loss", "grad_norm", "learning_rate", "entropy", "clip_ratio/low_mean",
        "num_tokens", "step_time", "tokens_per_second", "peak_memory_gib", "padding_fraction", "active_row_fraction",
        "time/rollout", "time/update", "time/reward", "epoch", "sampling/sampling_logp_difference/mean",
    }  # fmt: skip
    assert expected <= done[0].keys()
    # The sampler and the update see one policy: float32, so they agree to rounding.
    assert done[0]["sampling/sampling_logp_difference/max"] < 1e-4
    text = "\n".join(summary(tmp_path / "run", 1.0))
    assert "25 steps" in text
    assert f"{first:.3f} (first 5 rollouts) -> {last:.3f} (last 5)" in text


def test_several_steps_a_rollout(tmp_path):
    """Two minibatches, two passes; the old policy is that of before the first of the four steps."""
    config = configured(tmp_path, max_steps=8, steps_per_generation=2, num_iterations=2, prompts_per_step=2)
    train(config)
    done = rows(tmp_path / "run")
    assert [("reward" in row) for row in done] == [True, False, False, False] * 2
    for row in done:
        fresh = row["step"] in (1, 5)
        assert (row["ratio/min"] == row["ratio/max"] == 1.0) == fresh
        assert (row["approx_kl"] == 0.0) == fresh
    assert done[0]["num_tokens"] == done[3]["num_tokens"] < done[4]["num_tokens"]


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_reference_policy(tmp_path, lora):
    config = configured(tmp_path, max_steps=4, loss__beta=0.1, model__lora=lora, learning_rate=3e-2)
    train(config)
    kl = [row["kl"] for row in rows(tmp_path / "run")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-4


def test_lora_trains_adapters_only_and_merges(tmp_path):
    config = configured(tmp_path, max_steps=3, model__lora={"r": 2}, export_final=True, learning_rate=3e-2)
    train(config)
    assert all("lora_" in name for name in weights_of(tmp_path / "run"))
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    _, policy = load_saved(tmp_path / "run")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        trained = policy.model(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(input_ids=ids).logits, trained, atol=1e-3)
        with policy.as_reference():
            torch.testing.assert_close(policy.model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_the_exported_model_is_the_trained_one(tmp_path):
    config = configured(tmp_path, max_steps=2, export_final=True, model__dtype="bfloat16")
    train(config)
    exported = tmp_path / "run" / "model"
    assert (exported / "model.safetensors").is_file()
    from safetensors.torch import load_file

    masters = weights_of(tmp_path / "run")
    for name, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(tensor, masters[f"weight/{name}"].bfloat16())
    policy = load_policy(dataclasses.replace(config.model, path=str(exported)), torch.device("cpu"))
    assert policy.eos_token_ids == [1]
    assert policy.tokenizer.decode(policy.tokenizer("a+b")["input_ids"]) == "a+b"
    again = tmp_path / "again"
    export(load_saved(tmp_path / "run")[1], again)
    assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_adapters_are_exported_merged_or_alone(tmp_path, modules_to_save, monkeypatch):
    """Either gives the trained policy's logits, and neither copies the model."""
    import peft
    from transformers import AutoModelForCausalLM

    lora = {"r": 4, "export": "adapter", "modules_to_save": modules_to_save}
    train(configured(tmp_path, max_steps=2, export_final=True, model__lora=lora))
    ids = torch.tensor([[5, 6, 7]])

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    policy = load_saved(tmp_path / "run")[1]
    expected = logits(policy.model)
    folder = tmp_path / "run" / "model"
    assert not (folder / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.allclose(logits(base), expected)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, folder)), expected)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "__deepcopy__", lambda *args: pytest.fail("copied"))
        export(policy, tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert not policy.is_lora
    with pytest.raises(ModelError, match=r"model\.lora: expected adapters to export; the whole model was trained"):
        export(policy, tmp_path / "again", adapter=True)
    assert not (tmp_path / "again").exists()


def test_chat_messages_and_truncation(tmp_path):
    tiny.recipe(tmp_path)
    data = tmp_path / "chat.jsonl"
    message = [{"role": "user", "content": "hi"}]
    data.write_text("".join(json.dumps({"prompt": message, "tag": n}) + "\n" for n in range(4)))
    config = configured(
        tmp_path,
        data={"train": str(data)},
        max_steps=2,
        mask_truncated_completions=True,
        logging={"progress": False, "plot_steps": 0, "log_completions_steps": 1, "num_completions_to_print": 0},
    )
    train(config)
    sample = json.loads((tmp_path / "run" / "completions.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == message
    assert sample["completion"][0]["role"] == "assistant"
    for row in rows(tmp_path / "run"):
        if row["completions/clipped_ratio"] == 1:
            assert row["loss"] == 0.0
            assert row["active_row_fraction"] == 0.0


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [(4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (5, 2, 3, 0.9), (3, 2, 3, 1.0)],
)
def test_pass_at_k(samples, correct, k, expected):
    assert pass_at_k(samples, correct, k) == pytest.approx(expected)


@pytest.mark.parametrize(("arguments", "name"), [((3, 4, 1), "num_correct"), ((3, 1, 4), "k"), ((3, 1, 0), "k")])
def test_pass_at_k_bad_input(arguments, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        pass_at_k(*arguments)


def test_evaluation_before_during_and_after(tmp_path):
    tiny.recipe(tmp_path)
    config = configured(
        tmp_path,
        max_steps=5,
        data__eval=str(tmp_path / "train.jsonl"),
        eval={"eval_steps": 2, "num_generations_eval": 4, "pass_at_k": [1, 2], "success_threshold": 0.5},
    )
    train(config)
    found = [row for row in rows(tmp_path / "run") if "eval/reward" in row]
    assert [row["step"] for row in found] == [0, 2, 4, 5]
    for row in found:
        assert 0 <= row["eval/pass@1"] <= row["eval/pass@2"] <= 1
        assert row["eval/reward"] == pytest.approx(row["eval/rewards/letters/mean"])
    with pytest.raises(ConfigError, match=r"eval.success_reward: expected one of letters; got 'x'"):
        train(dataclasses.replace(config, overwrite=True, eval=dataclasses.replace(config.eval, success_reward="x")))
