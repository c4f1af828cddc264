"""The race against TRL: equal hyperparameters, the same prompts, time to reward, failures, the plot."""

from __future__ import annotations

import importlib
import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_fast.trainer.data import load_examples
from grpo_fast.trainer.recipe import describe_options, shipped_recipes
from grpo_fast.trainer.rewards import build_rewards
from tests import tiny

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")

# Given to both contenders as they are.
SHARED = {"data", "rewards", "model.path"}
# How ours runs, not what it optimises; and parameters of losses that TRL has not.
OURS_ALONE = {
    *("output_dir", "logging", "eval", "export_final", "resume", "overwrite"),
    *("save_steps", "save_minutes", "save_total_limit"),
    *("device", "backend", "plan", "workspace_bytes", "max_tokens_per_microbatch", "rollout.batch_size"),
    *("model.dtype", "model.master_weights", "model.attn_implementation", "model.trust_remote_code"),
    *("loss.support", "loss.dppo_threshold", "loss.dppo_log_ratio_coef", "loss.dual_clip", "loss.all_token_metrics"),
    # Without loss.importance_sampling_mode, which is neutral, these do nothing.
    *("loss.importance_sampling_clip_min", "loss.importance_sampling_clip_max"),
}


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The scripts of benchmarks/, which import one another as such."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    names = {"main": "race", "report": "race_report", "setup": "race_setup", "contenders": "race_contenders"}
    return SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})


def demo_config(race: SimpleNamespace, folder: Path, *overrides: str, seed: int = 1) -> Any:
    demo = shipped_recipes()["demo"]
    return race.setup.race_config(demo, overrides, seed=seed, max_steps=3, output_dir=folder)


# ---- the same hyperparameters ---------------------------------------------------------------------------------------


def test_every_option_is_paired_neutral_or_accounted_for(race: SimpleNamespace) -> None:
    """An option that is added to the trainer must find its place in the race."""
    options = [line.partition(" = ")[0] for line in describe_options().splitlines()]
    known = {*race.setup.PAIRS, *race.setup.NEUTRAL, *SHARED, *OURS_ALONE, "prompts_per_step"}

    def is_known(name: str) -> bool:
        return any(name == one or name.startswith(one + ".") for one in known)

    assert [name for name in options if not is_known(name)] == []
    # `completions_per_step` is derived: prompts_per_step times rollout.num_generations.
    stale = [one for one in known if one != "completions_per_step" and not any(o.startswith(one) for o in options)]
    assert stale == []


@needs_trl
def test_the_built_configs_agree(race: SimpleNamespace, tmp_path: Path) -> None:
    from trl import GRPOConfig

    config = demo_config(race, tmp_path)
    arguments = GRPOConfig(**race.setup.trl_arguments(config))
    pairs = {row["trl"]: row["value"] for row in race.setup.hyperparameters(config, arguments)}
    assert pairs.keys() == set(race.setup.PAIRS.values())
    expected = {"learning_rate": 3e-5, "adam_beta2": 0.95, "lr_scheduler_type": "constant", "num_generations": 8}
    expected |= {"max_completion_length": 24, "generation_batch_size": 64, "loss_type": "dapo", "beta": 0.0}
    assert {name: pairs[name] for name in expected} == expected
    assert arguments.generation_batch_size // arguments.num_generations == config.prompts_per_step == 8
    # Gradients of a step's micro-batches accumulate to one update on all its completions.
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 64
    assert arguments.steps_per_generation == arguments.gradient_accumulation_steps > 1
    assert arguments.bf16
    assert not arguments.gradient_checkpointing
    arguments.adam_beta2 = 0.999
    with pytest.raises(ValueError, match=r"adam_beta2: expected .* 0\.95; got 0\.999"):
        race.setup.hyperparameters(config, arguments)


@pytest.mark.parametrize(
    "override",
    [
        "rollout.stop_strings=[x]",
        "loss.importance_sampling_mode=token_mask",
        "rewards=[{function: exact_answer, weight: 2.0}]",
    ],
)
def test_options_that_trl_lacks_are_refused(race: SimpleNamespace, tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match="in a race"):
        demo_config(race, tmp_path, override)


# ---- the same prompts, for real -------------------------------------------------------------------------------------


def record_of(race: SimpleNamespace, folder: Path, contender: str, seed: int = 0) -> tuple[dict, list[dict]]:
    """The record of a contender that trains a tiny model on the demo's task for three steps."""
    if not (folder / "model").exists():
        tiny.save(folder / "model")
    file = folder / f"{contender}-{seed}.jsonl"
    sizes = ["prompts_per_step=2", "rollout.num_generations=2", "rollout.max_completion_length=4"]
    given = [contender, str(seed), "--recipe", str(shipped_recipes()["demo"]), "--record", str(file)]
    model = [f"model.path={folder / 'model'}", "model.dtype=float32"]
    limits = ["--stop-at", "0.7", "--max-steps", "3", "--trl-micro-batch", "2"]
    race.contenders.main([*given, *limits, "--set", *sizes, *model])
    start, *steps = [json.loads(line) for line in file.read_text().splitlines()]
    return start, steps


@needs_trl
def test_both_train_on_the_same_prompts_in_the_same_order(race: SimpleNamespace, tmp_path: Path) -> None:
    ours, theirs = (record_of(race, tmp_path, name) for name in ("grpo-fast", "trl"))
    for start, steps in (ours, theirs):
        assert [row["step"] for row in steps] == [1, 2, 3]
        assert start["eos_token_ids"] == [1]
        for before, row in zip([{"seconds": 0.0}, *steps], steps, strict=False):
            assert row["seconds"] - before["seconds"] == pytest.approx(row["step_seconds"])
            assert row["rollout_seconds"] + row["update_seconds"] == pytest.approx(row["step_seconds"])
            assert 0 < row["rollout_seconds"] < row["step_seconds"]
            assert row["peak_rss_bytes"] >= start["loaded_rss_bytes"] > 0
            assert 4 <= row["completion_tokens"] <= 16
    for key in ("prompts", "prompt_tokens"):
        assert [row[key] for row in ours[1]] == [row[key] for row in theirs[1]]
    assert len({row["prompts"] for row in ours[1]}) == 3
    runs = [{"seed": 0, "steps": steps} for _, steps in (ours, theirs)]
    assert race.report.same_prompts(runs) is True
    assert race.report.same_prompts([runs[0], {"seed": 0, "steps": theirs[1][::-1]}]) is False
    assert len(theirs[0]["hyperparameters"]) == len(race.setup.PAIRS)
    prefill, last = theirs[1][0]["decode"]
    assert prefill["tokens"] > last["tokens"] == 1
    assert (last["cache"], last["dtype"]) == (True, "torch.bfloat16")


def test_a_seed_has_its_own_order_and_no_held_out_prompt(race: SimpleNamespace, tmp_path: Path) -> None:
    configs = [demo_config(race, tmp_path, seed=seed) for seed in (0, 1)]
    questions = [[example.prompt for example in race.setup.ordered_examples(config)] for config in configs]
    assert len(questions[0]) == len(questions[1]) == 24
    assert questions[0] != questions[1]
    for config, seen in zip(configs, questions, strict=True):
        held_out = {example.prompt for example in load_examples(config.data, "eval")}
        assert len(held_out) == 50
        assert not held_out & set(seen)


def test_the_reward_scores_each_completion_with_its_own_example(race: SimpleNamespace, tmp_path: Path) -> None:
    config = demo_config(race, tmp_path)
    examples = race.setup.ordered_examples(config)[:2]
    score = race.setup.trl_reward(build_rewards(config.rewards), examples)
    right = [[{"role": "assistant", "content": f"It is {example.columns['answer']}."}] for example in examples]
    wrong = [{"role": "assistant", "content": "No idea."}]
    completions = [right[1], wrong, right[0]]
    arguments = {"prompts": [None] * 3, "completion_ids": [[0]] * 3, "trainer_state": None}
    assert score.__name__ == "exact_answer"
    assert score(completions=completions, example=[1, 1, 0], **arguments) == [1.0, 0.0, 1.0]


# ---- time to reward -------------------------------------------------------------------------------------------------


def made_run(rewards: list[float], *, contender: str = "grpo-fast", seed: int = 0, pace: float = 2.0) -> dict[str, Any]:
    """A run whose steps take `pace` seconds, a quarter of it rollout."""
    steps = [
        {
            "step": number,
            "seconds": pace * number,
            "reward": reward,
            "step_seconds": pace,
            "rollout_seconds": pace / 4,
            "update_seconds": pace * 3 / 4,
            "prompts": f"{seed}/{number}",
            "peak_rss_bytes": 2**30 * pace,
        }
        for number, reward in enumerate(rewards, start=1)
    ]
    return {"contender": contender, "seed": seed, "error": None, "total_seconds": 99.0, "start": {}, "steps": steps}


def test_the_first_step_whose_five_step_mean_reaches_the_target(race: SimpleNamespace) -> None:
    report = race.report
    assert report.trailing_means([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]) == pytest.approx([0.4, 0.6])
    assert report.trailing_means([1.0] * 4) == []
    assert report.first_reached([1.0] * 4, 0.7) is None  # four steps have no five-step mean
    assert report.first_reached([0.7] * 5, 0.7) == 5
    assert report.first_reached([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0], 0.7) == 7
    assert report.first_reached([0.69] * 40, 0.7) is None
    assert report.seconds_to(made_run([0.0] * 2 + [1.0] * 8), 0.7) == pytest.approx(2.0 * 6)
    assert report.seconds_to(made_run([0.1] * 9), 0.7) == math.inf


def test_a_run_goes_on_for_five_steps_after_the_target(race: SimpleNamespace, tmp_path: Path) -> None:
    record = race.contenders.Record(tmp_path / "run.jsonl", "ours", 0.7)
    record.begin()
    ends = []
    for reward in [0.0] * 2 + [1.0] * 9:
        record.rollout(0.0, [[1, 2], [3]], [4, 5, 6, 7])
        ends.append(record.step(reward))
    assert ends == [False] * 10 + [True]  # reached at step 6
    row = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])
    assert (row["prompt_tokens"], row["completion_tokens"]) == (6, 22)


def test_the_summary_takes_medians_of_seeds(race: SimpleNamespace) -> None:
    late = [[0.0] * wait + [1.0] * 10 for wait in (0, 3, 20)]
    runs = [made_run(rewards, seed=seed) for seed, rewards in enumerate(late)]
    found = race.report.summarize(runs, "grpo-fast", 1.0)
    assert (found["steps_to_target"], found["seconds_to_target"]) == (8, 16.0)
    assert found["seconds_to_target_range"] == [10.0, 50.0]
    assert (found["rollout_seconds"], found["update_seconds"]) == (0.5, 1.5)
    runs[1:] = [made_run([0.0] * 9, seed=seed) for seed in (1, 2)]  # two of three never reach it
    assert race.report.summarize(runs, "grpo-fast", 1.0)["seconds_to_target"] is None
    assert race.report.summarize(runs, "trl", 1.0) is None


# ---- what is shown --------------------------------------------------------------------------------------------------


def made_race(folder: Path) -> dict[str, Any]:
    rising = [0.05 * step for step in range(20)]
    runs = [made_run(rising), made_run(rising, contender="trl", pace=10.0)]
    runs += [made_run([0.2] * 20, seed=1), made_run([0.3] * 3, contender="trl", seed=1, pace=10.0)]
    runs[-1]["error"] = "exit code 1: out of luck"
    race = {"target": 0.7, "max_steps": 20, "contenders": ["grpo-fast", "trl"], "runs": runs}
    (folder / "race.json").write_text(json.dumps(race))
    return race


def test_a_race_is_redrawn_from_its_json(
    race: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    made_race(tmp_path)
    assert race.main.main(["--out", str(tmp_path), "--redraw"]) == 1  # a run had failed
    said = capsys.readouterr().out
    assert "| grpo-fast, seed 1 | 20 | not reached in 20 steps |" in said
    assert "**failed**: exit code 1: out of luck" in said
    assert "| steps to it | not reached in 20 steps | 17 |" in said  # one of ours did, the other did not
    assert "| of which rollout | 0.50 s | 2.50 s | 5.0x |" in said
    assert "Medians of trl are of seeds 0 only" in said
    pixels = imread(tmp_path / "race.png")[..., :3]
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both curves are there
        distance = abs(pixels - [part / 255 for part in color]).max(axis=2)
        assert (distance < 0.02).sum() > 500
    with pytest.raises(SystemExit, match="expected a folder without a race"):
        race.main.main(["--out", str(tmp_path)])


def test_a_failed_run_is_kept_and_shown(
    race: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real subprocess that fails after the first contender has run."""
    run_one = race.main.run_one

    def first_good(contender: str, seed: int, given: Any) -> dict[str, Any]:
        return made_run([0.8] * 10) if contender == "grpo-fast" else run_one(contender, seed, given)

    monkeypatch.setattr(race.main, "run_one", first_good)
    assert race.main.main(["--out", str(tmp_path), "--seeds", "0", "--set", "learning_rat=1"]) == 1
    runs = json.loads((tmp_path / "race.json").read_text())["runs"]
    assert [run["error"] is None for run in runs] == [True, False]
    assert "did you mean learning_rate?" in runs[1]["error"]
    assert len(runs[0]["steps"]) == 10
    assert (tmp_path / "race.png").exists()
    assert "did you mean learning_rate?" in capsys.readouterr().out


# ---- the second pair ------------------------------------------------------------------------------------------------


def test_the_second_pair_lies_beside_the_first(
    race: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made_race(tmp_path)
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        record = Path(command[command.index("--record") + 1])
        run = made_run([0.9] * 6)
        record.write_text("".join(json.dumps(row) + "\n" for row in [{"loaded_rss_bytes": 1}, *run["steps"]]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(race.main.subprocess, "run", run)
    given = ["--out", str(tmp_path), "--seeds", "0", "--top-p", "0.95", "--set", "learning_rate=1e-5"]
    monkeypatch.setattr(race.main, "machine_facts", lambda: {"device": "cpu"})
    assert race.main.main(given) == 0
    assert all(command[-2:] == ["learning_rate=1e-5", "rollout.top_p=0.95"] for command in commands)
    assert [command[2] for command in commands] == ["grpo-fast", "trl"]
    assert json.loads((tmp_path / "race.json").read_text()) == first
    second = json.loads((tmp_path / "race-top-p-0.95.json").read_text())
    assert (second["top_p"], len(second["runs"]), second["runs"][0]["error"]) == (0.95, 2, None)
    assert (tmp_path / "race-top-p-0.95.png").exists()
    assert not (tmp_path / "race.png").exists()
    names = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.suffix == ".jsonl")
    assert names == ["grpo-fast-seed0-top-p-0.95.jsonl", "trl-seed0-top-p-0.95.jsonl"]
    assert "Both sample at top-p 0.95." in capsys.readouterr().out
    assert race.main.main(["--out", str(tmp_path), "--top-p", "0.95", "--redraw"]) == 0
    race.main.main(["--out", str(tmp_path), "--redraw"])
    assert capsys.readouterr().out.count("Both sample at top-p") == 1
    with pytest.raises(SystemExit, match=r"race-top-p-0\.95\.json exists"):
        race.main.main(given)


@needs_trl
def test_both_sample_at_the_same_top_p(race: SimpleNamespace, tmp_path: Path) -> None:
    from trl import GRPOConfig

    config = demo_config(race, tmp_path, "rollout.top_p=0.95")
    arguments = GRPOConfig(**race.setup.trl_arguments(config))
    assert config.rollout.top_p == arguments.top_p == 0.95
    assert {"grpo_fast": "rollout.top_p", "trl": "top_p", "value": 0.95} in race.setup.hyperparameters(
        config, arguments
    )
