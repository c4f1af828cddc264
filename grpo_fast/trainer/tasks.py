"""Procedural tasks (reasoning-gym): examples that are generated when asked for, and scored by the task itself.

Their columns are question, answer, metadata, task and task_config.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from typing import Any

from grpo_fast.trainer.config import DataConfig
from grpo_fast.trainer.errors import DataError
from grpo_fast.trainer.examples import Example, LazyExamples, nearest

ENTRY_COLUMNS = ("question", "answer", "metadata")
"""What a task makes and its scorer asks for."""

DEFAULT_TRAIN_SIZE, DEFAULT_EVAL_SIZE = 1000, 100  # of a task, where the config says None
# Draws without a new question after which a task's questions count as used up: fewer than 1 in 200 are left then.
_MAX_REDRAWS = 1000
# (_MAX_REDRAWS + 1) windows of this many seeds fit into a split's range, which starts in the lower half of its 2**31.
_MAX_TASK_SIZE = 1_000_000

_log = logging.getLogger(__name__)


class TaskExamples(LazyExamples):
    """A reasoning-gym task as examples, generated when asked for: the same index gives the same example, always.

    Held-out problems are held out for real. A task draws problem i from the seed `base + i`, so seeds that differ are
    not enough (problems repeat, and `chain_sum` with two one-digit terms has 200 of them in all): the held-out set is
    drawn first, without repeats, and a training example whose question is in it is replaced by the next draw that is
    not. Training examples may repeat one another. The two splits' seeds lie in ranges that never meet.

    Raises:
        DataError: unknown task or option, a value the task refuses, a set too large, or a held-out set that leaves
            nothing to train on.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        assert cfg.task is not None
        self._task, self._config, self._seed = cfg.task, json.dumps(cfg.task_config, sort_keys=True), cfg.seed
        held_out_size = 0 if cfg.eval is not None else cfg.eval_size or DEFAULT_EVAL_SIZE
        sizes = {"train": cfg.train_size or DEFAULT_TRAIN_SIZE, "eval": held_out_size}
        for name, size in sizes.items():
            if size > _MAX_TASK_SIZE:
                raise DataError(f"data.{name}_size: expected at most {_MAX_TASK_SIZE} for a task; got {size}")
        self._is_eval, self._size = split == "eval", sizes[split]
        self._held_out = _held_out_items(self._task, self._config, self._seed, held_out_size)
        self._questions = frozenset(item["question"] for item in self._held_out)
        self[0]  # a task that cannot generate says so now

    def _example(self, index: int) -> Example:
        item = self._held_out[index] if self._is_eval else self._training_item(index)
        # A composite task names the member that made the problem, and that member scores it.
        task = item["metadata"].get("source_dataset", self._task) if self._task == "composite" else self._task
        config = json.loads(self._config)
        if task != self._task:
            config = next(spec.get("config", {}) for spec in config["datasets"] if spec["name"] == task)
        columns = {key: item[key] for key in ENTRY_COLUMNS}
        return Example(item["question"], columns | {"task": task, "task_config": config})

    def _training_item(self, index: int) -> dict[str, Any]:
        for window in range(_MAX_REDRAWS):
            item = _generate(self._task, self._config, self._seed, "train", self._size, window, index)
            if item["question"] not in self._questions:
                return item
        raise DataError(
            f"data.eval_size: {len(self._questions)} held-out questions leave (almost) nothing to train on in task "
            f"{self._task!r} with {self._config}; lower it or widen data.task_config"
        )


@functools.lru_cache(maxsize=8)
def _held_out_items(task: str, config: str, seed: int, size: int) -> tuple[dict[str, Any], ...]:
    """`size` problems with different questions."""
    items: dict[str, dict[str, Any]] = {}
    since_new = draws = 0
    while len(items) < size:
        item = _generate(task, config, seed, "eval", size, *divmod(draws, size))
        since_new = since_new + 1 if item["question"] in items else 0
        items.setdefault(item["question"], item)
        draws += 1
        if since_new == _MAX_REDRAWS:
            raise DataError(
                f"data.eval_size: expected fewer than the about {len(items)} different questions that task {task!r} "
                f"has with {config}; got {size}"
            )
    if draws > 4 / 3 * size:
        # Drawing without repeats costs n ln(n / (n - size)) draws of n questions: 4/3 of `size` at about half of n.
        _log.warning(
            "data.eval_size=%d takes about half or more of all the questions of task %r with %s; "
            "training sees the rest only",
            size,
            task,
            config,
        )
    return tuple(items.values())


def _generate(task: str, config: str, seed: int, split: str, size: int, window: int, index: int) -> dict[str, Any]:
    """Problem `index` of window `window`; windows are `size` seeds long and lie end to end in the split's range."""
    base = int.from_bytes(hashlib.sha256(f"{split}/{seed}".encode()).digest()[:4], "big") >> 2
    # Seeds stay below 2**32, which is what numpy takes: training in [0, 2**31), held-out in [2**31, 2**32).
    base += window * size + (1 << 31 if split == "eval" else 0)
    generator = task_generator(task, config, size, base)
    try:
        return generator[index]
    except Exception as error:  # also IndexError, which would end an iteration in silence
        raise DataError(f"data.task: {task} with {config} cannot generate problem {index}: {error!r}") from error


@functools.lru_cache(maxsize=64)
def task_generator(task: str, config: str, size: int, seed: int) -> Any:
    """The reasoning-gym data set of `task` with the options `config` (JSON); it generates and scores."""
    try:
        from reasoning_gym.composite import DatasetSpec
    except ImportError as error:
        raise DataError("data.task: needs reasoning-gym (pip install reasoning-gym)") from error
    options = json.loads(config)
    task_class, config_class = _find_task(task, options, "data.task")
    try:
        if task == "composite":
            specs = [{"weight": 1.0, "config": {}} | spec for spec in options["datasets"]]
            for spec in specs:  # with a seed of its own, a member would give both splits the same problems
                _find_task(spec["name"], spec["config"], "data.task_config.datasets")
            options["datasets"] = [DatasetSpec(**spec) for spec in specs]
        return task_class(config_class(**options, seed=seed, size=size))
    except DataError:
        raise
    except Exception as error:  # the tasks validate with assert, ValueError, TypeError
        raise DataError(f"data.task_config: {task} refuses {config}: {error!r}") from error


def _find_task(name: str, options: dict[str, Any], where: str) -> tuple[Any, Any]:
    """The classes of a task and of its configuration, which has all of `options`."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise DataError(f"{where}: expected the name of a reasoning-gym task; got {name!r}{nearest(name, DATASETS)}")
    task_class, config_class = DATASETS[name]
    known = {item.name for item in dataclasses.fields(config_class)} - {"seed", "size"}
    for key in options:
        if key not in known:
            hint = "; use data.seed and data.train_size" if key in ("seed", "size") else nearest(key, known)
            raise DataError(f"data.task_config: {name} has no option {key!r}{hint} (it has {', '.join(sorted(known))})")
    return task_class, config_class
