"""`grpo-fast doctor`: its report on this machine, and that it notices what is wrong or missing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast import doctor
from grpo_fast.backends import cpu as cpu_backend
from grpo_fast.backends import cuda as cuda_backend
from grpo_fast.backends.base import RowChunk, backend_names, get_backend, resolve_backend
from grpo_fast.backends.torch import TorchBackend
from grpo_fast.cli import main
from grpo_fast.install import install_command
from grpo_fast.ops.call import row_budget
from tests.stand_in import stand_in

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


@pytest.mark.parametrize("several", [False, True])
def test_errors_are_roundings_and_not_zero(several: bool) -> None:
    """A check that compares nothing would also find nothing."""
    for dtype in doctor.BOUNDS:
        errors = doctor.compare("torch", CPU, dtype, several_chunks=several)
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
        if wrong == "statistics":
            args[1].logprobs.add_(0.2)
            return None
        return result.mul_(1.05)

    monkeypatch.setattr(TorchBackend, wrong, slightly_off)
    verdict = doctor.examine("torch", CPU)
    assert verdict.ok is False
    assert "is off by" in verdict.text
    assert main(["doctor"]) == 1
    assert "torch   WRONG: torch.float32, one chunk: " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", doctor.BOUNDS)
@pytest.mark.parametrize("name", [name for name in backend_names() if get_backend(name).why_unavailable(CPU) is None])
def test_the_least_workspace_gives_several_chunks(name: str, dtype: torch.dtype) -> None:
    least = doctor.workspace_for(name, doctor.VOCAB, dtype, CPU)
    budget = row_budget(name, doctor.VOCAB, doctor.WIDTH, dtype, CPU, least)
    assert 2 * budget.rows_at_once < doctor.NUM_TOKENS
    with pytest.raises(ValueError, match="workspace_bytes: expected at least"):
        row_budget(name, doctor.VOCAB, doctor.WIDTH, dtype, CPU, least - 1)


def test_a_product_that_only_several_chunks_need_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of several chunks asks for a float32 dWeight of narrow operands; a single chunk does not."""
    right = TorchBackend.grad_weight

    def narrow_only(self: TorchBackend, dx: Tensor, hidden: Tensor, out: Tensor, base: Tensor | None) -> None:
        if base is None and (hidden.dtype, out.dtype) == (torch.bfloat16, torch.float32):
            raise RuntimeError("Expected out tensor to have dtype BFloat16")
        right(self, dx, hidden, out, base)

    monkeypatch.setattr(TorchBackend, "grad_weight", narrow_only)
    verdict = doctor.examine("torch", CPU)
    assert verdict.ok is False
    assert verdict.text.startswith("torch.bfloat16, several chunks: RuntimeError: Expected out tensor")


def test_a_gpus_branch_passes_and_its_old_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in, whose products check what CUDA's do: a float32 `out` takes `mm.dtype_out`, not `mm.out`."""
    right = TorchBackend.grad_weight

    def old(self: TorchBackend, dx: Tensor, hidden: Tensor, out: Tensor, base: Tensor | None) -> None:
        if base is None:
            torch.mm(dx.t(), hidden, out=out)
        else:
            right(self, dx, hidden, out, base)

    with stand_in():
        assert doctor.examine("torch", CPU).ok
        monkeypatch.setattr(TorchBackend, "grad_weight", old)
        verdict = doctor.examine("torch", CPU)
    assert verdict.ok is False
    assert verdict.text.startswith("torch.bfloat16, several chunks: RuntimeError: Expected out tensor to have dtype")


def test_float16_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchBackend.gradient

    def wrong(self: TorchBackend, rows: RowChunk, *args: Any, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        dx = right(self, rows, *args, dtype=dtype, **kwargs)
        return dx.mul_(1.05) if dtype == torch.float16 else dx

    monkeypatch.setattr(TorchBackend, "gradient", wrong)
    verdict = doctor.examine("torch", CPU)
    assert verdict.ok is False
    assert verdict.text.startswith("torch.float16, one chunk: gradient of hidden is off by")


def test_a_backend_that_breaks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TorchBackend, *args: Any, **kwargs: Any) -> None:
        raise OSError("no such instruction")

    monkeypatch.setattr(TorchBackend, "logits", broken)
    verdict = doctor.examine("torch", CPU)
    assert (verdict.ok, verdict.text) == (False, "torch.float32, one chunk: OSError: no such instruction")


def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "_C", None)
    monkeypatch.setattr(cuda_backend, "_cuda", None)
    required = ["torch>=2.11", 'nonesuch-package>=1; extra == "demo"', "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    lines, build = doctor._installed(), f"GRPO_FAST_CUDA=1 {install_command()}"
    assert any(line.startswith("grpo_fast._C: not built") for line in lines)
    assert not any("cpu products" in line for line in lines)
    assert any(line.startswith(f"grpo_fast._cuda: not built; with NVIDIA's nvcc, {build} builds it") for line in lines)
    assert f"extra demo: lacks nonesuch-package; {install_command('demo')}" in lines
    assert "extra dev: complete" in lines


# -- who multiplies narrow operands on this CPU -----------------------------------------------------------------------


def cpu_flags() -> set[str]:
    """What the kernel says of the CPU; empty where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.mark.skipif(cpu_backend.native() is None, reason="grpo_fast._C is not built")
def test_bf16_products_are_native_where_the_cpu_has_the_instructions() -> None:
    """A torch that no longer exports the micro-kernel costs half of the speed, and nothing else would fail."""
    if not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        pytest.skip("this CPU has no bf16 instructions")
    assert cpu_backend.gemm_obstacle(torch.bfloat16) is None
    assert "cpu products of bfloat16: the micro-kernel in torch's CPU library" in doctor._installed()


@pytest.mark.skipif(cpu_backend.native() is None, reason="grpo_fast._C is not built")
def test_who_multiplies_is_said_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    obstacles = {torch.bfloat16: "this torch's CPU library exports no brgemm", torch.float16: None}
    monkeypatch.setattr(cpu_backend, "gemm_obstacle", obstacles.__getitem__)
    lines = doctor._installed()
    assert f"cpu products of bfloat16: torch, slower: {obstacles[torch.bfloat16]}" in lines
    assert "cpu products of float16: the micro-kernel in torch's CPU library" in lines


def test_it_needs_torch_only() -> None:
    heavy = "transformers omegaconf datasets peft matplotlib".split()
    program = f"import sys, grpo_fast.doctor; print(*[name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
