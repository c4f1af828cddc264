"""Do two versions of the library give the same bits? Digests of the random cases, backend by backend.

    python -m tests.bits cpu --out before.json                            # in one checkout
    python -m tests.bits cpu --out after.json && python -m tests.bits --compare before.json after.json

A case has a digest of its loss, logprobs, entropy, each metric and gradient, so that a difference says where. Under
TRITON_INTERPRET=1 the backend may be triton. Cases are those of tests/random_cases.py, which must draw alike in both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests import test_random
from tests.random_cases import build, draw_settings


def digest(value: Any) -> str:
    """Of a tensor's dtype, shape and bytes (NaNs are one NaN, a zero has its sign), or of a number or name."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().cpu()
        if value.is_floating_point():
            value = torch.where(value.isnan(), torch.nan, value)
        head = f"{value.dtype}{list(value.shape)}".encode()
        return hashlib.sha256(
            head + value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else head
        ).hexdigest()
    return hashlib.sha256(repr(value).encode()).hexdigest()


class Recorder:
    """Takes down what the library returns while a case is checked."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._main_grad: torch.Tensor | None = None
        for name in ("grpo_loss", "token_logprobs", "policy_loss"):
            setattr(test_random, name, self._watched(getattr(test_random, name)))
        plain = test_random.backward

        def backward(*args: Any) -> dict[str, torch.Tensor]:
            gradients = plain(*args)
            self.found |= {f"grad {name}": digest(gradient) for name, gradient in gradients.items()}
            if self._main_grad is not None:
                self.found["main_grad"] = digest(self._main_grad)
            return gradients

        test_random.backward = backward  # type: ignore[assignment]

    def _watched(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            out, self._main_grad = function(*args, **kwargs), kwargs.get("main_grad")
            turn = len(self.found.keys() - {"main_grad"})  # check_merge calls again
            for name in ("loss", "logprobs", "entropy", "computed"):
                self.found[f"{turn} {name}"] = digest(getattr(out, name, None))
            if hasattr(out, "metrics"):
                self.found |= {f"{turn} {k}": digest(v) for k, v in sorted(out.metrics.as_dict().items())}
            return out

        return call


def record(backend: str, cases: int, seed: int) -> dict[str, Any]:
    """Digests by case; what a check has to object is another tool's business."""
    recorder, out = Recorder(), {}
    for number in range(seed, seed + cases):
        recorder.found = {}
        settings = draw_settings(number, (backend,), ("cpu",))
        problem = build(settings)
        try:
            test_random.CHECKS[problem.settings.call](problem)
        except Exception as error:  # reported with the digests: the two versions must fail alike
            recorder.found["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        out[str(number)] = {"settings": repr(problem.settings), **recorder.found}
    return out


def compare(before: Path, after: Path) -> int:
    """Print what differs; its number of cases."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    assert old.keys() == new.keys() != set(), "the two files hold different cases, or none"
    different = 0
    for number, case in old.items():
        names = [name for name in case.keys() | new[number].keys() if case.get(name) != new[number].get(name)]
        if names:
            different += 1
            print(f"case {number}: {', '.join(sorted(names))}\n    {case['settings']}")
    print(f"{len(old) - different} of {len(old)} cases have the same bits")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=Path, nargs=2)
    args = parser.parse_args()
    if args.compare:
        return 1 if compare(*args.compare) else 0
    if not args.backend or not args.out:
        parser.error("expected a backend and --out, or --compare")
    torch.set_num_threads(1)
    args.out.write_text(json.dumps(record(args.backend, args.cases, args.seed), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
