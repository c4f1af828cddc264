"""The command behind `make gpu`: runs the parts, each in a process of its own, within a budget; then the summary."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).resolve().parent / "source"
GRACE_SECONDS = 45.0
"""A worker that is this much over its time is ended."""
LEAST_SECONDS = 20.0
"""A part is not begun with less."""
RESTARTS = 12


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", default="", help="parts to run, comma-separated; default: all")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results/<device>")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything together")
    parser.add_argument("--part-seconds", type=float, help="seconds for one part at most; default: 540")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--retry", action="store_true", help="measure what failed, too")
    parser.add_argument("--summary", action="store_true", help="only draw the summary of what is there")
    parser.add_argument("--stand-in", action="store_true", help="a model of a GPU on the CPU: the times mean nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: shows that the code runs")
    parser.add_argument("--in-process", action="store_true", help="parts in this process: for a debugger, and CI")
    parser.add_argument("--name", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=4, metavar=("PART", "SECONDS", "AGAIN", "RETRY"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    os.chdir(ROOT)
    if options.stand_in:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    _import_source()
    from benchmarks.gpu.parts import PARTS

    names = [name.strip() for name in options.part.split(",") if name.strip()] or list(PARTS)
    unknown = set(names) - set(PARTS)
    if unknown:
        raise SystemExit(f"--part: expected some of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"make gpu: {sys.executable} has no torch ({error}); PYTHON=... picks another interpreter"
        ) from error
    if options.name:
        print(_device(options).slug)
        return 0
    out = (options.out or ROOT / "benchmarks" / "results" / _slug(options)).resolve()
    if options.worker:
        return _worker(options, out)
    if not options.summary:
        _run(options, names, out)
    from benchmarks.gpu.summary import write_summary

    print("\n" + write_summary(out))
    return 0


def _import_source() -> None:
    """In this process, too, `grpo_fast` may be a checkout that is not installed."""
    if str(SOURCE) not in sys.path:
        import runpy

        runpy.run_path(str(SOURCE / "sitecustomize.py"))


def _device(options: argparse.Namespace) -> Any:
    from benchmarks.gpu.device import the_device

    return the_device(stand_in=options.stand_in)


def _slug(options: argparse.Namespace) -> str:
    """The device's name, asked for in another process: this one leaves the GPU to the workers."""
    flags = ["--stand-in"] * options.stand_in
    line = [sys.executable, "-m", "benchmarks.gpu", "--name", *flags]
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)  # it has said why
    return done.stdout.strip().splitlines()[-1]


def _worker(options: argparse.Namespace, out: Path) -> int:
    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.worker import die_with_parent, run_part

    if not options.in_process:
        die_with_parent()
    part, seconds, again, retry = options.worker
    marks = {"again": float(again), "retry": float(retry)}
    return run_part(PARTS[part], _device(options), out, float(seconds), tiny=options.tiny, **marks)


def _run(options: argparse.Namespace, names: Sequence[str], out: Path) -> None:
    """The parts, until they are done or the budget is."""
    from benchmarks.gpu.parts import PART_SECONDS, PARTS
    from benchmarks.gpu.worker import DONE, RESTART, UNFINISHED

    start = time.monotonic()
    now = str(time.time())
    marks = [now if options.again else "0", now if options.again or options.retry else "0"]
    for name in names:
        part_end, before = time.monotonic() + (options.part_seconds or PART_SECONDS), None
        for _ in range(RESTARTS):
            left = min(options.budget - (time.monotonic() - start), part_end - time.monotonic())
            if left < min(LEAST_SECONDS, options.budget / 2):
                print(f"{name}: {max(left, 0):.0f} s are left; next time", flush=True)
                break
            print(f"{name}: {PARTS[name].title} (at most {left:.0f} s)", flush=True)
            code = _start(options, out, [name, f"{left:.1f}", *marks], left)
            if code in (DONE, UNFINISHED):
                break
            if code > 0 and code == before != RESTART:
                print(f"{name}: its process ended with {code} again; see above", flush=True)
                break
            print(f"{name}: its process ended with {code}; what is left goes on in another", flush=True)
            before = code


def _start(options: argparse.Namespace, out: Path, worker: list[str], seconds: float) -> int:
    """Run a worker to its end and return what its process returns."""
    flags = [flag for flag, on in (("--stand-in", options.stand_in), ("--tiny", options.tiny)) if on]
    arguments = [*flags, "--out", str(out), "--worker", *worker]
    if options.in_process:
        return main([*arguments, "--in-process"])
    # A process group of its own: what a part starts ends with it.
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{worker[0]}: {GRACE_SECONDS:.0f} s over its time, ended", flush=True)
        return 3
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _on_signal(number: int, frame: Any) -> None:
    """A polite kill ends the worker, too (the `finally` above)."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _on_signal)
    sys.exit(main())
