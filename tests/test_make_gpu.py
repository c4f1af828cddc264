"""`make gpu` (benchmarks/gpu) without a GPU: all of it on the stand-in; killed, broken, out of time; its summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts, sanitized, summary, worker
from benchmarks.gpu.contest import Entry, contest
from benchmarks.gpu.device import StandIn, the_device
from benchmarks.gpu.parts import Clock, Context, Part, Skip, Task, Unfinished, build, sanitizers
from benchmarks.gpu.shapes import TINY
from benchmarks.gpu.store import Store, read, write_atomically
from tests.stand_in import stand_in

ROOT = Path(__file__).resolve().parent.parent


def started(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m benchmarks.gpu` on the stand-in with tiny shapes."""
    line = [sys.executable, "-m", "benchmarks.gpu", "--stand-in", "--tiny", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finished(*arguments: str, **environment: str) -> str:
    process = started(*arguments, **environment)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


# -- the whole of it --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_part_runs_to_its_end(tmp_path: Path) -> None:
    output = finished("--in-process", "--out", str(tmp_path), GRPO_FAST_COMMIT="f" * 40)
    for name in parts.PARTS:
        content = read(tmp_path / f"{name}.json")
        states = {key: made["status"] for key, made in content["measurements"].items()}
        assert states, name
        assert set(states.values()) <= {"ok", "skipped"}, (name, states, output)
        inner = [made.get("result", {}).get("failures") for made in content["measurements"].values()]
        assert not any(inner), (name, inner)
        facts = content["machine"]
        assert {"gpu", "driver", "torch", "triton", "commit", "dirty", "sources", "stand_in"} <= facts.keys()
        assert facts["stand_in"]
    skipped = {
        made["reason"] for made in read(tmp_path / "sanitizers.json")["measurements"].values() if "reason" in made
    }
    assert all("compute-sanitizer" in reason for reason in skipped)
    text = (tmp_path / "summary.txt").read_text()
    assert text.strip() in output
    assert (tmp_path / "summary.md").read_text().count("```") == 2
    for words in ("A STAND-IN, NO GPU", "share of the GEMM floor", "PASS tests: 0 of", "PASS peak memory", "verdict: "):
        assert words in text, text
    assert len(text.splitlines()) < 60


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Killed in the middle of a measurement, with its worker; what was finished is not made again."""
    process, file = started("--part", "memory", "--out", str(tmp_path)), tmp_path / "memory.json"

    def done() -> dict[str, Any]:
        return {key: made for key, made in read(file)["measurements"].items() if made["status"] == "ok"}

    end = time.monotonic() + 240
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    before = done()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert 0 < len(before) < 3
    assert process.returncode != 0
    finished("--part", "memory", "--out", str(tmp_path))
    after = done()
    assert len(after) == 3
    assert all(after[key]["at"] == made["at"] for key, made in before.items())


# -- a part and its worker --------------------------------------------------------------------------------------------


class Quiet(StandIn):
    """The stand-in without the model of a GPU. `broken`: it answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def run_tasks(out: Path, tasks: list[Task], *, seconds: float = 60.0, device: Any = None, **marks: float) -> int:
    """Run a part that consists of these tasks."""

    class Made(Part):
        def tasks(self, context: Context) -> list[Task]:
            return tasks

    return worker.run_part(Made("made", "", needs_device=False), device or Quiet(), out, seconds, tiny=True, **marks)


def raises(error: Exception) -> Any:
    def run() -> None:
        raise error

    return run


def states(out: Path) -> dict[str, str]:
    return {key: made["status"] for key, made in read(out / "made.json")["measurements"].items()}


def test_what_fails_is_written_down_and_the_rest_goes_on(tmp_path: Path) -> None:
    log: list[str] = []
    tasks = [
        Task("bad", 0, raises(ValueError("this is why"))),
        Task("lacking", 0, raises(Skip("not installed"))),
        Task("good", 0, lambda: log.append("ran") or {"value": 3}),
    ]
    assert run_tasks(tmp_path, tasks) == worker.DONE
    made = read(tmp_path / "made.json")["measurements"]
    assert states(tmp_path) == {"bad": "failed", "lacking": "skipped", "good": "ok"}
    assert "ValueError: this is why" in made["bad"]["reason"]
    assert made["good"]["result"] == {"value": 3}
    assert made["lacking"]["reason"] == "not installed"
    assert run_tasks(tmp_path, tasks) == worker.DONE
    assert log == ["ran"]  # done is done
    tasks[0] = Task("bad", 0, lambda: 1)
    assert run_tasks(tmp_path, tasks) == worker.DONE
    assert states(tmp_path)["bad"] == "failed"
    assert run_tasks(tmp_path, tasks, retry=time.time()) == worker.DONE
    assert states(tmp_path)["bad"] == "ok"
    assert log == ["ran"]
    run_tasks(tmp_path, tasks, again=time.time())
    assert log == ["ran", "ran"]


def test_other_sources_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[int] = []
    tasks = [Task("one", 0, lambda: log.append(1))]
    run_tasks(tmp_path, tasks)
    run_tasks(tmp_path, tasks)
    assert len(log) == 1
    monkeypatch.setattr(machine, "sources_digest", lambda: "0" * 12)
    run_tasks(tmp_path, tasks)
    assert len(log) == 2


def test_a_part_that_cannot_say_what_it_measures_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("no_such_module", "", needs_device=False)
    assert worker.run_part(part, Quiet(), tmp_path, 60, tiny=True) == worker.DONE
    made = read(tmp_path / "no_such_module.json")["measurements"]["tasks"]
    assert made["status"] == "failed"
    assert "ModuleNotFoundError" in made["reason"]


def test_an_illegal_access_ends_the_process_and_only_that(tmp_path: Path) -> None:
    device, log = Quiet(), []

    def breaks() -> None:
        device.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    tasks = [Task("breaks", 0, breaks), Task("next", 0, lambda: log.append(1))]
    device.stand_in = False
    assert run_tasks(tmp_path, tasks, device=device) == worker.RESTART
    assert states(tmp_path) == {"breaks": "failed"}
    assert log == []
    fresh = Quiet()
    fresh.stand_in = False
    assert run_tasks(tmp_path, tasks, device=fresh) == worker.DONE
    assert states(tmp_path) == {"breaks": "failed", "next": "ok"}


def test_a_device_that_breaks_while_contenders_are_timed(tmp_path: Path) -> None:
    device = Quiet()

    def breaks() -> None:
        device.broken = True
        raise RuntimeError("CUDA error")

    tasks = [Task("contest", 0, lambda: contest(device, [Entry("one", breaks)], rounds=1, warm_ups=0))]
    assert run_tasks(tmp_path, tasks, device=device) == worker.RESTART
    assert "the device answered no more" in read(tmp_path / "made.json")["measurements"]["contest"]["reason"]


def test_what_ended_its_process_twice_has_failed(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):  # as good as a crash: nothing is written down any more
            run_tasks(tmp_path, [Task("crashes", 0, raises(KeyboardInterrupt()))])  # type: ignore[arg-type]
        assert states(tmp_path) == {"crashes": "running"}
    assert run_tasks(tmp_path, [Task("crashes", 0, raises(KeyboardInterrupt()))]) == worker.DONE  # type: ignore[arg-type]
    assert states(tmp_path) == {"crashes": "failed"}


def test_time_is_kept(tmp_path: Path) -> None:
    """What would not fit is not begun; what goes on next time does not count as a crash."""
    log: list[str] = []
    tasks = [Task("short", 0, lambda: log.append("short")), Task("long", 0, lambda: time.sleep(1.5))]
    assert run_tasks(tmp_path, tasks, seconds=0.5) == worker.UNFINISHED
    assert states(tmp_path) == {}
    tasks.append(Task("later", 0, lambda: log.append("later")))
    assert run_tasks(tmp_path, tasks, seconds=2.0) == worker.UNFINISHED
    assert states(tmp_path) == {"short": "ok", "long": "ok"}
    for _ in range(3):
        pausing = [Task("pausing", 0, raises(Unfinished("half of it")))]
        assert run_tasks(tmp_path, pausing) == worker.UNFINISHED
    assert states(tmp_path)["pausing"] == "running"
    assert run_tasks(tmp_path, tasks) == worker.DONE
    assert log == ["short", "later"]


def test_the_budget_is_for_everything_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []

    def start(options: Any, out: Path, arguments: list[str], seconds: float) -> int:
        calls.append((arguments[0], seconds))
        now.append(now[-1] + min(seconds, 400.0))
        return next(codes, 0)

    now, codes = [0.0], iter([4, 0, 3])
    monkeypatch.setattr(command, "_start", start)
    monkeypatch.setattr(command.time, "monotonic", lambda: now[-1])
    options = command.parse(["--budget", "1500", "--stand-in"])
    command._run(options, ["build", "run", "floor", "rows"], tmp_path)
    # 4: another process for the rest of the part; no part has more than 540 s, nor all together more than 1500.
    assert calls == [("build", 540.0), ("build", 140.0), ("run", 540.0), ("floor", 540.0), ("rows", 160.0)]
    calls.clear()
    now.append(0.0)
    command._run(command.parse(["--budget", "15"]), ["build", "run"], tmp_path)
    assert calls == [("build", 15.0)]


def has_ended(file: Path) -> bool:
    """Whether the process whose number is in a file is gone, or soon is: a kill takes a moment."""
    for _ in range(100):
        try:
            os.kill(int(file.read_text()), 0)
            if Path(f"/proc/{file.read_text().strip()}/stat").read_text().split()[2] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all that it started."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nsleep 60 & echo $! > " + str(tmp_path / "child") + "\nwait\n")
    fake.chmod(0o755)
    monkeypatch.setattr(command.sys, "executable", str(fake))
    monkeypatch.setattr(command, "GRACE_SECONDS", 1.0)
    assert command._start(command.parse([]), tmp_path, ["run", "0", "0", "0"], 0.0) == worker.UNFINISHED
    assert has_ended(tmp_path / "child")


def test_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    store = Store(tmp_path, "part", {"gpu": "g"})
    store.begin("one")
    store.finish("one", "ok", {"nan": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]
    (tmp_path / "part.json").write_text("{half")
    assert read(tmp_path / "part.json") == {"measurements": {}}
    write_atomically(tmp_path / "new" / "file", "text")
    assert (tmp_path / "new" / "file").read_text() == "text"


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` changes of this process is as before afterwards."""
    for name, value in (("PYTHONPATH", ""), ("TRITON_INTERPRET", "0")):
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])


@pytest.mark.usefixtures("apart")
def test_unknown_parts_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"--part: expected some of build, run, .*; got flor"):
        command.main(["--part", "flor", "--stand-in"])


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(
        SystemExit, match=r"needs a CUDA device; torch .* (is built without CUDA|sees no driver or GPU)"
    ):
        the_device(stand_in=False)


@pytest.mark.usefixtures("apart")
def test_results_go_to_the_devices_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(command, "_run", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(summary, "write_summary", lambda out: str(out))
    assert command.main(["--stand-in", "--tiny", "--part", "floor,rows"]) == 0
    assert calls[0][1:] == (["floor", "rows"], ROOT / "benchmarks" / "results" / "stand-in")


def test_make_calls_it() -> None:
    line = ["make", "-n", "gpu", "PART=floor", "BUDGET=540", "ARGS=--again", "GPU_PYTHON=py"]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "py -m benchmarks.gpu --part 'floor' --budget 540 --again" in shown
    options = command.parse(["--part", "floor", "--budget", "inf", "--again"])
    assert (options.part, options.budget, options.again) == ("floor", float("inf"), True)


def test_a_checkout_that_is_not_installed_finds_its_rooms() -> None:
    """Started elsewhere, without site-packages: kernels/ and recipes/ are inside the package."""
    code = (
        "import sitecustomize, grpo_fast.recipes, importlib.util as u; print(u.find_spec('grpo_fast.kernels').origin)"
    )
    path = os.pathsep.join([str(command.SOURCE), str(ROOT)])
    line = [sys.executable, "-S", "-c", code]
    done = subprocess.run(line, cwd="/", env={"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


# -- what parts start -------------------------------------------------------------------------------------------------


def test_what_a_part_starts_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what that started; it goes on next time, unless it had all the time that there is."""
    script = f"sleep 60 & echo $! > {tmp_path / 'child'}; wait"
    for all_the_time, error in ((60.0, Unfinished), (1.0, RuntimeError)):
        context = Context(Quiet(), TINY, tmp_path, Clock.of(1.0))
        monkeypatch.setattr(parts, "PART_SECONDS", all_the_time)
        with pytest.raises(error, match="was not done in"):
            parts.start(context, ["sh", "-c", script])
        assert has_ended(tmp_path / "child")
    context = Context(Quiet(), TINY, tmp_path, Clock.of(60))
    assert parts.start(context, ["sh", "-c", "echo $A; exit 3"], variables={"A": "value"}) == (3, "value\n")


def test_the_sanitized_program_runs() -> None:
    with stand_in():
        assert sanitized.steps("torch", "cpu") == 16


def test_sanitizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(StandIn(), TINY, tmp_path, Clock.of(60))
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if sanitizers.find() is None:
        with pytest.raises(Skip, match="compute-sanitizer is not installed"):
            sanitizers.sanitize(context, "triton", "memcheck")
    tool.write_text('#!/bin/sh\necho "$@"\necho "sanitized: done, 16 steps"\necho "===== ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    found = sanitizers.sanitize(context, "triton", "memcheck")
    assert found["errors"] == 0
    assert "--tool memcheck --error-exitcode 9" in found["log"]
    assert "-m benchmarks.gpu.sanitized triton" in found["log"]
    tool.write_text('#!/bin/sh\necho "===== Invalid __global__ read"\nexit 9\n')
    with pytest.raises(RuntimeError, match=r"(?s)memcheck on triton ended with 9.*Invalid __global__ read"):
        sanitizers.sanitize(context, "triton", "memcheck")
    tool.write_text('#!/bin/sh\necho "Error: Device not supported."\nexit 1\n')
    with pytest.raises(Skip, match="does not support this device"):
        sanitizers.sanitize(context, "triton", "memcheck")


def test_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler: skipped with the reason; one that fails: its words; what is built is asked what it is."""
    device = Quiet()
    device.stand_in = False
    context = Context(device, TINY, tmp_path, Clock.of(60), python=str(tmp_path / "python"))
    monkeypatch.setattr(build, "built_file", lambda name: None)
    monkeypatch.setattr(build, "_nvcc", lambda: None)
    with pytest.raises(Skip, match="there is no nvcc"):
        build.extension(context, "_cuda")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$GRPO_FAST_CUDA$GRPO_FAST_CPU $@"\necho "error: no"\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(build, "_nvcc", lambda: "/usr/bin/nvcc")
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*10 setup.py build_ext --inplace --force.*error: no"):
        build.extension(context, "_cuda")
    python.write_text('#!/bin/sh\necho "sm_90a"\n')
    found = build.extension(context, "_cuda")
    assert (found["built"], found["says"]) == (True, "sm_90a")
    monkeypatch.setattr(build, "built_file", lambda name: Path("_cuda.so"))
    assert not build.extension(context, "_cuda")["built"]
    assert build.imports()["torch"] == torch.__version__


TESTS = """
import pytest
def test_one(): pass
def test_two(): assert False, "wrong"
@pytest.mark.skip(reason="no card")
def test_three(): pass
def test_four():
    import pathlib
    pathlib.Path("log").open("a").write("four ")
"""


def test_tests_are_noted_and_gone_on_with(tmp_path: Path) -> None:
    from benchmarks.gpu.noted_tests import LOG_VARIABLE, SECONDS_VARIABLE, STAMP_VARIABLE, outcomes
    from benchmarks.gpu.parts.right import summary as tests_summary

    (tmp_path / "test_it.py").write_text(TESTS)
    log = tmp_path / "notes.jsonl"

    def run(seconds: float, stamp: str = "s", expect: tuple[int, ...] = (0, 1, 2, 5)) -> dict[str, Any]:
        variables = {LOG_VARIABLE: str(log), STAMP_VARIABLE: stamp, SECONDS_VARIABLE: str(seconds)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.noted_tests", "test_it.py"],
            cwd=tmp_path, env={**os.environ, **variables, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode in expect, done.stdout + done.stderr
        return {name.partition("::")[2] or name: entry["outcome"] for name, entry in outcomes(log, stamp).items()}

    assert run(-1.0) == {"test_one": "passed"}  # time is over after the first
    everything = {"test_one": "passed", "test_two": "failed", "test_three": "skipped", "test_four": "passed"}
    assert run(60.0) == everything | {"complete": "passed"}
    assert run(60.0) == everything | {"complete": "passed"}
    assert (tmp_path / "log").read_text() == "four "
    assert run(60.0, stamp="other sources") == everything | {"complete": "passed"}
    assert (tmp_path / "log").read_text() == "four four "
    found = tests_summary(outcomes(log, "s"))
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    assert "wrong" in next(iter(found["failures"].values()))
    assert list(found["skips"]) == ["Skipped: no card"]
    for _ in range(2):  # half a line of a killed process; a test that began twice and never ended
        log.open("a").write(json.dumps({"stamp": "s", "test": "test_it.py::crash", "outcome": "began"}) + "\n")
    log.open("a").write('{"stamp": "s", "te')
    assert outcomes(log, "s")["test_it.py::crash"]["outcome"] == "failed"


def test_a_test_that_breaks_the_device_ends_the_session(tmp_path: Path) -> None:
    from benchmarks.gpu.noted_tests import LOG_VARIABLE, SECONDS_VARIABLE, STAMP_VARIABLE, outcomes

    (tmp_path / "test_it.py").write_text(
        'def test_one(): raise RuntimeError("CUDA error: an illegal memory access")\ndef test_two(): pass\n'
    )
    log, line = tmp_path / "notes.jsonl", [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.noted_tests"]
    variables = {LOG_VARIABLE: str(log), STAMP_VARIABLE: "s", SECONDS_VARIABLE: "60", "PYTHONPATH": str(ROOT)}
    for expected in ({"failed"}, {"failed", "passed"}):
        subprocess.run(line, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, check=False)
        assert {entry["outcome"] for entry in outcomes(log, "s").values()} == expected
    assert "complete" in outcomes(log, "s")
