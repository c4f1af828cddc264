"""Which of our files does one call cross? Counted, and drawn down to each call of the extension.

    python -m tests.crossings [--backend cpu] [--loss dapo] [--functions]

One packed step, `grpo_loss(...)` and `loss.backward()`, on a small head, in bfloat16 and in float32: the very first
call (what is imported on the way is not counted) and one that finds every cache filled. A file is crossed when a
function that is written in it is entered; code that a decorator writes (`<string>`) and comprehensions are no
functions of a file. A change of file is a function entered from another file than the one entered before it.

It needs nothing of tests/, so that another checkout's interpreter can run it as a file.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass
class Call:
    """A function of ours that was entered, or a call of the extension, and what it entered in turn."""

    name: str
    inside: list[Call] = field(default_factory=list)
    native: bool = False

    @property
    def reaches_native(self) -> bool:
        return self.native or any(call.reaches_native for call in self.inside)

    def lines(self, indent: int = 0) -> list[str]:
        """The chains that reach the extension, equal neighbours once with their number."""
        drawn = [call.lines(indent + 1) for call in self.inside if call.reaches_native]
        inside: list[str] = []
        while drawn:
            first, times = drawn[0], 1
            while times < len(drawn) and drawn[times] == first:
                times += 1
            inside += [first[0] + (f"  x{times}" if times > 1 else ""), *first[1:]]
            drawn = drawn[times:]
        return ["    " * indent + self.name, *inside]


class Crossings:
    """Records, while entered, what is called on this thread.

    Args:
        folders: name: folder of what is ours; a file is then called by that name and its path inside.
        extensions: names of the modules whose functions are native calls.

    Attributes:
        files: file: how often each of its functions was entered, in order of first entry.
        changes: of file, from one function entered to the next.
        top: what was called from outside.
    """

    def __init__(self, folders: Mapping[str, Path], extensions: set[str]) -> None:
        self.folders, self.extensions = {name: str(path.resolve()) for name, path in folders.items()}, extensions
        self.files: dict[str, Counter[str]] = {}
        self.changes = 0
        self.top = Call("")
        self._names: dict[str, str | None] = {}
        self._open: list[tuple[FrameType, Call]] = []
        self._generators: dict[FrameType, Call] = {}
        self._last: str | None = None
        self._importing = 0

    @property
    def num_functions(self) -> int:
        """Different ones."""
        return sum(map(len, self.files.values()))

    @property
    def num_entries(self) -> int:
        return sum(functions.total() for functions in self.files.values())

    def __enter__(self) -> Crossings:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self._generators.clear()

    def _file(self, path: str) -> str | None:
        """Our name of a file, the innermost folder's; None: not ours."""
        if path not in self._names:
            real = str(Path(path).resolve()) if path.endswith(".py") else ""
            homes = [(len(folder), name) for name, folder in self.folders.items() if real.startswith(folder + "/")]
            length, name = max(homes, default=(0, ""))
            self._names[path] = name + real[length:] if homes else None
        return self._names[path]

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "c_call":
            if not self._importing and getattr(argument, "__module__", None) in self.extensions:
                extension = argument.__module__.rpartition(".")[2]
                self._parent().inside.append(Call(f"{extension}.{argument.__name__}", native=True))
        elif event in ("call", "return") and code.co_name == "<module>":
            self._importing += 1 if event == "call" else -1
        elif event == "call" and not self._importing:
            self._enter(frame, code)
        elif event == "return" and self._open and self._open[-1][0] is frame:
            self._open.pop()

    def _parent(self) -> Call:
        return self._open[-1][1] if self._open else self.top

    def _enter(self, frame: FrameType, code: CodeType) -> None:
        file = self._file(code.co_filename)
        # Bodies of classes are not optimized.
        if file is None or code.co_name in COMPREHENSIONS or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        call = self._generators.get(frame)  # one that goes on was entered before
        if call is None:
            name = getattr(code, "co_qualname", f"{code.co_name}:{code.co_firstlineno}")
            call = Call(f"{file}  {name}")
            self._parent().inside.append(call)
            if code.co_flags & GENERATORS:
                self._generators[frame] = call
            self.files.setdefault(file, Counter())[name] += 1
            self.changes += self._last not in (None, file)
            self._last = file
        self._open.append((frame, call))

    def report(self, title: str, *, functions: bool = False) -> str:
        """The counts, the files, and if asked for each file's functions, those entered most often first."""
        counts = f"{len(self.files)} files, {self.num_functions} functions entered {self.num_entries} times"
        lines = [f"{title}: {counts}, {self.changes} changes of file"]
        for number, (file, entered) in enumerate(self.files.items(), 1):
            lines.append(f"    {number:2d} {file} ({entered.total()})")
            if functions:
                lines.append("       " + ", ".join(f"{name} {n}" for name, n in entered.most_common()))
        return "\n".join(lines)

    def chain_files(self) -> set[str]:
        """The files on the way down to the calls of the extension."""
        return {line.split()[0] for line in self.top.lines()[1:] if ".py  " in line}

    def tree(self) -> str:
        """The calls that lead down to the extension."""
        if not self.top.reaches_native:
            return "no call of the extension"
        lines = self.top.lines()[1:]
        deepest = max((len(line) - len(line.lstrip())) // 4 for line in lines)
        return "\n".join([f"down to the extension: {len(self.chain_files())} files, {deepest} calls deep", *lines])


def our_folders() -> dict[str, Path]:
    """Of the library that is imported; the kernels lie beside it or inside it."""
    import grpo_fast

    package = Path(grpo_fast.__file__).parent
    inside = package / "kernels"
    return {"grpo_fast": package, "kernels": inside if inside.is_dir() else package.parent / "kernels"}


def step(backend: str, loss: str, dtype: str) -> Any:
    """A function that does one packed step, three sequences of 24 tokens in all."""
    import torch

    from grpo_fast import LossConfig, grpo_loss

    torch.manual_seed(0)
    hidden = torch.randn(24, 32).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(97, 32).to(getattr(torch, dtype)).requires_grad_()
    targets, old = torch.randint(97, (24,)), torch.full((24,), -5.0)
    bounds: dict[str, Any] = {"epsilon_high": 5.0} if loss == "cispo" else {}
    inputs: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 5, 14, 24]),
        "loss_mask": torch.arange(24) % 7 != 0,
        "old_logprobs": old,
        "sampling_logprobs": old if LossConfig(loss_type=loss, **bounds).importance_sampling_mode else None,
        "config": LossConfig(loss_type=loss, **bounds),
    }
    advantages = torch.tensor([1.0, -0.5, 0.25])

    def run() -> None:
        grpo_loss(hidden, weight, targets, advantages, backend=backend, **inputs).loss.backward()

    return run


def count(backend: str, loss: str, dtype: str) -> tuple[Crossings, Crossings]:
    """(the first call, the second) of a step."""
    run, both = step(backend, loss, dtype), []
    for _ in range(2):
        with Crossings(our_folders(), {"grpo_fast._C", "grpo_fast._cuda"}) as crossings:
            run()
        both.append(crossings)
    return both[0], both[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--loss", default="dapo")
    parser.add_argument("--functions", action="store_true", help="name the functions, too")
    args = parser.parse_args()
    for dtype in ("bfloat16", "float32"):
        first, second = count(args.backend, args.loss, dtype)
        print(first.report(f"{args.loss} on {args.backend}, {dtype}, first call"))
        print(second.report(f"{args.loss} on {args.backend}, {dtype}, caches filled", functions=args.functions))
        print(f"\n{second.tree()}\n")


if __name__ == "__main__":
    main()
