"""Built-in rewards: what each reads as the answer and counts as right, and what it does with what it cannot read."""

from __future__ import annotations

import threading
import time

import pytest

from grpo_fast.trainer import builtin_rewards
from grpo_fast.trainer.builtin_rewards import (
    BUILTIN_REWARDS,
    ExactAnswer,
    FormatRegex,
    MathVerify,
    ReasoningGym,
    extract_answer,
)
from grpo_fast.trainer.config import DataConfig, RewardConfig
from grpo_fast.trainer.data import load_examples
from grpo_fast.trainer.errors import RewardError
from grpo_fast.trainer.rewards import build_rewards

# ---- exact_answer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 - 9 = -4", "-4"),
        ("9-4", "4"),  # a minus between numbers is not a sign
        ("is 1,000.", "1,000"),
        ("3,4", "4"),
        ("12345,678", "678"),
        ("-1,234.5 or so", "-1,234.5"),
        ("about 1/2", "1/2"),
        ("**(-4)**", "-4"),
        ("\\boxed{+.5}", "+.5"),
        ("= \u22124", "\u22124"),
        ("1e-3", "1e-3"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert extract_answer(text, "last_number") == number


@pytest.mark.parametrize(
    ("completion", "gold", "options", "score"),
    [
        ("5 - 9 = -4", "-4", {}, 1.0),
        ("5 - 9 = 4", "-4", {}, 0.0),
        ("so 1,000.00 dollars", 1000, {}, 1.0),
        ("one half, 0.5", "1/2", {}, 1.0),
        ("3/2", "1/2", {}, 0.0),
        ("1/0", "1", {}, 0.0),
        ("no idea", 3, {}, 0.0),
        ("42 it is", "Six by seven.\n#### 42", {}, 1.0),  # as GSM8K writes its answers
        ("1" * 100_000, "1", {}, 0.0),  # must not take the integer parser's quadratic time, nor its error
        ("1e99", "1", {}, 0.0),
        ("anything", None, {}, None),
        (" Paris\n", "Paris", {"extract": "full"}, 1.0),
        ("paris", "Paris", {"extract": "full"}, 0.0),
        ("paris", "Paris", {"extract": "full", "ignore_case": True}, 1.0),
        ("+8.0", "8", {"extract": "full"}, 1.0),
        ("8.", "8", {"extract": "full"}, 1.0),
        ("8 apples", "8", {"extract": "full"}, 0.0),
        ("<answer>7</answer> no: <answer> 8\n</answer>", "8", {"extract": "tag"}, 1.0),
        ("<think><answer></think><answer>8</answer> bye", "8", {"extract": "tag"}, 1.0),
        ("<answer>8", "8", {"extract": "tag"}, 0.0),
        ("<final>8</final>", "8", {"extract": "tag", "tag": "final"}, 1.0),
        ("A: 7\nA: 8", "8", {"extract": "regex", "pattern": r"A: (\d+)"}, 1.0),
        ("(B)", "(B)", {"extract": "regex", "pattern": r"\([A-D]\)"}, 1.0),
        ("nothing", "8", {"extract": "regex", "pattern": r"A: (\d+)"}, 0.0),
        ("maybe b", "", {"extract": "regex", "pattern": r"maybe (a)?"}, 0.0),  # a group that took no part
    ],
)
def test_exact_answer(completion, gold, options, score):
    as_text, as_messages = completion, [{"role": "assistant", "content": completion}]
    for given in (as_text, as_messages):
        assert ExactAnswer(**options)(completions=[given], answer=[gold]) == [score]


def test_exact_answer_column():
    assert ExactAnswer(column="solution")(completions=["3"], solution=[3], answer=[4]) == [1.0]
    rewards = build_rewards([RewardConfig("exact_answer", kwargs={"column": "solution"})])
    with pytest.raises(RewardError, match="'exact_answer': needs the column solution; the data has answer"):
        rewards.check_columns(["answer"])
    with pytest.raises(RewardError, match=r"'exact_answer' raised ValueError: column 'answer': .* a number .*got 'x'"):
        build_rewards([RewardConfig("exact_answer")])(["p"], ["3"], [[1]], {"answer": ["x"]})


# ---- format_regex ---------------------------------------------------------------------------------------------------


def test_format_regex():
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    completions = ["<think>a\nb</think>\n<answer>c</answer>\n", "so <think></think><answer></answer>", "x"]
    assert FormatRegex(pattern=pattern)(completions=completions, answer=[1, 2, 3]) == [1.0, 0.0, 0.0]
    assert FormatRegex(pattern=pattern, match="search")(completions=completions) == [1.0, 1.0, 0.0]


# ---- math_verify ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "gold", "score"),
    [
        (r"so \boxed{\frac{2}{4}}. Not 3", r"\frac{1}{2}", 1.0),
        (r"\boxed{4}. The final answer is $7$.", "4", 1.0),
        ("the answer is 1/2", "0.5", 1.0),
        (r"$\{3, 1, 2\}$", r"\{1,2,3\}", 1.0),
        (r"\boxed{x^2+2x}", "x(x+2)", 1.0),
        ("I think 2", "2x+1", 0.0),  # read as prose, this column would be 2
        (r"\boxed{7}", "8", 0.0),
        ("42", "Six by seven is forty-two. #### 42", 1.0),
        (r"\boxed{42}", "$42$", 1.0),
        ("no answer", "5", 0.0),
        ("5", "", None),
        ("5", None, None),
    ],
)
def test_math_verify(completion, gold, score):
    assert MathVerify()(completions=[completion], answer=[gold]) == [score]


def test_math_verify_gives_up_in_time():
    reward = MathVerify(timeout_seconds=1)
    hard = "$9^{9^{9^{9^{9}}}}$"
    start = time.perf_counter()
    assert reward(completions=[hard, "4"], answer=["4", "4"]) == [0.0, 1.0]
    assert time.perf_counter() - start < 5


def test_math_verify_off_the_main_thread(monkeypatch, caplog):
    """No SIGALRM there: it must neither fail nor hang nor warn of what the user cannot change."""
    results = []

    def work():
        results.append(MathVerify()(completions=[r"\boxed{4}", "5"], answer=["4", "4"]))
        monkeypatch.setattr(builtin_rewards, "_math_score", lambda *_: time.sleep(5) or 1.0)
        results.append(MathVerify(timeout_seconds=1)(completions=["x"], answer=["4"]))
        monkeypatch.setattr(builtin_rewards, "_math_score", lambda *_: 1 / 0)
        try:
            MathVerify()(completions=["x"], answer=["4"])
        except ZeroDivisionError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert results[:2] == [[1.0, 0.0], [0.0]]
    assert isinstance(results[2], ZeroDivisionError)
    assert [record.getMessage() for record in caplog.records] == ["math_verify: gave up on 'x' after 1 s; scored 0"]


# ---- reasoning_gym --------------------------------------------------------------------------------------------------


def _task_columns(task: str, config: dict | None = None) -> tuple[dict, dict]:
    [example] = load_examples(DataConfig(task=task, task_config=config or {}, train_size=1, eval_size=1), "train")
    return example.columns, {name: [value] for name, value in example.columns.items()}


def _score(columns: dict, completion: str, **options) -> float | None:
    [score] = ReasoningGym(**options)(completions=[completion], **columns)
    return score


def test_reasoning_gym_scores_with_the_task():
    entry, columns = _task_columns("chain_sum")
    answer = entry["answer"]
    assert _score(columns, answer) == 1.0
    assert _score(columns, f"  {answer}.0\n") == 1.0  # the scorer's own tolerance, not a comparison of texts
    assert _score(columns, f"<answer>{answer}</answer> is it") == 1.0
    # Answers amid text get chain_sum's share of the characters, unless something is extracted.
    text = f"I say {answer} now"
    assert _score(columns, text) == pytest.approx(len(answer) / len(text))
    assert _score(columns, text, extract="last_number") == 1.0
    assert _score(columns, text, extract="tag") == 0.0
    assert _score(columns, "none", extract="last_number") == 0.0
    assert _score(columns, f"A={answer}", extract="regex", pattern="A=(.*)") == 1.0
    # Data saved elsewhere has neither column: the metadata say which task it was.
    saved = {key: columns[key] for key in ("question", "answer", "metadata")}
    assert _score(saved, answer) == 1.0


def test_reasoning_gym_gives_the_scorer_its_configuration():
    entry, columns = _task_columns("puzzle24", {"max_value": 6})
    digits = entry["metadata"]["numbers"]
    assert max(digits) <= 6
    assert columns["task_config"] == [{"max_value": 6}]
    too_large = {**columns, "task_config": [{"max_value": 1, "min_value": 1}]}
    solution = _solve24(digits)
    assert _score(columns, solution) == 1.0
    assert _score(too_large, solution) < 1.0


def _solve24(numbers: list[int]) -> str:
    import itertools

    for a, b, c, d in itertools.permutations(numbers):
        for x, y, z in itertools.product("+-*", repeat=3):
            for form in (f"(({a}{x}{b}){y}{c}){z}{d}", f"({a}{x}{b}){y}({c}{z}{d})", f"{a}{x}(({b}{y}{c}){z}{d})"):
                if eval(form) == 24:
                    return form
    raise AssertionError(numbers)


def test_scorer_that_raises_on_a_strange_answer_scores_zero_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(builtin_rewards, "_complained", set())
    entry, columns = _task_columns("prime_factorization")
    assert _score(columns, entry["answer"]) == 1.0
    assert [_score(columns, "hello"), _score(columns, "hello")] == [0.0, 0.0]
    [record] = caplog.records
    assert "prime_factorization's scorer raised ValueError" in record.getMessage()


def test_reasoning_gym_needs_its_columns_and_a_known_task():
    _, columns = _task_columns("chain_sum")
    rewards = build_rewards([RewardConfig("reasoning_gym")])
    with pytest.raises(RewardError, match="needs the column metadata, question; the data has answer"):
        rewards(["p"], ["1"], [[1]], {"answer": ["1"]})
    with pytest.raises(RewardError, match="got 'chain_some'; did you mean chain_sum"):
        rewards(["p"], ["1"], [[1]], columns | {"task": ["chain_some"]})


def test_every_builtin_names_the_columns_it_needs():
    options = {"format_regex": {"pattern": "x"}}
    needs = {name: make(**options.get(name, {})).requires for name, make in BUILTIN_REWARDS.items()}
    assert needs == {
        "exact_answer": ("answer",),
        "math_verify": ("answer",),
        "format_regex": (),
        "reasoning_gym": ("question", "answer", "metadata"),
    }
