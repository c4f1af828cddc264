"""Reward functions: found by name, called by TRL's convention, and checked, so that a faulty one says which it is.

A reward function takes keyword arguments and gives one number (or None: does not apply) for each completion:

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

`completions` are strings where prompts are text, and `[{"role": "assistant", "content": ...}]` where prompts are
messages; `columns` are the data set's other columns, a list each. A function without `**` gets only the columns it
names. It may be `async`. The built-in ones are in `grpo_fast.trainer.builtin_rewards`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import logging
import math
import numbers
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_fast.trainer.builtin_rewards import BUILTIN_REWARDS
from grpo_fast.trainer.config import RewardConfig
from grpo_fast.trainer.errors import RewardError
from grpo_fast.trainer.examples import RESERVED_COLUMNS, nearest
from grpo_fast.trainer.modules import load_module

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 1.0  # before the first retry; twice as many before each further one
_MOST_FAILURES = 3  # batches in a row


def build_rewards(configs: Sequence[RewardConfig]) -> RewardSet:
    """Find every reward function: a built-in name, `package.module:function`, or `path/to/file.py:function`.

    A file given by path runs once, under a name of its own; it is not made importable, nor are its neighbours.

    Raises:
        RewardError: none given, not found, not callable, options it does not take, a name twice, a weight that is not
            a finite number.
    """
    if not configs:
        raise RewardError("rewards: expected at least one reward function; got none")
    rewards = [_build(config, f"rewards[{i}]") for i, config in enumerate(configs)]
    for reward in rewards:
        if sum(other.name == reward.name for other in rewards) > 1:
            raise RewardError(f"rewards: two are called {reward.name!r}; give each a name of its own (rewards[i].name)")
    return RewardSet(rewards)


@dataclass(frozen=True)
class Reward:
    """One reward function and how to call it."""

    name: str
    weight: float
    function: Callable[..., Any]
    kwargs: Mapping[str, Any]
    """Options from the recipe; they win over columns of the same name."""
    accepts: frozenset[str] | None
    """Names of its parameters; None: any, it has `**`."""
    requires: frozenset[str]
    """Columns it cannot do without."""
    timeout: float | None = None
    retries: int = 0

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004 - the method itself is wanted: is it `async def`?
        )

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `given` that the function takes, with the recipe's options over them."""
        return {k: v for k, v in given.items() if self.accepts is None or k in self.accepts} | dict(self.kwargs)


class RewardSet:
    """The rewards of a run.

    Attributes:
        names: [K] metric names.
        weights: [K] float32.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self._rewards = tuple(rewards)
        self.names = [reward.name for reward in rewards]
        self.weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float32)
        self._failures: list[int | None] = [None] * len(rewards)  # batches in a row; None: has never worked

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise RewardError if a reward needs a column that the data has not (before anything was sampled)."""
        have = set(columns)
        for reward in self._rewards:
            missing = sorted(reward.requires - have)
            if missing:
                raise RewardError(
                    f"reward {reward.name!r}: needs the column {', '.join(missing)}; the data has "
                    f"{', '.join(sorted(have)) or 'no columns besides the prompt'}"
                )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> torch.Tensor:
        """Score `B` completions, one row of every argument each.

        Async functions run concurrently on one event loop, which lives as long as the process (their clients keep
        connections open across calls), while the others run in turn on the calling thread.

        A call that fails or takes too long is tried again (`RewardConfig.retries`); what fails then is missing.

        Returns:
            [B, K] float32; NaN where a function gave None or NaN, or failed.

        Raises:
            RewardError: a function that has never worked raised or timed out (chained), or one did for the third batch
                in a row; or it gave anything but one finite number or None a completion.
            ValueError: arguments of different lengths, or a column called like another argument.
        """
        given = _arguments(prompts, completions, completion_ids, columns)
        self.check_columns(columns)
        pending: dict[concurrent.futures.Future[Any], int] = {}
        results: dict[int, Any] = {}
        try:
            # First all that wait for something else, so that they wait while the others compute.
            for i, reward in sorted(enumerate(self._rewards), key=lambda pair: not pair[1].is_async):
                try:
                    result = None if reward.is_async else _call(reward, given)
                except RewardError as error:
                    results[i] = self._missing(i, error, len(completions))
                    continue
                if reward.is_async or inspect.isawaitable(result):
                    pending[asyncio.run_coroutine_threadsafe(_await(reward, given, result), _event_loop())] = i
                else:
                    results[i] = result
            for future in concurrent.futures.as_completed(pending):
                i = pending[future]
                try:
                    results[i] = _result(self._rewards[i], future)
                except RewardError as error:
                    results[i] = self._missing(i, error, len(completions))
        finally:  # after an error or Ctrl-C nobody waits for the rest
            for future in pending:
                future.cancel()
        rows = [_checked(reward.name, results[i], len(completions)) for i, reward in enumerate(self._rewards)]
        self._failures = [
            failures if isinstance(results[i], _Missing) else 0 for i, failures in enumerate(self._failures)
        ]
        return torch.stack(rows, dim=1)

    def _missing(self, i: int, error: RewardError, count: int) -> _Missing:
        """In the place of a batch's rewards; raises the error where it is not to be borne."""
        failures = self._failures[i]
        if failures is None or failures + 1 >= _MOST_FAILURES:
            raise error
        self._failures[i] = failures + 1
        _log.warning("%s; it is missing for these %d completions", error, count)
        return _Missing([None] * count)


class _Missing(list[None]):
    """Rewards of a function that failed."""


# ---- calling --------------------------------------------------------------------------------------------------------


def _arguments(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    own = dict(zip(RESERVED_COLUMNS, (prompts, completions, completion_ids), strict=True))
    for name, values in (own | dict(columns)).items():
        if name in own and name in columns:
            raise ValueError(f"columns: {name!r} is an argument of every reward function; rename the column")
        if len(values) != len(completions):
            raise ValueError(f"{name}: expected {len(completions)} values, one a completion; got {len(values)}")
    return own | dict(columns)


def _call(reward: Reward, given: Mapping[str, Any]) -> Any:
    """What a function gives: rewards, or something to wait for."""
    for attempt in range(reward.retries + 1):
        try:
            return _once(reward, given)
        except Exception as error:  # noqa: PERF203 - whatever it is, it is this function's
            if attempt == reward.retries:
                raise _raised(reward, error) from error
            time.sleep(_say_again(reward, error, attempt))
    raise AssertionError


def _once(reward: Reward, given: Mapping[str, Any]) -> Any:
    arguments = reward.arguments(given)
    if reward.timeout is None:
        return reward.function(**arguments)
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(reward.function(**arguments))
        except BaseException as error:
            future.set_exception(error)

    # A thread cannot be stopped: one that takes too long is left to itself, and does not keep the process.
    threading.Thread(target=work, name=f"grpo-fast-reward-{reward.name}", daemon=True).start()
    try:
        return future.result(reward.timeout)
    except concurrent.futures.TimeoutError:
        if future.done():  # the function's own
            raise
        raise TimeoutError(f"took longer than {reward.timeout:g} s") from None


async def _await(reward: Reward, given: Mapping[str, Any], first: Any) -> Any:
    """What an async function gives. `first`: what a call that was made already is waiting for, or None."""
    for attempt in range(reward.retries + 1):
        try:
            awaitable = reward.function(**reward.arguments(given)) if first is None else first
            return await asyncio.wait_for(awaitable, reward.timeout)
        except Exception as error:  # noqa: PERF203
            late = isinstance(error, asyncio.TimeoutError) and not str(error)
            if late and reward.timeout is not None:
                error = TimeoutError(f"took longer than {reward.timeout:g} s")
            if attempt == reward.retries:
                raise error
            await asyncio.sleep(_say_again(reward, error, attempt))
            first = None
    raise AssertionError


def _say_again(reward: Reward, error: Exception, attempt: int) -> float:
    """Seconds to wait before the next attempt."""
    seconds = _RETRY_SECONDS * 2.0**attempt
    _log.warning("%s; trying again in %g s", _raised(reward, error), seconds)
    return seconds


def _result(reward: Reward, future: concurrent.futures.Future[Any]) -> Any:
    try:
        return future.result()
    except (Exception, concurrent.futures.CancelledError) as error:
        raise _raised(reward, error) from error


def _raised(reward: Reward, error: BaseException) -> RewardError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return RewardError(f"reward {reward.name!r} raised {type(error).__name__}: {error}{where}")


@functools.lru_cache(maxsize=1)
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop on a thread of its own: the caller may itself be inside a running loop (a notebook)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="grpo-fast-rewards", daemon=True).start()
    return loop


def _checked(name: str, result: Any, expected: int) -> torch.Tensor:
    """[B] float32 of what a function gave."""
    if hasattr(result, "tolist"):  # torch and numpy, on any device
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, (str, bytes)):
        got = "None" if result is None else f"{type(result).__name__} {result!r:.60}"
        raise RewardError(f"reward {name!r}: expected a list of {expected} numbers, one a completion; got {got}")
    if len(result) != expected:
        raise RewardError(f"reward {name!r}: expected {expected} numbers, one a completion; got {len(result)}")
    return torch.tensor([_number(name, i, value) for i, value in enumerate(result)], dtype=torch.float32)


def _number(name: str, i: int, value: Any) -> float:
    got = f"completion {i}; got {type(value).__name__} {value!r:.60}"
    if hasattr(value, "item"):  # an element of an array, torch's or numpy's; one of several elements stays as it is
        with contextlib.suppress(RuntimeError, ValueError):
            value = value.item()
    if value is None:
        return math.nan
    if not isinstance(value, numbers.Real):
        raise RewardError(f"reward {name!r}: expected a number or None for {got}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # Also what is finite here and infinite in float32: it would make the whole group's advantages NaN.
    if abs(number) > torch.finfo(torch.float32).max:
        raise RewardError(f"reward {name!r}: expected a finite number or None for {got}")
    return number


# ---- finding --------------------------------------------------------------------------------------------------------


def _build(config: RewardConfig, where: str) -> Reward:
    if not isinstance(config.weight, numbers.Real) or not math.isfinite(config.weight):
        raise RewardError(f"{where}.weight: expected a finite number; got {config.weight!r}")
    if config.function in BUILTIN_REWARDS:
        try:
            builtin = BUILTIN_REWARDS[config.function](**config.kwargs)
        except (TypeError, ValueError) as error:
            raise RewardError(f"{where}.kwargs: {config.function}: {error}") from error
        name = config.name or config.function
        return Reward(
            name, float(config.weight), builtin, {}, None, frozenset(builtin.requires), config.timeout, config.retries
        )
    function = _find(config.function, where)
    accepts, requires = _parameters(function, config.function, where)
    for key in config.kwargs:
        if key in RESERVED_COLUMNS or (accepts is not None and key not in accepts):
            raise RewardError(f"{where}.kwargs: {config.function} takes no option {key!r}{nearest(key, accepts or ())}")
    name = config.name or getattr(function, "__name__", config.function.rpartition(":")[2])
    requires -= set(config.kwargs) | set(RESERVED_COLUMNS)
    own = dict(config.kwargs)
    return Reward(name, float(config.weight), function, own, accepts, requires, config.timeout, config.retries)


def _find(target: str, where: str) -> Callable[..., Any]:
    module_name, colon, attribute = target.rpartition(":")
    if not colon:
        raise RewardError(
            f"{where}.function: expected {', '.join(BUILTIN_REWARDS)}, package.module:function or "
            f"path/to/file.py:function; got {target!r}{nearest(target, BUILTIN_REWARDS)}"
        )
    try:
        module = load_module(module_name)
    except ImportError as error:
        raise RewardError(f"{where}.function: {error}") from error
    if not hasattr(module, attribute):
        raise RewardError(f"{where}.function: {module_name} has no {attribute!r}{nearest(attribute, vars(module))}")
    function = getattr(module, attribute)
    if not callable(function) or inspect.isclass(function):
        raise RewardError(f"{where}.function: expected a function; {target} is a {type(function).__name__}")
    return function


def _parameters(function: Callable[..., Any], target: str, where: str) -> tuple[frozenset[str] | None, frozenset[str]]:
    """(accepted names or None for any, names without a default)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have none
        return None, frozenset()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind == p.POSITIONAL_ONLY for p in parameters):
        raise RewardError(f"{where}.function: {target} has positional-only parameters; rewards are called by keyword")
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    requires = frozenset(p.name for p in named if p.default is p.empty)
    return (None if takes_any else frozenset(p.name for p in named)), requires
