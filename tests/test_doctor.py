"""`grpo-fast doctor`: its report on this machine, and that it notices what is wrong or missing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast import doctor
from grpo_fast.cli import main
from grpo_fast.ops import cpu_backend, cuda_backend
from grpo_fast.ops.backend import backend_names, get_backend, resolve_backend
from grpo_fast.ops.torch_backend import TorchBackend

CPU = torch.device("cpu")


def test_the_report_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert f"torch {torch.__version__}" in printed
    backends = printed.partition("backends on cpu\n")[2].partition("backends on ")[0].splitlines()
    assert [line.split()[0] for line in backends] == list(backend_names())
    for line in backends:
        name, reason = line.split()[0], get_backend(line.split()[0]).why_unavailable(CPU)
        if reason is not None:
            assert line == f"  {name:<7} no: {reason}"
        else:
            assert f"{name:<7} works: off by at most " in line
            assert line.endswith("<- auto") == (name == resolve_backend("auto", CPU))


def test_errors_are_roundings_and_not_zero() -> None:
    """A check that compares nothing would also find nothing."""
    for dtype in doctor.BOUNDS:
        errors = doctor.compare("torch", CPU, dtype)
        assert set(errors) == {"loss", "logprobs", *(f"gradient of {name}" for name in ("hidden", "weight", "bias"))}
        assert all(0 < error <= bound for error, bound in errors.values()), errors
        assert errors["gradient of weight"][1] == doctor.BOUNDS[dtype]


@pytest.mark.parametrize("wrong", ["gradient", "statistics"])
def test_a_wrong_backend_is_found(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(TorchBackend, wrong)

    def slightly_off(self: TorchBackend, *args: Any, **kwargs: Any) -> Any:
        result = right(self, *args, **kwargs)
        return result.mul_(1.05) if isinstance(result, Tensor) else (result[0] + 0.2, *result[1:])

    monkeypatch.setattr(TorchBackend, wrong, slightly_off)
    verdict = doctor.examine("torch", CPU)
    assert verdict.ok is False
    assert "is off by" in verdict.text
    assert main(["doctor"]) == 1
    assert "torch   WRONG: torch.float32: " in capsys.readouterr().out


def test_a_backend_that_breaks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TorchBackend, *args: Any, **kwargs: Any) -> None:
        raise OSError("no such instruction")

    monkeypatch.setattr(TorchBackend, "logits", broken)
    verdict = doctor.examine("torch", CPU)
    assert (verdict.ok, verdict.text) == (False, "torch.float32: OSError: no such instruction")


def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "_C", None)
    monkeypatch.setattr(cuda_backend, "_cuda", None)
    required = ["torch>=2.11", 'nonesuch-package>=1; extra == "demo"', "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    lines = doctor._installed()
    assert "grpo_fast._C: not built" in lines
    assert any(line.startswith("grpo_fast._cuda: not built; with NVIDIA's nvcc, GRPO_FAST_CUDA=1") for line in lines)
    assert "extra demo: lacks nonesuch-package; pip install 'grpo-fast[demo]'" in lines
    assert "extra dev: complete" in lines


def test_it_needs_torch_only() -> None:
    heavy = "transformers omegaconf datasets peft matplotlib".split()
    program = f"import sys, grpo_fast.doctor; print(*[name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
