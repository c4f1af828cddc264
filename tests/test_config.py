"""Recipes: what they may hold, what follows from what, and the one line that each mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_fast.config import LossConfig
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.errors import ConfigError
from grpo_fast.trainer.recipe import (
    as_dict,
    config_from_dict,
    describe_options,
    load_config,
    shipped_recipes,
    to_yaml,
)

BASE = """
output_dir: out
data: {task: chain_sum, task_config: {min_terms: 2}}
rewards: [{function: exact_answer}]
"""
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE)
    return file


def test_defaults_and_overrides(recipe):
    config = load_config(
        recipe, ["learning_rate=3e-5", "model.lora.r=4", "data.task_config.max_terms=3", "rewards.0.weight=2"]
    )
    assert config.learning_rate == 3e-5
    assert config.model.lora.r == 4
    assert config.data.task_config == {"min_terms": 2, "max_terms": 3}
    assert config.rewards[0].weight == 2.0
    assert config.completions_per_step == 64
    assert load_config(recipe).model.lora is None


def test_yaml_gives_the_config_back(recipe, tmp_path):
    config = load_config(recipe, ["model.lora.r=4", "loss.loss_type=dr_grpo", "rollout.temperature=0.7"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config
    # What followed from the rollout follows it again.
    assert load_config(again, ["rollout.temperature=0.5"]).loss.temperature == 0.5


@pytest.mark.parametrize("text", ["off", "'off'", "false"])
def test_supports_are_switched_off_by_a_bare_off(recipe, tmp_path, text):
    """Which YAML takes for False."""
    recipe.write_text(BASE + "loss: {support: " + text + "}")
    config = load_config(recipe, ["rollout.top_p=0.9"])
    assert config.loss.support == load_config(recipe, [f"loss.support={text}"]).loss.support == "off"
    assert not config.records_support
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config
    # The loss itself has no such option.
    assert LossConfig.from_key(config.loss.key).key == config.loss.key == LossConfig(max_completion_length=256).key


@pytest.mark.parametrize(
    ("options", "cuts"),
    [
        ([], False),
        (["top_p=0.9"], True),
        (["top_k=5"], True),
        (["min_p=0.1"], True),
        (["min_p=0.0", "top_k=0", "top_p=1.0", "repetition_penalty=1.2", "temperature=0.5"], False),
    ],
)
def test_supports_are_recorded_where_the_sampler_cuts(recipe, options, cuts):
    config = load_config(recipe, [f"rollout.{option}" for option in options])
    assert config.loss.support == "auto"
    assert config.records_support == cuts


def test_the_loss_follows_the_rollout(recipe):
    config = load_config(recipe, ["rollout.temperature=0.7", "rollout.max_completion_length=99"])
    assert (config.loss.temperature, config.loss.max_completion_length) == (0.7, 99)
    assert load_config(recipe, ["loss.max_completion_length=7"]).loss.max_completion_length == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lerning_rate=1"], "lerning_rate: no such key; did you mean learning_rate?"),
        (["num_generations=3"], "did you mean rollout.num_generations?"),
        (["model.lora.rank=3"], "model.lora.rank: no such key"),
        (["rewards.0.wieght=3"], "did you mean rewards.weight?"),
        (["learning_rate=fast"], "learning_rate: .*fast.*Float"),
        (["max_steps=1.5"], "max_steps: .*1.5.*Integer"),
        (["rollout.top_p=7"], "rollout.top_p: expected .*; got 7"),
        (["rollout.num_generations=0"], "rollout.num_generations: expected an integer >= 1; got 0"),
        (["rollout.num_generations=1"], "rollout.num_generations: expected at least 2, as an advantage is"),
        (["loss.loss_type=ppo"], "^loss.loss_type: expected one of grpo, .*; got 'ppo'"),
        (["loss.loss_type=cispo"], "^loss.epsilon_high: expected a number, as cispo bounds the ratio by it"),
        (["loss.loss_type=null"], "loss.loss_type"),
        (["loss.support=on"], "^loss.support: expected one of auto, off; got 'True'"),
        (["loss.support=some"], "^loss.support: expected one of auto, off; got 'some'"),
        (["loss.temperature=2"], r"loss.temperature: expected rollout.temperature \(1.0\)"),
        (["model.dtype=float16"], "model.dtype: expected one of bfloat16, float32; got 'float16'"),
        (["model=3"], "expected|subclass"),
        (["rewards=[]"], "rewards: expected at least one reward function"),
        (["rewards=[{weight: 1}]"], r"rewards\[0\].function: expected a value"),
        (["rewards.3.weight=1"], "rewards"),
        (["data.task=null"], "data.train, data.task: expected one of the two; got neither"),
        (["data.train=x.jsonl"], "expected one of the two; got both"),
        (["data.prompt_template=hello"], "data.prompt_template: expected a text with {prompt}"),
        (["output_dir=???"], "output_dir: expected a value"),
        (["foo"], "override: expected key=value; got 'foo'"),
        (["=3"], "override: expected key=value"),
        (["eval.pass_at_k=[4]"], "eval.pass_at_k: expected k <= eval.num_generations_eval"),
        (["logging.report_to=[mlflow]"], "logging.report_to: expected one of tensorboard"),
        (["warmup_steps=-1"], "warmup_steps: expected an integer >= 0"),
        (["advantages.scale_rewards=std"], "advantages.scale_rewards: expected one of"),
    ],
)
def test_mistakes_name_the_key(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(recipe, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "expected .* to hold `key: value` pairs"),
        ("a: [1,\n", "is not valid YAML"),
        ("output_dir: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("output_dir: o\nunknown: 1\n", "unknown: no such key"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file_names_the_shipped_recipes(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_repositorys_recipes_load(path):
    config = load_config(path, ["model.path=m", "data.train=d.jsonl"] if path.stem == "own_data" else [])
    assert config.max_steps > 0


def test_shipped_recipes_are_found_by_name():
    if not shipped_recipes():
        pytest.skip("grpo_fast.recipes is not installed")
    assert load_config("demo").output_dir == "runs/demo"


def test_every_option_is_described():
    lines = describe_options().splitlines()
    names = {line.partition(" = ")[0] for line in lines}
    sections = {"data": {"task": "t"}, "rewards": [{"function": "f"}], "model": {"lora": {}}}
    config = as_dict(config_from_dict({"output_dir": "o", **sections}))

    def leaves(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert set(leaves(config)) - {"rewards"} <= names
    assert "learning_rate = 1e-06" in lines
    assert TrainConfig.__doc__
