"""Rewards: found by name, called by TRL's convention, and checked."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time

import numpy as np
import pytest
import torch

from grpo_fast.trainer.config import RewardConfig
from grpo_fast.trainer.errors import RewardError
from grpo_fast.trainer.rewards import RewardSet, build_rewards

FUNCTIONS = """
import asyncio, dataclasses, threading, time

calls = []

@dataclasses.dataclass
class Record:  # dataclasses look their module up in sys.modules
    kwargs: dict

def record(prompts, completions, completion_ids, **columns):
    calls.append(Record({"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}))
    return [1.0] * len(completions)

def named_columns_only(completions, target, scale=1.0):
    return [scale * (c == t) for c, t in zip(completions, target)]

def raises(completions, **_):
    return [1 / (len(c) - len(c)) for c in completions]

started = []

async def first(completions, **_):
    started.append("first")
    while not {"first", "second", "computes"} <= set(started):
        await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]

async def second(completions, **_):
    started.append("second")
    while not {"first", "second", "computes"} <= set(started):
        await asyncio.sleep(0.01)
    return [None] * len(completions)

def computes(completions, **_):
    while not {"first", "second"} <= set(started):
        time.sleep(0.01)
    started.append("computes")
    return [0.5] * len(completions)

async def quick(completions, **_):
    await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]

cancelled = threading.Event()

async def endless(completions, **_):
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        cancelled.set()
        raise

async def async_raises(completions, **_):
    await asyncio.sleep(0.05)
    raise KeyError("judge")

class Callable:
    async def __call__(self, completions, **_):
        return [7] * len(completions)

async_object = Callable()
wrapped = lambda completions, **_: quick(completions)
positional_only = lambda completions, /: [0.0]
not_a_function = 3
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr("grpo_fast.trainer.rewards._RETRY_SECONDS", 0.001)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return str(path)


def _reward(function, *, kwargs=None, **options) -> RewardConfig:
    return RewardConfig(function, kwargs=kwargs or {}, **options)


def _call(rewards: RewardSet, completions=("a", "bb"), **columns) -> torch.Tensor:
    n = len(completions)
    return rewards([f"p{i}" for i in range(n)], list(completions), [[i] for i in range(n)], columns)


def _returning(value) -> RewardSet:
    """A set of one reward that gives `value`."""
    [reward] = build_rewards([_reward("format_regex", kwargs={"pattern": "x"}, name="mine")])._rewards
    return RewardSet([type(reward)("mine", 1.0, lambda **_: value, {}, None, frozenset())])


# ---- calling convention ---------------------------------------------------------------------------------------------


def test_convention_names_and_weights(file):
    rewards = build_rewards(
        [
            _reward(f"{file}:record", weight=0.5),
            _reward("format_regex", kwargs={"pattern": "b+"}, weight=2, name="only_b"),
        ]
    )
    assert rewards.names == ["record", "only_b"]
    assert rewards.weights.tolist() == [0.5, 2.0]
    assert rewards.weights.dtype == torch.float32
    messages = [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "bb"}]]
    prompts = [[{"role": "user", "content": "p"}]] * 2
    scores = rewards(prompts, messages, [[1], [2, 3]], {"answer": [4, 5], "x": [None, {}]})
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    [call] = sys.modules[rewards._rewards[0].function.__module__].calls
    assert call.kwargs == {
        "prompts": prompts,
        "completions": messages,
        "completion_ids": [[1], [2, 3]],
        "answer": [4, 5],
        "x": [None, {}],
    }


def test_no_completions(file):
    assert _call(build_rewards([_reward(f"{file}:record")]), ()).shape == (0, 1)


def test_functions_without_double_star_get_the_columns_they_name(file):
    rewards = build_rewards([_reward(f"{file}:named_columns_only", kwargs={"scale": 0.5})])
    # The recipe's option wins over a column of its name.
    assert _call(rewards, target=["a", "c"], other=[1, 2], scale=[9, 9]).tolist() == [[0.5], [0.0]]
    with pytest.raises(RewardError, match="'named_columns_only': needs the column target; the data has other"):
        _call(rewards, other=[1, 2])
    with pytest.raises(RewardError, match="needs the column target; the data has no columns"):
        rewards.check_columns([])
    rewards.check_columns(["target"])


def test_trl_reward_functions_run_as_they_are():
    pytest.importorskip("trl")
    rewards = build_rewards([_reward("trl.rewards:think_format_reward")])
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>\na\n</think>\nb", "b")]
    assert _call(rewards, completions).tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    "value",
    [
        [1, None],
        (True, math.nan),
        [np.float32(1), np.nan],
        np.array([1.0, np.nan]),
        torch.tensor([1.0, torch.nan], requires_grad=True),
        [torch.tensor(1.0), None],
    ],
)
def test_accepted_numbers(value):
    scores = _call(_returning(value))
    assert scores[0].item() == 1
    assert scores[1].isnan().item()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected a list of 2 numbers, one a completion; got None"),
        (1.0, "expected a list of 2 numbers.*got float 1.0"),
        ("ab", "expected a list of 2 numbers.*got str 'ab'"),
        ({0: 1.0, 1: 2.0}, "expected a list of 2 numbers.*got dict"),
        ([1.0], "expected 2 numbers, one a completion; got 1"),
        (torch.zeros(3), "expected 2 numbers, one a completion; got 3"),
        (torch.zeros(2, 1), r"number or None for completion 0; got list \[0.0\]"),
        ([1.0, "1.0"], "number or None for completion 1; got str '1.0'"),
        ([1.0, [1.0]], r"number or None for completion 1; got list \[1.0\]"),
        ([1.0, 1j], "number or None for completion 1; got complex 1j"),
        ([1.0, torch.zeros(2)], "number or None for completion 1; got Tensor"),
        ([math.inf, 1.0], "finite number or None for completion 0; got float inf"),
        ([1.0, 1e39], "finite number or None for completion 1; got float"),  # infinite in float32
        ([1.0, 10**400], "finite number or None for completion 1; got int"),
    ],
)
def test_refused_results(value, message):
    with pytest.raises(RewardError, match=f"reward 'mine': .*{message}"):
        _call(_returning(value))


def test_what_a_reward_raises_is_chained_and_located(file):
    rewards = build_rewards([_reward("format_regex", kwargs={"pattern": "."}), _reward(f"{file}:raises", name="judge")])
    with pytest.raises(RewardError, match=r"reward 'judge' raised ZeroDivisionError: .*my_rewards\.py:\d+") as caught:
        _call(rewards)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_arguments_of_the_wrong_length_or_name(file):
    rewards = build_rewards([_reward(f"{file}:record")])
    with pytest.raises(ValueError, match="answer: expected 2 values, one a completion; got 1"):
        _call(rewards, answer=[1])
    with pytest.raises(ValueError, match="prompts: expected 2 values"):
        rewards(["p"], ["a", "b"], [[], []], {})
    with pytest.raises(ValueError, match="columns: 'completions' is an argument of every reward"):
        rewards(["p"], ["a"], [[]], {"completions": ["x"]})


# ---- async ----------------------------------------------------------------------------------------------------------


def test_async_rewards_run_together_while_sync_ones_compute(file):
    """`first` and `second` wait for each other and for `computes`, which waits for them: in turn, none would return."""
    rewards = build_rewards([_reward(f"{file}:{name}") for name in ("computes", "first", "second")])
    result: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: result.append(_call(rewards)), daemon=True)
    thread.start()
    thread.join(20)
    assert result, "deadlock"
    assert result[0][:, :2].tolist() == [[0.5, 1.0], [0.5, 2.0]]
    assert result[0][:, 2].isnan().all()


def test_every_kind_of_async_callable(file):
    rewards = build_rewards([_reward(f"{file}:{name}") for name in ("quick", "async_object", "wrapped")])
    assert rewards.names == ["quick", "async_object", "<lambda>"]
    assert _call(rewards).tolist() == [[1.0, 7.0, 1.0], [2.0, 7.0, 2.0]]


def test_async_rewards_inside_a_running_loop(file):
    rewards = build_rewards([_reward(f"{file}:quick")])

    async def notebook():
        return _call(rewards)

    assert asyncio.run(notebook()).tolist() == [[1.0], [2.0]]


def test_async_clients_outlive_a_call(tmp_path):
    """Connection pools belong to the loop that made them, so it must be the same, open one in every call."""
    (tmp_path / "judge.py").write_text(
        "import asyncio\nloops = []\n"
        "async def judge(completions, **_):\n"
        "    loops.append(asyncio.get_running_loop())\n"
        "    return [0] * len(completions)\n"
    )
    rewards = build_rewards([_reward(f"{tmp_path}/judge.py:judge")])
    _call(rewards)
    _call(rewards)
    first, second = sys.modules[rewards._rewards[0].function.__module__].loops
    assert first is second
    assert first.is_running()


@pytest.mark.parametrize("fails", ["async_raises", "raises"])
def test_a_failure_is_named_and_cancels_what_is_under_way(file, fails):
    rewards = build_rewards([_reward(f"{file}:{name}") for name in ("endless", fails)])
    start = time.perf_counter()
    with pytest.raises(RewardError, match=f"reward '{fails}' raised") as caught:
        _call(rewards)
    assert isinstance(caught.value.__cause__, (KeyError, ZeroDivisionError))
    cancelled = sys.modules[rewards._rewards[0].function.__module__].cancelled
    # A sync failure may come before the loop has started the other one, which then never runs.
    assert cancelled.wait(5) or fails == "raises"
    assert time.perf_counter() - start < 20


# ---- what fails, and what takes too long ----------------------------------------------------------------------------

UNRELIABLE = """
import asyncio, time
calls = []

def _fails(numbers):
    calls.append(1)
    if len(calls) in numbers:
        raise ConnectionError(f"HTTP 429, call {len(calls)}")

def judge(completions, numbers, **_):
    _fails(numbers)
    return [1.0] * len(completions)

async def async_judge(completions, numbers, **_):
    await asyncio.sleep(0)
    _fails(numbers)
    return [1.0] * len(completions)

def returns_awaitable(completions, numbers, **_):
    return async_judge(completions, numbers)

def slow(completions, numbers, **_):
    calls.append(1)
    if len(calls) in numbers:
        time.sleep(30)
    return [1.0] * len(completions)

async def async_slow(completions, numbers, **_):
    calls.append(1)
    if len(calls) in numbers:
        await asyncio.sleep(30)
    return [1.0] * len(completions)
"""


@pytest.fixture
def unreliable(tmp_path):
    """Makes a reward of a function above; its calls of these `numbers` fail."""
    file = tmp_path / "unreliable.py"
    file.write_text(UNRELIABLE)

    def make(name: str, numbers, **options) -> tuple[RewardSet, list]:
        rewards = build_rewards([_reward(f"{file}:{name}", kwargs={"numbers": list(numbers)}, **options)])
        calls = sys.modules[rewards._rewards[0].function.__module__].calls
        calls.clear()
        return rewards, calls

    return make


JUDGES = pytest.mark.parametrize("name", ["judge", "async_judge", "returns_awaitable"])


@JUDGES
def test_a_call_that_fails_is_tried_again(unreliable, name, caplog):
    rewards, calls = unreliable(name, [1, 2])
    assert _call(rewards).tolist() == [[1.0], [1.0]]
    assert len(calls) == 3
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "raised ConnectionError: HTTP 429, call 1" in said[0]
    assert said[0].endswith("trying again in 0.001 s")
    assert said[1].endswith("trying again in 0.002 s")


@JUDGES
def test_what_fails_for_good_is_missing_unless_it_has_never_worked(unreliable, name, caplog):
    rewards, calls = unreliable(name, range(1, 4))
    with pytest.raises(RewardError, match="HTTP 429, call 3") as caught:
        _call(rewards)
    assert isinstance(caught.value.__cause__, ConnectionError)
    rewards, calls = unreliable(name, [2, 3, 5, 6, 7], retries=0)
    results = [_call(rewards).isnan().all().item() for _ in range(6)]
    assert results == [False, True, True, False, True, True]
    assert sum("it is missing for these 2 completions" in record.message for record in caplog.records) == 4
    with pytest.raises(RewardError, match="HTTP 429, call 7"):
        _call(rewards)  # the third batch in a row
    assert len(calls) == 7


def test_one_that_fails_leaves_the_others_alone(unreliable, file):
    rewards, _ = unreliable("async_judge", [2], retries=0)
    both = RewardSet([*rewards._rewards, build_rewards([_reward(f"{file}:quick")])._rewards[0]])
    _call(both)
    scores = _call(both)
    assert scores[:, 0].isnan().all()
    assert scores[:, 1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ["slow", "async_slow"])
def test_a_call_that_takes_too_long_has_failed(unreliable, name, caplog):
    rewards, calls = unreliable(name, [1, 3, 4], timeout=0.2, retries=1)
    started = time.perf_counter()
    assert _call(rewards).tolist() == [[1.0], [1.0]]
    assert "TimeoutError: took longer than 0.2 s" in caplog.records[0].message
    assert _call(rewards).isnan().all()
    assert len(calls) == 4
    assert time.perf_counter() - started < 10
    with pytest.raises(RewardError, match="raised ConnectionError"):  # its own errors are its own, timed or not
        _call(unreliable("judge", [1], timeout=5.0, retries=0)[0])


def test_bad_timeouts_and_retries():
    with pytest.raises(ValueError, match=r"rewards.timeout: expected a finite number > 0 or None; got 0"):
        _reward("x", timeout=0)
    with pytest.raises(ValueError, match=r"rewards.retries: expected an integer >= 0; got -1"):
        _reward("x", retries=-1)


# ---- finding --------------------------------------------------------------------------------------------------------


def test_functions_of_one_file_share_a_module_and_files_of_one_name_do_not(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(f"def f(completions, **_): return [{value}] * len(completions)\ng = f")
    functions = [f"{tmp_path}/{path}" for path in ("a/r.py:f", "a/../a/r.py:g", "b/r.py:f")]
    rewards = build_rewards([_reward(f, name=str(i)) for i, f in enumerate(functions)])
    assert _call(rewards).tolist() == [[1.0, 1.0, 2.0]] * 2
    assert rewards._rewards[0].function is rewards._rewards[1].function


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        ("exact_anwser", {}, "expected exact_answer, math_verify, .*; got 'exact_anwser'; did you mean exact_answer"),
        ("no_such_package.rewards:f", {}, "cannot import no_such_package.rewards .ModuleNotFoundError"),
        ("gone.py:f", {}, "no such file: gone.py .looked in"),
        ("json:loadz", {}, r"rewards\[0\].function: json has no 'loadz'; did you mean load, loads"),
        ("{file}:not_a_function", {}, "expected a function; .* is a int"),
        ("{file}:Callable", {}, "expected a function; .* is a type"),
        ("{file}:positional_only", {}, "positional-only"),
        ("{file}:named_columns_only", {"scal": 1}, "takes no option 'scal'; did you mean scale"),
        ("{file}:record", {"completions": 1}, "takes no option 'completions'"),
        ("exact_answer", {"colunm": "x"}, r"rewards\[0\].kwargs: exact_answer: .*'colunm'"),
        ("exact_answer", {"extract": "last_numbr"}, "extract: expected one of last_number, .*did you mean last_number"),
        ("exact_answer", {"extract": "regex"}, "pattern: expected with extract='regex'"),
        ("exact_answer", {"pattern": "x"}, "pattern: expected with extract='regex' and only then"),
        ("format_regex", {}, "'pattern'"),
        ("format_regex", {"pattern": "("}, "pattern: expected a regular expression; got '\\('"),
        ("format_regex", {"pattern": "x", "match": "all"}, "match: expected full or search; got 'all'"),
        ("math_verify", {"timeout_seconds": 0}, "timeout_seconds: expected a whole number >= 1; got 0"),
    ],
)
def test_rewards_that_cannot_be_built(file, function, kwargs, message):
    with pytest.raises(RewardError, match=message):
        build_rewards([_reward(function.format(file=file), kwargs=kwargs)])


def test_bad_lists_weights_names_and_modules(tmp_path, monkeypatch):
    with pytest.raises(RewardError, match="expected at least one reward function; got none"):
        build_rewards([])
    with pytest.raises(RewardError, match=r"rewards\[0\].weight: expected a finite number; got nan"):
        build_rewards([_reward("exact_answer", weight=math.nan)])
    with pytest.raises(RewardError, match="two are called 'exact_answer'"):
        build_rewards([_reward("exact_answer"), _reward("exact_answer", kwargs={"extract": "tag"})])
    (tmp_path / "broken.py").write_text("1 / 0")
    for _ in range(2):  # a module that failed is not kept half made
        with pytest.raises(RewardError, match=r"cannot import .*broken\.py .ZeroDivisionError"):
            build_rewards([_reward(f"{tmp_path}/broken.py:f")])
    (tmp_path / "reader.py").write_text("open('judge.txt')")  # it is the file's file that is missing
    with pytest.raises(RewardError, match=r"cannot import .*reader\.py .FileNotFoundError: .*judge\.txt"):
        build_rewards([_reward(f"{tmp_path}/reader.py:f")])
    (tmp_path / "loose.py").write_text("def f(**_): return []")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    with pytest.raises(RewardError, match=r"for a file that is not installed write loose\.py"):
        build_rewards([_reward("loose:f")])
