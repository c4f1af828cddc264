"""Data: what is read and refused, what is held out, how prompts become tokens, and the order of training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from grpo_fast.trainer import tasks
from grpo_fast.trainer.config import DataConfig, RewardConfig, TrainConfig
from grpo_fast.trainer.data import PromptSampler, fitting, load_examples, prompt_limit, render_prompt
from grpo_fast.trainer.errors import DataError
from grpo_fast.trainer.examples import Example
from grpo_fast.trainer.loop import train
from grpo_fast.trainer.rewards import build_rewards
from tests import tiny

ROWS = [{"prompt": "1+1", "answer": 2}, {"prompt": "2+2", "answer": 4}, {"prompt": "3+3", "answer": 6}]
CHAIN_SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def _write_jsonl(path: Path, rows: list, sep: str = "\n") -> str:
    path.write_text(sep.join(json.dumps(row) for row in rows) + sep, encoding="utf-8")
    return str(path)


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_jsonl_and_json_list_and_parquet_agree(tmp_path):
    import pyarrow
    import pyarrow.parquet

    _write_jsonl(tmp_path / "a.jsonl", ROWS, sep="\r\n\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    expected = [Example(row["prompt"], {"answer": row["answer"]}) for row in ROWS]
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert list(load_examples(DataConfig(train=str(tmp_path / name)), "train")) == expected, name


def test_chat_messages_survive_every_format(tmp_path):
    import datasets

    # Arrow gives every message every key; what a message did not have must not come back as None.
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "x": 1},
        {"prompt": [{"role": "user", "content": "hi", "name": "bob"}, {"role": "assistant", "content": "so"}], "x": 2},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for source in (_write_jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")):
        assert [e.prompt for e in load_examples(DataConfig(train=source), "train")] == [r["prompt"] for r in rows]


def test_rows_with_different_keys_get_none(tmp_path):
    source = _write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}])
    examples = load_examples(DataConfig(train=source), "train")
    assert [e.columns for e in examples] == [{"x": 1, "y": None}, {"x": None, "y": 2}]


def test_prompt_column_sizes_indices_and_slices(tmp_path):
    source = _write_jsonl(tmp_path / "a.jsonl", [{"q": str(i), "prompt_id": i} for i in range(5)])
    examples = load_examples(DataConfig(train=source, prompt_column="q", train_size=4), "train")
    assert len(examples) == 4
    assert [e.prompt for e in examples] == ["0", "1", "2", "3"]
    assert examples[-1] == examples[3] == Example("3", {"prompt_id": 3})
    assert examples[1:3] == [examples[1], examples[2]]
    with pytest.raises(IndexError):
        examples[4]
    assert len(load_examples(DataConfig(train=source, prompt_column="q", train_size=99), "train")) == 5


def test_saved_datasets_and_folders_of_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    _write_jsonl(tmp_path / "files" / "train.jsonl", ROWS)
    _write_jsonl(tmp_path / "files" / "test.jsonl", ROWS[2:])

    for name in ("one", "splits", "files"):
        cfg = DataConfig(train=str(tmp_path / name))
        assert [e.prompt for e in load_examples(cfg, "train")] == ["1+1", "2+2", "3+3"], name
        # Held out: the other split of the same data set where it has splits, nothing where it has none.
        assert [e.prompt for e in load_examples(cfg, "eval")] == ([] if name == "one" else ["3+3"]), name
    assert len(load_examples(DataConfig(train=str(tmp_path / "files"), train_split="train[:67%]"), "train")) == 2
    for name in ("splits", "files"):
        with pytest.raises(DataError, match=r"trian.*train"):
            load_examples(DataConfig(train=str(tmp_path / name), train_split="trian"), "train")


def test_missing_held_out_split_warns_and_is_empty(tmp_path, caplog):
    import datasets

    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "d")
    assert len(load_examples(DataConfig(train=str(tmp_path / "d")), "eval")) == 0
    assert "data.eval_split" in caplog.text
    with pytest.raises(DataError, match="'test'"):  # asked for by name, it must be there
        load_examples(DataConfig(train="unused", eval=str(tmp_path / "d")), "eval")


def test_datasets_name_is_passed_on_and_its_failure_named(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "org/gone":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_examples(DataConfig(train="org/math-v1.5", name="main", train_size=2), "train")) == 2
    assert calls == [(("org/math-v1.5", "main"), {"split": "train"})]
    with pytest.raises(DataError, match=r"org/gone.*ConnectionError: no network.*save_to_disk") as caught:
        load_examples(DataConfig(train="org/gone"), "train")
    assert isinstance(caught.value.__cause__, ConnectionError)


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected at least one example; got none"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2: expected JSON"),
        ('{"prompt": "a"}\n\n[1]\n', r"line 3: expected a JSON object; got \[1\]"),
        ('[{"prompt": "a"}, 7]', "element 2: expected a JSON object; got 7"),
        (
            '{"question": "a", "answer": 1}',
            r"column 'prompt'; found question, answer; set data.prompt_column=question\?",
        ),
        ('{"prompt": "a", "completions": 1}', "column 'completions' has the name of an argument"),
        ('{"prompt": "a"}\n{"prompt": ""}', "example 2.*expected a text; got an empty one"),
        ('{"prompt": "a"}\n{"x": 1}', "example 2.*expected a text or a list of chat messages; got None"),
        ('{"prompt": []}', r"expected a text or a list of chat messages; got \[\]"),
        ('{"prompt": [{"role": "user"}]}', "expected messages like"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}', "expected messages like"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_examples(DataConfig(train=str(tmp_path / "bad.jsonl")), "train")


def test_bad_sources(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "Grüße"}'.encode("latin-1"))
    for source, message in [
        (str(tmp_path / "gone.jsonl"), "does not exist"),
        ("gone.parquet", "does not exist"),
        ("./gone", "does not exist"),
        ("gone.csv", "does not exist"),
        (str(tmp_path / "a.csv"), r"ending in .jsonl, .json, .parquet; got .*a.csv"),
        (str(tmp_path / "a.parquet"), "not a parquet file"),
        (str(tmp_path / "latin.jsonl"), r"latin\.jsonl: expected UTF-8; .*position 14"),
    ]:
        with pytest.raises(DataError, match=message):
            load_examples(DataConfig(train=source), "train")
    for split in ("train", "eval"):
        with pytest.raises(DataError, match="neither"):
            load_examples(DataConfig(), split)
    with pytest.raises(ValueError, match="'train' or 'eval'; got 'test'"):
        load_examples(DataConfig(task="chain_sum"), "test")


# ---- procedural tasks -----------------------------------------------------------------------------------------------


def _task(**options) -> DataConfig:
    return DataConfig(**({"task": "chain_sum", "task_config": CHAIN_SUM} | options))


def test_task_is_lazy_deterministic_and_scored_by_its_columns():
    cfg = _task(train_size=1_000_000, eval_size=20)  # a million examples in no time: nothing is generated ahead
    train = load_examples(cfg, "train")
    assert len(train) == 1_000_000
    late, first = train[999_999], train[0]
    again = load_examples(cfg, "train")
    assert (again[0], again[-1]) == (first, late)
    assert first.prompt == first.columns["question"]
    assert set(first.columns) == {"question", "answer", "metadata", "task", "task_config"}
    assert first.columns["task"] == "chain_sum"
    assert first.columns["task_config"] == CHAIN_SUM
    expression = first.columns["metadata"]["expression"]
    assert int(first.columns["answer"]) == eval(expression)


def test_held_out_questions_never_reach_training():
    # The task has 200 questions in all, so that seeds which differ are not enough: 60 of them held out are hit often.
    cfg = _task(train_size=500, eval_size=60)
    held_out = {e.prompt for e in load_examples(cfg, "eval")}
    train = Counter(e.prompt for e in load_examples(cfg, "train"))
    assert len(held_out) == 60  # and without repeats
    assert not held_out & set(train)
    assert set(train) < set(_all_questions())
    assert len(train) > 120  # of 140: 500 uniform draws miss 4 on average
    # What replaces them is drawn from the rest at random, not always the same.
    assert max(train.values()) < 20


def _all_questions():
    lead = "State the final answer to the following arithmetic problem:"
    return [f"{lead} {a} {op} {b} =" for a in range(10) for b in range(10) for op in "+-"]


def test_seeds_give_other_problems_and_never_meet():
    prompts = {
        (seed, split): [e.prompt for e in load_examples(_big_task(seed), split)]
        for seed in (0, 1, 2**40)
        for split in ("train", "eval")
    }
    for key, texts in prompts.items():
        for other, other_texts in prompts.items():
            assert key == other or not set(texts) & set(other_texts), (key, other)


def _big_task(seed: int) -> DataConfig:
    config = {"min_terms": 6, "max_terms": 6, "min_digits": 4, "max_digits": 4}
    return DataConfig(task="chain_sum", task_config=config, seed=seed, train_size=50, eval_size=50)


def test_seed_ranges_of_the_splits(monkeypatch):
    """Over every window that can ever be drawn, the two splits' seeds stay apart and below numpy's 2**32."""
    seen: dict[str, list[int]] = {"train": [], "eval": []}
    monkeypatch.setattr(tasks, "task_generator", lambda task, config, size, seed: seen[split].append(seed) or [{}])
    size = tasks._MAX_TASK_SIZE
    for split in seen:
        for seed in range(300):
            for window in (0, tasks._MAX_REDRAWS):
                tasks._generate("t", "{}", seed, split, size, window, 0)
    assert min(seen["train"]) >= 0
    assert max(seen["train"]) + size <= 2**31 <= min(seen["eval"])
    assert max(seen["eval"]) + size <= 2**32


def test_held_out_set_too_large_for_the_task(caplog):
    with pytest.raises(DataError, match=r"data.eval_size: expected fewer than the about 200 different"):
        load_examples(_task(eval_size=300), "eval")
    with pytest.raises(DataError, match=r"data\.eval_size: 200 held-out questions leave"):
        load_examples(_task(eval_size=200), "train")
    assert "takes about half or more" in caplog.text
    caplog.clear()
    load_examples(_task(eval_size=50, seed=7), "train")
    assert not caplog.text


def test_held_out_file_beside_a_task(tmp_path):
    cfg = _task(eval=_write_jsonl(tmp_path / "a.jsonl", ROWS), eval_size=2)
    assert [e.prompt for e in load_examples(cfg, "eval")] == ["1+1", "2+2"]
    assert load_examples(cfg, "train")[0].columns["task"] == "chain_sum"


def test_composite_task_names_the_member():
    members = [{"name": "chain_sum", "config": CHAIN_SUM}, {"name": "leg_counting", "weight": 2.0}]
    cfg = DataConfig(task="composite", task_config={"datasets": members}, train_size=30, eval_size=5)
    columns = [e.columns for e in load_examples(cfg, "train")]
    assert {c["task"] for c in columns} == {"chain_sum", "leg_counting"}
    assert all(c["task_config"] == (CHAIN_SUM if c["task"] == "chain_sum" else {}) for c in columns)


def _composite(member: dict) -> dict:
    return {"task": "composite", "task_config": {"datasets": [member]}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "chain_sums"}, "got 'chain_sums'; did you mean chain_sum"),
        ({"task_config": {"min_term": 2}}, "chain_sum has no option 'min_term'; did you mean min_terms"),
        ({"task_config": {"seed": 2}}, "no option 'seed'; use data.seed"),
        ({"task_config": {"min_terms": 5, "max_terms": 2}}, "chain_sum refuses .*max_terms must be >= min_terms"),
        ({"train_size": 1_000_001}, "data.train_size: expected at most 1000000 for a task; got 1000001"),
        ({"eval_size": 1_000_001}, "data.eval_size: expected at most 1000000 for a task; got 1000001"),
        (_composite({"name": "chain_sums"}), "got 'chain_sums'; did you mean chain_sum"),
        # The scorer is made from these options, and both splits would get the problems of one seed.
        (_composite({"name": "chain_sum", "config": {"seed": 1}}), "chain_sum has no option 'seed'; use data.seed"),
        (_composite({"config": {}}), "composite refuses .*KeyError.*name"),
    ],
)
def test_bad_tasks(options, message):
    with pytest.raises(DataError, match=message):
        load_examples(_task(**({"eval_size": 5} | options)), "train")


def test_generator_that_gives_up_is_an_error_not_an_end(monkeypatch):
    class Exhausted:
        def __getitem__(self, index):
            raise IndexError("exhausted")

    monkeypatch.setattr(tasks, "task_generator", lambda *_: Exhausted())
    with pytest.raises(DataError, match="cannot generate problem 0: IndexError"):
        load_examples(_task(seed=99), "train")


# ---- prompts to tokens ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # One token a character, and a beginning-of-text token of its own, as Llama's have.
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    made.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% if not loop.last or add_generation_prompt %}|{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return made


def _text(tokenizer, ids: list[int]) -> str:
    assert all(isinstance(i, int) for i in ids)
    return "".join(tokenizer.convert_ids_to_tokens(ids))


ASSISTANT, SYSTEM = {"role": "assistant", "content": "so"}, {"role": "system", "content": "own"}


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("1+1", {}, "<s>1+1"),
        ("1+1", {"prompt_template": 'Q: {prompt} {"a": {x}}'}, '<s>Q: 1+1 {"a": {x}}'),
        ("1+1", {"chat_template": True}, "<s>[user]1+1|[assistant]"),
        (
            "1",
            {"chat_template": True, "prompt_template": "{prompt}!", "system_prompt": "S"},
            "<s>[system]S|[user]1!|[assistant]",
        ),
        ([USER], {}, "<s>[user]hi|[assistant]"),
        ([USER], {"prompt_template": "{prompt}!"}, "<s>[user]hi|[assistant]"),
        ([USER], {"system_prompt": "S"}, "<s>[system]S|[user]hi|[assistant]"),
        ([SYSTEM, USER], {"system_prompt": "S"}, "<s>[system]own|[user]hi|[assistant]"),
        ([USER, ASSISTANT], {}, "<s>[user]hi|[assistant]so"),
    ],
)
def test_render_prompt(tokenizer, prompt, options, expected):
    ids = render_prompt(Example(prompt, {}), tokenizer, DataConfig(train="x", **options))
    assert _text(tokenizer, ids) == expected


def test_render_prompt_refuses(tokenizer):
    cfg = DataConfig(train="x")
    with pytest.raises(DataError, match=r"refuses messages of roles user, tool: .*no tools"):
        render_prompt(Example([USER, {"role": "tool", "content": "1"}], {}), tokenizer, cfg)
    with pytest.raises(DataError, match=r"needs data\.chat_template=true"):
        render_prompt(Example("x", {}), tokenizer, DataConfig(train="x", system_prompt="S"))
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
            render_prompt(Example([USER], {}), tokenizer, cfg)
    finally:
        tokenizer.chat_template = template
    with pytest.raises(DataError, match="expected at least one token"):
        render_prompt(Example("x", {}), lambda text, add_special_tokens: {"input_ids": []}, cfg)


# ---- order ----------------------------------------------------------------------------------------------------------


def test_sampler_epochs_are_permutations_that_differ():
    sampler = PromptSampler(10, seed=3)
    drawn = sampler.next(7) + sampler.next(7) + sampler.next(16)
    epochs = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert sampler.epoch == 3.0
    assert drawn != PromptSampler(10, seed=4).next(30)
    assert drawn == PromptSampler(10, seed=3).next(30)  # however it is cut into calls
    assert len(PromptSampler(1, seed=0).next(5)) == 5


@pytest.mark.parametrize("consumed", [0, 4, 10, 15])  # at the start, inside, at the end of an epoch, past it
def test_sampler_resumes_exactly(consumed):
    sampler, resumed = PromptSampler(10, seed=3), PromptSampler(10, seed=3)
    sampler.next(consumed)
    resumed.next(7)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.next(40 - consumed) == PromptSampler(10, seed=3).next(40)[consumed:]


def test_sampler_order_is_the_same_in_another_process():
    code = "from grpo_fast.trainer.data import PromptSampler; print(PromptSampler(50, 1).next(120))"
    env = {"PYTHONHASHSEED": "123", "PYTHONPATH": str(Path(tasks.__file__).parents[2])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == PromptSampler(50, 1).next(120)


def test_sampler_bad_input():
    with pytest.raises(ValueError, match="size: expected at least 1 example; got 0"):
        PromptSampler(0, 0)
    with pytest.raises(ValueError, match="n: expected >= 0; got -1"):
        PromptSampler(3, 0).next(-1)
    for other, message in ((PromptSampler(4, 0), "size: expected 3.*got 4"), (PromptSampler(3, 1), "seed: expected 0")):
        with pytest.raises(ValueError, match=message):
            PromptSampler(3, 0).load_state_dict(other.state_dict())


# ---- length ---------------------------------------------------------------------------------------------------------


def lengthy(tmp_path: Path, **changes) -> TrainConfig:
    """Prompts of 3, 9, 30 and 12 words."""
    rows = [{"prompt": " ".join("a" * n), "answer": "b"} for n in (3, 9, 30, 12)]
    return tiny.configured(tmp_path, data__train=_write_jsonl(tmp_path / "lengths.jsonl", rows), **changes)


def prompts_that_fit(config: TrainConfig, limit: tuple[int, str] | None):
    examples, tokenizer = load_examples(config.data, "train"), tiny.tokenizer()
    lengths = [len(render_prompt(example, tokenizer, config.data)) for example in examples]
    assert len(set(lengths)) == 4
    return lengths, *fitting(examples, tokenizer, config, limit, "training set")


def test_prompts_that_do_not_fit_are_refused_or_left_out_and_counted(tmp_path):
    config = lengthy(tmp_path)
    lengths, kept, notes = prompts_that_fit(config, None)
    assert (len(kept), notes) == (4, [])
    assert prompts_that_fit(config, (lengths[2], "x"))[2] == []
    message = (
        f"training set: 2 of 4 prompts are longer than {lengths[1]} tokens, where; the longest, number 3, has "
        f"{lengths[2]}"
    )
    with pytest.raises(DataError, match=f"^{message}. data.filter_overlong_prompts=true leaves them out$"):
        prompts_that_fit(config, (lengths[1], "where"))
    config.data.filter_overlong_prompts = True
    _, kept, notes = prompts_that_fit(config, (lengths[1], "where"))
    assert notes == [f"{message}. They are left out"]
    assert [len(example.prompt.split()) for example in kept] == [3, 9]
    assert len(kept[-1].prompt.split()) == 9
    with pytest.raises(DataError, match="training set: 4 of 4 prompts"):
        prompts_that_fit(config, (1, "where"))


def test_the_limit_is_the_recipes_or_the_models(tmp_path):
    config = lengthy(tmp_path)
    model = tiny.model(max_position_embeddings=20)
    assert prompt_limit(config, model) == (14, "the model's context of 20 less rollout.max_completion_length (6)")
    config.rollout.max_prompt_length = 5
    assert prompt_limit(config, model) == (5, "rollout.max_prompt_length")
    config.rollout.max_prompt_length = 15
    assert prompt_limit(config, model)[0] == 14
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    assert prompt_limit(config, model) == (15, "rollout.max_prompt_length")
    config.rollout.max_prompt_length = None
    assert prompt_limit(config, model) is None


def test_a_run_says_what_it_leaves_out(tmp_path, capsys):
    config = lengthy(tmp_path, rollout__max_prompt_length=20, data__eval=str(tmp_path / "lengths.jsonl"), max_steps=1)
    with pytest.raises(DataError, match="training set: 2 of 4 prompts are longer than 20 tokens"):
        train(config)
    config.data.filter_overlong_prompts = True
    train(config)
    said = capsys.readouterr().out
    assert "training set: 2 of 4 prompts are longer than 20 tokens, rollout.max_prompt_length" in said
    assert "held-out set: 2 of 4" in said
    assert "2 training and 2 held-out prompts" in said


def test_own_data_rewards_what_it_asks_for():
    values = yaml.safe_load((Path(tasks.__file__).parents[2] / "recipes" / "own_data.yaml").read_text())
    rewards = build_rewards([RewardConfig(**reward) for reward in values["rewards"]])
    completions = ["<answer>42</answer>", "The answer is 42", "So <answer>41</answer>", "<answer>paris</answer>"]
    scores = rewards([""] * 4, completions, [[0]] * 4, {"answer": ["42", "42", "42", "Paris"]}) @ rewards.weights
    torch.testing.assert_close(scores, torch.tensor([1.2, 0.0, 0.2, 1.2]))
    assert "<answer></answer>" in values["data"]["system_prompt"]
