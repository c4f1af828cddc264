"""What `make gpu` asks of a GPU, entered by fakes; its reference in float64; where numbers come from; its summary."""

from __future__ import annotations

import os
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.baselines import CONTENDERS
from benchmarks.cases import SCENARIOS, Case, Model, make_batch
from benchmarks.gpu import summary, worker
from benchmarks.gpu.contest import BrokenDeviceError, Entry, contest
from benchmarks.gpu.device import CudaDevice, StandIn
from benchmarks.gpu.exact import Exact
from benchmarks.gpu.parts import Clock, Context, Task
from benchmarks.gpu.shapes import TINY
from benchmarks.gpu.step import Step, peak_bound
from benchmarks.gpu.store import Store, read
from grpo_fast.ops.call import row_budget
from tests.stand_in import stand_in
from tests.test_make_gpu import ROOT, Quiet, raises, run_tasks

# -- a GPU's branches, entered by fakes -------------------------------------------------------------------------------


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.clock += 5.0
        self.at = FakeEvent.clock

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CudaDevice:
    """torch.cuda and nvidia-smi as far as the harness asks; tensors stay on the CPU."""
    log: list[str] = []
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, L2_cache_size=2**10,
        total_memory=80 * 2**30, uuid="1234-5678",
    )  # fmt: skip
    replies: dict[str, Any] = {
        "is_available": True, "device_count": 1, "get_device_properties": properties, "set_device": None,
        "synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 100, "max_memory_allocated": 350,
        "memory_reserved": 500, "mem_get_info": (1000, 2000), "empty_cache": None, "_sleep": None,
        "get_device_name": properties.name,
    }  # fmt: skip
    for name, reply in replies.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, n=name, r=reply: (log.append(n), r)[1])
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        '#!/bin/sh\ncase "$1" in *driver*) echo 580.159.04;; *) echo "1980 MHz, 2619 MHz, 41, 320 W, 0 %, 0x0";; esac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    made = CudaDevice()
    made.log = log  # type: ignore[attr-defined]
    return made


def test_facts_of_a_gpu(gpu: CudaDevice) -> None:
    facts = gpu.facts()
    assert facts["gpu"] == "NVIDIA H100 80GB HBM3"
    assert facts["driver"] == "580.159.04"
    assert facts["capability"] == "9.0"
    assert gpu.slug == "nvidia-h100-80gb-hbm3"
    assert gpu.state()["clocks.sm"] == "1980 MHz"
    assert gpu._smi_id() == "GPU-1234-5678"
    whole = worker.facts_of(gpu, tiny=False)
    assert (whole["device"], whole["stand_in"], whole["cpu"]) == (facts["gpu"], False, machine._cpu_model())


def test_a_gpu_that_nvidia_smi_does_not_know(gpu: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu.facts()["driver"] is None
    assert gpu.state() == {}


def test_times_and_peaks_of_a_gpu(gpu: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    log = gpu.log  # type: ignore[attr-defined]
    log.clear()
    assert gpu.timed(lambda: log.append("action")) == pytest.approx(0.005)
    assert log == ["synchronize", "action", "synchronize"]
    log.clear()
    gpu.timed(lambda: log.append("action"), queued=True)
    assert log == ["synchronize", "_sleep", "action", "synchronize"]
    assert gpu.peak(lambda: "result") == ("result", 250)
    assert gpu.free_bytes() == 1000 + 500 - 100
    gpu.release()
    assert log[-1] == "empty_cache"
    gpu.torch = torch.device("cpu")
    gpu.clear_cache()
    gpu.clear_cache()
    assert gpu._flush is not None
    assert gpu._flush.numel() == 4 * 2**10
    with gpu.environment():
        pass
    assert machine.available_bytes() == 1400


def test_a_part_on_a_fake_gpu(gpu: CudaDevice, tmp_path: Path) -> None:
    """The worker's own branches for a GPU: no stand-in, its facts in the file, memory released after a failure."""
    out = tmp_path / "results"
    assert run_tasks(out, [Task("bad", 0, raises(ValueError("no")))], device=gpu) == worker.DONE
    content = read(out / "made.json")
    assert content["machine"]["driver"] == "580.159.04"
    assert content["machine"]["state"]["temperature.gpu"] == "41"
    assert gpu.log[-2] == "synchronize" or "empty_cache" in gpu.log  # type: ignore[attr-defined]


def test_peak_memory_of_the_old_harness_keeps_the_allocators_cache(gpu: CudaDevice) -> None:
    """Emptying it before a timed run would have the run pay for allocating anew."""
    log = gpu.log  # type: ignore[attr-defined]
    memory = machine.PeakMemory()
    log.clear()
    memory.start()
    assert "empty_cache" not in log
    assert memory.stop() == 250


# -- correctness before speed -----------------------------------------------------------------------------------------


CASE = Case(Model("tiny", 32, 203), 48, SCENARIOS["full"], sequences=8)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("name", ["full", "half", "frozen_head", "no_grad", "gspo", "kl", "entropy_bonus", "ragged"])
def test_steps_are_held_against_float64(name: str, softcap: float | None) -> None:
    """This library is right; so is the reference, as another 1 % is seen in every quantity."""
    batch = make_batch(replace(CASE, scenario=SCENARIOS[name], model=replace(CASE.model, softcap=softcap)))
    exact = Exact(batch)
    step = Step("step", batch, "torch", {"workspace_bytes": 2**28})
    batch.clear_gradients()
    outcome = step.run()
    errors, wrong = exact.check(outcome, batch)
    assert wrong is None
    gradients = {"grad_hidden"} | {"grad_weight"} if SCENARIOS[name].trains_head else {"grad_hidden"}
    assert set(errors) == {"logprobs", "entropy"} | (gradients if SCENARIOS[name].gradient else set())
    if SCENARIOS[name].gradient:
        assert batch.hidden.grad is not None
        batch.hidden.grad.mul_(1.01)
        assert "grad_hidden error" in str(exact.check(outcome, batch)[1])
    if "grad_weight" in errors:
        assert batch.weight.grad is not None
        batch.hidden.grad, kept = batch.hidden.grad / 1.01, batch.weight.grad
        batch.weight.grad = kept * 1.01
        assert "grad_weight error" in str(exact.check(outcome, batch)[1])
    outcome.logprobs = outcome.logprobs + 0.01
    outcome.entropy = outcome.entropy * float("nan")
    wrong = str(exact.check(outcome, batch)[1])
    assert "logprobs error" in wrong
    assert "entropy error" in wrong


def test_a_wrong_step_is_not_timed(tmp_path: Path) -> None:
    context = Context(StandIn(), TINY, tmp_path, Clock.of(60))
    batch = make_batch(CASE)
    exact = Exact(batch)
    exact.grad_hidden *= 1.1
    step = Step("step", batch, "torch", {"workspace_bytes": 2**28})
    assert not step.prepare(context, exact)
    assert "grad_hidden error" in step.facts["failed"]
    small = Step("small", batch, "torch", {"workspace_bytes": 1})
    assert not small.prepare(context, Exact(batch))
    assert "workspace_bytes: expected at least" in small.facts["failed"]


def test_the_bound_of_memory_counts_what_it_says() -> None:
    batch = make_batch(CASE)
    frozen = replace(batch, case=replace(CASE, scenario=SCENARIOS["frozen_head"]))
    assert peak_bound(batch, 0) - peak_bound(frozen, 0) == 203 * 32 * (4 + 2)
    assert peak_bound(batch, 10**6) - peak_bound(batch, 0) == 10**6


def test_contenders_take_turns_and_one_that_fails_does_not_stop_the_rest() -> None:
    log: list[str] = []
    entries = [
        Entry("a", lambda: log.append("a")),
        Entry("b", lambda: log.append("b"), before=lambda: log.append("before")),
        Entry("c", raises(torch.OutOfMemoryError("too large\nmore"))),
    ]
    found = contest(Quiet(), entries, rounds=3, warm_ups=1)
    assert found["c"] == {"failed": "OutOfMemoryError: too large"}
    assert found["a"]["n"] == found["b"]["n"] == 3
    assert found["a"]["min"] <= found["a"]["median"] <= found["a"]["max"]
    assert log == ["a", "before", "b", "a", "before", "b", "before", "b", "a", "a", "before", "b"]
    broken = Quiet()
    broken.broken = True
    with pytest.raises(BrokenDeviceError):
        contest(broken, [Entry("c", raises(RuntimeError("CUDA error")))], rounds=1, warm_ups=0)


def test_tiny_workspaces_make_several_chunks(tmp_path: Path) -> None:
    """Or the tiny run would not enter what a real one does."""
    context = Context(StandIn(), TINY, tmp_path, Clock.of(60))
    model, size = TINY.heads[0], min(TINY.workspaces.values())
    with stand_in():
        workspace = context.workspace("torch", model.vocab, size)
        budget = row_budget("torch", model.vocab, model.hidden, torch.bfloat16, torch.device("cpu"), workspace)
    assert budget.rows_at_once < TINY.tokens


# -- where a number comes from ----------------------------------------------------------------------------------------


def test_the_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REPO", tmp_path)
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    monkeypatch.delenv("GRPO_FAST_COMMIT", raising=False)
    assert machine._commit() == (None, None, "nothing: no git, no GRPO_FAST_COMMIT, no file COMMIT")
    (tmp_path / "COMMIT").write_text("abc\n")
    assert machine._commit() == ("abc", None, "the file COMMIT")
    monkeypatch.setenv("GRPO_FAST_COMMIT", "def")
    assert machine._commit() == ("def", None, "GRPO_FAST_COMMIT")
    monkeypatch.setattr(machine, "_output", lambda *command: "" if "status" in command else "0123")
    assert machine._commit() == ("0123", False, "git")


def test_the_digest_is_of_the_librarys_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REPO", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    before = machine.sources_digest()
    (tmp_path / "README.md").write_text("words")
    assert machine.sources_digest() == before
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert machine.sources_digest() != before


# -- the summary ------------------------------------------------------------------------------------------------------

FACTS = {
    "gpu": "NVIDIA H100", "device": "NVIDIA H100", "driver": "580", "torch": "2.11", "triton": "3.6", "sources": "abc",
    "commit": "0123456789abcdef", "dirty": False, "commit_from": "git", "stand_in": False, "tiny": False,
}  # fmt: skip


def part_file(out: Path, part: str, results: dict[str, Any], **facts: Any) -> None:
    store = Store(out, part, FACTS | facts)
    for key, result in results.items():
        store.begin(key)
        store.finish(key, "ok", result)


def timed(seconds: float, **more: Any) -> dict[str, Any]:
    return {"median": seconds, "spread": 0.02, **more}


def floor_result(fraction: float, hidden: int = 4096) -> dict[str, Any]:
    steps = {
        f"{scenario} at {label}": timed(0.08 if scenario != "half" else 0.044, fraction=fraction - less)
        for scenario in ("full", "frozen_head", "no_grad", "half")
        for label, less in (("2.5 GiB", 0.0), ("1 GiB", 0.04), ("0.25 GiB", 0.1))
    }
    return {
        "model": "Qwen3-8B", "hidden": hidden, "vocab": 151936, "backend": "triton", "gemms": {}, "steps": steps,
        "gemm_tflops": {"logits": 790.4, "grad_hidden": 781.0, "grad_weight": 760.0}, "failures": {},
    }  # fmt: skip


def test_targets_name_contenders() -> None:
    """A contender that is renamed would be judged no more, in silence."""
    assert summary.PEER_TARGETS.keys() <= CONTENDERS.keys()


def test_targets_are_judged(tmp_path: Path) -> None:
    part_file(tmp_path, "floor", {"Qwen3-8B-triton": floor_result(0.93), "other-triton": floor_result(0.86, 2048)})
    contenders = [
        {"name": name, "status": "timed", "median": seconds}
        for name, seconds in (("grpo-fast", 1.0), ("TRL chunked", 1.2), ("Liger fused (compiled)", 7.0))
    ]
    record = {"case": {"name": "Qwen3-8B-T16384-full"}, "contenders": contenders, "failures": {}}
    part_file(tmp_path, "scenarios", {"full": record})
    peaks = {"lean at 1 GiB": {"peak_bytes": 11, "bound_bytes": 10, "within": False}}
    part_file(tmp_path, "memory", {"Qwen3-8B-triton": {"peaks": peaks, "failures": {}}})
    part_file(tmp_path, "right", {"tests": {"passed": 9, "failed": 0, "skipped": 2, "failures": {}, "skips": {}}})
    text = summary.write_summary(tmp_path)
    assert "NVIDIA H100, driver 580, torch 2.11, triton 3.6\ncommit 0123456789ab (from git), sources abc" in text
    assert "Qwen3-8B 790/781/760" in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["PASS Qwen3-8B triton full"].split("  ")[-1] == "0.92 0.87 0.77"
    assert "0.930 80.0ms +-1%" in lines["PASS Qwen3-8B triton full"]
    assert "MISS Qwen3-8B triton full" in text  # 0.86 at H = 2048
    assert "PASS Qwen3-8B half of the groups at zero advantage: 0.55 of the dense time" in text
    assert "MISS 1.20 times as fast as TRL chunked at least (>= 1.3; Qwen3-8B-T16384-full)" in text
    assert "PASS 7.00 times as fast as Liger fused (compiled)" in text
    assert "MISS peak memory: at most 1.10 of cap" in text
    assert "PASS tests: 0 of 9 failed" in text
    assert "not begun: build, run, rows, tuning, sanitizers, demo" in text


def tuning_result(stream_gain: float, tile_gain: float) -> dict[str, Any]:
    steps = {}
    for label in ("2.5 GiB", "1 GiB"):
        for rows in (512, 1024):
            for stream, buffers in (("one stream", 1), ("two streams", 2 if label == "2.5 GiB" else 1)):
                seconds = 0.1 * (1 - stream_gain * (buffers - 1)) * (1 - tile_gain * (rows == 1024))
                held = rows if label == "2.5 GiB" else 512
                budget = {"num_buffers": buffers, "tile_rows": held}
                steps[f"{label}, {rows} rows, {stream}"] = timed(seconds, budget=budget, fraction=0.9)
    return {"hidden": 4096, "scenario": "full", "steps": steps, "failures": {}}


@pytest.mark.parametrize(("gain", "word"), [(0.06, "keep"), (0.03, "remove"), (-0.02, "remove")])
def test_the_second_stream_is_decided(gain: float, word: str, tmp_path: Path) -> None:
    part_file(tmp_path, "tuning", {"head": tuning_result(gain, 0.04)})
    text = summary.write_summary(tmp_path)
    assert f"second stream gains {gain:.1%} at best (2.5 GiB, 512 rows): {word} (keep from 5%)" in text
    assert "tiles of 1024 rows at 2.5 GiB: H 4096 full +4.0%: take them" in text
    assert "tiles of 1024 rows at 1 GiB" not in text  # no room for them there


def test_other_sources_are_history(tmp_path: Path) -> None:
    part_file(tmp_path, "floor", {"Qwen3-8B-triton": floor_result(0.93)}, sources="old")
    part_file(tmp_path, "right", {"tests": {"passed": 1, "failed": 0, "skipped": 0, "failures": {}, "skips": {}}})
    text = summary.write_summary(tmp_path)
    assert "left out, as made of other sources or versions: 1 of floor" in text
    assert "0.930" not in text


def test_failures_are_on_the_screen(tmp_path: Path) -> None:
    store = Store(tmp_path, "run", FACTS)
    store.begin("triton-bfloat16")
    store.finish("triton-bfloat16", "failed", reason="Traceback\nRuntimeError: off by 0.3")
    part_file(tmp_path, "floor", {"head": floor_result(0.9) | {"failures": {"full at 1 GiB": "grad_hidden error 1.0"}}})
    text = summary.write_summary(tmp_path)
    assert "run        1 failed; triton-bfloat16: RuntimeError: off by 0.3" in text
    assert "floor      1 ok; 1 FAILED within, as head, full at 1 GiB: grad_hidden error 1.0" in text
    assert summary.write_summary(tmp_path / "empty").startswith("nothing has been measured yet")


def test_nobody_else_asks_torch_cuda() -> None:
    """device.py and what is started in a process of its own (sanitized.py) are all that a GPU's absence touches."""
    folder = ROOT / "benchmarks" / "gpu"
    asking = {path.name for path in folder.rglob("*.py") if "torch.cuda." in path.read_text()}
    assert asking <= {"device.py", "sanitized.py"}
    assert runpy.run_path(str(folder / "source" / "sitecustomize.py"))["ROOT"] == ROOT
