"""What is small about kernels, interpreted: the launcher, the probe, and the product that may cost nothing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from grpo_fast.kernels import launcher, probe, scale
from grpo_fast.kernels.probe import why_not_runnable
from grpo_fast.kernels.scale import BLOCK, scale_unless_one
from tests.traffic import count_traffic

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Each test asks anew, and leaves nothing that others would take for an answer."""
    why_not_runnable.cache_clear()


# -- launcher ---------------------------------------------------------------------------------------------------------


def test_the_interpreter_runs_what_is_launched() -> None:
    values = torch.ones(3)
    arguments = {"values": values, "factor": torch.tensor(2.0), "num_elements": 3, "BLOCK": 16, "num_warps": 1}
    launcher.launch(scale._scale_kernel, (1,), arguments, CPU)
    assert values.tolist() == [2.0] * 3


# -- scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(), (1,), (7, 11), (BLOCK,), (3, BLOCK + 5)])
def test_scale(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (tensor.float() * 1.7).to(dtype)
    scale_unless_one(tensor, torch.tensor(1.7))
    if dtype == torch.bfloat16:  # which the interpreter rounds towards zero
        assert (tensor - expected).abs().max() <= expected.abs().max() * 2**-7
    else:
        assert torch.equal(tensor, expected)


def test_scale_by_one_moves_nothing() -> None:
    tensor, factor = torch.randn(3 * BLOCK + 1), torch.ones(1)
    before = tensor.clone()
    with count_traffic({"tensor": tensor}) as traffic:
        scale_unless_one(tensor, factor)
        assert (traffic["tensor"].loads, traffic["tensor"].stores) == (0, 0)
        scale_unless_one(tensor, factor + 1)
    assert traffic["tensor"].loads == traffic["tensor"].stores == tensor.numel() * 4
    assert torch.equal(tensor, 2 * before)


@pytest.mark.parametrize("factor", [0.0, -1.0, torch.inf, torch.nan])
def test_scale_by_odd_numbers(factor: float) -> None:
    tensor = torch.tensor([1.0, 0.0, -torch.inf])
    expected = tensor * factor
    scale_unless_one(tensor, torch.tensor([factor]))
    torch.testing.assert_close(tensor, expected, equal_nan=True)


def test_scale_of_nothing() -> None:
    scale_unless_one(torch.zeros(0, 4), torch.tensor(2.0))


def test_scale_launches_over_more_than_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """That offsets are 64 bits wide is tests/test_aot.py's."""
    launched = {}
    monkeypatch.setattr(scale, "launch", lambda kernel, grid, arguments, device: launched.update(arguments, grid=grid))
    scale_unless_one(torch.empty(2**31 + 5, dtype=torch.bfloat16, device="meta"), torch.empty((), device="meta"))
    assert launched["num_elements"] == 2**31 + 5
    assert launched["grid"] == (2**31 // BLOCK + 1,)


@pytest.mark.parametrize(
    ("tensor", "factor", "message"),
    [
        (torch.ones(4, 4).t()[1:], torch.ones(1), "tensor: expected contiguous float32"),
        (torch.ones(4, dtype=torch.float64), torch.ones(1), "tensor: expected contiguous float32"),
        (torch.ones(4), torch.ones(2), "factor: expected one float32"),
        (torch.ones(4), torch.ones(1, dtype=torch.float64), "factor: expected one float32"),
        (torch.ones(4), torch.ones(1, device="meta"), "factor: expected one float32 on cpu"),
    ],
)
def test_scale_refuses(tensor: torch.Tensor, factor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_unless_one(tensor, factor)


# -- probe ------------------------------------------------------------------------------------------------------------


def test_kernels_run_here_and_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    launch = scale.launch
    monkeypatch.setattr(scale, "launch", lambda *given: (asked.append(given[3]), launch(*given)))
    assert why_not_runnable(CPU) is None
    assert why_not_runnable(CPU) is None
    assert asked == [CPU]


def test_a_fake_mode_around_the_question_does_not_matter() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert why_not_runnable(CPU) is None


NO_COMPILER = RuntimeError(
    "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
)
FAILURES = [
    (NO_COMPILER, "RuntimeError: Failed to find C compiler.*; install gcc or clang, or name one in CC$"),
    (
        subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),
        r"CalledProcessError: .*gcc.*; .*Python.h is missing: install Python's headers \(python3-dev\)$",
    ),
    (ModuleNotFoundError("No module named 'triton'"), "^ModuleNotFoundError: No module named 'triton'$"),
    (RuntimeError("PTX was compiled with an unsupported toolchain\nmore"), "RuntimeError: PTX was .* toolchain$"),
    (AssertionError(), "^AssertionError: no message$"),
]


@pytest.mark.parametrize(("error", "message"), FAILURES, ids=lambda value: type(value).__name__)
def test_why_kernels_do_not_run(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        raise error

    monkeypatch.setattr(scale, "launch", fail)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    found = why_not_runnable(CPU)
    assert found is not None
    assert re.search(message, found), found
    assert why_not_runnable(CPU) == found
    assert len(calls) == 1


def test_headers_that_are_there_are_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    error = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"])
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert probe._hint(error) == ""


def test_a_kernel_that_writes_something_else_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "launch", lambda *given: None)
    assert why_not_runnable(CPU) == "a kernel that doubles 1.0 gave 1.0"
