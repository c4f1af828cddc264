"""The rewards that recipes name in one word: exact_answer, math_verify, format_regex, reasoning_gym.

Each is an object made from its options (`rewards[i].kwargs`), called like any reward function. The answer to compare
with is in a column of the data; where that is None, the reward does not apply (None).
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from grpo_fast.trainer.examples import nearest
from grpo_fast.trainer.tasks import ENTRY_COLUMNS, task_generator

_log = logging.getLogger(__name__)

# A sign belongs to the number unless it stands right after a word or a bracket ("9-4" ends in 4, "= -4" in -4).
# Exponents are short and so are numbers, lest a completion of digits keeps the parser busy.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-+\u2212])?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+/\d+|\d+(?:\.\d+)?(?:[eE][-+]?\d{1,2})?|(?<!\d)\.\d+)"
)
_LONGEST_NUMBER = 1000  # characters


class BuiltinReward(Protocol):
    """What the table below holds: made from options, then called like a reward function."""

    @property
    def requires(self) -> tuple[str, ...]:
        """Columns it needs."""

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]: ...


@dataclass(frozen=True, kw_only=True)
class _AnswerReward:
    """Compares each completion with the answer in a column of the data."""

    column: str = "answer"

    @property
    def requires(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = columns[self.column]
        return [
            None if answer is None else self._score(completion_text(completion), str(answer))
            for completion, answer in zip(completions, answers, strict=True)
        ]

    def _score(self, completion: str, expected: str) -> float | None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ExactAnswer(_AnswerReward):
    """1 if the answer extracted from the completion equals the column's, else 0.

    Numbers are equal if their values are ("1,000.0" and "1000", "1/2" and "0.5"); other texts if they are the same up
    to surrounding space (and case, with `ignore_case`).
    """

    extract: str = "last_number"
    """`last_number` (the column's last number counts too: "... #### 72"), `tag` (text of the last <tag>), `regex`
    (group 1, or the whole, of the last match of `pattern`), or `full` (the whole completion)."""
    tag: str = "answer"
    pattern: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        _require_extraction(self.extract, ("last_number", "tag", "regex", "full"), self.pattern)

    def _score(self, completion: str, expected: str) -> float:
        answer = extract_answer(completion, self.extract, tag=self.tag, pattern=self.pattern)
        if self.extract == "last_number":
            number = extract_answer(expected, "last_number")
            if number is None:
                raise ValueError(
                    f"column {self.column!r}: expected a number for extract='last_number'; got {expected!r:.60}"
                )
            expected = number
        return float(answer is not None and self._equal(answer, expected))

    def _equal(self, answer: str, expected: str) -> bool:
        answer, expected = answer.strip(), expected.strip()
        if answer == expected or (self.ignore_case and answer.casefold() == expected.casefold()):
            return True
        value = _value(expected)
        return value is not None and _value(answer) == value


@dataclass(frozen=True, kw_only=True)
class MathVerify(_AnswerReward):
    """1 if math-verify finds the completion's answer equal to the column's, else 0; None if the column's is unreadable.

    The last \\boxed{} counts before anything else. A column without math delimiters is read as one LaTeX formula (its
    part after "####", if any). An answer that takes longer than `timeout_seconds` to parse or to compare is wrong.
    """

    timeout_seconds: int = 5

    def __post_init__(self) -> None:
        try:
            import math_verify  # type: ignore[import-untyped]  # noqa: F401
        except ImportError as error:
            raise ValueError("needs math-verify (pip install math-verify)") from error
        if not isinstance(self.timeout_seconds, int) or self.timeout_seconds < 1:
            raise ValueError(f"timeout_seconds: expected a whole number >= 1; got {self.timeout_seconds!r}")

    def _score(self, completion: str, expected: str) -> float | None:
        on_main = threading.current_thread() is threading.main_thread()
        return (_math_score if on_main else _math_score_off_main)(completion, expected, self.timeout_seconds)


@dataclass(frozen=True, kw_only=True)
class FormatRegex:
    """1 if `pattern` matches the completion, else 0. `.` matches line ends too.

    `match="full"`: the whole completion but for surrounding space; `"search"`: anywhere in it.
    """

    pattern: str
    match: str = "full"

    def __post_init__(self) -> None:
        _require_regex(self.pattern)
        if self.match not in ("full", "search"):
            raise ValueError(f"match: expected full or search; got {self.match!r}")

    @property
    def requires(self) -> tuple[str, ...]:
        return ()

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        regex = re.compile(self.pattern, re.DOTALL)
        matches = regex.fullmatch if self.match == "full" else regex.search
        return [float(matches(completion_text(c).strip()) is not None) for c in completions]


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """The score of the task's own scorer, in [0, 1], from the columns of a reasoning-gym task.

    Many scorers want the bare answer and give part of the credit for it amid other text (`chain_sum`: the share of the
    characters that are the answer), so what is handed to them matters: `extract="auto"` hands over the last <answer>
    if there is one, else the whole completion; `tag`, `last_number`, `regex` and `full` are as in exact_answer, and
    score 0 where they find nothing.
    """

    extract: str = "auto"
    tag: str = "answer"
    pattern: str | None = None

    def __post_init__(self) -> None:
        _require_extraction(self.extract, ("auto", "tag", "last_number", "regex", "full"), self.pattern)

    @property
    def requires(self) -> tuple[str, ...]:
        return ENTRY_COLUMNS

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        scores: list[float | None] = []
        for i, completion in enumerate(completions):
            entry = {key: columns[key][i] for key in ENTRY_COLUMNS}
            task = columns["task"][i] if "task" in columns else entry["metadata"]["source_dataset"]
            config = (columns["task_config"][i] if "task_config" in columns else None) or {}
            text = completion_text(completion)
            answer = extract_answer(text, "tag" if self.extract == "auto" else self.extract, self.tag, self.pattern)
            if answer is None and self.extract == "auto":
                answer = text.strip()
            scores.append(0.0 if answer is None else _task_score(task, config, answer, entry))
        return scores


BUILTIN_REWARDS: dict[str, Callable[..., BuiltinReward]] = {
    "exact_answer": ExactAnswer,
    "math_verify": MathVerify,
    "format_regex": FormatRegex,
    "reasoning_gym": ReasoningGym,
}


# ---- reading completions --------------------------------------------------------------------------------------------


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion of either kind (messages: their contents, a line each)."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message.get("content") or "" for message in completion)


def extract_answer(text: str, how: str, tag: str = "answer", pattern: str | None = None) -> str | None:
    """The part of `text` that counts as the answer, or None. `how` is explained in `ExactAnswer.extract`."""
    if how == "full":
        return text.strip()
    if how == "last_number":
        found = _NUMBER.findall(text)
        return found[-1] if found else None
    if how == "tag":
        # From the last opening tag on: an unclosed one before it belongs to the reasoning.
        inside = text.rpartition(f"</{tag}>")[0].rpartition(f"<{tag}>")
        return inside[2].strip() if inside[1] else None
    assert pattern is not None, how
    matches = list(re.finditer(pattern, text, re.DOTALL))
    if not matches:
        return None
    return matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()


def _value(text: str) -> Fraction | None:
    """The number that `text` is, exactly; a full stop may follow."""
    text = text.removesuffix(".")
    if len(text) > _LONGEST_NUMBER or _NUMBER.fullmatch(text) is None:
        return None
    try:
        return Fraction(text.replace(",", "").replace("\u2212", "-"))
    except ZeroDivisionError:
        return None


def _require_extraction(how: str, known: tuple[str, ...], pattern: str | None) -> None:
    if how not in known:
        raise ValueError(f"extract: expected one of {', '.join(known)}; got {how!r}{nearest(str(how), known)}")
    if (how == "regex") != (pattern is not None):
        raise ValueError(f"pattern: expected with extract='regex' and only then; got {pattern!r} with {how!r}")
    if pattern is not None:
        _require_regex(pattern)


def _require_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern: expected a regular expression; got {pattern!r} ({error})") from error


# ---- math-verify ----------------------------------------------------------------------------------------------------


def _math_score(completion: str, gold: str, timeout: int | None) -> float | None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Read as prose, "2x+1" would parse as its first number, and "2" would earn the reward.
    if not any(delimiter in gold for delimiter in ("$", r"\boxed", r"\(", r"\[", r"\begin")):
        gold = f"${gold.rpartition('####')[2].strip()}$"
    expected = parse(gold, parsing_timeout=timeout)
    if not expected:
        return None
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    answer = parse(completion, extraction_config=extraction, parsing_timeout=timeout)
    return float(verify(expected, answer, timeout_seconds=timeout))


def _math_score_off_main(completion: str, gold: str, timeout: int) -> float | None:
    """math-verify keeps time with SIGALRM, which only the main thread has: elsewhere, stop waiting instead."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(_is_not_about_timeouts)
    result: list[float | BaseException | None] = []

    def work() -> None:
        try:
            result.append(_math_score(completion, gold, None))
        except BaseException as error:  # carried over to the thread that asked
            result.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout)
    if not result:
        _log.warning("math_verify: gave up on %.80r after %d s; scored 0", completion, timeout)
        return 0.0
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _is_not_about_timeouts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Timeout is disabled")


# ---- reasoning-gym --------------------------------------------------------------------------------------------------

_complained: set[str] = set()


def _task_score(task: str, config: dict[str, Any], answer: str, entry: dict[str, Any]) -> float:
    scorer = task_generator(task, json.dumps(config, sort_keys=True), 1, 0)
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception as error:  # several scorers raise on answers they did not expect (prime_factorization: "hello")
        if task not in _complained:
            _complained.add(task)
            _log.warning(
                "reasoning_gym: %s's scorer raised %r on the answer %.60r; such answers score 0", task, error, answer
            )
        return 0.0
