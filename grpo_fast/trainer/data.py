"""Prompts: which examples there are, how one becomes token ids, and in which order training sees them.

Conventions are TRL's: an example has a `prompt`, text or a list of chat messages, and every other column reaches the
reward functions under its own name. Procedural tasks are in `grpo_fast.trainer.tasks`.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_fast.trainer.config import DataConfig, TrainConfig
from grpo_fast.trainer.errors import DataError
from grpo_fast.trainer.examples import RESERVED_COLUMNS, Example, LazyExamples, Messages, Subset
from grpo_fast.trainer.tasks import TaskExamples

# What people call the prompt when they do not call it `prompt`: the hint of the error about a missing column.
_USUAL_PROMPT_COLUMNS = ("question", "problem", "messages", "instruction", "query", "input", "text")
_OTHER_FILE_SUFFIXES = (".arrow", ".csv", ".gz", ".tsv", ".txt", ".xlsx", ".yaml", ".yml", ".zip", ".zst")

_log = logging.getLogger(__name__)


def load_examples(cfg: DataConfig, split: str) -> Sequence[Example]:
    """The training (`split="train"`) or held-out (`"eval"`) examples, indexable.

    `data.train` and `data.eval` name a .jsonl/.json/.parquet file, a folder written by `save_to_disk`, or anything
    `datasets.load_dataset` takes; `data.task` a reasoning-gym task, whose training examples are generated when asked
    for and never repeat a held-out question. Without `data.eval` and `data.task`, the held-out set is `eval_split` of
    `data.train` if that has splits, else it is empty.

    Raises:
        DataError: no such file, unknown extension, no prompt column, a malformed prompt, an empty set, unknown task.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: expected 'train' or 'eval'; got {split!r}")
    size = cfg.train_size if split == "train" else cfg.eval_size
    source = cfg.train if split == "train" else cfg.eval
    if source is None and cfg.task is not None:
        return TaskExamples(cfg, split)
    if source is not None:
        rows = _load_rows(source, cfg.name, cfg.train_split if split == "train" else cfg.eval_split)
        return TableExamples(rows, cfg.prompt_column, source=f"data.{split} ({source})", size=size)
    if cfg.train is None:
        raise DataError("data.train, data.task: expected one of the two; got neither")
    return _eval_split_of_train(cfg)


class TableExamples(LazyExamples):
    """Rows of a table as examples; `rows` is a list of dicts or a `datasets.Dataset` (read row by row).

    Raises:
        DataError: no rows, no `prompt_column`, a reserved column name, or a prompt that is neither text nor messages.
    """

    def __init__(self, rows: Any, prompt_column: str, *, source: str, size: int | None = None) -> None:
        self._rows, self._prompt_column = rows, prompt_column
        self._size = len(rows) if size is None else min(size, len(rows))
        if self._size == 0:
            raise DataError(f"{source}: expected at least one example; got none")
        _check_columns(list(rows[0]), prompt_column, source)
        prompts = (row[prompt_column] for row in rows) if isinstance(rows, list) else rows[prompt_column]
        for number, (prompt, _) in enumerate(zip(prompts, range(self._size), strict=False), start=1):
            _check_prompt(prompt, f"{source}, example {number}, column {prompt_column!r}")

    def _example(self, index: int) -> Example:
        columns = dict(self._rows[index])
        prompt = columns.pop(self._prompt_column)
        if not isinstance(prompt, str):
            # Arrow fills the keys that some messages lack with None; chat templates take a present key for a set one.
            prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
        return Example(prompt, columns)


def render_prompt(example: Example, tokenizer: Any, cfg: DataConfig) -> list[int]:
    """Token ids of the prompt, ready for the model to continue.

    Text goes through `data.prompt_template`, then, with `data.chat_template`, into one user message; otherwise it is
    tokenised as it is, with the tokenizer's own special tokens. Messages always go through the chat template, with
    `data.system_prompt` before them unless they bring one; if the last one is the assistant's, it is continued.

    Raises:
        DataError: the tokenizer has no chat template or it refuses the messages, or the prompt has no tokens.
    """
    if isinstance(example.prompt, str):
        # Not str.format: templates may well hold braces of their own (JSON).
        text = cfg.prompt_template.replace("{prompt}", example.prompt)
        if not cfg.chat_template:
            if cfg.system_prompt is not None:
                raise DataError("data.system_prompt: needs data.chat_template=true for prompts that are plain text")
            return _token_ids(tokenizer, text, add_special_tokens=True)
        messages: Messages = [{"role": "user", "content": text}]
    else:
        messages = example.prompt
    if cfg.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": cfg.system_prompt}, *messages]
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "prompt: expected a tokenizer with a chat template; this model's has none (use plain text prompts with "
            "data.chat_template=false, or an instruction-tuned model)"
        )
    continued = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
        )
    except Exception as error:  # templates are programs: they raise jinja2's, Python's and their own errors
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"prompt: the chat template refuses messages of roles {roles}: {error}") from error
    # The template has written the special tokens itself.
    return _token_ids(tokenizer, text, add_special_tokens=False)


def prompt_limit(config: TrainConfig, model: Any) -> tuple[int, str] | None:
    """(tokens of the longest prompt, where that is said), or None for no limit."""
    rollout = config.rollout
    limits = []
    if rollout.max_prompt_length is not None:
        limits.append((rollout.max_prompt_length, "rollout.max_prompt_length"))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None:
        left = context - rollout.max_completion_length
        where = f"the model's context of {context} less rollout.max_completion_length ({rollout.max_completion_length})"
        limits.append((left, where))
    return min(limits) if limits else None


def fitting(
    examples: Sequence[Example], tokenizer: Any, config: TrainConfig, limit: tuple[int, str] | None, name: str
) -> tuple[Sequence[Example], list[str]]:
    """The examples whose prompts fit, and lines that say which do not.

    Args:
        limit: as `prompt_limit` gives it. name: of the examples, for messages.

    Raises:
        DataError: some do not and `data.filter_overlong_prompts` is off, or none does.
    """
    if limit is None:
        return examples, []
    most, where = limit
    lengths = [len(render_prompt(example, tokenizer, config.data)) for example in examples]
    kept = [number for number, length in enumerate(lengths) if length <= most]
    if len(kept) == len(lengths):
        return examples, []
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    found = (
        f"{name}: {len(lengths) - len(kept)} of {len(lengths)} prompts are longer than {most} tokens, {where}; the "
        f"longest, number {longest + 1}, has {lengths[longest]}"
    )
    if not kept:
        raise DataError(found)
    if not config.data.filter_overlong_prompts:
        raise DataError(f"{found}. data.filter_overlong_prompts=true leaves them out")
    return Subset(examples, kept), [f"{found}. They are left out"]


def _token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    if not ids:
        raise DataError(f"prompt: expected at least one token; {text!r:.80} has none")
    return ids


class PromptSampler:
    """Endless stream of example indices: every epoch is a new permutation, a function of (seed, epoch) alone.

    A call may run over the end of an epoch, so no example is ever dropped. The state is a few integers, and a sampler
    that loads it continues exactly.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 example; got {size}")
        self._size, self._seed = size, seed
        self._epoch = self._position = 0
        self._order = self._permutation(0)

    def next(self, n: int) -> list[int]:
        """The next `n` indices."""
        if n < 0:
            raise ValueError(f"n: expected >= 0; got {n}")
        indices: list[int] = []
        while len(indices) < n:
            if self._position == self._size:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation(self._epoch)
            taken = self._order[self._position : self._position + n - len(indices)]
            indices += taken
            self._position += len(taken)
        return indices

    @property
    def epoch(self) -> float:
        """Epochs consumed so far, with fraction."""
        return self._epoch + self._position / self._size

    def state_dict(self) -> dict[str, int]:
        return {"size": self._size, "seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state is of another data set (size) or order (seed), so the run could not continue exactly.
        """
        for key, mine in (("size", self._size), ("seed", self._seed)):
            if state[key] != mine:
                raise ValueError(f"sampler {key}: expected {mine} (this run's data); got {state[key]} (the checkpoint)")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._permutation(self._epoch)

    def _permutation(self, epoch: int) -> list[int]:
        # A str seed goes through SHA-512, so that neighbouring seeds and epochs share nothing.
        order = list(range(self._size))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


# ---- where rows come from -------------------------------------------------------------------------------------------


def _load_rows(source: str, name: str | None, split: str) -> Any:
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, name, split)
    suffix = path.suffix.lower()
    if path.exists():
        if suffix not in _READERS:
            raise DataError(f"data: expected a file ending in {', '.join(_READERS)}; got {source}")
        return _READERS[suffix](path)
    if suffix in (*_READERS, *_OTHER_FILE_SUFFIXES) or source[0] in "./~":
        raise DataError(f"data: expected a file; {source} does not exist (looked in {Path.cwd()})")
    return _load_dataset(source, name, split)


def _read_json(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line, or one JSON list of objects. Rows may differ in their keys: missing ones become None."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8; {error}") from error
    if text.lstrip().startswith("["):
        numbered = [(f"{path}, element {n}", row) for n, row in enumerate(_decode(text, str(path)), start=1)]
    else:
        lines = ((f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
        numbered = [(where, _decode(line, where)) for where, line in lines]
    for where, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object; got {row!r:.80}")
    columns = dict.fromkeys(key for _, row in numbered for key in row)
    return [columns | row for _, row in numbered]


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: expected JSON; {error}") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from error
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}") from error


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data: loading data sets by name needs the datasets library (pip install datasets)") from error
    return datasets


def _load_folder(path: Path, name: str | None, split: str) -> Any:
    """A folder written by `save_to_disk`, of one split or several, or one that holds data files."""
    saved_splits = (path / "dataset_dict.json").is_file()
    if not saved_splits and not (path / "state.json").is_file():
        return _load_dataset(str(path), name, split)
    loaded = _datasets().load_from_disk(str(path))
    if not saved_splits:
        return loaded
    if split not in loaded:
        raise _MissingSplitError(f"{path}: expected split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def _load_dataset(source: str, name: str | None, split: str) -> Any:
    try:
        return _datasets().load_dataset(source, name, split=split)
    except Exception as error:  # the hub, the network, the builder and the cache each have errors of their own
        if isinstance(error, ValueError) and "split" in str(error):
            raise _MissingSplitError(f"{source}: {error}") from error
        raise DataError(
            f"data: cannot load {source!r} ({type(error).__name__}: {error}); expected a {', '.join(_READERS)} file, a "
            "folder written by save_to_disk, or a name that datasets.load_dataset knows"
        ) from error


class _MissingSplitError(DataError):
    """The data set is there, the split is not."""


def _eval_split_of_train(cfg: DataConfig) -> Sequence[Example]:
    """The held-out split of the training set; empty if it has none: nobody asked for it by name."""
    assert cfg.train is not None
    path = Path(cfg.train).expanduser()
    if path.suffix.lower() in _READERS or (path / "state.json").is_file():
        return ()
    try:
        rows = _load_rows(cfg.train, cfg.name, cfg.eval_split)
    except _MissingSplitError as error:
        _log.warning("no held-out data, so no evaluation (set data.eval or data.eval_split): %s", error)
        return ()
    return TableExamples(rows, cfg.prompt_column, source=f"data.eval_split ({cfg.train})", size=cfg.eval_size)


# ---- what a row must look like --------------------------------------------------------------------------------------


def _check_columns(columns: list[str], prompt_column: str, source: str) -> None:
    if prompt_column not in columns:
        usual = [name for name in _USUAL_PROMPT_COLUMNS if name in columns]
        hint = f"; set data.prompt_column={usual[0]}?" if usual else ""
        raise DataError(f"{source}: expected a column {prompt_column!r}; found {', '.join(columns) or 'none'}{hint}")
    for name in RESERVED_COLUMNS:
        if name in columns:
            raise DataError(
                f"{source}: column {name!r} has the name of an argument of every reward function; rename it"
            )


def _check_prompt(prompt: Any, where: str) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"{where}: expected a text; got an empty one")
        return
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: expected a text or a list of chat messages; got {prompt!r:.80}")
    for message in prompt:
        strings = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not strings:
            raise DataError(
                f"{where}: expected messages like {{'role': 'user', 'content': 'text'}}; got {message!r:.80}"
            )
